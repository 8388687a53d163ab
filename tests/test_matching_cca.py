"""Matching by canonical correlations: planted orders, invariance, what plain correlations miss."""

import pytest
import torch
from small import NETWORKS, noisy, pictures, task, trained
from torch import nn

from mcnotes import matching, symmetry, train
from mcnotes.matching import Pair, cca, stream


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "googlenet"])
def test_a_planted_permutation_is_found(name: str) -> None:
    net, images = NETWORKS[name](), pictures(128)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = sym.random(torch.Generator().manual_seed(2))
    copy = sym.permute(noisy(theta, 3), planted)
    found = matching.match(Pair(net, sym, theta, copy), images, method="cca")
    for group, p in sym.compose(planted, found.perm).items():
        alive = torch.ones(len(p), dtype=torch.bool)
        alive[found.dead.get(group, [])] = False
        assert torch.equal(p[alive], torch.arange(len(p))[alive]), group


def test_whitened_units_are_uncorrelated_up_to_the_ridge() -> None:
    net, data, (a, *_), sym = trained()
    ((moments,),) = stream(Pair(net, sym, a, a), data.train).values()
    correlation = moments.correlation()
    w = cca._whitening(correlation)
    values = torch.linalg.eigvalsh(correlation)
    expected = (values / (values + cca.RIDGE)).sort().values
    found = torch.linalg.eigvalsh(w @ correlation @ w.T).sort().values
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(w, w.T)


def test_units_that_repeat_each_other_count_less() -> None:
    """Three units do nearly the same, two others stand alone: these carry more of the canonical
    similarity, whereas all five count alike by correlations."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3))
    data = task()
    theta = train.initialise(net, 1)
    weight = theta["1.weight"].clone()
    weight[1:3] = weight[0] + 1e-3 * weight[1:3]
    theta = theta | {"1.weight": weight, "1.bias": torch.full([5], 3.0)}
    pair = Pair(net, symmetry.find(net, data.example), theta, theta)
    moments = stream(pair, data.train)
    found = cca.canonical(pair, data.train, moments, at="post", batch_size=None)
    ((similar,), (taps,)) = found.values(), moments.values()
    torch.testing.assert_close(taps[0].correlation().diagonal(), torch.ones(5).double())
    assert similar.diagonal()[:3].max() < 0.6 * similar.diagonal()[3:].min()
