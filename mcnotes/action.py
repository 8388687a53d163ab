"""What a permutation symmetry is and does: a value that acts on parameters (chapter 3)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mcnotes import perms, tracing
from mcnotes.tracing import SymmetryError, Theta

Perm = dict[str, Tensor]
Example = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group acts: unit u sits at positions `index[u]` [units, slots] of a tensor's axis."""

    name: str  # of the parameter or buffer
    axis: int
    span: int  # so many axes, from `axis` on, are taken as one
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a group is seen: at `index` [units, slots] along `dims`, taken as one, of a tensor."""

    node: str
    dims: tuple[int, ...]
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """`size` interchangeable units. If they are blocks: `inner` names the groups within each.

    post, pre: where activations are seen after and before the nonlinearity.
    """

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

    groups: name → Group; a group of n units stands for n! copies of the network. A permutation
    `p` of a group acts by `new[i] = old[p[i]]` at each of its places. A group of blocks (attention
    heads, groups of a convolution) acts after the groups within its blocks, and carries them along.
    pinned: what stays, and why. train: the mode in which the network was followed.
    """

    groups: Mapping[str, Group]
    pinned: tuple[Pinned, ...]
    train: bool = False

    def identity(self) -> Perm:
        """The permutation that moves nothing."""
        return {name: perms.identity(g.size) for name, g in self.groups.items()}

    def random(self, generator: torch.Generator | None = None) -> Perm:
        """An independent, uniformly random permutation of every group (CPU generator)."""
        return {name: perms.random(g.size, generator) for name, g in self.groups.items()}

    def complete(self, perm: Perm) -> Perm:
        """`perm`, with the identity for each group that it leaves out.

        Raises ValueError for a name that is no group, and for an index vector that does not fit.
        """
        if wrong := [name for name in perm if name not in self.groups]:
            near = get_close_matches(wrong[0], self.groups, 3) or list(self.groups)[:3]
            raise ValueError(f"no group {wrong[0]!r} in this symmetry; there are {near} …")
        checked = {n: perms.check(p, self.groups[n].size, f"group {n!r}") for n, p in perm.items()}
        return self.identity() | checked

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
            for i, j in enumerate(p[name].tolist() if g.inner else ()):
                source.update(zip(g.inner[i], g.inner[j], strict=True))
        return source

    def permute(self, theta: Theta, perm: Perm) -> Theta:
        """Parameters of the same function in another order; `theta` is left as it is.

        perm: group → index vector; groups that it leaves out stay. Any device. Raises ValueError
        for permutations, or parameters, that do not fit this symmetry.
        """
        perm = self.complete(perm)
        orders: dict[tuple[str, int, int], Tensor] = {}
        for name, g in self.groups.items():
            if torch.equal(perm[name], perms.identity(g.size)):
                continue
            for at in g.places:
                order = orders.get((at.name, at.axis, at.span))
                if order is None:
                    order = torch.arange(_flat(theta, at).shape[at.axis])
                    orders[at.name, at.axis, at.span] = order
                index = torch.from_numpy(at.index)
                order[index] = order[index[perm[name]]]
        out = dict(theta)
        # Channels within the groups of a convolution (span 2) move before the groups do.
        for (name, axis, span), order in sorted(orders.items(), key=lambda kv: -kv[0][2]):
            flat = out[name].flatten(axis, axis + span - 1)
            out[name] = flat.index_select(axis, order.to(flat.device)).view(out[name].shape)
        return out

    def apply_matrices(self, theta: Theta, matrices: Mapping[str, Tensor]) -> Theta:
        """`permute` by square matrices [size, size], differentiably: new = M · old at each place.

        `torch.eye(size)[p]` is the permutation p; doubly stochastic matrices lie between
        permutations (chapter 7). Groups that are left out stay.
        """
        out = dict(theta)
        for name, g in self.groups.items():
            for at in g.places if name in matrices else ():
                flat, shape = _flat(out, at).movedim(at.axis, 0), out[at.name].shape
                index = torch.from_numpy(at.index).to(flat.device)
                mixed = torch.einsum("ij,js...->is...", matrices[name].to(flat), flat[index])
                flat = flat.index_put((index,), mixed)
                out[at.name] = flat.movedim(0, at.axis).reshape(shape)
        return out

    def log10_orbit(self) -> float:
        """log₁₀ of the number of copies of a generic network: the sum over groups of log₁₀ n!."""
        return sum(math.lgamma(g.size + 1) for g in self.groups.values()) / math.log(10)

    def explain(self, name: str) -> str:
        """What is known of the parameter or buffer `name`, axis by axis, in words."""
        lines = []
        for n, g in self.groups.items():
            at = [p for p in g.places if p.name == name]
            lines += [
                f"axis {p.axis}: {p.index.size} positions of group {n!r} ({g.size} units)"
                for p in at
            ]
        lines += [f"axis {p.axis}: {p.count} stay: {p.why}" for p in self.pinned if p.name == name]
        lines = lines or ["no floating-point entry of the state dict"]
        return "\n".join(f"{name}, {line}" for line in lines)

    def table(self) -> list[dict[str, Any]]:
        """A row for each group, or for groups of one name that differ in their number [k] only."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for name, g in self.groups.items():
            stem = name if name.endswith("[*]") else name.split("[")[0]
            where = ", ".join(f"{p.name}[{p.axis}]" for p in g.places)
            row = rows.setdefault(
                (stem, g.size),
                {"group": stem, "groups": 0, "units": g.size, "acts on [axis]": where},
            )
            row["groups"] += 1
        return list(rows.values())

    def _repr_markdown_(self) -> str:
        rows = self.table() or [{"no groups": ""}]
        lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

    def verify(
        self,
        net: nn.Module,
        example: Example,
        theta: Theta | None = None,
        *,
        tolerance: float = 1e-6,
        seed: int = 0,
    ) -> float:
        """The relative difference of the outputs when a random cycle permutes every group.

        In float64, dropout left out; a cycle moves every unit. theta: default the network's own
        parameters; they are jittered first, so that equal units (fresh biases, statistics) cannot
        hide an error. Raises SymmetryError above `tolerance`, with the group that is worst alone.
        """
        generator = torch.Generator().manual_seed(seed)
        state = {n: tracing.jitter(t, generator) for n, t in (theta or net.state_dict()).items()}
        inputs = (example,) if isinstance(example, Tensor) else example
        run = tracing.exact(net, inputs, self.train, seed)
        orders, before = self.random(generator), run(state)
        perm = {n: torch.empty_like(o).scatter(0, o, o.roll(1)) for n, o in orders.items()}

        def error(part: Perm) -> float:
            pairs = zip(before, run(self.permute(state, part)), strict=True)
            each = [float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)) for x, y in pairs]
            return max((e if e == e else math.inf for e in each), default=math.inf)

        if (total := error(perm)) <= tolerance:
            return total
        harm, worst = max(((error({n: p}), n) for n, p in perm.items()), default=(0.0, ""))
        raise SymmetryError(
            f"verify: outputs differ by {total:.1e} (relative, float64), allowed {tolerance:.0e}; "
            f"group {worst!r} alone by {harm:.1e}"
        )

    def tapper(
        self, net: nn.Module, at: Literal["post", "pre"] = "post"
    ) -> Callable[..., dict[str, list[Tensor]]]:
        """A function (θ, *inputs) → {group: [activations [samples, units], …]}, in one run.

        at: "post", what the next contraction sees, after the nonlinearity; "pre", before it. All
        positions but those of the units are samples. Evaluation mode, any batch size. The graph is
        exported at the first call (later, if the network fixes its batch size); threads may share.
        """
        taps = {name: getattr(g, at) for name, g in self.groups.items()}
        names = list(dict.fromkeys(t.node for ts in taps.values() for t in ts))
        made: dict[Any, tuple[list[int | None], Callable[..., list[Tensor]]]] = {}
        lock = Lock()

        def run(theta: Theta, *inputs: Tensor) -> dict[str, list[Tensor]]:
            with lock:
                batch, cut = made.get(device := inputs[0].device, ([0], None))
                if any(n not in (None, len(x)) for n, x in zip(batch, inputs, strict=False)):
                    program = tracing.export(net, inputs, self.train)
                    batch, cut = tracing.batch_sizes(program), tracing.cut(program, names, device)
                    made[device] = batch, cut
            assert cut
            seen = dict(zip(names, cut(theta, *inputs), strict=True))
            return {
                n: [tracing.samples(seen[t.node], t.dims, t.index) for t in ts]
                for n, ts in taps.items()
            }

        return run

    def to_json(self) -> str:
        """Text from which `from_json` restores an equal symmetry."""
        return json.dumps(self, default=lambda v: v.tolist() if hasattr(v, "tolist") else vars(v))

    @classmethod
    def from_json(cls, text: str) -> Symmetry:
        """The symmetry that `to_json` wrote."""
        groups, pinned, train = json.loads(text).values()

        def taps(found: list[dict[str, Any]]) -> tuple[Tap, ...]:
            return tuple(Tap(t["node"], tuple(t["dims"]), np.array(t["index"])) for t in found)

        def group(g: dict[str, Any]) -> Group:
            places = tuple(Place(**p | {"index": np.array(p["index"])}) for p in g["places"])
            inner = tuple(tuple(names) for names in g["inner"])
            return Group(g["size"], places, taps(g["post"]), taps(g["pre"]), inner)

        return cls(
            {n: group(g) for n, g in groups.items()}, tuple(Pinned(**p) for p in pinned), train
        )

    def __repr__(self) -> str:
        return f"Symmetry({len(self.groups)} groups, 10^{self.log10_orbit():.0f} copies)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symmetry) and self.to_json() == other.to_json()


def _flat(theta: Theta, at: Place) -> Tensor:
    """The tensor of a place, its `span` axes made one. Raises ValueError if it does not fit."""
    if at.name not in theta:
        raise ValueError(f"permute: the parameters lack {at.name!r}, on which this symmetry acts")
    t = theta[at.name]
    if (
        t.dim() < at.axis + at.span
        or t.shape[at.axis : at.axis + at.span].numel() <= at.index.max()
    ):
        raise ValueError(
            f"permute: {at.name!r} has shape {tuple(t.shape)}; this symmetry moves "
            f"{at.index.max() + 1} positions of axis {at.axis}. Is it of another network?"
        )
    return t.flatten(at.axis, at.axis + at.span - 1)
