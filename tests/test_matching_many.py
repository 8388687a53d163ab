"""Many networks in one order: planted permutations, a rest point, better than pairs, errors."""

from itertools import combinations, permutations

import pytest
import torch
from small import NETWORKS, lost, noisy, pictures, plain, rounding, same, task, trained
from torch import Tensor, nn

from mcnotes import matching, symmetry, train
from mcnotes.matching import Pair
from mcnotes.symmetry import Perm


@pytest.mark.parametrize("method", ["activations", "weights", "frank-wolfe"])
@pytest.mark.parametrize("name", ["mlp", "resnet20", "attention"])
def test_many_copies_of_one_network_come_into_one_order(name: str, method: str) -> None:
    net, images = NETWORKS[name](), pictures(64)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = [sym.random(torch.Generator().manual_seed(s)) for s in (2, 3)]
    copies = [theta, *(sym.permute(noisy(theta, 5), p) for p in planted)]
    perms = matching.match_many(net, copies, images, sym, method=method)
    assert same(perms[0], sym.identity())
    for p, q in zip(planted, perms[1:], strict=True):
        assert same(sym.compose(p, q), sym.identity())


def test_no_common_order_of_three_is_better_at_one_model() -> None:
    """A rest point of the sweeps: no other permutation of one model agrees better with the rest."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.ReLU(), nn.Linear(4, 3))
    data = task()
    thetas = [train.initialise(net, seed) for seed in (1, 2, 3)]
    sym = symmetry.find(net, data.example)
    perms = matching.match_many(net, thetas, data.train, sym)
    ((group, _),) = perms[0].items()

    seen = {
        (i, j): matching.stream(Pair(net, sym, thetas[i], thetas[j]), data.train)[group][0]
        for i, j in combinations(range(3), 2)
    }
    correlations = {ends: moments.correlation() for ends, moments in seen.items()}
    margin = 3 * 4 * rounding(len(data.train), max(map(lost, seen.values())))

    def total(orders: list[Tensor]) -> float:
        return sum(float(c[orders[i], orders[j]].sum()) for (i, j), c in correlations.items())

    best = total([p[group] for p in perms])
    for k in range(3):
        for q in permutations(range(4)):
            orders = [torch.tensor(q) if i == k else p[group] for i, p in enumerate(perms)]
            assert total(orders) <= best + margin


def test_one_order_brings_more_together_than_matching_each_to_the_first() -> None:
    """Where pairwise matchings contradict each other around a cycle."""
    net, data = plain(), task()
    thetas = [train.initialise(net, seed) for seed in range(1, 5)]
    sym = symmetry.find(net, data.example)

    def to(i: int, j: int) -> Perm:  # brings network j into the order of i
        return matching.match(Pair(net, sym, thetas[i], thetas[j]), data.train).perm

    around = sym.compose(sym.compose(to(1, 2), to(0, 1)), to(2, 0))
    assert not same(around, sym.identity())

    def total(perms: list[Perm]) -> float:
        placed = [sym.permute(x, p) for x, p in zip(thetas, perms, strict=True)]
        found = (
            matching.match(Pair(net, sym, a, b), data.train, method="identity").after
            for a, b in combinations(placed, 2)
        )
        return sum(float(c.sum()) for after in found for c in after.values())

    pairwise = total([sym.identity(), *(to(0, j) for j in (1, 2, 3))])
    assert total(matching.match_many(net, thetas, data.train, sym)) > pairwise + 1


def test_many_errors() -> None:
    net, data, thetas, sym = trained()
    with pytest.raises(ValueError, match="got 1 networks, expected at least 2"):
        matching.match_many(net, thetas[:1], data.train, sym)
    with pytest.raises(ValueError, match=r"method 'random', expected one of .*'frank-wolfe'"):
        matching.match_many(net, thetas, data.train, sym, method="random")
