"""On which images BatchNorm is computed: plain ones, or augmented as in training?

For networks of a preset that was trained with augmentation (from the store; what is missing is
trained): test accuracy with statistics of the plain training images, and of the same images
augmented as training did; and, for comparison, accuracy with each batch's own statistics, on test
images and, as in training, on augmented training images. `--out` writes the numbers with their
provenance, which chapter 11 shows. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mcnotes import cache, evaluate
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.lab import Experiment
from tools import presets


def with_own_statistics(lab: Experiment, theta: Theta, images: Split) -> float:
    """The accuracy of a network in training mode, in batches of 1,000."""
    right = 0
    with evaluate.mode(lab.net, training=True), torch.no_grad():
        for x, y in images.batches(1000):
            state = {name: value.clone() for name, value in theta.items()}  # statistics change
            outputs = torch.func.functional_call(lab.net, state, (x,))
            right += int((outputs.argmax(1) == y).sum())
    return right / len(images)


def accuracies(lab: Experiment, seed: int) -> dict[str, float]:
    """Of the network of one seed."""
    theta, test = lab.endpoint(seed), lab.task.test
    found: dict[str, float] = {"seed": seed}
    for name, images in {
        "plain": lab.task.train.first(lab.statistics),
        "augmented": lab.known,
    }.items():
        fresh = evaluate.batchnorm(lab.net, theta, images)
        found[name] = evaluate.score(lab.net, fresh, test).accuracy
    found["own batch"] = with_own_statistics(lab, theta, test)
    found["in training"] = with_own_statistics(lab, theta, lab.known)
    return found


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
