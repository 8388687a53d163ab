"""Follow what acts on spaces of units through a network: scales, signs, changes of basis.

A *space* is a set of units that stand at *sites* in parameters; something acts there: a positive
scale or a sign of each unit, or one invertible or orthogonal matrix. At each site, and then in
each tensor of the network, it acts with some *power*: scales s as sᵖ; a matrix M as M for p = 1, as
its inverse transposed for p = −1. The powers at the sites are unknown. An operator either passes
them on, or demands a linear equation between them (the terms of a sum have equal powers; those of
a contraction add up to 0), or is not understood, and then demands that they vanish. What reaches
the outputs must vanish, too. Every solution of all equations is a symmetry, and no other is
offered: ignorance loses symmetry, but never soundness.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import combinations
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.calls import Inputs, arranged, doubled
from mcnotes.symmetry.execute import inference_copy, outputs, unfused_attention
from mcnotes.symmetry.foreign import first_line
from mcnotes.symmetry.rotary import SAME, pairs, turns
from mcnotes.symmetry.units import (
    BITS,
    SLOT,
    UNIT,
    SymmetryError,
    axes,
    distinct_pairs,
    op_name,
    padded,
    units_of,
    with_distinct_slots,
    without_needless_axes,
)

Powers = dict[int, Fraction]  # a linear form: coefficients by site
Part = dict[int, Powers]  # by space


@dataclass(frozen=True)
class Law:
    """A kind of group. modulus: 2 if acting twice is acting not at all, 0 if powers are numbers.

    mixes: whether it mixes the units of a space; if not, it multiplies each. ones: whether its
    matrices leave the vector of ones, and sums over the units, as they are. turns: whether they
    turn a plane, and so let it be turned by rotary positions.
    """

    modulus: int
    mixes: bool
    ones: bool = False
    turns: bool = False


LAWS = {
    "bases": Law(0, mixes=True),
    "rotations": Law(2, mixes=True),
    "rotations about 1": Law(2, mixes=True, ones=True),
    "scales": Law(0, mixes=False),
    "signs": Law(2, mixes=False),
    "phases": Law(2, mixes=True, turns=True),
}
"""All kinds of groups, the larger ones first."""


class Leg(NamedTuple):
    """Units of spaces that stand in a tensor, and the powers with which something acts on them.

    codes: as a factor in `units`. parts: one; two where two tensors were multiplied entry by entry
    whose matrices meet only when the units are summed.
    """

    codes: Tensor
    parts: tuple[Part, ...]


class Value(NamedTuple):
    """A tensor: its legs, and the axes along which its entries may differ.

    known: its entries, if the graph holds them.
    """

    shape: tuple[int, ...]
    legs: tuple[Leg, ...] = ()
    live: frozenset[int] = frozenset()
    known: Tensor | None = None


def plain(shape: Sequence[int]) -> Value:
    """A tensor on which nothing acts, and of which nothing is known."""
    return Value(tuple(shape), (), frozenset(k for k, n in enumerate(shape) if n > 1))


# The network as a list of operators


class Capture(NamedTuple):
    """A network's operators, and the tensors of its state: the nodes where these enter."""

    graph: GraphModule
    nodes: dict[str, Node]  # by name; of tied tensors the first name
    tied: dict[str, str]  # every name: the first name of the same tensor


class Unchecked(TorchDispatchMode):
    """Leave out what looks at values only to raise an error."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if op_name(func) == "_linalg_check_errors" else func(*args, **(kwargs or {}))


def capture(net: nn.Module, inputs: Inputs, train: bool) -> Capture:
    """Record the operators of one run, without those that write in place.

    Control flow on data has been refused by `discover`, which must come first; it looks at shapes
    alone. Raises SymmetryError if the network does not run on these values.
    """
    net = inference_copy(net, train)
    state = {n: t for n, t in net.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first = {id(t): n for n, t in reversed(state.items())}
    tied = {n: first[id(t)] for n, t in state.items()}
    theta = {n: state[n].detach() for n in dict.fromkeys(tied.values())}
    inputs = doubled(arranged(net, inputs))

    def run(given: dict[str, Tensor], x: Any) -> list[Tensor]:
        with Unchecked():
            return outputs(net, given, x)

    # Not `torch.func.functionalize`, which refuses functions that have a backward of their own.
    functional = dispatch_functionalize(run, FunctionalTensorMode())
    try:
        with unfused_attention, torch.no_grad():
            graph = make_fx(functional)(theta, inputs)
    except RuntimeError as error:
        raise SymmetryError(
            f"find: the network does not run on the example; PyTorch says {first_line(error)}. "
            "Fix: give an example of the type and on the device of the network."
        ) from error
    graph.graph.eliminate_dead_code()
    entering = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return Capture(graph, dict(zip(theta, entering, strict=False)), tied)


# Spaces and their sites


class Seat(NamedTuple):
    """A site of a space: units of it stand at `entries` [units, slots] along axes of a tensor."""

    space: int
    name: str  # in `Capture.nodes`
    axes: tuple[int, ...]
    entries: Tensor


class Found(NamedTuple):
    """The equations of one run, by space: what must vanish, and the operator that demands it."""

    equations: Mapping[int, list[tuple[Powers, str]]]

    def why(self, space: int) -> str:
        """The operators that demanded that a power vanishes."""
        names = (why for powers, why in self.equations[space] if len(powers) == 1 and why)
        return ", ".join(dict.fromkeys(names))


def follow(
    captured: Capture,
    seats: Sequence[Seat],
    starts: Mapping[Node, str],
    law: Law,
    ones: Iterable[str] = (),
) -> Found:
    """All equations between the powers of the seats, by one pass over the operators.

    starts: the nodes at which tensors of the state have the legs of their seats. ones: names of
    those that are to be taken as vectors of ones (norm gains that are folded into what reads them).
    """
    follower = Follower(law, seats)
    ones = {*ones}
    env: dict[Node, Any] = {}
    seated = defaultdict[str, list[int]](list)
    for k, seat in enumerate(seats):
        seated[seat.name].append(k)
    begun = {name for node, name in starts.items() if node.users}
    for k, seat in enumerate(seats):
        if seat.name in ones or seat.name not in begun:
            follower.equations[seat.space].append(({k: Fraction(1)}, ""))
    graph = captured.graph
    seats_enter = [node for node, name in starts.items() if name in seated]
    turned = turns(graph.graph, seats_enter) if law.turns else []
    ends = {turn.end: turn for turn in turned}
    inner = {node for turn in turned for node in turn.inner}
    for node in graph.graph.nodes:
        name = starts.get(node)
        if node in inner:
            env[node] = tree_map_only(Tensor, lambda x: plain(x.shape), node.meta["val"])
            continue
        if node in ends:
            follower.at = "rotary positions"
            env[node] = follower.turn(env[ends[node].start], ends[node].neighbours)
            continue
        if node.op == "placeholder":
            env[node] = tree_map_only(Tensor, lambda x: plain(x.shape), node.meta["val"])
        elif node.op == "get_attr":
            held = getattr(graph, node.target)
            env[node] = plain(held.shape)._replace(known=held)
        elif node.op == "output":
            follower.at = "the output"
            results = [env[x] for x in tree_leaves(node.args) if isinstance(x, Node)]
            for x in values_in(results):
                follower.vanish(x.legs)
        elif node.target is operator.getitem:
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = follower.operator(node, env)
        if name is not None:
            value = env[node]
            env[node] = (
                Value(value.shape)
                if name in ones
                else value._replace(legs=follower.seated(value.shape, seated[name]))
            )
    return Found(follower.equations)


def values_in(xs: Iterable[Any]) -> list[Value]:
    """The values among arguments or results, in lists, too."""
    found = []
    for x in xs:
        if isinstance(x, Value):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += values_in(x)
    return found


MOVES = {
    "view": torch.ops.aten.reshape,
    "_unsafe_view": torch.ops.aten.reshape,
    "permute": torch.ops.aten.permute,
    "transpose": torch.ops.aten.transpose,
    "t": torch.ops.aten.t,
    "unsqueeze": torch.ops.aten.unsqueeze,
    "squeeze": torch.ops.aten.squeeze,
    "expand": torch.ops.aten.expand,
    "slice": torch.ops.aten.slice,
    "select": torch.ops.aten.select,
    "split": torch.ops.aten.split,
    "split_with_sizes": torch.ops.aten.split_with_sizes,
    "unbind": torch.ops.aten.unbind,
    "repeat": torch.ops.aten.repeat,
    "flip": torch.ops.aten.flip,
    "roll": torch.ops.aten.roll,
}
"""Operators that only move data, by name."""
SLOPES: dict[str, Fraction | int] = {
    "relu": 1,
    "leaky_relu": 1,
    "abs": 1,
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "reciprocal": -1,
    "sign": 0,
    "sgn": 0,
}
"""Functions f with f(sx) = sᵖ f(x) for all s > 0, and their p."""
PARITIES = {
    "tanh": 1,
    "sin": 1,
    "tan": 1,
    "asinh": 1,
    "atan": 1,
    "erf": 1,
    "sinh": 1,
    "sign": 1,
    "sgn": 1,
    "reciprocal": 1,
    "round": 1,
    "trunc": 1,
    "abs": 0,
    "cos": 0,
    "cosh": 0,
}
"""Functions f with f(−x) = (−1)ᵖ f(x), and their p."""
POOLS = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2}
POOLS |= {"_adaptive_avg_pool3d": 3, "upsample_nearest2d": 2, "upsample_bilinear2d": 2}
"""Linear maps of each image alone, and how many axes an image has."""
MAX_POOLS = {"max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3}


class Follower:
    """What one run knows: the law, and the equations so far."""

    def __init__(self, law: Law, seats: Sequence[Seat]) -> None:
        self.law, self.seats = law, seats
        self.equations = defaultdict[int, list[tuple[Powers, str]]](list)
        self.at = ""
        self.sizes: dict[int, int] = {s.space: len(s.entries) for s in seats}
        # Units of all spaces are numbered in one row.
        starts = [UNIT >> BITS]
        for space in range(max(self.sizes, default=-1) + 1):
            starts.append(starts[-1] + self.sizes.get(space, 0))
        self.starts = torch.tensor(starts)

    def seated(self, shape: tuple[int, ...], numbers: Iterable[int]) -> tuple[Leg, ...]:
        """The legs of a tensor of the state: those on the same axes, such as heads, are one."""
        codes: dict[Any, Tensor] = {}
        parts: dict[Any, Part] = {}
        for k in numbers:
            seat = self.seats[k]
            size = [shape[a] if a in seat.axes else 1 for a in range(len(shape))]
            lane = sum(seat.space in parts[key] for key in parts if key[0] == seat.axes)
            flat = codes.setdefault((seat.axes, lane), torch.zeros(size, dtype=torch.long)).view(-1)
            if bool(flat[seat.entries].any()):  # the equations of one would be lost
                raise SymmetryError(
                    f"find: two spaces hold the same entries of {seat.name!r}, and one of them "
                    "would be lost. Fix: ask for fewer kinds."
                )
            unit = self.starts[seat.space] + torch.arange(len(seat.entries))
            flat[seat.entries] = unit[:, None] << BITS | torch.arange(seat.entries.shape[1])
            parts.setdefault((seat.axes, lane), {})[seat.space] = {k: Fraction(1)}
        legs = [self.leg(codes[a], (parts[a],)) for a in codes]
        return tuple(leg for leg in legs if leg)

    # Equations

    def demand(self, space: int, powers: Powers) -> None:
        """These powers must vanish."""
        powers = {k: c for k, c in powers.items() if c}
        if powers:
            self.equations[space].append((powers, self.at))

    def vanish(self, legs: Iterable[Leg | None]) -> None:
        """Nothing may act on these legs."""
        for leg in legs:
            for part in leg.parts if leg else ():
                for space, powers in part.items():
                    self.demand(space, powers)

    def same(self, legs: Sequence[Leg]) -> None:
        """What acts on these legs must be one and the same."""
        for leg in legs[1:]:
            for space, powers in leg.parts[0].items():
                self.demand(space, plus(powers, legs[0].parts[0][space], -1))

    # Legs

    def leg(self, codes: Tensor, parts: tuple[Part, ...]) -> Leg | None:
        """A leg of these codes; None, with what acts on it vanishing, if it cannot be followed."""
        codes = without_needless_axes(codes)
        if not bool((codes >= UNIT).any()):
            return None
        codes = with_distinct_slots(codes)
        present = self.spaces(codes)
        parts = tuple({s: p for s, p in part.items() if s in present} for part in parts)
        leg = Leg(codes, parts)
        if codes.numel() == 1 or (self.law.mixes and not self.whole(codes)):
            self.vanish([leg])
            return None
        return leg

    def space_of(self, codes: Tensor) -> Tensor:
        """The space of each code that has a unit."""
        return torch.searchsorted(self.starts, units_of(codes), right=True) - 1

    def spaces(self, codes: Tensor) -> set[int]:
        """The spaces of the codes."""
        return {*self.space_of(codes[codes >= UNIT]).unique().tolist()}

    def orbits(self, codes: Tensor) -> Tensor:
        """For each entry the set of entries that a matrix mixes: one of each unit of a space."""
        return self.space_of(codes) << BITS | (codes & SLOT)

    def whole(self, codes: Tensor) -> bool:
        """Whether there are all units of each space, equally often."""
        held = codes[codes >= UNIT]
        orbit, count = self.orbits(held).unique(return_counts=True)
        return all(
            n == self.sizes[s]
            for s, n in zip((orbit >> BITS).tolist(), count.tolist(), strict=True)
        )

    def mixed_axes(self, leg: Leg) -> frozenset[int]:
        """The axes along which entries are mixed; on the others, spaces or copies lie."""
        if not self.law.mixes:
            return axes(leg.codes)
        held = leg.codes >= UNIT
        orbit = self.orbits(leg.codes)[held].unique(return_inverse=True)[1]
        mixed = set()
        for k in axes(leg.codes):
            shape = [-1 if a == k else 1 for a in range(leg.codes.dim())]
            place = torch.arange(leg.codes.shape[k]).view(shape).expand(leg.codes.shape)[held]
            if distinct_pairs(orbit, place) > int(orbit.max()) + 1:
                mixed.add(k)
        return frozenset(mixed)

    def match(self, a: Tensor, b: Tensor) -> bool:
        """Whether the same units stand at the same places, and matrices would mix the same ones."""
        a, b = torch.broadcast_tensors(a, b)
        if not torch.equal(units_of(a), units_of(b)):
            return False
        if not self.law.mixes:
            return True
        held = a >= UNIT
        x, y = (
            self.orbits(with_distinct_slots(c)[held]).unique(return_inverse=True)[1] for c in (a, b)
        )
        return distinct_pairs(x, y) == int(x.max()) + 1 == int(y.max()) + 1

    def meeting(self, values: Sequence[Value]) -> Iterator[dict[int, Leg]]:
        """Legs that meet where tensors meet entry by entry, by the number of the tensor.

        Those that meet but do not match must vanish, and are left out.
        """
        dims = max((len(x.shape) for x in values), default=0)
        own = [
            (k, leg._replace(codes=padded(leg.codes, dims)))
            for k, x in enumerate(values)
            for leg in x.legs
        ]
        for these in clusters(own):
            if self.fit(these):
                yield dict(these)
                continue
            # Some spaces may match where others do not.
            alone = [(k, one) for k, leg in these for one in self.by_space(leg)]
            for few in clusters(alone) if len(alone) > len(these) else [these]:
                if self.fit(few):
                    yield dict(few)
                else:
                    self.vanish(leg for _, leg in few)

    def fit(self, legs: Sequence[tuple[int, Leg]]) -> bool:
        """Whether these are legs of different tensors that match."""
        (_, first), *rest = legs
        return len({k for k, _ in legs}) == len(legs) and all(
            self.match(first.codes, leg.codes) for _, leg in rest
        )

    def by_space(self, leg: Leg) -> list[Leg]:
        """The units of each space as a leg of their own."""
        space = self.space_of(leg.codes)
        return [
            Leg(
                leg.codes.where((leg.codes >= UNIT) & (space == s), 0),
                tuple({s: part[s]} for part in leg.parts),
            )
            for s in sorted(self.spaces(leg.codes))
        ]

    def lack(self, leg: Leg, values: Sequence[Value], dims: int) -> bool:
        """Whether any of these tensors differs along the axes on which the leg's units lie."""
        mixed = self.mixed_axes(leg)
        return any(k + dims - len(x.shape) in mixed for x in values for k in x.live)

    # What operators do

    def add(self, *values: Value) -> Value:
        """A sum, or any choice between tensors entry by entry: what acts must be the same."""
        dims, found = max(len(x.shape) for x in values), []
        for legs in self.meeting(values):
            others = [x for k, x in enumerate(values) if k not in legs]
            several = [*legs.values()]
            largest = max(several, key=lambda leg: leg.codes.numel())
            fits = all(len(leg.parts) == 1 for leg in several)
            if others:
                fits &= self.law.ones and not self.lack(largest, others, dims)
            if fits:
                self.same(several)
                found.append(Leg(largest.codes, several[0].parts))
            else:
                self.vanish(several)
        return self.met(values, found)

    def multiply(self, *values: Value) -> Value:
        """A product entry by entry: powers add; matrices wait for the sum over their units."""
        dims, found = max(len(x.shape) for x in values), []
        for legs in self.meeting(values):
            others = [x for k, x in enumerate(values) if k not in legs]
            several = [*legs.values()]
            largest = max(several, key=lambda leg: leg.codes.numel())
            parts = tuple(part for leg in several for part in leg.parts)
            if not self.law.mixes:
                parts = (reduce(lambda a, b: {s: plus(a[s], b[s]) for s in a}, parts),)
            elif len(parts) > 2 or self.lack(largest, others, dims):
                self.vanish(several)
                continue
            found.append(Leg(largest.codes, parts))
        return self.met(values, found)

    def met(self, values: Sequence[Value], legs: Sequence[Leg]) -> Value:
        """The result of an operator that acts entry by entry."""
        shape = torch.broadcast_shapes(*(x.shape for x in values))
        live = frozenset(k + len(shape) - len(x.shape) for x in values for k in x.live)
        return Value(tuple(shape), tuple(legs), live)

    def powered(self, x: Value, power: Fraction | int | None) -> Value:
        """A function that turns scales, or signs, into a power of them; None: into nothing."""
        if power is None or self.law.mixes:
            self.vanish(x.legs)
            return x._replace(legs=())
        legs = [
            leg._replace(parts=({s: plus({}, p, power) for s, p in leg.parts[0].items()},))
            for leg in x.legs
        ]
        return x._replace(legs=tuple(legs) if power else ())

    def total(self, x: Value, dims: Iterable[int], keep: bool = True) -> Value:
        """A sum or mean along some axes."""
        dims = {d % len(x.shape) for d in dims}
        kept = []
        for leg in x.legs:
            if not axes(leg.codes) & dims:
                kept.append(leg)
            elif not self.law.mixes or not self.mixed_axes(leg) <= dims:
                self.vanish([leg])
            elif len(leg.parts) == 2:
                for space, powers in leg.parts[0].items():
                    self.demand(space, plus(powers, leg.parts[1][space]))
            elif not self.law.ones or axes(leg.codes) & dims != self.mixed_axes(leg):
                self.vanish([leg])
        shape = tuple(1 if k in dims else n for k, n in enumerate(x.shape))
        value = Value(shape, tuple(kept), x.live - dims)
        if keep or not dims:
            return value
        left = [k for k in range(len(shape)) if k not in dims]
        narrow: Value = self.move(value, lambda t: t.reshape([t.shape[k] for k in left]))
        return narrow

    def move(self, x: Value, run: Callable[[Tensor], Any]) -> Any:
        """Data movement, run on the codes of each leg: the result, or results."""
        shapes = run(torch.empty(x.shape, device="meta"))
        many = isinstance(shapes, list | tuple)
        legs: list[list[Leg]] = [[] for _ in (shapes if many else [shapes])]
        for leg in x.legs:
            moved = run(leg.codes.expand(x.shape))
            for own, codes in zip(legs, moved if many else [moved], strict=True):
                if made := self.leg(codes, leg.parts):
                    own.append(made)
        out = [
            plain(t.shape)._replace(legs=tuple(own))
            for t, own in zip(shapes if many else [shapes], legs, strict=True)
        ]
        return out if many else out[0]

    def turn(self, x: Value, neighbours: bool) -> Value:
        """Rotary positions: the two coordinates of a pair are turned by one angle."""
        kept = []
        for leg in x.legs:
            if leg.codes.shape[-1] == x.shape[-1] and len(leg.parts) == 1:
                low, high = pairs(leg.codes, neighbours)
                held = (low >= UNIT) | (high >= UNIT)
                low, high = low[held], high[held]
                # They are the two units of a space, and the same slots of them.
                if bool((low >= UNIT).all()) and bool((high - low == 1 << BITS).all()):
                    first = self.starts[self.space_of(low)] == units_of(low)
                    kept += [leg] if bool(first.all()) else []
        self.vanish(leg for leg in x.legs if not any(leg is k for k in kept))
        return x._replace(legs=tuple(kept))

    def cat(self, values: Sequence[Value], dim: int) -> Value:
        """Units along `dim` stand side by side; those on other axes must be the same."""
        values = [x for x in values if x.shape != (0,)]
        dim %= len(values[0].shape)
        layers = [
            Value(
                tuple(1 if k == dim else n for k, n in enumerate(x.shape)),
                tuple(leg for leg in x.legs if dim not in axes(leg.codes)),
                x.live - {dim},
            )
            for x in values
        ]
        across = self.add(*layers).legs
        found = [*across]
        for whole, part in self.beside(values, dim):
            if made := self.leg(whole, (part,)):
                found.append(made)
        shape = [
            sum(x.shape[dim] for x in values) if k == dim else n
            for k, n in enumerate(values[0].shape)
        ]
        return plain(shape)._replace(legs=tuple(found))

    def beside(self, values: Sequence[Value], dim: int) -> list[tuple[Tensor, Part]]:
        """Codes and powers of what lies along `dim` when these tensors stand side by side.

        Parts of one leg come together again, and so do legs of different spaces.
        """
        found: list[tuple[Tensor, Part]] = []
        for k, x in enumerate(values):
            for leg in x.legs:
                if dim not in axes(leg.codes):
                    continue
                if len(leg.parts) > 1:
                    self.vanish([leg])
                    continue
                blank = torch.zeros((), dtype=torch.long)
                rows = [
                    (leg.codes if j == k else blank).expand(y.shape) for j, y in enumerate(values)
                ]
                codes = torch.cat(rows, dim)
                for j, (other, part) in enumerate(found):
                    same = all(part.get(s, p) == p for s, p in leg.parts[0].items())
                    if same and not overlap(other, codes):
                        found[j] = other + codes, part | leg.parts[0]
                        break
                else:
                    found.append((codes, leg.parts[0]))
        return found

    def product(self, a: Value, b: Value) -> Value:
        """The matrix product: entry by entry, and a sum."""
        a = self.move(a, lambda t: t.unsqueeze(-1))
        b = self.move(b, lambda t: t.unsqueeze(-3))
        return self.total(self.multiply(a, b), [-2], keep=False)

    def normalised(self, x: Value, dims: Sequence[int], centred: bool) -> list[Value]:
        """RMSNorm along some axes, of what is first centred in LayerNorm: and its statistics."""
        mean = [self.total(x, dims)] if centred else []
        x = self.add(x, *mean) if centred else x
        size = self.total(self.multiply(x, x), dims)
        inverse = self.powered(self.scalar(size), None)
        return [self.multiply(x, inverse), *mean, inverse]

    def scalar(self, x: Value) -> Value:
        """Something to which a number is added, such as an epsilon."""
        return self.add(x, Value(()))

    def in_space(self, x: Value, space: int, like: tuple[int, ...], linear: bool) -> Value:
        """What acts on each image alone: its result has another size."""
        image = {*range(len(like) - space, len(like))}
        broken = [leg for leg in x.legs if axes(leg.codes) & image or len(leg.parts) > 1]
        if not linear and (self.law.mixes or self.law.modulus):
            broken = [*x.legs]
        self.vanish(broken)
        return plain(like)._replace(
            legs=tuple(leg for leg in x.legs if not any(leg is b for b in broken))
        )

    def convolution(
        self, x: Value, w: Value, bias: Value | None, transposed: bool, groups: int
    ) -> Value:
        """A matrix product of channels; places in an image are not units."""
        space = range(2, len(x.shape))
        for v in (x, w):
            self.vanish(leg for leg in v.legs if axes(leg.codes).intersection(space))
        x, w = (
            Value(
                (*v.shape[:2], *(1 for _ in space)),
                tuple(leg for leg in v.legs if not axes(leg.codes).intersection(space)),
                v.live - {*space},
            )
            for v in (x, w)
        )
        w = self.move(w, lambda t: t.reshape(groups, t.shape[0] // groups, t.shape[1]))
        x = self.move(x, lambda t: t.reshape(t.shape[0], groups, t.shape[1] // groups, 1))
        w = self.move(w, lambda t: t.mT) if transposed else w
        out = self.move(self.product(w, x), lambda t: t.flatten(1))
        out = self.add(out, bias) if bias else out
        image: Value = self.move(out, lambda t: t.reshape(*t.shape, *(1 for _ in space)))
        return image

    def operator(self, node: Node, env: Mapping[Node, Any]) -> Any:
        """The value, or values, of a node; its arguments are in `env`."""
        args, kwargs = tree_map_only(Node, env.__getitem__, (node.args, dict(node.kwargs)))
        schema = node.target._schema  # type: ignore[union-attr]
        names = [a.name for a in schema.arguments]
        given = {a.name: a.default_value for a in schema.arguments}
        given |= dict(zip(names, args, strict=False)) | kwargs
        name, writes = op_name(node.target), schema.is_mutable
        self.at = name
        values = values_in(given.values())
        out = tree_map_only(Tensor, lambda t: plain(t.shape), node.meta.get("val"))
        if any(x.legs for x in values):
            found = None if writes else self.rule(name, given, out)
            if found is None:
                for x in values:
                    self.vanish(x.legs)
            else:
                out = found
        elif name in SAME and values and "dtype" not in kwargs:
            out = out._replace(known=values[0].known)
        elif name == "expand":
            x = values[0]
            out = out._replace(live=frozenset(k + len(out.shape) - len(x.shape) for k in x.live))
        elif torch.Tag.pointwise in node.target.tags and isinstance(out, Value):  # type: ignore[union-attr]
            out = self.met(values, ()) if values else out
        elif name in ("sum", "mean"):
            out = out if out.shape == () else self.rule(name, given, out)
        return out

    def rule(self, name: str, given: dict[str, Any], out: Any) -> Any:
        """The value that an operator makes, or None if it is not understood."""
        x: Any = given.get("self")
        other: Any = given.get("other")
        if name in ("roll", "flip"):
            moved = {d % len(x.shape) for d in given["dims"]} or {*range(len(x.shape))}
            if any(axes(leg.codes) & moved for leg in x.legs):
                return None  # copies of units might come in another order for some
        if name in MOVES and "dtype" not in given:
            rest = [v for k, v in given.items() if k != "self"]
            if name in ("view", "_unsafe_view"):
                rest = [out.shape]
            elif name == "squeeze":
                rest = [r for r in rest if r is not None]
            elif name == "expand":
                rest = [out.shape]
            return self.move(x, lambda t: MOVES[name](t, *rest))
        if name == "index" and all(i is None or isinstance(i, Value) for i in given["indices"]):
            return self.chosen(x, given["indices"])
        if name in SAME:
            dtype = given.get("dtype")
            return None if dtype is not None and not dtype.is_floating_point else x
        if name == "neg" or (name in ("mul", "div") and not isinstance(other, Value)):
            return None if given.get("rounding_mode") else x
        if name in ("add", "sub"):
            if isinstance(other, Value):
                return self.add(x, other)
            return x if other == 0 else self.scalar(x)
        if name == "mul":
            return self.multiply(x, other)
        if name == "div" and not given.get("rounding_mode"):
            return self.multiply(x, self.powered(other, -1) if other.legs else other)
        if name in ("pow", "square"):
            power = given.get("exponent", 2)
            if power == 2:
                return self.multiply(x, x)
            return (
                self.to_the(x, power)
                if isinstance(x, Value) and isinstance(power, int | float)
                else None
            )
        if name in ("clamp_min", "clamp", "threshold"):
            low, high = (
                given.get("min", given.get("threshold")),
                given.get("max", given.get("value")),
            )
            ends = (None, 0) if name == "threshold" else (None,)
            return self.powered(x, self.slope(1)) if low == 0 and high in ends else None
        if name == "hardtanh":
            odd = given["min_val"] == -given["max_val"]
            return self.powered(x, 1 if odd and self.law.modulus else None)
        if name in ("gt", "lt", "ge", "le") and not isinstance(other, Value) and other == 0:
            return self.powered(x, self.slope(0))
        if name in SLOPES or name in PARITIES:
            return self.powered(x, self.slope(SLOPES.get(name), PARITIES.get(name)))
        if name == "_prelu_kernel":
            self.vanish(given["weight"].legs)
            return self.powered(x, self.slope(1))
        if name == "where" and not self.law.mixes and isinstance(other, Value):
            self.vanish(given["condition"].legs)
            chosen = self.add(x, other)
            return self.met([given["condition"], chosen], chosen.legs)
        if name in ("sum", "mean"):
            dims = given.get("dim") or range(len(x.shape))
            return self.total(x, dims, bool(given.get("keepdim")))
        if name == "linalg_vector_norm" and given["ord"] == 2:
            dims = given["dim"] or range(len(x.shape))
            square = self.total(self.multiply(x, x), dims, given["keepdim"])
            return self.powered(square, self.slope(Fraction(1, 2)))
        if name == "cumsum":
            dim = given["dim"] % len(x.shape)
            return None if any(dim in axes(leg.codes) for leg in x.legs) else x
        if name in ("cat", "stack"):
            tensors = given["tensors"]
            if name == "stack":
                tensors = [self.move(t, lambda u: u.unsqueeze(given["dim"])) for t in tensors]
            return self.cat(tensors, given["dim"])
        return self.contraction(name, given) or self.layer(name, given, out)

    def chosen(self, x: Value, indices: Sequence[Value | None]) -> Value | None:
        """Look-ups along axes without units; or along one, by indices in order that are known."""
        at = [k for k, i in enumerate(indices) if i is not None]
        if not any(axes(leg.codes).intersection(at) for leg in x.legs):
            anywhere = [i and torch.zeros(i.shape, dtype=torch.long) for i in indices]
            found: Value = self.move(x, lambda t: looked_up(t, anywhere))
            return found
        index = indices[at[0]].known if len(at) == 1 else None  # type: ignore[union-attr]
        if index is None or index.dtype != torch.int64 or index.dim() != 1:
            return None
        index = index % x.shape[at[0]]
        if bool((index.diff() < 0).any()):
            return None  # copies of units might come in another order for some
        out: Value = self.move(x, lambda t: t.index_select(at[0], index.to(t.device)))
        return out

    def slope(
        self, scale: Fraction | int | None, parity: int | None = None
    ) -> Fraction | int | None:
        """The power of scales, or that of signs."""
        return parity if self.law.modulus else scale

    def to_the(self, x: Value, power: float) -> Value:
        """Powers of tensors, with numbers as exponents."""
        exact = Fraction(power)
        parity = int(power) % 2 if exact.denominator == 1 else None
        return self.powered(x, self.slope(exact if exact.denominator < 9 else None, parity))

    def contraction(self, name: str, given: dict[str, Any]) -> Value | None:
        """Matrix products."""
        x: Any = given.get("self")
        if name in ("mm", "bmm"):
            return self.product(x, given["mat2"])
        if name in ("addmm", "baddbmm"):
            a, b = (
                given[k] for k in (("mat1", "mat2") if name == "addmm" else ("batch1", "batch2"))
            )
            return self.add(x, self.product(a, b)) if given["beta"] else None
        if name == "mv":
            y = self.move(given["vec"], lambda t: t.unsqueeze(-1))
            vector: Value = self.move(self.product(x, y), lambda t: t.squeeze(-1))
            return vector
        return None

    def layer(self, name: str, given: dict[str, Any], out: Any) -> Any:
        """Operators that are layers of networks."""
        x: Any = given.get("input", given.get("self"))
        weight: Any = given.get("weight")
        bias: Any = given.get("bias")
        if name == "convolution":
            found = self.convolution(x, weight, bias, given["transposed"], given["groups"])
            return plain(out.shape)._replace(legs=found.legs)
        if name == "embedding":
            self.vanish(leg for leg in weight.legs if 0 in axes(leg.codes))
            kept = [leg for leg in weight.legs if 0 not in axes(leg.codes)]
            legs = [leg._replace(codes=padded(leg.codes[0], len(out.shape))) for leg in kept]
            return plain(out.shape)._replace(legs=tuple(legs))
        if name in ("native_layer_norm", "_fused_rms_norm"):
            dims = range(-len(given["normalized_shape"]), 0)
            y, *statistics = self.normalised(x, dims, centred=name == "native_layer_norm")
            y = self.multiply(y, weight) if weight else y
            y = self.add(y, bias) if bias else y
            legs = [v.legs for v in (y, *statistics)]
            return [plain(o.shape)._replace(legs=own) for o, own in zip(out, legs, strict=True)]
        if name == "native_batch_norm":
            channels = [given.get(k) for k in ("running_mean", "running_var")]
            if given.get("training") or not all(channels):
                return None
            mean, var, weight, bias = (
                v and self.move(v, lambda t: t.view(-1, *[1] * (len(x.shape) - 2)))
                for v in (*channels, weight, bias)
            )
            # Statistics may be computed anew, and then follow what is normalised.
            self.vanish(leg for v in (x, mean, var) for leg in v.legs)
            y = plain(x.shape)
            y = self.multiply(y, weight) if weight else y
            y = self.add(y, bias) if bias else y
            return [
                plain(o.shape)._replace(legs=y.legs) if k == 0 else o for k, o in enumerate(out)
            ]
        if name in POOLS:
            return self.in_space(x, POOLS[name], out.shape, linear=True)
        if name in MAX_POOLS:
            return [self.in_space(x, MAX_POOLS[name], out[0].shape, linear=False), out[1]]
        return None


def looked_up(t: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """The entries of t at indices along some axes, whole along the others."""
    return t[tuple(slice(None) if i is None else i.to(t.device) for i in indices)]


def clusters(legs: Sequence[tuple[int, Leg]]) -> list[list[tuple[int, Leg]]]:
    """Legs of several tensors, each with its tensor's number: those that meet are together."""
    home = [*range(len(legs))]
    for (i, (k, f)), (j, (m, g)) in combinations(enumerate(legs), 2):
        if k != m and home[i] != home[j] and overlap(f.codes, g.codes):
            home = [home[i] if h == home[j] else h for h in home]
    return [[legs[i] for i, h in enumerate(home) if h == own] for own in dict.fromkeys(home)]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether units of both stand at one place anywhere, on axes that both have."""
    return bool(axes(a) & axes(b)) and bool(((a >= UNIT) & (b >= UNIT)).any())


def plus(a: Powers, b: Powers, times: Fraction | int = 1) -> Powers:
    """a + times · b."""
    out = dict(a)
    for k, c in b.items():
        out[k] = out.get(k, Fraction(0)) + times * c
    return out


# Solutions


def solutions(rows: Iterable[Powers], sites: Sequence[int], modulus: int) -> list[dict[int, int]]:
    """A basis of the whole-number solutions of these equations: powers by site, without zeros.

    modulus: 2 for powers that count modulo 2. In each of the solutions the first power is positive.
    """
    reduced = echelon(rows, sites, modulus)
    basis = []
    for free in (k for k in sites if k not in reduced):
        found = {free: Fraction(1)} | {k: -row[free] for k, row in reduced.items() if row.get(free)}
        if modulus:
            basis.append({k: 1 for k in sites if found.get(k, 0) % 2})
            continue
        scale = lcm(*(c.denominator for c in found.values()))
        first = next(found[k] for k in sites if k in found)
        scale = scale if first > 0 else -scale
        basis.append({k: int(found[k] * scale) for k in sites if k in found})
    return basis


def echelon(rows: Iterable[Powers], sites: Sequence[int], modulus: int) -> dict[int, Powers]:
    """The reduced echelon form of equations: for each leading site its row, which has 1 there."""
    reduced: dict[int, Powers] = {}

    def clean(row: Powers) -> Powers:
        if modulus and any(c.denominator > 1 for c in row.values()):
            raise AssertionError("half a sign")
        return {
            k: c % modulus if modulus else c
            for k, c in row.items()
            if (c % modulus if modulus else c)
        }

    for given in rows:
        row = clean(given)
        for lead, other in reduced.items():
            if lead in row:
                row = clean(plus(row, other, -row[lead]))
        if not row:
            continue
        lead = next(k for k in sites if k in row)
        row = clean({k: c / row[lead] for k, c in row.items()})
        for k, other in reduced.items():
            if lead in other:
                reduced[k] = clean(plus(other, row, -other[lead]))
        reduced[lead] = row
    return reduced
