"""Rivals of alignment: planted permutations, brute force, what REPAIR restores."""

from itertools import combinations, permutations, product

import pytest
import torch
from small import Fixed, plain, task
from test_align import NETWORKS, Patches, noisy, pictures
from torch import Tensor, nn

from mcnotes import curves, evaluate, matching, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Task
from mcnotes.matching import activations, doubly_stochastic, loss, methods, pam, weights
from mcnotes.matching.assignment import solve
from mcnotes.symmetry import Perm, Symmetry

RECIPE = train.Recipe(6, batch_size=16, lr=0.1, schedule="linear")


def dot(net: nn.Module, a: Theta, b: Theta) -> Tensor:
    return torch.stack([(a[n].double() * b[n]).sum() for n, _ in net.named_parameters()]).sum()


def agreement(net: nn.Module, a: Theta, b: Theta) -> float:
    return float(dot(net, a, b))


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "googlenet"])
def test_a_planted_permutation_is_found_by_its_weights(name: str) -> None:
    net, images = NETWORKS[name](), pictures(8)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = sym.random(torch.Generator().manual_seed(2))
    copy = sym.permute(noisy(theta, 3), planted)
    perm = matching.weight_matching(net, theta, copy, sym, seed=4)
    for group, p in sym.compose(planted, perm).items():
        assert torch.equal(p, torch.arange(len(p))), group


def test_units_that_stand_in_buffers_alone_keep_their_places() -> None:
    """There is nothing by which weights could tell them apart; the others are matched."""
    net = Fixed()
    theta, sym = train.initialise(net, 1), symmetry.find(net, task().example)
    names = {n: {place.name for place in group.places} for n, group in sym.groups.items()}
    assert {"first", "second"} in names.values()
    planted = sym.random(torch.Generator().manual_seed(2))
    perm = matching.weight_matching(net, theta, sym.permute(theta, planted), sym)
    found = sym.compose(planted, perm)
    for group, standing in names.items():
        alone = standing == {"first", "second"}
        expected = sym.identity()[group]
        assert torch.equal(perm[group] if alone else found[group], expected), group


def test_no_pairing_of_heads_agrees_better() -> None:
    """By trying every pairing of heads and of units in them, the rest held fixed."""
    net, images = Patches(width=6, heads=2), pictures(2)
    a, b = (train.initialise(net, s) for s in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    blocks = {n: g.inner for n, g in sym.groups.items() if g.inner}
    name, inner = next(iter(blocks.items()))
    found = solve(name, inner, *weights._slopes(sym, name, inner, b, lambda x: dot(net, a, x)))
    groups = [name, *(g for block in inner for g in block)]
    sizes = [range(sym.groups[g].size) for g in groups]
    best = max(
        agreement(net, a, sym.permute(b, dict(zip(groups, map(torch.tensor, plan), strict=True))))
        for plan in product(*(permutations(size) for size in sizes))
    )
    assert agreement(net, a, sym.permute(b, found)) == pytest.approx(best, rel=1e-9)


def test_no_order_of_one_layer_agrees_better() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3))
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, task().example)
    ((group, p),) = matching.weight_matching(net, a, b, sym).items()
    values = {
        q: agreement(net, a, sym.permute(b, {group: torch.tensor(q)}))
        for q in permutations(range(5))
    }
    assert tuple(p.tolist()) == max(values, key=lambda q: values[q])


def test_sweeps_never_lower_the_agreement() -> None:
    net, images = NETWORKS["resnet20"](), pictures(4)
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, next(images.batches(2))[0])
    values = [agreement(net, a, b)]
    for sweeps in (1, 2, 5):
        perm = matching.weight_matching(net, a, b, sym, sweeps=sweeps)
        values.append(agreement(net, a, sym.permute(b, perm)))
    assert values == sorted(values)
    assert values[-1] > values[0]


def trained() -> tuple[nn.Module, Task, list[Theta], Symmetry]:
    net, data = plain(), task()
    ends = [train.fit(net, data, RECIPE, seed=seed).theta for seed in (1, 2, 3)]
    return net, data, ends, symmetry.find(net, data.example)


@pytest.mark.parametrize(("action", "lr"), [("straight-through", 0.2), ("sinkhorn", 0.1)])
def test_the_loss_at_the_middle_falls(action: str, lr: float) -> None:
    net, data, (theta, *_), sym = trained()
    copy = sym.permute(theta, sym.random(torch.Generator().manual_seed(5)))
    perm = matching.loss_matching(
        net, theta, copy, data.train, sym,
        action=action, start=sym.identity(), epochs=20, lr=lr, batch_size=16
    )  # fmt: skip

    def middle(b: Theta) -> float:
        return pam.objective(net, loss.Midpoint((theta, b)), data.train, nodes=1)

    best, start, reached = middle(theta), middle(copy), middle(sym.permute(copy, perm))
    assert reached < best + 0.3 * (start - best)
    half = curves.line(theta, sym.permute(copy, perm))(0.5)
    assert reached == pytest.approx(evaluate.score(net, half, data.train).loss)


@pytest.mark.parametrize("action", loss.ACTIONS)
def test_hardly_a_permutation_has_a_lower_loss_at_the_middle(action: str) -> None:
    """All 120 orders of five units, for two networks that were trained apart."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.ReLU(), nn.Linear(5, 3))
    data = task()
    a, b = (train.fit(net, data, RECIPE, seed=seed).theta for seed in (1, 2))
    sym = symmetry.find(net, data.example)
    (group,) = sym.groups

    def middle(p: Tensor) -> float:
        end = sym.permute(b, {group: p})
        return pam.objective(net, loss.Midpoint((a, end)), data.train, nodes=1)

    every = sorted(middle(torch.tensor(q)) for q in permutations(range(5)))
    found = matching.loss_matching(
        net, a, b, data.train, sym, action=action, epochs=20, lr=0.1, batch_size=16
    )
    assert every.index(middle(found[group])) < 12  # a tenth of them


def test_sinkhorn_scales_to_doubly_stochastic_and_slopes_pass() -> None:
    x = torch.rand(6, 6, dtype=torch.float64, requires_grad=True)
    y = loss.soft(x, temperature=0.5, rounds=200)
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(y.sum(0), ones)
    torch.testing.assert_close(y.sum(1), ones)
    assert torch.autograd.gradcheck(lambda m: loss.soft(m, 0.5), x)
    straight = loss.through(x)
    assert torch.equal(straight.detach(), doubly_stochastic.nearest(x))
    (slope,) = torch.autograd.grad((straight * y.detach()).sum(), x)
    torch.testing.assert_close(slope, y.detach())


@pytest.mark.parametrize("method", ["activations", *methods.METHODS])
def test_each_method_answers_the_same_call(method: str) -> None:
    net, data, (a, b, _), sym = trained()
    found = matching.match(net, a, b, data.train, sym, method=method, seed=3)
    again = matching.match(net, a, b, data.train, sym, method=method, seed=3)
    ((group, p),) = found.perm.items()
    assert torch.equal(p, again.perm[group])
    best = matching.match(net, a, b, data.train, sym)
    assert found.after[group].sum() <= best.after[group].sum() + 1e-9
    torch.testing.assert_close(found.before[group], best.before[group])
    assert (method == "identity") == torch.equal(p, torch.arange(len(p)))
    undone = sym.permute(b, found.perm)
    same = matching.match(net, a, undone, data.train, sym, method="identity")
    torch.testing.assert_close(same.after[group], found.after[group], rtol=0, atol=1e-6)


def test_an_unknown_method_is_refused_before_any_work() -> None:
    net, data, (a, b, _), sym = trained()
    with pytest.raises(ValueError, match=r"method 'wieghts', expected one of .*'weights'"):
        matching.match(net, a, b, data.train, sym, method="wieghts")


@pytest.mark.parametrize("method", ["activations", "weights"])
@pytest.mark.parametrize("name", ["mlp", "resnet20", "attention"])
def test_many_copies_of_one_network_come_into_one_order(name: str, method: str) -> None:
    net, images = NETWORKS[name](), pictures(64)
    theta = train.initialise(net, 1)
    sym = symmetry.find(net, next(images.batches(2))[0])
    planted = [sym.random(torch.Generator().manual_seed(s)) for s in (2, 3)]
    copies = [theta, *(sym.permute(noisy(theta, 5), p) for p in planted)]
    perms = matching.match_many(net, copies, images, sym, method=method)
    assert same(perms[0], sym.identity())
    for p, q in zip(planted, perms[1:], strict=True):
        assert same(sym.compose(p, q), sym.identity())


def same(p: Perm, q: Perm) -> bool:
    return all(torch.equal(p[n], q[n]) for n in q)


def test_no_common_order_of_three_is_better_at_one_model() -> None:
    """A rest point of the sweeps: no other permutation of one model agrees better with the rest."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.ReLU(), nn.Linear(4, 3))
    data = task()
    thetas = [train.initialise(net, seed) for seed in (1, 2, 3)]
    sym = symmetry.find(net, data.example)
    perms = matching.match_many(net, thetas, data.train, sym)
    ((group, _),) = perms[0].items()

    seen = {
        (i, j): activations.stream(net, thetas[i], thetas[j], data.train, sym)[group][
            0
        ].correlation()
        for i, j in combinations(range(3), 2)
    }

    def total(orders: list[Tensor]) -> float:
        return sum(float(c[orders[i], orders[j]].sum()) for (i, j), c in seen.items())

    best = total([p[group] for p in perms])
    for k in range(3):
        for q in permutations(range(4)):
            orders = [torch.tensor(q) if i == k else p[group] for i, p in enumerate(perms)]
            assert total(orders) <= best + 1e-6


def test_one_order_brings_more_together_than_matching_each_to_the_first() -> None:
    """Where pairwise matchings contradict each other around a cycle."""
    net, data = plain(), task()
    thetas = [train.initialise(net, seed) for seed in range(1, 5)]
    sym = symmetry.find(net, data.example)

    def to(i: int, j: int) -> Perm:  # brings network j into the order of i
        return matching.match(net, thetas[i], thetas[j], data.train, sym).perm

    around = sym.compose(sym.compose(to(1, 2), to(0, 1)), to(2, 0))
    assert not same(around, sym.identity())

    def total(perms: list[Perm]) -> float:
        placed = [sym.permute(x, p) for x, p in zip(thetas, perms, strict=True)]
        found = (
            matching.match(net, a, b, data.train, sym, method="identity").after
            for a, b in combinations(placed, 2)
        )
        return sum(float(c.sum()) for after in found for c in after.values())

    pairwise = total([sym.identity(), *(to(0, j) for j in (1, 2, 3))])
    assert total(matching.match_many(net, thetas, data.train, sym)) > pairwise + 1


def test_many_errors() -> None:
    net, data, thetas, sym = trained()
    with pytest.raises(ValueError, match="got 1 network"):
        matching.match_many(net, thetas[:1], data.train, sym)
    with pytest.raises(ValueError, match="method 'random', expected 'activations' or 'weights'"):
        matching.match_many(net, thetas, data.train, sym, method="random")


def test_repair_gives_units_the_statistics_of_the_ends() -> None:
    net, data, (a, b, _), _ = trained()
    middle = curves.line(a, b)(0.5)
    mended = matching.repair(net, middle, (a, b), data.train)
    found, *both = (matching.channel_statistics(net, t, data.train)["1"] for t in (mended, a, b))
    for got, one, two in zip(found, *both, strict=True):
        torch.testing.assert_close(got, (one + two) / 2, rtol=1e-4, atol=1e-5)
    assert torch.equal(mended["3.weight"], middle["3.weight"])
    for t, end in ((0.0, a), (1.0, b)):
        for name, x in matching.repair(net, end, (a, b), data.train, t).items():
            torch.testing.assert_close(x, end[name], rtol=1e-4, atol=1e-5)


def test_repair_of_channels_and_of_two_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    data = task(48)
    a, b = (train.initialise(net, s) for s in (1, 2))
    mended = matching.repair(net, curves.line(a, b)(0.25), (a, b), data.train, 0.25)
    found, one, two = (matching.channel_statistics(net, t, data.train) for t in (mended, a, b))
    for layer in ("0", "3"):
        for got, x, y in zip(found[layer], one[layer], two[layer], strict=True):
            torch.testing.assert_close(got, 0.75 * x + 0.25 * y, rtol=1e-3, atol=1e-4)


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
