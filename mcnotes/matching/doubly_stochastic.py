"""Doubly stochastic matrices: the polytope whose corners are the permutations (chapter 7).

Birkhoff's theorem: they are the mixtures of permutation matrices. All matrices are [n, n] float64
on the CPU; a permutation `p` as a matrix holds a 1 in row i at p[i]: `matrix(p) @ x = x[p]`.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mcnotes.matching import assignment


def matrix(p: Tensor) -> Tensor:
    """The matrix of a permutation (of an index vector [n])."""
    return torch.eye(len(p), dtype=torch.float64)[p]


def nearest(x: Tensor) -> Tensor:
    """The permutation matrix nearest to x [n, n]: an assignment."""
    return matrix(assignment.assign(x))


def project(x: Tensor, tolerance: float = 1e-10) -> Tensor:
    """The doubly stochastic matrix nearest to x [n, n] (Euclidean): exact, to `tolerance`.

    It is max(x + u1ᵀ + 1vᵀ, 0), where (u, v) minimises ½‖max(·, 0)‖² − Σu − Σv: found by a damped
    semismooth Newton method (Li, Sun and Toh 2020).
    """
    a = x.detach().cpu().double().numpy()
    n = len(a)
    u = (1 - a.sum(1)) / n + (a.sum() - n) / n**2  # the nearest matrix of these sums, signs aside
    w = np.concatenate([u, (1 - a.sum(0)) / n])

    def dual(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        y = np.maximum(a + w[:n, None] + w[n:], 0)
        return 0.5 * (y**2).sum() - w.sum(), y, np.concatenate([y.sum(1), y.sum(0)]) - 1

    f, y, g = dual(w)
    for _ in range(100):
        if (error := np.abs(g).max()) <= tolerance:
            break
        on = (y > 0).astype(float)
        hessian = np.block([[np.diag(on.sum(1)), on], [on.T, np.diag(on.sum(0))]])
        d = np.linalg.solve(hessian + 1e-2 * min(error, 1) * np.eye(2 * n), -g)
        size, new = 1.0, dual(w + d)
        while new[0] > f + 1e-4 * size * (g @ d) and np.abs(new[2]).max() > error / 2:
            size /= 2
            new = dual(w + size * d)
        w, (f, y, g) = w + size * d, new
    return torch.from_numpy(y).to(x)


def sinkhorn(x: Tensor, rounds: int = 20) -> Tensor:
    """Negative entries cut off, then rows and columns scaled in turn: cheap, not the nearest."""
    x = x.clamp_min(1e-12)
    for _ in range(rounds):
        x = x / x.sum(1, keepdim=True)
        x = x / x.sum(0, keepdim=True)
    return x


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"exact": project, "sinkhorn": sinkhorn}
"""Ways back to the doubly stochastic matrices after a gradient step."""


def decompose(x: Tensor, terms: int = 32, rest: float = 1e-3) -> tuple[Tensor, Tensor]:
    """A doubly stochastic x [n, n] as Σₖ weightₖ Pₖ: weights [K] (falling), index vectors [K, n].

    Greedy; ends after `terms` permutations, or when no more than `rest` of the sum is left.
    """
    left, rows = x.clone().double(), torch.arange(len(x))
    weights: list[float] = []
    found: list[Tensor] = []
    while len(found) < terms and (not found or 1 - sum(weights) > rest):
        p = assignment.assign(torch.where(left > 1e-9, left, -float(len(x))))
        weight = float(left[rows, p].min())
        if weight <= 1e-9 and found:
            break
        weights.append(max(weight, 1e-9))
        found.append(p)
        left[rows, p] -= weight
    order = torch.tensor(weights).argsort(descending=True, stable=True)
    return torch.tensor(weights, dtype=torch.float64)[order], torch.stack(found)[order]
