"""Tensors without values that know which units stand where in them (chapter 3).

A *factor* is an integer array of codes, `unit << 32 | slot`, that say which unit (0: something
fixed, 1: a constant) stands at each position along some axes of a tensor, and at which of its
slots. Along all other axes its size is 1.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONSTANT, UNIT, SLOT = 1 << 32, 2 << 32, (1 << 32) - 1  # codes from UNIT on are units


class SymmetryError(ValueError):
    """A network cannot be followed, or a symmetry does not hold; the text says why and where."""


@dataclass(eq=False)
class Tap:
    """A result in the network: its name, its factors, and what entered its nonlinearity."""

    factors: Sequence[Tensor] = ()
    pre: "Tap | None" = None
    name: str = ""


class Marked(Tensor):
    """A tensor without values that carries factors. taps: the results of which it is made."""

    walk: Any  # has a method `operator`
    factors: list[Tensor]
    taps: list[Tap]
    used: bool

    @staticmethod
    def __new__(cls, walk: Any, like: Tensor, factors: Any = (), taps: Any = ()) -> "Marked":
        shape, strides = like.shape, like.stride()
        self = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=like.dtype)
        self.walk, self.taps, self.used = walk, taps, False
        self.factors = [padded(f, like.dim()) for f in factors]
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        walk = next(x.walk for x in tree_leaves((args, kwargs)) if isinstance(x, Marked))
        return walk.operator(func, args, kwargs or {})


class Tape(TorchDispatchMode):
    """Show each result of an operator, under a name that is the same in every run of a network."""

    def __init__(self, show: Callable[[str, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.show, self.count = show, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = op_name(func), func(*args, **(kwargs or {}))
        self.count[name] += 1
        self.show(f"{name}:{self.count[name]}", out[0] if isinstance(out, list | tuple) else out)
        return out


@cache
def op_name(func: Any) -> str:
    """`relu` for aten::relu and aten::relu_; one name for BatchNorm on all devices."""
    name = re.sub("^aten::|_$", "", func._schema.name)
    return re.sub(r"^\w*batch_norm\w*", "native_batch_norm", name)


def bare(x: Tensor) -> Tensor:
    """The tensor without values and marks."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def padded(factor: Tensor, dims: int) -> Tensor:
    """With axes of size 1 in front, as in broadcasting."""
    return factor[(None,) * (dims - factor.dim())]


def axes(factor: Tensor) -> frozenset[int]:
    """The axes along which a factor lives; its size along all others is 1."""
    return frozenset(k for k, n in enumerate(factor.shape) if n > 1)


def positions(shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """Number the positions along `dims`; size 1 along all other axes."""
    size = torch.Size(n if k in dims else 1 for k, n in enumerate(shape))
    return torch.arange(size.numel()).view(size)


def as_one(codes: Tensor, axis: int) -> bool:
    """Whether the units stay the same along an axis, and their slots advance in step."""
    first = codes.narrow(axis, 0, 1)
    step = codes - first
    if not bool(step.any()):
        return True
    if bool((codes ^ first >= 1 << 32).any()):
        return False
    step = step.movedim(axis, 0).reshape(codes.shape[axis], -1)[:, (first >= UNIT).flatten()]
    return bool((step == step[:, :1]).all())


def distinct(a: Tensor, b: Tensor) -> int:
    """How many different pairs there are."""
    return len((a << 32 | b).unique())


def functional(f: Tensor, g: Tensor) -> bool:
    """Whether one labelling refines the other, so that tying them merges no more than it must."""
    if not (axes(f) <= axes(g) or axes(g) <= axes(f)):
        return False
    u, v = torch.broadcast_tensors(f >> 32, g >> 32)
    u, v = u[both := (u > 1) & (v > 1)], v[both]
    return len(u) > 0 and distinct(u, v) == max(len(u.unique()), len(v.unique()))


def independent(f: Tensor, g: Tensor) -> bool:
    """Whether units of two factors are as rows and columns: each pair meets once, in like slots."""
    if axes(f) != axes(g) or bool((torch.minimum(f, g) < UNIT).any()):
        return False
    u, v, s, t = f >> 32, g >> 32, f & SLOT, g & SLOT
    rows, columns = len(u.unique()), len(v.unique())
    once = distinct(u, v) == rows * columns == f.numel()
    return once and distinct(s, v) == columns and distinct(t, u) == rows
