"""Many networks in one order of units (chapter 9).

Permutations found pair by pair contradict each other: from A to B to C and back to A, units do not
return to their places. Here each network gets one permutation into an order that all share.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from mcnotes.calls import Batches
from mcnotes.checks import require, whole
from mcnotes.curves import Theta, combine
from mcnotes.matching.activations import ARGUMENTS, At, Cost, similarity, stream
from mcnotes.matching.assignment import Bundle, bundles, solve
from mcnotes.matching.frank_wolfe import common_orders
from mcnotes.matching.pair import Pair
from mcnotes.matching.weights import ENOUGH, weight_matching
from mcnotes.symmetry import Perm, Symmetry

Improve = Callable[[int, list[int], list[Perm]], Perm]
"""A better permutation of network k, matched to these others, as all of them lie."""
Similarities = dict[tuple[int, int, str], Tensor]  # i, j, group: [units of i, units of j]


def match_many(
    net: nn.Module,
    thetas: Sequence[Theta],
    images: Batches,
    sym: Symmetry,
    *,
    method: str = "activations",
    at: At = "post",
    cost: Cost = "correlation",
    batch_size: int | None = None,
    sweeps: int = 100,
) -> list[Perm]:
    """For each network a permutation into one common order: that of the first, which stays.

    They maximise the similarity summed over all pairs, so that no cycle contradicts itself. Methods
    "activations" and "weights": by coordinate ascent, one network at a time is matched to all
    others as they lie, until nothing gains or after `sweeps`. "frank-wolfe": by their weights, all
    layers of all networks at once (Crisostomi et al. 2024), in `sweeps` steps at most. Arguments as
    in `matching.match`; the methods by weights use no images; with activations, units that are not
    seen stay. Raises ValueError for fewer than two networks and for other methods, AlignmentError
    as there.
    """
    require("match_many", {"cost": cost, "sweeps": sweeps}, ARGUMENTS | {"sweeps": whole(1)})
    if not isinstance(thetas, list | tuple):
        raise ValueError(f"match_many: thetas: got a {type(thetas).__name__}, expected a list")
    if len(thetas) < 2:
        raise ValueError(f"match_many: got {len(thetas)} networks, expected at least 2")
    if method not in (known := ("activations", "weights", "frank-wolfe")):
        raise ValueError(f"match_many: got method {method!r}, expected one of {known}")
    for k in range(1, len(thetas)) if method != "activations" else ():
        pair = Pair(net, sym, thetas[0], thetas[k])
        pair.check_finite("match_many", ("1", str(k + 1)))
        pair.check_real("match_many")
    if method == "frank-wolfe":
        return common_orders(net, thetas, sym, steps=sweeps)
    if method == "weights":
        improve = _by_weights(net, thetas, sym)
    else:
        seen: Similarities = {}
        for i, j in combinations(range(len(thetas)), 2):
            pair = Pair(net, sym, thetas[i], thetas[j])
            moments = stream(pair, images, at=at, batch_size=batch_size)
            for name in (n for n, taps in moments.items() if taps):
                seen[i, j, name] = similarity(moments[name], cost)
                seen[j, i, name] = seen[i, j, name].T
        improve = _by_activations(sym, seen)
    return _common_order(sym, len(thetas), improve, sweeps)


def _common_order(sym: Symmetry, networks: int, improve: Improve, sweeps: int) -> list[Perm]:
    """For each network a permutation into the first one's order, from sweeps of `improve`."""
    perms, everyone = [sym.identity() for _ in range(networks)], range(networks)
    for sweep in range(sweeps):
        before = list(perms)
        for k in everyone if sweep else everyone[1:]:  # at first one after the other
            others = [i for i in everyone if i != k and (sweep or i < k)]
            perms[k] = improve(k, others, perms)
        moved = (torch.equal(p[n], q[n]) for p, q in zip(before, perms, strict=True) for n in p)
        if sweep and all(moved):
            break
    home = sym.inverse(perms[0])
    return [sym.compose(p, home) for p in perms]


def _by_weights(net: nn.Module, thetas: Sequence[Theta], sym: Symmetry) -> Improve:
    """Network k is matched by its weights to the mean of the others."""

    def improve(k: int, others: list[int], perms: list[Perm]) -> Perm:
        placed = [sym.permute(thetas[i], perms[i]) for i in others]
        mean = combine(placed, [1 / len(placed)] * len(placed))
        return weight_matching(Pair(net, sym, mean, thetas[k]), start=perms[k])

    return improve


def _by_activations(sym: Symmetry, seen: Similarities) -> Improve:
    """Network k is matched to the others by their similarities, which are summed."""
    parts = [b for b in bundles(sym) if all((0, 1, names[0]) in seen for names in b.kinds)]

    def improve(k: int, others: list[int], perms: list[Perm]) -> Perm:
        perm = dict(perms[k])
        for bundle in parts:
            similar = []  # for each kind of group: [units of the common order, units of k]
            for names in bundle.kinds:
                rows = [seen[i, k, names[0]][_units(bundle, names, perms[i])] for i in others]
                similar.append(torch.stack(rows).sum(0))
            better = perm | solve(bundle, [bundle.tiles(matrix) for matrix in similar])
            if _gains(bundle, similar, perm, better):
                perm = better
        return perm

    return improve


def _gains(bundle: Bundle, similar: list[Tensor], perm: Perm, better: Perm) -> bool:
    """Does `better` bring more similarity together in one bundle, by more than rounding?

    Of the units that move: beside others, which may vary far more, they would count for nothing.
    """
    gain, size = 0.0, 0.0
    for names, matrix in zip(bundle.kinds, similar, strict=True):
        old, new = (_units(bundle, names, p) for p in (perm, better))
        rows = (old != new).nonzero().flatten()
        one, two = matrix[rows, old[rows]], matrix[rows, new[rows]]
        gain += float((two - one).sum())
        size += float(one.abs().sum() + two.abs().sum())
    return gain > ENOUGH * size


def _units(bundle: Bundle, names: tuple[str, ...], perm: Perm) -> Tensor:
    """`perm` as an order [units] of the units of all blocks, one block after the other.

    names: the groups of one kind, one of each block.
    """
    inner = [perm[name] for name in names]
    return torch.cat([j * len(inner[j]) + inner[j] for j in bundle.partners(perm)])
