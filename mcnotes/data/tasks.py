"""Data sets as tensors on the device, with train, validation and test apart.

Whatever the source, the images of a split stand in the order of `sources.fair_order`: any prefix
is a fair and class-balanced sample. The last images of train in that order are held out for
validation; the test set is the data set's own, untouched.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mcnotes import cache, display
from mcnotes.checks import Rule, a, device, optional, require, whole
from mcnotes.data.augment import Augment
from mcnotes.data.sources import Arrays, DataError, fair_order, read
from mcnotes.names import suggest


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N] on one device.

    Batches lie in memory channels last: convolutions on CPUs are then 1.2 to 1.5 times faster.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        tensor = a(Tensor, "a tensor")
        require("Split", vars(self), {"images": tensor, "labels": tensor})
        if x.dtype != torch.uint8 or x.ndim != 4:
            got = f"images {x.dtype} {tuple(x.shape)}"
            raise ValueError(f"Split: got {got}, expected torch.uint8 [N, C, H, W]")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            got = f"labels {y.dtype} {tuple(y.shape)}"
            expected = f"torch.int64 [{len(x)}], one for each image"
            raise ValueError(f"Split: got {got}, expected {expected}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images {[*self.images.shape[1:]]} on {self.device})"

    def _repr_html_(self) -> str:
        labels = ", ".join(map(str, self.labels[:12].tolist()))
        return display.described(self, display.strip(self.images[:12], f"labels: {labels}"))

    @property
    def device(self) -> torch.device:
        return self.images.device

    def first(self, n: int) -> "Split":
        """The first `n` images, or all if there are fewer: a fair sample.

        Raises ValueError for an `n` that is no whole number, or below 0.
        """
        require("Split.first", {"n": n}, {"n": whole(0)})
        return Split(self.images[:n], self.labels[:n])

    def augmented(self, augment: Augment | None, seed: int = 0) -> "Split":
        """The same images, each augmented once, as training shows them; all as they are for None.

        On such images BatchNorm's statistics have to be computed for a network that was trained
        with `augment`: borders of zeros and turned pixels are part of what it knows. Values are
        rounded to 1/255, which changes nothing where pixels are only moved.
        """
        if augment is None:
            return self
        generator = torch.Generator().manual_seed(seed)
        parts = [
            (augment(x, generator) * 255).round().to(torch.uint8) for x, _ in self.batches(1000)
        ]
        return Split(torch.cat(parts) if parts else self.images, self.labels)

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float images [size, C, H, W] in [0, 1] and labels [size], once through the split.

        Shuffled if there is a `generator`, which also drives `augment`: its state decides all. The
        last batch is smaller, or left out if `drop_last`. Raises ValueError for a size below 1.
        """
        require("Split.batches", {"size": size}, {"size": whole(1)})
        n, device = len(self), self.device
        order = torch.arange(n, device=device)
        if generator is not None:
            order = torch.randperm(n, generator=generator, device=generator.device).to(device)
        for start in range(0, n - size + 1 if drop_last else n, size):
            places = order[start : start + size]
            pixels = self.images.permute(0, 2, 3, 1).index_select(0, places)
            images = pixels.permute(0, 3, 1, 2).float().mul_(1 / 255)
            if augment:
                images = _channels_last(augment(images, generator))
            yield images, self.labels.index_select(0, places)

    def count(self, size: int) -> int:
        """How many batches of this size there are, the last of which may be smaller."""
        return -(-len(self) // size)

    def shares(self, size: int, cores: int) -> list[Iterator[tuple[Tensor, Tensor]]]:
        """The batches, once, in parts: the first, then at most `cores` parts of whole batches."""
        n = max(1, -(-(len(self) - size) // (size * cores))) * size
        cuts = [0, *range(size, len(self), n), len(self)]
        parts = (Split(self.images[i:j], self.labels[i:j]) for i, j in pairwise(cuts))
        return [part.batches(size) for part in parts]


@dataclass(frozen=True)
class Task:
    """A data set ready for use; `augment` is what its training images usually undergo."""

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    augment: Augment | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, name))} {name}" for name in ("train", "val", "test"))
        _, *shape = self.train.images.shape
        return f"Task({self.name}: {sizes} images {shape} of {self.num_classes} classes)"

    def _repr_html_(self) -> str:
        splits = {name: getattr(self, name) for name in ("train", "val", "test")}
        rows = ({"split": name, "images": len(s), "device": s.device} for name, s in splits.items())
        names = f"<div>{escape(', '.join(self.class_names))}</div>"
        return display.described(self, display.table(rows), names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def held_out(self) -> Split:
        """Images to choose by, never those of test: `val`; if it is empty, train's last tenth."""
        x, cut = self.train, len(self.train) * 9 // 10
        return self.val if len(self.val) else Split(x.images[cut:], x.labels[cut:])

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def example(self) -> Tensor:
        """Float images [2, C, H, W] in [0, 1]: the first two of train."""
        return next(self.train.first(2).batches(2))[0]


class Source(NamedTuple):
    """What is particular to a data set.

    Images held out, augmentation, (classes, channels, pixels of a side), class in torchvision.
    """

    validation: int
    augment: Augment
    form: tuple[int, int, int]
    torchvision: str | None = None


# The authors' code (IBM/NeuronAlignment) leaves RandomAffine at its default, the nearest pixel.
_FASHION = Augment(padding=2, flip=True)
_CIFAR = Augment(padding=4, flip=True, rotation=15, interpolation="nearest")
_TINY = Augment(8, True, 30, (0.8, 1.2), contrast=0.25, saturation=0.25, interpolation="nearest")
SOURCES = {
    "fashion-mnist-small": Source(2_000, _FASHION, (10, 1, 28)),
    "fashion-mnist": Source(5_000, _FASHION, (10, 1, 28), "FashionMNIST"),
    "cifar10": Source(5_000, _CIFAR, (10, 3, 32), "CIFAR10"),
    "cifar100": Source(5_000, _CIFAR, (100, 3, 32), "CIFAR100"),
    "tiny-imagenet": Source(10_000, _TINY, (200, 3, 64)),
}


LARGEST = 4096  # pixels of a side: images all lie in memory at once
OPTIONS: dict[str, Rule] = {
    "image_size": optional(whole(1, LARGEST)),
    "device": device,
    "folder": optional(a((str, Path), "a path")),
    "validation": optional(a(int, "a whole number")),
}
"""What the arguments of `load` and `folders.dataset` may be."""

HOME = Path(__file__).resolve().parents[2] / "data"
"""The repository's own data folder, where the paper's table and the results are, too."""


def default_folder() -> Path:
    """The data folder: $MCNOTES_DATA, or the repository's `data/`.

    Without the repository: the user's cache folder, into which data sets can be downloaded. Raises
    DataError if $MCNOTES_DATA is no folder.
    """
    named = os.environ.get("MCNOTES_DATA")
    if named and not Path(named).is_dir():
        raise DataError(
            f"data: MCNOTES_DATA is {named}, expected a folder. Fix: set it to the data, such as "
            "data/ of a clone of the repository"
        )
    return Path(named) if named else cache.home()


def resolved(device: str | torch.device) -> torch.device:
    """The device that "auto" stands for, CUDA if it can; any other as it is."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    folder: str | Path | None = None,
    download: bool = False,
    validation: int | None = None,
    image_size: int | None = None,
) -> Task:
    """A data set by its name, one of `SOURCES`, as tensors on the device ("auto": CUDA if it can).

    `folder` replaces the data folder, where `<name>.npz` is looked for first; `download` lets
    torchvision fetch what is not there. `validation` images of train are held out as `val`: None
    takes the data set's own number, 0 trains on all, as the paper does. `image_size` resizes once,
    with antialiasing (the paper's GoogLeNet sees Tiny ImageNet at 32). Raises ValueError for an
    unknown name, an impossible `validation` or `image_size`, DataError for files that are missing
    or damaged.
    """
    if not isinstance(name, str) or name not in SOURCES:
        raise ValueError(f"data.load: got {name!r}, expected a data set{suggest(name, SOURCES)}")
    given = {"image_size": image_size, "device": device}
    require("data.load", given | {"folder": folder, "validation": validation}, OPTIONS)
    device = resolved(device)
    source = SOURCES[name]
    root = default_folder() if folder is None else Path(folder)
    arrays = read(name, root, source.torchvision, download)
    train, test = (_split(arrays, which, image_size, device) for which in ("train", "test"))
    held_out = source.validation if validation is None else validation
    cut = len(train) - held_out
    if not 0 < cut <= len(train):
        expected = f"at least 0 and fewer than the {len(train)} training images of {name}"
        raise ValueError(f"data.load: got validation={held_out}, expected {expected}")
    val = Split(train.images[cut:], train.labels[cut:])
    larger = train.images.shape[2] / arrays["train_images"].shape[1]
    augment = replace(source.augment, padding=round(source.augment.padding * larger))
    return Task(name, train.first(cut), val, test, tuple(map(str, arrays["class_names"])), augment)


def _split(arrays: Arrays, which: str, image_size: int | None, device: torch.device) -> Split:
    images, labels = arrays[f"{which}_images"], arrays[f"{which}_labels"]
    order = fair_order(images, labels)
    pixels = torch.from_numpy(images[order].reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    if image_size is not None:
        pixels = F.interpolate(pixels, (image_size,) * 2, mode="bilinear", antialias=True)
    classes = torch.from_numpy(labels[order]).long()
    return Split(_channels_last(pixels).to(device), classes.to(device))


def _channels_last(images: Tensor) -> Tensor:
    """With the strides of [N, H, W, C], which `contiguous` gives only to several channels."""
    n, c, h, w = images.shape
    return images.permute(0, 2, 3, 1).reshape(n, -1).view(n, h, w, c).permute(0, 3, 1, 2)
