"""Doubly stochastic matrices: the projection is the nearest and feasible, Birkhoff's theorem."""

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, minimize

from mcnotes.matching import assign, doubly_stochastic


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_projection_is_the_solution_of_the_quadratic_programme(n: int, scale: float) -> None:
    x = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator(n))]
    x = x + scale * torch.randn(n, n, generator=generator(7), dtype=torch.float64)
    found = doubly_stochastic.project(x)
    sums = np.vstack([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))[1:]])
    solved = minimize(
        lambda y: 0.5 * ((y - x.numpy().ravel()) ** 2).sum(),
        np.full(n * n, 1 / n),
        jac=lambda y: y - x.numpy().ravel(),
        bounds=Bounds(0, np.inf),
        constraints=LinearConstraint(sums, 1, 1),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(found.numpy().ravel(), solved.x, atol=2e-6 * max(1, scale))


@pytest.mark.parametrize("n", [2, 8, 33, 64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_projection_is_feasible_optimal_and_idempotent(n: int, scale: float) -> None:
    """Optimal: ⟨x − y, z − y⟩ ≤ 0 for every doubly stochastic z; permutations are the corners."""
    x = torch.eye(n).double() + scale * torch.randn(n, n, generator=generator(n)).double()
    y = doubly_stochastic.project(x)
    for total in (y.sum(0), y.sum(1)):
        torch.testing.assert_close(total, torch.ones(n).double(), rtol=0, atol=1e-8)
    assert y.min() >= 0
    best = doubly_stochastic.matrix(assign(x - y))  # the corner that maximises ⟨x − y, z⟩
    assert ((x - y) * (best - y)).sum() <= 1e-6 * scale * n
    torch.testing.assert_close(doubly_stochastic.project(y), y, rtol=0, atol=1e-8)
    assert (x - doubly_stochastic.sinkhorn(x)).norm() >= (x - y).norm() - 1e-2 * scale


def test_sinkhorn_scales_to_sums_of_one() -> None:
    y = doubly_stochastic.sinkhorn(
        torch.rand(6, 6, generator=generator(0)).double() + 0.1, rounds=50
    )
    torch.testing.assert_close(y.sum(0), torch.ones(6).double())
    torch.testing.assert_close(y.sum(1), torch.ones(6).double())


def test_decomposition_sums_to_the_matrix() -> None:
    x = doubly_stochastic.project(torch.randn(7, 7, generator=generator(0)).double())
    weights, terms = doubly_stochastic.decompose(x, terms=100, rest=0.0)
    mixed = sum(w * doubly_stochastic.matrix(p) for w, p in zip(weights, terms, strict=True))
    torch.testing.assert_close(mixed, x, rtol=0, atol=1e-7)
    assert len(weights) <= 7**2 - 2 * 7 + 2  # Birkhoff's theorem, Marcus and Ree's bound
    assert (weights.diff() <= 0).all()
    p = torch.tensor([2, 0, 1])
    weights, terms = doubly_stochastic.decompose(doubly_stochastic.matrix(p))
    assert weights.tolist() == [1.0]
    assert torch.equal(terms[0], p)
