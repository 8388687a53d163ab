"""The linear assignment: against brute force, and its errors."""

import itertools

import pytest
import torch

from mcnotes.matching import assignment
from mcnotes.symmetry import permutations


@pytest.mark.parametrize("maximize", [True, False])
def test_assign_is_the_best_of_all(maximize: bool) -> None:
    score = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    best = (max if maximize else min)(
        itertools.permutations(range(6)),
        key=lambda p: sum(float(score[i, j]) for i, j in enumerate(p)),
    )
    assert assignment.assign(score, maximize).tolist() == list(best)


def test_assign_recovers_a_planted_permutation() -> None:
    p = permutations.random(50, torch.Generator().manual_seed(0))
    assert torch.equal(assignment.assign(torch.eye(50)[p]), p)


def test_assign_names_bad_scores() -> None:
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        assignment.assign(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 of 4 scores are NaN or infinite"):
        assignment.assign(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))
