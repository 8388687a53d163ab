"""How strong may PAM's leash be? Curves that are trained with leashes of several strengths.

PAM's curve step adds ‖φ − φ₀‖²/2ν_φ to the loss, where φ₀ is the middle of the line. For each pair
of a preset's networks (from the store; what is missing is trained), from the order in which the
units stand and from alignment, a plain curve is trained with each ν_φ: no permutation step is in
the way. The lowest and the mean accuracy along the curve are those on the test images; `moved` is
‖φ − φ₀‖. `--out` has the numbers with their provenance, which chapter 11 shows; rows that the file
holds already are not computed again; the seconds of a row have the training of its pair in them
where that was missing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import rows
from tqdm.auto import tqdm

from mcnotes import curves, evaluate, train
from mcnotes.lab import Experiment
from mcnotes.matching import pam
from tools import presets

ROOT = Path(__file__).resolve().parents[1]
PULLS = [0.0, 1e-4, 1e-3]  # 1/ν_φ; 0: no leash
STARTS = ["unaligned", "aligned"]
SEED = 1  # of the batches: the same for all curves


def trained(lab: Experiment, pair: tuple[int, int], start: str, pull: float) -> dict[str, Any]:
    """A curve of this leash: its lowest and mean accuracy, and how far φ went."""
    fresh = curves.bezier(*lab.pair(*pair, start))
    recipe = lab.recipe(lab.curve_epochs)
    curve = train.fit_curve(lab.net, fresh, lab.task, recipe, seed=SEED, pull=pull).curve
    path = evaluate.profile(lab.net, curve, lab.task.test, statistics=lab.known, points=lab.points)
    moved = pam.shift(lab.net, fresh, curve)
    return {"min": path.min_accuracy, "avg": path.mean_accuracy, "moved": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="laptop-cifar10")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "leash.json")
    args = parser.parse_args()
    values = presets.load(args.preset)
    lab = Experiment.of(values, also=["pairs"])
    record = rows.opened(args.out, lab, "rows")
    for pair, start, pull in tqdm(list(itertools.product(values["pairs"], STARTS, PULLS))):
        labels = {"pair": pair, "start": start, "pull": pull}
        rows.add(record, "rows", labels, partial(trained, lab, pair, start, pull), args.out)
    print(json.dumps({"file": str(args.out), "rows": len(record["rows"])}))


if __name__ == "__main__":
    main()
