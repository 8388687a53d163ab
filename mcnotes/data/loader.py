"""Batches of your own, of whatever kind: any iterable of inputs, or of inputs with targets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from mcnotes.calls import Batch, InputError, Inputs, count, plain
from mcnotes.data.tasks import Split, Task


def widened(x: Tensor) -> Tensor:
    """16-bit floats as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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
        if once and isinstance(source, Iterator):
            head = [batch for batch, _ in zip(source, range(1), strict=False)]
            self.source = chain(head, source)
        else:
            self.source = list(source) if isinstance(source, Iterator) else source
            head = [batch for batch, _ in zip(self.source, range(1), strict=False)]
            self.number = _length(self.source)
        if not head:
            raise InputError("batches: got none, expected at least one batch of inputs")
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
        inputs, targets = tree_map(self.move, (inputs, targets))
        try:
            size = count(plain(inputs))
        except (TypeError, ValueError) as error:
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
            x = torch.from_numpy(x)
        if not isinstance(x, Tensor):
            return x
        return widened(x.to(self.device))

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Any = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass, in batches of their own size. A list is shuffled if there is a `generator`.

        drop_last: without a last batch that is smaller than the first. Raises InputError when a
        pass is not as long as the first was.
        """
        found, k = self.source, 0
        if generator is not None and isinstance(self.source, Sequence):
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
