"""Find rotary positions among the operators of a network (chapter 13).

They turn pairs of coordinates of queries and keys by angles that the position tells, and so let
the same pairs be turned by any angle before. Programs write them in many ways: with slices, chunks
or strides, or with complex numbers. All of these are polynomials in the coordinates and in what
these are multiplied with, so that one try on random numbers decides: polynomials that agree there
are equal, but for a chance of measure zero (Schwartz and Zippel).
"""

import operator
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map_only

from mcnotes.symmetry.rules import MOVING
from mcnotes.symmetry.units import op_name

SAME = {"clone", "_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous"}
"""Operators that change nothing, unless they change the type."""
ELSEWHERE = {"as_strided", "copy", "index", "index_select"}
"""They move data by where it lies in memory, or by numbers that are not known here."""
POLYNOMIAL = SAME | (MOVING - ELSEWHERE) | {"view_as_complex"}
POLYNOMIAL |= {"add", "sub", "neg", "mul", "addcmul"}
LONGEST = 40
"""Operators between the coordinates and their turned ones; programs need some ten of them."""


class Turn(NamedTuple):
    """Rotary positions turn `start` into `end`; `inner`: the operators between.

    neighbours: whether coordinates 2j and 2j + 1 are a pair; if not, j and j + d/2 are.
    """

    end: Node
    start: Node
    inner: frozenset[Node]
    neighbours: bool


def name_of(node: Any) -> str:
    """The name of a node's operator; "" if it is none."""
    return op_name(node.target) if hasattr(getattr(node, "target", None), "_schema") else ""


def pairs(x: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    """The two coordinates of each pair along the last axis of x."""
    if neighbours:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def turns(graph: Graph, seated: Iterable[Node]) -> list[Turn]:
    """All rotary positions; seated: the nodes at which units enter."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    varying = {*seated}
    for node in order:
        if varying.intersection(node.all_input_nodes):
            varying.add(node)
    ends = [
        n for n in order if n in varying and name_of(n) in ("add", "cat", "view", "_unsafe_view")
    ]
    return [turn for end in ends if (turn := turn_at(end, order, varying))]


def turn_at(end: Node, order: dict[Node, int], varying: Collection[Node]) -> Turn | None:
    """The rotary positions that end here.

    Operators are followed back to the first one tensor, of the same shape, of which all is made.
    """
    region, front = {end}, {n for n in end.all_input_nodes if n in varying}
    while front and len(region) < LONGEST:
        last = max(front, key=order.__getitem__)
        scaled = any(name_of(n) in ("mul", "addcmul") for n in region)
        if len(front) == 1 and scaled and shape(last) == shape(end):
            alone = all({*n.users} <= region for n in region - {end})
            ways = [w for w in (False, True) if alone and commute(last, end, varying, w)]
            return Turn(end, last, frozenset(region - {end}), ways[0]) if ways else None
        if name_of(last) not in POLYNOMIAL and last.target is not operator.getitem:
            return None
        region.add(last)
        front = (front - {last}) | {n for n in last.all_input_nodes if n in varying}
    return None


def shape(node: Node) -> torch.Size | None:
    """The shape of a node's tensor; None if it has several."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def constant(node: Node) -> Tensor:
    """A tensor that the graph holds."""
    held: Tensor = getattr(node.graph.owning_module, str(node.target))
    return held


def commute(start: Node, end: Node, varying: Collection[Node], neighbours: bool) -> bool:
    """Whether what lies between may come before or after turns of pairs by random angles.

    Each pair has an angle of its own, wherever it stands along other axes.
    """
    size = shape(start)
    if not size or size[-1] % 2:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    angle = torch.randn(*size[:-1], size[-1] // 2, generator=generator, dtype=torch.float64)

    def turned(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        (a, b), (c, d) = pairs(x, neighbours), pairs(out, neighbours)
        c.copy_(angle.cos() * a - angle.sin() * b)
        d.copy_(angle.sin() * a + angle.cos() * b)
        return out

    try:
        before, after = (replay(end, {start: y}, varying) for y in (turned(x), x))
    except (RuntimeError, IndexError):  # of shapes that do not fit, when types are left out
        return False
    after = turned(after)
    return bool((before - after).abs().max() <= 1e-9 * after.abs().max())


def replay(end: Node, known: dict[Node, Any], varying: Collection[Node]) -> Tensor:
    """The tensor of a node in float64, from those that are known, and from random numbers.

    The same random numbers in each run: they stand for all of which it is not known how it is made.
    """
    generator = torch.Generator().manual_seed(1)

    def value(node: Node) -> Any:
        if node not in known:
            known[node] = made(node)
        return known[node]

    def made(node: Node) -> Any:
        name, run = name_of(node), node.target
        args, kwargs = node.args, node.kwargs
        if name in SAME:
            args, run = args[:1], lambda x: x
        elif name in ("view", "_unsafe_view"):
            args, run = args[:1], lambda x: x.reshape(shape(node))
        known = run is operator.getitem or name in POLYNOMIAL
        if known or (name in ("cos", "sin") and node not in varying):
            args, kwargs = tree_map_only(Node, value, (args, {} if name in SAME else kwargs))
            return run(*args, **kwargs)  # type: ignore[operator]
        like = node.meta["val"] if "val" in node.meta else constant(node)
        kind = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(like.shape, generator=generator, dtype=kind)

    return value(end)  # type: ignore[no-any-return]
