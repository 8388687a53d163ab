"""Every way to match two networks, behind one call (chapters 4 and 9)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcnotes import display
from mcnotes.calls import Batches
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.matching.activations import At, Cost, Streams, similarity, stream
from mcnotes.matching.assignment import Blocks, bundles, solve, tiles
from mcnotes.matching.loss import ACTIONS, loss_matching
from mcnotes.matching.weights import weight_matching
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


Method = Callable[[nn.Module, Theta, Theta, Any, Symmetry, int], Perm]


def _by_action(
    action: str, net: nn.Module, a: Theta, b: Theta, images: Split, sym: Symmetry, seed: int
) -> Perm:
    return loss_matching(net, a, b, images, sym, action=action, seed=seed)


METHODS: dict[str, Method] = {
    "weights": lambda net, a, b, _, sym, seed: weight_matching(net, a, b, sym, seed=seed),
    **{action: partial(_by_action, action) for action in ACTIONS},
    "random": lambda net, a, b, _, sym, seed: sym.random(torch.Generator().manual_seed(seed)),
    "identity": lambda net, a, b, _, sym, seed: sym.identity(),
}
"""All but alignment, by the name that `match` knows: from (net, A, B, images, sym, seed)."""


def match(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Batches, sym: Symmetry, *,
    method: str = "activations", at: At = "post", cost: Cost = "correlation",
    batch_size: int | None = None, seed: int = 0
) -> Matching:  # fmt: skip
    """A permutation of B's units; by default that which makes them most similar to A's.

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation" (paper, algorithm 1); "covariance"; or
    "l2", which minimises E‖a − Pb‖², the discrete 2-Wasserstein matching. Groups that several
    layers share (residual streams) sum the evidence of all their taps. Blocks and the units within
    are solved jointly and exactly; units that are not seen (axes of a table of coordinates), by
    their weights. method: "activations" or one of `METHODS` (chapter 9), which draw from
    `seed`, ignore `at` and `cost`, and whose `seconds` leave out the correlations of the report.
    Raises AlignmentError when the networks differ in shape, or there is nothing to correlate;
    ValueError for a method that is not known.
    """
    if method not in (known := ["activations", *METHODS]):
        raise ValueError(f"match: got method {method!r}, expected one of {known}")
    start = time.perf_counter()
    moments = stream(net, theta_a, theta_b, images, sym, at=at, batch_size=batch_size)
    parts = bundles(sym)
    seen = {n: b for n, b in parts.items() if all(moments[kind] for kind in b[0])}
    if method == "activations":
        perm = sym.identity()
        for name, blocks in seen.items():
            kinds = [similarity(moments[kind], cost) for kind in blocks[0]]
            perm |= solve(name, blocks, [tiles(kind, len(blocks)) for kind in kinds])
        if unseen := parts.keys() - seen.keys():
            perm = weight_matching(net, theta_a, theta_b, sym, start=perm, only=unseen)
    else:
        start = time.perf_counter()
        perm = METHODS[method](net, theta_a, theta_b, images, sym, seed)
    found = Matching(perm, {}, {}, {}, {}, time.perf_counter() - start)
    for name, blocks in seen.items():
        _report(name, blocks, moments, found)
    return found


def _report(name: str, blocks: Blocks, moments: Streams, found: Matching) -> None:
    """How well the units agree that `found.perm` brings together: fills in the rest of `found`."""
    nested = blocks != ((name,),)
    order = found.perm[name].tolist() if nested else [0]
    for names in zip(*blocks, strict=True):
        taps = moments[names[0]]
        correlation = torch.stack([m.correlation() / len(taps) for m in taps]).sum(0)
        similar = tiles(correlation, len(blocks))
        still = torch.stack([m.variances()[0] == 0 for m in taps]).all(0).cpu()
        for i, (j, dead) in enumerate(zip(order, still.chunk(len(blocks)), strict=True)):
            mine, p = names[i], found.perm[names[j]]
            after = similar[i, j].gather(1, p[:, None])
            rivals = (similar[i, j] > after - 0.01).sum(1) > 1
            found.before[mine], found.after[mine] = similar[i, i].diagonal().clone(), after[:, 0]
            found.dead[mine] = dead.nonzero().flatten()
            found.ambiguous[mine] = (rivals & ~dead).nonzero().flatten()
    if nested:
        for values in (found.before, found.after):
            values[name] = torch.stack([torch.cat([values[g] for g in b]).mean() for b in blocks])
