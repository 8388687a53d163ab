"""What is matched at once: a group of units, or blocks of units together with the units within.

Attention heads and groups of channels are blocks. How well two blocks go together depends on the
order of the units within, so blocks and units are solved jointly, and exactly (chapter 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mcnotes.symmetry import Perm, Symmetry


def assign(score: Tensor, maximize: bool = True) -> Tensor:
    """The permutation p with the largest (smallest) sum of `score[i, p[i]]`: int64 [n].

    `score` is a square matrix [n, n] of finite numbers: how well unit i of the first network
    and unit j of the second go together. Exact, O(n³): scipy's `linear_sum_assignment`
    (Crouse, On implementing 2D rectangular assignment algorithms, 2016).
    Raises ValueError for a matrix that is not square or not finite.
    """
    if not isinstance(score, Tensor):
        raise ValueError(f"assign: expected a square matrix, got a {type(score).__name__}")
    if score.dim() != 2 or score.shape[0] != score.shape[1]:
        raise ValueError(f"assign: expected a square matrix, got shape {tuple(score.shape)}")
    if not torch.isfinite(score).all():
        bad = int((~torch.isfinite(score)).sum())
        raise ValueError(f"assign: {bad} of {score.numel()} scores are NaN or infinite")
    _, columns = linear_sum_assignment(score.detach().cpu().double().numpy(), maximize)
    return torch.from_numpy(columns).long()


@dataclass(frozen=True)
class Bundle:
    """What is matched at once: blocks and the units within, or one ordinary group of units.

    blocks: for each block the names of the groups within, in corresponding order. An ordinary
    group is one block that holds itself.
    """

    name: str
    blocks: tuple[tuple[str, ...], ...]

    @property
    def nested(self) -> bool:
        """Are there blocks to match, besides the units within?"""
        return self.blocks != ((self.name,),)

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        """The groups that correspond to each other: for each kind, one name from every block."""
        return list(zip(*self.blocks, strict=True))

    def partners(self, perm: Perm) -> list[int]:
        """The block of B that `perm` brings to each block of A."""
        return perm[self.name].tolist() if self.nested else [0]

    def tiles(self, matrix: Tensor) -> Tensor:
        """A matrix over the units of all blocks as [blocks of A, blocks of B, n, n], on the CPU."""
        count, units = len(self.blocks), len(matrix) // len(self.blocks)
        return matrix.cpu().view(count, units, count, units).transpose(1, 2)


def bundles(sym: Symmetry) -> list[Bundle]:
    """All that is to be matched; the groups within blocks come with their blocks."""
    nested = {name: g.inner for name, g in sym.groups.items() if g.inner and g.inner[0]}
    inside = {name for blocks in nested.values() for block in blocks for name in block}
    return [
        Bundle(name, nested.get(name, ((name,),)))
        for name in sym.groups
        if name in nested or name not in inside
    ]


def solve(bundle: Bundle, similar: Sequence[Tensor], own: Tensor | None = None) -> Perm:
    """The permutation of a bundle that maximises the summed similarity: of blocks and within.

    similar: for each kind of group within a block, tiles [blocks of A, blocks of B, n, n]. own
    [blocks, blocks]: what two blocks have in common besides their units; default nothing. Units
    are matched for every pair of blocks, then the blocks by what their units achieve. The groups
    of B's units are named as in B. Raises ValueError, as `assign`, for what is not finite.
    """
    count = len(bundle.blocks)
    score = torch.zeros(count, count, dtype=torch.float64) if own is None else own
    best = []
    for tile in similar:
        units = _assign_each(tile)
        score = score + tile.gather(3, units[..., None]).sum((2, 3))
        best.append(units)
    order = assign(score)
    perm = {bundle.name: order} if bundle.nested else {}
    for names, units in zip(bundle.kinds, best, strict=True):
        for i, j in enumerate(order.tolist()):
            perm[names[j]] = units[i, j]
    return perm


def _assign_each(tile: Tensor) -> Tensor:
    """The best order of units [blocks, blocks, n] for every pair of blocks, each solved alone."""
    *blocks, n, _ = tile.shape
    return torch.stack([assign(score) for score in tile.reshape(-1, n, n)]).view(*blocks, n)
