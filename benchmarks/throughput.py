"""Images a second of a whole machine: our training loop beside the usual one, and the limit.

Compares, for one network on random 32 x 32 x 3 images with the augmentation of CIFAR, (a) the
book's trainer, `mcnotes.train`, as a batch runs it: `--together` processes side by side, each with
a network of its own (on a CPU one of one thread for each core), in `--precision`; and (b) the usual
loop: torchvision's transforms image by image in a DataLoader (`--workers`), `model(x)`,
`loss.backward()`, torch.optim.SGD with Nesterov momentum, in float32, on all threads. Same network
and batch size. Epochs alternate, in changing order; the ratio is the median over the rounds.

The limit: the operations and bytes of the convolutions, BatchNorms, ReLUs and the linear layer of
a step, each tensor read and written once by each, three times over (forward, and backward for
inputs and weights), at the matrix-product speed in that precision and the copy bandwidth that this
machine shows.

The last line is JSON: {"ratio": …, "images_per_second": …, "share_of_limit": …, …}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import timing
import torch
from input_pipeline import Pictures
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from mcnotes import models, train
from mcnotes.curves import Curve
from mcnotes.data import SOURCES, Split, Task

POINTWISE = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


def pictures(n: int, device: torch.device) -> Task:
    """Noise with the shape, type and layout of CIFAR."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, 10, (n,), generator=g)
    split = Split(images.permute(0, 3, 1, 2).to(device), labels.to(device))
    names = tuple(map(str, range(10)))
    return Task("noise", split, split.first(0), split.first(0), names, SOURCES["cifar10"].augment)


def ours(net: nn.Module, task: Task, recipe: train.Recipe) -> Callable[[], float]:
    """An epoch at each call."""
    curve = Curve((train.initialise(net, 1),))
    step = train.Step(net, curve, slice(0, 1), recipe, task.device)
    return lambda: train._epoch(step, curve, task, 1, 0)


def usual(net: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    """An epoch at each call."""
    device = torch.device(args.device)
    net = net.to(device).train()
    loader = DataLoader(
        Pictures(pictures(args.images, torch.device("cpu")).train, "nearest"),
        args.batch,
        shuffle=True,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=args.workers > 0,
    )
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def epoch() -> None:
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            sgd.zero_grad()
            cross_entropy(net(x), y).backward()
            sgd.step()

    return epoch


def needs(net: nn.Module, size: int) -> tuple[float, float]:
    """Operations and bytes (at `size` bytes a number) of a training step, for each image."""
    moved = []

    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        moved.append(size * (given[0].numel() + out.numel()))

    hooks = [m.register_forward_hook(hook) for m in net.modules() if isinstance(m, POINTWISE)]
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(2, 3, 32, 32, device=device))
    for each in hooks:
        each.remove()
    return 3 * counter.get_total_flops() / 2, 3 * sum(moved) / 2


def machine(device: torch.device, precision: torch.dtype) -> tuple[float, float]:
    """Operations and bytes a second of a large matrix product and of a large copy."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=precision)
    product = statistics.median(timing.seconds(lambda: a @ a, device) for _ in range(8))
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(timing.seconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * n**3 / product, 2 * source.numel() * 4 / copy


epoch: Callable[[], float]  # of (a), in a process that `prepare` has made ready


def prepare(args: argparse.Namespace) -> None:
    """Make ready, in a process of (a), and run an epoch to warm up."""
    if args.device == "cpu":
        torch.set_num_threads(max(1, args.cores // args.together))
    task = pictures(args.images, torch.device(args.device))
    net = build(args.network).to(args.device)
    recipe = train.Recipe(
        args.rounds + 1, args.batch, precision=args.precision, compile=args.compile
    )
    global epoch
    epoch = ours(net, task, recipe)
    epoch()


def one_epoch() -> None:
    """An epoch in such a process."""
    epoch()


def build(network: str) -> nn.Module:
    """The network, for CIFAR."""
    return models.build(network, num_classes=10, in_channels=3, image_size=32)


def options() -> argparse.Namespace:
    """What the command line says."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    cores = len(os.sched_getaffinity(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--network", default="tinyten", choices=sorted(models.BUILDERS))
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=cores, help="of the DataLoader")
    parser.add_argument("--precision", default="auto", choices=[*train.PRECISIONS, "auto"])
    parser.add_argument("--compile", action="store_true", help="torch.compile in (a)")
    parser.add_argument("--together", type=int, help="processes of (a)")
    parser.add_argument("--device", default=device)
    parser.set_defaults(cores=cores)
    args = parser.parse_args()
    args.together = args.together or (cores if args.device == "cpu" else 1)
    if args.precision == "auto":
        args.precision = train.native_precision(torch.device(args.device))
    return args


def main() -> None:
    args = options()
    device = torch.device(args.device)
    apart = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), prepare, (args,))
    pools = [apart() for _ in range(args.together)]

    def side_by_side() -> None:
        for running in [pool.submit(one_epoch) for pool in pools]:
            running.result()

    side_by_side()
    work = {"ours": side_by_side, "usual": usual(build(args.network), args)}
    work["usual"]()
    rounds = []
    for i in range(args.rounds):
        order = list(work) if i % 2 else list(work)[::-1]
        rounds.append({name: timing.seconds(work[name], device) for name in order})
    for pool in pools:
        pool.shutdown()
    found = report(args, rounds)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps(found | {"device": device_name}))


def report(args: argparse.Namespace, rounds: list[dict[str, float]]) -> dict[str, object]:
    """In words, and as values."""
    speed = args.together * args.images / statistics.median(r["ours"] for r in rounds)
    plain = args.images / statistics.median(r["usual"] for r in rounds)
    ratio = statistics.median(args.together * r["usual"] / r["ours"] for r in rounds)
    low = args.precision == "bfloat16"
    operations, moved = needs(build(args.network).to(args.device), 2 if low else 4)
    device = torch.device(args.device)
    native = train.native_precision(device) == "bfloat16"  # else it computes in float32, and rounds
    flops, bandwidth = machine(device, torch.bfloat16 if low and native else torch.float32)
    limit = 1 / max(operations / flops, moved / bandwidth)
    print(
        f"{args.network}, {args.images:,} images, batch {args.batch}, {args.together} processes in "
        f"{args.precision}: {speed:,.0f} images a second, {ratio:.1f} times the usual loop's "
        f"{plain:,.0f}; {speed / limit:.0%} of the limit"
    )
    print(
        f"an image: {operations / 1e6:.1f} million operations, {moved / 1e6:.2f} MB; here "
        f"{flops / 1e12:.2f} Tflop/s, {bandwidth / 1e9:.0f} GB/s"
    )
    return {
        "ratio": round(ratio, 2),
        "images_per_second": round(speed),
        "usual": round(plain),
        "share_of_limit": round(speed / limit, 3),
        "limited_by": "memory" if moved / bandwidth > operations / flops else "arithmetic",
        "network": args.network,
        "precision": args.precision,
        "together": args.together,
    }


if __name__ == "__main__":
    main()
