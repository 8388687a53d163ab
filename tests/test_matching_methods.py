"""`match`: planted permutations, the best of all, each method by the same call, errors."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from small import (
    NETWORKS,
    Fixed,
    Patches,
    agree,
    lost,
    noisy,
    normed,
    pictures,
    plain,
    rounding,
    task,
    terms,
    trained,
)

from mcnotes import curves, evaluate, matching, models, symmetry, train
from mcnotes.data import Task
from mcnotes.data.loader import Loader
from mcnotes.matching import AlignmentError, At, Pair


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("at", ["post", "pre"])
def test_planted_permutation_is_recovered(name: str, at: At) -> None:
    net, images = NETWORKS[name](), pictures(128)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = sym.random(torch.Generator().manual_seed(2))
    copy = sym.permute(noisy(theta, 3), planted)
    found = matching.match(Pair(net, sym, theta, copy), images, at=at)
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
        after, before = found.after[group], found.before[group]
        assert after.sum() >= before.sum() - rounding(len(after), len(after), torch.float64)


# Not narrower: on processors with AVX2 but no AVX-512, PyTorch's gradient of a 1 x 1 convolution of
# stride 2 that reads fewer than 8 channels is wrong, or crashes, or hangs (oneDNN's issue 6035).
END_TO_END = {
    "resnet32": lambda: models.build("resnet32", num_classes=3, in_channels=1, width=8),
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
    perm = matching.match(Pair(net, sym, a, b), split).perm
    assert any(not torch.equal(p, torch.arange(len(p))) for p in perm.values())
    curve = curves.bezier(a, sym.permute(b, perm))
    recipe = train.Recipe(1, batch_size=8, lr=0.01, augment=False)
    fitted = train.fit_curve(net, curve, data, recipe, seed=3).curve
    line, path = (
        evaluate.profile(net, c, split, statistics=split, points=3)
        for c in (curves.line(a, b), fitted)
    )
    # The same functions. BatchNorm over few images may divide by a tenth of what comes in.
    agree(path.loss[[0, 2]], line.loss[[0, 2]], terms(net), scale=10 * line.loss.max())
    assert math.isfinite(path.loss[1])
    assert path.loss[1] != line.loss[1]


def test_matching_is_the_best_of_all_permutations() -> None:
    net, data = (
        torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(144, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
        ),
        task(),
    )
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, data.example)
    found = matching.match(Pair(net, sym, a, b), data.train)
    ((group, p),) = found.perm.items()
    matrix = matching.stream(Pair(net, sym, a, b), data.train)[group][0].correlation()
    best = max(permutations(range(5)), key=lambda q: sum(matrix[i, j] for i, j in enumerate(q)))
    assert p.tolist() == list(best)
    torch.testing.assert_close(found.after[group], matrix[range(5), best])


def test_batch_size_does_not_matter() -> None:
    net, data = normed(), task()
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, data.example)
    small, large = (
        matching.match(Pair(net, sym, a, b), data.train, batch_size=n) for n in (7, len(data.train))
    )
    for group, (moments,) in matching.stream(Pair(net, sym, a, b), data.train).items():
        agree(small.after[group], large.after[group], moments.samples, scale=lost(moments))
        margin = rounding(moments.samples, lost(moments))
        assert margin < 0.1 / len(data.train), "an image left out would not be seen"


@pytest.mark.parametrize("method", [*matching.EXACT, *matching.METHODS])
def test_each_method_answers_the_same_call(method: str) -> None:
    net, data, (a, b, _), sym = trained()
    found = matching.match(Pair(net, sym, a, b), data.train, method=method, seed=3)
    again = matching.match(Pair(net, sym, a, b), data.train, method=method, seed=3)
    ((group, p),) = found.perm.items()
    assert torch.equal(p, again.perm[group])
    best = matching.match(Pair(net, sym, a, b), data.train)
    assert found.after[group].sum() <= best.after[group].sum() + 1e-9
    torch.testing.assert_close(found.before[group], best.before[group])
    assert (method == "identity") == torch.equal(p, torch.arange(len(p)))
    undone = sym.permute(b, found.perm)
    same = matching.match(Pair(net, sym, a, undone), data.train, method="identity")
    (moments,) = matching.stream(Pair(net, sym, a, b), data.train)[group]
    agree(same.after[group], found.after[group], len(data.train), scale=lost(moments))


@pytest.mark.parametrize("method", matching.EXACT)
@pytest.mark.parametrize("name", ["mlp", "resnet20", "attention", "grouped"])
def test_by_activations_nothing_is_left_to_gain(name: str, method: str) -> None:
    """The duals prove it: the gap is 0 up to rounding, and that of any other order is not."""
    net, images = NETWORKS[name](), pictures(64)
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    found = matching.match(Pair(net, sym, a, b), images, method=method)
    units = sum(len(x) for x in found.after.values())
    assert found.gap is not None
    assert found.gap <= rounding(units, units, torch.float64)
    assert replace(found, perm=sym.identity()).gap > 0.1
    assert replace(found, perm=sym.random(torch.Generator().manual_seed(1))).gap > 0.1


def test_the_gap_of_a_worse_order_is_what_it_loses() -> None:
    net, data, (a, b, _), sym = trained()
    found = matching.match(Pair(net, sym, a, b), data.train)
    ((group, _),) = found.perm.items()
    lost = found.after[group].sum() - found.before[group].sum()
    assert replace(found, perm=sym.identity()).gap == pytest.approx(float(lost), abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_the_duals_prove_an_assignment_the_best(size: int) -> None:
    """Feasible everywhere, and tight where units are paired: complementary slackness."""
    g = torch.Generator().manual_seed(size)
    score = torch.randn(size, size, generator=g, dtype=torch.float64)
    p = matching.assign(score)
    u, v = matching.duals(score, p)
    margin = rounding(size, float(score.abs().max()) * size, torch.float64)
    assert (u[:, None] + v - score).min() >= -margin
    torch.testing.assert_close(score.gather(1, p[:, None])[:, 0], u + v[p], atol=margin, rtol=0)
    worse = torch.randperm(size, generator=g)
    left = (u + v[worse] - score[range(size), worse]).sum()
    best, reached = score.gather(1, p[:, None]).sum(), score[range(size), worse].sum()
    assert float(left) == pytest.approx(float(best - reached), abs=margin)
    u, v = matching.duals(score, worse)  # no best one: still above everything
    assert (u[:, None] + v - score).min() >= -margin
    assert u.sum() + v.sum() >= best - margin


def test_by_weights_the_gap_is_that_of_the_certificate() -> None:
    net, data, (a, b, _), sym = trained()
    pair = Pair(net, sym, a, b)
    for asked in ({"method": "weights"}, {"method": "frank-wolfe"}, {"polished": True}):
        found = matching.match(pair, data.train, **asked)
        assert found.gap == matching.certify(pair, found.perm).gap
    for method in ("identity", "straight-through"):
        assert matching.match(pair, data.train, method=method).gap is None


def test_an_unknown_method_is_refused_before_any_work() -> None:
    net, data, (a, b, _), sym = trained()
    with pytest.raises(ValueError, match=r"got method 'wieghts'; did you mean 'weights'"):
        matching.match(Pair(net, sym, a, b), data.train, method="wieghts")


def test_errors() -> None:
    net, data = plain(), task()
    sym = symmetry.find(net, data.example)
    theta = train.initialise(net, 1)
    with pytest.raises(AlignmentError, match="got 1 images, expected at least 2"):
        matching.match(Pair(net, sym, theta, theta), data.train.first(1))
    with pytest.raises(AlignmentError, match=r"'3\.bias' is"):
        matching.match(Pair(net, sym, theta, theta | {"3.bias": torch.zeros(9)}), data.train)
    broken = theta | {"1.weight": theta["1.weight"] * torch.nan}
    with pytest.raises(AlignmentError, match="not finite"):
        matching.match(Pair(net, sym, theta, broken), data.train)


EVERY = [*matching.EXACT, *matching.METHODS]
BY_WEIGHTS = [m for m in matching.METHODS if m not in ("identity", "random")]  # or from them


@pytest.mark.parametrize("method", BY_WEIGHTS)
def test_what_is_not_finite_is_refused_before_any_pass(method: str) -> None:
    net, data, (a, b, _), sym = trained()
    broken = b | {"3.bias": torch.tensor([0.0, torch.inf, 0.0])}
    with (
        counted() as passes,
        pytest.raises(AlignmentError, match=r"'3\.bias' of network B has entries that are not fin"),
    ):
        matching.match(Pair(net, sym, a, broken), data.train, method=method)
    assert not passes


class Masked(torch.nn.Module):
    """A mask that no unit stands in, kept as a frozen parameter."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.body = plain()
        self.mask = torch.nn.Parameter(mask, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.body(x)
        return scores.masked_fill(self.mask < 0, -1.0)


@pytest.mark.parametrize(
    ("mask", "method"),
    [([0.0, -torch.inf, 0.0], "activations"), ([False, True, False], "weights")],
)
def test_masks_that_are_parameters_are_no_weights(mask: list[float], method: str) -> None:
    net, images = Masked(torch.tensor(mask)), pictures(64, size=12)
    sym = symmetry.find(net, next(images.batches(2))[0])
    theta = {name: x.detach() for name, x in net.state_dict().items()}
    planted = sym.random(torch.Generator().manual_seed(2))
    pair = Pair(net, sym, theta, sym.permute(theta, planted))
    found = matching.match(pair, images, method=method)
    assert all(torch.equal(x, theta[n]) for n, x in pair.permuted(found.perm).items())


class Complex(torch.nn.Module):
    """Complex hidden units, of which the absolute values count."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(49, 5, dtype=torch.complex64)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.head(self.hidden(x.flatten(1).to(torch.complex64)).abs())
        return values


@pytest.mark.parametrize("method", ["weights", "frank-wolfe", "straight-through"])
def test_complex_weights_are_matched_by_activations_alone(method: str) -> None:
    net, images = Complex(), pictures(64, size=7)
    sym = symmetry.find(net, next(images.batches(2))[0])
    theta, planted = train.initialise(net, 1), sym.random(torch.Generator().manual_seed(2))
    pair = Pair(net, sym, theta, sym.permute(theta, planted))
    found = matching.match(pair, images)
    assert all(torch.equal(x, theta[n]) for n, x in pair.permuted(found.perm).items())
    with counted() as passes, pytest.raises(AlignmentError, match=r"'hidden\.weight' is complex"):
        matching.match(pair, images, method=method)
    assert not passes
    with pytest.raises(AlignmentError, match="complex"):
        matching.certify(pair, planted)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Holds a number for each call of a module, whichever copy of a network it is of."""
    passes: list[int] = []

    def pre(module: torch.nn.Module, given: object) -> None:
        passes.append(1)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(pre)
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.parametrize("method", [m for m in matching.METHODS if m.startswith(("str", "sink"))])
def test_by_the_loss_what_does_not_fit_is_refused_before_any_pass(method: str) -> None:
    net, data, (a, b, _), sym = trained()
    batches = [(data.example, torch.zeros(len(data.example), dtype=torch.long))]
    fixed = Fixed()
    ends = [train.initialise(fixed, seed) for seed in (1, 2)]
    units_in_buffers = Pair(fixed, symmetry.find(fixed, data.example), *ends)
    for pair, images, says in (
        (Pair(net, sym, a, b), Loader(batches, data.device), "got a Loader, expected a data.Spl"),
        (units_in_buffers, data.train, "units stand in the buffer 'first'"),
    ):
        with counted() as passes, pytest.raises(ValueError, match=re.escape(says)):
            matching.match(pair, images, method=method)
        assert not passes


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("width", [None, 1])
def test_networks_without_groups_have_nothing_to_permute(method: str, width: int | None) -> None:
    inner = [torch.nn.Linear(144, width), torch.nn.ReLU()] if width else []
    net = torch.nn.Sequential(torch.nn.Flatten(), *inner, torch.nn.Linear(width or 144, 3))
    data = task()
    a, b = (train.initialise(net, s) for s in (1, 2))
    pair = Pair(net, symmetry.find(net, data.example), a, b)
    assert not pair.sym.groups
    for polished in (False, True):
        found = matching.match(pair, data.train, method=method, polished=polished)
        assert found.perm == {}
    assert found.gap == pytest.approx(0, abs=1e-9)


def test_the_gap_stays_when_the_networks_are_trained_on() -> None:
    """Whatever way the tensors are overwritten, also where PyTorch does not count it."""
    net, data, (a, b, _), sym = trained()
    for asked in ({"method": "weights"}, {"method": "frank-wolfe"}, {"polished": True}):
        pair = Pair(net, sym, *({n: x.clone() for n, x in end.items()} for end in (a, b)))
        found = matching.match(pair, data.train, **asked)
        expected = matching.certify(pair, found.perm).gap
        for name in pair.names:
            pair.theta_a[name].zero_()
            pair.theta_b[name].data.normal_()
        assert found.gap == expected
