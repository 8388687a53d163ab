"""Many networks in one order of units (chapter 9).

Permutations found pair by pair contradict each other: from A to B to C and back to A, units do not
return to their places. Here each network gets one permutation into an order that all share.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from mcnotes.calls import Batches
from mcnotes.curves import Theta, combine
from mcnotes.matching.activations import At, Cost, similarity, stream
from mcnotes.matching.assignment import Blocks, bundles, solve, tiles
from mcnotes.matching.weights import weight_matching
from mcnotes.symmetry import Perm, Symmetry

Improve = Callable[[int, list[int], list[Perm]], Perm]
Seen = dict[tuple[int, int, str], Tensor]  # i, j, group: similarities [units of i, units of j]


def match_many(
    net: nn.Module, thetas: Sequence[Theta], images: Batches, sym: Symmetry, *,
    method: str = "activations", at: At = "post", cost: Cost = "correlation",
    batch_size: int | None = None, sweeps: int = 100
) -> list[Perm]:  # fmt: skip
    """For each network a permutation into one common order: that of the first, which stays.

    They maximise the similarity summed over all pairs by coordinate ascent: one network at a time
    is matched to all others as they lie, until nothing gains. No cycle contradicts itself then
    (Crisostomi et al. 2024 ask for the same, by Frank–Wolfe over weights). Arguments as in
    `matching.match`; method "weights" uses no images; without it, units that are not seen stay.
    Raises ValueError for fewer than two networks and for other methods, AlignmentError as there.
    """
    if len(thetas) < 2:
        raise ValueError(f"match_many: got {len(thetas)} network, expected two or more")
    if method not in ("activations", "weights"):
        raise ValueError(f"match_many: method {method!r}, expected 'activations' or 'weights'")
    if method == "weights":
        improve: Improve = partial(_by_weights, net, thetas, sym)
    else:
        seen: Seen = {}
        for i, j in combinations(range(len(thetas)), 2):
            ends = thetas[i], thetas[j]
            moments = stream(net, *ends, images, sym, at=at, batch_size=batch_size)
            for name in (n for n, taps in moments.items() if taps):
                seen[i, j, name] = similarity(moments[name], cost)
                seen[j, i, name] = seen[i, j, name].T
        parts = {n: b for n, b in bundles(sym).items() if all((0, 1, m) in seen for m in b[0])}
        improve = partial(_by_activations, parts, seen)
    perms, everyone = [sym.identity() for _ in thetas], range(len(thetas))
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


def _by_weights(
    net: nn.Module, thetas: Sequence[Theta], sym: Symmetry,
    k: int, others: list[int], perms: list[Perm]
) -> Perm:  # fmt: skip
    """Network k matched by its weights to the mean of the others."""
    placed = [sym.permute(thetas[i], perms[i]) for i in others]
    mean = combine(placed, [1 / len(placed)] * len(placed))
    return weight_matching(net, mean, thetas[k], sym, start=perms[k])


def _by_activations(
    parts: dict[str, Blocks], seen: Seen, k: int, others: list[int], perms: list[Perm]
) -> Perm:
    """Network k matched to the others by their similarities, which are summed."""
    perm = dict(perms[k])
    for name, blocks in parts.items():
        similar: dict[tuple[str, ...], Tensor] = {}
        for names in zip(*blocks, strict=True):
            rows = [seen[i, k, names[0]][_flat(name, names, perms[i])] for i in others]
            similar[names] = torch.stack(rows).sum(0)
        better = perm | solve(name, blocks, [tiles(s, len(blocks)) for s in similar.values()])
        gain = _value(name, better, similar) - (now := _value(name, perm, similar))
        if gain > 1e-9 * abs(now):
            perm = better
    return perm


def _value(name: str, perm: Perm, similar: dict[tuple[str, ...], Tensor]) -> float:
    """The similarity of units that `perm` brings together, in one bundle."""
    pairs = ((s, _flat(name, names, perm)) for names, s in similar.items())
    return sum(float(s[range(len(s)), flat].sum()) for s, flat in pairs)


def _flat(name: str, names: tuple[str, ...], perm: Perm) -> Tensor:
    """The order of the units of all blocks, one after the other; names: one group of each block."""
    order = perm[name].tolist() if names != (name,) else [0]
    return torch.cat([j * len(perm[names[j]]) + perm[names[j]] for j in order])
