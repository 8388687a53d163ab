"""Where a tensor repeats itself along an axis, whatever its entries are (chapter 3).

Query heads may share one head of keys, which is then repeated for each of them. A *marker* numbers
the positions along one axis, int64 [n]: where it has the same number, the slices of the tensor at
these positions are equal. Without a marker, nothing is known of an axis.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from mcnotes.symmetry.units import Labelled, is_constant

Markers = dict[int, Tensor]  # by axis
SAME = {"clone", "_to_copy", "detach", "alias", "expand"}
RESHAPING = {"view", "_unsafe_view", "unsqueeze", "squeeze"}
REORDERING = {"permute", "transpose", "t"}


def marker(x: Tensor, axis: int) -> Tensor | None:
    """What is known of an axis; one that `expand` has made repeats one slice."""
    if x.stride(axis) == 0:
        return torch.zeros(x.shape[axis], dtype=torch.int64)
    return x.copies.get(axis) if isinstance(x, Labelled) else None


def markers(x: Tensor) -> Markers:
    """What is known of all axes."""
    found = {k: marker(x, k) for k, n in enumerate(x.shape) if n > 1}
    return {k: m for k, m in found.items() if m is not None}


def unless_distinct(found: Markers) -> Markers:
    """Those markers that say that anything is repeated."""
    return {k: m for k, m in found.items() if len(m.unique()) < len(m)}


def moved(func: Any, name: str, args: Sequence[Any], shape: Sequence[int]) -> Markers:
    """The markers of what data movement makes, of this shape, of its first argument."""
    x = args[0]
    if not isinstance(x, Tensor) or not x.numel() or not x.dim():
        return {}
    known = markers(x)
    if name == "repeat":
        whole = {k: marked(known, k, n) for k, n in enumerate(x.shape)}
        new = len(shape) - x.dim()
        whole = {k + new: m.repeat(shape[k + new] // len(m)) for k, m in whole.items() if len(m)}
        return unless_distinct(whole)
    if name in ("index", "index_select"):
        return unless_distinct(looked_up(known, x, name, args))
    if name in SAME:
        return {k + len(shape) - x.dim(): m for k, m in known.items()}
    if name in RESHAPING and known:
        return unless_distinct(reshaped(known, x.shape, shape))
    if name in REORDERING and known:
        # Strides tell which axis is which.
        numbered = torch.empty_strided(x.shape, [*range(1, 1 + x.dim())], device="meta")
        order = func(numbered, *args[1:]).stride()
        return {k: known[step - 1] for k, step in enumerate(order) if step - 1 in known}
    return {}


def marked(known: Markers, axis: int, n: int) -> Tensor:
    """The marker of an axis of n positions, which are all different unless it is known."""
    return known.get(axis, torch.arange(n))


def looked_up(known: Markers, x: Tensor, name: str, args: Sequence[Any]) -> Markers:
    """The markers of a choice along one axis, by a vector of known indices."""
    where = {args[1] % x.dim(): args[2]} if name == "index_select" else dict(enumerate(args[1]))
    where = {k: i for k, i in where.items() if i is not None}
    if len(where) != 1:
        return {}
    ((axis, index),) = where.items()
    if isinstance(index, Labelled):  # a buffer may be another one in another network
        index = index.value if index.known else None
    if index is None or index.dim() != 1 or index.dtype != torch.int64:
        return {}
    return known | {axis: marked(known, axis, x.shape[axis])[index.cpu()]}


def reshaped(known: Markers, old: Sequence[int], new: Sequence[int]) -> Markers:
    """The markers of the same entries in another shape, where axes are split and joined."""
    found: Markers = {}
    for ours, theirs in chunks(old, new):
        if any(k in known for k in ours):
            number = torch.zeros((), dtype=torch.int64)
            for k in ours:
                number = number[..., None] * old[k] + marked(known, k, old[k])
            number = number.reshape([new[k] for k in theirs])
            for i, k in enumerate(theirs):
                rows = number.movedim(i, 0).reshape(new[k], -1)
                found[k] = rows.unique(dim=0, return_inverse=True)[1]
    return found


def chunks(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Smallest runs of axes of two shapes that hold the same number of positions."""
    i = j = 0
    while i < len(old) and j < len(new):
        ours, theirs = [i], [j]
        while (a := prod(old[k] for k in ours)) != (b := prod(new[k] for k in theirs)):
            run = ours if a < b else theirs
            run.append(run[-1] + 1)
        yield ours, theirs
        i, j = ours[-1] + 1, theirs[-1] + 1


def met(xs: Sequence[Tensor], shape: Sequence[int]) -> Markers:
    """The markers of what tensors make entry by entry; shape: of the result."""
    found: Markers = {}
    for k, n in enumerate(shape):
        parts = [torch.zeros(n, dtype=torch.int64)]
        for x in xs:
            axis = k + x.dim() - len(shape)
            if axis >= 0 and x.shape[axis] > 1 and not is_constant(x):
                m = marker(x, axis)
                if m is None:
                    break
                parts.append(m)
        else:
            if n > 1:
                found[k] = torch.stack(parts).unique(dim=1, return_inverse=True)[1]
    return unless_distinct(found)
