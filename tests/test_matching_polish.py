"""Exchanges never lower the agreement, their gains are exact, several starts are no worse."""

import pytest
import torch
from small import NETWORKS, pictures, rounding, same
from test_matching_frank_wolfe import pair_of, value

from mcnotes import matching
from mcnotes.matching import Pair, polish
from mcnotes.matching.polish import _Order
from mcnotes.symmetry import permutations

CHEAP = [n for n in NETWORKS if n not in ("googlenet", "grouped")]


@pytest.mark.parametrize("name", CHEAP)
def test_polish_never_lowers_the_agreement(name: str) -> None:
    pair = pair_of(name, 1, 2)
    for perm in (pair.sym.random(torch.Generator().manual_seed(3)), matching.weight_matching(pair)):
        better = polish(pair, perm, tries=5, sweeps=20)
        assert value(pair, better) >= value(pair, perm)
    start = pair.sym.random(torch.Generator().manual_seed(3))
    assert value(pair, polish(pair, start, tries=0)) > value(pair, start), "a bad order gains"


def test_it_goes_on_where_no_group_alone_gains() -> None:
    """From a rest point of weight matching, exchanges that first lose find something better."""
    gained = 0
    for seed in range(1, 9, 2):
        pair = pair_of("mlp", seed, seed + 1)
        rest = matching.weight_matching(pair)
        assert same(polish(pair, rest, tries=0), rest)
        gained += value(pair, polish(pair, rest)) > value(pair, rest)
    assert gained >= 1


@pytest.mark.parametrize("name", ["mlp", "tinyten", "attention"])
def test_the_gains_of_all_exchanges_are_those_of_each(name: str) -> None:
    pair = pair_of(name, 1, 2)
    order = _Order.of(pair, pair.sym.identity())
    margin = rounding(10**5, abs(order.value) + 1, torch.float64)
    for group, gains in order.gains().items():
        size = len(gains)
        for i, j in [(0, 1), (0, size - 1), (size // 2, size - 1)]:
            if i != j:
                swap = permutations.identity(size)
                swap[[i, j]] = swap[[j, i]]
                gain = order.after({group: swap}).value - order.value
                assert float(gains[i, j]) == pytest.approx(gain, abs=margin), (group, i, j)


def test_more_starts_are_no_worse_and_the_first_is_the_usual_one() -> None:
    pair = pair_of("mlp", 1, 2)
    images = pictures(8)
    for method in matching.SEARCHES:
        one, some = (matching.match(pair, images, method=method, restarts=n).perm for n in (1, 4))
        assert value(pair, some) >= value(pair, one)
    with pytest.raises(ValueError, match="restarts 3 with method 'activations'"):
        matching.match(pair, images, restarts=3)


def test_polished_matching_is_one_flag() -> None:
    pair = pair_of("mlp", 1, 2)
    images = pictures(8)
    for method in ("activations", "random"):
        plain, better = (
            matching.match(pair, images, method=method, polished=flag).perm
            for flag in (False, True)
        )
        assert value(pair, better) > value(pair, plain)
    with pytest.raises(ValueError, match="no group 'nothing'"):
        polish(Pair(pair.net, pair.sym, pair.theta_a, pair.theta_b), {"nothing": torch.arange(3)})
    broken = {name: x * float("nan") for name, x in pair.theta_b.items()}
    for search in (lambda p: polish(p, p.sym.identity()), matching.frank_wolfe):
        with pytest.raises(ValueError, match=r"not finite|NaN or infinite"):
            search(Pair(pair.net, pair.sym, pair.theta_a, broken))
