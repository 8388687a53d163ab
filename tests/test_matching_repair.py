"""REPAIR: what it restores, and what it refuses."""

import pytest
import torch
from small import agree, task, terms, trained
from torch import Tensor, nn

from mcnotes import curves, matching, train


def repaired(found: Tensor, expected: Tensor, net: nn.Module, samples: int, *ends: Tensor) -> None:
    """Equal up to rounding; ends: means and deviations of units, the latter from mean squares."""
    mean, deviation = torch.stack(ends).unbind(1)
    lost = 1 + float((mean / deviation).square().max())
    agree(found, expected, terms(net) + samples, scale=lost * float(expected.abs().max()))


def test_repair_gives_units_the_statistics_of_the_ends() -> None:
    net, data, (a, b, _), _ = trained()
    middle = curves.line(a, b)(0.5)
    mended = matching.repair(net, middle, (a, b), data.train)
    found, *both = (matching.channel_moments(net, t, data.train)["1"] for t in (mended, a, b))
    for got, one, two in zip(found, *both, strict=True):
        repaired(got, (one + two) / 2, net, len(data.train), *map(torch.stack, both))
    assert torch.equal(mended["3.weight"], middle["3.weight"])
    for t, end in ((0.0, a), (1.0, b)):
        for name, x in matching.repair(net, end, (a, b), data.train, t).items():
            repaired(x, end[name], net, len(data.train), *map(torch.stack, both))


def test_repair_of_channels_and_of_two_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    data = task(48)
    a, b = (train.initialise(net, s) for s in (1, 2))
    mended = matching.repair(net, curves.line(a, b)(0.25), (a, b), data.train, 0.25)
    found, one, two = (matching.channel_moments(net, t, data.train) for t in (mended, a, b))
    for layer in ("0", "3"):
        for got, x, y in zip(found[layer], one[layer], two[layer], strict=True):
            ends = torch.stack(one[layer]), torch.stack(two[layer])
            repaired(got, 0.75 * x + 0.25 * y, net, 100 * len(data.train), *ends)  # 10 x 10 pixels


def test_repair_refuses_what_it_cannot_shift() -> None:
    data = task()
    bare = nn.Sequential(nn.Flatten(), nn.Linear(144, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    theta = train.initialise(bare, 1)
    with pytest.raises(ValueError, match="'1' has no bias"):
        matching.repair(bare, theta, (theta, theta), data.train)
    single = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    theta = train.initialise(single, 1)
    with pytest.raises(ValueError, match="no linear or convolution layer before the last"):
        matching.repair(single, theta, (theta, theta), data.train)
