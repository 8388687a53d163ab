"""Matching by the loss at the middle of the line between two networks (chapter 9)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mcnotes import curves, train
from mcnotes.calls import Batches
from mcnotes.checks import a, flag, number, one_of, optional, require, whole
from mcnotes.curves import Curve
from mcnotes.data import Split
from mcnotes.matching import doubly_stochastic, pam
from mcnotes.matching.pair import PAIRED, Pair
from mcnotes.matching.weights import weight_matching
from mcnotes.symmetry import Perm


def through(x: Tensor) -> Tensor:
    """The permutation matrix nearest to x [n, n], with the slope of x itself: straight through."""
    return doubly_stochastic.nearest(x.detach()) + (x - x.detach())


def soft(x: Tensor, rounds: int = 20) -> Tensor:
    """exp(x), scaled to a doubly stochastic matrix by Sinkhorn's rounds.

    x, result: [n, n]. The slope runs back through the rounds.
    """
    for _ in range(rounds):
        x = x - x.logsumexp(1, keepdim=True)
        x = x - x.logsumexp(0, keepdim=True)
    return x.exp()


class Action(NamedTuple):
    """What a free matrix [n, n] stands for while its loss is minimised, and how to descend."""

    of: Callable[[Tensor], Tensor]  # of the free matrix: the matrix
    scale: float  # a permutation is this many times its matrix at the start
    lr: float  # Adam's largest step size
    soft: float  # the share of the steps in which the matrix acts; then, its nearest permutation


ACTIONS = {
    "straight-through": Action(lambda x: x, scale=1.0, lr=3.0, soft=0.0),
    "sinkhorn": Action(soft, scale=2.0, lr=0.3, soft=0.3),
}
"""By name; numbers are chosen by validation loss (benchmarks/matchers.py --choose, chapter 9)."""


@dataclass(frozen=True)
class Descent:
    """How `loss_matching` descends. Raises ValueError for a field that is out of its range.

    None: as `ACTIONS[action]` has it.
    """

    action: str = "straight-through"  # a name in `ACTIONS`
    epochs: int = 10
    lr: float | None = None  # Adam's largest step size
    batch_size: int = 100
    samples: int = 16  # Birkhoff–von Neumann terms that are tried at the end ("sinkhorn")
    both: bool = False  # whether the units of A move as well
    scale: float | None = None  # of the permutation matrices at the start
    soft: float | None = None  # share of the steps in which no nearest permutation acts

    def __post_init__(self) -> None:
        rules = {"action": one_of(ACTIONS), "samples": whole(0), "both": flag}
        rules |= {"scale": optional(number(0, above=True)), "soft": optional(number(0, 1))}
        require("Descent", vars(self), rules)
        _ = self.recipe  # which checks the rest

    @property
    def settings(self) -> Action:
        """The action, with the numbers that this descent has of its own."""
        own = {n: getattr(self, n) for n in ("scale", "lr", "soft")}
        return ACTIONS[self.action]._replace(**{n: x for n, x in own.items() if x is not None})

    @property
    def recipe(self) -> train.Recipe:
        """As the training loop knows it."""
        return train.Recipe(
            self.epochs,
            self.batch_size,
            self.settings.lr,
            weight_decay=0.0,
            schedule="linear",
            augment=False,
        )


class Shown(NamedTuple):
    """Images for the loop of `train`, as a `calls.Training`: none is held out or augmented."""

    train: Batches
    augment: None = None

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.train.device


class MiddleStep(train.Step):
    """A step of Adam on one free matrix for each group, by the loss at the middle of the line.

    The middle is taken whatever t is drawn. The matrices are never projected; what acts on an end
    is `how.action` of them, and after a share of the steps the permutation nearest to that. starts:
    by end (0: A, 1: B), the permutation that its matrices begin at; an end that is left out stays.
    """

    def __init__(
        self, pair: Pair, line: Curve, starts: dict[int, Perm], how: Descent, images: Batches
    ) -> None:
        super().__init__(pair.net, line, slice(0, 0), how.recipe, images.device)
        self.ends, self.sym, self.names = (pair.theta_a, pair.theta_b), pair.sym, pair.names
        self.half = torch.full([2], 0.5).to(self.rows)  # the weights of both ends
        self.how, self.settings = how, how.settings
        steps = how.epochs * images.count(how.batch_size)
        self.soft_steps = round(self.settings.soft * steps)  # that are left
        self.matrices = {
            end: {n: self.begin(p) for n, p in start.items()} for end, start in starts.items()
        }
        self.adam = torch.optim.Adam([m for end in self.matrices.values() for m in end.values()])

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor, lr: float) -> Tensor:
        """As `train.Step`."""
        moved = {end: self.moved(end, free) for end, free in self.matrices.items()}
        for end, flat in moved.items():
            self.rows[end] = flat.detach()
        loss, g = self.gradient(x, y, self.half)
        for end, free in self.matrices.items():
            slopes = torch.autograd.grad(moved[end], [*free.values()], self.half[end] * g)
            for matrix, slope in zip(free.values(), slopes, strict=True):
                matrix.grad = slope
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.soft_steps -= 1
        return loss

    def begin(self, p: Tensor) -> Tensor:
        """The free matrix that begins at a permutation [n]."""
        return (self.settings.scale * doubly_stochastic.matrix(p)).requires_grad_()

    def act(self, x: Tensor) -> Tensor:
        """Of a free matrix [n, n]: the matrix that acts."""
        x = self.settings.of(x)
        return x if self.soft_steps > 0 else through(x)

    def moved(self, end: int, free: dict[str, Tensor]) -> Tensor:
        """The parameters [n] of an end where its matrices act."""
        theta = self.sym.apply_matrices(self.ends[end], {n: self.act(m) for n, m in free.items()})
        return torch.cat([theta[n].to(self.rows).flatten() for n in self.names])

    def offers(self, end: int, start: Perm, generator: torch.Generator) -> Iterator[Perm]:
        """Permutations near the matrices of an end: see `pam.candidates`."""
        found, samples = {n: m.detach() for n, m in self.matrices[end].items()}, 0
        if self.how.action == "sinkhorn":
            found = {n: doubly_stochastic.project(soft(m)) for n, m in found.items()}
            samples = self.how.samples
        return pam.candidates(found, start, samples, generator)


def check_descent(pair: Pair, images: Batches) -> None:
    """Raise ValueError for images and networks that `loss_matching` does not take."""
    require("loss_matching", {"images": images}, {"images": a(Split, "a data.Split")})
    if isinstance(images, Split) and not len(images):
        raise ValueError("loss_matching: images: got none, expected at least one")
    pair.check_finite("loss_matching")
    pair.check_real("loss_matching")
    pam.check_only_parameters_move(pair.net, pair.sym)


def loss_matching(
    pair: Pair, images: Split, how: Descent, *, start: Perm | None = None, seed: int = 0
) -> Perm:
    """A permutation P that makes the loss at the middle of θ_A and Pθ_B small, on `images`.

    Action "straight-through": the nearest permutation acts, and its slope moves a free matrix (as
    Ainsworth et al. 2023, 3.3, who keep free weights instead). "sinkhorn": a doubly stochastic
    matrix acts, Sinkhorn's scaling of a free one, and slopes run back through the unrolled rounds
    (Peña et al. 2023 differentiate implicitly); so that nothing is lost when it is rounded at the
    end, only its nearest permutation acts in later steps, straight through. `both`: the units of A
    have matrices of their own, so that both ends are learned towards each other (after Theus et al.
    2025); P is then the order of B seen from that of A. Starts at the weight matching unless there
    is a `start`. Of the start, the nearest permutation and Birkhoff–von Neumann terms, the one with
    the lowest loss at the middle wins (BatchNorm recomputed, on the first 1,000 images). Raises
    TrainingError if the loss is not finite, ValueError as `check_descent`.
    """
    given = {"pair": pair, "how": how, "seed": seed}
    require("loss_matching", given, PAIRED | {"how": a(Descent, "a Descent")})
    check_descent(pair, images)
    old = weight_matching(pair, seed=seed) if start is None else pair.sym.complete(start)
    if not old:
        return old
    line = curves.line(pair.theta_a, pair.permuted(old))
    starts = {0: pair.sym.identity(), 1: old} if how.both else {1: old}
    step = MiddleStep(pair, line, starts, how, images)
    train.run(step, line, Shown(images), seed, None)
    probe = images.first(1000)

    def at_the_middle(perm: Perm) -> float:
        line = curves.line(pair.theta_a, pair.permuted(perm))
        return pam.objective(pair.net, line, probe, nodes=1)

    generator = torch.Generator().manual_seed(seed)
    offers = {end: step.offers(end, start, generator) for end, start in starts.items()}
    if not how.both:
        return pam.choose(offers[1], at_the_middle)[1]
    met = ((pair.sym.inverse(p), q) for p, q in zip(offers[0], offers[1], strict=True))
    return pam.choose((pair.sym.compose(q, back) for back, q in met), at_the_middle)[1]
