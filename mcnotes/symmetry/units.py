"""Tensors without values that know which unit stands at each of their entries (chapter 3).

A *unit* is one index of one axis of one parameter, and is known by its number. Where units stand in
a tensor is told by *factors*. A factor is an integer tensor of codes, `unit << 32 | slot`: which
unit stands at each position along some axes, and at which of its slots. Along all other axes its
size is 1. Units 0 and 1 are none: 0 is something fixed, 1 a constant that gives way to units.
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

BITS = 32
CONSTANT, UNIT, SLOT = 1 << BITS, 2 << BITS, (1 << BITS) - 1  # codes from UNIT on are units


class SymmetryError(ValueError):
    """A network cannot be followed, or a symmetry does not hold; the text says why and where."""


class ExampleError(SymmetryError):
    """The network itself fails on the example; the cause is its own error."""


@dataclass(eq=False)
class Tap:
    """A result in the network: its name, its factors, and what entered its nonlinearity.

    given: whether it depends on the inputs; if not, it may be weights, as of `weight_norm`.
    """

    factors: Sequence[Tensor] = ()
    pre: "Tap | None" = None
    name: str = ""
    given: bool = False


class Labelled(Tensor):
    """A tensor that carries factors, and no values unless they are known.

    trace: what runs its operators. factors: of as many axes as the tensor. taps: the results of
    which it is made. given: whether it depends on the inputs. used: whether an operator has read
    it. sources: the tensors of which it is made in a way that nobody has described; their units
    must be pinned when it is used. value: its entries as this run computes them, where they depend
    neither on inputs nor on parameters. stored: whether they come from the state dict, and so may
    be others in another network. constant: whether all entries are one number, whatever shapes the
    inputs have. copies: see the module of this name.
    """

    trace: Any  # has a method `operator`
    factors: list[Tensor]
    taps: Sequence[Tap]
    given: bool
    used: bool
    sources: Sequence["Labelled"]
    value: Tensor | None
    stored: bool
    constant: bool
    copies: dict[int, Tensor]

    @staticmethod
    def __new__(
        cls, trace: Any, like: Tensor, factors: Iterable[Tensor] = (), taps: Sequence[Tap] = ()
    ) -> "Labelled":
        shape, strides = like.shape, like.stride()
        self = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=like.dtype)
        self.trace, self.taps, self.sources = trace, taps, ()
        self.given = self.used = self.stored = self.constant = False
        self.value, self.copies = None, {}
        self.factors = [padded(f, like.dim()) for f in factors]
        return self

    @property
    def known(self) -> bool:
        """Whether its values are those of every network of this kind: no unit is in it."""
        return self.value is not None and not self.stored

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        trace = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Labelled)).trace
        return trace.operator(func, args, kwargs or {})


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


def labelled_in(values: Any) -> list[Labelled]:
    """The labelled tensors among nested values, in their order, but those that hold no unit."""
    return [x for x in tree_leaves(values) if isinstance(x, Labelled) and not x.known]


def is_uniform(x: Tensor) -> bool:
    """Whether all entries are one number."""
    return not x.numel() or bool((x == x.flatten()[0]).all())


def is_constant(x: Tensor) -> bool:
    """Whether all entries are one number, whatever shapes the inputs have."""
    return x.constant if isinstance(x, Labelled) else is_uniform(x)


def factors_of(x: Any) -> list[Tensor]:
    """The factors of a tensor; a plain one has none."""
    return x.factors if isinstance(x, Labelled) else []


def without_values(x: Tensor) -> Tensor:
    """A tensor of the same form that has neither values nor labels."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def padded(factor: Tensor, dims: int) -> Tensor:
    """With axes of size 1 in front, as in broadcasting, up to `dims` axes."""
    return factor[(None,) * (dims - factor.dim())]


def axes(factor: Tensor) -> frozenset[int]:
    """The axes along which a factor lives; its size along all others is 1."""
    return frozenset(k for k, n in enumerate(factor.shape) if n > 1)


def units_of(codes: Tensor) -> Tensor:
    """The unit of each code, as a number; below 2, there is none."""
    return codes >> BITS


def units_in(codes: Tensor) -> Tensor:
    """The units among codes [number of entries with a unit]."""
    return units_of(codes[codes >= UNIT])


def positions(shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """Number the positions along `dims`; size 1 along all other axes."""
    size = torch.Size(n if k in dims else 1 for k, n in enumerate(shape))
    return torch.arange(size.numel()).view(size)


# How codes are brought into the form of a factor


def without_needless_axes(codes: Tensor) -> Tensor:
    """One position of each axis along which codes are repeated, or all units move as one."""
    codes = codes[tuple(slice(None) if step else slice(1) for step in codes.stride())]
    for k in axes(codes):
        # Most axes fail already at their first two positions.
        if moves_as_one(codes.narrow(k, 0, 2), k) and moves_as_one(codes, k):
            codes = codes.narrow(k, 0, 1)
    return codes


def moves_as_one(codes: Tensor, axis: int) -> bool:
    """Whether the units stay the same along an axis, and their slots advance in step."""
    first = codes.narrow(axis, 0, 1)
    step = codes - first
    if not bool(step.any()):
        return True
    if bool((units_of(codes ^ first) > 0).any()):
        return False
    step = step.movedim(axis, 0).reshape(codes.shape[axis], -1)[:, (first >= UNIT).flatten()]
    return bool((step == step[:, :1]).all())


def with_distinct_slots(codes: Tensor) -> Tensor:
    """The same units, with another slot at each entry of a unit, counted alike for all units.

    An entry's slot tells where its old slot comes among all old ones, and which copy of its old
    code it is, in the order of the entries.
    """
    held = codes >= UNIT
    ordered = codes[held].sort().values
    if bool((ordered[1:] > ordered[:-1]).all()):
        return codes
    slot = (codes & SLOT).unique(return_inverse=True)[1].where(held, 0)
    unit = units_of(codes) << BITS
    ordered, order = (unit | slot).flatten().sort(stable=True)
    copy_in_order = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    copy = torch.empty_like(order).scatter(0, order, copy_in_order)
    copy = copy.view(codes.shape).where(held, 0)
    distinct: Tensor = unit | slot * (int(copy.max()) + 1) + copy
    return distinct


# How two factors of one shape, or of shapes that can be broadcast, relate


def distinct_pairs(a: Tensor, b: Tensor) -> int:
    """How many different pairs there are of corresponding entries, all below 2³¹."""
    return len((a << BITS | b).unique())


def functional(f: Tensor, g: Tensor) -> bool:
    """Whether one labelling refines the other, so that tying them merges no more than it must."""
    if not (axes(f) <= axes(g) or axes(g) <= axes(f)):
        return False
    u, v = torch.broadcast_tensors(units_of(f), units_of(g))
    u, v = u[both := (u > 1) & (v > 1)], v[both]
    return len(u) > 0 and distinct_pairs(u, v) == max(len(u.unique()), len(v.unique()))


def independent(f: Tensor, g: Tensor) -> bool:
    """Whether units of each factor can move and leave those of the other where they are.

    So it is with rows and columns. A unit that moves keeps its slots, so the other's unit must be
    told by the slot alone.
    """
    if axes(f) != axes(g) or bool((torch.minimum(f, g) < UNIT).any()):
        return False
    return all(
        distinct_pairs(a & SLOT, units_of(b)) == len((a & SLOT).unique())
        for a, b in ((f, g), (g, f))
    )
