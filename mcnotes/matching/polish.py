"""Better orders by the weights, from any order: exchanges of units, and several starts (chapter 9).

Weight matching ends where no group alone can be ordered better. It may still help to exchange two
units at a small loss, if another group can then be ordered so that more is won.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mcnotes.checks import require, whole
from mcnotes.curves import Theta
from mcnotes.matching import weights
from mcnotes.matching.pair import PAIRED, Pair
from mcnotes.symmetry import Perm, Symmetry, permutations

Search = Callable[[Pair, Perm | None, int], Perm]  # from a start (None: its own) and a seed


def polish(pair: Pair, perm: Perm, *, tries: int = 50, sweeps: int = 100) -> Perm:
    """A permutation of which ⟨θ_A, Pθ_B⟩ is no smaller than of `perm`, by exchanges of two units.

    Units and blocks of all layers take part. A sweep makes all exchanges that gain, group by group,
    the gains of all of them at once. Where there is none, it tries the `tries` exchanges that lose
    least, each followed by the best ones that then gain in any group, and keeps what gains in all.
    It ends when nothing does, at the latest after `sweeps`. Raises ValueError for a permutation
    that does not fit, and for weights that are not finite.
    """
    given = {"pair": pair, "tries": tries, "sweeps": sweeps}
    require("polish", given, PAIRED | {"tries": whole(0), "sweeps": whole(1)})
    here = _Order.of(pair, pair.sym.complete(perm))
    if not pair.sym.groups:
        return here.perm
    for _ in range(sweeps):
        if (better := here.better(tries)) is None:
            break
        here = better
    return here.perm


def best_of_starts(pair: Pair, search: Search, starts: int, seed: int) -> Perm:
    """Of the results of so many searches, the one of the largest ⟨θ_A, Pθ_B⟩.

    The first begins where it does by itself, the others at random permutations drawn from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [search(pair, None, seed)]
    found += [search(pair, pair.sym.random(generator), seed) for _ in range(starts - 1)]
    return max(found, key=lambda perm: _Order.of(pair, perm).value)


class _Order(NamedTuple):
    """Where the units of B stand, and how well that agrees with A: see `weights.compared`."""

    sym: Symmetry
    fixed: Theta
    perm: Perm
    here: Theta
    value: float

    @classmethod
    def of(cls, pair: Pair, perm: Perm) -> "_Order":
        a, b = weights.compared(pair, "polish")
        fixed, here = {n: a.theta[n] for n in pair.names}, pair.sym.permute(b.theta, perm)
        value = float(weights.agreement(fixed, here))
        return cls(pair.sym, fixed, perm, here, value)

    def after(self, step: Perm) -> "_Order":
        """The order after one step more."""
        here = self.sym.permute(self.here, step)
        value = float(weights.agreement(self.fixed, here))
        return self._replace(perm=self.sym.compose(self.perm, step), here=here, value=value)

    def gains(self) -> dict[str, Tensor]:
        """By group, what an exchange of units i and j adds to the value: [n, n].

        Exact but for groups that stand on several axes of one tensor.
        """
        eyes = {n: torch.eye(g.size, dtype=torch.float64) for n, g in self.sym.groups.items()}
        leaves = {n: x.requires_grad_() for n, x in eyes.items()}
        value = weights.agreement(self.fixed, self.sym.apply_matrices(self.here, leaves))
        value = value + 0 * sum(x.sum() for x in leaves.values())  # units in buffers alone
        slopes = torch.autograd.grad(value, [*leaves.values()])
        found = {}
        for name, slope in zip(leaves, slopes, strict=True):
            kept = slope.diagonal()
            found[name] = slope + slope.T - kept - kept[:, None]
        return found

    def betters(self, other: "_Order") -> bool:
        """Does it agree with A better than another order, by more than rounding?"""
        return weights.gains(self.fixed, other.here, self.here)

    def exchanged(self, start: "_Order") -> "_Order | None":
        """After exchanges in one group, if they make it better than `start`; else None."""
        offers = [(name, *_exchanges(gains)) for name, gains in self.gains().items()]
        for name, step, gain in sorted(offers, key=lambda offer: -offer[2]):
            if self.value + gain <= start.value:
                return None
            if (found := self.after({name: step})).betters(start):
                return found
        return None

    def better(self, tries: int) -> "_Order | None":
        """After exchanges that gain; else after one of the least bad, and others that make up."""
        if found := self.exchanged(self):
            return found
        for name, i, j in _least_bad(self.gains(), tries):
            swap = permutations.identity(self.sym.groups[name].size)
            swap[[i, j]] = swap[[j, i]]
            moved = self.after({name: swap})
            if moved.betters(self):  # its gain was not exact
                return moved
            if found := moved.exchanged(self):
                return found
        return None


def _least_bad(gains: dict[str, Tensor], tries: int) -> list[tuple[str, int, int]]:
    """The exchanges of the largest gains: a group and its two units."""
    every: list[tuple[float, str, int, int]] = []
    for name, gain in gains.items():
        i, j = torch.triu_indices(len(gain), len(gain), offset=1)
        best = gain[i, j].topk(min(tries, len(i)))
        chosen = i[best.indices].tolist(), j[best.indices].tolist()
        every += zip(best.values.tolist(), [name] * len(chosen[0]), *chosen, strict=True)
    return [(name, i, j) for _, name, i, j in sorted(every, reverse=True)[:tries]]


def _exchanges(gains: Tensor) -> tuple[Tensor, float]:
    """Exchanges that gain, largest first, each unit in one at most: the order, and their sum."""
    order, total = permutations.identity(len(gains)), 0.0
    left = gains.triu(1)
    while (gain := float(left.max())) > 0:
        i, j = divmod(int(left.argmax()), len(left))
        order[[i, j]] = order[[j, i]]
        total += gain
        left[[i, j]] = 0
        left[:, [i, j]] = 0
    return order, total
