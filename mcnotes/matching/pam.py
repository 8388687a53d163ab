"""Proximal alternating minimisation over a permutation and a curve (chapter 7).

Two blocks, in turn: the matrices P that act on the curve's last end point, relaxed from
permutations to doubly stochastic matrices and rounded again, and the inner control points φ.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mcnotes import display, evaluate, train
from mcnotes.cache import Checkpoint, State
from mcnotes.checks import LARGEST, Rule, a, flag, listed, number, one_of, require, whole
from mcnotes.curves import Curve, Theta, check_same_space, combine
from mcnotes.data import Split, Task
from mcnotes.matching import assignment, doubly_stochastic
from mcnotes.symmetry import Perm, Symmetry

Matrices = dict[str, Tensor]  # group → [units, units], float64 on the CPU
STEPS = ("step.", "round.")  # a checkpoint's names: a step's state, the scores of candidates


@dataclass(frozen=True)
class Settings:
    """How PAM runs (defaults: the authors' code); the recipe has the batch size and the rest.

    There one ν of 1000 holds both blocks. But the curve step's leash is applied outside of its
    momentum μ = 0.9, which makes the loss's steps 1/(1 − μ) times as long and the leash's not: what
    it minimises has ν_φ = 10⁴.
    """

    epochs: tuple[int, ...] = (250,)  # of the curve step, for each outer iteration
    p_epochs: int = 20  # of the permutation step
    p_lr: float = 0.05
    nu: float = 1e3  # ν_P of ‖P − P_old‖²/2ν_P
    nu_phi: float = 1e4  # ν_φ of ‖φ − φ_old‖²/2ν_φ
    relaxation: str = "exact"  # a name in `doubly_stochastic.PROJECTIONS`, or "straight-through"
    samples: int = 32  # candidates drawn from the Birkhoff–von Neumann terms
    images: int = 50_000  # training images of the permutation step
    probe: int = 1_000  # training images on which the objective is measured
    nodes: int = 5  # values of t at which it is measured
    follow: bool = True  # do the inner control points move along with the end point?

    @property
    def straight_through(self) -> bool:
        """Are the matrices free, and does the permutation nearest to them act?"""
        return self.relaxation == "straight-through"

    def __post_init__(self) -> None:
        require("pam", vars(self), OPTIONS)


def _relaxation(value: object) -> str:
    return one_of([*doubly_stochastic.PROJECTIONS, "straight-through"])(value)


OPTIONS: dict[str, Rule] = {
    "epochs": listed(whole(1, train.EPOCHS), once=False),
    "p_epochs": whole(1, train.EPOCHS),
    "p_lr": number(0, above=True),
    "nu": number(1 / LARGEST),  # 1/ν is a factor, too
    "nu_phi": number(1 / LARGEST),
    "relaxation": _relaxation,
    "samples": whole(0),
    "images": whole(1),
    "probe": whole(1),
    "nodes": whole(1),
    "follow": flag,
}
"""What the fields of `Settings` may be."""


class Iteration(NamedTuple):
    """One outer iteration. Q: the mean training loss along the curve (`objective`), in nats."""

    before: float  # Q(φ, P)
    relaxed: float  # Q at the doubly stochastic matrices, before rounding
    rounded: float  # Q after the permutation step
    chosen: float  # the candidate that won: 0 the old permutation, 1 the assignment, 2 … samples
    changed: float  # share of units whose place changed
    p_moved: float  # ‖P − P_old‖, Frobenius, over all groups
    after: float = math.nan  # Q after the curve step
    phi_moved: float = math.nan  # ‖φ − φ_old‖
    kept: float = math.nan  # 1; 0 if the curve step did not lower its objective: it was taken back


class Result(NamedTuple):
    """The curve; the permutation of its last point, from that which came in; what happened."""

    curve: Curve
    perm: Perm
    history: list[Iteration]

    def __repr__(self) -> str:
        first, last = self.history[0].before, self.history[-1].after
        return f"Result({len(self.history)} iterations, Q {first:.3g} → {last:.3g}; {self.curve!r})"

    def _repr_html_(self) -> str:
        return display.described(self, display.table(row._asdict() for row in self.history))


@dataclass(frozen=True, eq=False)
class Problem:
    """What is minimised, and how: the same in every step of a run, on every curve.

    recipe: how the inner points are trained; the permutation step takes its batch size, schedule
    and precision. Raises ValueError for what is none of these.
    """

    net: nn.Module
    sym: Symmetry
    task: Task
    recipe: train.Recipe
    settings: Settings

    def __post_init__(self) -> None:
        rules = {"sym": a(Symmetry, "a Symmetry"), "settings": a(Settings, "pam.Settings")}
        require("pam", vars(self), train.ARGUMENTS | rules)

    def __repr__(self) -> str:
        return f"Problem({type(self.net).__name__}, {self.task!r}, {self.settings!r})"

    @cached_property
    def probe(self) -> Split:
        """The images on which Q is measured: `settings.probe` of training, as it shows them."""
        few: Split = train.as_shown(
            self.task.train.first(self.settings.probe), self.task, self.recipe
        )
        return few

    def value(self, curve: Curve) -> float:
        """Q on `probe`, in nats."""
        return objective(self.net, curve, self.probe, self.settings.nodes)

    def end(self, curve: Curve, perm: Perm) -> Theta:
        """The last point of a curve on which `perm` acts, before it acted."""
        return self.sym.permute(curve.points[-1], self.sym.inverse(perm))


def fit(
    problem: Problem, curve: Curve, *, seed: int, checkpoint: Checkpoint | None = None
) -> Result:
    """Minimise Q(φ, P) = E_t L(r(t)) over the inner points φ and the permutation P of the last one.

    Begins with `curve` and P the identity: to begin elsewhere, permute its last point first. Each
    outer iteration is a permutation step (`relax`, `candidates`, `choose`) and a curve step
    (`train.fit_curve`). A step is kept only if it lowers Q plus its proximal term on the first
    `settings.probe` training images: there Q cannot increase. With a `checkpoint` a stopped run
    goes on from its last epoch or scored candidate and ends with the same numbers. Raises
    TrainingError as `train`, ValueError as `check_only_parameters_move`.
    """
    given = {"problem": problem, "curve": curve, "seed": seed, "checkpoint": checkpoint}
    require("pam", given, train.ARGUMENTS | {"problem": a(Problem, "a pam.Problem")})
    check_only_parameters_move(problem.net, problem.sym)
    run = _Run(problem, curve, seed, checkpoint)
    while len(run.history) < len(problem.settings.epochs) or run.halfway:
        if run.halfway:
            run.curve_step()
        else:
            run.permutation_step()
    return Result(run.curve, run.perm, run.history)


class _Run:
    """The state of `fit` between its steps."""

    def __init__(
        self, problem: Problem, curve: Curve, seed: int, checkpoint: Checkpoint | None
    ) -> None:
        self.problem, self.curve, self.seed, self.checkpoint = problem, curve, seed, checkpoint
        self.end = curve.points[-1]  # before any permutation or matrix acts on it
        self.perm, self.history = problem.sym.identity(), list[Iteration]()
        self.before: float | None = None  # Q, once the permutation step has measured it
        self.stored: State = {}  # what an earlier process left
        if checkpoint and (state := _taken(checkpoint, self.fits)):
            self.take_over(state)

    def take_over(self, state: State) -> None:
        """Go on from what an earlier process left in the checkpoint."""
        self.stored = state
        self.history = [Iteration(*row) for row in state["history"].tolist()]
        self.perm = {n: state[f"perm.{n}"] for n in self.perm}
        self.before = float(state["before"]) if "before" in state else None
        points, device = [self.curve.points[0]], self.problem.task.device
        for i in range(1, self.curve.degree):
            points.append({n: state[f"inner.{i}.{n}"].to(device) for n in self.end})
        points.append(self.problem.sym.permute(self.end, self.perm))
        self.curve = self.curve.with_points(points)

    def fits(self, state: State) -> None:
        """Raise ValueError unless `state` is one of this run; its steps see to their own parts."""
        rows = state.get("history", torch.empty(0)).numel() // len(Iteration._fields)
        iterations = len(self.problem.settings.epochs)
        if rows > iterations:
            raise ValueError(f"it holds {rows} iterations, expected {iterations}")
        expected = self.done() | {"history": torch.empty(rows, len(Iteration._fields)).double()}
        expected |= {"before": torch.empty(()).double()} if "before" in state else {}
        own = {n: x for n, x in state.items() if not n.startswith(STEPS)}
        check_same_space(expected, own, "checkpoint")

    @property
    def halfway(self) -> bool:
        """Is the permutation step done, and the curve step not?"""
        return bool(self.history) and math.isnan(self.history[-1].after)

    def done(self) -> State:
        """What the steps so far gave."""
        done = {f"perm.{n}": p for n, p in self.perm.items()}
        for i, point in enumerate(self.curve.points[1:-1], 1):
            done |= {f"inner.{i}.{n}": x for n, x in point.items()}
        rows = torch.tensor(self.history, dtype=torch.float64)
        done["history"] = rows.view(-1, len(Iteration._fields))
        if self.before is not None:
            done["before"] = torch.tensor(self.before, dtype=torch.float64)
        return done

    def part(self, name: str = "step.") -> "_Part | None":
        """Where the step that comes next keeps its state, beside `done`; name: one of STEPS."""
        if self.checkpoint is None:
            return None
        return _Part(self.checkpoint, self.stored, self.done(), name)

    def keep(self) -> None:
        """Save what was found between two steps, and the next one's state if there is one."""
        if part := self.part():
            part.save(part.load() or {})

    def permuted(self, perm: Perm) -> Curve:
        """The curve to the end in the order `perm`."""
        end = self.problem.sym.permute(self.end, perm)
        return move_end(self.curve, end, self.problem.settings.follow)

    def mixed(self, matrices: Matrices) -> Curve:
        """The curve to the end on which doubly stochastic matrices act."""
        end = self.problem.sym.apply_matrices(self.end, matrices)
        return move_end(self.curve, end, self.problem.settings.follow)

    def step_seed(self) -> int:
        return (self.seed * 1009 + 2 * len(self.history) + self.halfway) % 2**64

    def permutation_step(self) -> None:
        problem, curve, old, seed = self.problem, self.curve, self.perm, self.step_seed()
        if self.before is None:
            self.before = self.history[-1].after if self.history else problem.value(curve)
            self.keep()
        before, nu = self.before, problem.settings.nu

        def score(perm: Perm) -> float:
            if moved := distance(perm, old):
                return proximal(moved, nu) + problem.value(self.permuted(perm))
            return before

        scores = _Scores(score, old, self.part("round."))
        if not scores.matrices:
            scores.begin(relax(problem, curve, old, seed=seed, checkpoint=self.part()))
        generator = torch.Generator().manual_seed(seed)
        offers = candidates(scores.matrices, old, problem.settings.samples, generator)
        chosen, self.perm, lowest = choose(offers, scores)
        moved, units = distance(self.perm, old), sum(len(p) for p in old.values())
        iteration = Iteration(
            before=before,
            relaxed=problem.value(self.mixed(scores.matrices)),
            rounded=lowest - proximal(moved, nu),
            chosen=chosen,
            changed=moved**2 / 2 / max(units, 1),
            p_moved=moved,
        )
        self.curve = self.permuted(self.perm)
        self.history.append(iteration)
        self.before = None
        self.keep()

    def curve_step(self) -> None:
        problem, last = self.problem, self.history[-1]
        recipe = replace(problem.recipe, epochs=problem.settings.epochs[len(self.history) - 1])
        fitted = train.fit_curve(
            problem.net,
            self.curve,
            problem.task,
            recipe,
            seed=self.step_seed(),
            pull=1 / problem.settings.nu_phi,
            checkpoint=self.part(),
        ).curve
        after, moved = problem.value(fitted), shift(problem.net, self.curve, fitted)
        kept = after + proximal(moved, problem.settings.nu_phi) <= last.rounded
        if not kept:
            fitted, after, moved = self.curve, last.rounded, 0.0
        self.curve = fitted
        self.history[-1] = last._replace(after=after, phi_moved=moved, kept=float(kept))


class _Part(Checkpoint):
    """One step's state within the checkpoint of the whole run: the names that begin with `name`."""

    def __init__(self, whole: Checkpoint, stored: State, done: State, name: str) -> None:
        self.whole, self.stored, self.done, self.name = whole, stored, done, name

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.whole.save({**self.done, **{self.name + n: x for n, x in state.items()}})

    def load(self) -> State | None:
        rows, now = (x.get("history", torch.empty(0)) for x in (self.stored, self.done))
        if not torch.equal(rows.nan_to_num(-1), now.nan_to_num(-1)):
            return None  # nothing, or the state of another step
        names = [n for n in self.stored if n.startswith(self.name)]
        return {n.removeprefix(self.name): self.stored[n] for n in names} or None

    def set_aside(self, error: Exception) -> None:
        self.whole.set_aside(error)


def _taken(checkpoint: Checkpoint, fits: Callable[[State], None]) -> State | None:
    """The stored state; None, and the file set aside, if `fits` raises ValueError about it."""
    if state := checkpoint.load():
        try:
            fits(state)
        except ValueError as error:
            checkpoint.set_aside(error)
            return None
    return state


class _Scores:
    """The matrices of a permutation step, and what each candidate scored, kept one by one.

    A candidate is known by its places: whatever the order of the offers, none is scored twice.
    """

    def __init__(self, score: Callable[[Perm], float], old: Perm, part: _Part | None) -> None:
        self.score, self.old, self.part = score, old, part
        self.matrices: Matrices = {}
        self.perms, self.values = list[Perm](), list[float]()
        if part and (state := _taken(part, self.fits)):
            self.matrices = {n: state[f"matrix.{n}"] for n in old}
            self.values = state["scores"].tolist()
            rows = range(len(self.values))
            self.perms = [{n: state[f"offer.{n}"][i] for n in old} for i in rows]

    def __call__(self, perm: Perm) -> float:
        for known, value in zip(self.perms, self.values, strict=True):
            if all(torch.equal(known[n], perm[n]) for n in known):
                return value
        self.values.append(self.score(perm))
        self.perms.append(perm)
        self.keep()
        return self.values[-1]

    def begin(self, matrices: Matrices) -> None:
        """Take the matrices, none of whose candidates has a score."""
        self.matrices = matrices
        self.keep()

    def keep(self) -> None:
        if self.part:
            self.part.save(self.state())

    def state(self) -> State:
        state = {f"matrix.{n}": m for n, m in self.matrices.items()}
        for n, p in self.old.items():
            rows = [perm[n].tolist() for perm in self.perms]
            state[f"offer.{n}"] = torch.tensor(rows, dtype=torch.int64).view(-1, len(p))
        return state | {"scores": torch.tensor(self.values, dtype=torch.float64)}

    def fits(self, state: State) -> None:
        """Raise ValueError unless `state` is of the form of `state()`."""
        rows = state.get("scores", torch.empty(0)).numel()
        expected = {"scores": torch.empty(rows, dtype=torch.float64)}
        for n, p in self.old.items():
            expected[f"matrix.{n}"] = torch.empty(len(p), len(p), dtype=torch.float64)
            expected[f"offer.{n}"] = torch.empty(rows, len(p), dtype=torch.int64)
        check_same_space(expected, state, "checkpoint")


def objective(net: nn.Module, curve: Curve, images: Split, nodes: int = 5) -> float:
    """Q: the loss on `images`, BatchNorm recomputed, averaged over `nodes` midpoints in [0, 1]."""
    points = (curve((i + 0.5) / nodes) for i in range(nodes))
    fresh = (evaluate.batchnorm(net, theta, images, batch_size=100) for theta in points)
    return sum(evaluate.score(net, theta, images, batch_size=100).loss for theta in fresh) / nodes


def move_end(curve: Curve, end: Theta, follow: bool) -> Curve:
    """The curve with another last point; `follow`: inner ones move by i/n of its displacement."""
    *others, old = curve.points
    if follow:
        for i in range(1, curve.degree):
            share = i / curve.degree
            moved = combine([others[i], end, old], [1.0, share, -share])
            stays = {n: x for n, x in others[i].items() if torch.equal(end[n], old[n])}
            others[i] = moved | stays  # to the last bit
    return curve.with_points([*others, end])


def proximal(distance: float, nu: float) -> float:
    """The proximal term of a step of this length: distance²/2ν."""
    return distance**2 / (2 * nu)


def distance(p: Perm, q: Perm) -> float:
    """‖P − Q‖, Frobenius, of permutations as matrices: a unit placed differently counts 2."""
    return math.sqrt(2 * sum(int((p[n] != q[n]).sum()) for n in p))


def shift(net: nn.Module, old: Curve, new: Curve) -> float:
    """‖φ − φ_old‖ over the parameters of all inner points."""
    inner = zip(old.points[1:-1], new.points[1:-1], strict=True)
    pairs = ((p[n], q[n]) for p, q in inner for n, _ in net.named_parameters())
    return math.sqrt(sum(float((x - y).double().square().sum()) for x, y in pairs))


def check_only_parameters_move(net: nn.Module, sym: Symmetry) -> None:
    """Raise ValueError where units stand in a buffer that a network reads while it trains.

    The permutation step moves parameters. Running statistics of BatchNorm may stay: in training
    mode it takes the batch's own.
    """
    norms = [name for name, module in net.named_modules() if isinstance(module, _NormBase)]
    running = tuple(f"{name}." if name else "" for name in norms)
    buffers = {name for name, _ in net.named_buffers() if not name.startswith(running)}
    for group in sym.groups.values():
        if found := sorted(buffers.intersection(place.name for place in group.places)):
            raise ValueError(
                f"pam: units stand in the buffer {found[0]!r}, which the permutation step does not "
                "move. Fix: make it a parameter, or match by activations or weights"
            )


class MovedEnd:
    """The last point of a curve, moved by matrices, and the slopes of the loss in the matrices.

    step: it holds the control points as its `rows`, and takes gradients at points of the curve.
    end: the last point before any matrix acts. follow: as in `move_end`. Raises ValueError as
    `check_only_parameters_move`.
    """

    def __init__(
        self, step: train.Step, curve: Curve, end: Theta, sym: Symmetry, follow: bool = False
    ) -> None:
        check_only_parameters_move(step.net, sym)
        n = curve.degree
        share = [i / n if follow else 0.0 for i in range(n)] + [1.0]
        self.step, self.end, self.sym = step, end, sym
        self.share = torch.tensor(share).to(step.rows)  # of the end's move, by control point
        self.base = step.rows - torch.outer(self.share, step.rows[-1])
        self.names = [name for name, _ in step.net.named_parameters()]

    def slopes(
        self, acting: Matrices, free: Matrices, x: Tensor, y: Tensor, weights: Tensor
    ) -> tuple[Tensor, Matrices]:
        """The loss [] where the matrices `acting` move the end, and its slopes in `free`.

        free: the leaves of which `acting` is made. x [B, C, H, W], y [B]; weights [k]: those of
        the control points, w(t), on the device. The rows of the step stay moved.
        """
        moved = self.sym.apply_matrices(self.end, acting)
        flat = torch.cat([moved[n].to(self.step.rows).flatten() for n in self.names])
        torch.add(self.base, torch.outer(self.share, flat.detach()), out=self.step.rows)
        loss, g = self.step.gradient(x, y, weights)
        slopes = torch.autograd.grad(flat, list(free.values()), (weights @ self.share) * g)
        return loss, dict(zip(free, slopes, strict=True))


class PermutationStep(train.Step):
    """Projected SGD on the matrices; `train.run` drives it as it drives any step."""

    def __init__(self, problem: Problem, curve: Curve, old: Perm) -> None:
        settings = problem.settings
        recipe = replace(
            problem.recipe,
            epochs=settings.p_epochs,
            lr=settings.p_lr,
            momentum=0.0,
            weight_decay=0.0,
        )
        super().__init__(problem.net, curve, slice(0, 0), recipe, problem.task.device)
        self.settings = settings
        self.end = MovedEnd(self, curve, problem.end(curve, old), problem.sym, settings.follow)
        self.old = {n: doubly_stochastic.matrix(p) for n, p in old.items()}
        self.matrices = {n: m.clone() for n, m in self.old.items()}

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor, lr: float) -> Tensor:
        """As `train.Step`; one step on the matrices, the control points stay."""
        at = {n: self.acting(m) for n, m in self.matrices.items()}
        leaves = {n: m.clone().requires_grad_() for n, m in at.items()}
        loss, slopes = self.end.slopes(leaves, leaves, x, y, weights)
        for n, m in self.matrices.items():
            slope = slopes[n] + (at[n] - self.old[n]) / self.settings.nu
            self.matrices[n] = self.projected(m - lr * slope)
        return loss

    def acting(self, m: Tensor) -> Tensor:
        """What acts on the end for the matrix m [n, n]."""
        return doubly_stochastic.nearest(m) if self.settings.straight_through else m

    def projected(self, m: Tensor) -> Tensor:
        """The matrix m [n, n] after a step, back where it must be; a free one stays."""
        if self.settings.straight_through:
            return m
        return doubly_stochastic.PROJECTIONS[self.settings.relaxation](m)

    def state(self) -> dict[str, Tensor]:
        """The matrices; not copied."""
        return self.matrices

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave."""
        self.matrices = {n: state[n] for n in self.matrices}


def relax(
    problem: Problem, curve: Curve, old: Perm, *, seed: int, checkpoint: Checkpoint | None = None
) -> Matrices:
    """min over doubly stochastic P of E_t L(r(t; φ, P)) + ‖P − P_old‖²/2ν by projected SGD.

    curve: `old` acts on its last point, and P takes the place of `old`. The matrices begin at `old`
    and are doubly stochastic; with "straight-through" they are free, their assignment acts, and
    what comes back are the doubly stochastic matrices nearest to them. By group, float64 [n, n].
    Raises ValueError where units stand in a buffer, TrainingError as `train.run`.
    """
    if not old:
        return {}
    task, settings = problem.task, problem.settings
    few = replace(task, train=task.train.first(settings.images))
    step = PermutationStep(problem, curve, old)
    train.run(step, curve, few, seed, checkpoint)
    if settings.straight_through:
        return {n: doubly_stochastic.project(m) for n, m in step.matrices.items()}
    return step.matrices


def candidates(
    matrices: Matrices, old: Perm, samples: int, generator: torch.Generator
) -> Iterator[Perm]:
    """Permutations near doubly stochastic matrices: the old one, the nearest, then samples.

    The nearest is an assignment; a sample draws a term of `decompose` for each group.
    """
    yield old
    yield {n: assignment.assign(m) for n, m in matrices.items()}
    terms = {n: doubly_stochastic.decompose(m) for n, m in matrices.items()} if samples else {}
    for _ in range(samples):
        draws = {n: torch.multinomial(w, 1, generator=generator) for n, (w, _) in terms.items()}
        yield {n: terms[n][1][int(k)] for n, k in draws.items()}


def choose(offers: Iterable[Perm], score: Callable[[Perm], float]) -> tuple[int, Perm, float]:
    """The offer of the lowest score, the first of equals: its number, itself, its score.

    Each is compared with the best so far, whichever that was (the authors' code compares samples
    with the assignment even where the old permutation was better). An offer is scored once.
    """
    first: dict[tuple[tuple[int, ...], ...], tuple[int, Perm]] = {}
    for i, offer in enumerate(offers):
        first.setdefault(tuple(tuple(p.tolist()) for p in offer.values()), (i, offer))
    if not first:
        raise ValueError("choose: got no permutation, expected at least one")
    return min(((i, p, score(p)) for i, p in first.values()), key=lambda scored: scored[2])
