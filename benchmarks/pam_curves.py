"""What does a higher learning rate of PAM's permutation step give the curve that is then trained?

PAM from the order in which the units stand, for each pair of a preset's networks (from the store;
what is missing is trained), with the settings of the authors' code but for the images (all that the
preset trains on), the schedule (the preset's) and the rate p_lr of the permutation step, which is
tried at several values. The curve step is as long as a plain curve of the preset. A row has the
step (Q on PAM's probe, training images as training shows them: `before`, `relaxed` and `rounded`;
`chosen`, `changed`, `p_moved`; `after` the curve step, `phi_moved`), the share of units that end
where alignment puts them, and `min` and `avg`, the lowest and the mean accuracy on the test images
along the curve. Nothing is chosen by these: all rates are shown, beside the plain curves, unaligned
and aligned.

Curves are kept in the store, so a run that was stopped goes on. `--out` has the rows with the
provenance of their curves, which chapter 11 shows. Only one process may write to a file. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import rows
from pam_steps import alike
from tqdm.auto import tqdm

from mcnotes import cache
from mcnotes.lab import Experiment
from mcnotes.matching import pam
from tools import presets

FILE = cache.ROOT / "data" / "results" / "pam_curves.json"
RATES = [0.05, 0.5, 5.0]  # the first is the authors'
METHOD = "pam-unaligned"
PLAIN = ["unaligned", "aligned"]


def settled(lab: Experiment) -> Experiment:
    """The experiment with PAM as in the authors' code, on all images that it trains on."""
    options = asdict(pam.Settings(images=len(lab.task.train)))
    del options["epochs"]  # as many as a plain curve has
    return replace(lab, pam_options=options)


def measured(lab: Experiment, method: str, pair: tuple[int, int]) -> dict[str, Any]:
    """The accuracy along a curve, which is trained if need be."""
    path = lab.path(*pair, method)
    origin = cache.origin(lab.curve_config(*pair, method, "bezier"))
    return {"min": path.min_accuracy, "avg": path.mean_accuracy, "provenance": origin}


def trained(lab: Experiment, rate: float, pair: tuple[int, int]) -> dict[str, Any]:
    """What PAM did at this rate, and the curve that it trained."""
    lab = replace(lab, pam_options={**lab.pam_options, "p_lr": rate})
    found = lab.proximal(*pair, METHOD)
    step = found.history[0]._asdict()
    share = alike(found.perm, lab.aligned(*pair))
    return {**step, "as_aligned": share, **measured(lab, METHOD, pair)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="laptop-cifar10")
    parser.add_argument("--pairs", type=int, default=3, help="how many of the preset's")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="P_LR")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    values = presets.load(args.preset)
    lab = settled(Experiment.of(values, also=["pairs"]))
    record = rows.opened(args.out, lab, "rows")
    kinds: list[tuple[dict[str, Any], Callable[..., dict[str, Any]]]] = [
        *(({"method": method}, partial(measured, lab, method)) for method in PLAIN),
        *(({"method": METHOD, "p_lr": r}, partial(trained, lab, r)) for r in args.rates),
    ]
    asked = itertools.product(kinds, values["pairs"][: args.pairs])
    for (labels, measure), pair in tqdm(list(asked)):
        rows.add(record, "rows", {"pair": pair, **labels}, partial(measure, pair), args.out)
    print(json.dumps({"file": str(args.out), "rows": len(record["rows"])}))


if __name__ == "__main__":
    main()
