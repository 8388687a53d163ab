"""Networks as people have them: their layout in memory, buffers, hooks and gradients are right."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Keeps
from small import NETWORKS, Checkpointed, agree, normed, pictures, plain, task, terms
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from mcnotes import attacks, calls, checkpoints, curves, evaluate, matching, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Loader
from mcnotes.matching import Pair

RECIPE = train.Recipe(epochs=2, batch_size=32, lr=0.05, schedule="linear")
LONGER = replace(RECIPE, epochs=6, batch_size=16)
DATA = task()


def states(net: nn.Module) -> tuple[Theta, Theta]:
    """Two networks of other weights; masks and the like are those of `net`."""
    a, b = ({n: x.detach().clone() for n, x in net.state_dict().items()} for _ in range(2))
    g = torch.Generator().manual_seed(0)
    drawn = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        spread = a[name].std().nan_to_num(1.0)
        b[name] = drawn.setdefault(id(p), torch.randn(p.shape, generator=g) * spread)
    return a, b


# How images lie in memory


class Flattens(nn.Module):
    """Convolutions, and then `view`, as in LeNet; or `flatten`, which takes any layout."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3)
        self.last, self.extra, self.how = nn.Linear(5 * 64, 3), nn.Linear(5 * 64, 3), how

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = F.relu(self.second(F.relu(self.first(x))))
        rows = h.flatten(1)
        if self.how == "view" or (self.how == "view in training" and self.training):
            rows = h.view(len(x), -1)
        elif self.how == "view of the pooled":
            rows = F.interpolate(F.max_pool2d(h, 2), scale_factor=2).view(len(x), -1)
        elif self.how == "pooled":
            rows = F.interpolate(F.max_pool2d(h, 2), scale_factor=2).flatten(1)
        z: Tensor = self.last(rows)
        return (z, self.extra(rows)) if self.training else z


LAYOUTS = {
    "view": "flatten",
    "view in training": "flatten",
    "view of the pooled": "pooled",
}


@pytest.mark.parametrize("how", LAYOUTS)
def test_networks_that_want_their_channels_first_get_them(how: str) -> None:
    nets = Flattens(how), Flattens(LAYOUTS[how])
    a, b = (train.initialise(nets[0], seed) for seed in (1, 2))
    for net in nets:
        net.train()
    many = terms(nets[0]) + len(DATA.test)
    agree(*(evaluate.score(net, a, DATA.test).loss for net in nets), many)
    agree(*(evaluate.probabilities(net, a, DATA.test) for net in nets), many)
    paths = [
        evaluate.profile(net, curves.line(a, b), DATA.test, statistics=None, points=3)
        for net in nets
    ]
    agree(paths[0].loss, paths[1].loss, many)
    steps = [train.Step(net, curves.Curve((a,)), slice(0, 1), RECIPE, DATA.device) for net in nets]
    x, y = next(DATA.train.batches(32))
    slopes = []
    for step in steps:
        with evaluate.mode(step.net, training=True):
            slopes.append(step.gradient(x, y, torch.ones(1))[1])
    agree(*slopes, 32 * 100 + many)
    syms = [symmetry.find(net, DATA.example) for net in nets]
    found = [
        matching.match(Pair(net, sym, a, b), DATA.train)
        for net, sym in zip(nets, syms, strict=True)
    ]
    for name in found[1].perm:
        assert torch.equal(found[0].perm[name], found[1].perm[name])
    assert syms[0].verify(nets[0], DATA.example) < 1e-12
    train.fit(nets[0], DATA, replace(RECIPE, epochs=1), seed=1)


def test_the_layout_is_found_without_a_trace() -> None:
    """Neither statistics nor random numbers nor hooks show that it was looked for."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 3))
    seen: list[int] = []
    net[3].register_forward_hook(lambda *_: seen.append(1))
    theta, before = train.initialise(net, 1), torch.get_rng_state()
    stats = matching.channel_moments(net, theta, DATA.train.first(40))
    assert torch.equal(torch.get_rng_state(), before)
    h = F.conv2d(DATA.train.first(40).images.float() / 255, theta["0.weight"], theta["0.bias"])
    agree(stats["0"][0], h.mean((0, 2, 3)), h[:, 0].numel(), scale=float(h.abs().max()))
    x, _ = next(DATA.train.batches(16))
    fresh = calls.stated("test", net, theta)
    with evaluate.mode(net, training=True):
        calls.call(net, fresh, x)
    assert int(fresh["1.num_batches_tracked"]) == 1


# Buffers


class Scaled(nn.Module):
    """A running scale of its own, which training updates in one of three ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(144, 16), nn.Linear(16, 3), how
        self.register_buffer("scale", torch.ones(()), persistent=how != "not persistent")

    def forward(self, x: Tensor) -> Tensor:
        h = 5 * self.first(x.flatten(1))
        if self.training and self.how == "assigned":
            self.scale = 0.8 * self.scale + 0.2 * h.detach().std()
        elif self.training:
            self.scale.mul_(0.8).add_(0.2 * h.detach().std())
        z: Tensor = self.last((h / self.scale).relu())
        return z


def instance_normed() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(600, 3))


OWN = ["in place", "assigned", "not persistent"]


class Frozen(nn.BatchNorm2d):
    """As in detectors: never in training mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode=False)
        return self


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Frozen])
def test_statistics_of_a_norm_that_runs_twice_are_those_of_both_runs(
    kind: type[nn.BatchNorm2d],
) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next, self.norm = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), kind(6)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.norm(3 * self.next(self.norm(self.conv(x)).relu()) + 1).mean((2, 3))
            return z

    net = Again()
    got = evaluate.batchnorm(net, train.initialise(net, 1), DATA.train, batch_size=32)
    x = DATA.train.images.float().div(255).split(32)
    means, variances = [], []
    net.load_state_dict(train.initialise(net, 1))
    with torch.no_grad():
        for part in x:
            h = net.conv(part)
            k = 3 * net.next(F.batch_norm(h, None, None, training=True).relu()) + 1
            means += [h.mean((0, 2, 3)), k.mean((0, 2, 3))]
            variances += [h.var((0, 2, 3)), k.var((0, 2, 3))]
    n = len(x) * 32 * 100 + 54
    square = float(torch.stack(variances).max() + torch.stack(means).square().max())
    agree(got["norm.running_mean"], torch.stack(means).mean(0), n, scale=square**0.5)
    agree(got["norm.running_var"], torch.stack(variances).mean(0), n, scale=square)
    assert got["norm.num_batches_tracked"] == 2 * len(x)
    assert not net.norm._forward_pre_hooks
    assert net.norm.momentum == 0.1


def test_batchnorm_on_one_image_says_what_to_do() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))
    with pytest.raises(ValueError, match=r"batchnorm: got a batch of one.*Fix: take at least 2"):
        evaluate.batchnorm(net, train.initialise(net, 1), DATA.train.first(1))


@pytest.mark.parametrize("how", OWN)
def test_trained_buffers_come_back(how: str) -> None:
    net = Scaled(how)
    fit = train.fit(net, DATA, LONGER, seed=1)
    assert float(net.scale) == 1, "the module itself was changed"
    images = DATA.train.images.float() / 255
    h = 5 * F.linear(images.flatten(1), fit.theta["first.weight"], fit.theta["first.bias"])
    assert float(fit.theta["scale"]) == pytest.approx(float(h.std()), rel=0.2)
    assert evaluate.score(net, fit.theta, DATA.train).loss < 2 * fit.losses[-1] + 0.05


def test_running_statistics_of_instance_norm_are_renewed() -> None:
    net = instance_normed()
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    got = evaluate.batchnorm(net, a, DATA.train, batch_size=len(DATA.train))
    h = F.conv2d(DATA.train.images.float() / 255, a["0.weight"], a["0.bias"])
    square = float(h.square().mean((0, 2, 3)).max())
    agree(got["1.running_mean"], h.mean((0, 2, 3)), h[:, 0].numel(), scale=square**0.5)
    agree(got["1.running_var"], h.var((2, 3)).mean(0), h[:, 0].numel(), scale=square)
    line = curves.line(a, b)
    path = evaluate.profile(net, line, DATA.test, statistics=DATA.train, points=3)
    half = evaluate.batchnorm(net, line(0.5), DATA.train)
    assert path.loss[1] == evaluate.score(net, half, DATA.test).loss


def test_statistics_of_a_norm_with_two_names_are_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
            self.same, self.last = self.norm, nn.Linear(600, 3)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.last(self.same(self.conv(x)).relu().flatten(1))
            return z

    net = Twice()
    theta = train.fit(net, DATA, RECIPE, seed=1).theta
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(theta[f"norm.{name}"], theta[f"same.{name}"])
    net.load_state_dict(theta)
    net.eval()
    with torch.no_grad():
        z = net(DATA.test.images.float() / 255)
    expected = float(cross_entropy(z, DATA.test.labels))
    agree(evaluate.score(net, theta, DATA.test).loss, expected, terms(net) + len(z))


@pytest.mark.parametrize("how", OWN)
def test_statistics_of_an_unknown_kind_are_not_mixed(how: str) -> None:
    net = Scaled(how)
    a, b = (train.fit(net, DATA, RECIPE, seed=seed).theta for seed in (1, 2))
    words = r"the buffer 'scale' \(of a Scaled\) differs between the networks"
    with pytest.raises(ValueError, match=f"profile: {words}"):
        evaluate.profile(net, curves.line(a, b), DATA.test, statistics=DATA.train, points=3)
    with pytest.raises(ValueError, match=f"train: {words}"):
        train.fit_curve(net, curves.bezier(a, b), DATA, RECIPE, seed=1)
    with pytest.raises(ValueError, match=f"plane: {words}"):
        evaluate.plane(net, (a, b, a), DATA.test, statistics=None)


def masked(old: bool = True) -> nn.Module:
    """Half of the weights of a layer are pruned."""
    net = plain()
    prune.random_unstructured(net[1], "weight", 0.5)
    net(DATA.example)  # from here on it keeps a tensor with a history
    return net


def test_masks_stay_to_the_last_bit_along_a_path() -> None:
    net = masked()
    a, b = states(net)
    for t in (0.1, 1 / 3, 0.7):
        assert torch.equal(curves.bezier(a, b)(t)["1.weight_mask"], a["1.weight_mask"])
    fitted = train.fit_curve(net, curves.bezier(a, b), DATA, RECIPE, seed=1).curve
    assert torch.equal(fitted(0.3)["1.weight_mask"], a["1.weight_mask"])
    other = b | {"1.weight_mask": 1 - b["1.weight_mask"]}
    with pytest.raises(ValueError, match=r"'1.weight_mask' .* differs between the networks"):
        evaluate.profile(net, curves.line(a, other), DATA.test, statistics=None)


def frozen() -> nn.Module:
    net = plain()
    net[1].weight.requires_grad_(False)
    return net


def test_frozen_parameters_stay_to_the_last_bit() -> None:
    net = frozen()
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    b |= {"1.weight": a["1.weight"]}
    fitted = train.fit_curve(net, curves.bezier(a, b), DATA, RECIPE, seed=1).curve
    for t in (0, 0.2, 0.5, 0.9):
        assert torch.equal(fitted(t)["1.weight"], a["1.weight"])
    assert not torch.equal(fitted(0.5)["3.weight"], curves.bezier(a, b)(0.5)["3.weight"])


def spectral(new: bool) -> nn.Module:
    norm = parametrizations.spectral_norm if new else nn.utils.spectral_norm
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3))
    for layer in (net[1], net[3]):
        with torch.no_grad():
            layer.weight.mul_(3)
        norm(layer, n_power_iterations=5)
    return net


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("new", [True, False])
def test_spectral_norm_along_a_path_is_that_of_the_mixed_weights(new: bool) -> None:
    net = spectral(new)
    a, b = states(net)
    for name in b:
        if name.endswith(("_u", "_v")):
            b[name] = -b[name]  # as good: they have no sign
    line = curves.line(a, b)
    path = evaluate.profile(net, line, DATA.test, statistics=DATA.train, points=5)
    for t, loss in zip(path.t.tolist(), path.loss, strict=True):
        x, middle = DATA.test.images.double() / 255, line(t)
        for k in (1, 3):
            (name,) = (n for n in a if n.startswith(f"{k}.") and n.endswith(("original", "_orig")))
            w = middle[name].double()
            x = F.linear(
                x.flatten(1), w / torch.linalg.matrix_norm(w, 2), middle[f"{k}.bias"].double()
            )
            x = x.relu() if k == 1 else x
        agree(loss, cross_entropy(x, DATA.test.labels), terms(net) + len(x), scale=4)


class Extra(nn.Module):
    """An extra state that is no tensor, and a constant that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(144, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.first(x.flatten(1)).relu()) + self.shift
        return z


def test_extra_states_and_constants_do_not_stand_in_the_way() -> None:
    net = Extra()
    a, b = (train.fit(net, DATA, RECIPE, seed=seed).theta for seed in (1, 2))
    assert torch.equal(a["shift"], net.shift)
    sym = symmetry.find(net, DATA.example)
    assert sym.verify(net, DATA.example) < 1e-12
    assert sym.verify(net, DATA.example, a) < 1e-12
    b = sym.permute(b, matching.match(Pair(net, sym, a, b), DATA.train).perm)
    curve = train.fit_curve(net, curves.bezier(a, b), DATA, RECIPE, seed=1).curve
    evaluate.profile(net, curve, DATA.test, statistics=DATA.train, points=3)
    persistent = {n: x for n, x in a.items() if n != "shift"}
    assert evaluate.score(net, persistent, DATA.test) == evaluate.score(net, a, DATA.test)


# Gradients


def slope_of(net: nn.Module, theta: Theta, x: Tensor, y: Tensor) -> Tensor:
    step = train.Step(net, curves.Curve((theta,)), slice(0, 1), RECIPE, torch.device("cpu"))
    torch.manual_seed(2)
    with evaluate.mode(net, training=True):
        return step.gradient(x, y, torch.ones(1))[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_with_checkpointing_are_those_of_the_parameters_given(name: str) -> None:
    """Against a plain module that holds these weights."""
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    torch.manual_seed(1)
    held = NETWORKS[name]().double()
    theta = {n: x.detach() for n, x in held.state_dict().items()}
    x, _ = next(pictures(8).batches(8))
    x, y = x.double(), torch.arange(8)
    held.train()
    torch.manual_seed(2)  # of dropout
    z = held(x)
    loss = train.cost(z, y)
    slopes = torch.autograd.grad(loss, list(held.parameters()))
    decay = RECIPE.weight_decay
    parts = zip(slopes, held.parameters(), strict=True)
    expected = torch.cat([(g + decay * p).detach().flatten() for g, p in parts])
    inner = {f"inner.{n}": v for n, v in theta.items()}
    for found in (slope_of(net, theta, x, y), slope_of(Checkpointed(net), inner, x, y)):
        # Losses are taken in float32.
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_attacks_and_curvature_take_their_gradients_with_the_parameters_given() -> None:
    net = plain()
    theta, split = train.initialise(net, 5), DATA.test.first(20)
    inner = {f"inner.{n}": x for n, x in theta.items()}
    attack = attacks.PGD(0.1, 3)
    one = evaluate.score(net, theta, split, perturb=attack)
    assert evaluate.score(Checkpointed(net), inner, split, perturb=attack) == one
    assert one.loss > evaluate.score(net, theta, split).loss
    curved = (
        evaluate.curvature(net, theta, split),
        evaluate.curvature(Checkpointed(net), inner, split),
    )
    np.testing.assert_allclose(curved[1], curved[0], rtol=1e-4)
    recipe = replace(RECIPE, epochs=1)
    fits = [
        train.fit(n, DATA, recipe, seed=1, init=t, perturb=attack)
        for n, t in ((net, theta), (Checkpointed(net), inner))
    ]
    assert fits[0].losses == fits[1].losses


# Inputs


class WritesOver(nn.Module):
    """A network that changes its input in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(144, 16), nn.Linear(16, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "scaled":
            x.sub_(0.5).div_(0.25)
        elif self.how == "rectified":
            x = F.relu(x.sub_(0.5), inplace=True)
        elif self.how == "assigned":
            x[:, :, 6:] = 2 * x[:, :, :6] - x[:, :, 6:]
        z: Tensor = self.last(self.first(x.flatten(1)).relu())
        return z


@pytest.mark.parametrize("how", ["scaled", "rectified", "assigned"])
def test_each_call_gets_its_own_input(how: str) -> None:
    net = WritesOver(how)
    a = train.initialise(net, 1)
    sym = symmetry.find(net, DATA.example)
    found = matching.match(Pair(net, sym, a, a), DATA.train)
    assert float(found.before["first"].min()) > 1 - 1e-6
    batches = list(DATA.test.batches(20))
    kept = [x.clone() for x, _ in batches]
    loader = Loader(batches, torch.device("cpu"))
    scores = [evaluate.score(net, a, loader) for _ in range(2)]
    assert scores[0] == scores[1]
    train.fit(net, loader, RECIPE, seed=1, init=a)
    evaluate.score(net, a, loader, perturb=lambda model, x, y: x.add_(1))
    assert all(torch.equal(x, y) for (x, _), y in zip(batches, kept, strict=True))


# What is changed for a while comes back


class Renormed(nn.Module):
    """Writes over rows of its embedding that are too long."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Embedding(256, 8, max_norm=0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.rows((255 * x.flatten(1)).long()).mean(1))
        return z


class Clipped(nn.Module):
    """Keeps its weights small, as the critics of Wasserstein GANs do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3), nn.Linear(800, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data.clamp_(-0.01, 0.01)
        z: Tensor = self.last(self.first(x.expand(-1, 2, -1, -1)).relu().flatten(1))
        return z


@pytest.mark.parametrize("kind", [Renormed, Clipped])
def test_weights_that_a_network_writes_over_stay_those_of_the_caller(
    kind: type[nn.Module],
) -> None:
    net = kind()
    theta, own = ({n: x.detach().clone() for n, x in net.state_dict().items()} for _ in range(2))
    pair = Pair(net, symmetry.find(net, torch.rand(2, 1, 12, 12)), theta, dict(theta))
    matching.match(pair, DATA.test)
    evaluate.profile(net, curves.line(theta, theta), DATA.test, statistics=DATA.train, points=2)
    got = evaluate.score(net, theta, DATA.test).loss
    for name, x in net.state_dict().items():
        assert torch.equal(theta[name], own[name])
        assert torch.equal(x, own[name])
    with torch.no_grad():
        z = net.eval()(DATA.test.images.float() / 255)
    agree(got, float(cross_entropy(z, DATA.test.labels)), terms(net) + len(z))


class Fails(nn.Module):
    """BatchNorm, and an error in the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = normed(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2 == 0:
            raise RuntimeError("second call")
        z: Tensor = self.body(x)
        return z


def everything(net: nn.Module) -> list[Any]:
    return [
        [m.training for m in net.modules()],
        [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)],
        [x.clone() for x in net.state_dict().values()],
        torch.get_rng_state(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.backends.mkldnn.enabled,
    ]


WORK: dict[str, Callable[[nn.Module, Theta], object]] = {
    "score": lambda net, a: evaluate.score(net, a, DATA.test, batch_size=20),
    "batchnorm": lambda net, a: evaluate.batchnorm(net, a, DATA.test, batch_size=20),
    "attacked": lambda net, a: evaluate.score(net, a, DATA.test, perturb=attacks.PGD(0.1, 3)),
    "curvature": lambda net, a: evaluate.curvature(net, a, DATA.test.first(8)),
    "fit": lambda net, a: train.fit(net, DATA, RECIPE, seed=1, init=a),
    "initialise": lambda net, a: train.initialise(net, 7),
    "check": lambda net, a: [checkpoints.check(net, DATA) for _ in range(2)],
    "verify": lambda net, a: symmetry.find(net, DATA.example).verify(net, DATA.example),
}


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("work", WORK)
def test_what_is_changed_comes_back(
    work: str, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds_every_device(seed: int) -> None:
        raise AssertionError("the generators of all GPUs would be changed")

    net = Fails() if broken else nn.Sequential(normed())
    net.train()
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval().momentum = 0.3
    a, before = train.initialise(net, 1), everything(net)
    monkeypatch.setattr(torch, "manual_seed", seeds_every_device)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds_every_device)
    try:
        WORK[work](net, a)
    except (RuntimeError, checkpoints.CheckpointError):
        assert broken
    for x, y in zip(before, everything(net), strict=True):
        assert str(x) == str(y)


def test_two_threads_do_not_meet() -> None:
    """Of one network: each thread gets its own numbers, and all comes back."""
    net = normed(dropout=0.5)
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, DATA.example)
    before, found = everything(net), list[bool]()

    def work(k: int) -> None:
        for _ in range(5):
            found.append(evaluate.score(net, (a, b)[k], DATA.test, batch_size=10) != expected[k])
            found.append(sym.verify(net, DATA.example) > 1e-9)

    expected = [evaluate.score(net, theta, DATA.test, batch_size=10) for theta in (a, b)]
    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [False] * 20
    for x, y in zip(before, everything(net), strict=True):
        assert str(x) == str(y)


# Old hooks, caches, names of weights


def old_weight_norm() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.utils.weight_norm(nn.Linear(144, 16)), nn.ReLU(), nn.Linear(16, 3)
    )


KEEPERS = {
    "weight_norm": old_weight_norm,
    "spectral_norm": lambda: spectral(False),
    "pruned": masked,
    "a cache": Keeps,
}


@pytest.fixture
def _old_names() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.usefixtures("_old_names")
@pytest.mark.parametrize("kind", KEEPERS)
def test_networks_that_keep_tensors_with_a_history_are_copied(kind: str) -> None:
    net = KEEPERS[kind]()
    net.eval()(DATA.example)
    x = DATA.test.images.float() / 255
    copied = checkpoints.normalised(net, (0.5,), (0.25,))
    with torch.no_grad():
        agree(copied.eval()(x), net((x - 0.5) / 0.25), terms(net))
    a, b = states(net)
    for theta in (a, b):
        expected = KEEPERS[kind]().eval()
        expected.load_state_dict(theta)
        with torch.no_grad():
            z = expected(x)
        found = evaluate.probabilities(net, theta, DATA.test)
        if kind != "spectral_norm":  # of which the state holds vectors of other weights
            agree(found, z.softmax(1), terms(net), scale=float(z.abs().max()))
    sym = symmetry.find(net, DATA.example)
    assert sym.verify(net, DATA.example, tolerance=1e-5) < 1e-5
    matching.match(Pair(net, sym, a, b), DATA.train)
    train.fit(net, DATA, replace(RECIPE, epochs=1), seed=1, init=a)


@pytest.mark.usefixtures("_old_names")
@pytest.mark.parametrize("kind", ["weight_norm", "pruned", "parametrised", "tied"])
def test_repair_refuses_weights_that_are_not_a_layers_own(kind: str) -> None:
    nets = KEEPERS | {
        "parametrised": lambda: nn.Sequential(
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(144, 16)),
            nn.ReLU(),
            nn.Linear(16, 3),
        ),
    }
    if kind == "tied":
        block = nn.Linear(144, 144)
        other = nn.Linear(144, 144)
        other.weight = block.weight
        net: nn.Module = nn.Sequential(
            nn.Flatten(), block, nn.ReLU(), other, nn.ReLU(), nn.Linear(144, 3)
        )
    else:
        net = nets[kind]()
    a, b = states(net)
    words = "shares a parameter" if kind == "tied" else "is computed from other parameters"
    with pytest.raises(ValueError, match=f"repair: .*{words}"):
        matching.repair(net, curves.line(a, b)(0.5), (a, b), DATA.train)


@pytest.mark.usefixtures("_old_names")
@pytest.mark.parametrize("kind", ["weight_norm", "pruned"])
def test_weights_that_no_module_draws_are_asked_for(kind: str) -> None:
    with pytest.raises(train.TrainingError, match=r"no module draws '1\.weight_.*pass init="):
        train.initialise(KEEPERS[kind](), 1)


def test_images_in_any_layout_are_left_alone() -> None:
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    seen: list[tuple[int, ...]] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.stride())
            return x.mean((2, 3))

    for given in (x, x.contiguous()):
        calls.call(Looks(), {}, given)
        assert seen[-1] == given.stride()


@pytest.mark.parametrize("new", [True, False])
def test_computed_weights_are_no_activations(new: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrap = parametrizations.weight_norm if new else nn.utils.weight_norm
        torch.manual_seed(0)
        layers = [wrap(nn.Linear(144, 12)), wrap(nn.Linear(12, 9))]
        net = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU())
        net.append(nn.Linear(9, 3))
    sym = symmetry.find(net, torch.rand(2, 1, 12, 12))
    assert sorted(g.size for g in sym.groups.values()) == [9, 12]
    assert all(len(g.post) == 1 for g in sym.groups.values())
    a = {n: x.detach().clone() for n, x in net.state_dict().items()}
    pair = Pair(net, sym, a, sym.permute(a, sym.random(torch.Generator().manual_seed(1))))
    for found in matching.match(pair, DATA.train).after.values():
        assert min(float(r) for r in found if r != 0) > 0.99
