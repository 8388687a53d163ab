"""What is matched at once: a group of units, or blocks of units together with the units within.

Attention heads and groups of channels are blocks. How well two blocks go together depends on the
order of the units within, so blocks and units are solved jointly, and exactly (chapter 4).
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mcnotes.symmetry import Perm, Symmetry

Blocks = tuple[tuple[str, ...], ...]  # for each block, the groups within


def assign(score: Tensor, maximize: bool = True) -> Tensor:
    """The permutation p with the largest (smallest) sum of `score[i, p[i]]`.

    `score` is a square matrix [n, n] of finite numbers: how well unit i of the first network
    and unit j of the second go together. Exact, O(n³): scipy's `linear_sum_assignment`
    (Crouse, On implementing 2D rectangular assignment algorithms, 2016).
    Raises ValueError for a matrix that is not square or not finite.
    """
    if score.dim() != 2 or score.shape[0] != score.shape[1]:
        raise ValueError(f"assign: expected a square matrix, got shape {tuple(score.shape)}")
    if not torch.isfinite(score).all():
        bad = int((~torch.isfinite(score)).sum())
        raise ValueError(f"assign: {bad} of {score.numel()} scores are NaN or infinite")
    _, columns = linear_sum_assignment(score.detach().cpu().double().numpy(), maximize)
    return torch.from_numpy(columns).long()


def bundles(sym: Symmetry) -> dict[str, Blocks]:
    """What is matched at once: group → for each of its blocks, the groups within.

    An ordinary group is one block that holds itself; those within blocks come with their blocks.
    """
    nested = {name: g.inner for name, g in sym.groups.items() if g.inner and g.inner[0]}
    inside = {name for blocks in nested.values() for block in blocks for name in block}
    alone = sym.groups.keys() - nested.keys() - inside
    return {n: nested.get(n, ((n,),)) for n in sym.groups if n in alone or n in nested}


def tiles(similarity: Tensor, count: int) -> Tensor:
    """[blocks of A, blocks of B, n, n] on the CPU, from a matrix over the units of all blocks."""
    side = len(similarity) // count
    return similarity.cpu().view(count, side, count, side).transpose(1, 2)


def solve(name: str, blocks: Blocks, similar: Sequence[Tensor], own: Tensor | None = None) -> Perm:
    """The permutation of a bundle that maximises the summed similarity: of blocks and within.

    similar: for each kind of group within a block, `tiles`; own [blocks, blocks]: what two blocks
    have in common besides their units. Units are matched for every pair of blocks, then the blocks
    by what their units achieve. The groups of B's units are named as in B.
    """
    score = torch.zeros(len(blocks), len(blocks), dtype=torch.float64) if own is None else own
    best: list[list[list[Tensor]]] = []  # for each kind of group, block of A and block of B
    for tile in similar:
        best.append([[assign(pair) for pair in row] for row in tile])
        chosen = torch.stack([torch.stack(row) for row in best[-1]])  # [blocks, blocks, n]
        score = score + tile.gather(3, chosen[..., None]).sum((2, 3))
    order = assign(score)
    found = {} if blocks == ((name,),) else {name: order}
    for names, solved in zip(zip(*blocks, strict=True), best, strict=True):
        found |= {names[j]: solved[i][j] for i, j in enumerate(order.tolist())}
    return found
