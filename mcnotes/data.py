"""Data sets as tensors on the device, with train, validation and test apart.

Whatever the source (`mcnotes.sources`), the images of a split stand in the order of `fair_order`:
any prefix is a fair and class-balanced sample. The last images of train in that order are held out
for validation, so that the validation set is the same wherever the files came from. The test set is
the data set's own, untouched.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mcnotes.augment import Augment
from mcnotes.sources import Arrays, DataError, fair_order, read

__all__ = ["SOURCES", "Augment", "DataError", "Split", "Task", "folder", "load"]


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N] on one device.

    Images made by `load` lie in memory channels last, which convolutions on CPUs run 1.2 to 1.5
    times faster on, whatever the layout of the weights; the batches keep that.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"Split: got images {self.images.dtype} {tuple(self.images.shape)}, "
                "expected torch.uint8 [N, C, H, W]"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Split: got labels {self.labels.dtype} {tuple(self.labels.shape)}, "
                f"expected torch.int64 [{len(self.images)}], one for each image"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> Split:
        """The first `n` images, or all if there are fewer: a fair sample."""
        return Split(self.images[:n], self.labels[:n])

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
        if size < 1:
            raise ValueError(f"Split.batches: got size={size}, expected at least 1")
        n = len(self)
        order = None
        if generator is not None:
            order = torch.randperm(n, generator=generator, device=generator.device)
            order = order.to(self.images.device)
        for start in range(0, n - size + 1 if drop_last else n, size):
            stop = min(start + size, n)
            images, labels = self._at(slice(start, stop) if order is None else order[start:stop])
            yield (_channels_last(augment(images, generator)) if augment else images), labels

    def _at(self, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Float images in [0, 1] and labels at these places."""
        images = self.images.permute(0, 2, 3, 1)
        if isinstance(where, Tensor):
            images, labels = images.index_select(0, where), self.labels.index_select(0, where)
        else:
            images, labels = images[where], self.labels[where]
        return images.permute(0, 3, 1, 2).float().mul_(1 / 255), labels


@dataclass(frozen=True)
class Task:
    """A data set ready for use; `augment` is what its training images usually undergo."""

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    augment: Augment | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def example(self) -> Tensor:
        """Float images [2, C, H, W] in [0, 1]: the first two of train."""
        return next(self.train.first(2).batches(2))[0]

    def generator(self, seed: int) -> torch.Generator:
        """A new random generator on the task's device, so that no draw crosses to the host."""
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Source:
    """What is particular to a data set: images held out, augmentation, class in torchvision."""

    validation: int
    augment: Augment
    torchvision: str | None = None


# The authors' code (IBM/NeuronAlignment) leaves RandomAffine at its default, the nearest pixel.
_FASHION = Augment(padding=2, flip=True)
_CIFAR = Augment(padding=4, flip=True, rotation=15, interpolation="nearest")
_TINY = Augment(8, True, 30, (0.8, 1.2), contrast=0.25, saturation=0.25, interpolation="nearest")
SOURCES = {
    "fashion-mnist-small": Source(2_000, _FASHION),
    "fashion-mnist": Source(5_000, _FASHION, "FashionMNIST"),
    "cifar10": Source(5_000, _CIFAR, "CIFAR10"),
    "cifar100": Source(5_000, _CIFAR, "CIFAR100"),
    "tiny-imagenet": Source(10_000, _TINY),
}


def folder() -> Path:
    """The data folder: $MCNOTES_DATA, or `data/` of the repository that the package stands in.

    Raises DataError if there is no such folder.
    """
    named = os.environ.get("MCNOTES_DATA")
    path = Path(named) if named else Path(__file__).resolve().parent.parent / "data"
    if not path.is_dir():
        origin = "MCNOTES_DATA is" if named else "the package is not in its repository: no"
        raise DataError(
            f"data.folder: {origin} {path}, expected a folder; set MCNOTES_DATA to the folder of "
            "the data, such as data/ of a clone of the repository"
        )
    return path


def _root(named: str | Path | None) -> Path:
    return folder() if named is None else Path(named)


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    folder: str | Path | None = None,
    download: bool = False,
    validation: int | None = None,
    image_size: int | None = None,
) -> Task:
    """A data set by its name, one of `SOURCES`, as tensors on the device.

    `device="auto"` is CUDA if there is one, else the CPU. `folder` replaces the data folder, where
    `<name>.npz` is looked for first; `download` lets torchvision fetch what is not there.
    `validation` images of train are held out as `val`: None takes the data set's own number, 0
    trains on all, as the paper does, and leaves `val` empty. `image_size` resizes once, with
    antialiasing (the paper's GoogLeNet sees Tiny ImageNet at 32).

    Raises ValueError for an unknown name or an impossible `validation`, DataError for files that
    are missing or damaged.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name.lower(), SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"data.load: got {name!r}, expected one of {', '.join(SOURCES)}{hint}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = SOURCES[name]
    arrays = read(name, _root(folder), source.torchvision, download)
    everything = _split(arrays, "train", image_size, device)
    held_out = source.validation if validation is None else validation
    cut = len(everything) - held_out
    if not 0 < cut <= len(everything):
        raise ValueError(
            f"data.load: got validation={held_out}, expected at least 0 and fewer than the "
            f"{len(everything)} training images of {name}"
        )
    return Task(
        name,
        train=everything.first(cut),
        val=Split(everything.images[cut:], everything.labels[cut:]),
        test=_split(arrays, "test", image_size, device),
        class_names=tuple(map(str, arrays["class_names"])),
        augment=_resized(source.augment, arrays["train_images"].shape[1], image_size),
    )


def _split(arrays: Arrays, which: str, image_size: int | None, device: str | torch.device) -> Split:
    images, labels = arrays[f"{which}_images"], arrays[f"{which}_labels"]
    order = fair_order(images, labels)
    pixels = torch.from_numpy(images[order].reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    if image_size is not None:
        size = (image_size, image_size)
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return Split(
        _channels_last(pixels).to(device), torch.from_numpy(labels[order]).long().to(device)
    )


def _resized(augment: Augment, old: int, new: int | None) -> Augment:
    """`augment` with its padding in proportion to the new image size."""
    padding = augment.padding if new is None else round(augment.padding * new / old)
    return dataclasses.replace(augment, padding=padding)


def _channels_last(images: Tensor) -> Tensor:
    """The same images with the strides of [N, H, W, C], one channel included.

    `contiguous(memory_format=...)` leaves one channel with strides that convolutions take for
    [N, C, H, W].
    """
    n, c, h, w = images.shape
    return images.permute(0, 2, 3, 1).reshape(n, -1).view(n, h, w, c).permute(0, 3, 1, 2)
