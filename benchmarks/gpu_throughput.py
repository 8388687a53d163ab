"""Epochs a minute: our training loop beside the usual one, and how near both are to the limit.

Compares, for one network on random 32 x 32 x 3 images with the augmentation of CIFAR, (a) the
book's trainer, `mcnotes.train`: images on the device, augmentation in batches there, parameters in
one flat buffer; and (b) the usual loop: torchvision's transforms image by image in a DataLoader
(`--workers`), `model(x)`, `loss.backward()`, torch.optim.SGD with Nesterov momentum. Same network,
batch size and precision. Epochs alternate in one process, in changing order; the ratio is the
median over the rounds. On a GPU `--together N` also runs N seeds of (a) at once, in processes that
share it, and gives the epochs a minute of all of them.

The limit: the operations and bytes of the convolutions, BatchNorms, ReLUs and the linear layer of
a step, each tensor read and written once by each, three times over (forward, and backward for
inputs and weights), at the matrix-product speed and the copy bandwidth that this machine shows.

The last line is JSON: {"ratio": …, "epochs_per_minute": …, "share_of_limit": …, …}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

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


def usual(net: nn.Module, task: Task, args: argparse.Namespace) -> Callable[[], None]:
    """An epoch at each call."""
    device, net = task.device, net.to(task.device).train()
    split = Split(task.train.images.cpu(), task.train.labels.cpu())
    loader = DataLoader(
        Pictures(split, "nearest"), args.batch, shuffle=True, num_workers=args.workers,
        pin_memory=device.type == "cuda", persistent_workers=args.workers > 0
    )  # fmt: skip
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    low = args.precision == "bfloat16"

    def epoch() -> None:
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            sgd.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = cross_entropy(net(x), y)
            loss.backward()
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


def together(args: argparse.Namespace) -> float:
    """Epochs a minute of several processes on one GPU."""
    command = [sys.executable, __file__, "--alone", "--network", args.network]
    command += ["--images", str(args.images), "--batch", str(args.batch)]
    command += ["--rounds", str(args.rounds), "--precision", args.precision]
    command += ["--device", args.device] + ["--compile"] * args.compile
    count = range(args.together)
    start = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in count]
    last = [run.communicate()[0].splitlines()[-1] for run in start]
    return float(sum(json.loads(line)["epochs_per_minute"] for line in last))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--network", default="tinyten", choices=sorted(models.BUILDERS))
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8, help="of the DataLoader")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile in (a)")
    parser.add_argument("--together", type=int, default=0, help="runs that share the GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alone", action="store_true", help="only (a)")
    args = parser.parse_args()

    device = torch.device(args.device)
    task = pictures(args.images, device)
    net = models.build(args.network, num_classes=10, in_channels=3, image_size=32).to(device)
    recipe = train.Recipe(
        args.rounds + 1, args.batch, precision=args.precision, compile=args.compile
    )
    work: dict[str, Callable[[], object]] = {"ours": ours(net, task, recipe)}
    if not args.alone:
        fresh = models.build(args.network, num_classes=10, in_channels=3, image_size=32)
        work["usual"] = usual(fresh, task, args)
    for each in work.values():
        each()
    rounds = []
    for i in range(args.rounds):
        order = list(work) if i % 2 else list(work)[::-1]
        rounds.append({name: timing.seconds(work[name], device) for name in order})
    epoch = statistics.median(r["ours"] for r in rounds)
    found: dict[str, object] = {"epochs_per_minute": round(60 / epoch, 2), "network": args.network}
    if not args.alone:
        low = args.precision == "bfloat16"
        operations, moved = needs(net, 2 if low else 4)
        flops, bandwidth = machine(device, torch.bfloat16 if low else torch.float32)
        limit = max(operations / flops, moved / bandwidth) * args.images
        ratio = statistics.median(r["usual"] / r["ours"] for r in rounds)
        found |= {"ratio": round(ratio, 2), "share_of_limit": round(limit / epoch, 3)}
        by_memory = moved / bandwidth > operations / flops
        found["limited_by"] = "memory" if by_memory else "arithmetic"
        print(f"{args.network}, {args.images:,} images, batch {args.batch}, {args.precision}: "
              f"{60 / epoch:.1f} epochs a minute, {ratio:.1f} times the usual loop; "
              f"{limit / epoch:.0%} of the limit")  # fmt: skip
        print(f"an image: {operations / 1e6:.1f} million operations, {moved / 1e6:.2f} MB; here "
              f"{flops / 1e12:.2f} Tflop/s, {bandwidth / 1e9:.0f} GB/s")  # fmt: skip
    if args.together:
        found["epochs_per_minute_together"] = round(together(args), 2)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps(found | {"device": device_name}))


if __name__ == "__main__":
    main()
