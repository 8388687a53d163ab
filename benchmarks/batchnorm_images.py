"""On which images BatchNorm is computed: plain ones, or augmented as in training?

For networks of a preset that was trained with augmentation (from the store; what is missing is
trained): test accuracy with statistics of the plain training images, and of the same images
augmented as training did; and, for comparison, with each test batch's own statistics. `--out`
writes the numbers with their provenance, which chapter 11 shows. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mcnotes import cache, evaluate
from mcnotes.curves import Theta
from mcnotes.lab import Experiment
from tools import presets


def with_own_statistics(lab: Experiment, theta: Theta) -> float:
    """The test accuracy of a network in training mode, in batches of 1,000."""
    right = 0
    with evaluate.mode(lab.net, training=True), torch.no_grad():
        for x, y in lab.task.test.batches(1000):
            state = {name: value.clone() for name, value in theta.items()}  # statistics change
            outputs = torch.func.functional_call(lab.net, state, (x,))
            right += int((outputs.argmax(1) == y).sum())
    return right / len(lab.task.test)


def accuracies(lab: Experiment, seed: int) -> dict[str, float]:
    """Of the network of one seed."""
    theta = lab.endpoint(seed)
    few = lab.task.train.first(lab.statistics)
    kinds = {"plain": few, "augmented": few.augmented(lab.task.augment)}
    found = {
        name: float(
            evaluate.score(lab.net, evaluate.batchnorm(lab.net, theta, images), lab.task.test)[1]
        )
        for name, images in kinds.items()
    }
    return {"seed": seed} | found | {"own batch": with_own_statistics(lab, theta)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="cpu-tinyten-cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    lab = Experiment.of(presets.load(args.preset), also=["pairs"])
    if not lab.augment:
        parser.error(f"preset {args.preset} does not augment")
    rows = []
    for seed in args.seeds:
        rows.append(accuracies(lab, seed))
        print(rows[-1], flush=True)
    origin = cache.provenance(time.perf_counter() - start)
    record = {"configuration": lab.config(), "provenance": origin, "rows": rows}
    if args.out:
        cache.write_atomic(args.out, (json.dumps(record, indent=1) + "\n").encode())
    lost = [row["augmented"] - row["plain"] for row in rows]
    print(json.dumps({"lost": round(statistics.mean(lost), 4), "networks": len(rows)}))


if __name__ == "__main__":
    main()
