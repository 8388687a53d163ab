"""Matching by the loss at the middle: it falls, brute force, what acts, what is refused."""

from itertools import permutations

import pytest
import torch
from small import SHORT, Fixed, task, trained
from torch import Tensor, nn

from mcnotes import curves, evaluate, matching, symmetry, train
from mcnotes.curves import Theta
from mcnotes.matching import Descent, Pair, doubly_stochastic, loss


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("action", "lr"), [("straight-through", 0.2), ("sinkhorn", 1.0)])
def test_the_loss_at_the_middle_falls(action: str, lr: float, both: bool) -> None:
    net, data, (theta, *_), sym = trained()
    copy = sym.permute(theta, sym.random(torch.Generator().manual_seed(5)))
    how = Descent(action, epochs=20, lr=lr, batch_size=16, both=both)
    pair = Pair(net, sym, theta, copy)
    perm = matching.loss_matching(pair, data.train, how, start=sym.identity())

    def middle(b: Theta) -> float:
        return evaluate.score(net, curves.line(theta, b)(0.5), data.train).loss

    best, start, reached = middle(theta), middle(copy), middle(sym.permute(copy, perm))
    assert reached < best + 0.3 * (start - best)


@pytest.mark.parametrize("action", loss.ACTIONS)
def test_hardly_a_permutation_has_a_lower_loss_at_the_middle(action: str) -> None:
    """All 120 orders of five units, for two networks that were trained apart."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3))
    data = task()
    a, b = (train.fit(net, data, SHORT, seed=seed).theta for seed in (1, 2))
    sym = symmetry.find(net, data.example)
    (group,) = sym.groups

    def middle(p: Tensor) -> float:
        end = sym.permute(b, {group: p})
        return evaluate.score(net, curves.line(a, end)(0.5), data.train).loss

    every = sorted(middle(torch.tensor(q)) for q in permutations(range(5)))
    how = Descent(action, epochs=20, lr=0.1, batch_size=16)
    found = matching.loss_matching(Pair(net, sym, a, b), data.train, how)
    assert every.index(middle(found[group])) < 12  # a tenth of them


@pytest.mark.parametrize("frozen", [False, True])
def test_both_ends_move_by_their_own_slopes(frozen: bool) -> None:
    """By differences: the slope in each end's matrix is that of the loss at the middle.

    Also if training would leave the parameters alone.
    """
    net, data, (a, b, _), sym = trained()
    net.requires_grad_(not frozen)
    pair, old = Pair(net, sym, a, b), sym.random(torch.Generator().manual_seed(1))
    how = Descent("straight-through", both=True, soft=1.0)  # the matrix itself acts
    line = curves.line(a, sym.permute(b, old))
    step = loss.MiddleStep(pair, line, {0: sym.identity(), 1: old}, how, data.train)
    x, y = next(data.train.batches(96))
    ((group, _),) = old.items()
    before = {end: free[group].detach().clone() for end, free in step.matrices.items()}
    step(x, y, torch.zeros(2), lr=0.0)
    g = torch.Generator().manual_seed(2)
    for end, free in step.matrices.items():
        slope, way = free[group].grad, torch.randn(16, 16, generator=g, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            at = {k: {group: m + sign * 1e-3 * way * (k == end)} for k, m in before.items()}
            ends = [sym.apply_matrices(theta, at[k]) for k, theta in enumerate((a, b))]
            middle = curves.combine(ends, [0.5, 0.5])
            values.append(evaluate.score(net, middle, data.train).loss)
        assert slope is not None
        expected = (values[0] - values[1]) / 2e-3
        assert float((slope * way).sum()) == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_the_matrix_acts_first_and_its_nearest_permutation_later() -> None:
    net, data, (a, b, _), sym = trained()
    line, how = curves.line(a, b), Descent("sinkhorn", epochs=2, batch_size=48, soft=0.5)
    step = loss.MiddleStep(Pair(net, sym, a, b), line, {1: sym.identity()}, how, data.train)
    (matrix,), steps = step.matrices[1].values(), 2 * data.train.count(48)
    x, y = next(data.train.batches(48))
    for i in range(steps):
        acts = step.act(matrix).detach()
        rounded = torch.equal(acts, doubly_stochastic.nearest(acts))
        assert rounded == (i >= steps / 2)
        step(x, y, torch.zeros(2), lr=0.01)


def test_sinkhorn_scales_to_doubly_stochastic_and_slopes_pass() -> None:
    x = torch.rand(6, 6, dtype=torch.float64, requires_grad=True)
    y = loss.soft(x / 0.5, rounds=200)
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(y.sum(0), ones)
    torch.testing.assert_close(y.sum(1), ones)
    assert torch.autograd.gradcheck(lambda m: loss.soft(m / 0.5), x)
    straight = loss.through(x)
    assert torch.equal(straight.detach(), doubly_stochastic.nearest(x))
    (slope,) = torch.autograd.grad((straight * y.detach()).sum(), x)
    torch.testing.assert_close(slope, y.detach())


def test_units_in_buffers_that_would_stay_are_refused() -> None:
    """The gradient would be that of a network half of which is permuted."""
    net = Fixed()
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    pair = Pair(net, symmetry.find(net, task().example), a, b)
    with pytest.raises(ValueError, match="units stand in the buffer 'first'"):
        matching.loss_matching(pair, task().train, Descent(epochs=1))


def test_what_no_descent_can_be_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"action: got 'sinkhron', expected one of .*sinkhorn"):
        Descent("sinkhron")
    with pytest.raises(ValueError, match="samples: got -1, expected a whole number of at least 0"):
        Descent(samples=-1)
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"batch_size": -1}, {"scale": 0.0}, {"soft": 1.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .*, expected a"):
            Descent(**wrong)  # type: ignore[arg-type]
