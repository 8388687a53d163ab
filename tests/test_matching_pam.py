"""PAM: its gradients, projections and rounding; planted permutations; it stays; it resumes."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small import Fixed, Stopped, agree, normed, plain, task, terms
from torch import Tensor, nn

from mcnotes import curves, data, evaluate, symmetry, train
from mcnotes.cache import Checkpoint, StoreWarning
from mcnotes.curves import Curve, Theta
from mcnotes.data import Task
from mcnotes.data.augment import Augment
from mcnotes.matching import assign, doubly_stochastic, pam
from mcnotes.matching.pam import Matrices, Settings
from mcnotes.symmetry import Perm, Symmetry
from mcnotes.train import Recipe

RECIPE = Recipe(epochs=1, batch_size=32, lr=0.05, schedule="linear", augment=False)
SMALL = Settings(epochs=(2, 2), p_epochs=2, p_lr=1.0, samples=4, images=96, probe=96, nodes=3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ends(net: nn.Module, epochs: int = 3) -> tuple[Theta, Theta, Symmetry]:
    """Two trained networks, and the symmetries."""
    a, b = (train.fit(net, task(), replace(RECIPE, epochs=epochs), seed=s).theta for s in (1, 2))
    return a, b, symmetry.find(net, task().example)


# --- The permutation step ---------------------------------------------------------------------


def in_double(theta: Theta) -> Theta:
    return {n: x.double() if x.is_floating_point() else x for n, x in theta.items()}


@pytest.mark.parametrize(("follow", "frozen"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("make", [plain, normed])
def test_gradient_is_that_of_finite_differences(make: object, follow: bool, frozen: bool) -> None:
    """One step of size lr moves the (unprojected) matrices by −lr ∂/∂P [L + ‖P − P_old‖²/2ν]."""
    net = make().double().requires_grad_(not frozen)  # type: ignore[operator]
    a, b, m = (in_double(train.initialise(net, s)) for s in (1, 2, 3))
    sym = symmetry.find(make(), task().example)  # type: ignore[operator]
    old = sym.random(generator(1))
    curve = Curve((a, m, sym.permute(b, old)))
    settings = replace(SMALL, relaxation="sinkhorn", nu=2.0, follow=follow)
    problem = pam.Problem(net, sym, task(), RECIPE, settings)
    step = pam.PermutationStep(problem, curve, old)
    (x, y), t = next(task().train.batches(32)), torch.tensor(0.4, dtype=torch.float64)
    group = next(iter(sym.groups))
    n = len(step.matrices[group])
    start = doubly_stochastic.sinkhorn(torch.rand(n, n, generator=generator(4)).double() + 0.1)

    def value(matrix: Tensor) -> float:
        end = sym.apply_matrices(b, {**step.old, group: matrix})
        theta = pam.move_end(curve, end, follow)(float(t))
        with evaluate.mode(net, training=True), torch.no_grad():
            z = torch.func.functional_call(net, theta, (x.double(),))
        prox = (matrix - step.old[group]).square().sum() / (2 * settings.nu)
        return float(nn.functional.cross_entropy(z, y) + prox)

    step.matrices[group] = start.clone()
    doubly_stochastic.PROJECTIONS["none"] = lambda m: m
    step.settings = replace(settings, relaxation="none")
    try:
        with evaluate.mode(net, training=True):
            step(x.double(), y, curve.weights(t), 1.0)
    finally:
        del doubly_stochastic.PROJECTIONS["none"]
    gradient = start - step.matrices[group]
    for direction in torch.randn(3, *start.shape, generator=generator(2)).double():
        h = 1e-7 * direction  # so small that no ReLU switches on the way
        slope = (value(start + h) - value(start - h)) / 2e-7
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_relaxed_matrices_stay_doubly_stochastic_and_lower_the_loss() -> None:
    net = plain()
    a, b, sym = ends(net, epochs=10)
    curve = curves.line(a, b)
    p = sym.identity()
    for name in doubly_stochastic.PROJECTIONS:
        settings = replace(SMALL, relaxation=name, p_epochs=10, p_lr=5.0)
        found = pam.relax(pam.Problem(net, sym, task(), RECIPE, settings), curve, p, seed=1)
        for m in found.values():
            torch.testing.assert_close(m.sum(0), torch.ones(len(m)).double(), atol=1e-6, rtol=0)
            assert m.min() >= 0
        mixed = curves.line(a, sym.apply_matrices(b, found))
        after = pam.objective(net, mixed, task().train)
        assert after < 0.95 * pam.objective(net, curve, task().train), name


def test_a_strong_proximal_term_holds_the_matrices() -> None:
    net = plain()
    a, b, sym = ends(net)
    moved = []
    for nu in (1e3, 1e-1):
        settings = replace(SMALL, nu=nu, p_lr=0.05, p_epochs=5)
        problem = pam.Problem(net, sym, task(), RECIPE, settings)
        m = pam.relax(problem, curves.line(a, b), sym.identity(), seed=1)
        moved.append(max(float((x - torch.eye(len(x))).norm()) for x in m.values()))
    assert moved[1] < 0.7 * moved[0]


# --- Rounding ---------------------------------------------------------------------------------


def authors_choice(assignment: float, old: float, samples: list[float]) -> float:
    """The published rounding (paper.md says fault): `best` is not lowered when the old one wins."""
    best, chosen = assignment, assignment
    if old < best:
        chosen = old
    for sample in samples:
        if sample < best:
            best = chosen = sample
    return chosen


def test_the_best_candidate_wins_also_after_the_old_permutation() -> None:
    """The old permutation beats the assignment; a sample lies between them."""
    losses = {0: 0.5, 1: 1.0, 2: 0.8, 3: 0.9}
    offers = [{"g": torch.tensor(p)} for p in ([0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1])]
    score = {tuple(o["g"].tolist()): losses[i] for i, o in enumerate(offers)}
    number, chosen, value = pam.choose(offers, lambda p: score[tuple(p["g"].tolist())])
    assert (number, value) == (0, 0.5)
    assert torch.equal(chosen["g"], offers[0]["g"])
    assert authors_choice(1.0, 0.5, [0.8, 0.9]) == 0.8, "their fault, for comparison"


@pytest.mark.parametrize("seed", range(5))
def test_choice_is_the_minimum_in_any_order_and_scores_once(seed: int) -> None:
    g = generator(seed)
    offers = [{"g": torch.randperm(3, generator=g)} for _ in range(20)]
    losses: dict[tuple[int, ...], float] = {}

    def score(p: Perm) -> float:
        name = tuple(p["g"].tolist())
        assert name not in losses, "scored twice"
        losses[name] = float(torch.rand(1, generator=g))
        return losses[name]

    _, chosen, value = pam.choose(offers, score)
    assert value == min(losses.values()) == losses[tuple(chosen["g"].tolist())]
    with pytest.raises(ValueError, match="got no permutation"):
        pam.choose([], score)


def test_candidates_are_the_old_the_nearest_and_terms_of_the_matrix() -> None:
    m = {
        "g": doubly_stochastic.project(torch.eye(5) * 2 + torch.rand(5, 5, generator=generator(1)))
    }
    old = {"g": torch.tensor([4, 3, 2, 1, 0])}
    first, second, *samples = pam.candidates(m, old, 6, generator(0))
    assert first is old
    assert torch.equal(second["g"], assign(m["g"]))
    assert len(samples) == 6
    for sample in samples:
        assert (m["g"][torch.arange(5), sample["g"]] > 0).all(), "not in the matrix's support"


# --- The whole --------------------------------------------------------------------------------


@cache
def planted() -> tuple[nn.Module, Task, Theta, Theta, Symmetry, Perm]:
    """A trained network and its copy: noise added, units permuted; and what undoes that."""
    whole = data.load("fashion-mnist-small", device="cpu")
    few = replace(whole, train=whole.train.first(2000))
    layers = nn.Linear(196, 12), nn.ReLU(), nn.Linear(12, 10)
    net = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), *layers)
    recipe = replace(RECIPE, epochs=15, batch_size=50)
    theta, sym, g = (
        train.fit(net, few, recipe, seed=1).theta,
        symmetry.find(net, few.example),
        generator(5),
    )
    noisy = {n: x + 0.05 * x.std() * torch.randn(x.shape, generator=g) for n, x in theta.items()}
    order = sym.random(g)
    return net, few, theta, sym.permute(noisy, order), sym, sym.inverse(order)


PLANTED = Settings(epochs=(1,), p_epochs=10, p_lr=3.0, images=2000, probe=500, follow=True)


def test_a_planted_permutation_is_found_from_the_identity() -> None:
    """Up to units that never fire: the loss on the line is that of the true permutation."""
    net, few, theta, copy, sym, answer = planted()
    recipe = replace(RECIPE, batch_size=100)
    curve = curves.bezier(theta, copy)
    found = pam.fit(pam.Problem(net, sym, few, recipe, PLANTED), curve, seed=1)
    probe = few.train.first(500)
    start, ideal, reached = (
        pam.objective(net, curves.line(theta, sym.permute(copy, p)), probe)
        for p in (sym.identity(), answer, found.perm)
    )
    ((name, p),) = found.perm.items()
    print(f"Q: start {start:.4f}, true {ideal:.4f}, found {reached:.4f}")
    print(f"{int((p == answer[name]).sum())} of {len(p)} units right")
    assert start > ideal + 0.1
    assert reached - ideal < 0.1 * (start - ideal)
    assert (p == answer[name]).sum() > len(p) / 2
    assert found.history[0].rounded <= found.history[0].before


def test_at_the_planted_permutation_it_stays() -> None:
    net, few, theta, copy, sym, answer = planted()
    curve = curves.bezier(theta, sym.permute(copy, answer))
    settings = replace(PLANTED, epochs=(1, 1), p_epochs=2, samples=8)
    problem = pam.Problem(net, sym, few, replace(RECIPE, batch_size=100), settings)
    found = pam.fit(problem, curve, seed=1)
    assert [h.changed for h in found.history] == [0.0, 0.0]
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.perm.values())


@pytest.mark.parametrize("make", [plain, normed])
def test_the_objective_never_rises_and_the_end_is_the_permuted_one(make: object) -> None:
    net = make()  # type: ignore[operator]
    a, b, sym = ends(net)
    curve = curves.bezier(a, b)
    for relaxation in ("exact", "straight-through"):
        settings = replace(SMALL, epochs=(1, 1, 1), relaxation=relaxation)
        found = pam.fit(pam.Problem(net, sym, task(), RECIPE, settings), curve, seed=1)
        values = [v for h in found.history for v in (h.before, h.rounded, h.after)]
        assert all(x >= y for x, y in pairwise(values))
        q = pam.objective(net, found.curve, task().train, settings.nodes)
        agree(q, values[-1], terms(net) + len(task().train))
        end = sym.permute(b, found.perm)
        assert all(torch.equal(found.curve.points[-1][n], end[n]) for n in end)
        assert all(torch.equal(found.curve.points[0][n], a[n]) for n in a)


def test_a_curve_step_that_does_harm_is_taken_back() -> None:
    net = plain()
    a, b, sym = ends(net)
    recipe, settings = replace(RECIPE, lr=30.0), replace(SMALL, epochs=(1,), p_lr=1e-9)
    problem = pam.Problem(net, sym, task(), recipe, settings)
    found = pam.fit(problem, curves.bezier(a, b), seed=1)
    (h,) = found.history
    assert (h.kept, h.phi_moved) == (0.0, 0.0)
    assert h.before == h.rounded == h.after
    fresh = curves.bezier(a, b).points[1]
    assert all(torch.equal(x, fresh[n]) for n, x in found.curve.points[1].items())


def whole_run() -> tuple[tuple[pam.Problem, Curve], pam.Result]:
    """The arguments of a run with two iterations, and what it gives when nothing stops it."""
    net = normed()
    a, b, sym = ends(net)
    settings = replace(SMALL, p_lr=100.0, samples=12, follow=True)  # many candidates
    arguments = pam.Problem(net, sym, task(), RECIPE, settings), curves.bezier(a, b)
    return arguments, pam.fit(*arguments, seed=1)


def resumed(arguments: tuple[pam.Problem, Curve], checkpoint: Checkpoint) -> pam.Result:
    return pam.fit(*arguments, seed=1, checkpoint=checkpoint)


def assert_same(again: pam.Result, whole: pam.Result) -> None:
    assert again.history == whole.history
    assert all(torch.equal(again.perm[n], p) for n, p in whole.perm.items())
    for p, q in zip(again.curve.points, whole.curve.points, strict=True):
        assert all(torch.equal(p[n], q[n]) for n in p)


def test_stopped_after_any_save_it_gives_the_same_numbers(tmp_path: Path) -> None:
    """And each save is progress: what is stopped at every one of them still comes to an end."""
    arguments, whole = whole_run()
    for stop in itertools.count(1):
        try:
            resumed(arguments, Stopped(tmp_path / f"{stop}", stop))
        except KeyboardInterrupt:
            assert_same(resumed(arguments, Checkpoint(tmp_path / f"{stop}")), whole)
        else:
            break
    assert stop > 12
    stops = 0
    while True:
        try:
            assert_same(resumed(arguments, Stopped(tmp_path / "c", 2)), whole)
            break
        except KeyboardInterrupt:
            stops += 1
        assert stops < stop, "no progress from one stop to the next"
    assert stops > 5


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_no_offer_is_scored_twice(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted within an evaluation of the objective, again and again: none is repeated."""
    arguments, whole = whole_run()
    measured: list[float] = []
    relaxed: list[int] = []
    real, relax = pam.objective, pam.relax

    def count(*args: object, **options: object) -> Matrices:
        relaxed.append(len(measured))
        return relax(*args, **options)  # type: ignore[arg-type]

    def fragile(*args: object, **options: object) -> float:
        if len(measured) % stop == stop - 1 and len(measured) not in failed:
            failed.add(len(measured))
            raise KeyboardInterrupt
        measured.append(real(*args, **options))  # type: ignore[arg-type]
        return measured[-1]

    failed: set[int] = set()
    monkeypatch.setattr(pam, "relax", count)
    resumed(arguments, Checkpoint(tmp_path / "whole"))
    failed = {*range(1000)}
    measured.clear(), relaxed.clear()
    monkeypatch.setattr(pam, "objective", fragile)
    resumed(arguments, Checkpoint(tmp_path / "counted"))
    expected, steps = list(measured), len(relaxed)
    measured.clear(), relaxed.clear(), failed.clear()
    for _ in range(100):
        try:
            again = resumed(arguments, Checkpoint(tmp_path / "c"))
            break
        except KeyboardInterrupt:
            pass
    assert_same(again, whole)
    assert len(failed) >= 2
    assert measured == expected, "something was measured twice"
    assert len(relaxed) == steps, "relaxed again"


MISFITS: dict[str, Callable[[Theta, str], Theta]] = {
    "other columns": lambda s, _: {"history": s["history"][:, :5]},
    "more iterations": lambda *_: {"history": torch.zeros(7, 9).double()},
    "a scalar": lambda *_: {"history": torch.zeros(())},
    "another permutation": lambda _, group: {f"perm.{group}": torch.arange(2)},
    "another network": lambda *_: {"inner.1.1.weight": torch.zeros(1, 1)},
    "another precision": lambda s, _: {"inner.1.1.weight": s["inner.1.1.weight"].double()},
    "a name more": lambda *_: {"outer.1.1.weight": torch.zeros(1, 1)},
    "another matrix": lambda _, group: {f"round.matrix.{group}": torch.eye(2).double()},
    "fewer offers": lambda s, group: {f"round.offer.{group}": s[f"round.offer.{group}"][1:]},
    "fewer scores": lambda s, _: {"round.scores": s["round.scores"][1:]},
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_set_aside(
    change: Callable[[Theta, str], Theta], tmp_path: Path
) -> None:
    net = plain()
    a, b, sym = ends(net)
    (group,) = sym.groups
    settings = replace(SMALL, epochs=(1,), p_lr=100.0)
    arguments = pam.Problem(net, sym, task(), RECIPE, settings), curves.bezier(a, b)
    whole = pam.fit(*arguments, seed=1)
    with pytest.raises(KeyboardInterrupt):
        resumed(arguments, Stopped(tmp_path / "c", 5))
    checkpoint = Checkpoint(tmp_path / "c")
    state = checkpoint.load()
    assert state
    assert len(state["round.scores"]) == 2
    checkpoint.save(state | change(state, group))
    with pytest.warns(StoreWarning, match="set aside as c.broken"):
        again = resumed(arguments, checkpoint)
    assert_same(again, whole)


def test_the_inner_points_follow_by_their_share() -> None:
    a, b, c = ({"w": torch.tensor([v])} for v in (0.0, 3.0, 9.0))
    curve = curves.bezier(a, b, degree=3)
    moved = pam.move_end(curve, c, follow=True)
    assert [float(p["w"]) for p in moved.points] == pytest.approx([0, 3, 6, 9])
    still = pam.move_end(curve, c, follow=False)
    assert [float(p["w"]) for p in still.points] == pytest.approx([0, 1, 2, 9])


def test_distances() -> None:
    p, q = ({"g": torch.tensor(v)} for v in ([0, 1, 2], [1, 0, 2]))
    assert (
        pam.distance(p, q)
        == 2
        == (doubly_stochastic.matrix(p["g"]) - doubly_stochastic.matrix(q["g"])).norm()
    )
    assert pam.distance(p, p) == 0


def test_settings_are_checked() -> None:
    for wrong, words in (
        ({"relaxation": "nearest"}, "relaxation: got 'nearest', expected one of"),
        ({"nu": 0.0}, "nu: got 0.0, expected a number of at least 5.8"),
        ({"nu_phi": 1e-300}, "nu_phi: got 1e-300, expected a number of at least 5.8"),
        ({"epochs": ()}, r"epochs: got \(\), expected a list of one value or more"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **wrong)  # type: ignore[arg-type]
    assert math.isnan(pam.Iteration(1, 1, 1, 0, 0, 0).after)


def test_units_in_buffers_that_would_stay_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient would be that of a network half of which is permuted."""
    net = Fixed()
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, task().example)
    problem = pam.Problem(net, sym, task(), RECIPE, SMALL)
    monkeypatch.setattr(pam, "objective", lambda *_: pytest.fail("it has looked at images"))
    with pytest.raises(ValueError, match="units stand in the buffer 'first'"):
        pam.fit(problem, curves.bezier(a, b), seed=1)


def test_without_groups_there_is_nothing_to_permute() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    a, b, sym = ends(net)
    found = pam.fit(pam.Problem(net, sym, task(), RECIPE, SMALL), curves.bezier(a, b), seed=1)
    assert found.perm == {}
    assert all(math.isfinite(row.after) for row in found.history)


def test_the_objective_is_that_of_images_as_training_shows_them() -> None:
    """Networks that were trained on augmented images are at a loss on others."""
    net, shown = normed(), task(augment=Augment(padding=4, rotation=15))
    a, b, sym = ends(net)
    curve, settings = curves.line(a, b), replace(SMALL, probe=48)
    for augments in (True, False):
        recipe = replace(RECIPE, augment=augments)
        problem = pam.Problem(net, sym, shown, recipe, settings)
        images = shown.train.first(48)
        wanted = images.augmented(shown.augment) if augments else images
        assert problem.value(curve) == pam.objective(net, curve, wanted, settings.nodes)
        assert torch.equal(problem.probe.images, images.images) != augments
