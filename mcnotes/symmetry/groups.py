"""Sort the units of a network into groups of interchangeable ones (chapter 3).

`discover` traces the network twice. In the first trace each unit is one of its own; in the second,
whole groups that act on the same axes stand for units, so that blocks of units, such as attention
heads, are found to be interchangeable as well. Where blocks share other units, as query heads share
keys and values, a third trace holds what is shared, and finds which blocks may change places then.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.utils._pytree import tree_map_only

from mcnotes import display
from mcnotes.calls import Inputs, arranged, doubled
from mcnotes.symmetry import foreign
from mcnotes.symmetry.execute import inference_copy, outputs, unfused_attention
from mcnotes.symmetry.rules import MOVING, PASSING, RULES
from mcnotes.symmetry.trace import Trace
from mcnotes.symmetry.units import (
    BITS,
    SLOT,
    Labelled,
    SymmetryError,
    Tap,
    axes,
    labelled_in,
    units_in,
    units_of,
)

Integers = NDArray[np.int64]
Factor = tuple[str, Tensor]  # of a parameter or buffer, by name

NO_OTHER = "no other unit acts at the same places"


@dataclass(frozen=True, eq=False)
class Place:
    """Unit u stands at `index[u]` [units, slots] along `axes`, taken as one, of a tensor."""

    name: str  # of a parameter or buffer; of an activation: "relu:3/9", third of nine relus
    axes: tuple[int, ...]
    index: Integers

    @property
    def axis(self) -> int:
        """The first of the axes."""
        return self.axes[0]

    def of(self, theta: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself, the axes made one. Raises ValueError if it does not fit."""
        t, last = theta.get(self.name), self.axes[-1]
        if t is None:
            raise ValueError(f"permute: the parameters lack {self.name!r}")
        if t.shape[self.axis : last + 1].numel() <= self.index.max():
            raise ValueError(
                f"permute: {self.name!r} has shape {tuple(t.shape)}; this symmetry moves "
                f"{self.index.max() + 1} positions of axis {self.axis}: is it of another network?"
            )
        return t.flatten(self.axis, last)

    def samples(self, x: Tensor) -> Tensor:
        """[samples, units] of an activation; a view where the units are its last axis in memory."""
        x = x.movedim(self.axes, tuple(range(-len(self.axes), 0))).flatten(-len(self.axes))
        order = torch.from_numpy(self.index.T.ravel())
        if not torch.equal(order, torch.arange(x.shape[-1])):
            x = x.index_select(-1, order.to(x.device))
        return x.reshape(-1, len(self.index))


@dataclass(frozen=True, eq=False)
class Group:
    """`size` interchangeable units. If they are blocks: `inner` names the groups within each.

    post, pre: activations, after and before the nonlinearity.
    """

    size: int
    places: tuple[Place, ...]
    post: tuple[Place, ...] = ()
    pre: tuple[Place, ...] = ()
    inner: tuple[tuple[str, ...], ...] = ()

    def __repr__(self) -> str:
        kind = f"blocks of {len(self.inner[0])} groups" if self.inner and self.inner[0] else "units"
        where = ", ".join(f"{p.name}[{p.axis}]" for p in self.places)
        return f"Group({self.size} {kind} at {where})"

    def _repr_html_(self) -> str:
        rows = [
            {"acts on": p.name, "axis": p.axis, "entries of a unit": p.index.shape[1]}
            for p in self.places
        ]
        return display.described(self, display.table(rows))


@dataclass(frozen=True)
class Pinned:
    """`count` entries along an axis of a parameter that stay where they are, and why."""

    name: str
    axis: int
    count: int
    why: str


def discover(
    net: nn.Module, inputs: Inputs, train: bool
) -> tuple[dict[str, Group], tuple[Pinned, ...]]:
    """The groups of `net` by name, and what stays; see `symmetry.find`."""
    run = partial(run_trace, net, inputs, train)
    trace, factors = run()
    classes = classify(trace, factors)
    found = groups_of(trace, classes, factors)
    groups = dict(zip(group_names(found), found, strict=True))
    moved = classes.group_of_unit >= 0
    blocks, home = dict[str, Group](), np.full(len(moved), -1)
    shared = shared_units(trace, classes)
    twins, alone = same_kind(found), lone_blocks(trace, moved)
    if twins or alone:
        merged = merge_groups(classes, twins, alone)
        outer_trace, outer_factors = run(merged)
        outer = classify(outer_trace, outer_factors)
        unit = units_of(merged).numpy()
        home = outer.place_of_unit[unit]
        for k in np.flatnonzero(shared_units(outer_trace, outer)):
            if len(twins) + 2 <= k < len(twins) + len(alone) + 2:
                shared[alone[k - len(twins) - 2]] = True
        members = names_in_blocks(outer, [[*groups][k] for k in twins])
        made = groups_of(outer_trace, outer, outer_factors)
        for block, inner in zip(made, members, strict=True):
            blocks[block_name(block, inner, groups | blocks)] = replace(block, inner=inner)
    heads = sharing_blocks(trace, shared, home)
    if heads:
        merged = hold_shared(classes, heads, shared)
        last_trace, last_factors = run(merged)
        last = of_blocks(classify(last_trace, last_factors), len(heads))
        found = groups_of(trace, classes, factors, activations_of(last_trace, last))
        groups = dict(zip(groups, found, strict=True))
        made = groups_of(last_trace, last, last_factors, activations_of(trace, classes))
        unit = units_of(merged).numpy()
        unit[:2] = 0  # these are none
        homes = [np.unique(home[np.isin(last.of[unit], g)]) for g in last.groups]
        names = [f"{name}[*]" for name in group_names(made)]
        made = [replace(g, inner=((),) * g.size) for g in made]
        within = dict(zip(names, zip(made, homes, strict=True), strict=True))
        blocks = with_heads(groups, blocks, within)
        kept = [k for k, name in enumerate(names) if name in blocks]
        moved |= np.isin(last.group_of_unit[unit], kept)
    moved |= home >= 0
    return groups | blocks, what_stays(classes, factors, moved)


# The run


def run_trace(
    net: nn.Module, inputs: Inputs, train: bool, merged: Tensor | None = None
) -> tuple[Trace, list[Factor]]:
    """Run the network on labelled tensors: the trace, and every factor of its parameters.

    merged: see `Trace`. What reaches the outputs is pinned, and so are parameters of which the run
    does not use all: nothing is known of the rest.
    """
    net = inference_copy(net, train)
    modules = {id(m): f"{n or 'the network'} ({type(m).__name__})" for n, m in net.named_modules()}
    inputs = arranged(net, inputs)
    kept = set(map(id, net.state_dict(keep_vars=True).values()))
    constants = {id(b) for b in net.buffers()} - kept
    trace = Trace(RULES, MOVING, PASSING, modules, constants, merged)
    theta = labelled_parameters(net, trace)
    given = tree_map_only(Tensor, partial(labelled_input, trace), doubled(inputs))
    # PyTorch makes writing in place a chain of new tensors.
    run = dispatch_functionalize(partial(outputs, net), FunctionalTensorMode())
    with unfused_attention, torch.no_grad():
        try:
            with trace, foreign.Escapes(trace.where):
                ends = run(theta, given)
        except SymmetryError:
            raise
        except Exception as error:
            alone = partial(outputs, inference_copy(net, train), {}, inputs)
            raise foreign.explained(error, modules, alone) from error
    if not labelled_in(ends):
        raise SymmetryError(
            "find: the outputs depend neither on the inputs nor on the parameters, as far as they "
            "can be followed. Fix: return tensors that the network computes."
        )
    trace.use(labelled_in(ends), "the output")
    for x in labelled_in(ends):
        trace.pin_all(x, "reaches the output")
    for x in theta.values():
        if not x.used:
            trace.pin_all(x, "is not used in this mode")
    return trace, [(n, f) for n, x in theta.items() for f in x.factors]


def labelled_parameters(net: nn.Module, trace: Trace) -> dict[str, Labelled]:
    """Parameters and buffers by name; tied ones are one. Of integers the values are known."""
    state = net.state_dict(keep_vars=True)
    convs = (m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd))
    conv_groups = {id(m.weight): m.groups for m in convs}
    labelled: dict[int, Labelled] = {}
    for t in state.values():  # an extra state may be anything
        if not isinstance(t, Tensor) or id(t) in labelled:
            continue
        whole = not (t.is_floating_point() or t.is_complex())
        if not whole or t.numel() > 1:
            labelled[id(t)] = x = trace.parameter(t, conv_groups.get(id(t), 1))
            x.value, x.stored = (t.detach().cpu(), True) if whole else (None, False)
    return {n: labelled[id(t)] for n, t in state.items() if id(t) in labelled}


def labelled_input(trace: Trace, x: Tensor) -> Labelled:
    """An input; that entries are repeated is a peculiarity of the example."""
    labelled = Labelled(trace, x.contiguous() if 0 in x.stride() else x, (), [Tap()])
    labelled.given = True
    return labelled


# Units in classes, and classes in groups


class Classes(NamedTuple):
    """The units of a trace in classes that move as one, and groups of interchangeable classes."""

    of: Integers  # [units]: the class of each unit
    rank: Integers  # [units]: its number within the class
    why: dict[int, str]  # the reason for each class that is pinned
    groups: list[list[int]]  # the classes of each group
    group: Integers  # [classes]: its group; -1: none, it stays
    number: Integers  # [classes]: its number within the group

    @property
    def group_of_unit(self) -> Integers:
        """[units]: the group of each; -1: none."""
        return self.group[self.of]

    @property
    def place_of_unit(self) -> Integers:
        """[units]: the group of each and the number within it, as one; -1: none."""
        return np.where(self.group < 0, -1, self.group << BITS | self.number)[self.of]


class Facts(NamedTuple):
    """What was recorded, each [facts]: at a slot of a unit there stands another code."""

    event: Integers
    unit: Integers
    slot: Integers
    other: Integers  # a unit tied to it; or below 2: none
    other_slot: Integers
    tag: Integers


def classify(trace: Trace, factors: Iterable[Factor]) -> Classes:
    """Sort units into classes, and classes into groups; factors: of the parameters.

    Units are in one class if facts tie them. Classes are in one group if the same facts hold of
    their units, one by one, and none is pinned.
    """
    facts = read_facts(trace)
    count = max(trace.unit_count, int(facts.unit.max(initial=0)) + 1)
    of = tied_units(facts, count)
    rank = rank_within(of)
    why: dict[int, str] = {}
    for units, reason in [*trace.pins, *unseen(trace, of, factors)]:
        for c in np.unique(of[units.numpy()]).tolist():
            why.setdefault(c, reason)
    return grouped(of, rank, why, alike(facts, of, rank, why))


def grouped(of: Integers, rank: Integers, why: dict[int, str], groups: list[list[int]]) -> Classes:
    """Classes of units with these groups."""
    group, number = np.full((2, len(of)), -1)
    for g, classes in enumerate(groups):
        group[classes], number[classes] = g, np.arange(len(classes))
    return Classes(of, rank, why, groups, group, number)


def read_facts(trace: Trace) -> Facts:
    """The facts of a trace, in the order of events."""
    none = torch.empty(4, 0, dtype=torch.int64)
    event, code, other, tag = torch.cat([none, *trace.facts], 1).numpy()
    return Facts(event, code >> BITS, code & SLOT, other >> BITS, other & SLOT, tag)


def tied_units(facts: Facts, count: int) -> Integers:
    """The class of each of `count` units: those that are tied, also through others, are in one."""
    tied = facts.other > 1
    edges = (facts.unit[tied], facts.other[tied])
    graph = coo_matrix((np.ones(tied.sum()), edges), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def unseen(trace: Trace, of: Integers, factors: Iterable[Factor]) -> Iterator[tuple[Tensor, str]]:
    """The units of each axis of a parameter of which the run has left out some, and why they stay.

    An input of another size may reach the others, as rows of a table of positions, and nothing is
    known of what they will meet. of [units]: their classes, of which each is seen as a whole.
    """
    seen = np.zeros(len(of), bool)
    for units in trace.seen:
        seen[of[units.numpy()]] = True
    for _, f in factors:
        if not seen[of[units_in(f).numpy()]].all():
            yield units_in(f), "is not used as a whole by this input"


def rank_within(of: Integers) -> Integers:
    """The number of each unit among those of its class."""
    order = np.argsort(of, kind="stable")
    rank = np.zeros(len(of), np.int64)
    rank[order] = np.arange(len(of)) - np.searchsorted(of[order], of[order])
    return rank


def alike(facts: Facts, of: Integers, rank: Integers, pinned: Mapping[int, str]) -> list[list[int]]:
    """Sets of two or more classes of which the same facts hold.

    Facts call units by their ranks, so that equal rows of numbers are equal facts.
    """
    order = np.argsort(of[facts.unit], kind="stable")  # by class, then by event
    other = np.where(facts.other > 1, rank[facts.other], facts.other - 2)
    columns = (
        facts.event << BITS | rank[facts.unit],
        facts.slot << BITS | facts.other_slot,
        other << BITS | facts.tag,
    )
    table = np.stack([column[order] for column in columns], axis=1)
    homes, starts = np.unique(of[facts.unit][order], return_index=True)
    same: dict[bytes, list[int]] = {}
    for c, rows in zip(homes.tolist(), np.split(table, starts)[1:], strict=True):
        if c not in pinned:
            same.setdefault(rows.tobytes(), []).append(c)
    return [classes for classes in same.values() if len(classes) > 1]


# Where groups act


def groups_of(
    trace: Trace, classes: Classes, factors: Iterable[Factor], avoid: Collection[str] = ()
) -> list[Group]:
    """The groups, with their places in the factors of the parameters, and their taps.

    avoid: activations at which they are read only if they are seen nowhere else.
    """
    acts: list[dict[tuple[str, tuple[int, ...]], Place]] = [{} for _ in classes.groups]
    for name, f in factors:
        for g, place, _ in places_in(name, f, classes):
            acts[g].setdefault((name, place.axes), place)
    post = tapped(trace, classes, trace.contracted, avoid)
    pre = tapped(trace, classes, before(trace.contracted), avoid)
    sizes = map(len, classes.groups)
    return [
        Group(size, tuple(at.values()), after, before)
        for size, at, after, before in zip(sizes, acts, post, pre, strict=True)
    ]


def before(taps: Iterable[Tap]) -> Iterable[Tap]:
    """What entered the nonlinearities of these."""
    return dict.fromkeys(t.pre or t for t in taps)


def activations_of(trace: Trace, classes: Classes) -> set[str]:
    """The names of all activations at which a group is seen."""
    return {
        name
        for taps in (trace.contracted, before(trace.contracted))
        for name, tap in named(trace, taps)
        for f in tap.factors
        if (classes.group_of_unit[units_in(f).numpy()] >= 0).any()
    }


def named(trace: Trace, taps: Iterable[Tap]) -> Iterator[tuple[str, Tap]]:
    """Taps that have names, with these as `Place` has them."""
    for tap in taps:
        if tap.name:
            yield f"{tap.name}/{trace.count[tap.name.split(':')[0]]}", tap


def tapped(
    trace: Trace, classes: Classes, taps: Iterable[Tap], avoid: Collection[str]
) -> list[tuple[Place, ...]]:
    """The places of each group in activations."""
    found: list[list[tuple[Place, bool]]] = [[] for _ in classes.groups]
    # What is made of parameters alone shows a group that nothing else shows, and by itself: in
    # weights between two groups, the samples of one are units of the other.
    for name, tap in named(trace, sorted(taps, key=lambda t: not t.given)):
        held = [p for f in tap.factors for p in places_in(name, f, classes)]
        shown = [g for g, _, _ in held]
        for g, place, alone in held:
            if tap.given or (not found[g] and len({*shown}) == 1):
                found[g].append((place, alone))
    found = [[p for p in seen if p[0].name not in avoid] or seen for seen in found]
    # A group is seen by itself; if nowhere, then at the first place among others.
    return [
        tuple([place for place, alone in seen if alone] or [place for place, _ in seen[:1]])
        for seen in found
    ]


def places_in(name: str, f: Tensor, classes: Classes) -> Iterator[tuple[int, Place, bool]]:
    """Each group that stands in a factor of the tensor `name`, where, and whether it is alone."""
    codes = f.flatten().numpy()
    unit, slot = codes >> BITS, codes & SLOT
    home = classes.of[unit]
    group = np.where(unit > 1, classes.group[home], -1)
    order = np.lexsort((slot, classes.rank[unit], classes.number[home], group))
    for at in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        g = int(group[at[0]])
        if g >= 0 and len(at) % len(classes.groups[g]) == 0:
            index = at.reshape(len(classes.groups[g]), -1)
            yield g, Place(name, tuple(sorted(axes(f))), index), len(at) == len(unit)


def group_names(groups: Iterable[Group]) -> list[str]:
    """Names of the parameters that make the units, numbered where several groups have one."""
    bases = []
    for g in groups:
        makes = next((p for p in g.places if p.axis == 0), g.places[0])
        bases.append(makes.name.removesuffix(".weight"))
    total, count, names = Counter(bases), Counter[str](), []
    for base in bases:
        names.append(f"{base}[{count[base]}]" if total[base] > 1 else base)
        count[base] += 1
    return names


# Groups as units of a second trace


def same_kind(groups: Iterable[Group]) -> list[int]:
    """The numbers of the groups that act on the same axes as another group does."""
    kinds = [tuple((p.name, p.axes) for p in g.places) for g in groups]
    count = Counter(kinds)
    return [k for k, kind in enumerate(kinds) if count[kind] > 1]


def lone_blocks(trace: Trace, taken: NDArray[np.bool_]) -> list[Integers]:
    """Sets of units, none of them taken [units], that may be interchangeable as a whole."""
    taken, found = taken.copy(), list[Integers]()
    for units, places in ((u.numpy(), p.numpy()) for u, p in trace.blocks):
        if not taken[units].any():  # those that share a unit are one
            size = (trace.unit_count, int(places.max()) + 1)
            of = tied_pairs(units, places, size)
            blocks = [np.unique(units[of == k]) for k in np.unique(of)]
            if len(blocks) > 1:
                taken[units] = True
                found += blocks
    return found


def tied_pairs(a: Integers, b: Integers, size: tuple[int, int]) -> Integers:
    """[pairs]: the set of each pair `a[k], b[k]` where all that share a number are one set."""
    shape = (sum(size), sum(size))
    graph = coo_matrix((np.ones(len(a)), (a, b + size[0])), shape)
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)[a]


def merge_groups(classes: Classes, twins: Sequence[int], alone: Sequence[Integers]) -> Tensor:
    """[units]: the code that stands for each unit when these groups are units, 2 and following.

    Units of these groups become their slots; so do those of blocks that stand `alone`. Those of
    other groups become fixed, and those without a group stay units.
    """
    group, members = classes.group_of_unit, np.bincount(classes.of)[classes.of]
    number = np.zeros(len(classes.groups) + 1, np.int64)  # the last one, -1: without a group
    number[twins] = np.arange(len(twins)) + 2
    own = np.arange(len(group)) + len(twins) + len(alone)  # the first two units are none
    unit = np.where(group >= 0, number[group], own)
    slot = np.where(group >= 0, classes.number[classes.of] * members + classes.rank, 0)
    for k, units in enumerate(alone):
        unit[units], slot[units] = len(twins) + 2 + k, np.arange(len(units))
    return torch.from_numpy(unit << BITS | slot)


def names_in_blocks(outer: Classes, names: Sequence[str]) -> list[tuple[tuple[str, ...], ...]]:
    """For each group of blocks the groups within each block; names: of units 2 and following."""
    held: dict[int, list[str]] = {}
    for c, name in zip(outer.of[2 : len(names) + 2].tolist(), names, strict=True):
        held.setdefault(c, []).append(name)
    return [tuple(tuple(held.get(c, ())) for c in blocks) for blocks in outer.groups]


def block_name(group: Group, inner: Sequence[Sequence[str]], taken: Mapping[str, Group]) -> str:
    """`qkv[*]` for blocks that hold `qkv[0]`, `qkv[1]` …; another star if this name is taken."""
    name = inner[0][0].rsplit("[", 1)[0] if inner[0] else group.places[0].name
    while (name := f"{name}[*]") in taken:
        pass
    return name


# Blocks that share units


def sharing_blocks(trace: Trace, shared: NDArray[np.bool_], home: Integers) -> list[Integers]:
    """Sets of units, as of a query head, where others are shared.

    shared [units]: whether each is; home [units]: in which block it is, -1: in none. A set that is
    alone in its block is left out: it is known to be interchangeable.
    """
    found = lone_blocks(trace, shared) if shared.any() else []
    count = Counter(int(home[units[0]]) for units in found)
    return [u for u in found if home[u[0]] < 0 or count[int(home[u[0]])] > 1]


def shared_units(trace: Trace, classes: Classes) -> NDArray[np.bool_]:
    """[units]: which of them meet several units of one tensor, as keys meet several queries.

    Of each class some tensor holds few units alone, and another one holds more of them.
    """
    fewest = np.full(len(classes.of), np.iinfo(np.int64).max)
    for units in (u.numpy() for u in trace.read):
        _, which, count = np.unique(classes.of[units], return_inverse=True, return_counts=True)
        fewest[units] = np.minimum(fewest[units], count[which])
    seen = fewest < np.iinfo(np.int64).max
    most = np.zeros(len(classes.of), np.int64)
    np.maximum.at(most, classes.of[seen], fewest[seen])
    return fewest < most[classes.of]


def hold_shared(classes: Classes, heads: Sequence[Integers], shared: NDArray[np.bool_]) -> Tensor:
    """[units]: the code of each when these sets are units, 2 and following.

    What they share is fixed, and so are other groups; units that stand beside what is shared, as
    the columns that read the heads' results, are units.
    """
    beside = np.zeros(len(classes.group), bool)
    beside[classes.of[shared]] = True
    loose = classes._replace(group=np.where(beside, -1, classes.group))
    codes = merge_groups(loose, [], heads)
    codes[torch.from_numpy(shared)] = 0
    return codes


def of_blocks(classes: Classes, count: int) -> Classes:
    """Without the groups that hold others than the units 2 and following, `count` of them."""
    blocks = {*classes.of[2 : count + 2].tolist()}
    groups = [g for g in classes.groups if blocks.issuperset(g)]
    return grouped(classes.of, classes.rank, classes.why, groups)


def with_heads(
    groups: Mapping[str, Group],
    blocks: Mapping[str, Group],
    heads: Mapping[str, tuple[Group, Integers]],
) -> dict[str, Group]:
    """The blocks, and those `heads` that go together with the other groups, in blocks or alone.

    heads: by name, with the blocks (see `Classes.place_of_unit`) in which their units are.
    """
    acting: dict[str, list[Place]] = {}
    for place in (p for g in groups.values() for p in g.places):
        acting.setdefault(place.name, []).append(place)
    at: dict[int, list[str]] = {}
    for name, (head, home) in heads.items():
        free = all(commute(p, q) for p in head.places for q in acting.get(p.name, []))
        if free and len(home) == 1 and name not in groups and name not in blocks:
            at.setdefault(int(home[0]), []).append(name)
    within, around = {name: heads[name][0] for name in at.get(-1, [])}, {**blocks}
    for k, (name, block) in enumerate(blocks.items()):
        inside = [at.get(k << BITS | i, []) for i in range(block.size)]
        rows = [[heads[name][0] for name in names] for names in inside]
        if rows[0] and all(carries(block, i, rows[0], row) for i, row in enumerate(rows)):
            within |= {name: heads[name][0] for names in inside for name in names}
            inner = zip(block.inner, inside, strict=True)
            around[name] = replace(block, inner=tuple((*own, *names) for own, names in inner))
    return within | around  # those within blocks act first


def carries(block: Group, k: int, first: Sequence[Group], others: Sequence[Group]) -> bool:
    """Whether the groups in the first block become those in block k, unit by unit."""
    goes = {
        (p.name, p.axes): dict(zip(p.index[0].tolist(), p.index[k].tolist(), strict=True))
        for p in block.places
    }
    brought = []
    for p in (p for g in first for p in g.places):
        to = goes.get((p.name, p.axes), {})
        brought.append((p.name, p.axes, [[to.get(i) for i in unit] for unit in p.index.tolist()]))
    return brought == [(p.name, p.axes, p.index.tolist()) for g in others for p in g.places]


def commute(p: Place, q: Place) -> bool:
    """Whether two groups that act on one tensor may act there in any order."""
    if p.axes != q.axes:
        return not {*p.axes} & {*q.axes}
    size = 1 + max(p.index.max(), q.index.max())
    return all(np.array_equal(x[y], y[x]) for x in generators(p, size) for y in generators(q, size))


def generators(at: Place, size: int) -> list[Integers]:
    """Orders of `size` positions of which all permutations of the units there are made."""
    swap, cycle = np.arange(len(at.index)), np.arange(len(at.index))
    swap[:2] = 1, 0
    found = []
    for p in (swap, np.roll(cycle, 1)):
        order = np.arange(size)
        order[at.index] = at.index[p]
        found.append(order)
    return found


# What is in no group


def what_stays(
    classes: Classes, factors: Iterable[Factor], moved: NDArray[np.bool_]
) -> tuple[Pinned, ...]:
    """How many entries of each axis of each parameter stay, and why; moved [units]: which move."""
    reasons = [NO_OTHER, *dict.fromkeys(classes.why.values())]
    number = {why: k for k, why in enumerate(reasons)}
    reason = np.zeros(len(classes.group), np.int64)
    for c, why in classes.why.items():
        reason[c] = number[why]
    stays = Counter[tuple[str, int, str]]()
    for name, f in factors:
        unit = units_in(f).numpy()
        stay = classes.of[unit[~moved[unit]]]
        for k, n in zip(*np.unique(reason[stay], return_counts=True), strict=True):
            stays[name, max(axes(f)), reasons[k]] += int(n)
    return tuple(Pinned(name, axis, n, why) for (name, axis, why), n in stays.items())
