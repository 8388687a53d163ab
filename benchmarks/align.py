"""What neuron alignment costs beside the two forward passes that it cannot do without.

Compares, over the same images in the same order, (a) a forward pass of network A and one of network
B in evaluation mode at `--batch` images, (b) `mcnotes.matching.stream` at the same batch, (c) that
in micro-batches of 64, the default on a CPU, and (d) nothing but the forward passes of (c). Rounds
of all alternate in one process, in changing order; ratios are medians of the rounds' ratios. The
assignments themselves, and finding the symmetry, are not part of it: they are timed apart.

Freed memory stays in the process, so that page faults do not count. `as_it_is` has the same ratios
from a fresh process that leaves memory to the allocator, as a plain program does: there the forward
passes at `--batch` pay for their large tensors each time, and micro-batches do not.

Memory: the highest resident size of a fresh process that aligns on 2,000, 10,000 and 50,000 of
50,000 images; all of the images are in memory each time, so only the use of them differs.

The limits of (b) and (c): the forward passes, (a) or (d), and beside them either the operations of
the moments, one U x U product a tap, at the speed of the forward passes, or one reading of all
activations at the speed of a sum over as many numbers, whichever takes longer.

The last line is JSON: {"ratio_to_two_forwards": …, "ratio_micro_batches": …, "limit_ratio": …,
"limit_micro_batches": …, "as_it_is": {…}, "peak_rss_mb": {"2000": …, "10000": …, "50000": …}, …}.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable

import timing
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from mcnotes import matching, models, symmetry, train
from mcnotes.calls import Batch
from mcnotes.data import Split
from mcnotes.matching import activations

STORED = 50_000
RATIOS = ("ratio_to_two_forwards", "ratio_micro_batches", "two_forwards_s")


def pictures(n: int, device: str) -> Split:
    """Noise with the shape, type and layout of CIFAR."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=g)
    return Split(images.permute(0, 3, 1, 2).to(device), torch.zeros(n).long().to(device))


def set_up(args: argparse.Namespace, stored: int) -> tuple[matching.Pair, Split]:
    net = models.build(args.network, num_classes=10, in_channels=3, width=args.width)
    a, b = ({n: x.to(args.device) for n, x in train.initialise(net, s).items()} for s in (1, 2))
    images = pictures(stored, args.device)
    sym = symmetry.find(net, next(images.first(2).batches(2))[0].cpu())
    return matching.Pair(net.to(args.device).eval(), sym, a, b), images


def plain(args: argparse.Namespace, *others: str) -> str:
    """The last line of what this program says in a fresh process with the usual allocator."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--network", args.network, "--batch", str(args.batch)]
    command += ["--width", str(args.width)] if args.width else []
    out = subprocess.run(
        [*command, *others], check=True, stdout=subprocess.PIPE, text=True, env=keep
    )
    return out.stdout.splitlines()[-1]


def measure(args: argparse.Namespace) -> dict[str, object]:
    pair, images = set_up(args, args.images)
    net, thetas = pair.net, (pair.theta_a, pair.theta_b)

    def forwards() -> None:
        with torch.no_grad():
            for theta in thetas:
                for x, _ in images.batches(args.batch):
                    torch.func.functional_call(net, theta, (x,))

    cpu = images.images.device.type == "cpu"
    cores, size = (torch.get_num_threads(), 64) if cpu else (1, 512)  # as `matching.stream` does

    def share_of_forwards(share: Iterable[Batch]) -> activations.Streams:
        own = copy.deepcopy(net)  # which threads cannot share
        with torch.no_grad():
            for x, _ in share:
                for theta in thetas:
                    torch.func.functional_call(own, theta, (x,))
        return {}

    def micro_forwards() -> None:
        first, *shares = images.shares(size, cores)
        share_of_forwards(first)
        activations._side_jobs(share_of_forwards, shares)

    work: dict[str, Callable[[], object]] = {
        "forwards": forwards,
        "micro forwards": micro_forwards,
        "same batch": lambda: activations.stream(pair, images, batch_size=args.batch),
        "micro-batches": lambda: activations.stream(pair, images),
    }
    for each in work.values():
        each()
    rounds = []
    for i in tqdm(range(args.rounds), desc="rounds"):
        order = list(work) if i % 2 else list(work)[::-1]
        rounds.append({name: timing.seconds(work[name], args.device) for name in order})
    x = next(images.batches(64))[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    taps = [t for each in pair.sym.tapper(net)(pair.theta_a, x).values() for t in each]
    moments = sum(2 * t.shape[0] * t.shape[1] ** 2 for t in taps)
    numbers = 2 * sum(t.numel() for t in taps) * len(images) / len(x)
    large = torch.ones(2**26, device=images.images.device)
    reading = timing.seconds(large.sum, args.device, 10) / large.numel() * numbers
    whole = timing.seconds(lambda: matching.match(pair, images.first(64)), args.device)

    def ratio(name: str) -> float:
        return round(statistics.median(r[name] / r["forwards"] for r in rounds), 3)

    two = statistics.median(r["forwards"] for r in rounds)
    least = max(moments / (2 * counter.get_total_flops()), reading / two)
    return {
        "ratio_to_two_forwards": ratio("same batch"),
        "ratio_micro_batches": ratio("micro-batches"),
        "ratio_micro_forwards": ratio("micro forwards"),
        "limit_ratio": round(1 + least, 3),
        "limit_micro_batches": round(ratio("micro forwards") + least, 3),
        "two_forwards_s": round(two, 3),
        "find_and_assign_s": round(whole, 3),
    }


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--network", default="tinyten", choices=sorted(models.BUILDERS))
    parser.add_argument("--width", type=float, default=None, help="default: the paper's")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stored", type=int, default=STORED, help="images held for the memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--as-it-is", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_it_is:
        print(json.dumps(measure(args)))
        return
    if not args.memory_of:
        timing.keep_freed_memory()
    if args.memory_of:
        import resource

        pair, images = set_up(args, args.stored)
        matching.match(pair, images.first(args.memory_of), batch_size=args.batch)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    found = measure(args)
    sizes = sorted({args.stored // 25, args.stored // 5, args.stored})
    memory = ["--device", "cpu", "--stored", str(args.stored), "--memory-of"]
    found["peak_rss_mb"] = {str(n): round(float(plain(args, *memory, str(n))), 1) for n in sizes}
    few = ["--device", args.device, "--images", str(args.images), "--rounds", str(args.rounds)]
    other = json.loads(plain(args, *few, "--as-it-is"))
    found["as_it_is"] = {name: other[name] for name in RATIOS}
    print(
        f"{args.network}, {args.images:,} images of 32 x 32 x 3, {args.device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"two forwards {found['two_forwards_s']} s; alignment takes at batch {args.batch} "
        f"{found['ratio_to_two_forwards']} times as long, in micro-batches of 64 "
        f"{found['ratio_micro_batches']} times; limits {found['limit_ratio']} and "
        f"{found['limit_micro_batches']}; usual allocator: {found['as_it_is']}"
    )
    print(json.dumps(found | {"network": args.network, "device": args.device}))


if __name__ == "__main__":
    main()
