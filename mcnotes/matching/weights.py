"""Weight matching: a permutation of B's units that brings its weights close to A's (chapter 9)."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from mcnotes.curves import Theta, check_same_space
from mcnotes.matching import doubly_stochastic
from mcnotes.matching.assignment import Blocks, bundles, solve
from mcnotes.symmetry import Perm, Symmetry


def weight_matching(
    net: nn.Module, theta_a: Theta, theta_b: Theta, sym: Symmetry, *, start: Perm | None = None,
    only: Collection[str] | None = None, seed: int = 0, sweeps: int = 100
) -> Perm:  # fmt: skip
    """Weight matching: a permutation P that makes ⟨θ_A, Pθ_B⟩ large (Ainsworth et al. 2023, 3.2).

    No data is needed. Block coordinate ascent: one group at a time, the others held fixed, is a
    linear assignment (blocks come with the units within, as in alignment); in random order, until
    a sweep gains nothing. It begins at `start` (default: the identity) and ends in a local optimum.
    Where a group stands on both axes of a tensor, the assignment is that of the linear part.
    only: the names (of `bundles`) that may change.
    """
    check_same_space(theta_a, theta_b, "weight_matching")
    names = [name for name, _ in net.named_parameters()]
    fixed = {name: theta_a[name].double() for name in names}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in theta_b.items()}

    def agreement(theta: Theta) -> Tensor:
        return torch.stack([(fixed[name] * theta[name]).sum() for name in names]).sum()

    parts = {n: blocks for n, blocks in bundles(sym).items() if only is None or n in only}
    perm = start or sym.identity()
    generator = torch.Generator().manual_seed(seed)
    best = float(agreement(sym.permute(exact, perm)))
    for _ in range(sweeps):
        before = best
        for k in torch.randperm(len(parts), generator=generator).tolist():
            name, blocks = list(parts.items())[k]
            here = sym.permute(exact, perm)
            step = solve(name, blocks, *_slopes(sym, name, blocks, here, agreement))
            trial = sym.compose(perm, step)
            value = float(agreement(sym.permute(exact, trial)))
            if value > best + 1e-9 * abs(best):
                perm, best = trial, value
        if best == before:
            break
    return perm


def _slopes(
    sym: Symmetry, name: str, blocks: Blocks, theta: Theta, agreement: Callable[[Theta], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What `solve` needs: the agreement that each pairing of units, and of blocks, brings.

    It is linear in the matrices that act on one bundle, so its slopes are these numbers. For units
    within blocks the blocks are shifted cyclically: each stands once in each other's place.
    """
    count, nested = len(blocks), blocks != ((name,),)
    size = {group: sym.groups[group].size for block in blocks for group in block}
    similar = [torch.zeros(count, count, size[g], size[g]).double() for g in blocks[0]]
    outer = torch.zeros(count, count, dtype=torch.float64)
    for shift in range(count):
        order = torch.arange(count).roll(-shift)
        leaves = {g: torch.eye(n, dtype=torch.float64) for g, n in size.items()}
        leaves |= {name: doubly_stochastic.matrix(order)} if nested else {}
        for leaf in leaves.values():
            leaf.requires_grad_()
        value = agreement(sym.apply_matrices(theta, leaves))
        # Adds 0: units that stand in buffers alone have a slope, too.
        value = value + 0 * torch.stack([leaf.sum() for leaf in leaves.values()]).sum()
        slopes = torch.autograd.grad(value, list(leaves.values()))
        slope = dict(zip(leaves, slopes, strict=True))
        for i, j in enumerate(order.tolist()):
            for tile, group in zip(similar, blocks[j], strict=True):
                tile[i, j] = slope[group]
            if nested:
                outer[i, j] = slope[name][i, j]
    if nested:  # what is left when the units' part is taken away, such as a bias for each head
        outer -= torch.stack([t.diagonal(dim1=2, dim2=3).sum(2) for t in similar]).sum(0)
    return similar, outer
