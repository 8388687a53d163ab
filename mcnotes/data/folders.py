"""Images of your own: folders, arrays and loaders, validated before use (chapter 10)."""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps

from mcnotes.checks import faults
from mcnotes.data.arrays import SHOWN, failure, split
from mcnotes.data.sources import DataError
from mcnotes.data.tasks import OPTIONS, SOURCES, Split, Task, load, resolved
from mcnotes.names import resolve

SPLITS = ("train", "val", "test")
CALLED = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
OTHERS = (".gif", ".jfif", ".jpe", ".heic", ".heif", ".avif", ".jp2", ".tga", ".dcm", ".npy")
"""Endings of pictures that are not read: where they are, something would go missing."""
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What a picture may hold, whatever its name; others, such as PostScript, are programs to run."""
LEFT_BEHIND = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN")
"""Folders that programs leave, besides those whose names begin with a dot."""


def dataset(source: str | Path, image_size: int | None = None, device: str = "auto") -> Task:
    """Images and labels from the name of a data set of this book, a folder, or a Python path.

    A folder holds a folder of pictures for each class, or train/, val/, test/ with such folders.
    Without val/, a part of train/ is held out; without test/, it is half of val; the hash of the
    pictures decides, so that the cut is always the same. "package.module:callable" gives a Task, or
    (train, val, test), or a dictionary of these, each (images, labels), a Dataset or a DataLoader.
    Images are uint8 or floats in [0, 1], of shape [N, H, W], [N, C, H, W] or [N, H, W, C]; labels
    are whole numbers [N]. image_size: the images' shorter sides are scaled to it, the middle is cut
    out. Raises DataError, and ValueError for a Python path that cannot be imported.
    """
    if found := faults({"image_size": image_size, "device": device}, OPTIONS):
        raise DataError(f"data.dataset: {'; '.join(found)}")
    source = named("data.dataset", source)
    if source in SOURCES:
        return load(source, image_size=image_size, device=device)
    who = f"data.dataset: {source:.{SHOWN}}"
    if os.path.isdir(source):
        given, names = _folder(Path(source), image_size)
    elif ":" in source:
        made = _called(source, who)
        if isinstance(made, Task):
            return _checked(made, image_size, who)
        given, names = made, []
    else:
        kinds = f"a folder, 'package.module:callable', or one of {[*SOURCES]}"
        raise DataError(f"data.dataset: found no {source!r:.{SHOWN}}, expected {kinds}")
    splits = {name: split(one, image_size, f"{who}: {name}") for name, one in given.items()}
    _hold_out(splits)
    if not names:
        labels = torch.cat([one.labels for one in splits.values()])
        first, last = int(labels.min()), int(labels.max())
        if first > 0:
            cause = f"{who} has labels from {first} to {last}, expected classes from 0 on"
            raise DataError(f"{cause}. Fix: subtract {first}, as for the network's own numbers")
        names = [str(label) for label in range(1 + last)]
    at = resolved(device)
    placed = {n: Split(s.images.to(at), s.labels.to(at)) for n, s in splits.items()}
    task = Task(source, placed["train"], placed["val"], placed["test"], tuple(names))
    return _checked(task, image_size, who)


def named(who: str, source: object) -> str:
    """The name of a source, from text or a path. Raises DataError, which begins with `who`."""
    if isinstance(source, str | Path) and str(source):
        return str(source)
    kinds = "the name of a data set, a folder, or 'package.module:callable'"
    raise DataError(f"{who}: got {source!r:.200}, expected {kinds}")


def _called(source: str, who: str) -> Task | dict[str, Any]:
    """What the callable of this Python path gives: a task, or data by the names of the splits."""
    function = resolve(source)
    try:
        made = function()
        made = [*made] if isinstance(made, Iterator) else made
    except (Exception, SystemExit) as error:  # of the user's function
        expected = "expected a function without arguments that gives data"
        raise DataError(f"{who} fails ({failure(error)}), {expected}") from error
    if isinstance(made, Task):
        return made
    if isinstance(made, tuple | list) and len(made) == len(SPLITS):
        made = dict(zip(SPLITS, made, strict=True))
    if isinstance(made, Mapping) and {"train"} <= made.keys() <= {*SPLITS}:
        return dict(made)
    got = f"a {type(made).__name__}"
    if isinstance(made, tuple | list):
        got += f" of {len(made)}"
    elif isinstance(made, Mapping):
        got += f" of {', '.join(map(str, made)):.{SHOWN}}"
    expected = "expected a Task, (train, val, test), or a dictionary of these"
    raise DataError(f"{who} gives {got}, {expected}")


def _hold_out(splits: dict[str, Split]) -> None:
    """Add the splits that are missing: the last images of those that are there."""
    shares = ("train", "val", 0.15 if "test" in splits else 0.3), ("val", "test", 0.5)
    for name, other, share in shares:
        if other not in splits:
            x, y = splits[name].images, splits[name].labels
            cut = len(y) - round(share * len(y))
            splits |= {name: Split(x[:cut], y[:cut]), other: Split(x[cut:], y[cut:])}


def _checked(task: Task, image_size: int | None, who: str) -> Task:
    """The task itself. Raises DataError unless its splits and its classes belong together."""
    splits = {name: getattr(task, name) for name in SPLITS}
    if min(map(len, splits.values())) < 2:
        raise DataError(f"{who} has too few images to train, validate and test. Fix: add some")
    shapes = {name: (*one.images.shape[1:],) for name, one in splits.items()}
    if len({*shapes.values()}) > 1:
        cause = f"{who} has images of {shapes}, expected one (channels, height, width)"
        raise DataError(f"{cause}. Fix: pass an image_size, and use the same channels")
    channels, *size = shapes["train"]
    if image_size and size != [image_size, image_size]:
        raise DataError(f"{who} has images {[channels, *size]}, expected image_size {image_size}")
    if task.num_classes < 2:
        got, names = f"{task.num_classes} class", ", ".join(task.class_names)
        raise DataError(f"{who} has {got}, expected two to tell apart, or more; got {names!r:.200}")
    labels = torch.cat([one.labels for one in splits.values()])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= task.num_classes:
        cause = f"{who} has labels from {low} to {high}, and {task.num_classes} names of classes"
        raise DataError(f"{cause}, expected a name for each label from 0")
    return task


def _folder(root: Path, size: int | None) -> tuple[dict[str, Any], list[str]]:
    """For each split (images uint8 [N, H, W] or [N, H, W, 3], labels [N]); the classes' names."""
    found = {name: _by_class(place) for name, place in _places(root).items()}
    names = [*found["train"]]
    for name, classes in found.items():
        if odd := sorted({*classes} ^ {*names}):
            cause = f"data.dataset: {root} has other classes in {name} than in train"
            raise DataError(
                f"{cause}, such as {odd[0]!r}, expected the same ({len(odd)} are in one alone)"
            )
    _refuse_links(chain.from_iterable(chain(*(c.values() for c in found.values()))))
    pictures = {
        path: _picture(path, size)
        for classes in found.values()
        for paths in classes.values()
        for path in paths
    }
    if len(sizes := {p.size: str(path) for path, p in pictures.items()}) > 1:
        raise DataError(
            f"data.dataset: pictures differ in size, {sizes!s:.300}. Fix: pass an image_size"
        )
    mode = max(p.mode for p in pictures.values())  # one in colour makes all RGB
    given: dict[str, Any] = {}
    for name, classes in found.items():
        labelled = [(path, label) for label, c in enumerate(names) for path in classes[c]]
        pixels = np.stack([np.asarray(pictures[path].convert(mode)) for path, _ in labelled])
        given[name] = pixels, [label for _, label in labelled]
    return given, names


def _places(root: Path) -> dict[str, Path]:
    """The folders of the splits, by what they are: a folder of folders, by its name."""
    places: dict[str, Path] = {}
    others = []
    for place in _folders(root):
        name = _split_name(place.name)
        if name is None or not _folders(place):
            others.append(place)
        elif name in places:
            both = f"{places[name].name}/ and {place.name}/"
            raise DataError(f"data.dataset: {root} has {both} for {name}, expected one of them")
        else:
            places[name] = place
    if not places:
        _refuse_parts(root, [place.name for place in others])
        return {"train": root}
    if "train" not in places:
        had = ", ".join(f"{place.name}/" for place in places.values())
        raise DataError(f"data.dataset: {root} has {had} and no train/, expected one to train on")
    if odd := next((place for place in others if any(_pictures(place))), None):
        cause = f"data.dataset: {root} has pictures in {odd.name}/, beside train/"
        raise DataError(f"{cause}, expected {', '.join(SPLITS)} alone. Fix: move them away")
    return places


def _refuse_parts(root: Path, classes: Sequence[str]) -> None:
    """Raise DataError for classes of which two are named as splits are, such as seg_train/."""
    alike = {
        split: name
        for name in classes
        for word in re.split(r"[^a-z]", name.lower())
        if (split := _split_name(word))
    }
    if len(alike) > 1:
        cause = f"data.dataset: {root} has {' and '.join(alike.values())} where classes would be"
        expected = "train/CLASS/PICTURE, and as many of val/ and test/ as there are"
        raise DataError(f"{cause}, expected {expected}. Fix: rename them, and sort into classes")


def _split_name(folder: str) -> str | None:
    name = CALLED.get(folder.lower(), folder.lower())
    return name if name in SPLITS else None


def _by_class(place: Path) -> dict[str, list[Path]]:
    """The pictures of each class."""
    found = {folder.name: [*_pictures(folder)] for folder in _folders(place)}
    empty = next((name for name, paths in found.items() if not paths), None)
    if empty is not None or not found:
        where, kinds = place / (empty or ""), ", ".join(PICTURES)
        cause = f"data.dataset: found no pictures ({kinds}) in {where}"
        raise DataError(f"{cause}; expected {place}/CLASS/PICTURE")
    return found


def _folders(place: Path) -> list[Path]:
    """The folders in this one, but for those that programs leave behind."""
    found = [path for path in sorted(place.iterdir()) if path.is_dir() and not _hidden(path.name)]
    for path in found:
        if path.is_symlink() and place.resolve().is_relative_to(path.resolve()):
            raise _unreadable(path, "it is a link back to a folder that it stands in")
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BEHIND


def _pictures(folder: Path) -> Iterator[Path]:
    """All pictures in a folder and in those within."""
    for at, inner, files in os.walk(folder, onerror=_fail):
        inner[:] = sorted(name for name in inner if not _hidden(name))
        for path in (Path(at, name) for name in inner):
            if path.is_symlink():
                raise _unreadable(path, "it is a link to a folder, inside of a class")
            if _split_name(path.name):
                cause = f"data.dataset: {path} is a split inside of a class"
                raise DataError(f"{cause}, expected {path.name}/CLASS/PICTURE")
        for name in sorted(name for name in files if not name.startswith(".")):
            if name.lower().endswith(OTHERS):
                kinds = f"expected {', '.join(PICTURES)}. Fix: convert it"
                raise DataError(f"data.dataset: cannot read {Path(at, name)}, {kinds}")
            if name.lower().endswith(PICTURES):
                yield Path(at, name)


def _fail(error: OSError) -> NoReturn:
    raise DataError(f"data.dataset: cannot read a folder ({error})") from error


def _refuse_links(paths: Iterable[Path]) -> None:
    """Raise DataError for what is no file, and for one file by two names.

    The two could stand in train and in test.
    """
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait without end
            raise _unreadable(path, "it is no regular file")
        other = seen.setdefault((found.st_dev, found.st_ino), path)
        if other is not path:
            raise _unreadable(path, f"it is the same file as {other}")


def _unreadable(path: Path, reason: object) -> DataError:
    return DataError(f"data.dataset: cannot read {path} ({reason}). Fix: remove it")


def _picture(path: Path, size: int | None) -> Image.Image:
    """A picture in grey or in colour, cut to size x size. Raises DataError, naming the file."""
    try:
        with Image.open(path, formats=FORMATS) as raw:
            if raw.mode[0] in "IF":
                raise _unreadable(path, "more than 8 bits for a pixel")
            picture = raw.convert("L" if raw.mode in ("1", "L") else "RGB")
        return ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR) if size else picture
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever their reader meets first
        raise _unreadable(path, failure(error)) from error
