"""Find the permutation symmetries of any network, prove them, apply them (chapter 3).

sym = symmetry.find(net, example)
sym.verify(net, example)
theta = sym.permute(theta, sym.random(generator))   # another network, the same function
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.fx import Node

from mcnotes import tracing
from mcnotes.action import Example, Group, Perm, Pinned, Place, Symmetry, Tap
from mcnotes.graph import Ledger, Marked
from mcnotes.operators import IDENTITIES, MOVES, POOLS, RESHAPES, RULES, rule
from mcnotes.tracing import SymmetryError, known_size, short
from mcnotes.walk import Walk

__all__ = ["Group", "Perm", "Pinned", "Place", "Symmetry", "SymmetryError", "Tap", "find", "rule"]


def find(net: nn.Module, example: Example, train: bool = False) -> Symmetry:
    """The permutation symmetries of `net`, from its operator graph.

    example: an input with its batch in front, or a tuple of inputs. train: follow the network in
    training mode, in which auxiliary heads exist. The network is not changed.
    Raises SymmetryError when torch.export cannot follow the network. What is not understood is
    pinned, never guessed: see `Symmetry.pinned`, `Symmetry.explain`; `Symmetry.verify` proves.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    program = tracing.export(net, inputs, train)
    walk = Walk(program, RULES)
    units = Classes(walk, walk.entries)
    names = group_names(walk, units)
    groups = gather(walk, units, names)
    moving = units.group[units.of[walk.entries[2]]] >= 0
    if twins := alike(walk, units):
        # Again, with whole groups as units: heads, and the groups of grouped convolutions.
        second = Walk(program, RULES, merged(units, twins))
        blocks = Classes(second, second.entries)
        groups |= nested(second, blocks, [names[g] for g in twins])
        moving |= blocks.group[blocks.of[second.entries[2]]] >= 0
    tied: dict[int, list[str]] = {}
    state = net.state_dict(keep_vars=True)
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    groups = {
        n: replace(
            g, places=tuple(replace(p, name=m) for p in g.places for m in tied[id(state[p.name])])
        )
        for n, g in groups.items()
    }
    return Symmetry(groups, pinned(walk, units, ~moving), train)


class Classes:
    """Units that move as one, and the groups of classes that may change places.

    entries [4, n]: axis, position, unit and slot of each entry of each parameter axis. `of`: the
    class of each unit; `rank`: its place among the units of its class; `group` and `index` of
    each class (group -1: it stays); `why`: the reason for each class that is pinned.
    """

    def __init__(self, ledger: Ledger, entries: np.ndarray) -> None:
        entries = entries[:, entries[2] > 0]
        facts = torch.cat(ledger.facts, 1).numpy()
        tied = facts[:, facts[2] > 0]
        count = int(max(entries[2].max(initial=0), facts[1:3].max(initial=0))) + 1
        edges = coo_matrix((np.ones(tied.shape[1]), (tied[1], tied[2])), (count, count))
        self.of = connected_components(edges, directed=False)[1]
        used = np.unique(entries[2])
        order = used[np.argsort(self.of[used], kind="stable")]
        self.rank = np.zeros(count, np.int64)
        self.rank[order] = np.arange(len(order)) - np.searchsorted(self.of[order], self.of[order])
        self.why: dict[int, str] = {}
        for units, why in ledger.pins:
            for c in np.unique(self.of[units.numpy()]).tolist():
                self.why.setdefault(c, why)
        pinned = list(self.why)
        axis, _, member, slot = entries[:, ~np.isin(self.of[entries[2]], pinned)]
        event, unit, other, *rest = facts[:, ~np.isin(self.of[facts[1]], pinned)]
        # Equal sums of hashes: the same facts about the members of the same ranks.
        sums = np.zeros((int(self.of.max(initial=0)) + 1, 2), np.uint64)
        ranked = np.where(other > 0, self.rank[other], other)
        np.add.at(sums, self.of[unit], hashes([event, self.rank[unit], ranked, *rest]))
        np.add.at(sums, self.of[member], hashes([-1 - axis, self.rank[member], slot]))
        alike: dict[bytes, list[int]] = {}
        for c in dict.fromkeys(self.of[used].tolist()):
            if c not in self.why:
                alike.setdefault(sums[c].tobytes(), []).append(c)
        self.groups = [cs for cs in alike.values() if len(cs) > 1]
        self.group = np.full(len(sums), -1)
        self.index = np.zeros(len(sums), np.int64)
        for g, cs in enumerate(self.groups):
            self.group[cs], self.index[cs] = g, np.arange(len(cs))


def hashes(columns: Sequence[np.ndarray]) -> np.ndarray:
    """128 bits for each row of integer columns [n]: [n, 2]. A clash needs luck of 2⁻¹²⁸."""
    odd = np.array([[0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F]], np.uint64)
    h = np.broadcast_to(odd, (len(columns[0]), 2))
    for column in columns:
        for shift in (29, 32):
            h = (h ^ column.astype(np.uint64)[:, None]) * (odd ^ np.uint64(shift << 8))
            h = h ^ (h >> np.uint64(shift))
    return h


def group_names(walk: Walk, classes: Classes) -> list[str]:
    """A group is called after the parameter that first brings in its units."""
    axis, position, unit, _ = walk.entries
    opened = np.full(len(classes.rank), len(walk.opened))
    for k, units in reversed(list(enumerate(walk.opened))):
        opened[units[units > 0].numpy()] = k
    group = classes.group[classes.of[unit]]
    order = np.lexsort((position, axis, opened[unit], group))
    _, first = np.unique(group[order], return_index=True)
    chosen = axis[order[first]][-len(classes.groups) :] if classes.groups else []
    stems = [walk.axes[a].name.removesuffix(".weight") for a in chosen]
    count = dict.fromkeys(stems, 0)
    names = []
    for stem in stems:
        names.append(f"{stem}[{count[stem]}]" if stems.count(stem) > 1 else stem)
        count[stem] += 1
    return names


def gather(walk: Walk, classes: Classes, names: list[str]) -> dict[str, Group]:
    """The places and taps of each group."""
    axis, position, unit, slot = walk.entries
    home = classes.of[unit]
    group, index = classes.group[home], classes.index[home]
    order = np.lexsort((position, slot, classes.rank[unit], index, axis, group))
    order = order[group[order] >= 0]
    places: list[list[Place]] = [[] for _ in names]
    cuts = np.flatnonzero(np.diff(group[order]) | np.diff(axis[order])) + 1
    for run in np.split(order, cuts) if len(order) else []:
        at, g = walk.axes[axis[run[0]]], int(group[run[0]])
        if at.span == 1 or walk.merged is None:  # a block's channels move with its rows
            table = position[run].reshape(len(classes.groups[g]), -1)
            places[g].append(Place(at.name, at.start, at.span, table))
    post = list(dict.fromkeys(s for n in walk.readers for s in sources(walk, n)))
    seen = [taps(walk, classes, nodes) for nodes in (post, [before(walk, n) for n in post])]
    sizes = [len(cs) for cs in classes.groups]
    return {
        name: Group(size, tuple(at), *(tuple(t) for t in both))
        for name, size, at, *both in zip(names, sizes, places, *seen, strict=True)
    }


def sources(walk: Walk, node: Node) -> Iterator[Node]:
    """The tensors that data movement and global pooling bring to `node`."""
    name = short(node) if node.op == "call_function" else ""
    moved = name in RESHAPES or name in MOVES or name in IDENTITIES or name == "getitem"
    if moved or name.startswith("adaptive_avg_pool"):
        for n in node.all_input_nodes:
            if n in walk.live:
                yield from sources(walk, n)
    elif isinstance(walk.marks[node], Marked):
        yield node


def before(walk: Walk, node: Node) -> Node:
    """The tensor that enters the nonlinearity, and pooling, of which `node` is the result."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        name, (source,) = short(node), node.all_input_nodes
        passed = RULES.get(name, RULES["pointwise"]) is RULES["pointwise"]  # without a rule: too
        if not (passed or name in IDENTITIES or name in RESHAPES or name in POOLS):
            break
        if source not in walk.live or not isinstance(walk.marks[source], Marked):
            break
        node = source
    return node


def taps(walk: Walk, classes: Classes, nodes: list[Node]) -> list[list[Tap]]:
    """For each group where it is seen by itself; if nowhere, the first place among others."""
    alone: list[list[Tap]] = [[] for _ in classes.groups]
    among: list[list[Tap]] = [[] for _ in classes.groups]
    for node in dict.fromkeys(nodes):
        for f in walk.marks[node].factors:
            axes = tuple(sorted(f.axes))
            if any(known_size(node.meta["val"].shape[k]) is None for k in axes):
                continue  # these positions would depend on the batch size
            label, slot = f.label.numpy().ravel(), f.slot.numpy().ravel()
            home = classes.of[label.clip(0)]
            group = np.where(label > 0, classes.group[home], -1)
            for g in np.unique(group[group >= 0]).tolist():
                at = np.flatnonzero(group == g)
                at = at[np.lexsort((slot[at], classes.rank[label[at]], classes.index[home[at]]))]
                size = len(classes.groups[g])
                if len(at) % size == 0:
                    tap = Tap(node.name, axes, at.reshape(size, -1))
                    (alone if len(at) == len(label) else among)[g].append(tap)
    return [a or b[:1] for a, b in zip(alone, among, strict=True)]


def alike(walk: Walk, classes: Classes) -> list[int]:
    """Groups that act on the same axes as another one does."""
    home = classes.group[classes.of[walk.entries[2]]]
    order = np.argsort(home, kind="stable")
    bounds = np.searchsorted(home[order], np.arange(len(classes.groups) + 1))
    kinds: dict[bytes, list[int]] = {}
    for g, (a, b) in enumerate(pairwise(bounds)):
        kinds.setdefault(np.sort(walk.entries[0][order[a:b]]).tobytes(), []).append(g)
    return sorted(g for gs in kinds.values() if len(gs) > 1 for g in gs)


def merged(classes: Classes, twins: list[int]) -> Tensor:
    """For a second walk: unit and slot for each unit of the first; group twins[k] is unit k + 1.

    Units without a group stay units; those of other groups are fixed.
    """
    group = classes.group[classes.of]
    unit = np.where(group < 0, np.arange(len(group)) + len(twins) + 1, 0)
    slot = np.zeros_like(unit)
    for k, g in enumerate(twins):
        at = np.flatnonzero(group == g)
        unit[at] = k + 1
        slot[at] = classes.index[classes.of[at]] * (classes.rank[at].max() + 1) + classes.rank[at]
    unit[0] = 0
    return torch.from_numpy(np.stack([unit, slot]))


def nested(walk: Walk, classes: Classes, inner: list[str]) -> dict[str, Group]:
    """Groups whose units are blocks; unit k + 1 of the walk is the group `inner[k]`."""
    home = classes.of[1 : len(inner) + 1]
    within: dict[int, list[str]] = {}
    for k in np.argsort(classes.rank[1 : len(inner) + 1], kind="stable"):
        within.setdefault(int(home[k]), []).append(inner[k])
    blocks = [tuple(tuple(within.get(c, [])) for c in cs) for cs in classes.groups]
    stems = [b[0][0].rsplit("[", 1)[0] if b[0] else f"blocks {k}" for k, b in enumerate(blocks)]
    names = [s + "[*]" * (1 + stems[:k].count(s)) for k, s in enumerate(stems)]
    groups = gather(walk, classes, names)
    return {n: replace(g, inner=b) for (n, g), b in zip(groups.items(), blocks, strict=True)}


def pinned(walk: Walk, classes: Classes, still: np.ndarray) -> tuple[Pinned, ...]:
    """What stays, axis by axis, with the first reason that was met."""
    counts: dict[tuple[str, int, str], int] = {}
    for axis, unit in walk.entries[[0, 2]].T[still]:
        why = classes.why.get(int(classes.of[unit]), "no other unit acts at the same places")
        key = (walk.axes[axis].name, walk.axes[axis].start, why)
        counts[key] = counts.get(key, 0) + 1
    return tuple(Pinned(name, axis, n, why) for (name, axis, why), n in counts.items())
