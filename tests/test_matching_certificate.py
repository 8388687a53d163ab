"""Certificates of weight matching: brute force, planted permutations, what cannot be certified."""

from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
import torch
from numpy.linalg import svd
from small import NETWORKS, Patches, pictures, same
from torch import Tensor, nn

from mcnotes import matching, symmetry, train
from mcnotes.lab import Experiment
from mcnotes.matching import Pair, certificate, certify
from mcnotes.matching.certificate import Array
from mcnotes.matching.pair import in_float64


class Residual(nn.Module):
    """Its stream stands on both axes of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x[:, :1, :3, :3].flatten(1))
        return self.last(h + self.inner(h).relu())


class Joined(nn.Module):
    """Two groups stand on one axis of a tensor, and entries that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(9, 3), nn.Linear(9, 4), nn.Linear(9, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1, :3, :3].flatten(1)
        both = torch.cat([self.one(x).relu(), self.two(x).tanh(), x[:, :2]], 1)
        return self.out(self.last(both).relu())


def dense() -> nn.Module:
    layers = nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)
    return nn.Sequential(Corner(), *layers)


class Corner(nn.Module):
    """Nine pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1, :3, :3].flatten(1)


def convolutions() -> nn.Module:
    convs = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2)
    return nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def pair_of(net: nn.Module, seed: int) -> Pair:
    sym = symmetry.find(net, next(pictures(4).batches(2))[0])
    return Pair(net, sym, train.initialise(net, seed), train.initialise(net, seed + 1))


def cosine(pair: Pair, perm: symmetry.Perm) -> float:
    moved = pair.permuted(perm)
    a, b = (
        torch.cat([theta[name].double().flatten() for name in pair.names])
        for theta in (pair.theta_a, moved)
    )
    return float(a @ b / (a.norm() * b.norm()))


def best(pair: Pair) -> float:
    """The largest cosine, by trying all permutations."""
    orders = (permutations(range(group.size)) for group in pair.sym.groups.values())
    return max(
        cosine(pair, dict(zip(pair.sym.groups, map(torch.tensor, perms), strict=True)))
        for perms in product(*orders)
    )


SMALL: list[Callable[[], nn.Module]] = [dense, convolutions, Residual, Joined]


@pytest.mark.parametrize("build", SMALL)
@pytest.mark.parametrize("seed", [1, 11, 21])
def test_no_permutation_exceeds_the_bound(build: Callable[[], nn.Module], seed: int) -> None:
    pair = pair_of(build(), seed)
    perm = matching.weight_matching(pair)
    if build is Joined:  # too many orders to try all: only those of two groups
        highest = max(cosine(pair, matching.weight_matching(pair, seed=s)) for s in range(20))
    else:
        highest = best(pair)
    bounds = [certify(pair, perm, steps=steps).bound for steps in (0, 1, 3, 30)]
    assert all(bound >= highest - 1e-12 for bound in bounds), (highest, bounds)
    assert bounds == sorted(bounds, reverse=True), "each step lowers it"
    if build is not Residual:
        assert bounds[-1] < bounds[0] - 1e-3, "the first one is not the last word"
    assert certify(pair, perm).cosine == pytest.approx(cosine(pair, perm), abs=1e-9)


def test_a_best_permutation_is_proved_to_be_the_best() -> None:
    """Among small networks the bound is often the very value that is reached."""
    proved = 0
    for seed in range(1, 12, 2):
        pair = pair_of(dense(), seed)
        tries = [matching.weight_matching(pair, seed=s) for s in range(5)]
        perm = max(tries, key=lambda p: cosine(pair, p))
        proved += certify(pair, perm, steps=100).gap < 1e-5
    assert proved >= 3


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_planted_permutation_is_certified(name: str) -> None:
    """Nothing is above a cosine of one, and networks of every kind are bounded soundly."""
    net = NETWORKS[name]()
    sym = symmetry.find(net, next(pictures(4).batches(2))[0])
    theta = train.initialise(net, 1)
    planted = sym.random(torch.Generator().manual_seed(2))
    pair = Pair(net, sym, theta, sym.permute(theta, planted))
    found = certify(pair, sym.inverse(planted), steps=0)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.bound >= found.cosine
    other = certify(pair, sym.identity(), steps=0)
    assert other.bound == pytest.approx(found.bound), "it does not depend on the permutation"


@pytest.mark.parametrize("build", SMALL)
def test_large_tensors_have_a_bound_too(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(build(), 1)
    tight = certify(pair, pair.sym.identity(), steps=0).bound
    monkeypatch.setattr(certificate, "LARGEST", 1)
    loose = certify(pair, pair.sym.identity()).bound
    assert loose >= tight - 1e-12


def test_blocks_of_units_are_bounded_by_sorted_entries() -> None:
    pair = pair_of(Patches(width=6, heads=2), 1)
    found = certify(pair, matching.weight_matching(pair))
    assert found.gap > 0
    assert found.bound <= 1 + 1e-9


def test_slack_is_what_an_entry_may_grow_by() -> None:
    """By solving again with the entry grown by a little less, and by a little more."""
    scores = np.random.default_rng(0).standard_normal((3, 3, 5, 5))
    sums, chosen = certificate._best_sums(scores)
    slack = certificate._slack(scores, chosen)
    assert (slack >= 0).all()
    assert np.allclose(np.take_along_axis(slack, chosen[..., None], 3), 0)
    grown, _ = certificate._best_sums(scores + slack)
    np.testing.assert_allclose(grown, sums)


def test_what_cannot_be_certified_is_refused() -> None:
    pair = pair_of(dense(), 1)
    with pytest.raises(ValueError, match="steps: got -1"):
        certify(pair, pair.sym.identity(), steps=-1)
    with pytest.raises(ValueError, match="no group 'nothing'"):
        certify(pair, {"nothing": torch.arange(4)})
    broken = {name: x * float("nan") for name, x in pair.theta_b.items()}
    with pytest.raises(ValueError, match="entries that are not finite"):
        certify(Pair(pair.net, pair.sym, pair.theta_a, broken), pair.sym.identity())
    nothing = {name: x * 0 for name, x in pair.theta_b.items()}
    with pytest.raises(ValueError, match="all weights of a network are 0"):
        certify(Pair(pair.net, pair.sym, pair.theta_a, nothing), pair.sym.identity())


@pytest.mark.parametrize("build", SMALL[:2])
@pytest.mark.parametrize(
    ("one", "other"),
    [(1e-159, 1e-159), (1e-162, 1e-200), (1e-310, 1.0), (1e160, 1.0), (1e155, 1e155), (1e300, 1e7)],
)
def test_a_factor_before_a_network_changes_nothing(
    build: Callable[[], nn.Module], one: float, other: float
) -> None:
    """Not even the last bit of a power of two; squares would vanish, or overflow."""
    pair = wide(pair_of(build(), 1))
    a, b = (
        theta | {n: theta[n] * factor for n in pair.names}
        for theta, factor in ((pair.theta_a, one), (pair.theta_b, other))
    )
    scaled = Pair(pair.net, pair.sym, a, b)
    for search in (matching.weight_matching, matching.frank_wolfe, polished):
        assert same(search(scaled), search(pair)), search
    perm = matching.weight_matching(pair)
    found, expected = (certify(p, perm) for p in (scaled, pair))
    if one > 1e-300:  # else digits are missing
        assert found == pytest.approx(expected, abs=1e-12)
    assert found.bound >= best(pair) - (1e-12 if one > 1e-300 else 1e-5)


def polished(pair: Pair) -> symmetry.Perm:
    return matching.polish(pair, pair.sym.identity())


def wide(pair: Pair) -> Pair:
    return Pair(pair.net.double(), pair.sym, in_float64(pair.theta_a), in_float64(pair.theta_b))


@pytest.mark.parametrize("method", ["weights", "frank-wolfe"])
def test_many_networks_may_be_as_small_or_large(method: str) -> None:
    pair = wide(pair_of(dense(), 1))
    c = train.initialise(pair.net, 3)
    orders = []
    for factor in (1.0, 2.0**-600, 2.0**600):
        thetas = [{n: x * factor for n, x in t.items()} for t in (pair.theta_a, pair.theta_b, c)]
        orders.append(matching.match_many(pair.net, thetas, pictures(4), pair.sym, method=method))
    assert all(same(p, q) for others in orders[1:] for p, q in zip(orders[0], others, strict=True))
    assert not all(same(p, pair.sym.identity()) for p in orders[0])


def trace_bound(a: Array, b: Array) -> float:
    """Von Neumann's, of orthogonal matrices along two axes of three: the least of unfoldings."""
    shapes = ((0, 1, 2), (1, 0, 2))
    flat = [[x.transpose(axes).reshape(x.shape[axes[0]], -1) for axes in shapes] for x in (a, b)]
    slices = [np.moveaxis(x, 2, 0) for x in (a, b)]
    every = [*zip(*flat, strict=True), slices]
    return min(float((svd(x, compute_uv=False) * svd(y, compute_uv=False)).sum()) for x, y in every)


def test_sorted_entries_bound_trained_networks_better_than_singular_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each convolution of TinyTen between two groups."""
    monkeypatch.setattr(certificate, "LARGEST", 0)
    lab = Experiment()
    pair = Pair(lab.net, lab.sym, *map(in_float64, lab.ends(1, 2)))
    inner = [n for n in pair.names if pair.theta_a[n].dim() == 4][1:]
    assert len(inner) > 5
    for name in inner:
        a, b = ({name: theta[name].numpy()} for theta in (pair.theta_a, pair.theta_b))
        sorted_bound = certificate.Agreement(pair, a, b).bound(-np.inf, 0, 0)
        by_trace = trace_bound(*(x[name].reshape(*x[name].shape[:2], -1) for x in (a, b)))
        norms = float(np.linalg.norm(a[name]) * np.linalg.norm(b[name]))
        assert sorted_bound < by_trace - 0.01 * norms, name
        assert by_trace < norms * (1 + 1e-9)
