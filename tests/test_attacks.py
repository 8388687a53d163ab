"""Attacks: inside the ball to the last bit, never for the worse; a library agrees; no masking."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import agree, normed, rounding, task, terms
from torch import Tensor, nn
from torch.func import functional_call

from mcnotes import attacks, curves, data, evaluate, train
from mcnotes.attacks import PGD, Attack, Ensemble, Square, fgsm, margin, strong
from mcnotes.curves import Curve, Theta

ATTACKS = {
    "fgsm": fgsm(0.2),
    "pgd": PGD(0.2, 4, best=False),
    "best": PGD(0.2, 4, restarts=2, schedule="linear"),
    "l2": PGD(2.5, 4, norm="l2"),
    "margin": PGD(0.2, 4, loss="margin"),
    "targeted": PGD(0.2, 4, targeted=True),
    "square": Square(0.25, 40, loss="margin"),
    "strong": strong(0.2, steps=4, squares=10),
}


class Trained:
    """A small network with BatchNorm, trained once."""

    def __init__(self) -> None:
        self.net, self.task = normed(), task()
        recipe = train.Recipe(epochs=3, batch_size=32, lr=0.05, schedule="linear")
        self.theta: Theta = train.fit(self.net, self.task, recipe, seed=1).theta
        self.net.load_state_dict(self.theta)
        self.net.eval()
        self.x, self.y = next(self.task.test.batches(60))
        with torch.no_grad():  # of logits, margins and losses
            self.rounding = rounding(terms(self.net), 2 * float(self.net(self.x).abs().max()))

    def loss(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(self.net(u), self.y, reduction="none")


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


def pictures(seed: int, size: int = 4) -> Tensor:
    """Images in [0, 1] with many values at and next to its ends."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 2, 5, 6, generator=g)
    ends = torch.rand(x.shape, generator=g)
    x[ends < 0.1], x[ends > 0.9] = 0.0, 1.0
    return torch.where((ends > 0.1) & (ends < 0.2), x * 1e-8, x)


def distance(u: Tensor, x: Tensor, norm: str) -> float:
    d = (u.double() - x.double()).flatten(1)
    return float(d.abs().max() if norm == "linf" else d.norm(dim=1).max())


@given(
    name=st.sampled_from(sorted(ATTACKS)),
    eps=st.one_of(st.floats(0, 2), st.sampled_from([0.0, 1e-7, 8 / 255, 0.1, 1.0])),
    seed=st.integers(0, 10_000),
)
def test_stays_in_the_ball_and_in_the_unit_cube(name: str, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = pictures(seed), torch.randint(5, (4,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 5))
    attack = ATTACKS[name]
    steps = attack.attacks if isinstance(attack, Ensemble) else (attack,)
    steps = tuple(replace(a, eps=eps, step=None) for a in steps)
    u = (Ensemble(steps) if len(steps) > 1 else steps[0])(model, x, y)
    assert u.dtype == torch.float32
    assert u.shape == x.shape
    assert not u.requires_grad
    assert u.min() >= 0
    assert u.max() <= 1
    norm = steps[0].norm
    assert distance(u, x, norm) <= eps


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_fills_the_ball(norm: str) -> None:
    x = torch.full((400, 1, 2, 1), 0.5)
    torch.manual_seed(0)
    d = (attacks.Ball(x, 0.3, norm).random() - x).flatten(1)
    size = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
    assert size.max() > 0.29
    assert (size**2 / 0.09).mean() == pytest.approx(0.5, abs=0.05)  # uniform in two dimensions
    assert d.mean(0).abs().max() < 0.03


@given(seed=st.integers(0, 10_000), loss=st.sampled_from(["margin", "dlr", "ce"]))
def test_margin_is_positive_where_another_class_wins(seed: int, loss: str) -> None:
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(30, 5, generator=g), torch.randint(5, (30,), generator=g)
    wrong = z.argmax(1) != y
    assert torch.equal(margin(z, y) > 0, wrong)
    assert torch.equal(attacks.dlr(z, y) > 0, wrong)
    value, ratio = attacks.LOSSES[loss](z, y), attacks.dlr(z, y)
    # "dlr" divides by a difference of logits; the closer they lie, the less is left of it.
    ordered = z.sort(1, descending=True).values
    lost = (3 + z.abs().max()) / (ordered[:, 0] - ordered[:, 2]).min()
    scale = float(lost * (1 + ratio.abs().max()))
    agree(attacks.LOSSES[loss](z + 3, y), value, 5, scale=scale)
    agree(attacks.dlr(100 * z, y), ratio, 5, scale=scale)


def test_one_step_without_a_start_is_fgsm(trained: Trained) -> None:
    x, y = trained.x, trained.y
    one = PGD(0.1, 1, step=0.1, start=False, best=False)(trained.net, x, y)
    assert torch.equal(one, fgsm(0.1)(trained.net, x, y))
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(trained.net(leaf), y)
    slope = torch.autograd.grad(loss, leaf)[0]
    clear = slope.abs() > rounding(terms(trained.net), float(slope.abs().max()))  # of that sign
    assert clear.float().mean() > 0.9
    expected = (x + 0.1 * slope.sign()).clamp(0, 1)
    agree(one[clear], expected[clear], 1)


def test_a_linear_model_is_attacked_as_well_as_can_be() -> None:
    """For two classes and a linear model the worst point of the ball is known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    w = model[1].weight.detach()
    x, y = torch.full((6, 1, 3, 4), 0.5), torch.tensor([0, 1] * 3)
    direction = (w[1 - y] - w[y]).view_as(x)
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for norm, best in (("linf", x + 0.1 * direction.sign()), ("l2", x + 0.1 * unit)):
        u = PGD(0.1, 20, norm, loss="margin", start=False)(model, x, y)
        gap = margin(model(best), y) - margin(model(u), y)
        assert gap.abs().max() < rounding(20 * 12, float(w.abs().sum()))  # 20 steps of 12 pixels
    u = Square(0.1, 2000, loss="margin")(model, x, y)
    assert (margin(model(u), y) - margin(model(x), y)).min() > 0


@pytest.mark.parametrize("name", ["best", "l2", "margin", "square", "strong"])
def test_is_never_for_the_worse(name: str, trained: Trained) -> None:
    """No image that the network gets wrong becomes right; no loss falls where nothing changes."""
    x, y, model = trained.x, trained.y, trained.net
    torch.manual_seed(0)
    u = ATTACKS[name](model, x, y)
    before, after = model(x).argmax(1) == y, model(u).argmax(1) == y
    assert not (after & ~before).any()
    if name in ("best", "l2"):
        same = after == before
        assert (trained.loss(u) >= trained.loss(x) - trained.rounding)[same].all()
    assert after.float().mean() < before.float().mean(), "it fooled nothing: too weak to test"


def test_the_best_start_is_a_lower_bound(trained: Trained) -> None:
    """The result is at least as bad as every random start that the attack drew."""
    x, y = trained.x, trained.y
    attack = PGD(0.1, 2, restarts=3, loss="margin")
    torch.manual_seed(3)
    u = attack(trained.net, x, y)
    torch.manual_seed(3)
    starts = [attacks.Ball(x, 0.1, "linf").random() for _ in range(3)]
    for start in (x, *starts):
        gain = margin(trained.net(u), y) - margin(trained.net(start), y)
        assert gain.min() >= -trained.rounding


@pytest.mark.parametrize("attack", [PGD(0.2, 3), Square(0.2, 15, loss="margin")])
def test_restarts_are_monotone(attack: PGD | Square, trained: Trained) -> None:
    value = []
    for n in (1, 2, 4):
        torch.manual_seed(0)
        u = replace(attack, restarts=n, loss="margin")(trained.net, trained.x, trained.y)
        value.append(margin(trained.net(u), trained.y))
    assert (value[1] >= value[0] - trained.rounding).all()
    assert (value[2] >= value[1] - trained.rounding).all()
    assert value[2].sum() > value[0].sum(), "restarts made no difference: nothing was tested"


def test_a_targeted_attack_comes_closer_to_its_target(trained: Trained) -> None:
    target = (trained.y + 1) % 3
    clean = (trained.net(trained.x).argmax(1) == target).float().mean()
    torch.manual_seed(0)
    u = PGD(0.25, 10, targeted=True)(trained.net, trained.x, target)
    assert (trained.net(u).argmax(1) == target).float().mean() > clean + 0.3
    torch.manual_seed(0)
    many = Ensemble((PGD(0.25, 10, targeted=True),))(trained.net, trained.x, target)
    assert (trained.net(many).argmax(1) == target).float().mean() > clean + 0.3
    one = fgsm(0.25, targeted=True)(trained.net, trained.x, target)
    assert (trained.net(one).argmax(1) == target).float().mean() > clean


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_leaves_the_model_as_it_was(name: str, trained: Trained) -> None:
    net, theta = trained.net, {n: v.clone() for n, v in trained.net.state_dict().items()}
    grad = torch.is_grad_enabled()
    with torch.no_grad():  # as evaluation calls it
        ATTACKS[name](net, trained.x, trained.y)
    assert torch.is_grad_enabled() == grad
    assert all(torch.equal(v, theta[n]) for n, v in net.state_dict().items())
    assert not any(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_the_schedule_scales_the_steps() -> None:
    """On a linear model every step has the length that the schedule says."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    far = {}
    for schedule in attacks.STEP_SCHEDULES:
        attack = PGD(0.4, 4, step=0.01, schedule=schedule, start=False, best=False, loss="margin")
        far[schedule] = distance(attack(model, x, y), x, "linf")
    assert far["constant"] == pytest.approx(0.04, abs=1e-6)
    assert far["linear"] == pytest.approx(0.01 * (1 + 0.75 + 0.5 + 0.25), abs=1e-6)


class TestEvaluation:
    def test_robust_accuracy_is_at_most_clean_accuracy(self, trained: Trained) -> None:
        net, test = trained.net, trained.task.test
        clean = evaluate.score(net, trained.theta, test)
        last = clean.accuracy
        for eps in (0.0, 0.1, 0.15, 0.2):
            robust = evaluate.score(net, trained.theta, test, perturb=PGD(eps, 10))
            assert robust.accuracy <= last
            assert robust.loss >= clean.loss - trained.rounding
            last = robust.accuracy
        assert last < clean.accuracy - 0.2
        again = evaluate.score(net, trained.theta, test, perturb=PGD(0.2, 10))
        assert again == evaluate.score(net, trained.theta, test, perturb=PGD(0.2, 10))

    def test_the_attack_meets_evaluation_mode_and_changes_nothing(self, trained: Trained) -> None:
        net, images = normed(dropout=0.5), trained.task.train
        theta = {n: v.clone() for n, v in trained.theta.items()}
        seen = []

        def spy(model: Any, x: Tensor, y: Tensor) -> Tensor:
            seen.append((net.training, torch.equal(model(x), model(x))))
            return x

        state = torch.get_rng_state()
        fresh = evaluate.batchnorm(net, theta, images, batch_size=32, perturb=spy)
        evaluate.score(net, theta, images, perturb=spy)
        assert seen
        assert all(not training and same for training, same in seen)
        assert net.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(theta[n], trained.theta[n]) for n in theta)
        plain = evaluate.batchnorm(net, theta, images, batch_size=32)
        assert all(torch.equal(fresh[n], plain[n]) for n in theta), "spy returns the clean images"

    def test_adversarial_statistics_are_those_of_attacked_images(self, trained: Trained) -> None:
        net, images, attack = trained.net, trained.task.train, PGD(0.2, 3)
        found = evaluate.batchnorm(net, trained.theta, images, batch_size=96, perturb=attack)
        clean = evaluate.batchnorm(net, trained.theta, images, batch_size=96)
        x, y = next(images.batches(96))
        torch.manual_seed(0)
        u = attack(lambda v: functional_call(net.eval(), clean, (v,)), x, y)
        h = nn.functional.conv2d(u, trained.theta["0.weight"], padding=1)
        expected, count = h.mean((0, 2, 3)), h[:, 0].numel()
        agree(found["1.running_mean"], expected, count, scale=float(h.abs().mean((0, 2, 3)).max()))
        assert not torch.allclose(found["1.running_mean"], clean["1.running_mean"])

    def test_training_against_attacks_makes_robust(self) -> None:
        whole = data.load("fashion-mnist-small", device="cpu")
        few = replace(whole, train=whole.train.first(1000), test=whole.test.first(300))
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
        recipe = train.Recipe(epochs=20, lr=0.05, schedule="linear", augment=False)
        robust = []
        for perturb in (PGD(0.05, 3, best=False), None):
            theta = train.fit(net, few, recipe, seed=1, perturb=perturb).theta
            robust.append(evaluate.score(net, theta, few.test, perturb=PGD(0.05, 20)).accuracy)
        print(robust)
        assert robust[0] > robust[1] + 0.04


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the library's
class TestAgainstALibrary:
    """adversarial-robustness-toolbox, on the same model."""

    @staticmethod
    def art(trained: Trained, x: Tensor, **options: Any) -> Tensor:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        shape = tuple(x.shape[1:])
        loss = nn.CrossEntropyLoss()
        classifier = PyTorchClassifier(
            trained.net, loss, shape, 3, clip_values=(0.0, 1.0), device_type="cpu"
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier, batch_size=len(x), verbose=False, **options
        )
        with np.errstate(all="ignore"):
            return torch.from_numpy(attack.generate(x.numpy(), trained.y.numpy()))

    @pytest.mark.parametrize(
        ("norm", "eps", "step"), [("linf", 0.1, 0.03), ("linf", 0.2, 0.05), ("l2", 1.0, 0.3)]
    )
    def test_the_same_points_without_a_random_start(
        self, norm: str, eps: float, step: float, trained: Trained
    ) -> None:
        x = trained.x
        if norm == "l2":  # away from 0 and 1: they cut off and project in another order than we
            x = 0.3 + 0.4 * x
        theirs = self.art(
            trained, x, norm={"linf": np.inf, "l2": 2}[norm], eps=eps, eps_step=step, max_iter=7
        )
        ours = PGD(eps, 7, norm, step=step, start=False, best=False)(trained.net, x, trained.y)
        assert distance(ours, x, norm) > 0.9 * eps
        # Where a slope is 0 up to rounding, either sign is right: a pixel may go the other way.
        same = (ours - theirs).abs() <= rounding(7 * terms(trained.net))
        assert same.float().mean() > 0.99

    def test_as_strong_with_random_starts(self, trained: Trained) -> None:
        np.random.seed(0)  # noqa: NPY002 (what the library draws from)
        steps = {"eps": 0.2, "eps_step": 0.05, "max_iter": 20}
        theirs = self.art(trained, trained.x, norm=np.inf, num_random_init=2, **steps)
        torch.manual_seed(0)
        ours = PGD(0.2, 20, step=0.05, restarts=2)(trained.net, trained.x, trained.y)
        hits = [(trained.net(u).argmax(1) == trained.y).sum().item() for u in (ours, theirs)]
        print(hits)
        assert abs(hits[0] - hits[1]) <= 3  # of 60: the starts are others
        assert max(hits) < 20


class TestMasking:
    """A model whose slopes lie: rounding its input hides them from PGD, not from random search."""

    def test_random_search_sees_through_rounded_inputs(self, trained: Trained) -> None:
        def masked(u: Tensor) -> Tensor:
            return trained.net((u * 40).round() / 40)

        def straight(u: Tensor) -> Tensor:
            return trained.net(u + ((u * 40).round() / 40 - u).detach())

        def accuracy(attack: Attack | Ensemble, model: Any) -> float:
            torch.manual_seed(0)
            u = attack(model, trained.x, trained.y)  # type: ignore[operator]
            return (masked(u).argmax(1) == trained.y).float().mean().item()

        blind = accuracy(PGD(0.25, 20), masked)
        search = accuracy(Square(0.25, 300, loss="margin"), masked)
        seeing = accuracy(PGD(0.25, 20), straight)
        print(f"PGD {blind:.2f}, search {search:.2f}, PGD with slopes {seeing:.2f}")
        assert search < blind - 0.1
        assert seeing < blind - 0.1
        assert accuracy(strong(0.25, steps=5, squares=300), masked) <= search + 0.05


def test_refuses_what_no_attack_can_be() -> None:
    with pytest.raises(ValueError, match="norm: got 'l1', expected one of linf, l2"):
        PGD(0.1, norm="l1")
    with pytest.raises(ValueError, match="loss: got 'hinge', expected one of"):
        PGD(0.1, loss="hinge")
    with pytest.raises(ValueError, match="schedule: got 'cosine', expected one of"):
        PGD(0.1, schedule="cosine")
    with pytest.raises(ValueError, match=r"eps: got -0\.1, expected a number of at least 0"):
        PGD(-0.1)
    with pytest.raises(ValueError, match="need start=True and best=True"):
        PGD(0.1, restarts=2, best=False)
    with pytest.raises(ValueError, match="got norm 'l2', expected 'linf'"):
        Square(0.1, norm="l2")
    with pytest.raises(ValueError, match=r"eps: got 1e\+308, expected .* at most 10000"):
        PGD(1e308)  # its images would hold NaN, of inf · 0
    with pytest.raises(ValueError, match=r"step: got 1e\+308, expected .* at most 10000"):
        PGD(0.1, step=1e308)
    with pytest.raises(ValueError, match=r"steps: got 1000.*expected a whole number from 1 to"):
        PGD(0.1, 10**400)
    for what in (3, (), (3,), (PGD(0.1), "square"), (lambda model, x, y: x,)):
        with pytest.raises(ValueError, match=r"Ensemble: attacks: got .*, expected an? "):
            Ensemble(what)  # type: ignore[arg-type]


def test_says_what_it_is() -> None:
    assert PGD(0.1, 3).config()["attack"] == "PGD"
    assert [one["loss"] for one in strong(0.1).config()["of"]] == ["ce", "dlr", "margin"]


@pytest.mark.parametrize("degree", [0, 2])
def test_training_attacks_the_network_that_stands_there(degree: int, trained: Trained) -> None:
    """One network: its running statistics. On a curve those mix all t: the batch's own."""
    net, seen = normed(dropout=0.5), []

    def spy(model: Any, x: Tensor, y: Tensor) -> Tensor:
        seen.append((model(x), model(x)))
        return x

    curve = Curve((trained.theta,)) if degree == 0 else curves.bezier(trained.theta, trained.theta)
    wrong = {n: v + 1 if "running_mean" in n else v for n, v in trained.theta.items()}
    free = slice(0, 1)
    if degree:
        curve, free = curve.with_points([trained.theta, wrong, trained.theta]), slice(1, -1)
    step = train.Step(net, curve, free, train.Recipe(epochs=1), trained.x.device, spy)
    before = {n: v.clone() for n, v in step.buffers.items()}
    with evaluate.mode(net, training=True):
        weights = curve.weights(torch.tensor(0.5))
        x = step.attacked(trained.x, trained.y, spy)
        assert all(m.training for m in net.modules()), "every module's mode comes back"
        step(trained.x, trained.y, weights, 0.1)
    assert torch.equal(x, trained.x)
    first, again = seen[-1]
    agree(first, again, terms(net))  # no dropout, no moving statistics
    if degree == 0:
        agree(first, trained.net(trained.x), terms(net))
    else:
        batch = {n: v.clone() for n, v in trained.theta.items()}
        with evaluate.mode(net, training=False), torch.no_grad():
            net[1].train()
            agree(first, functional_call(net, batch, (trained.x,)), terms(net))
    moved = [n for n, v in step.buffers.items() if not torch.equal(v, before[n])]
    assert moved, "the training step itself moves the running statistics"


def test_the_attack_moves_no_running_statistics(trained: Trained) -> None:
    net = normed()
    curve = curves.bezier(trained.theta, trained.theta)
    step = train.Step(net, curve, slice(1, -1), train.Recipe(epochs=1), trained.x.device)
    before = {n: v.clone() for n, v in step.buffers.items()}
    with evaluate.mode(net, training=True):
        step.attacked(trained.x, trained.y, PGD(0.1, 2, best=False))
    assert all(torch.equal(v, before[n]) for n, v in step.buffers.items())


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([[0.5]], torch.zeros(1).long(), "images: got list, expected floats"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), r"images: got torch.uint8 \[2, 1"),
        (torch.rand(2), torch.zeros(2).long(), r"images: got torch.float32 \[2\]"),
        (torch.rand(2, 1, 4, 4), torch.zeros(2), r"labels: got torch.float32 \[2\], expected"),
        (torch.rand(2, 1, 4, 4), torch.zeros(3).long(), r"labels: .* expected torch.int64 \[2\]"),
        (torch.rand(2, 1, 4, 4), [0, 1], "labels: got list"),
    ],
)
def test_a_batch_that_is_none_is_refused(x: Any, y: Any, says: str) -> None:
    for attack in (attacks.PGD(0.1), attacks.Square(0.1), attacks.strong(0.1)):
        with pytest.raises(ValueError, match=f"^attack: {says}"):
            attack(lambda u: u.flatten(1)[:, :3], x, y)


def test_the_loss_of_three_logits_refuses_two_classes() -> None:
    with pytest.raises(ValueError, match=r"dlr: got logits of shape \[2, 2\], expected at least 3"):
        attacks.dlr(torch.rand(2, 2), torch.zeros(2).long())
