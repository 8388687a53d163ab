"""Evaluation: agreement with direct computations, BatchNorm, paths, planes, curvature."""

import numpy as np
import pytest
import torch
from small import agree, normed, plain, task, terms
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from mcnotes import curves, evaluate, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Split

RECIPE = train.Recipe(epochs=2, batch_size=32, lr=0.05, schedule="linear")


@pytest.fixture(scope="module")
def pair() -> tuple[Theta, Theta]:
    a, b = (train.fit(normed(), task(), RECIPE, seed=s).theta for s in (1, 2))
    return a, b


def test_score_is_the_mean_over_all_images(pair: tuple[Theta, Theta]) -> None:
    net, split = normed(dropout=0.5), task().test
    net.load_state_dict(pair[0])
    net.eval()
    z = net(split.images.float() / 255)
    got = evaluate.score(net, pair[0], split, batch_size=7)
    agree(got.loss, cross_entropy(z, split.labels).item(), terms(net) + len(split))
    assert got.accuracy == (z.argmax(1) == split.labels).float().mean().item()
    p = evaluate.probabilities(net, pair[0], split, batch_size=7)
    agree(p, z.softmax(1), terms(net), scale=float(z.detach().abs().max()))


def test_batchnorm_at_an_end_changes_nothing(pair: tuple[Theta, Theta]) -> None:
    again = evaluate.batchnorm(normed(), pair[0], task().train)
    for name, x in pair[0].items():
        torch.testing.assert_close(again[name], x)


def test_batchnorm_is_the_statistics_of_the_images(pair: tuple[Theta, Theta]) -> None:
    net, split = normed(dropout=0.5), task().train
    momenta = [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    wrong = {n: x + 1 if "running" in n else x for n, x in pair[0].items()}
    kept = {n: x.clone() for n, x in wrong.items()}
    right = evaluate.batchnorm(net, wrong, split, batch_size=len(split))
    h = nn.functional.conv2d(split.images.float() / 255, pair[0]["0.weight"], padding=1)
    count, square = h[:, 0].numel(), float(h.square().mean((0, 2, 3)).max())
    agree(right["1.running_mean"], h.mean((0, 2, 3)), count, scale=square**0.5)
    agree(right["1.running_var"], h.var((0, 2, 3)), count, scale=square)
    assert all(torch.equal(wrong[n], x) for n, x in kept.items()), "an argument was changed"
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert all(m.training for m in net.modules())


def test_no_batchnorm_is_a_copy() -> None:
    theta = train.initialise(plain(), 1)
    same = evaluate.batchnorm(plain(), theta, task().train)
    assert same == theta
    assert same is not theta


def test_path_quantities() -> None:
    t = np.linspace(0, 1, 5)
    path = evaluate.Path(
        t, np.array([0, 1, 2, 3, 6.0]), np.array([1, 2, 5, 2, 3.0]), np.array([1, 0.5, 0, 0.5, 1])
    )
    assert path.barrier == pytest.approx(5 - 2)
    assert path.min_accuracy == 0
    assert path.mean_accuracy == pytest.approx((0.75 + 0.25 + 0.25 + 3 * 0.75) / 6)


def test_a_curve_that_stays_has_no_barrier(pair: tuple[Theta, Theta]) -> None:
    data = task()
    path = evaluate.along(
        normed(), curves.line(pair[0], pair[0]), data.test, statistics=data.train, points=3
    )
    assert path.barrier == 0
    assert path.arc[-1] == 0
    assert path.mean_accuracy == path.min_accuracy


def test_along_recomputes_batchnorm_at_every_point(pair: tuple[Theta, Theta]) -> None:
    net, data = normed(), task()
    line = curves.line(*pair)
    path = evaluate.along(net, line, data.test, statistics=data.train, points=5)
    for t, loss in zip(path.t, path.loss, strict=True):
        theta = evaluate.batchnorm(net, line(float(t)), data.train)
        assert loss == evaluate.score(net, theta, data.test).loss
    without = evaluate.along(net, line, data.test, statistics=None, points=5)
    assert abs(without.loss[2] - path.loss[2]) > 1e-4
    with pytest.raises(ValueError, match="points=1, expected at least 2"):
        evaluate.along(net, line, data.test, statistics=None, points=1)


def test_plane_passes_through_its_corners(pair: tuple[Theta, Theta]) -> None:
    net, data = normed(), task()
    corners = (*pair, train.initialise(net, 3))
    at = evaluate.coordinates(net, corners)
    names = [n for n, _ in net.named_parameters()]
    count = sum(p.numel() for p in net.parameters())
    for i in range(3):
        for j in range(3):
            parts = ((corners[i][n].double() - corners[j][n]).square().sum() for n in names)
            gap = np.linalg.norm(at[i] - at[j])
            agree(gap, float(sum(parts)) ** 0.5, count, scale=10, dtype=torch.float64)
    found = evaluate.plane(net, corners, data.test, statistics=None, resolution=3, margin=0)
    assert found.loss.shape == (3, 3)
    if found.x[0] == 0:  # the first network stands in the grid's corner
        agree(found.loss[0, 0], evaluate.score(net, corners[0], data.test).loss, terms(net))
    with pytest.raises(ValueError, match="lie on one line"):
        evaluate.coordinates(net, (*pair, curves.line(*pair)(0.3)))


def test_curvature_agrees_with_the_full_hessian() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 2), nn.Tanh(), nn.Linear(2, 3))
    theta = train.initialise(net, 1)
    split = Split(task().test.images[:40], task().test.labels[:40])
    flat = torch.cat([x.flatten() for x in theta.values()])

    def loss(v: torch.Tensor) -> torch.Tensor:
        parts = curves.views(v, [x.shape for x in theta.values()])
        z = functional_call(net, dict(zip(theta, parts, strict=True)), (split.images / 255,))
        return cross_entropy(z, split.labels)

    exact = torch.linalg.eigvalsh(hessian(loss, flat)).flip(0)[:2].numpy()
    got = evaluate.curvature(net, theta, split, top=2, tolerance=1e-4)
    np.testing.assert_allclose(got, exact, rtol=1e-3)


class Keeps(nn.Module):
    """Remembers, in evaluation mode, what it computed from its parameters, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias, self.last = (
            nn.Linear(144, 6),
            nn.Parameter(torch.ones(6)),
            nn.Linear(6, 3),
        )
        self.kept: dict[str, torch.Tensor] = {}

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bias)

    def train(self, mode: bool = True) -> "Keeps":
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias.exp()
        if not self.training:
            bias = self.kept.setdefault("bias", bias)
        z: torch.Tensor = self.last((self.first(x.flatten(1)) + bias).relu())
        return z


def test_a_network_that_remembers_is_measured_by_the_parameters_given() -> None:
    net, split = Keeps(), task().test
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    fresh = [evaluate.score(Keeps(), theta, split) for theta in (a, b)]
    assert [evaluate.score(net, theta, split) for theta in (a, b)] == fresh
    assert not net.kept
    sym = symmetry.find(net, task().example)
    tap = sym.tapper(net)
    seen = [tap(theta, task().example) for theta in (a, b)]
    alone = [sym.tapper(Keeps())(theta, task().example) for theta in (a, b)]
    for got, expected in zip(seen, alone, strict=True):
        for name in got:
            assert torch.equal(got[name][0], expected[name][0])
