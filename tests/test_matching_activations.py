"""The moments of activations: exact, every image once, dead units, what would cancel."""

from collections.abc import Callable

import pytest
import torch
from small import agree, lost, pictures, terms
from torch import Tensor, nn

from mcnotes import symmetry, train
from mcnotes.matching import Moments, Pair, activations


def about_first(a: torch.Tensor, b: torch.Tensor) -> Moments:
    return Moments.about(torch.stack([a[0], b[0]]))


@pytest.mark.parametrize("begin", [about_first, Moments.like])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_moments_agree_with_a_direct_computation(
    scale: float, begin: Callable[[Tensor, Tensor], Moments]
) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3000, 7, generator=g) * 2 + scale
    b = (a.flip(1) + torch.randn(3000, 7, generator=g)).relu()
    moments = begin(a[:64], b[:64])
    parts = [Moments.about(moments.origin) for _ in range(3)]
    for i in range(0, 3000, 64):
        parts[i % 3].add(a[i : i + 64], b[i : i + 64])
    for part in parts:
        moments.merge(part)
    exact = torch.corrcoef(torch.cat([a.T, b.T]).double())[:7, 7:]
    agree(moments.correlation(), exact, 64, scale=lost(moments))  # added up in float64
    cov = torch.cov(torch.cat([a.T, b.T]).double(), correction=0)[:7, 7:]
    square = float((moments.squares / moments.samples).max())
    agree(moments.covariance(), cov, 64, scale=square)
    distance = (a.double()[:, :, None] - b.double()[:, None, :]).square().mean(0)
    agree(-moments.similarity("l2"), distance, 64, scale=4 * square + 2 * float(distance.max()))


@pytest.mark.parametrize(("size", "images"), [(64, 2), (64, 64), (64, 65), (50, 333), (400, 1999)])
def test_every_image_is_followed_once_whatever_the_number_of_cores(size: int, images: int) -> None:
    data = pictures(images, size=8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    theta, other = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, next(data.batches(2))[0])
    pair = Pair(net, sym, theta, other)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(activations.stream(pair, data, batch_size=size))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (first,) = next(iter(found[0].values()))
    assert first.samples == images
    for streams in found[1:]:
        ((moments,),) = streams.values()
        assert moments.samples == images
        square = float((first.squares / images).max())
        agree(moments.covariance(), first.covariance(), size + terms(net), scale=square)


@pytest.mark.parametrize("begin", [about_first, Moments.like])
def test_dead_units_have_no_correlation(
    begin: Callable[[Tensor, Tensor], Moments],
) -> None:
    a, b = torch.rand(100, 3), torch.rand(100, 3)
    a[:, 1] = 0.3
    moments = begin(a, b)
    moments.add(a, b)
    assert moments.variances()[0][1] == 0
    assert (moments.correlation()[1] == 0).all()


def test_only_what_would_cancel_is_subtracted() -> None:
    a, b = torch.randn(100, 3).relu(), torch.randn(100, 3)
    assert not Moments.like(a, b).shifted
    a[:, 1] += 100
    moments = Moments.like(a, b)
    assert moments.shifted
    assert moments.origin.nonzero().tolist() == [[0, 1]]
