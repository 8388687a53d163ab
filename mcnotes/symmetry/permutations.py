"""Permutations as index vectors: `p` acts by `new[i] = old[p[i]]` (chapter 3).

All functions take and return one-dimensional int64 tensors of length n that hold each of
0 … n-1 once; nothing is changed in place.
"""

import torch
from torch import Tensor


def check(p: Tensor, size: int | None = None, name: str = "permutation") -> Tensor:
    """Return `p` as int64 on the CPU if it is a permutation (of `size` things).

    Raises ValueError otherwise, saying what is wrong with it.
    """
    if not isinstance(p, Tensor):
        raise ValueError(f"{name}: expected an index vector, got a {type(p).__name__}")
    if p.dim() != 1 or p.is_floating_point() or p.is_complex() or p.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected a 1-D integer index vector, got {p.dtype} of shape {tuple(p.shape)}"
        )
    p = p.detach().cpu().long()
    if size is not None and len(p) != size:
        raise ValueError(f"{name}: expected {size} indices, got {len(p)}")
    if not torch.equal(p.sort().values, torch.arange(len(p))):
        raise ValueError(f"{name}: each of 0 … {len(p) - 1} must occur exactly once")
    return p


def identity(size: int) -> Tensor:
    """The permutation of `size` things that moves none."""
    return torch.arange(size)


def random(size: int, generator: torch.Generator | None = None) -> Tensor:
    """A permutation of `size` things, uniformly at random (CPU generator)."""
    return torch.randperm(size, generator=generator)


def invert(p: Tensor) -> Tensor:
    """The permutation that undoes `p`: `p[invert(p)] == invert(p)[p] == identity`."""
    return torch.empty_like(p).scatter_(0, p, torch.arange(len(p), device=p.device))


def compose(p: Tensor, q: Tensor) -> Tensor:
    """First `p`, then `q`: the one permutation that does both, `p[q]`.

    Raises ValueError when the lengths differ.
    """
    if p.shape != q.shape:
        raise ValueError(f"compose: lengths differ, {len(p)} and {len(q)}")
    return p[q]
