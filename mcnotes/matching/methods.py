"""Every way to match two networks, behind one call (chapters 4 and 9)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mcnotes import display
from mcnotes.calls import Batches
from mcnotes.checks import flag, require, whole
from mcnotes.matching.activations import (
    ARGUMENTS,
    At,
    Cost,
    Moments,
    Streams,
    align,
    similarity,
    stream,
)
from mcnotes.matching.assignment import Bundle, bundles
from mcnotes.matching.cca import canonical
from mcnotes.matching.certificate import certify, shortfall
from mcnotes.matching.frank_wolfe import frank_wolfe
from mcnotes.matching.loss import ACTIONS, Descent, check_descent, loss_matching
from mcnotes.matching.pair import PAIRED, Pair
from mcnotes.matching.polish import Search, best_of_starts, polish
from mcnotes.matching.weights import weight_matching
from mcnotes.names import suggest
from mcnotes.symmetry import Perm, Symmetry

if TYPE_CHECKING:
    from pandas import DataFrame


COLUMNS = ["group", "units", "before", "after", "dead", "ambiguous"]


@dataclass(frozen=True, eq=False)
class Matching:
    """A permutation of network B's units, and how well the matched units agree, by group of A.

    Blocks (attention heads, groups of channels) agree as well as the units within, on average.
    """

    perm: Perm  # apply with `sym.permute(theta_b, matching.perm)`
    before: dict[str, Tensor]  # [U], correlation of A's unit i with B's, mean over the taps
    after: dict[str, Tensor]  # [U]
    dead: dict[str, Tensor]  # units of A that are constant; their partners are arbitrary
    ambiguous: dict[str, Tensor]  # units of A to which another of B is as similar within 0.01
    seconds: float
    left: Callable[[Perm], float] | None = field(default=None, repr=False)  # see `gap`

    @cached_property
    def gap(self) -> float | None:
        """How far from the best possible the permutation may be, at most, in what it aims at.

        By activations, or their canonical correlations, in summed similarity: 0 up to rounding,
        which the duals of the assignments prove (`certificate.duals`). By weights, in the cosine of
        the weights (`certify`): computed when it is first asked for, in seconds to minutes, of
        copies of both networks, which the matching keeps for it. None for methods of whose aim no
        bound is known: the loss, and the orders that aim at nothing.
        """
        return self.left(self.perm) if self.left else None

    def __repr__(self) -> str:
        if not self.before:
            return f"Matching({len(self.perm)} groups, of which none is seen)"
        before, after = (
            float(torch.cat([x for n, x in units.items() if n in self.dead]).mean())
            for units in (self.before, self.after)
        )
        return f"Matching({len(self.perm)} groups, correlation {before:.2f} → {after:.2f})"

    def _repr_html_(self) -> str:
        return display.described(self, self.table().to_html(index=False, float_format="%.2f"))

    def table(self) -> DataFrame:
        """A row for each group: units; mean correlation with their partners, before and after.

        Then how many units are dead, and how many ambiguous. Units that are not seen have none.
        """
        import pandas  # takes half a second

        def mean(found: dict[str, Tensor], name: str) -> float:
            return float(found[name].mean()) if name in found else float("nan")

        rows = [
            {
                "group": name,
                "units": len(p),
                "before": mean(self.before, name),
                "after": mean(self.after, name),
                "dead": len(self.dead.get(name, ())),
                "ambiguous": len(self.ambiguous.get(name, ())),
            }
            for name, p in self.perm.items()
        ]
        return pandas.DataFrame(rows, columns=COLUMNS)


Method = Callable[[Pair, Any, int], Perm]  # of the batches and a seed


def _by_loss(how: Descent) -> Method:
    return lambda pair, images, seed: loss_matching(pair, images, how, seed=seed)


DESCENTS = {action: Descent(action) for action in ACTIONS}
DESCENTS |= {f"{action}-both": Descent(action, both=True) for action in ACTIONS}
"""Methods that make the loss at the middle small."""


EXACT = ("activations", "cca")
"""Methods that compare what units do: the best pairing of each group is found at once."""
SEARCHES: dict[str, Search] = {
    "weights": lambda pair, start, seed: weight_matching(pair, start=start, seed=seed),
    "frank-wolfe": lambda pair, start, _: frank_wolfe(pair, start=start),
}
"""Methods that make the weights agree, each a search from a start that ends where it may."""
METHODS: dict[str, Method] = {
    "weights": lambda pair, images, seed: weight_matching(pair, seed=seed),
    "frank-wolfe": lambda pair, images, seed: frank_wolfe(pair),
    **{name: _by_loss(how) for name, how in DESCENTS.items()},
    "random": lambda pair, images, seed: pair.sym.random(torch.Generator().manual_seed(seed)),
    "identity": lambda pair, images, seed: pair.sym.identity(),
}
"""All that are not in `EXACT`, by the name that `match` knows."""


def match(
    pair: Pair,
    images: Batches,
    *,
    method: str = "activations",
    at: At = "post",
    cost: Cost = "correlation",
    batch_size: int | None = None,
    seed: int = 0,
    restarts: int = 1,
    polished: bool = False,
) -> Matching:
    """A permutation of B's units; by default that which makes them most similar to A's.

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation" (paper, algorithm 1); "covariance"; or
    "l2", which minimises E‖a − Pb‖², the discrete 2-Wasserstein matching. batch_size: as in
    `stream`. Groups that several layers share (residual streams) sum the evidence of all their
    taps. Blocks and the units within are solved jointly and exactly; units that are not seen (axes
    of a table of coordinates), by their weights. method: "activations"; "cca", which ignores
    `cost`; or one of `METHODS` (chapter 9), which draw from `seed`, ignore `at` and `cost`, and
    whose `seconds` leave out the correlations of the report. restarts: of "weights" and
    "frank-wolfe", from how many starts to search; the closest weights win. polished: exchange units
    afterwards while that brings the weights closer (`polish`). Raises AlignmentError when there is
    nothing to correlate or it is not finite, or weights to be compared are not finite or complex;
    ValueError for a method that is not known or does not take these networks or images, and for
    restarts of one that has no start.
    """
    given = {"pair": pair, "cost": cost, "seed": seed, "restarts": restarts, "polished": polished}
    require("match", given, PAIRED | ARGUMENTS | {"restarts": whole(1), "polished": flag})
    if method not in (known := [*EXACT, *METHODS]):  # `stream` looks at the other arguments
        raise ValueError(f"match: got method {method!r}{suggest(method, known)}")
    if restarts > 1 and method not in SEARCHES:
        raise ValueError(
            f"match: got restarts {restarts} with method {method!r}, expected one of {[*SEARCHES]}"
        )
    if polished or method in SEARCHES:
        pair.check_finite("match")
        pair.check_real("match")
    if method in DESCENTS:
        check_descent(pair, images)
    start = time.perf_counter()
    moments = stream(pair, images, at=at, batch_size=batch_size)
    left: Callable[[Perm], float] | None = None
    if method in EXACT:
        if method == "cca":
            similar = canonical(pair, images, moments, at=at, batch_size=batch_size)
        else:
            similar = {n: similarity(taps, cost) for n, taps in moments.items() if taps}
        perm, left = align(pair, similar), partial(shortfall, pair.sym, similar)
    else:
        start = time.perf_counter()
        perm = search(pair, images, method, seed, restarts)
    if polished:
        perm = polish(pair, perm)
    if polished or method in SEARCHES:
        left = partial(_below_bound, _kept(pair))
    seconds = time.perf_counter() - start
    report = _report(perm, _seen(pair.sym, moments), moments, seconds)
    return replace(report, left=left)


def search(pair: Pair, images: Batches, method: str, seed: int = 0, restarts: int = 1) -> Perm:
    """What one of `METHODS` finds, or the best that one of `SEARCHES` finds from several starts."""
    if restarts > 1:
        return best_of_starts(pair, SEARCHES[method], restarts, seed)
    return METHODS[method](pair, images, seed)


def _kept(pair: Pair) -> Pair:
    """The same pair with copies of its tensors: these stay when the caller's are overwritten."""
    ends = ({n: x.detach().clone() for n, x in end.items()} for end in (pair.theta_a, pair.theta_b))
    theta_a, theta_b = ends
    return replace(pair, theta_a=theta_a, theta_b=theta_b)


def _below_bound(pair: Pair, perm: Perm) -> float:
    return certify(pair, perm).gap


def _seen(sym: Symmetry, moments: Streams) -> list[Bundle]:
    """The bundles of which every unit is seen at a tap at least."""
    return [b for b in bundles(sym) if all(moments[names[0]] for names in b.kinds)]


class _Agreement(NamedTuple):
    """How well the units [U] of one group agree; the fields are those of `Matching`."""

    before: Tensor
    after: Tensor
    dead: Tensor
    ambiguous: Tensor


def _agreement(standing: Tensor, matched: Tensor, p: Tensor, dead: Tensor) -> _Agreement:
    """Of one group of A. standing, matched: correlations [U, U] with the group of B in its place.

    `standing` before the matching, `matched` after, where p [U] pairs the units. dead: bool [U].
    """
    after = matched.gather(1, p[:, None])
    rivals = (matched > after - 0.01).sum(1) > 1
    ambiguous = (rivals & ~dead).nonzero().flatten()
    return _Agreement(standing.diagonal().clone(), after[:, 0], dead.nonzero().flatten(), ambiguous)


def _correlation(taps: list[Moments]) -> Tensor:
    """Mean over the taps: [U, U]."""
    return torch.stack([m.correlation() / len(taps) for m in taps]).sum(0)


def _report(perm: Perm, parts: list[Bundle], moments: Streams, seconds: float) -> Matching:
    """How well the units of these bundles agree that `perm` brings together."""
    units: dict[str, _Agreement] = {}
    blocks: dict[str, tuple[Tensor, Tensor]] = {}  # before and after: [blocks] each
    for bundle in parts:
        partners = bundle.partners(perm)
        for names in bundle.kinds:
            taps = moments[names[0]]
            tiles = bundle.tiles(_correlation(taps))
            constant = torch.stack([m.variances()[0] == 0 for m in taps]).all(0).cpu()
            dead = constant.view(len(names), -1)
            for i, j in enumerate(partners):
                p = perm[names[j]]
                units[names[i]] = _agreement(tiles[i, i], tiles[i, j], p, dead[i])
        if bundle.nested:
            before = [torch.cat([units[n].before for n in block]).mean() for block in bundle.blocks]
            after = [torch.cat([units[n].after for n in block]).mean() for block in bundle.blocks]
            blocks[bundle.name] = torch.stack(before), torch.stack(after)
    return Matching(
        perm,
        before={n: u.before for n, u in units.items()} | {n: b for n, (b, _) in blocks.items()},
        after={n: u.after for n, u in units.items()} | {n: a for n, (_, a) in blocks.items()},
        dead={n: u.dead for n, u in units.items()},
        ambiguous={n: u.ambiguous for n, u in units.items()},
        seconds=seconds,
    )
