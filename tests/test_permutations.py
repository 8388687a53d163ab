"""Index permutations: the group laws and the checks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcnotes.symmetry import permutations

three = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*(st.permutations(range(n)).map(torch.tensor) for _ in range(3)))
)


@given(three)
def test_group_laws(triple: tuple[torch.Tensor, ...]) -> None:
    p, q, r = triple
    one = permutations.identity(len(p))
    assert torch.equal(permutations.compose(p, permutations.invert(p)), one)
    assert torch.equal(permutations.compose(permutations.invert(p), p), one)
    assert torch.equal(permutations.compose(p, one), p)
    left, right = (
        permutations.compose(permutations.compose(p, q), r),
        permutations.compose(p, permutations.compose(q, r)),
    )
    assert torch.equal(left, right)


@given(three)
def test_compose_is_acting_in_turn(triple: tuple[torch.Tensor, ...]) -> None:
    p, q, _ = triple
    x = torch.rand(len(p))
    assert torch.equal(x[permutations.compose(p, q)], x[p][q])


def test_random_is_reproducible_and_reaches_everything() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = {tuple(permutations.random(3, draw).tolist()) for _ in range(100)}
    assert seen == set(itertools.permutations(range(3)))
    again = [permutations.random(9, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (torch.tensor([0.0, 1.0]), "1-D integer index vector, got torch.float32"),
        (torch.tensor([[0, 1]]), r"got torch.int64 of shape \(1, 2\)"),
        (torch.tensor([True, False]), "got torch.bool"),
        (torch.tensor([0, 0]), "each of 0 … 1 must occur exactly once"),
        (torch.tensor([0, 2]), "each of 0 … 1 must occur exactly once"),
        (torch.tensor([0, 1, 2]), "units: expected 2 indices, got 3"),
    ],
)
def test_check_says_what_is_wrong(p: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        permutations.check(p, 2, "units")


def test_check_returns_int64() -> None:
    assert permutations.check(torch.tensor([1, 0], dtype=torch.int32)).dtype == torch.int64


def test_compose_of_different_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match="lengths differ, 2 and 3"):
        permutations.compose(torch.arange(2), torch.arange(3))
