"""The orders of all layers at once, by Frank–Wolfe over mixtures of permutations (chapter 9).

Weight matching changes one group at a time. Here each group has a doubly stochastic matrix, and all
move together, each towards the permutation that the slope of the agreement points at (Crisostomi et
al. 2024, after Frank and Wolfe 1956). On the way from one point to the next the agreement is a
polynomial of low degree, so that the best step is found exactly. An assignment for each group
rounds the end to permutations.

With several networks, all but the first move, and the agreement is summed over all pairs: each has
one order in a space that they share, so that no cycle of them contradicts itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor, nn

from mcnotes.checks import require, whole
from mcnotes.curves import Theta
from mcnotes.matching import doubly_stochastic, weights
from mcnotes.matching.assignment import Bundle, assign, bundles, solve
from mcnotes.matching.pair import PAIRED, Pair, magnitude, scaled
from mcnotes.symmetry import Perm, Symmetry

ENOUGH = 1e-7  # of the product of the lengths (`weights.Movable`): what a step must gain


def frank_wolfe(pair: Pair, *, start: Perm | None = None, steps: int = 100) -> Perm:
    """A permutation P that makes ⟨θ_A, Pθ_B⟩ large: all groups at once (Crisostomi et al. 2024).

    It begins at the centre, where every unit of B stands in each place alike, or half-way from
    there to `start`, and ends when no direction gains, or after `steps`. The rounded end need not
    be a local optimum; `polish` makes it one. No data is needed. Raises ValueError for weights
    that are not finite.
    """
    require("frank_wolfe", {"pair": pair, "steps": steps}, PAIRED | {"steps": whole(1)})
    a, b = weights.compared(pair, "frank_wolfe")
    moving = Mixture.central(pair.sym, b.theta, start)
    fixed = {name: a.theta[name] for name in pair.names}
    return _climb(fixed, [moving], steps, ENOUGH * a.length * b.length)[0]


def common_orders(
    net: nn.Module, thetas: Sequence[Theta], sym: Symmetry, steps: int = 100
) -> list[Perm]:
    """For each of several networks a permutation into the order of the first, which stays.

    They make the agreement large, summed over all pairs. As `frank_wolfe`; each starts half-way to
    its own match with the first.
    """
    pairs = [Pair(net, sym, thetas[0], theta) for theta in thetas[1:]]
    names = pairs[0].names
    size = magnitude(names, *thetas)  # of all: how large one is beside another counts
    first, *others = (weights.movable(sym, names, scaled(names, x, size)) for x in thetas)
    moving = [
        Mixture.central(sym, other.theta, frank_wolfe(pair, steps=steps))
        for pair, other in zip(pairs, others, strict=True)
    ]
    reach = sum(x.length * y.length for x, y in combinations([first, *others], 2))
    fixed = {name: first.theta[name] for name in names}
    return [sym.identity(), *_climb(fixed, moving, steps, ENOUGH * reach)]


@dataclass(frozen=True, eq=False)
class Mixture:
    """One network in a mixture of orders: even · centre + Σₖ sharesₖ Pₖ, acting bundle by bundle.

    Groups of units have one matrix each. Blocks and the units within move together, so that their
    mixture is kept as it is.
    """

    sym: Symmetry
    theta: Theta  # before anything acts
    matrices: dict[str, Tensor]  # of the groups that are no blocks and in none
    even: float = 1.0
    shares: tuple[float, ...] = ()
    orders: tuple[Perm, ...] = ()
    nested: dict[str, Symmetry] = field(default_factory=dict)  # by bundle: that of its units alone

    @classmethod
    def central(cls, sym: Symmetry, theta: Theta, start: Perm | None = None) -> Mixture:
        """The centre, or the point half-way from there to `start`."""
        parts = bundles(sym)
        sizes = {b.name: sym.groups[b.name].size for b in parts if not b.nested}
        nested = {b.name: weights.symmetry_of(sym, b) for b in parts if b.nested}
        centre = cls(sym, theta, {name: _even(n) for name, n in sizes.items()}, nested=nested)
        return centre if start is None else centre.towards(sym.complete(start), 0.5)

    @property
    def parts(self) -> list[Bundle]:
        """The bundles of the network."""
        return bundles(self.sym)

    def towards(self, order: Perm, step: float) -> Mixture:
        """The mixture on the way to `order`, after the share `step` of it."""
        matrices = {
            name: (1 - step) * x + step * doubly_stochastic.matrix(order[name])
            for name, x in self.matrices.items()
        }
        shares = [((1 - step) * w, p) for w, p in zip(self.shares, self.orders, strict=True)]
        kept = [(w, p) for w, p in [*shares, (step, order)] if w > 0]
        return replace(
            self,
            matrices=matrices,
            even=(1 - step) * self.even,
            shares=tuple(w for w, _ in kept),
            orders=tuple(p for _, p in kept),
        )

    def blocks_mixed(self, but: str = "") -> Theta:
        """The weights under the mixture of blocks, of all bundles but one."""
        out = dict(self.theta)
        for name, own in self.nested.items():
            if name == but:
                continue
            near = {n: out[n] for n in own.shapes}
            even = {n: _even(g.size) for n, g in own.groups.items()}
            mixed = [(self.even, own.apply_matrices(near, even))] if self.even else []
            for w, p in zip(self.shares, self.orders, strict=True):
                mixed.append((w, own.permute(near, {n: p[n] for n in own.groups})))
            for n in (n for n, x in near.items() if x.is_floating_point()):
                out[n] = torch.stack([w * moved[n] for w, moved in mixed]).sum(0)
        return out

    def placed(self, but: str = "") -> Theta:
        """The weights under the mixture; but: a bundle of blocks that stays."""
        return self.sym.apply_matrices(self.blocks_mixed(but), self.matrices)

    def ahead(self, fixed: Theta) -> Perm:
        """The order that the slope of the agreement with `fixed` points at."""
        compare = partial(weights.agreement, fixed)
        leaves = {n: x.clone().requires_grad_() for n, x in self.matrices.items()}
        value = compare(self.sym.apply_matrices(self.blocks_mixed(), leaves))
        order: Perm = {}
        if leaves:
            value = value + 0 * torch.stack([x.sum() for x in leaves.values()]).sum()
            slopes = torch.autograd.grad(value, [*leaves.values()])
            order = {n: assign(x) for n, x in zip(leaves, slopes, strict=True)}
        for bundle in (b for b in self.parts if b.nested):
            own, rest = self.nested[bundle.name], self.placed(but=bundle.name)
            near = {n: rest[n].detach() for n in own.shapes}
            order |= weights.best_order(own, bundle, near, compare)
        return order

    def rounded(self) -> Perm:
        """The nearest permutations."""
        perm = {name: assign(x) for name, x in self.matrices.items()}
        for bundle in (b for b in self.parts if b.nested):
            perm |= solve(bundle, [self._tiles(bundle, names) for names in bundle.kinds])
        return perm

    def _tiles(self, bundle: Bundle, names: tuple[str, ...]) -> Tensor:
        """How much of each unit stands in each place, in blocks [blocks, blocks, n, n]."""
        count, n = len(names), self.sym.groups[names[0]].size
        tiles = torch.zeros(count, count, n, n, dtype=torch.float64)
        for w, p in zip(self.shares, self.orders, strict=True):
            for i, j in enumerate(bundle.partners(p)):
                tiles[i, j] += w * doubly_stochastic.matrix(p[names[j]])
        return tiles

    @property
    def degree(self) -> int:
        """The weights are polynomials in a step: of as many matrices as act on one tensor."""
        axes = {(at.name, at.axes) for g in self.matrices for at in self.sym.groups[g].places}
        blocks = [name for own in self.nested.values() for name in own.shapes]
        return max(Counter([*(name for name, _ in axes), *blocks]).values(), default=0)


def _even(size: int) -> Tensor:
    return torch.full((size, size), 1 / size, dtype=torch.float64)


def _climb(fixed: Theta, moving: list[Mixture], steps: int, enough: float) -> list[Perm]:
    """The rounded end of Frank–Wolfe steps of all networks at once; `fixed` is the first.

    enough: what a step must gain.
    """
    degree = max(m.degree for m in moving) * min(len(moving), 2)
    for _ in range(steps):
        placed = [m.placed() for m in moving]
        orders = []
        for k, m in enumerate(moving):
            others = [fixed, *placed[:k], *placed[k + 1 :]]
            orders.append(m.ahead({n: torch.stack([x[n] for x in others]).sum(0) for n in fixed}))
        step, gain = _best_step(partial(_value, fixed, moving, orders), degree)
        if gain <= enough:
            break
        moving = [m.towards(p, step) for m, p in zip(moving, orders, strict=True)]
    return [m.rounded() for m in moving]


def _value(fixed: Theta, moving: list[Mixture], orders: list[Perm], step: float) -> float:
    """The agreement of all pairs, after the share `step` of the way to these orders."""
    ahead = (m.towards(p, step).placed() for m, p in zip(moving, orders, strict=True))
    every = combinations([fixed, *({n: x[n] for n in fixed} for x in ahead)], 2)
    return sum(float(weights.agreement(x, y)) for x, y in every)


def _best_step(value: Callable[[float], float], degree: int) -> tuple[float, float]:
    """Where in [0, 1] a polynomial is largest, and by how much it exceeds its value at 0."""
    nodes = (1 - np.cos(np.pi * np.arange(degree + 1) / max(degree, 1))) / 2
    found = Chebyshev.fit(nodes, [value(float(t)) for t in nodes], degree, domain=[0, 1])
    roots = np.asarray(found.deriv().roots(), complex)
    turns = [t.real for t in roots.tolist() if abs(t.imag) < 1e-9 and 0 < t.real < 1]
    step = max([0.0, *turns, 1.0], key=lambda t: float(found(t)))
    return step, float(found(step) - found(0.0))
