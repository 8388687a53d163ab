"""What a training step on a curve costs beside a plain one.

Compares, on the same batches, (a) a plain PyTorch step: `net(x)`, `backward`, `torch.optim.SGD`
with Nesterov momentum and weight decay, and (b) a step of `mcnotes.train.Step` on the inner point
of a quadratic Bézier curve with the same optimiser. Rounds of a few steps of each alternate in one
process, in changing order; the ratio is the median of the rounds' ratios.

The limit: the curve step must read three control points and write one point more than the plain
step, 4·(k + 1) bytes a parameter; the output states that time at the measured copy bandwidth.

The last line is JSON: {"ratio": …, "plain_ms": …, "curve_ms": …, …}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import timing
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mcnotes import curves, models, train


def plain_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    net.train()
    optimiser = torch.optim.SGD(
        net.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def step() -> object:
        loss = cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return step


def curve_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    net.train()
    a, b = ({n: v.to(x.device) for n, v in train.initialise(net, s).items()} for s in (1, 2))
    curve = curves.bezier(a, b)
    recipe = train.Recipe(epochs=1, lr=0.01)
    step = train.Step(net, curve, slice(1, -1), recipe, x.device)
    weights = curve.weights(torch.rand(64, dtype=torch.float64)).float().to(x.device)
    turn = iter(range(10**9))
    return lambda: step(x, y, weights[next(turn) % 64], 0.01)


def main() -> None:
    timing.keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="tinyten", choices=sorted(models.BUILDERS))
    parser.add_argument("--width", type=float, default=None)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps of each kind a round")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    x = torch.rand(args.batch, 3, 32, 32, device=device)
    y = torch.randint(10, (args.batch,), device=device)

    def make() -> nn.Module:
        net = models.build(
            args.network, num_classes=10, in_channels=3, width=args.width, image_size=32
        )
        return net.to(device)

    work = {"plain": plain_step(make(), x, y), "curve": curve_step(make(), x, y)}
    for step in work.values():
        timing.seconds(step, device, 3)
    rounds: list[dict[str, float]] = []
    for i in range(args.rounds):
        order = list(work) if i % 2 else list(work)[::-1]
        rounds.append(
            {name: 1e3 * timing.seconds(work[name], device, args.steps) for name in order}
        )
    plain, curve = (statistics.median(r[name] for r in rounds) for name in ("plain", "curve"))
    ratio = statistics.median(r["curve"] / r["plain"] for r in rounds)

    big = torch.rand(2**25, device=device)
    copy = 1e3 * timing.seconds(lambda: big.clone(), device, 5)  # reads and writes 4 bytes a number
    bandwidth = 8 * big.numel() / copy * 1e3
    parameters = sum(p.numel() for p in make().parameters())
    limit = 4 * (3 + 1) * parameters / bandwidth * 1e3
    print(f"{args.network}, {parameters:,} parameters, batch {args.batch}, {device}")
    print(f"plain step {plain:.2f} ms, curve step {curve:.2f} ms, ratio {ratio:.3f}")
    print(f"limit: {limit:.4f} ms more than plain, at {bandwidth / 1e9:.1f} GB/s:", end=" ")
    print(f"{1 + limit / plain:.4f}")
    found = {
        "ratio": round(ratio, 4),
        "plain_ms": round(plain, 3),
        "curve_ms": round(curve, 3),
        "limit_ratio": round(1 + limit / plain, 5),
        "network": args.network,
        "device": str(device),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
