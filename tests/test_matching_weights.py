"""Weight matching: planted permutations, brute force over orders of units and of heads."""

from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch
from small import NETWORKS, Fixed, Patches, noisy, pictures, plain, same, task
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


BY_WEIGHTS: dict[str, Callable[[Pair], Perm]] = {
    "weights": matching.weight_matching,
    "frank-wolfe": matching.frank_wolfe,
    "polish": lambda pair: matching.polish(pair, pair.sym.identity()),
    "many": lambda pair: many(pair, "weights"),
    "many, frank-wolfe": lambda pair: many(pair, "frank-wolfe"),
}


def many(pair: Pair, method: str) -> Perm:
    thetas = [pair.theta_a, pair.theta_b]
    return matching.match_many(pair.net, thetas, task().train, pair.sym, method=method)[1]


@pytest.mark.parametrize("how", BY_WEIGHTS)
@pytest.mark.parametrize("name", ["1.bias", "3.bias", "3.weight", "both biases"])
@pytest.mark.parametrize("constant", [1e4, -1e5, 1e9])
def test_what_is_the_same_in_every_order_hides_nothing(
    how: str, name: str, constant: float
) -> None:
    """A large constant, whether no unit moves there or all hold it alike."""
    net = plain().double()
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, task().example.double())
    for moved in ["1.bias", "3.bias"] if name == "both biases" else [name]:
        theta[moved] = theta[moved] + constant
    planted = sym.random(torch.Generator().manual_seed(2))
    perm = BY_WEIGHTS[how](Pair(net, sym, theta, sym.permute(theta, planted)))
    assert same(sym.compose(planted, perm), sym.identity())


class Ends(nn.Module):
    """Two layers of units that have nothing to do with each other, the second 1e5 times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(4, 6), nn.Linear(4, 6)
        self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(self.few(x).relu()), self.two(self.many(x).relu())


def test_large_weights_of_one_layer_do_not_hide_those_of_another() -> None:
    net = Ends()
    theta, sym = train.initialise(net, 1), symmetry.find(net, torch.rand(2, 4))
    theta |= {n: x * 1e5 for n, x in theta.items() if n.startswith(("many", "two"))}
    planted = sym.random(torch.Generator().manual_seed(2))
    perm = matching.weight_matching(Pair(net, sym, theta, sym.permute(theta, planted)))
    assert same(sym.compose(planted, perm), sym.identity())


@pytest.mark.parametrize("how", [matching.weight_matching, BY_WEIGHTS["polish"]])
def test_a_large_unit_that_stays_does_not_hide_the_others(how: Callable[[Pair], Perm]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    theta, sym = train.initialise(net, 1), symmetry.find(net, torch.rand(2, 4))
    theta["0.bias"][0] = 1e6
    planted = {name: torch.tensor([0, 2, 1, 4, 5, 3]) for name in sym.groups}
    perm = how(Pair(net, sym, theta, sym.permute(theta, planted)))
    assert same(sym.compose(planted, perm), sym.identity())


def test_units_that_are_all_alike_stay() -> None:
    """Nothing tells them apart, and rounding must not."""
    net = plain()
    theta = {n: torch.full_like(x, 0.1) for n, x in train.initialise(net, 1).items()}
    pair = Pair(net, symmetry.find(net, task().example), theta, theta)
    assert same(matching.weight_matching(pair), pair.sym.identity())
    assert same(BY_WEIGHTS["polish"](pair), pair.sym.identity())


@pytest.mark.parametrize("how", BY_WEIGHTS)
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused_and_named(how: str, odd: float) -> None:
    """Also where no unit moves: an output bias."""
    net = plain()
    sym, theta = symmetry.find(net, task().example), train.initialise(net, 1)
    broken = theta | {"3.bias": torch.tensor([0.0, odd, 0.0])}
    for ends in ((theta, broken), (broken, theta)):
        with pytest.raises(ValueError, match=r"'3\.bias' of network [12AB] has .* not finite"):
            BY_WEIGHTS[how](Pair(net, sym, *ends))
