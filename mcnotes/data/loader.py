"""Batches of your own, of whatever kind: any iterable of inputs, or of inputs with targets."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mcnotes.calls import Batch, InputError, Inputs, count, plain, seeded
from mcnotes.checks import faults, require, whole
from mcnotes.data.arrays import failure, native
from mcnotes.data.folders import SPLITS, dataset, named
from mcnotes.data.sources import DataError
from mcnotes.data.tasks import OPTIONS, SOURCES, Split, Task
from mcnotes.names import resolve

MEASURED_SIZE = 500  # images in a batch that is not trained on
TEST_BATCHES = 20  # at least: differences from batch to batch say how sure a difference is
HELD_OUT = 7  # of so many batches of a single set one is for validation, and one for the test


def widened(x: Tensor) -> Tensor:
    """16-bit floats as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Cut:
    """The images of a `Split` in batches of one size, floats in [0, 1]: a source for `Loader`."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.split.count(self.size)

    def __iter__(self) -> Iterator[Batch]:
        return self.split.batches(self.size)

    def __repr__(self) -> str:
        return f"Cut({self.split!r} in batches of {self.size})"


class Sets(NamedTuple):
    """Batches to train with, to choose by, and to judge by: sources for `Loader`."""

    train: Any
    val: Any
    test: Any
    task: Task | None = None  # if they are images in [0, 1]

    def __repr__(self) -> str:
        if self.task is not None:
            return f"Sets({self.task!r})"
        parts = zip(SPLITS, self, strict=False)
        return f"Sets({', '.join(f'{name}: {_named(part)}' for name, part in parts)})"


class Loader:
    """Batches as their owner cut them, moved to `device` in each pass; 16-bit floats as float32.

    source: an iterable, such as a DataLoader or a list, of batches: inputs (`calls.Inputs`, with a
    list for a tuple), or a tuple or list that begins with inputs and targets. In a dictionary of
    inputs, "labels" are targets. An iterator is read into memory, unless it is for one pass only
    (`once`). labels: leave them among the inputs as well. Raises InputError for other sources, and
    for batches of other forms, as soon as they are met.
    """

    augment = None

    def __init__(
        self, source: Any, device: torch.device, *, once: bool = False, labels: bool = False
    ) -> None:
        self.device, self.labels = device, labels
        self.source: Iterable[Any] = _checked(source)
        self.number = 0
        try:
            if once and isinstance(source, Iterator):
                head = [*islice(source, 1)]
                self.source = chain(head, source)
            else:
                self.source = list(source) if isinstance(source, Iterator) else source
                head = [*islice(self.source, 1)]
                self.number = _length(self.source)
        except (Exception, SystemExit) as error:  # of the user's data
            raise InputError(f"batches: they cannot be read ({failure(error)})") from error
        if not head:
            raise InputError("batches: got none, expected at least one batch of inputs")
        self.values = len(head[0]) if isinstance(head[0], tuple | list) else 1  # in a batch
        self.head: Batch = self.read(head[0])
        self.form = _form(self.head[0])

    def __repr__(self) -> str:
        size = f"{self.number} batches" if self.number else "batches, once"
        return f"Loader({size} of {count(self.head[0])} samples on {self.device})"

    @property
    def train(self) -> "Loader":
        """Itself: as `calls.Training`."""
        return self

    def read(self, batch: Any) -> Batch:
        """Inputs and targets (None if there are none), on the device."""
        inputs, targets = batch, None
        if isinstance(batch, tuple | list) and batch:
            inputs, targets = batch[0], batch[1] if len(batch) > 1 else None
        if isinstance(inputs, Mapping):
            inputs = dict(inputs)
            targets = inputs.get("labels") if targets is None else targets
            if not self.labels:
                inputs.pop("labels", None)
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        try:
            inputs, targets = tree_map(self.move, (inputs, targets))
            size = count(plain(inputs))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"batches: {error}; expected a tensor, a tuple or a dictionary of "
                "inputs, or (inputs, targets)"
            ) from error
        if isinstance(targets, Tensor) and targets.shape[:1] != (size,):
            raise InputError(
                f"batches: targets {[*targets.shape]} stand beside {size} inputs, "
                "expected one for each: several inputs of one network go into a tuple "
                "of their own, ((first, second), targets)"
            )
        return inputs, targets

    def move(self, x: Any) -> Any:
        """A tensor, or an array, to the device; anything else as it is."""
        if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
            if np.ma.is_masked(x):
                raise ValueError("some numbers of an array are masked")
            x = torch.from_numpy(native(x))
        if not isinstance(x, Tensor):
            return x
        if x.is_nested:
            raise ValueError("got a nested tensor: pad it")
        return widened(x.to(self.device))

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Any = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass, in batches of their own size.

        In random order, if there is a `generator`: the images of a `Cut`, the batches of a list.
        drop_last: without a last batch that is smaller than the first. Raises InputError when a
        pass is not as long as the first was.
        """
        found, k = self.source, 0
        if generator is not None and isinstance(self.source, Cut):
            found = self.source.split.batches(self.source.size, generator=generator)
        elif generator is not None and isinstance(self.source, Sequence):
            order = torch.randperm(self.number, generator=generator, device=generator.device)
            found = (self.source[i] for i in order.tolist())
        for k, batch in enumerate(found, 1):
            inputs, targets = self.read(batch)
            if (form := _form(inputs)) != self.form:
                raise InputError(
                    f"batches: batch {k} has {form}, the first {self.form}; expected "
                    "all of one kind; targets go into a batch"
                )
            last = drop_last and k == self.number
            if not (last and count(inputs) < count(self.head[0])):
                yield inputs, targets
        if self.number not in (0, k):
            raise InputError(
                f"batches: {self.number} at first, {k} in a later pass; expected the "
                "same each time, as of a list or a DataLoader"
            )

    def count(self, size: int) -> int:
        """How many batches there are, whatever `size`; 0 for an iterator of one pass."""
        return self.number

    def shares(self, size: int, cores: int) -> list[Iterable[Batch]]:
        """The first batch, and the others."""
        rest = self.batches(size)
        return [[next(rest)], rest]


def _checked(source: Any) -> Iterable[Any]:
    """`source` itself. Raises InputError for what is no iterable of batches."""
    kind, hint = f"a {type(source).__name__}", "such as a DataLoader or a list"
    if isinstance(source, Task | Split):
        hint = "such as list(task.train.batches(128))"
    elif isinstance(source, Dataset):
        hint = "such as torch.utils.data.DataLoader(dataset, batch_size=128)"
    elif isinstance(source, Tensor | np.ndarray):
        kind, hint = f"{kind} {[*source.shape]}", "such as [x] or x.split(128)"
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | str | bytes):
        return source
    raise InputError(f"batches: got {kind}, expected an iterable of batches, {hint}")


def _form(inputs: Inputs) -> str:
    """What the inputs are made of, whatever their sizes."""

    def say(x: Any) -> str:
        return f"{x.dim()}-D {x.dtype}" if isinstance(x, Tensor) else type(x).__name__

    return str(tree_map(say, inputs)).replace("'", "")


def _length(source: Any) -> int:
    try:
        return len(source)
    except TypeError:  # not known: of a stream
        return sum(1 for _ in source)


def sets(
    source: str | Path,
    *,
    image_size: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
) -> Sets:
    """Batches by name: what `dataset` takes, or "package.module:callable" for data of any kind.

    The callable takes no arguments. It returns a Dataset, a DataLoader, or any iterable of batches
    that can be read again; or several of them as (train, val, test), (train, val), or a dictionary
    with these names. If there is only one, every seventh batch is held out for validation and
    another seventh for the test, and all batches are kept in memory. If only the test is missing,
    it is half of val. A Task, and a tuple of three pairs of arrays (images, labels), are also
    accepted, as by `dataset`.

    image_size, batch_size: for data that do not come in batches. Raises DataError.
    """
    given = {"image_size": image_size, "batch_size": batch_size, "device": device}
    if found := faults(given, OPTIONS | {"batch_size": whole(1)}):
        raise DataError(f"data.sets: {'; '.join(found)}")
    source = named("data.sets", source)
    if source in SOURCES or os.path.isdir(source) or ":" not in source:
        return _cut(dataset(source, image_size, device), batch_size)
    made = _made_by(source)
    if isinstance(made, Task):
        return _cut(made, batch_size)
    if _are_arrays(made):
        return _cut(dataset(source, image_size, device), batch_size)
    parts = _parts(source, made)
    if image_size is not None:
        raise DataError(
            f"data.sets: {source} gave batches, expected pictures for image_size={image_size}. "
            "Fix: leave it out, and cut the inputs where the batches are made"
        )
    loaders = [_loader(one, batch_size, shuffle=k == 0) for k, one in enumerate(parts)]
    return _with_held_out(source, loaders)


def _made_by(source: str) -> Any:
    """What the user's function returns, with a dictionary or an iterator of sets as a tuple."""
    try:
        made = resolve(source)()
    except ValueError as error:
        raise DataError(f"data.sets: {error}") from error
    except (Exception, SystemExit) as error:  # of the user's function
        cause = f"{source} fails ({failure(error)})"
        raise DataError(f"data.sets: {cause}, expected a function without arguments") from error
    if isinstance(made, Mapping):
        if "train" not in made or not made.keys() <= {*SPLITS}:
            raise DataError(f"data.sets: {source} gave {[*made]}, expected train, val and test")
        return tuple(made[name] for name in SPLITS if name in made)
    return tuple(islice(made, len(SPLITS) + 1)) if isinstance(made, Iterator) else made


def _parts(source: str, made: Any) -> list[Any]:
    """The one to three sets that the user's function returned. Raises DataError for others."""
    several = isinstance(made, tuple | list) and not any(map(_is_batch, made))
    parts = [*made] if several else [made]
    if not 1 <= len(parts) <= len(SPLITS) or any(isinstance(x, tuple) for x in parts):
        raise DataError(
            f"data.sets: {source} gave {_named(made)}, expected a DataLoader, or up to three: "
            "(train, val, test)"
        )
    return parts


def _cut(task: Task, size: int) -> Sets:
    small = max(1, min(len(task.test) // TEST_BATCHES, MEASURED_SIZE))
    return Sets(Cut(task.train, size), Cut(task.val, MEASURED_SIZE), Cut(task.test, small), task)


def _is_batch(x: Any) -> bool:
    """Inputs, or a tuple or list that begins with inputs."""
    first = x[0] if isinstance(x, tuple | list) and x else x
    return isinstance(first, Tensor | np.ndarray | Mapping)


def _are_arrays(made: Any) -> bool:
    """Three pairs of arrays, whole sets of images with their labels?

    They come as a tuple: a list of pairs is one of batches, of which there may be three.
    """
    pairs = isinstance(made, tuple) and len(made) == len(SPLITS)
    return pairs and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(isinstance(x, Tensor | np.ndarray) for x in pair)
        for pair in made
    )


def _named(made: Any) -> str:
    size = f" of {len(made)}" if isinstance(made, tuple | list) else ""
    return f"a {type(made).__name__}{size}"


def _loader(one: Any, size: int, *, shuffle: bool) -> Any:
    """A Dataset in batches, and batches as they are."""
    if not isinstance(one, Dataset):
        return one
    return DataLoader(one, size, shuffle=shuffle and not isinstance(one, IterableDataset))


def _with_held_out(source: str, found: list[Any]) -> Sets:
    """One, two or three sets as three: parts of the last are held out where some are missing."""
    whole = found[-1]
    if len(found) == len(SPLITS):
        return Sets(*found)
    try:
        with seeded(0, torch.device("cpu")):  # a loader shuffles the same each time
            batches = [*_checked(whole)]
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # of the user's data
        raise DataError(f"data.sets: {source} cannot be read ({failure(error)})") from error
    if len(batches) < (least := len(SPLITS) + 1 - len(found)):
        raise DataError(
            f"data.sets: {source} gave {len(batches)} batches to hold some out of, expected at "
            f"least {least}. Fix: use smaller batches, or return (train, val, test)"
        )
    if len(found) == 2:
        return Sets(found[0], batches[::2], batches[1::2])
    kept = [batch for k, batch in enumerate(batches) if k % HELD_OUT not in (1, 2)]
    return Sets(kept, batches[1::HELD_OUT], batches[2::HELD_OUT])


def passages(
    path: str | Path, encode: Callable[[str], Sequence[int]], length: int, batch_size: int = 8
) -> Sets:
    """A text for language models that compute their own loss: passages of `length` tokens.

    A batch is {"input_ids", "labels"}, both the same, int64 [batch_size, length]: models of
    `transformers` shift labels themselves. encode: the text's token ids. Every seventh batch is for
    validation and another seventh for the test; what fills no batch is left out. Raises DataError
    for a file that is no text in UTF-8, and for one that is too short.
    """
    given = {"length": length, "batch_size": batch_size}
    if found := faults(given, {"length": whole(2), "batch_size": whole(1)}):
        raise DataError(f"data.passages: {'; '.join(found)}")
    try:
        text = Path(path).read_text("utf-8-sig")  # with a byte order mark or without
    except (OSError, ValueError) as error:
        cause = f"data.passages: {path} cannot be read ({failure(error)})"
        raise DataError(f"{cause}, expected a text in UTF-8") from error
    ids = torch.tensor(encode(text), dtype=torch.int64)
    size, least = batch_size * length, len(SPLITS)
    if len(ids) < least * size:
        raise DataError(
            f"data.passages: {path} has {len(ids)} tokens, expected at least {least * size}: "
            f"{least} batches of {batch_size} passages of {length}. Fix: use a longer text"
        )
    batches = ids[: len(ids) // size * size].view(-1, batch_size, length)
    return _with_held_out(str(path), [[{"input_ids": x, "labels": x} for x in batches]])


def take(source: Any, samples: int) -> Any:
    """The first so many samples of what `Loader` takes; whole batches, but of a `Cut` exactly.

    Raises ValueError for a number of samples that is no whole one of at least 1.
    """
    require("data.take", {"samples": samples}, {"samples": whole(1)})
    if isinstance(source, Cut):
        return Cut(source.split.first(samples), MEASURED_SIZE)
    kept: list[Batch] = []
    with seeded(0, torch.device("cpu")):  # as in `_with_held_out`
        for batch in Loader(source, torch.device("cpu"), once=True, labels=True).batches(0):
            kept.append(batch)
            samples -= count(batch[0])
            if samples <= 0:
                break
    return kept
