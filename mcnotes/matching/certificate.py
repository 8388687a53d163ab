"""How good can a permutation of weights be at best? Upper bounds, from duality (chapter 9).

Weight matching is a local search: when it ends, a better permutation may exist. The agreement
⟨θ_A, Pθ_B⟩ is a sum of terms, each linear in the matrix of one group or bilinear in those of two.
A linear term is part of an assignment. A bilinear one, of matrices P and Q,

    Σ P[i,j] Q[k,l] T[i,j,k,l],   T = U + V,

is at most what assignments with U give to the pairs (i, j), and with V to the pairs (k, l): to
each the best Q (or P) *of its own* (Gilmore 1962; Lawler 1963). That holds for every split of T. An
assignment leaves entries that could grow, by their reduced costs, without a better value; moving
that slack from U to V and from V to U lowers the bound, step by step (Hahn and Grant 1998). Where
T is too large for that, U and V take a row's (or column's) sorted entries. The sum of products of
sorted singular values, which holds for all orthogonal P and Q (von Neumann 1937), is not used: for
trained networks it is larger, term by term (`tests/test_matching_certificate.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mcnotes.checks import require, whole
from mcnotes.matching.assignment import assign, bundles
from mcnotes.matching.pair import PAIRED, Pair, magnitude, scaled
from mcnotes.symmetry import Perm, Symmetry

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
LARGEST = 2**22  # numbers of a bilinear term: 32 MB; of a larger one the bound is not improved


class Certificate(NamedTuple):
    """The cosine of θ_A and Pθ_B for a permutation P, and a number that no permutation exceeds."""

    cosine: float
    bound: float

    @property
    def gap(self) -> float:
        """By how much the cosine could still grow at most; 0: nothing is better."""
        return max(0.0, self.bound - self.cosine)

    def __repr__(self) -> str:
        return f"Certificate(cosine {self.cosine:.4f}, none above {self.bound:.4f})"


def certify(pair: Pair, perm: Perm, *, steps: int = 20) -> Certificate:
    """The cosine of the weights under `perm`, and an upper bound over all permutations.

    steps: at most so many improvements of the bound. Each solves n² assignments of m units, and m²
    of n units, for every two groups of n and m units that meet in a tensor. Where n·m > 2,048 the
    first bound is kept. Tensors with units on three axes, or with blocks of units (attention
    heads), have the bound of sorted entries, which is weak. Raises ValueError for a permutation
    that does not fit, and for weights that are not finite.
    """
    require("certify", {"pair": pair, "steps": steps}, PAIRED | {"steps": whole(0)})
    pair.check_finite("certify")
    pair.check_real("certify")
    names = pair.names
    # A cosine does not see a positive factor; without it squares might vanish or overflow.
    ends = [scaled(names, x, magnitude(names, x)) for x in (pair.theta_a, pair.theta_b)]
    placed = pair.sym.permute(ends[1], perm)
    a, b, moved = ({n: theta[n].cpu().numpy() for n in names} for theta in (*ends, placed))
    value = sum(float((a[n] * moved[n]).sum()) for n in names)
    scale = float(np.sqrt(sum((x**2).sum() for x in a.values())))
    scale *= float(np.sqrt(sum((x**2).sum() for x in b.values())))
    if not scale:
        raise ValueError("certify: all weights of a network are 0, so that there is no cosine")
    agreement = Agreement(pair, a, b)
    # Of sums of so many products, once and for every step.
    rounding = np.finfo(np.float64).eps * sum(x.size for x in a.values()) * (steps + 2)
    bound = agreement.bound(value, steps, enough=1e-6 * scale) / scale + float(rounding)
    return Certificate(value / scale, bound)


@dataclass
class Term:
    """What two groups have in common: T[i,j,k,l] for unit i at j's place, and unit k at l's."""

    groups: tuple[str, str]
    first: Array  # U [n, n, m, m]
    second: Array  # V, likewise


@dataclass(eq=False)
class Agreement:
    """⟨θ_A, Pθ_B⟩ as a sum of a constant, linear terms [n, n] of groups, and bilinear ones."""

    pair: Pair
    a: dict[str, Array]
    b: dict[str, Array]
    constant: float = 0.0
    linear: dict[str, Array] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = self.pair.sym.groups
        self.linear = {name: np.zeros((g.size, g.size)) for name, g in groups.items()}
        for name in self.a:
            sides = self._sides(name)
            if sides is None:  # the rearrangement inequality holds for any order of the entries
                self.constant += float(np.sort(self.a[name], None) @ np.sort(self.b[name], None))
                continue
            for rows in sides[0]:
                for columns in sides[1]:
                    self._add(rows, columns, *self._parts(name, sides, rows, columns))

    def bound(self, value: float, steps: int, enough: float) -> float:
        """The bound after `steps` steps, or when it is as near to `value` or stands, by `enough`.

        value: of some permutation.
        """
        best = np.inf
        for step in range(steps + 1):
            solved = self._solve()
            gain, best = best - solved.total, min(best, solved.total)
            if best - value <= enough or gain <= enough or step == steps or not self.terms:
                break
            self._move_slack(solved)
        return best

    def _solve(self) -> "Solved":
        """The bound of the present splits, and the assignments that attain it."""
        costs, inner = {name: x.copy() for name, x in self.linear.items()}, []
        for term in self.terms:
            for name, part in zip(term.groups, (term.first, term.second), strict=True):
                sums, chosen = _best_sums(part)
                costs[name] += sums
                inner.append(chosen)
        outer = {name: _assigned(cost) for name, cost in costs.items()}
        total = self.constant
        for name, cost in costs.items():
            total += float(np.take_along_axis(cost, outer[name][:, None], 1).sum())
        return Solved(total, costs, outer, inner)

    def _move_slack(self, solved: "Solved") -> None:
        """Let each side of each term give one half of its slack to the other side."""
        share = Counter(name for term in self.terms for name in term.groups)
        outer = {n: _slack(solved.costs[n], solved.outer[n]) / k for n, k in share.items()}
        chosen = iter(solved.inner)
        for term in self.terms:
            one, other = (
                _slack(part, next(chosen)) + outer[name][:, :, None, None] / part.shape[-1]
                for name, part in zip(term.groups, (term.first, term.second), strict=True)
            )
            change = (one - other.transpose(2, 3, 0, 1)) / 2
            term.first += change
            term.second -= change.transpose(2, 3, 0, 1)

    def _sides(self, name: str) -> "tuple[list[Side], list[Side]] | None":
        """What moves along (at most) two axes of a parameter; None where more is going on."""
        axes: dict[tuple[int, ...], list[Side]] = {}
        for group, g in self.pair.sym.groups.items():
            for place in (p for p in g.places if p.name == name):
                if g.inner:
                    return None
                axes.setdefault(place.axes, []).append(Side(group, place.axes, place.index))
        taken = [axis for several in axes for axis in several]
        if len(axes) > 2 or len(taken) != len(set(taken)):
            return None
        shape, sides = self.a[name].shape, []
        for several, moving in axes.items():
            positions = np.concatenate([side.index.ravel() for side in moving])
            count = int(np.prod([shape[axis] for axis in several]))
            if len(positions) != len(set(positions.tolist())):
                return None
            rest = np.setdiff1d(np.arange(count), positions)
            sides.append([*moving, *([Side("", several, rest[None])] if len(rest) else [])])
        nothing = [Side("", (), np.zeros((1, 1), np.int64))]
        return sides[0] if sides else nothing, sides[1] if len(sides) > 1 else nothing

    def _parts(
        self, name: str, sides: "tuple[list[Side], list[Side]]", rows: "Side", columns: "Side"
    ) -> Iterator[Array]:
        """Of A's and of B's parameter the entries of two sides: [units, units, entries]."""
        for theta in (self.a, self.b):
            x, axes = theta[name], (rows.axes, columns.axes)
            x = np.moveaxis(x, [*axes[0], *axes[1]], range(len(axes[0]) + len(axes[1])))
            lengths = [int(np.prod(x.shape[: len(axes[0])]))]
            lengths.append(int(np.prod(x.shape[len(axes[0]) : len(axes[0]) + len(axes[1])])))
            x = x.reshape(*lengths, -1)[rows.index][:, :, columns.index]
            n, m = len(rows.index), len(columns.index)
            yield x.transpose(0, 2, 1, 3, 4).reshape(n, m, -1)

    def _add(self, rows: "Side", columns: "Side", a: Array, b: Array) -> None:
        """Add what these entries of A and B [n, m, r] have in common."""
        if not rows.group and not columns.group:
            self.constant += float((a * b).sum())
        elif not columns.group:
            self.linear[rows.group] += a.reshape(len(a), -1) @ b.reshape(len(b), -1).T
        elif not rows.group:
            self._add(columns, rows, a.transpose(1, 0, 2), b.transpose(1, 0, 2))
        elif (a.shape[0] * a.shape[1]) ** 2 <= LARGEST:
            half = np.einsum("ikr,jlr->ijkl", a, b, optimize=True) / 2
            pair = (rows.group, columns.group)
            self.terms.append(Term(pair, half, half.transpose(2, 3, 0, 1).copy()))
        else:  # as with U = V and, for each entry, an order of its own
            for side, axis in ((rows, 1), (columns, 0)):
                x, y = (np.sort(z, axis).swapaxes(0, 1 - axis) for z in (a, b))
                self.linear[side.group] += x.reshape(len(x), -1) @ y.reshape(len(y), -1).T / 2


@dataclass(frozen=True)
class Side:
    """Along some axes of a parameter: a group's units, or ("") what stays as one."""

    group: str
    axes: tuple[int, ...]
    index: Integers  # [units, entries of each]


class Solved(NamedTuple):
    """A bound, and the assignments that attain it."""

    total: float
    costs: dict[str, Array]  # of each group [n, n]
    outer: dict[str, Integers]  # of each group [n]
    inner: list[Integers]  # of both sides of each term: [n, n, m], [m, m, n]


def _assigned(score: Array) -> Integers:
    return np.asarray(linear_sum_assignment(score, maximize=True)[1], np.int64)


def _best_sums(scores: Array) -> tuple[Array, Integers]:
    """For scores [n, n, m, m], the largest sums [n, n], and the assignments [n, n, m]."""
    n, _, m, _ = scores.shape
    chosen = np.stack([_assigned(x) for x in scores.reshape(n * n, m, m)]).reshape(n, n, m)
    return np.take_along_axis(scores, chosen[..., None], 3).sum((2, 3)), chosen


def _slack(scores: Array, chosen: Integers) -> Array:
    """By how much each of scores [..., m, m] could grow alone; chosen [..., m]: the best.

    The reduced costs.
    """
    own = np.take_along_axis(scores, chosen[..., None], -1)
    columns = _potentials(scores, chosen)
    rows = own - np.take_along_axis(columns, chosen, -1)[..., None]
    return np.maximum(rows + columns[..., None, :] - scores, 0)


def _potentials(scores: Array, chosen: Integers) -> Array:
    """Of the columns of scores [..., m, m]: longest paths [..., m], by Bellman and Ford."""
    own = np.take_along_axis(scores, chosen[..., None], -1)
    columns = np.zeros(scores.shape[:-1])
    for _ in range(scores.shape[-1]):
        through = np.take_along_axis(columns, chosen, -1)[..., None] - own + scores
        longer = np.maximum(columns, through.max(-2))
        if np.array_equal(longer, columns):
            break
        columns = longer
    return columns


def duals(score: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers u, v [n] with u[i] + v[j] ≥ score[i, j] everywhere: Σu + Σv is above every sum.

    score: [n, n]; p [n]: an assignment. If it is a best one, `score[i, p[i]]` is u[i] + v[p[i]] for
    each i, up to rounding, which proves that it is (complementary slackness).
    """
    x = score.detach().cpu().double()
    v = torch.from_numpy(_potentials(x.numpy(), p.numpy()))
    return (x - v).max(1).values, v


def shortfall(sym: Symmetry, similar: Mapping[str, Tensor], perm: Perm) -> float:
    """By how much any permutation could bring more similarity together than `perm`, at most.

    similar: by group [U, U], as in `assignment.solve`, of blocks over the units of all; groups that
    are not in it do not count. By the duals of every assignment, so that nothing rests on the
    search.
    """
    left = 0.0
    for bundle in (b for b in bundles(sym) if all(names[0] in similar for names in b.kinds)):
        count, reached = len(bundle.blocks), 0.0
        score = torch.zeros(count, count, dtype=torch.float64)
        for names in bundle.kinds:
            tiles = bundle.tiles(similar[names[0]]).double()
            for i, j in product(range(count), repeat=2):
                score[i, j] += _dual_sum(tiles[i, j])
            for i, j in enumerate(bundle.partners(perm)):
                reached += float(tiles[i, j].gather(1, perm[names[j]][:, None]).sum())
        left += _dual_sum(score) - reached
    return max(left, 0.0)


def _dual_sum(score: Tensor) -> float:
    u, v = duals(score, assign(score))
    return float(u.sum() + v.sum())
