"""Weight matching: planted permutations, brute force over orders of units and of heads."""

from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch
from small import NETWORKS, Fixed, Patches, noisy, pictures, task
from torch import Tensor, nn

from mcnotes import matching, symmetry, train
from mcnotes.curves import Theta
from mcnotes.matching import Pair, weights
from mcnotes.matching.assignment import bundles, solve
from mcnotes.symmetry import Perm


def dot(net: nn.Module, a: Theta, b: Theta) -> Tensor:
    return torch.stack([(a[n].double() * b[n]).sum() for n, _ in net.named_parameters()]).sum()


def agreement(net: nn.Module, a: Theta, b: Theta) -> float:
    return float(dot(net, a, b))


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "googlenet"])
def test_a_planted_permutation_is_found_by_its_weights(name: str) -> None:
    net, images = NETWORKS[name](), pictures(8)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = sym.random(torch.Generator().manual_seed(2))
    copy = sym.permute(noisy(theta, 3), planted)
    perm = matching.weight_matching(Pair(net, sym, theta, copy), seed=4)
    for group, p in sym.compose(planted, perm).items():
        assert torch.equal(p, torch.arange(len(p))), group


def test_units_that_stand_in_buffers_alone_keep_their_places() -> None:
    """There is nothing by which weights could tell them apart; the others are matched."""
    net = Fixed()
    theta, sym = train.initialise(net, 1), symmetry.find(net, task().example)
    names = {n: {place.name for place in group.places} for n, group in sym.groups.items()}
    assert {"first", "second"} in names.values()
    planted = sym.random(torch.Generator().manual_seed(2))
    perm = matching.weight_matching(Pair(net, sym, theta, sym.permute(theta, planted)))
    found = sym.compose(planted, perm)
    for group, standing in names.items():
        alone = standing == {"first", "second"}
        expected = sym.identity()[group]
        assert torch.equal(perm[group] if alone else found[group], expected), group


class Masked(nn.Module):
    """Hidden units with a mask and a number each, which are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("kept", torch.arange(8) % 3 > 0)
        self.register_buffer("number", torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.a(x).relu() * self.kept * self.number
        return self.b(hidden)


@pytest.mark.parametrize("method", [matching.weight_matching, matching.frank_wolfe])
def test_units_may_have_masks_and_whole_numbers(method: Callable[[Pair], Perm]) -> None:
    net = Masked()
    theta, sym = dict(net.state_dict()), symmetry.find(net, torch.rand(2, 5))
    assert {"kept", "number"} <= {p.name for g in sym.groups.values() for p in g.places}
    planted = sym.random(torch.Generator().manual_seed(2))
    moved = sym.permute(theta, planted)
    found = sym.compose(planted, method(Pair(net, sym, theta, moved)))
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.values())
    exact = {n: torch.eye(len(p))[p] for n, p in planted.items()}
    for name, x in sym.apply_matrices(theta, exact).items():
        assert x.dtype == theta[name].dtype
        assert torch.equal(x, moved[name]), name


def test_no_pairing_of_heads_agrees_better() -> None:
    """By trying every pairing of heads and of units in them, the rest held fixed."""
    net, images = Patches(width=6, heads=2), pictures(2)
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    bundle = next(bundle for bundle in bundles(sym) if bundle.nested)
    found = solve(bundle, *weights.pairings(sym, bundle, b, lambda x: dot(net, a, x)))
    groups = [bundle.name, *(g for block in bundle.blocks for g in block)]
    sizes = [range(sym.groups[g].size) for g in groups]
    best = max(
        agreement(net, a, sym.permute(b, dict(zip(groups, map(torch.tensor, plan), strict=True))))
        for plan in product(*(permutations(size) for size in sizes))
    )
    assert agreement(net, a, sym.permute(b, found)) == pytest.approx(best, rel=1e-9)


def test_no_order_of_one_layer_agrees_better() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3))
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, task().example)
    ((group, p),) = matching.weight_matching(Pair(net, sym, a, b)).items()
    values = {
        q: agreement(net, a, sym.permute(b, {group: torch.tensor(q)}))
        for q in permutations(range(5))
    }
    assert tuple(p.tolist()) == max(values, key=lambda q: values[q])


def test_sweeps_never_lower_the_agreement() -> None:
    net, images = NETWORKS["resnet20"](), pictures(4)
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    values = [agreement(net, a, b)]
    for sweeps in (1, 2, 5):
        perm = matching.weight_matching(Pair(net, sym, a, b), sweeps=sweeps)
        values.append(agreement(net, a, sym.permute(b, perm)))
    assert values == sorted(values)
    assert values[-1] > values[0]
