"""Where the images come from: .npz files, torchvision's downloads, the folders of Tiny ImageNet.

Each source gives the same arrays, the ones that a `.npz` file of a data set holds:

    train_images, test_images   uint8 [N, H, W] or [N, H, W, 3]
    train_labels, test_labels   integers [N], the place of the class in class_names
    class_names                 str [classes]
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
TINY = "tiny-imagenet-200"
DAMAGE = (  # what NumPy and zipfile raise for files that are not what they should be
    *(OSError, ValueError, EOFError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
)


class DataError(RuntimeError):
    """A data file is missing, damaged or of the wrong form; the text names it and the cure."""


def find(root: Path, name: str) -> Path | None:
    """`name` in the data folder `root` or in its `downloads`, which git ignores; else None."""
    paths = (root / name, root / "downloads" / name)
    return next((path for path in paths if path.exists()), None)


def read(name: str, root: Path, torchvision_class: str | None, download: bool) -> Arrays:
    """The arrays of data set `name`, from the first source that has them.

    Raises DataError if none has, or if what is there is damaged or of another form.
    """
    if path := find(root, f"{name}.npz"):
        return check(read_npz(path), path)
    if name == "tiny-imagenet" and (path := find(root, TINY)):
        return check(_cache(read_tiny_imagenet(path), path.with_name(f"{name}.npz")), path)
    if torchvision_class and (download or (root / "downloads").is_dir()):
        return _from_torchvision(torchvision_class, root / "downloads", download)
    cures = ["restore it from the repository"] if not torchvision_class else ["pass download=True"]
    if name == "tiny-imagenet":
        cures = [f"unpack http://cs231n.stanford.edu/{TINY}.zip to {root / 'downloads' / TINY}"]
    raise DataError(
        f"data.load: found no {name}.npz in {root} or {root / 'downloads'}; "
        f"{cures[0]}, or name another folder by folder=... or MCNOTES_DATA"
    )


def read_npz(path: Path) -> Arrays:
    """All arrays of a `.npz` file. Raises DataError if it is damaged; nothing is unpickled."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except DAMAGE as error:
        raise DataError(
            f"data.load: {path} is damaged or no .npz file ({error}); "
            "delete it and fetch or make it again"
        ) from error


def check(arrays: Arrays, path: Path) -> Arrays:
    """`arrays` as they are; raises DataError naming `path` if they are not of the form above."""
    expected = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
    missing = [key for key in [*expected, "class_names"] if key not in arrays]
    fault = f"lacks {', '.join(missing)}" if missing else ""
    for split in ("train", "test") if not missing else ():
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        classes = len(arrays["class_names"])
        if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
            fault = f"has {split}_images of {images.dtype} {images.shape}, not uint8 [N, H, W(, 3)]"
        elif labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            fault = f"has {split}_labels of {labels.dtype} {labels.shape}, not [{len(images)}]"
        elif len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            fault = f"has {split}_labels outside of 0..{classes - 1}, its class_names"
    if fault:
        raise DataError(f"data.load: {path} {fault}; delete it and fetch or make it again")
    return arrays


def _from_torchvision(torchvision_class: str, root: Path, download: bool) -> Arrays:
    """The arrays of one of torchvision's data sets under `root`, fetched first if `download`."""
    import torchvision  # takes a second, and most loads do without

    make = getattr(torchvision.datasets, torchvision_class)
    arrays: Arrays = {}
    try:
        for split in ("train", "test"):
            files = make(root, train=split == "train", download=download)
            arrays[f"{split}_images"] = np.asarray(files.data)
            arrays[f"{split}_labels"] = np.asarray(files.targets)
        arrays["class_names"] = np.array(files.classes)
    except Exception as error:  # damaged files raise whatever torchvision meets first
        cure = "check the connection" if download else "pass download=True"
        raise DataError(
            f"data.load: torchvision finds no sound {torchvision_class} in {root} ({error}); "
            f"delete what is there of it and {cure}"
        ) from error
    return check(arrays, root)


def read_tiny_imagenet(folder: Path) -> Arrays:
    """Decode Tiny ImageNet: `train/<class>/images/*.JPEG`, `val/images/*.JPEG` with their table.

    The labelled `val` becomes the test set, as is customary; the labels of `test` are not public.
    """
    ids = _lines(folder / "wnids.txt")
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt"))
    place = {wnid: label for label, wnid in enumerate(sorted(ids))}
    found = {i: sorted((folder / "train" / i / "images").glob("*.JPEG")) for i in place}
    most, least = (pick(found, key=lambda i: len(found[i])) for pick in (max, min))
    if len(found[least]) < max(1, len(found[most])):
        raise DataError(
            f"data.load: in {folder / 'train'}, {least} has {len(found[least])} pictures, "
            f"{most} has {len(found[most])}; unpack {TINY}.zip there again"
        )
    train = [(file, place[i]) for i, files in found.items() for file in files]
    rows = [line.split("\t")[:2] for line in _lines(folder / "val" / "val_annotations.txt")]
    test = [(folder / "val" / "images" / file, place[wnid]) for file, wnid in rows]
    arrays: Arrays = {"class_names": np.array([words.get(i, i).split(",")[0] for i in place])}
    for split, files in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = np.stack([_decode(file) for file, _ in files])
        arrays[f"{split}_labels"] = np.array([label for _, label in files])
    return arrays


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise DataError(
            f"data.load: cannot read {path} ({error}); unpack {TINY}.zip there again"
        ) from error


def _decode(path: Path) -> NDArray[np.uint8]:
    """RGB pixels [H, W, 3] of a picture, grey ones included."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise DataError(
            f"data.load: cannot decode {path} ({error}); unpack {TINY}.zip there again"
        ) from error


def _cache(arrays: Arrays, path: Path) -> Arrays:
    """Write `arrays` to `path`, whole or not at all, and give them back."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes no dict of arrays
    part.replace(path)
    return arrays


def fair_order(images: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.intp]:
    """Indices [N] that put images in an order of which every prefix is a fair, balanced sample.

    Within a class images are ordered by the hash of their pixels, then the classes are interleaved
    in proportion to their sizes. So the order depends on the images and not on how they came.
    """
    digests = (hashlib.blake2b(image, digest_size=8).digest() for image in images)
    keys = np.frombuffer(b"".join(digests), ">u8")
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members], kind="stable")]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((labels, keys, place))
