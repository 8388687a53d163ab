"""Alignment: exact moments, planted permutations, no growth with the data, errors."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from small import normed, plain, rounding, task
from torch import nn

from mcnotes import curves, evaluate, matching, models, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Split, Task
from mcnotes.matching import activations
from mcnotes.matching.activations import AlignmentError, Moments
from mcnotes.matching.assignment import bundles


def noisy(theta: Theta, seed: int, level: float = 1e-3) -> Theta:
    g = torch.Generator().manual_seed(seed)
    return {
        n: x + level * x.std() * torch.randn(x.shape, generator=g) if x.dim() > 1 else x
        for n, x in theta.items()
    }


def pictures(n: int, channels: int = 1, size: int = 28) -> Split:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)
    return Split(images, torch.zeros(n, dtype=torch.long))


def about_first(a: torch.Tensor, b: torch.Tensor) -> Moments:
    return Moments.about(torch.stack([a[0], b[0]]))


@pytest.mark.parametrize("begin", [about_first, Moments.like])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_moments_agree_with_a_direct_computation(
    scale: float, begin: Callable[[torch.Tensor, torch.Tensor], Moments]
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
    torch.testing.assert_close(moments.correlation(), exact, rtol=0, atol=1e-5)
    cov = torch.cov(torch.cat([a.T, b.T]).double(), correction=0)[:7, 7:]
    torch.testing.assert_close(moments.covariance(), cov, rtol=0, atol=1e-4 * scale)
    distance = (a.double()[:, :, None] - b.double()[:, None, :]).square().mean(0)
    torch.testing.assert_close(-moments.similarity("l2"), distance, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("size", "images"), [(64, 2), (64, 64), (64, 65), (50, 333), (400, 1999)])
def test_every_image_is_followed_once_whatever_the_number_of_cores(size: int, images: int) -> None:
    data = pictures(images, size=8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    theta, other = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, next(data.batches(2))[0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(activations.stream(net, theta, other, data, sym, batch_size=size))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (first,) = next(iter(found[0].values()))
    assert first.samples == images
    for streams in found[1:]:
        ((moments,),) = streams.values()
        assert moments.samples == images
        torch.testing.assert_close(moments.covariance(), first.covariance(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("begin", [about_first, Moments.like])
def test_dead_units_have_no_correlation(
    begin: Callable[[torch.Tensor, torch.Tensor], Moments],
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


class Patches(nn.Module):
    """A vision transformer: 16 patches, heads of 6 units."""

    def __init__(self, width: int = 24, heads: int = 4, norm_first: bool = True) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=norm_first)
        self.patch = nn.Conv2d(1, width, 7, 7)
        self.place = nn.Parameter(torch.randn(16, width))
        blocks = [layer(width, heads, 2 * width, dropout=0.0) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(x).mean(1))


class Rows(nn.Module):
    """Linear layers on [N, H, W, C], as in Swin: PyTorch has several ways to run them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(1, 16, 4, 4), nn.LayerNorm(16)
        self.wide, self.narrow, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        logits: torch.Tensor = self.head(x.mean((1, 2)))
        return logits


class Placed(nn.Module):
    """What is added to each pixel comes from its place; of its two coordinates nothing is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Conv2d(1, 8, 3), nn.Linear(2, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 10)
        side = torch.linspace(-1, 1, 26)
        self.register_buffer("places", torch.cartesian_prod(side, side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.down(nn.functional.relu(self.up(self.places)))
        x = nn.functional.leaky_relu(self.first(x) + bias.T.view(8, 26, 26))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def separable(groups: int) -> nn.Module:
    """A convolution of so many groups (24: depthwise) between others; no unit is ever silent."""
    layers = [nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.LeakyReLU()]
    layers += [nn.Conv2d(24, 24, 3, groups=groups), nn.BatchNorm2d(24), nn.LeakyReLU()]
    layers += [nn.Conv2d(24, 16, 1), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.build("mlp", num_classes=10, in_channels=1, image_size=28, width=32),
    "tinyten": lambda: models.build("tinyten", num_classes=10, in_channels=1, width=8),
    "resnet20": lambda: models.build("resnet20", num_classes=10, in_channels=1, width=8),
    "googlenet": lambda: models.build("googlenet", num_classes=10, in_channels=1, width=0.125),
    "depthwise": lambda: separable(24),
    "grouped": lambda: separable(4),
    "attention": Patches,
    "attention, post-norm": lambda: Patches(norm_first=False),
    "tokens in rows": Rows,
    "units of places": Placed,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("at", ["post", "pre"])
def test_planted_permutation_is_recovered(name: str, at: activations.At) -> None:
    net, images = NETWORKS[name](), pictures(128)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = sym.random(torch.Generator().manual_seed(2))
    copy = sym.permute(noisy(theta, 3), planted)
    found = matching.match(net, theta, copy, images, sym, at=at)
    back = sym.permute(copy, found.perm)
    undone = sym.permute(copy, sym.inverse(planted))
    for group, p in sym.compose(planted, found.perm).items():
        alive = torch.ones(len(p), dtype=torch.bool)
        alive[found.dead.get(group, [])] = False
        assert torch.equal(p[alive], torch.arange(len(p))[alive]), group
    assert all(torch.equal(back[n], undone[n]) for n in back) or any(
        len(d) for d in found.dead.values()
    )
    for group in found.after:
        assert found.after[group].sum() >= found.before[group].sum() - 1e-6


END_TO_END = {
    "resnet32": lambda: models.build("resnet32", num_classes=3, in_channels=1, width=4),
    "googlenet": lambda: models.build("googlenet", num_classes=3, in_channels=1, width=0.125),
    "attention": Patches,
}


@pytest.mark.parametrize("name", END_TO_END)
def test_from_two_networks_to_a_curve(name: str) -> None:
    net, split = END_TO_END[name](), pictures(24)
    split = replace(split, labels=torch.arange(24) % 3)
    data = Task("noise", split, split, split, ("a", "b", "c"))
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, data.example)
    perm = matching.match(net, a, b, split, sym).perm
    assert any(not torch.equal(p, torch.arange(len(p))) for p in perm.values())
    curve = curves.bezier(a, sym.permute(b, perm))
    recipe = train.Recipe(1, batch_size=8, lr=0.01, augment=False)
    fitted = train.fit_curve(net, curve, data, recipe, seed=3).curve
    line, path = (
        evaluate.profile(net, c, split, statistics=split, points=3)
        for c in (curves.line(a, b), fitted)
    )
    assert path.loss[[0, 2]] == pytest.approx(line.loss[[0, 2]], rel=1e-4)  # the same functions
    assert math.isfinite(path.loss[1])
    assert path.loss[1] != line.loss[1]


def test_matching_is_the_best_of_all_permutations() -> None:
    from itertools import permutations

    net, data = (
        torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(144, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
        ),
        task(),
    )
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, data.example)
    found = matching.match(net, a, b, data.train, sym)
    ((group, p),) = found.perm.items()
    matrix = activations.stream(net, a, b, data.train, sym)[group][0].correlation()
    best = max(permutations(range(5)), key=lambda q: sum(matrix[i, j] for i, j in enumerate(q)))
    assert p.tolist() == list(best)
    torch.testing.assert_close(found.after[group], matrix[range(5), best])


def test_batch_size_does_not_matter() -> None:
    net, data = normed(), task()
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, data.example)
    small, large = (
        matching.match(net, a, b, data.train, sym, batch_size=n) for n in (7, len(data.train))
    )
    for group, (moments,) in matching.stream(net, a, b, data.train, sym).items():
        # The variance is what is left of the mean square, the mean taken off: that much is lost.
        cancelled = float((moments.squares / moments.samples / moments.variances()).max())
        margin = rounding(moments.samples, cancelled)
        torch.testing.assert_close(small.after[group], large.after[group], rtol=0, atol=margin)
        assert margin < 0.1 / len(data.train), "an image left out would not be seen"


def test_errors() -> None:
    net, data = plain(), task()
    sym = symmetry.find(net, data.example)
    theta = train.initialise(net, 1)
    with pytest.raises(AlignmentError, match="got 1 images, expected 2 or more"):
        matching.match(net, theta, theta, data.train.first(1), sym)
    with pytest.raises(AlignmentError, match=r"'3\.bias' is"):
        matching.match(net, theta, theta | {"3.bias": torch.zeros(9)}, data.train, sym)
    broken = theta | {"1.weight": theta["1.weight"] * torch.nan}
    with pytest.raises(AlignmentError, match="not finite"):
        matching.match(net, theta, broken, data.train, sym)


def test_heads_are_matched_with_the_units_within() -> None:
    """The joint optimum, by trying every pairing of heads and of units in them."""
    from itertools import permutations

    net, images = Patches(width=6, heads=2), pictures(64)
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    found, moments = (f(net, a, b, images, sym) for f in (matching.match, activations.stream))
    parts = {name: blocks for name, blocks in bundles(sym).items() if len(blocks) > 1}
    assert len(parts) == 2
    for name, blocks in parts.items():
        best = -float("inf"), ()
        for order in permutations(range(2)):
            gain, plan = 0.0, {name: order}
            for names in zip(*blocks, strict=True):
                tiles = sum(m.correlation() for m in moments[names[0]]).view(2, 3, 2, 3)
                for i, j in enumerate(order):
                    c = tiles[i, :, j]
                    total, p = max((sum(c[range(3), p]), p) for p in permutations(range(3)))
                    gain, plan[names[j]] = gain + float(total), p
            best = max(best, (gain, plan), key=lambda entry: entry[0])
        for group, p in best[1].items():
            assert found.perm[group].tolist() == list(p)
    assert sym.verify(net, next(images.batches(2))[0]) < 1e-9
