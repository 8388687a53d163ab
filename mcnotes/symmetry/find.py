"""Find the permutation symmetries of any network, prove them, apply them (chapter 3).

    sym = symmetry.find(net, example)
    sym.verify(net, example)
    theta = sym.permute(theta, sym.random(generator))   # another network, the same function

A permutation `p` of a group's units acts by `new[i] = old[p[i]]` at every place of the group. The
units of a nested group are blocks (attention heads, groups of a convolution); `inner` names the
groups that permute within each block, and these act first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from mcnotes import calls
from mcnotes.calls import Inputs
from mcnotes.symmetry import permutations
from mcnotes.symmetry.activations import Reader, Theta
from mcnotes.symmetry.groups import (
    Group,
    Pinned,
    Place,
    discover,
    inference_copy,
    unfused_attention,
)
from mcnotes.symmetry.units import SymmetryError

Perm = dict[str, Tensor]  # index vectors by group
KNOWN: WeakKeyDictionary[nn.Module, dict[Any, Mapping[str, Group]]] = WeakKeyDictionary()
"""Groups that `tapper` found, by network, and by mode and layout of the inputs."""


@dataclass(frozen=True, eq=False)
class Symmetry:
    """All that may be permuted in a network without changing its function: a value.

    A group of n units stands for n! copies of the network. train: the mode it was found in.
    """

    groups: Mapping[str, Group]
    pinned: tuple[Pinned, ...] = ()
    train: bool = False

    def identity(self) -> Perm:
        """The permutation that moves nothing."""
        return {name: permutations.identity(g.size) for name, g in self.groups.items()}

    def random(self, generator: torch.Generator | None = None) -> Perm:
        """An independent, uniformly random permutation of every group (CPU generator)."""
        return {name: permutations.random(g.size, generator) for name, g in self.groups.items()}

    def complete(self, perm: Perm) -> Perm:
        """`perm`, with the identity for groups that it leaves out. ValueError if it misfits."""
        if wrong := [name for name in perm if name not in self.groups]:
            raise ValueError(f"no group {wrong[0]!r} in this symmetry; there are {[*self.groups]}")
        checked = {
            n: permutations.check(p, self.groups[n].size, f"group {n!r}") for n, p in perm.items()
        }
        return self.identity() | checked

    def compose(self, p: Perm, q: Perm) -> Perm:
        """First p, then q, as one: `permute(θ, compose(p, q)) = permute(permute(θ, p), q)`."""
        p, q = self.complete(p), self.complete(q)
        return {old: permutations.compose(p[old], q[new]) for new, old in self._carried(p).items()}

    def inverse(self, p: Perm) -> Perm:
        """The permutation that undoes p."""
        p = self.complete(p)
        return {new: permutations.invert(p[old]) for new, old in self._carried(p).items()}

    def _carried(self, p: Perm) -> dict[str, str]:
        """For each group the one whose units p brings to its place: another where blocks move."""
        source = {name: name for name in self.groups}
        for name, g in self.groups.items():
            for block, k in zip(g.inner, p[name].tolist(), strict=False):
                source |= zip(block, g.inner[k], strict=True)
        return source

    def permute(self, theta: Theta, perm: Perm) -> Theta:
        """Parameters of the same function in another order; `theta` is left as it is.

        perm: group → index vector; groups that it leaves out stay. Any device. Raises ValueError
        for permutations, or parameters, that do not fit.
        """
        orders: dict[tuple[str, tuple[int, ...]], tuple[Place, Tensor]] = {}
        for name, p in self.complete(perm).items():
            for at in self.groups[name].places if name in perm else ():
                size = at.of(theta).shape[at.axis]
                order = orders.setdefault((at.name, at.axes), (at, torch.arange(size)))[1]
                order[at.index] = order[at.index[p]]
        out = dict(theta)
        # Channels within the groups of a convolution (two axes) move before the groups do.
        for at, order in sorted(orders.values(), key=lambda o: -len(o[0].axes)):
            flat = at.of(out)
            moved = flat.index_select(at.axis, order.to(flat.device))
            out[at.name] = moved.view(theta[at.name].shape)
        return out

    def apply_matrices(self, theta: Theta, matrices: Mapping[str, Tensor]) -> Theta:
        """`permute` by square matrices [size, size], differentiably: new = M · old at each place.

        `torch.eye(size)[p]` is the permutation p; doubly stochastic matrices lie between
        permutations (chapter 7). Groups that are left out stay.
        """
        out = dict(theta)
        for name, at in (
            (n, at) for n in self.groups if n in matrices for at in self.groups[n].places
        ):
            flat, index = at.of(out).movedim(at.axis, 0), torch.from_numpy(at.index)
            mixed = torch.einsum("ij,js...->is...", matrices[name].to(flat), flat[index])
            flat = flat.index_put((index.to(flat.device),), mixed)
            out[at.name] = flat.movedim(0, at.axis).reshape(theta[at.name].shape)
        return out

    def verify(
        self, net: nn.Module, example: Inputs, theta: Theta | None = None, *,
        tolerance: float = 1e-6, seed: int = 0
    ) -> float:  # fmt: skip
        """The relative difference of the outputs when a random cycle permutes every group.

        In float64, dropout left out; a cycle moves every unit. theta: default the network's own
        parameters; they are jittered first, so that equal units (fresh biases, statistics) cannot
        hide an error. Raises SymmetryError above `tolerance`, with the group that is worst alone.
        """
        generator = torch.Generator().manual_seed(seed)
        buffers = {n: b.double() if b.is_floating_point() else b for n, b in net.named_buffers()}
        given = {n: jitter(t, generator) for n, t in (theta or net.state_dict()).items()}
        device = next((t.device for t in given.values()), None)

        def exact(x: Tensor) -> Tensor:
            return (x.double() if x.is_floating_point() else x).to(device)

        inputs = tree_map_only(Tensor, exact, calls.plain(example))

        def outputs(perm: Perm) -> list[Tensor]:
            values = buffers | self.permute(given, perm)
            values |= {n: values[n].clone() for n in buffers}  # which a forward pass may change
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                with unfused_attention(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    out = calls.call(inference_copy(net, self.train), values, inputs)
            finally:
                torch.set_default_dtype(default)
            return calls.tensors(out)

        def error(perm: Perm) -> float:
            pairs = zip(before, outputs(perm), strict=True)
            each = [float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)) for x, y in pairs]
            return max((e if e == e else math.inf for e in each), default=math.inf)

        before = outputs({})
        orders = self.random(generator)
        perm = {n: torch.empty_like(o).scatter(0, o, o.roll(1)) for n, o in orders.items()}
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
        """A function (θ, inputs) → {group: [activations [samples, units], …]}, in one run.

        at: "post", what the next contraction sees, after the nonlinearity; "pre", before it. All
        positions but those of the units are samples. Evaluation mode, any batch size, no gradients.
        A network is followed once for each layout of its inputs: do not rebuild it in place.
        """
        readers: dict[Any, Reader] = {}  # one for each thread
        lock, still = Lock(), self.identity()

        def run(theta: Theta, *given: Any) -> dict[str, list[Tensor]]:
            inputs = calls.plain(given[0] if len(given) == 1 else given)
            # How inputs lie in memory decides which operators PyTorch runs.
            leaves, form = tree_flatten(inputs)
            layout = (
                str(form),
                *(
                    (x.shape[1:], x.stride()[1:], x.dtype, x.device)
                    if isinstance(x, Tensor)
                    else repr(x)
                    for x in leaves
                ),
            )
            few = calls.first(inputs, 2)
            with lock:
                known = KNOWN.setdefault(net, {})
                if (self.train, layout) not in known:
                    known[self.train, layout] = find(net, few, self.train).groups
                groups = known[self.train, layout]
                if {n: g.size for n, g in groups.items()} != {n: len(p) for n, p in still.items()}:
                    raise SymmetryError("tapper: other groups than here; find this network's own")
                taps = {n: getattr(g, at) for n, g in groups.items()}
                if (key := (get_ident(), layout)) not in readers:
                    names = {t.name for places in taps.values() for t in places}
                    readers[key] = Reader(net, self.train, names, theta, few)
                read = readers[key]
            kept = read(theta, inputs)
            return {n: [t.samples(kept[t.name]) for t in ts] for n, ts in taps.items()}

        return run

    def log10_orbit(self) -> float:
        """log₁₀ of the number of copies of a generic network: the sum over groups of log₁₀ n!."""
        return sum(math.lgamma(g.size + 1) for g in self.groups.values()) / math.log(10)

    def explain(self, name: str) -> str:
        """What is known of the parameter or buffer `name`, axis by axis, in words."""
        lines = [
            f"axis {p.axis}: {p.index.size} positions of group {n!r} ({g.size} units)"
            for n, g in self.groups.items()
            for p in g.places
            if p.name == name
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
            row = {"group": stem, "groups": 0, "units": g.size, "acts on [axis]": where}
            rows.setdefault((stem, g.size), row)["groups"] += 1
        return list(rows.values())

    def _repr_markdown_(self) -> str:
        rows = self.table() or [{"no groups": ""}]
        lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

    def __repr__(self) -> str:
        return f"Symmetry({len(self.groups)} groups, 10^{self.log10_orbit():.0f} copies)"

    def to_json(self) -> str:
        """Text from which `from_json` restores an equal symmetry."""
        return json.dumps(self, default=lambda v: v.tolist() if hasattr(v, "tolist") else vars(v))

    @classmethod
    def from_json(cls, text: str) -> Symmetry:
        """The symmetry that `to_json` wrote."""
        groups, pinned, train = json.loads(text).values()

        def group(size: int, *rest: Any) -> Group:
            def place(p: dict[str, Any]) -> Place:
                return Place(p["name"], tuple(p["axes"]), np.array(p["index"]))

            places, post, pre = (tuple(map(place, ps)) for ps in rest[:3])
            return Group(size, places, post, pre, tuple(map(tuple, rest[3])))

        found = {n: group(*g.values()) for n, g in groups.items()}
        return cls(found, tuple(Pinned(**p) for p in pinned), train)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symmetry) and self.to_json() == other.to_json()


def jitter(t: Tensor, generator: torch.Generator) -> Tensor:
    """Float64; each entry scaled by about 1, equal ones moved apart; positive ones stay so.

    Weights that are tiny for their fan-in (as heads may start) are scaled up, so that they count.
    """
    if not t.is_floating_point() or not t.numel():
        return t.detach()
    t = t.detach().double()
    noise = torch.rand(2, *t.shape, dtype=t.dtype, generator=generator).to(t.device)
    if bool((t == t.flatten()[0]).all()):
        return t * (0.75 + noise[0] / 2) + 0.1 * noise[1]
    reach = float(t.std()) * t[0].numel() ** 0.5 if t.dim() > 1 else 1.0
    return t * (0.75 + noise[0] / 2) / (reach if 0 < reach < 0.1 else 1)


def find(net: nn.Module, example: Inputs, train: bool = False) -> Symmetry:
    """The permutation symmetries of `net`, by following its units through one run.

    example: an input with its batch in front, a tuple of inputs, or a mapping of keywords; only
    shapes count. train: find those of training mode, in which auxiliary heads exist. The network is
    not changed. Raises SymmetryError where it cannot be followed: control flow on data. What is not
    understood is pinned, never guessed: see `Symmetry.pinned`, `Symmetry.explain`;
    `Symmetry.verify` proves.
    """
    return Symmetry(*discover(net, calls.plain(example), train), train)
