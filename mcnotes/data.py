"""Data sets as tensors on the device, with train, validation and test apart.

A data set comes from one `.npz` file, `<data folder>/<name>.npz`, that holds

    train_images, test_images   uint8 [N, H, W] or [N, H, W, 3]
    train_labels, test_labels   integers [N]
    class_names                 str [num_classes]

or from torchvision's download. Validation images are held out of train; test is never touched.
Whatever the source, the images of a split stand in the order of `fair_order`, so that any prefix is
a fair sample and the validation set does not depend on where the files came from.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcnotes.augment import Augment

Arrays = dict[str, NDArray[Any]]


class DataError(RuntimeError):
    """A data file is missing, damaged or of the wrong form; the text names it and the cure."""


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N] on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> Split:
        """The first `n` images (all, if there are fewer): a fair, class-balanced sample."""
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

        Shuffled if there is a `generator`, which also drives `augment`: the same state gives the
        same batches. The last batch is smaller unless `drop_last`.
        """
        if size < 1:
            raise ValueError(f"Split.batches: got size={size}, expected at least 1")
        n = len(self) - len(self) % size if drop_last else len(self)
        order = None
        if generator is not None:
            order = torch.randperm(len(self), generator=generator, device=generator.device)
            order = order.to(self.images.device)
        for start in range(0, n, size):
            pick = slice(start, start + size) if order is None else order[start : start + size]
            images = self.images[pick].float() / 255
            yield (augment(images, generator) if augment else images), self.labels[pick]


@dataclass(frozen=True)
class Task:
    """A data set ready for use; `augment` is what its training images usually undergo."""

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    augment: Augment | None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def example(self) -> Tensor:
        """Float images [2, C, H, W] in [0, 1], the first of the training set."""
        return self.train.images[:2].float() / 255

    def generator(self, seed: int) -> torch.Generator:
        """A new random generator on the task's device."""
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class _Source:
    """How a data set is found: its default validation size, augmentation, torchvision class."""

    validation: int
    augment: Augment
    torchvision: str | None = None


_CIFAR = Augment(padding=4, flip=True, rotation=15)
_FASHION = Augment(padding=2, flip=True)
_TINY = Augment(padding=8, flip=True, rotation=30, scale=(0.8, 1.2), contrast=0.25, saturation=0.25)
SOURCES = {
    "fashion-mnist-small": _Source(2_000, _FASHION),
    "fashion-mnist": _Source(5_000, _FASHION, "FashionMNIST"),
    "cifar10": _Source(5_000, _CIFAR, "CIFAR10"),
    "cifar100": _Source(5_000, _CIFAR, "CIFAR100"),
    "tiny-imagenet": _Source(10_000, _TINY),
}


def folder() -> Path:
    """The data folder: $MCNOTES_DATA, or `data/` of the repository the package stands in.

    Raises DataError if that folder does not exist.
    """
    named = os.environ.get("MCNOTES_DATA")
    path = Path(named) if named else Path(__file__).resolve().parent.parent / "data"
    if path.is_dir():
        return path
    what = "MCNOTES_DATA names" if named else "the package expects its repository's"
    raise DataError(
        f"data.folder: {what} {path}, which is no folder; "
        "set MCNOTES_DATA to the folder that holds the data"
    )


def fair_order(images: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Indices [N] that put images in an order of which every prefix is a fair, balanced sample.

    Within a class images are ordered by the hash of their pixels, then classes are interleaved in
    proportion to their sizes. The order depends on the images alone, not on the one they come in.
    """
    keys = np.array(
        [int.from_bytes(hashlib.blake2b(x, digest_size=8).digest(), "big") for x in images],
        dtype=np.uint64,
    )
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members], kind="stable")]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((keys, place))


def read_npz(path: Path) -> Arrays:
    """The arrays of a `.npz` file of the form above. Raises DataError if it is damaged or other."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"data.load: {path} is damaged or no .npz file ({error}); delete it and get it again"
        ) from error


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    folder: str | Path | None = None,
    download: bool = False,
    validation: int | None = None,
) -> Task:
    """A data set by its name, one of `SOURCES`, as tensors on the device.

    `device="auto"` is CUDA if there is one, else the CPU. `folder` replaces the data folder.
    `validation` training images are held out as `val`; None takes the data set's own number, 0
    trains on all of them, as the paper does, and leaves `val` empty.

    Raises ValueError for an unknown name or too large a validation set, DataError for files that
    are missing or damaged.
    """
    if name not in SOURCES:
        close = difflib.get_close_matches(name.lower(), SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"data.load: got {name!r}, expected one of {', '.join(SOURCES)}{hint}")
    source = SOURCES[name]
    root = Path(folder) if folder is not None else globals()["folder"]()
    arrays = read_npz(root / f"{name}.npz")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    train = _split(arrays, "train", device)
    held_out = source.validation if validation is None else validation
    cut = len(train) - held_out
    return Task(
        name,
        train=train.first(cut),
        val=Split(train.images[cut:], train.labels[cut:]),
        test=_split(arrays, "test", device),
        class_names=tuple(str(c) for c in arrays["class_names"]),
        augment=source.augment,
    )


def _split(arrays: Arrays, which: str, device: str | torch.device) -> Split:
    images, labels = arrays[f"{which}_images"], arrays[f"{which}_labels"]
    order = fair_order(images, labels)
    images = images[order].reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
    return Split(
        torch.from_numpy(np.ascontiguousarray(images)).to(device),
        torch.from_numpy(labels[order].astype(np.int64)).to(device),
    )
