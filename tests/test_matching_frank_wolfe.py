"""Frank–Wolfe: planted orders, the exact step, many networks, what a mixture is."""

from itertools import pairwise

import pytest
import torch
from small import NETWORKS, noisy, pictures, rounding, same
from torch import Tensor

from mcnotes import matching, symmetry, train
from mcnotes.curves import Theta
from mcnotes.matching import Pair, frank_wolfe, weights
from mcnotes.matching.frank_wolfe import Mixture, _best_step
from mcnotes.matching.pair import in_float64
from mcnotes.symmetry import Perm


def pair_of(name: str, *seeds: int) -> Pair:
    net = NETWORKS[name]()
    sym = symmetry.find(net, next(pictures(2).batches(2))[0])
    return Pair(net, sym, *(train.initialise(net, seed) for seed in seeds))


def reference(pair: Pair) -> Theta:
    return {n: x for n, x in in_float64(pair.theta_a).items() if n in pair.names}


def value(pair: Pair, perm: Perm) -> float:
    placed = in_float64(pair.permuted(perm))
    return float(weights.agreement(reference(pair), placed))


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "googlenet"])
def test_a_planted_permutation_is_found_in_all_layers_at_once(name: str) -> None:
    pair = pair_of(name, 1, 1)
    planted = pair.sym.random(torch.Generator().manual_seed(2))
    copy = pair.sym.permute(noisy(pair.theta_a, 3), planted)
    perm = frank_wolfe(Pair(pair.net, pair.sym, pair.theta_a, copy))
    assert same(pair.sym.compose(planted, perm), pair.sym.identity())


@pytest.mark.parametrize("name", ["mlp", "attention", "grouped"])
def test_it_climbs_and_does_not_stop_below_its_first_step(name: str) -> None:
    pair = pair_of(name, 1, 2)
    values = [value(pair, frank_wolfe(pair, steps=steps)) for steps in (1, 100)]
    assert values[1] > values[0]
    assert values[1] > value(pair, pair.sym.identity())


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_a_mixture_is_the_mean_of_what_its_orders_give(name: str) -> None:
    """Where one bundle moves: the agreement is linear in each."""
    pair = pair_of(name, 1, 2)
    sym, theta = pair.sym, in_float64(pair.theta_b)
    part = (
        matching.bundles(sym)[-1]
        if name == "mlp"
        else next(bundle for bundle in matching.bundles(sym) if bundle.nested)
    )
    g = torch.Generator().manual_seed(0)
    inside = {part.name, *(n for block in part.blocks for n in block)}
    one, two = ({n: p for n, p in sym.random(g).items() if n in inside} for _ in range(2))
    begun = Mixture.central(sym, theta).towards(sym.complete(one), 1.0)
    mixed = begun.towards(sym.complete(two), 0.25).placed()
    ends = [sym.permute(theta, p) for p in (one, two)]
    for n in pair.names:
        expected = 0.75 * ends[0][n] + 0.25 * ends[1][n]
        torch.testing.assert_close(mixed[n], expected, atol=1e-12, rtol=0)
    assert same(begun.rounded(), sym.complete(one))


def test_the_centre_puts_each_unit_everywhere_alike() -> None:
    pair = pair_of("attention", 1, 2)
    placed = Mixture.central(pair.sym, in_float64(pair.theta_b)).placed()
    for group in pair.sym.groups.values():
        for place in group.places:
            units = place.of(placed).movedim(place.axis, 0)[torch.from_numpy(place.index)]
            if placed[place.name].is_floating_point():
                torch.testing.assert_close(units, units.mean(0, keepdim=True).expand_as(units))


@pytest.mark.parametrize(
    ("coefficients", "best"),
    [([0, 2, -2.0], 0.5), ([0, 1, 1.0], 1), ([0, -1, 0.5], 0), ([1, 0, 3, -3], 2 / 3)],
)
def test_the_best_step_of_a_polynomial_is_exact(coefficients: list[float], best: float) -> None:
    def f(t: float) -> float:
        return sum(c * t**k for k, c in enumerate(coefficients))

    step, gain = _best_step(f, len(coefficients) - 1)
    assert step == pytest.approx(best, abs=1e-9)
    assert gain == pytest.approx(f(best) - f(0), abs=1e-12)


def test_the_agreement_is_a_polynomial_of_the_degree_that_is_fitted() -> None:
    """Else the step would not be exact: at more points than the fit needs."""
    for name in ("resnet20", "attention", "grouped"):
        pair = pair_of(name, 1, 2)
        mixture = Mixture.central(pair.sym, in_float64(pair.theta_b))
        order = pair.sym.random(torch.Generator().manual_seed(1))
        fixed = reference(pair)
        t = torch.linspace(0, 1, mixture.degree + 2, dtype=torch.float64)
        found = [
            float(weights.agreement(fixed, mixture.towards(order, float(s)).placed())) for s in t
        ]
        differences = torch.tensor(found, dtype=torch.float64)
        for _ in range(mixture.degree + 1):
            differences = differences.diff()
        scale = 2 ** len(found) * sum(float((x * x).sum()) for x in fixed.values())
        assert abs(float(differences)) < rounding(10**6, scale, torch.float64), name


def total(placed: list[dict[str, Tensor]], names: list[str]) -> float:
    flat = [torch.cat([theta[n].double().flatten() for n in names]) for theta in placed]
    return float(sum(x @ y for i, x in enumerate(flat) for y in flat[:i]))


def test_several_networks_agree_more_in_one_order_than_each_with_the_first() -> None:
    net = NETWORKS["mlp"]()
    sym = symmetry.find(net, next(pictures(2).batches(2))[0])
    thetas = [train.initialise(net, seed) for seed in (1, 2, 3, 4)]
    pairs = [Pair(net, sym, thetas[0], theta) for theta in thetas[1:]]
    alone = [sym.identity(), *(frank_wolfe(pair) for pair in pairs)]
    together = matching.match_many(net, thetas, pictures(2), sym, method="frank-wolfe")
    assert same(together[0], sym.identity())
    values = [
        total([sym.permute(x, p) for x, p in zip(thetas, perms, strict=True)], pairs[0].names)
        for perms in (alone, together)
    ]
    assert values[1] > values[0]
    assert all(len(p) == len(q) for p, q in pairwise(together))
