"""Where the images come from: .npz files, torchvision's downloads, the folders of Tiny ImageNet.

Each source gives the same arrays, the ones that a `.npz` file of a data set holds:

    train_images, test_images   uint8 [N, H, W] or [N, H, W, 3]
    train_labels, test_labels   integers [N], the place of the class in class_names
    class_names                 str [classes]
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
TINY = "tiny-imagenet-200"
_UNPACK = f"unpack {TINY}.zip there again"


class DataError(RuntimeError):
    """A data file is missing, damaged or of the wrong form; the message names it and the fix."""


def find(root: Path, name: str) -> Path | None:
    """`name` in the data folder `root` or in its `downloads`, which git ignores; else None."""
    paths = (root / name, root / "downloads" / name)
    return next((path for path in paths if path.exists()), None)


def read(name: str, root: Path, torchvision_class: str | None, download: bool) -> Arrays:
    """The arrays of data set `name`, from the first source that has them.

    Raises DataError if none has, or if what is there is damaged or of another form.
    """
    downloads = root / "downloads"
    if path := find(root, f"{name}.npz"):
        return check(read_npz(path), path)
    if name == "tiny-imagenet" and (path := find(root, TINY)):
        arrays = check(read_tiny_imagenet(path), path)
        part = path.with_name(f"{name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes no dict
        part.replace(path.with_name(f"{name}.npz"))
        return arrays
    if torchvision_class and (download or downloads.is_dir()):
        return check(_from_torchvision(torchvision_class, downloads, download), downloads)
    fix = "pass download=True" if torchvision_class else "restore it from the repository"
    if name == "tiny-imagenet":
        fix = f"unpack http://cs231n.stanford.edu/{TINY}.zip to {downloads / TINY}"
    fix += ", or name another folder by folder=... or MCNOTES_DATA"
    raise DataError(f"data.load: found no {name}.npz in {root} or {downloads}. Fix: {fix}")


def read_npz(path: Path) -> Arrays:
    """All arrays of a `.npz` file. Raises DataError if it is damaged; nothing is unpickled."""
    with _sound(f"{path} is damaged or no .npz file", "delete it and fetch or make it again"):
        if not path.is_file():  # opening a pipe would wait without end
            raise OSError("it is no regular file")
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {key: _native(file[key]) for key in file.files}


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """In the byte order of this computer, and the last axis first in memory."""
    return np.require(array, array.dtype.newbyteorder("="), ["C"])


def check(arrays: Arrays, path: Path) -> Arrays:
    """`arrays` as they are; raises DataError naming `path` if they are not of the form above."""
    if fault := next(_faults(arrays), None):
        raise DataError(f"data.load: {path} {fault}. Fix: delete it and fetch or make it again")
    return arrays


def _faults(arrays: Arrays) -> Iterator[str]:
    expected = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
    yield from (f"lacks {key}" for key in [*expected, "class_names"] if key not in arrays)
    if arrays["class_names"].ndim != 1:
        yield f"has class_names {arrays['class_names'].shape}, not [classes]"
    classes = len(arrays["class_names"])
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
            yield f"has {split}_images of {images.dtype} {images.shape}, not uint8 [N, H, W(, 3)]"
        if images.size == 0:
            yield f"has {split}_images {images.shape}, of which none has a pixel"
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            yield f"has {split}_labels of {labels.dtype} {labels.shape}, not [{len(images)}]"
        if not 0 <= labels.min() <= labels.max() < classes:
            yield f"has {split}_labels outside of 0..{classes - 1}, its class_names"
    train, test = arrays["train_images"].shape[1:], arrays["test_images"].shape[1:]
    if train != test:
        yield f"has images of shape {train} in train_images, but {test} in test_images"


def _from_torchvision(torchvision_class: str, root: Path, download: bool) -> Arrays:
    """The arrays of one of torchvision's data sets under `root`, fetched first if `download`."""
    import torchvision  # takes a second, and most loads do without

    make = getattr(torchvision.datasets, torchvision_class)
    fix = "check the connection" if download else "pass download=True"
    arrays: Arrays = {}
    fault = f"torchvision finds no intact {torchvision_class} in {root}"
    with _sound(fault, f"delete what is there of it and {fix}"):
        for split in ("train", "test"):
            files = make(root, train=split == "train", download=download)
            arrays[f"{split}_images"] = np.asarray(files.data)
            arrays[f"{split}_labels"] = np.asarray(files.targets)
        arrays["class_names"] = np.array(files.classes)
    return arrays


def read_tiny_imagenet(folder: Path) -> Arrays:
    """Decode Tiny ImageNet: `train/<class>/images/*.JPEG`, `val/images/*.JPEG` with their table.

    The labelled `val` becomes the test set, as is customary; the labels of `test` are not public.
    """
    from torchvision.datasets.folder import ImageFolder, pil_loader

    with _sound(f"{folder} lacks something", _UNPACK):
        train = ImageFolder(str(folder / "train"))
        tables = [folder / "words.txt", folder / "val" / "val_annotations.txt"]
        words, rows = ([x.split("\t") for x in t.read_text().splitlines()] for t in tables)
        test = [(folder / "val" / "images" / name, train.class_to_idx[i]) for name, i, *_ in rows]
        names = {i: word.split(",")[0] for i, word in words}
    count = np.bincount(train.targets)
    if count.min() < count.max():
        raise DataError(
            f"data.load: in {folder / 'train'}, {train.classes[count.argmin()]} has {count.min()} "
            f"pictures, others {count.max()}. Fix: {_UNPACK}"
        )
    arrays: Arrays = {"class_names": np.array([names.get(i, i) for i in train.classes])}
    for split, files in (("train", train.samples), ("test", test)):
        pixels = []
        for path, _ in files:
            with _sound(f"cannot decode {path}", _UNPACK):
                pixels.append(np.asarray(pil_loader(str(path))))
        arrays[f"{split}_images"] = np.stack(pixels)
        arrays[f"{split}_labels"] = np.array([label for _, label in files])
    return arrays


@contextlib.contextmanager
def _sound(fault: str, fix: str) -> Iterator[None]:
    """While a source is read, whatever is raised becomes a DataError that says this."""
    try:
        yield
    except MemoryError as error:
        fix = f"free memory, or {fix} if it is damaged"
        raise DataError(f"data.load: there is too little memory ({error}). Fix: {fix}") from error
    except Exception as error:  # damaged files raise whatever their reader meets first
        raise DataError(f"data.load: {fault} ({error}). Fix: {fix}") from error


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
