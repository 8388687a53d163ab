"""What bfloat16 costs on a CPU that has no instructions for it.

Training steps of `mcnotes.train.Step` on the same images: (a) in float32, (b) in bfloat16 by
`train.InFloat32`, which computes products in float32 and rounds them, (c) in bfloat16 by PyTorch
itself, in loops where there are no instructions. Rounds alternate in one process, in changing
order; the ratios are the medians of the rounds' ratios. (b) cannot be faster than (a): it takes the
same products, and converts their operands and results besides.

The last line is JSON: {"rounded": …, "own": …, …}, times in units of (a).
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import timing
import torch

from mcnotes import cache, curves, models, train


def main() -> None:
    timing.keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="tinyten", choices=sorted(models.BUILDERS))
    parser.add_argument("--width", type=float, default=None)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile in all three")
    args = parser.parse_args()
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    x, y = torch.rand(args.batch, 3, 32, 32), torch.randint(10, (args.batch,))
    net = models.build(args.network, num_classes=10, in_channels=3, width=args.width, image_size=32)
    single = curves.Curve((train.initialise(net.train(), 1),))

    def step(precision: str, *, native: bool) -> partial[torch.Tensor]:
        recipe = train.Recipe(1, args.batch, precision=precision, compile=args.compile)
        made = train.Step(net, single, slice(0, 1), recipe, cpu)
        made.native = native
        return partial(made, x, y, torch.ones(1), 0.01)

    work = {
        "float32": step("float32", native=True),
        "rounded": step("bfloat16", native=False),
        "own": step("bfloat16", native=True),
    }
    for each in work.values():
        timing.seconds(each, cpu)
    rounds: list[dict[str, float]] = []
    for i in range(args.rounds):
        order = list(work) if i % 2 else list(work)[::-1]
        rounds.append({name: timing.seconds(work[name], cpu) for name in order})
    plain = statistics.median(r["float32"] for r in rounds)
    rounded, own = (
        round(statistics.median(r[name] / r["float32"] for r in rounds), 2)
        for name in ("rounded", "own")
    )
    print(
        f"{args.network}, batch {args.batch}, {torch.get_num_threads()} threads, on a CPU that "
        f"computes {train.native_precision(cpu)}: a step in float32 takes {1e3 * plain:.1f} ms, in "
        f"bfloat16 {rounded} times as long (rounded), by PyTorch itself {own} times"
    )
    found = {"rounded": rounded, "own": own, "float32_ms": round(1e3 * plain, 2)}
    found |= {"network": args.network, "compile": args.compile}
    print(json.dumps(found | {"hardware": cache.provenance(0.0)["hardware"]}))


if __name__ == "__main__":
    main()
