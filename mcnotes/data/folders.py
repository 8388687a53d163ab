"""Images of your own: folders, arrays and loaders, validated before use (chapter 10)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from mcnotes.data.sources import DataError, fair_order
from mcnotes.data.tasks import SOURCES, Split, Task, load
from mcnotes.names import resolve

SPLITS = ("train", "val", "test")


def dataset(source: str, image_size: int | None = None, device: str = "auto") -> Task:
    """Images and labels from the name of a data set of this book, a folder, or a Python path.

    A folder holds a folder of pictures for each class, or train/, val/, test/ with such folders.
    Without val/, a part of train/ is held out; without test/, it is half of val; the hash of the
    pictures decides, so that the cut is always the same. "package.module:callable" gives a Task or,
    for train, val and test each, (images, labels) or a DataLoader: uint8, or floats in [0, 1].
    image_size: pictures' shorter sides are scaled to it, the middle is cut out. Raises DataError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if source in SOURCES:
        return load(source, image_size=image_size, device=device)
    if Path(source).is_dir():
        given, names = _folder(Path(source), image_size)
    elif ":" not in source:
        kinds = f"a folder, 'package.module:callable', or one of {[*SOURCES]}"
        raise DataError(f"data.dataset: found no {source!r}, expected {kinds}")
    elif isinstance(made := resolve(source)(), Task):
        return made
    else:
        given, names = dict(zip(SPLITS, made, strict=True)), ()
    splits = {n: _split(one, source, image_size, device) for n, one in given.items()}
    held_out = ("train", "val", 0.15 if "test" in splits else 0.3), ("val", "test", 0.5)
    for name, other, share in held_out:
        if other not in splits:
            x, y = splits[name].images, splits[name].labels
            cut = len(y) - round(share * len(y))
            splits |= {name: Split(x[:cut], y[:cut]), other: Split(x[cut:], y[cut:])}
    if min(map(len, splits.values())) < 2:
        raise DataError(
            f"data.dataset: {source} has too few images to train, validate and test. Fix: add some"
        )
    names = names or range(1 + int(max(split.labels.max() for split in splits.values())))
    return Task(source, splits["train"], splits["val"], splits["test"], tuple(map(str, names)))


def _folder(root: Path, size: int | None) -> tuple[dict[str, Any], Sequence[Any]]:
    """For each split (images uint8 [N, H, W] or [N, H, W, 3], labels [N]); the classes' names."""
    from torchvision.datasets import ImageFolder  # takes a second

    places = {n: root / n for n in SPLITS if (root / n).is_dir()}
    try:
        places = places if "train" in places else {"train": root}
        found = {n: ImageFolder(str(place)) for n, place in places.items()}
    except FileNotFoundError as error:
        raise DataError(f"data.dataset: {error}; expected {root}/CLASS/PICTURE") from error
    if len(classes := {str(f.classes): n for n, f in found.items()}) > 1:
        raise DataError(
            f"data.dataset: {root} has other classes in each of its folders, {classes}, expected "
            "the same"
        )
    pictures = {path: _picture(path, size) for f in found.values() for path, _ in f.samples}
    if len(sizes := {p.size: path for path, p in pictures.items()}) > 1:
        raise DataError(
            f"data.dataset: pictures differ in size, {sizes!s:.300}. Fix: pass an image_size"
        )
    mode = max(p.mode for p in pictures.values())  # one in colour makes all RGB
    pixels = {path: np.asarray(p.convert(mode)) for path, p in pictures.items()}
    splits = {n: (np.stack([pixels[x] for x, _ in f.samples]), f.targets) for n, f in found.items()}
    return splits, found["train"].classes


def _picture(path: str, size: int | None) -> Image.Image:
    """A picture in grey or in colour, cut to size x size. Raises DataError, naming the file."""
    try:
        with Image.open(path) as raw:
            if raw.mode[0] in "IF":
                raise OSError("more than 8 bits for a pixel")
            picture = raw.convert("L" if raw.mode in ("1", "L") else "RGB")
    except OSError as error:
        raise DataError(f"data.dataset: cannot read {path} ({error}). Fix: remove it") from error
    return ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR) if size else picture


def _split(one: Any, source: str, size: int | None, device: str) -> Split:
    """Two arrays, or a loader of batches, in fair order, channels last in memory."""
    if not isinstance(one, tuple | list):
        one = [torch.cat([torch.as_tensor(x) for x in xs]) for xs in zip(*one, strict=True)]
    x, y = (torch.as_tensor(values).cpu() for values in one)
    if x.is_floating_point():
        if (low := x.min()) < 0 or x.max() > 1:
            raise DataError(
                f"data.dataset: {source} has pixels from {low:.2f} to {x.max():.2f}, expected "
                "[0, 1]. Fix: leave out Normalize, and use checkpoints.normalised"
            )
        x = (255 * x).round().byte()
    x = x[..., None] if x.ndim == 3 else x if x.shape[3] in (1, 3) else x.movedim(1, 3)
    order = torch.from_numpy(fair_order(x.contiguous().numpy(), y.numpy()))
    x, y = x[order].movedim(3, 1), y[order].long()
    if size and x.shape[2:] != (size, size):
        x = interpolate(x, (size, size), mode="bilinear", antialias=True)
    return Split(x.to(device), y.to(device))
