"""Does a higher learning rate help PAM's permutation step? The same step at several rates.

PAM from the order in which the units stand, for pairs of a preset's networks (from the store; what
is missing is trained). The permutation step is as long as the preset says, at each rate p_lr in
turn, which falls as `--schedule` says (the authors': "paper", nearly constant for 20 epochs; else
the preset's); one epoch of the curve step, by the same schedule, ends the run. A row has Q on PAM's
probe, training images as training shows them: before the step, at the doubly stochastic matrices
(`relaxed`), at the permutation that won by Q and the leash (`rounded`, Q alone), and where
alignment begins (`aligned`); which candidate won (`chosen`: 0 the old permutation, 1 the
assignment, 2 … the samples); the share of units that moved, and of those that stand where alignment
puts them. Nothing is measured on test images.

The networks are those of the preset, whatever its precision; the step is computed in `--precision`,
which each row names. The step itself is kept in the store, so a run that was stopped goes on from
its last epoch, and no step is computed twice. `--out` has the rows with the provenance of their
steps, which chapter 11 shows. Only one process may write to a file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mcnotes import cache, curves, train
from mcnotes.lab import Experiment
from mcnotes.lab.experiment import curve_seed
from mcnotes.matching import pam
from mcnotes.symmetry import Perm
from tools import presets

FILE = cache.ROOT / "data" / "results" / "pam_steps.json"
RATES = [0.05, 0.5, 5.0]  # the first where the authors begin


def alike(p: Perm, q: Perm) -> float:
    """The share of units that both permutations place alike."""
    return 1 - pam.distance(p, q) ** 2 / 2 / sum(map(len, q.values()))


def stepped(
    lab: Experiment, recipe: train.Recipe, pair: tuple[int, int], rate: float
) -> dict[str, Any]:
    """What a permutation step at this rate reached."""
    settings = replace(lab.pam_settings(), epochs=(1,), p_lr=rate)
    problem = pam.Problem(lab.net, lab.sym, lab.task, recipe, settings)
    start = curves.bezier(*lab.pair(*pair, "unaligned"))

    def compute(checkpoint: cache.Checkpoint) -> dict[str, Tensor]:
        found = pam.fit(problem, start, seed=curve_seed(*pair), checkpoint=checkpoint)
        return found.perm | {"history": torch.tensor(found.history).double()}

    ends = [lab.endpoint_config(seed) for seed in pair]
    config: dict[str, Any] = {"what": "pam step", "ends": ends}
    config |= {"pam": asdict(settings), "recipe": asdict(recipe)}
    found = cache.tensors(config, compute)
    (row,) = found.pop("history").tolist()
    step = pam.Iteration(*row)
    return {
        "before": step.before,
        "relaxed": step.relaxed,
        "rounded": step.rounded,
        "aligned": problem.value(curves.bezier(*lab.pair(*pair, "aligned"))),
        "chosen": int(step.chosen),
        "changed": step.changed,
        "as_aligned": alike(found, lab.aligned(*pair)),
        "provenance": cache.origin(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="cpu-tinyten-cifar10")
    parser.add_argument("--pairs", type=int, default=2, help="how many of the preset's")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="P_LR")
    parser.add_argument("--precision", choices=train.PRECISIONS, default="float32")
    parser.add_argument("--schedule", choices=[*train.SCHEDULES], help="default: the preset's")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    values = presets.load(args.preset)
    lab = Experiment.of(values, also=["pairs"])
    record = rows.opened(args.out, lab, "rows")
    recipe = replace(
        lab.recipe(lab.curve_epochs),
        precision=args.precision,
        schedule=args.schedule or lab.schedule,
    )
    how = {"precision": recipe.precision, "schedule": recipe.schedule}
    asked = itertools.product(values["pairs"][: args.pairs], args.rates)
    for pair, rate in tqdm(list(asked)):
        measure = partial(stepped, lab, recipe, pair, rate)
        rows.add(record, "rows", {"pair": pair, "p_lr": rate, **how}, measure, args.out)
    print(json.dumps({"file": str(args.out), "rows": len(record["rows"])}))


if __name__ == "__main__":
    main()
