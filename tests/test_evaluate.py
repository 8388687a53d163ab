"""Evaluation: agreement with direct computations, BatchNorm, paths, planes, curvature."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets import Keeps
from small import agree, normed, plain, task, terms
from torch import Tensor, nn
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
    assert same.keys() == theta.keys()
    assert all(torch.equal(same[n], x) and same[n] is not x for n, x in theta.items())


def test_path_quantities() -> None:
    t = np.linspace(0, 1, 5)
    path = evaluate.Profile(
        t, np.array([0, 1, 2, 3, 6.0]), np.array([1, 2, 5, 2, 3.0]), np.array([1, 0.5, 0, 0.5, 1])
    )
    assert path.barrier == pytest.approx(5 - 2)
    assert path.min_accuracy == 0
    assert path.mean_accuracy == pytest.approx((0.75 + 0.25 + 0.25 + 3 * 0.75) / 6)


def test_a_curve_that_stays_has_no_barrier(pair: tuple[Theta, Theta]) -> None:
    data = task()
    path = evaluate.profile(
        normed(), curves.line(pair[0], pair[0]), data.test, statistics=data.train, points=3
    )
    assert path.barrier == 0
    assert path.arc[-1] == 0
    assert path.mean_accuracy == path.min_accuracy


def test_along_recomputes_batchnorm_at_every_point(pair: tuple[Theta, Theta]) -> None:
    net, data = normed(), task()
    line = curves.line(*pair)
    path = evaluate.profile(net, line, data.test, statistics=data.train, points=5)
    for t, loss in zip(path.t, path.loss, strict=True):
        theta = evaluate.batchnorm(net, line(float(t)), data.train)
        assert loss == evaluate.score(net, theta, data.test).loss
    without = evaluate.profile(net, line, data.test, statistics=None, points=5)
    assert abs(without.loss[2] - path.loss[2]) > 1e-4
    with pytest.raises(ValueError, match="points: got 1, expected a whole number of at least 2"):
        evaluate.profile(net, line, data.test, statistics=None, points=1)


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


def hessian_of(net: nn.Module, theta: Theta, split: Split) -> np.ndarray:
    """All eigenvalues of the loss's Hessian in every tensor of `theta`, descending."""
    flat = torch.cat([x.flatten() for x in theta.values()])
    images, labels = next(split.batches(len(split)))

    def loss(v: torch.Tensor) -> torch.Tensor:
        parts = curves.views(v, [x.shape for x in theta.values()])
        state = dict(zip(theta, parts, strict=True))
        return cross_entropy(functional_call(net, state, (images.to(v.dtype),)), labels)

    eigenvalues: np.ndarray = torch.linalg.eigvalsh(hessian(loss, flat)).flip(0).numpy()
    return eigenvalues


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvature_agrees_with_the_full_hessian(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 2), nn.Tanh(), nn.Linear(2, 3))
    theta = {n: x.to(dtype) for n, x in train.initialise(net, 1).items()}
    split = task().test.first(40)
    exact = hessian_of(net, theta, split)[:2]
    single = dtype == torch.float32
    got = evaluate.curvature(net, theta, split, top=2, tolerance=1e-4 if single else 1e-12)
    np.testing.assert_allclose(got, exact, rtol=1e-3 if single else 1e-9)


class Partly(nn.Module):
    """A body; a head and a parameter that `use` brings in, or not."""

    def __init__(self, use: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        super().__init__()
        layers = nn.Linear(144, 2), nn.Tanh(), nn.Linear(2, 3)
        self.body, self.auxiliary = nn.Sequential(nn.Flatten(), *layers), nn.Linear(3, 3)
        self.lone, self.use = nn.Parameter(torch.ones(3)), use

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lone)

    def forward(self, x: Tensor) -> Tensor:
        z = self.use(self.body(x), self.lone)
        return self.auxiliary(z) if self.training else z


USES: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "unused": lambda z, p: z,
    "without slope": lambda z, p: z + p.sign(),
    "detached": lambda z, p: z + p.detach(),
    "body without slope": lambda z, p: p + z.round(),
    "linear": lambda z, p: z - p.sum(),  # softmax takes no notice of it
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_curvature_counts_what_the_loss_does_not_use_as_zeros(
    use: Callable[[Tensor, nn.Parameter], Tensor],
) -> None:
    net, split = Partly(use).eval(), task().test.first(40)
    theta = {n: x.double() for n, x in train.initialise(net, 1).items()}
    exact = hessian_of(net, theta, split)[:2]
    got = evaluate.curvature(net, theta, split, top=2, tolerance=1e-12)
    np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-12)
    assert got[0] > 0.01


def test_curvature_of_a_constant_is_zero() -> None:
    net, split = Partly(lambda z, p: z.detach()), task().test.first(4)
    assert evaluate.curvature(net, train.initialise(net, 1), split, top=2).tolist() == [0, 0]


def test_curvature_of_tied_weights_is_that_of_both_uses() -> None:
    """As of one layer that is called twice."""

    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
            self.again = nn.Linear(3, 3, bias=False) if tied else None
            if self.again:
                self.again.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1)[:, 30:90:20]).tanh()
            h = self.again(h) if self.again else h @ self.first.weight.T
            return self.last(h.tanh())  # type: ignore[no-any-return]

    split = task().test.first(40)
    theta = {n: x.double() for n, x in train.initialise(Twice(False), 1).items()}
    exact = hessian_of(Twice(False), theta, split)[:2]
    both = theta | {"again.weight": theta["first.weight"].clone()}
    got = evaluate.curvature(Twice(True), both, split, top=2, tolerance=1e-12)
    np.testing.assert_allclose(got, exact, rtol=1e-9)


def test_curvature_in_half_precision_is_computed_in_single() -> None:
    net, split = plain(), task().test.first(40)
    low = {n: x.bfloat16() for n, x in train.initialise(net, 1).items()}
    single = {n: x.float() for n, x in low.items()}
    assert evaluate.curvature(net, low, split) == evaluate.curvature(net, single, split)


def test_curvature_refuses_what_has_none() -> None:
    net, split = plain(), task().test
    theta = train.initialise(net, 1)
    for images, top in ((split.first(0), 1), (split, 0), (split, 10**6)):
        with pytest.raises(ValueError, match="expected at least 1 image and top from 1 to"):
            evaluate.curvature(net, theta, images, top=top)
    with pytest.raises(ValueError, match="not finite"):
        evaluate.curvature(net, {n: x * torch.nan for n, x in theta.items()}, split)


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
