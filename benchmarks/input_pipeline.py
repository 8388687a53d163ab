"""How many augmented training images a second: batches on the device, or one image after another.

Compares, on the same random 32 x 32 x 3 images, shuffled, in batches of float tensors in [0, 1],
(a) `mcnotes.data.Split.batches` with the augmentation of `mcnotes.data` for CIFAR and (b) the usual
recipe of torchvision in a DataLoader: PIL image, RandomCrop(32, padding=4), RandomHorizontalFlip,
RandomRotation(15), ToTensor; with no worker and with two persistent ones. Both rotate to the
nearest pixel, torchvision's default (`--bilinear`: both interpolate). (a) runs on one thread, as
no worker needs a core; `--threads` gives it more. Epochs of all three alternate in one process; the
ratio is the median over the rounds of (a) by the better of (b).

The limit: reading each image's bytes once and writing its floats once, at the bandwidth at which
this machine copies a large tensor.

The last line is JSON: {"ratio": …, "images_per_second": …, …}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

# Page faults of large tensors are most of the noise on a CPU: keep freed memory in the process, and
# in the workers, which inherit this.
if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1", MALLOC_TOP_PAD_="67108864")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mcnotes.data import SOURCES, Split

SIZE = 32


class Pictures(Dataset[tuple[Tensor, int]]):
    """One image at a time, as torchvision's CIFAR10 gives them."""

    def __init__(self, split: Split, interpolation: str) -> None:
        self.images = split.images.permute(0, 2, 3, 1).numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15, transforms.InterpolationMode(interpolation)),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Ours:
    """An epoch at each iteration, like a DataLoader."""

    def __init__(self, split: Split, batch: int, interpolation: str) -> None:
        self.split, self.batch = split, batch
        self.generator = torch.Generator(split.images.device).manual_seed(0)
        self.augment = replace(SOURCES["cifar10"].augment, interpolation=interpolation)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.split.batches(self.batch, generator=self.generator, augment=self.augment)


def rate(loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Images a second over one epoch."""
    start, n = time.perf_counter(), 0
    for images, _ in loader:
        n += len(images)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return n / (time.perf_counter() - start)


def limit(device: torch.device) -> tuple[float, float]:
    """Images a second at copy bandwidth, and that bandwidth in GB/s, reads and writes counted."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    bandwidth = 2 * source.numel() * 4 / statistics.median(seconds)
    return bandwidth / (SIZE * SIZE * 3 * (1 + 4)), bandwidth / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where (a) runs: cpu or cuda")
    parser.add_argument("--bilinear", action="store_true", help="rotate with interpolation")
    parser.add_argument("--threads", type=int, default=1, help="of (a) on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    interpolation = "bilinear" if args.bilinear else "nearest"

    device = torch.device(args.device)
    images = torch.randint(0, 256, (args.images, SIZE, SIZE, 3), dtype=torch.uint8)
    split = Split(images.permute(0, 3, 1, 2), torch.zeros(args.images, dtype=torch.int64))
    on_device = Split(split.images.to(device), split.labels.to(device))
    pictures = Pictures(split, interpolation)
    loaders: dict[str, Iterable[tuple[Tensor, Tensor]]] = {
        "ours": Ours(on_device, args.batch, interpolation),
        "0 workers": DataLoader(pictures, args.batch, shuffle=True),
        "2 workers": DataLoader(
            pictures, args.batch, shuffle=True, num_workers=2, persistent_workers=True
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for i in range(args.rounds + 1):
        for name, loader in loaders.items():
            speed = rate(loader)
            if i:  # the first round warms up
                rates[name].append(speed)
    for name, speeds in rates.items():
        low, high = min(speeds), max(speeds)
        print(
            f"{name:>10}: {statistics.median(speeds):>9,.0f} images/s ({low:,.0f} to {high:,.0f})"
        )
    ratios = [a / max(b, c) for a, b, c in zip(*rates.values(), strict=True)]
    ideal, bandwidth = limit(device)
    print(f"{'limit':>10}: {ideal:>9,.0f} images/s at {bandwidth:.1f} GB/s")
    result = {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "images_per_second": round(statistics.median(rates["ours"])),
        "dataloader_0_workers": round(statistics.median(rates["0 workers"])),
        "dataloader_2_workers": round(statistics.median(rates["2 workers"])),
        "limit_images_per_second": round(ideal),
        "interpolation": interpolation,
        "images": args.images,
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
