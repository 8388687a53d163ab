"""Find the permutation symmetries of any network, prove them, apply them (chapter 3).

    sym = symmetry.find(net, example)
    sym.verify(net, example)
    theta = sym.permute(theta, sym.random(generator))   # another network, the same function

A group of n interchangeable units stands for n! copies of the network. A nested group moves
whole blocks of units (attention heads, groups of a convolution) and has, for each block, `inner`
groups that permute within it. A permutation `p` of units acts by `new[i] = old[p[i]]` at every
place of its group; inner groups act first, then nested ones.
"""

from __future__ import annotations

import copy
import json
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mcnotes import operators, perms
from mcnotes.operators import Walk, rule

Theta = dict[str, Tensor]
Perm = dict[str, Tensor]
At = Literal["post", "pre"]
Example = Tensor | tuple[Tensor, ...]

__all__ = ["Group", "Perm", "Pinned", "Place", "Symmetry", "SymmetryError", "Tap", "find", "rule"]


class SymmetryError(ValueError):
    """The network cannot be followed, or a symmetry does not hold; the text says why and where."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group acts on one tensor: row u of `index` [units, slots] holds unit u's positions

    along `axis` of the parameter or buffer `name` (of `span` axes flattened into one, if span > 1).
    """

    name: str
    axis: int
    span: int
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a group can be seen: positions `index` [units, slots] along the flattened `dims`."""

    node: str
    dims: tuple[int, ...]
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """`size` interchangeable units; `inner` names, per unit, the groups of the units within."""

    size: int
    places: tuple[Place, ...]
    post: tuple[Tap, ...]
    pre: tuple[Tap, ...]
    inner: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Pinned:
    """`count` entries along an axis of a parameter that stay where they are, and why."""

    name: str
    axis: int
    count: int
    why: str


@dataclass(frozen=True, eq=False)
class Symmetry:
    """All that may be permuted in a network without changing its function: a value.

    groups: name → Group, inner groups before the nested ones that move them. pinned: what stays,
    and why. inputs: shape and dtype of the example's tensors. train: the mode it was found in.
    """

    groups: Mapping[str, Group]
    pinned: tuple[Pinned, ...]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    train: bool = False

    def identity(self) -> Perm:
        """The permutation that moves nothing."""
        return {name: perms.identity(g.size) for name, g in self.groups.items()}

    def random(self, generator: torch.Generator | None = None) -> Perm:
        """An independent, uniformly random permutation of every group."""
        return {name: perms.random(g.size, generator) for name, g in self.groups.items()}

    def complete(self, perm: Perm) -> Perm:
        """`perm` with the identity for each group that it leaves out.

        Raises ValueError for names that are no groups, and for index vectors that do not fit.
        """
        if unknown := sorted(set(perm) - set(self.groups)):
            near = get_close_matches(unknown[0], self.groups, n=1) or list(self.groups)[:3]
            raise ValueError(f"no group {unknown[0]!r}; did you mean {near}? See sym.groups")
        return self.identity() | {
            n: perms.check(p, self.groups[n].size, f"group {n!r}") for n, p in perm.items()
        }

    def compose(self, p: Perm, q: Perm) -> Perm:
        """First p, then q, as one: `permute(θ, compose(p, q)) = permute(permute(θ, p), q)`."""
        p, q = self.complete(p), self.complete(q)
        return {m: perms.compose(p[m], q[n]) for n, m in self._carried(p).items()}

    def inverse(self, p: Perm) -> Perm:
        """The permutation that undoes p."""
        p = self.complete(p)
        return {n: perms.invert(p[m]) for n, m in self._carried(p).items()}

    def _carried(self, p: Perm) -> dict[str, str]:
        """For each group the one whose units p brings to its place: itself, unless blocks move."""
        source = {n: n for n in self.groups}
        for name, g in self.groups.items():
            if g.inner:
                for i, j in enumerate(p[name].tolist()):
                    source.update(zip(g.inner[i], g.inner[j], strict=True))
        return source

    def permute(self, theta: Theta, perm: Perm) -> Theta:
        """A new state dict with the same function: `new[i] = old[p[i]]` at every place.

        Groups missing in `perm` keep their order. Works on any device; tensors that no group
        touches are passed on as they are. Raises ValueError for permutations or parameters that
        do not fit this network.
        """
        perm = self.complete(perm)
        moves: dict[tuple[str, int, int], Tensor] = {}
        for name, g in self.groups.items():
            for at in g.places if not _trivial(perm[name]) else ():
                size = self._size(theta, at)
                move = moves.setdefault((at.name, at.axis, at.span), torch.arange(size))
                index = torch.from_numpy(at.index)
                move[index] = move[index[perm[name]]]
        out = dict(theta)
        # Channels within the groups of a convolution (span 2) move before the groups do.
        for (name, axis, span), move in sorted(moves.items(), key=lambda m: -m[0][2]):
            flat = out[name].flatten(axis, axis + span - 1)
            moved = flat.index_select(axis, move.to(flat.device))
            out[name] = moved.view(out[name].shape)
        return out

    def apply_matrices(self, theta: Theta, matrices: Mapping[str, Tensor]) -> Theta:
        """`permute` with any square matrices [size, size], differentiably: new = M · old.

        A permutation p is the matrix `torch.eye(size)[p]`; doubly stochastic ones serve PAM.
        """
        out = dict(theta)
        for name, matrix in matrices.items():
            for at in self.groups[name].places:
                t = out[at.name]
                flat = t.flatten(at.axis, at.axis + at.span - 1).movedim(at.axis, 0)
                index = torch.from_numpy(at.index).to(t.device)
                mixed = torch.einsum("ij,js...->is...", matrix.to(t), flat[index])
                flat = flat.index_put((index,), mixed).movedim(0, at.axis)
                out[at.name] = flat.reshape(t.shape)
        return out

    def _size(self, theta: Theta, at: Place) -> int:
        if at.name not in theta:
            raise ValueError(
                f"permute: the parameters have no {at.name!r} that this symmetry acts on"
            )
        shape = theta[at.name].shape[at.axis : at.axis + at.span]
        if len(shape) < at.span or shape.numel() <= at.index.max():
            raise ValueError(
                f"permute: {at.name!r} has shape {tuple(theta[at.name].shape)}, too small for axis "
                f"{at.axis} of this symmetry; are these parameters of the same network?"
            )
        return shape.numel()

    def log10_orbit(self) -> float:
        """log₁₀ of the number of equivalent copies of a generic network: Σ log₁₀ n! over groups."""
        return sum(math.lgamma(g.size + 1) for g in self.groups.values()) / math.log(10)

    def explain(self, name: str) -> str:
        """What is known of the parameter or buffer `name`, axis by axis, in words."""
        lines = [
            f"{name}, axis {p.axis}: {p.index.size} positions of group {n!r} ({g.size} units)"
            for n, g in self.groups.items()
            for p in g.places
            if p.name == name
        ] + [
            f"{name}, axis {p.axis}: {p.count} fixed: {p.why}"
            for p in self.pinned
            if p.name == name
        ]
        return "\n".join(lines) or f"{name}: nothing is known; is it in the state dict?"

    def table(self) -> list[dict[str, Any]]:
        """One row per group: name, units, places, inner groups, taps."""
        return [
            {
                "group": n,
                "units": g.size,
                "acts on": ", ".join(f"{p.name}[{p.axis}]" for p in g.places),
                "taps": len(g.post),
            }
            for n, g in self.groups.items()
        ]

    def _repr_markdown_(self) -> str:
        rows = self.table()
        lines = ["| " + " | ".join(rows[0] if rows else ["group"]) + " |"]
        lines.append("|" + "---|" * len(rows[0] if rows else [1]))
        lines += ["| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows]
        return "\n".join(lines) + f"\n\n10^{self.log10_orbit():,.0f} equivalent copies."

    def verify(
        self,
        net: nn.Module,
        example: Example,
        theta: Theta | None = None,
        *,
        tolerance: float = 1e-6,
        seed: int = 0,
    ) -> float:
        """Permute every group at random in float64 and compare outputs; the relative difference.

        theta: default the network's own parameters. Either is jittered first, so that units that
        are equal (fresh biases, statistics) cannot hide an error. Raises SymmetryError above
        `tolerance`, naming the group that does most harm alone.
        """
        generator = torch.Generator().manual_seed(seed)
        state = {n: _jitter(t, generator) for n, t in (theta or net.state_dict()).items()}
        device = next((t.device for t in state.values()), None)
        inputs = tuple(
            (t.double() if t.is_floating_point() else t).to(device) for t in _tuple(example)
        )
        # Everything in the state dict is replaced: copy the rest only, constants in float64.
        net = copy.deepcopy(net, {id(t): t for t in net.state_dict(keep_vars=True).values()})
        for module in net.modules():
            for n in module._non_persistent_buffers_set:
                if (t := getattr(module, n)) is not None and t.is_floating_point():
                    setattr(module, n, t.double())
        buffers = {n for n, _ in net.named_buffers()}

        def outputs(values: Theta) -> list[Tensor]:
            values = {n: t.clone() if n in buffers else t for n, t in values.items()}
            with _mode(net, self.train), torch.no_grad(), _NoDropout():
                torch.manual_seed(seed)
                out = functional_call(net, values, inputs, tie_weights=False)
            return [o for o in tree_leaves(out) if isinstance(o, Tensor)]

        before = outputs(state)
        perm = self.random(generator)
        error = _difference(before, outputs(self.permute(state, perm)))
        if not error <= tolerance:
            harm = {
                n: _difference(before, outputs(self.permute(state, {n: p})))
                for n, p in perm.items()
            }
            worst = max(
                harm, key=lambda n: -1.0 if harm[n] <= tolerance else harm[n], default="none"
            )
            raise SymmetryError(
                f"verify: outputs differ by {error:.1e} (relative, float64), allowed {tolerance:.0e}; "
                f"worst group {worst!r} ({harm.get(worst, 0.0):.1e} alone)"
            )
        return error

    def tapper(self, net: nn.Module, at: At = "post") -> Callable[..., dict[str, list[Tensor]]]:
        """A function (θ, x) → {group: [activations [samples, units], …]}, one run of the network.

        at: "post", what the next contraction sees; "pre", before the nonlinearity. All positions
        but the units' are samples. Evaluation mode; any batch size.
        """
        example = tuple(
            torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in self.inputs
        )
        program = export(net, example, self.train)
        return _runner(program, {n: getattr(g, at) for n, g in self.groups.items()})

    def to_json(self) -> str:
        """Text from which `from_json` restores an equal symmetry."""
        return json.dumps(asdict(self), default=_compact)

    @classmethod
    def from_json(cls, text: str) -> Symmetry:
        """The symmetry that `to_json` wrote."""
        raw = json.loads(text)
        groups = {
            name: Group(
                g["size"],
                tuple(Place(**p | {"index": _expand(p["index"])}) for p in g["places"]),
                *(
                    tuple(Tap(t["node"], tuple(t["dims"]), _expand(t["index"])) for t in g[k])
                    for k in ("post", "pre")
                ),
                tuple(map(tuple, g["inner"])),
            )
            for name, g in raw["groups"].items()
        }
        pinned = tuple(Pinned(**p) for p in raw["pinned"])
        inputs = tuple((tuple(shape), dtype) for shape, dtype in raw["inputs"])
        return cls(groups, pinned, inputs, raw["train"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symmetry) and self.to_json() == other.to_json()


def _compact(index: np.ndarray) -> Any:
    """Positions as start and two strides where they are regular, else in full."""
    u, s = np.indices(index.shape)
    start = int(index[0, 0])
    steps = [
        int(index[-1, 0] - start) // max(1, len(index) - 1),
        int(index[0, -1] - start) // max(1, index.shape[1] - 1),
    ]
    if np.array_equal(index, start + u * steps[0] + s * steps[1]):
        return {"start": start, "steps": steps, "shape": index.shape}
    return index.tolist()


def _expand(stored: Any) -> np.ndarray:
    if isinstance(stored, list):
        return np.array(stored)
    u, s = np.indices(stored["shape"])
    return stored["start"] + u * stored["steps"][0] + s * stored["steps"][1]


def _trivial(p: Tensor) -> bool:
    return torch.equal(p, torch.arange(len(p)))


def _tuple(example: Example) -> tuple[Tensor, ...]:
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _jitter(t: Tensor, generator: torch.Generator) -> Tensor:
    """Scale each entry by about 1; move equal entries apart. Positive entries stay positive."""
    if not t.is_floating_point():
        return t
    t = t.detach().double()
    noise = torch.rand(2, *t.shape, dtype=t.dtype, generator=generator).to(t.device)
    return t * (0.75 + noise[0] / 2) + 0.1 * noise[1] * bool((t == t.flatten()[:1].squeeze()).all())


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest relative difference of corresponding outputs; NaN counts as infinite."""
    each = [
        float((x - y).abs().max() / x.abs().max().clamp_min(1e-300))
        for x, y in zip(a, b, strict=True)
    ]
    return max((e if e == e else math.inf for e in each), default=math.inf)


class _NoDropout(TorchFunctionMode):
    """Dropout draws a mask per unit, which hides invariance: leave it out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


@contextmanager
def _mode(net: nn.Module, train: bool) -> Iterator[None]:
    """Set and restore the training flags of all modules; keep attention on its plain path."""
    flags = {m: m.training for m in net.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        net.train(train)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, flag in flags.items():
            m.training = flag


# Discovery


def export(net: nn.Module, example: Example, train: bool) -> ExportedProgram:
    """The operator graph of `net`, for any batch size where the network allows it.

    Raises SymmetryError where the network cannot be traced, naming the line and a cure.
    """
    inputs = tuple(torch.cat([t, t]) if t.dim() and len(t) == 1 else t for t in _tuple(example))
    shapes = tuple({0: Dim.AUTO} if t.dim() else None for t in inputs)
    with _mode(net, train), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(net, inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
            at = (
                f"{own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno} ({own[-1].line})"
                if own
                else "?"
            )
            raise SymmetryError(
                f"find: torch.export cannot follow {type(net).__name__} at {at}: "
                f"{str(error).splitlines()[0]} Make the control flow independent of the data "
                "(torch.where instead of if), or find the symmetries of the part without it."
            ) from error


class Classes:
    """The units of a walk in classes that move as one, and groups of interchangeable classes."""

    def __init__(self, walk: Walk, entries: np.ndarray) -> None:
        """entries [4, n]: axis, position, unit, slot of each entry of each parameter axis."""
        facts = torch.cat(walk.facts, 1).numpy()
        event, unit, other, tag, slot, slot2 = facts
        count = int(entries[2].max()) + 1
        tied = other > 0
        edges = coo_matrix((np.ones(tied.sum()), (unit[tied], other[tied])), (count, count))
        self.of = connected_components(edges, directed=False)[1]
        entries = entries[:, entries[2] > 0]
        used = np.unique(entries[2])
        order = used[np.argsort(self.of[used], kind="stable")]
        first = np.searchsorted(self.of[order], self.of[order])
        self.rank = np.zeros(count, np.int64)
        self.rank[order] = np.arange(len(order)) - first
        self.why: dict[int, str] = {}
        for units, why in walk.pins:
            for c in np.unique(self.of[units.numpy()]).tolist():
                self.why.setdefault(c, why)
        axis, _, member, place = entries[:, ~np.isin(self.of[entries[2]], list(self.why))]
        alive = ~np.isin(self.of[unit], list(self.why))
        event, unit, other, tag, slot, slot2 = facts[:, alive]
        rows = np.stack(
            [event, self.rank[unit], np.where(other > 0, self.rank[other], other), tag, slot, slot2]
        )
        own = np.stack([-1 - axis, self.rank[member], place, *np.zeros((3, len(axis)), np.int64)])
        sums = np.zeros((self.of.max() + 1, 2), np.uint64)
        np.add.at(sums, self.of[unit], _mixed(rows))
        np.add.at(sums, self.of[member], _mixed(own))
        shared: dict[bytes, list[int]] = {}
        for c in dict.fromkeys(self.of[used].tolist()):
            if c and c not in self.why:
                shared.setdefault(sums[c].tobytes(), []).append(c)
        self.groups = [cs for cs in shared.values() if len(cs) > 1]
        self.group = np.full(len(sums), -1)
        self.index = np.zeros(len(sums), np.int64)
        for g, cs in enumerate(self.groups):
            self.group[cs], self.index[cs] = g, np.arange(len(cs))


def _mixed(rows: np.ndarray) -> np.ndarray:
    """128 bits per column of `rows`, equal only where the columns are (up to luck of 2^-128)."""
    h = np.zeros((rows.shape[1], 2), np.uint64) + np.array(
        [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64
    )
    for row in rows.astype(np.uint64):
        h = (h ^ row[:, None]) * np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], np.uint64)
        h ^= h >> np.uint64(29)
        h = h * np.array([0x9FB21C651E98DF25, 0xD6E8FEB86659FD93], np.uint64)
        h ^= h >> np.uint64(32)
    return h


def find(net: nn.Module, example: Example, train: bool = False) -> Symmetry:
    """The permutation symmetries of `net`, from its operator graph (chapter 3).

    example: the input, or a tuple of inputs, with a batch in front. train: follow the network in
    training mode, where auxiliary heads exist. The network is not changed.
    Raises SymmetryError for a network that torch.export cannot follow.
    """
    program = export(net, example, train)
    walk = Walk(program)
    parts = [(k, np.arange(len(a.units)), a.units.numpy(), 0) for k, a in enumerate(walk.axes)]
    entries = np.concatenate(
        [np.zeros((4, 0), int)] + [np.stack(np.broadcast_arrays(*p)) for p in parts], 1
    )
    first = Classes(walk, entries)
    names = _names(walk, first, entries)
    found = _groups(walk, first, entries, names)
    covered = first.group[first.of[entries[2]]] >= 0
    twins = _twins(first, entries)
    if twins:
        merged = _merged(first, entries, twins)
        blocks = Walk(program, (torch.from_numpy(merged[0]), torch.from_numpy(merged[1])))
        outer = np.stack([*entries[:2], merged[0][entries[2]], merged[1][entries[2]]])
        second = Classes(blocks, outer)
        covered |= second.group[second.of[outer[2]]] >= 0
        found |= _nested(blocks, second, outer, [names[g] for g in twins])
    same: dict[int, list[str]] = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        same.setdefault(id(tensor), []).append(name)
    tied = {name: names for names in same.values() for name in names}
    found = {
        n: replace(g, places=tuple(replace(p, name=a) for p in g.places for a in tied[p.name]))
        for n, g in found.items()
    }
    inputs = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in _tuple(example))
    return Symmetry(found, _pinned(walk, first, entries, covered), inputs, train)


def _twins(classes: Classes, entries: np.ndarray) -> list[int]:
    """Groups that act on the same axes as another one: heads, channels of grouped convolutions."""
    home = classes.group[classes.of[entries[2]]]
    kinds: dict[tuple[int, ...], list[int]] = {}
    for g in range(len(classes.groups)):
        kinds.setdefault(tuple(np.sort(entries[0][home == g])), []).append(g)
    return sorted(g for gs in kinds.values() if len(gs) > 1 for g in gs)


def _merged(
    classes: Classes, entries: np.ndarray, twins: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """For a second walk: whole groups as units, (unit, slot) for each unit of the first."""
    group = classes.group[classes.of]
    unit = np.where(group < 0, np.arange(len(group)) + len(twins) + 1, 0)
    slot = np.zeros_like(unit)
    for k, g in enumerate(twins):
        at = np.flatnonzero(group == g)
        unit[at] = k + 1
        slot[at] = classes.index[classes.of[at]] * (classes.rank[at].max() + 1) + classes.rank[at]
    unit[0] = 0
    return unit, slot


def _nested(
    walk: Walk, classes: Classes, entries: np.ndarray, inner: list[str]
) -> dict[str, Group]:
    """Groups whose units are blocks; unit k + 1 of the walk is the inner group `inner[k]`."""
    names, within = [], []
    for g, cs in enumerate(classes.groups):
        held = [[k + 1 for k in range(len(inner)) if classes.of[k + 1] == c] for c in cs]
        held = [sorted(ks, key=lambda k: int(classes.rank[k])) for ks in held]
        within.append(tuple(tuple(inner[k - 1] for k in ks) for ks in held))
        names.append(within[-1][0][0].rsplit("[", 1)[0] + "[*]" if held[0] else f"blocks[{g}]")
    groups = _groups(walk, classes, entries, names)
    return {n: replace(g, inner=i) for (n, g), i in zip(groups.items(), within, strict=True)}


def _names(walk: Walk, classes: Classes, entries: np.ndarray) -> list[str]:
    """A group is called after the parameter whose product with something first has its units."""
    opened = np.full(len(classes.rank), len(walk.opened))
    for order, units in reversed(list(enumerate(walk.opened))):
        opened[units[units > 0].numpy()] = order
    group = classes.group[classes.of[entries[2]]]
    order = np.lexsort((entries[1], entries[0], opened[entries[2]]))
    bases: list[str] = []
    for g in range(len(classes.groups)):
        name = walk.axes[entries[0][order[np.argmax(group[order] == g)]]].name
        bases.append(name.removesuffix(".weight"))
    seen: dict[str, int] = {}
    names = []
    for base in bases:
        k = seen[base] = seen.get(base, -1) + 1
        names.append(f"{base}[{k}]" if bases.count(base) > 1 else base)
    return names


def _groups(
    walk: Walk, classes: Classes, entries: np.ndarray, names: list[str]
) -> dict[str, Group]:
    """Gather the places and taps of each group."""
    axis, position, unit, slot = entries
    home = classes.of[unit]
    group, index = classes.group[home], classes.index[home]
    order = np.lexsort((position, slot, classes.rank[unit], index, axis, group))
    order = order[group[order] >= 0]
    places: dict[int, list[Place]] = {}
    cuts = np.flatnonzero(np.diff(group[order] * (len(walk.axes) + 1) + axis[order])) + 1
    for run in np.split(order, cuts) if len(order) else []:
        a, g = walk.axes[axis[run[0]]], int(group[run[0]])
        if not (a.span > 1 and walk.merged is not None):  # blocks of channels move with their rows
            table = position[run].reshape(len(classes.groups[g]), -1)
            places.setdefault(g, []).append(Place(a.name, a.start, a.span, table))
    post, pre = _taps(walk, classes)
    return {
        name: Group(len(classes.groups[g]), tuple(places[g]), tuple(post[g]), tuple(pre[g]))
        for g, name in enumerate(names)
    }


def _taps(walk: Walk, classes: Classes) -> tuple[list[list[Tap]], list[list[Tap]]]:
    """Where activations can be seen, per group: what contractions read, and before nonlinearities."""
    post = list(dict.fromkeys(s for n in walk.readers for s in walk.sources(n)))
    pre = list(dict.fromkeys(walk.before(n) for n in post))
    found: tuple[list[list[Tap]], ...] = ([], [])
    for out, nodes in zip(found, (post, pre), strict=True):
        alone: list[list[Tap]] = [[] for _ in classes.groups]
        mixed: list[list[Tap]] = [[] for _ in classes.groups]
        for node in nodes:
            for f in walk.marks[node].factors:
                dims = [k for k, n in enumerate(f.label.shape) if n > 1]
                if any(isinstance(node.meta["val"].shape[k], torch.SymInt) for k in dims):
                    continue  # would hold for this batch size only
                home = classes.of[f.label.flatten().numpy()] * (f.label.flatten().numpy() > 0)
                group = classes.group[home]
                for g in np.unique(group[group >= 0]):
                    at = np.flatnonzero(group == g)
                    at = at[np.lexsort((f.slot.flatten().numpy()[at], classes.index[home[at]]))]
                    if len(at) % len(classes.groups[g]) == 0:
                        tap = Tap(node.name, tuple(dims), at.reshape(len(classes.groups[g]), -1))
                        (alone if len(at) == len(group) else mixed)[g].append(tap)
        out += [a or m[:1] for a, m in zip(alone, mixed, strict=True)]
    return found[0], found[1]


def _pinned(
    walk: Walk, classes: Classes, entries: np.ndarray, covered: np.ndarray
) -> tuple[Pinned, ...]:
    """What does not move, axis by axis, with the first reason that was met."""
    counts: dict[tuple[str, int, str], int] = {}
    for a, unit in entries[[0, 2]].T[~covered]:
        why = classes.why.get(int(classes.of[unit]), "no other unit acts at the same places")
        key = (walk.axes[a].name, walk.axes[a].start, why)
        counts[key] = counts.get(key, 0) + 1
    return tuple(Pinned(name, axis, n, why) for (name, axis, why), n in counts.items())


def _runner(
    program: ExportedProgram, wanted: dict[str, tuple[Tap, ...]]
) -> Callable[..., dict[str, list[Tensor]]]:
    """Cut the graph down to the taps; parameters become arguments."""
    specs = program.graph_signature.input_specs
    graph = torch.fx.Graph()
    graph.graph_copy(program.graph, {})
    nodes = {n.name: n for n in graph.nodes}
    names = list(dict.fromkeys(t.node for taps in wanted.values() for t in taps))
    if missing := [n for n in names if n not in nodes]:
        raise SymmetryError(
            f"tapper: no operator {missing[0]!r} in this network; find its symmetry anew"
        )
    for node in list(graph.nodes):
        operators.plain(node, kept={nodes[n] for n in names})
    graph.output([nodes[n] for n in names])
    graph.eliminate_dead_code()
    module = torch.fx.GraphModule(program.graph_module, graph)
    fixed = {
        **program.constants,
        **{n: t for n, t in program.state_dict.items() if not t.is_floating_point()},
    }

    def run(theta: Theta, *inputs: Tensor) -> dict[str, list[Tensor]]:
        given = iter(inputs)
        args = [
            next(given)
            if s.target is None
            else (theta[s.target] if s.target in theta else fixed[s.target].to(inputs[0].device))
            for s in specs
        ]
        seen = dict(zip(names, module(*args), strict=True))
        return {name: [_samples(seen[t.node], t) for t in taps] for name, taps in wanted.items()}

    return run


def _samples(x: Tensor, tap: Tap) -> Tensor:
    """[samples, units] of an activation; a view where the units are its last axis in memory."""
    last = range(x.dim() - len(tap.dims), x.dim())
    x = x.movedim(tap.dims, tuple(last)).flatten(-len(tap.dims))
    units, slots = tap.index.shape
    if not np.array_equal(tap.index.T.ravel(), np.arange(x.shape[-1])):
        x = x.index_select(-1, torch.from_numpy(tap.index.T.ravel()).to(x.device))
    return x.reshape(-1, units)
