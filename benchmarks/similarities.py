"""By which similarity should units be matched? The paper's ablations, on networks of a preset.

For each pair of trained networks (from the store; what is missing is trained): the barrier on the
line, as the units stand, and after matching by correlation and by squared distance of the
activations after and before the nonlinearity, and by the weights. With `--curves`, for the trained
curves of these methods: how far the units of the curve's middle correlate with those of its two
ends, group by group. `--out` writes the numbers with their provenance, which chapter 11 shows; rows
that the file holds already are not computed again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import rows
from tqdm.auto import tqdm

from mcnotes import curves, evaluate, matching
from mcnotes.lab import Experiment
from tools import presets

WAYS: dict[str, dict[str, Any]] = {
    "none": {"method": "identity"},
    "correlation, after": {"at": "post", "cost": "correlation"},
    "correlation, before": {"at": "pre", "cost": "correlation"},
    "distance, after": {"at": "post", "cost": "l2"},
    "distance, before": {"at": "pre", "cost": "l2"},
    "weights": {"method": "weights"},
}
Measure = Callable[[Experiment, int, int, str], Mapping[str, Any]]
POINTS = 11
STATISTICS = 2000  # images for BatchNorm


def line(lab: Experiment, a: int, b: int, way: str) -> dict[str, Any]:
    """The line between two networks, the second in the order that this similarity gives."""
    pair = matching.Pair(lab.net, lab.sym, *lab.ends(a, b))
    found = matching.match(pair, lab.task.train.first(lab.match_images), **WAYS[way])
    path = evaluate.profile(
        lab.net,
        curves.line(pair.theta_a, pair.permuted(found.perm)),
        lab.task.test,
        statistics=lab.shown(STATISTICS),
        points=POINTS,
    )
    return {"barrier": path.barrier, "min": path.min_accuracy}


def middle(lab: Experiment, a: int, b: int, method: str) -> dict[str, list[float]]:
    """For each group of units: mean correlation of the curve's middle with its two ends."""
    curve = lab.curve(a, b, method)
    inner = evaluate.batchnorm(lab.net, curve(0.5), lab.known)
    images = lab.task.train.first(lab.match_images)
    ends = [
        matching.match(matching.Pair(lab.net, lab.sym, inner, end), images, method="identity")
        for end in (curve.points[0], curve.points[-1])
    ]
    return {name: [float(found.before[name].mean()) for found in ends] for name in ends[0].before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="cpu-tinyten-cifar10")
    parser.add_argument("--pairs", nargs="+", default=["1-2", "3-4"], metavar="A-B")
    parser.add_argument("--curves", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lab = Experiment.of(presets.load(args.preset), also=["pairs"])
    tasks: list[tuple[Measure, str, str]] = []
    for pair in args.pairs:
        tasks += [(line, pair, way) for way in WAYS]
        tasks += [(middle, pair, method) for method in args.curves]
    record = rows.opened(args.out, lab, "line", "middle")
    for measure, pair, of in tqdm(tasks):
        a, b = map(int, pair.split("-"))
        labels = {"pair": pair, "of": of}
        rows.add(record, measure.__name__, labels, partial(measure, lab, a, b, of), args.out)
    barriers = {f"{row['pair']} {row['of']}": row["barrier"] for row in record["line"]}
    print(json.dumps(barriers))


if __name__ == "__main__":
    main()
