"""What is matched at once: the joint optimum of heads and of the units within."""

from itertools import permutations
from typing import Any

import pytest
import torch
from small import Patches, pictures

from mcnotes import matching, symmetry, train
from mcnotes.matching import Bundle, Pair, bundles


def test_heads_are_matched_with_the_units_within() -> None:
    """The joint optimum, by trying every pairing of heads and of units in them."""
    net, images = Patches(width=6, heads=2), pictures(64)
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    found = matching.match(Pair(net, sym, a, b), images)
    moments = matching.stream(Pair(net, sym, a, b), images)
    parts = [bundle for bundle in bundles(sym) if bundle.nested]
    assert len(parts) == 2
    for bundle in parts:
        best = -float("inf"), ()
        for order in permutations(range(2)):
            gain, plan = 0.0, {bundle.name: order}
            for names in bundle.kinds:
                tiles = sum(m.correlation() for m in moments[names[0]]).view(2, 3, 2, 3)
                for i, j in enumerate(order):
                    c = tiles[i, :, j]
                    total, p = max((sum(c[range(3), p]), p) for p in permutations(range(3)))
                    gain, plan[names[j]] = gain + float(total), p
            best = max(best, (gain, plan), key=lambda entry: entry[0])
        for group, p in best[1].items():
            assert found.perm[group].tolist() == list(p)
    assert sym.verify(net, next(images.batches(2))[0]) < 1e-9


def test_a_bundle_lays_the_units_of_its_blocks_side_by_side() -> None:
    heads = Bundle("heads", (("q0", "v0"), ("q1", "v1"), ("q2", "v2")))
    assert heads.nested
    assert heads.kinds == [("q0", "q1", "q2"), ("v0", "v1", "v2")]
    assert heads.partners({"heads": torch.tensor([2, 0, 1])}) == [2, 0, 1]
    matrix = torch.arange(36.0).view(6, 6)
    tiles = heads.tiles(matrix)
    assert tiles.shape == (3, 3, 2, 2)
    assert torch.equal(tiles[2, 1], matrix[4:6, 2:4])
    alone = Bundle("fc", (("fc",),))
    assert not alone.nested
    assert alone.partners({"fc": torch.tensor([1, 0])}) == [0]
    assert torch.equal(alone.tiles(matrix)[0, 0], matrix)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (torch.zeros(2, 3), r"expected a square matrix, got shape \(2, 3\)"),
        ([[1.0]], "expected a square matrix, got a list"),
        (torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]]), "2 of 4 scores are NaN or infinite"),
    ],
)
def test_only_square_matrices_of_finite_numbers_are_assigned(score: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        matching.assign(score)
