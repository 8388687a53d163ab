"""Every way to match two networks, behind one call (chapters 4 and 9)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mcnotes import display
from mcnotes.calls import Batches
from mcnotes.checks import require
from mcnotes.matching.activations import ARGUMENTS, At, Cost, Moments, Streams, similarity, stream
from mcnotes.matching.assignment import Bundle, bundles, solve
from mcnotes.matching.loss import ACTIONS, Descent, loss_matching
from mcnotes.matching.pair import Pair
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


def _by_loss(action: str) -> Method:
    return lambda pair, images, seed: loss_matching(pair, images, Descent(action), seed=seed)


METHODS: dict[str, Method] = {
    "weights": lambda pair, images, seed: weight_matching(pair, seed=seed),
    **{action: _by_loss(action) for action in ACTIONS},
    "random": lambda pair, images, seed: pair.sym.random(torch.Generator().manual_seed(seed)),
    "identity": lambda pair, images, seed: pair.sym.identity(),
}
"""All but alignment, by the name that `match` knows."""


def match(
    pair: Pair,
    images: Batches,
    *,
    method: str = "activations",
    at: At = "post",
    cost: Cost = "correlation",
    batch_size: int | None = None,
    seed: int = 0,
) -> Matching:
    """A permutation of B's units; by default that which makes them most similar to A's.

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation" (paper, algorithm 1); "covariance"; or
    "l2", which minimises E‖a − Pb‖², the discrete 2-Wasserstein matching. batch_size: as in
    `stream`. Groups that several layers share (residual streams) sum the evidence of all their
    taps. Blocks and the units within are solved jointly and exactly; units that are not seen (axes
    of a table of coordinates), by their weights. method: "activations" or one of `METHODS`
    (chapter 9), which draw from `seed`, ignore `at` and `cost`, and whose `seconds` leave out the
    correlations of the report. Raises AlignmentError when there is nothing to correlate, or it is
    not finite; ValueError for a method that is not known.
    """
    require("match", {"cost": cost, "seed": seed}, ARGUMENTS)  # `stream` looks at the others
    if method not in (known := ["activations", *METHODS]):
        raise ValueError(f"match: got method {method!r}{suggest(method, known)}")
    start = time.perf_counter()
    moments = stream(pair, images, at=at, batch_size=batch_size)
    if method == "activations":
        perm = _by_activations(pair, moments, cost)
    else:
        start = time.perf_counter()
        perm = METHODS[method](pair, images, seed)
    seconds = time.perf_counter() - start
    return _report(perm, _seen(pair.sym, moments), moments, seconds)


def _seen(sym: Symmetry, moments: Streams) -> list[Bundle]:
    """The bundles of which every unit is seen at a tap at least."""
    return [b for b in bundles(sym) if all(moments[names[0]] for names in b.kinds)]


def _by_activations(pair: Pair, moments: Streams, cost: Cost) -> Perm:
    """Neuron alignment (paper, algorithm 1); units that are not seen are matched by weights."""
    perm, seen = pair.sym.identity(), _seen(pair.sym, moments)
    for bundle in seen:
        similar = [similarity(moments[names[0]], cost) for names in bundle.kinds]
        perm |= solve(bundle, [bundle.tiles(matrix) for matrix in similar])
    unseen = {bundle.name for bundle in bundles(pair.sym)} - {bundle.name for bundle in seen}
    return weight_matching(pair, start=perm, only=unseen) if unseen else perm


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
