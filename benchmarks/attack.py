"""What a training step against PGD-5 costs beside a plain one.

Compares, on the same batches, `mcnotes.train.Step` without and with `perturb`: five steps of PGD
from a random start, then the training step on what they gave. Rounds of a few steps of each
alternate in one process, in changing order; the ratio is the median of the rounds' ratios.

The limit: six forward and backward passes, one for each step of the attack and one to train. The
attack's backward passes need no gradients of parameters, so the ratio may lie below 6.

The last line is JSON: {"ratio": …, "limit": 6, "plain_ms": …, "robust_ms": …, …}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import timing
import torch

from mcnotes import attacks, curves, evaluate, models, train


def main() -> None:
    timing.keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="tinyten", choices=sorted(models.BUILDERS))
    parser.add_argument("--width", type=float, default=None)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--attack-steps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each kind a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    x = torch.rand(args.batch, 3, 32, 32, device=device)
    x = x.to(memory_format=torch.channels_last)  # as `Split.batches` gives them
    y = torch.randint(10, (args.batch,), device=device)
    net = models.build(
        args.network, num_classes=10, in_channels=3, width=args.width, image_size=32
    ).to(device)
    curve = curves.Curve((train.initialise(net, 1),))
    recipe, weights = train.Recipe(epochs=1), torch.ones(1, device=device)
    attack = attacks.PGD(8 / 255, args.attack_steps, step=2 / 255, best=False)

    def step(perturb: attacks.Perturb | None) -> Callable[[], object]:
        one = train.Step(net, curve, slice(0, 1), recipe, device, perturb)
        return lambda: one(x, y, weights, 0.01)

    work = {"plain": step(None), "robust": step(attack)}
    rounds: list[dict[str, float]] = []
    with evaluate.mode(net, training=True):
        for one in work.values():
            timing.seconds(one, device, 2)
        for i in range(args.rounds):
            order = list(work) if i % 2 else list(work)[::-1]
            rounds.append(
                {name: 1e3 * timing.seconds(work[name], device, args.steps) for name in order}
            )
    plain, robust = (statistics.median(r[name] for r in rounds) for name in work)
    ratio = statistics.median(r["robust"] / r["plain"] for r in rounds)
    limit = args.attack_steps + 1
    print(f"{args.network}, batch {args.batch}, PGD-{args.attack_steps}, {device}")
    print(f"plain step {plain:.1f} ms, robust step {robust:.1f} ms")
    print(f"ratio {ratio:.2f}, {limit} passes")
    found = {
        "ratio": round(ratio, 3),
        "limit": limit,
        "plain_ms": round(plain, 2),
        "robust_ms": round(robust, 2),
        "network": args.network,
        "device": str(device),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
