"""Sort the units of a network into groups of interchangeable ones (chapter 3)."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.func import functionalize
from torch.utils._pytree import tree_map_only

from mcnotes import display
from mcnotes.calls import Inputs, call, tensors
from mcnotes.symmetry.rules import PASSING, RULES
from mcnotes.symmetry.trace import Walk
from mcnotes.symmetry.units import SLOT, UNIT, Marked, Tap, axes

USERS, LOCK, UNDO = list[None](), Lock(), ExitStack()


@dataclass(frozen=True, eq=False)
class Place:
    """Unit u stands at `index[u]` [units, slots] along `axes`, taken as one, of a tensor."""

    name: str  # of a parameter or buffer; of an activation: "relu:3/9", third of nine relus
    axes: tuple[int, ...]
    index: np.ndarray

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
        rows = ({"acts on": p.name, "axis": p.axis, "entries of a unit": p.index.shape[1]}
                for p in self.places)  # fmt: skip
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
    walk, first = trace(net, inputs, train)
    classes = Classes(walk)
    found = classes.found(first)
    bases = [next((p for p in g.places if p.axis == 0), g.places[0]).name for g in found]
    bases = [base.removesuffix(".weight") for base in bases]
    times, seen, names = Counter(bases), Counter[str](), []
    for base in bases:
        names.append(f"{base}[{seen[base]}]" if times[base] > 1 else base)
        seen[base] += 1
    groups = dict(zip(names, found, strict=True))
    group = classes.group[classes.of]
    moved = group >= 0
    # Groups that act on the same axes may be exchangeable as wholes: walk again, each as one unit.
    kinds = [tuple((p.name, p.axes) for p in g.places) for g in found]
    alike = Counter(kinds)
    if twins := [k for k, kind in enumerate(kinds) if alike[kind] > 1]:
        # Units without a group stay units, those of other groups are fixed.
        number = np.zeros(len(found) + 1, np.int64)  # group -1: none
        number[twins] = np.arange(2, len(twins) + 2)
        unit = np.where(moved, number[group], np.arange(len(group)) + len(twins))
        members = np.bincount(classes.of)[classes.of]
        slot = np.where(moved, classes.index[classes.of] * members + classes.rank, 0)
        walk, theta = trace(net, inputs, train, torch.from_numpy(unit << 32 | slot))
        outer = Classes(walk)
        moved |= outer.group[outer.of[unit]] >= 0
        held: dict[int, list[str]] = {}
        for k, c in zip(twins, outer.of[2 : len(twins) + 2].tolist(), strict=True):
            held.setdefault(c, []).append(names[k])
        for blocks, g in zip(outer.groups, outer.found(theta), strict=True):
            inner = tuple(tuple(held.get(c, ())) for c in blocks)
            name = inner[0][0].rsplit("[", 1)[0] if inner[0] else g.places[0].name
            while (name := f"{name}[*]") in groups:
                pass
            groups[name] = replace(g, inner=inner)
    reasons = ["no other unit acts at the same places", *dict.fromkeys(classes.why.values())]
    reason = np.zeros(len(classes.group), np.int64)
    number_of = {why: k for k, why in enumerate(reasons)}
    for c, why in classes.why.items():
        reason[c] = number_of[why]
    stays = Counter[tuple[str, int, str]]()
    for name, f in first:
        unit = f[f >= UNIT].numpy() >> 32
        for k, n in zip(
            *np.unique(reason[classes.of[unit[~moved[unit]]]], return_counts=True), strict=True
        ):
            stays[name, max(axes(f)), reasons[k]] += int(n)
    return groups, tuple(Pinned(n, k, count, why) for (n, k, why), count in stays.items())


def trace(
    net: nn.Module, inputs: Inputs, train: bool, merged: Tensor | None = None
) -> tuple[Walk, list[tuple[str, Tensor]]]:
    """Run the network on marked tensors: the walk, and every factor of its parameters by name.

    Its outputs, and parameters that it leaves, are pinned.
    """
    net = inference_copy(net, train)
    names = {id(m): f"{n or 'the network'} ({type(m).__name__})" for n, m in net.named_modules()}
    walk, state = Walk(RULES, PASSING, names, merged), net.state_dict(keep_vars=True)
    convs = (m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd))
    groups = {id(m.weight): m.groups for m in convs}
    marked: dict[int, Marked] = {}
    for t in state.values():  # tied parameters are one
        if t.is_floating_point() and id(t) not in marked:
            marked[id(t)] = walk.parameter(t, groups.get(id(t), 1))
    theta = {n: marked[id(t)] for n, t in state.items() if id(t) in marked}

    # Nothing is known of the values: what an example repeats may differ in other inputs.
    def marked_input(x: Tensor) -> Marked:
        x = x.contiguous() if 0 in x.stride() else x
        return Marked(walk, torch.cat([x, x]) if x.dim() and len(x) == 1 else x, (), [Tap()])

    given = tree_map_only(Tensor, marked_input, inputs)
    with unfused_attention(), torch.no_grad(), walk:
        # Without writing in place: PyTorch makes it a chain of new tensors.
        ends = functionalize(lambda theta, xs: tensors(call(net, theta, xs)))(theta, given)
    for x in ends:
        if isinstance(x, Marked):
            walk.fix(x, range(x.dim()), "reaches the output")
    for x in (x for x in theta.values() if not x.used):
        walk.fix(x, range(x.dim()), "is not used in this mode")
    return walk, [(n, f) for n, x in theta.items() for f in x.factors]


def inference_copy(net: nn.Module, train: bool) -> nn.Module:
    """A copy of the same tensors, so that nothing that a network remembers of a run stays in it.

    Its layers act as in evaluation; if `train`, auxiliary heads run.
    """
    attributes = (
        x for m in net.modules() for d in (m._parameters, m._buffers, vars(m)) for x in d.values()
    )
    net = copy.deepcopy(net, {id(x): x for x in attributes if isinstance(x, Tensor)})
    for m in net.modules():
        own = any(m.children()) and not type(m).__module__.startswith("torch.nn.")
        m.training = train and own
    return net


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention by its operators, one by one: a setting of the process, undone by the last user.

    Networks are told that they are compiled: those of `transformers` then leave out their choices
    by the values of a mask.
    """
    mha, kernels, compiler = torch.backends.mha, torch.backends.cuda, torch.compiler
    with LOCK:
        if not USERS:
            UNDO.callback(setattr, compiler, "_is_compiling_flag", compiler._is_compiling_flag)
            compiler._is_compiling_flag = True
            UNDO.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
            for kind in ("flash", "mem_efficient", "cudnn"):  # what remains: "math"
                enable = getattr(kernels, f"enable_{kind}_sdp")
                UNDO.callback(enable, getattr(kernels, f"{kind}_sdp_enabled")())
                enable(False)
        USERS.append(None)
    try:
        yield
    finally:
        with LOCK:
            USERS.pop()
            if not USERS:
                UNDO.close()


class Classes:
    """The units of a walk in classes that move as one, and groups of interchangeable classes.

    of: the class of each unit; rank: its number within; group and index: of each class (group -1:
    it stays); why: the reason for each class that is pinned.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        event, u, v, tag = torch.cat(walk.facts, 1).numpy()
        slots = u << 32 | v & SLOT
        u, v = u >> 32, v >> 32
        tied, n = v > 1, max(walk.count_units, int(u.max()) + 1)
        edges = coo_matrix((np.ones(tied.sum()), (u[tied], v[tied])), (n, n))
        self.of = connected_components(edges, directed=False)[1]
        order = np.argsort(self.of, kind="stable")
        self.rank = np.zeros(n, np.int64)
        self.rank[order] = np.arange(n) - np.searchsorted(self.of[order], self.of[order])
        self.why: dict[int, str] = {}
        for units, why in walk.pins:
            for c in np.unique(self.of[units.numpy()]).tolist():
                self.why.setdefault(c, why)
        # Facts stand in the order of events; a class is known by those about its units.
        known = np.where(tied, self.rank[v], v - 2)
        order = np.argsort(self.of[u], kind="stable")
        columns = (event << 32 | self.rank[u], slots, known << 32 | tag)
        table = np.stack([c[order] for c in columns], axis=1)
        home = self.of[u][order]
        ends = (np.flatnonzero(np.diff(home, append=-1)) + 1).tolist()
        alike: dict[bytes, list[int]] = {}
        for c, start, end in zip(home[np.array(ends) - 1].tolist(), [0, *ends], ends, strict=False):
            if c not in self.why:
                alike.setdefault(table[start:end].tobytes(), []).append(c)
        self.groups = [classes for classes in alike.values() if len(classes) > 1]
        self.group, self.index = np.full((2, n), -1)
        for g, classes in enumerate(self.groups):
            self.group[classes], self.index[classes] = g, np.arange(len(classes))

    def places(self, name: str, factors: Iterable[Tensor]) -> Iterator[tuple[int, Place, bool]]:
        """Each group that stands in a tensor, where, and whether it does so alone."""
        for f in factors:
            unit, slot = f.flatten().numpy() >> 32, f.flatten().numpy() & SLOT
            home = self.of[unit]
            group = np.where(unit > 1, self.group[home], -1)
            order = np.lexsort((slot, self.rank[unit], self.index[home], group))
            for at in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
                g = int(group[at[0]])
                if g >= 0 and len(at) % len(self.groups[g]) == 0:
                    index = at.reshape(len(self.groups[g]), -1)
                    yield g, Place(name, tuple(sorted(axes(f))), index), len(at) == len(unit)

    def found(self, theta: Iterable[tuple[str, Tensor]]) -> list[Group]:
        """The groups, with their places in the factors of the parameters, and their taps."""
        places: list[dict[tuple[str, tuple[int, ...]], Place]] = [{} for _ in self.groups]
        for name, f in theta:
            for g, place, _ in self.places(name, [f]):
                places[g].setdefault((name, place.axes), place)
        seen = []
        for taps in (self.walk.read, {t.pre or t: None for t in self.walk.read}):
            found: list[list[tuple[bool, Place]]] = [[] for _ in self.groups]
            for tap in (tap for tap in taps if tap.name):
                name = f"{tap.name}/{self.walk.count[tap.name.split(':')[0]]}"
                for g, place, alone in self.places(name, tap.factors):
                    found[g].append((alone, place))
            # A group is seen by itself; if nowhere, then at the first place among others.
            seen.append([tuple([p for a, p in ps if a] or [p for _, p in ps[:1]]) for ps in found])
        rows = zip(self.groups, places, *seen, strict=True)
        return [Group(len(cs), tuple(at.values()), *taps) for cs, at, *taps in rows]
