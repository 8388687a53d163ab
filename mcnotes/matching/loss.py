"""Matching by the loss at the middle of the line between two networks (chapter 9)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mcnotes import curves, train
from mcnotes.calls import Batches
from mcnotes.checks import a, one_of, require, whole
from mcnotes.curves import Curve
from mcnotes.data import Split
from mcnotes.matching import doubly_stochastic, pam
from mcnotes.matching.pair import PAIRED, Pair
from mcnotes.matching.weights import weight_matching
from mcnotes.symmetry import Perm

Action = Callable[[Tensor], Tensor]  # of a free matrix [n, n]: the matrix that acts


def through(x: Tensor) -> Tensor:
    """The permutation matrix nearest to x [n, n], with the slope of x itself: straight through."""
    return doubly_stochastic.nearest(x.detach()) + (x - x.detach())


def soft(x: Tensor, temperature: float = 0.1, rounds: int = 20) -> Tensor:
    """exp(x / temperature), scaled to a doubly stochastic matrix by Sinkhorn's rounds.

    x, result: [n, n]. The slope runs back through the rounds.
    """
    x = x / temperature
    for _ in range(rounds):
        x = x - x.logsumexp(1, keepdim=True)
        x = x - x.logsumexp(0, keepdim=True)
    return x.exp()


ACTIONS: dict[str, Action] = {"straight-through": through, "sinkhorn": soft}
"""How a free matrix acts while its loss is minimised."""
RATES = {"straight-through": 3.0, "sinkhorn": 0.3}
"""Step sizes, chosen by validation loss (benchmarks/matchers.py --choose, chapter 9)."""


@dataclass(frozen=True)
class Descent:
    """How `loss_matching` descends. Raises ValueError for a field that is out of its range."""

    action: str = "straight-through"  # a name in `ACTIONS`
    epochs: int = 10
    lr: float | None = None  # Adam's largest step size; None: `RATES[action]`
    batch_size: int = 100
    samples: int = 16  # Birkhoff–von Neumann terms that are tried at the end ("sinkhorn")

    def __post_init__(self) -> None:
        require("Descent", vars(self), {"action": one_of(ACTIONS), "samples": whole(0)})
        _ = self.recipe  # which checks the rest

    @property
    def recipe(self) -> train.Recipe:
        """As the training loop knows it."""
        lr = RATES[self.action] if self.lr is None else self.lr
        return train.Recipe(
            self.epochs,
            self.batch_size,
            lr,
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

    The middle is taken whatever t is drawn. The matrices begin at the permutation `start`, and
    are never projected; what acts on B is `how.action` of them.
    """

    def __init__(
        self, pair: Pair, line: Curve, start: Perm, how: Descent, device: torch.device
    ) -> None:
        super().__init__(pair.net, line, slice(0, 0), how.recipe, device)
        self.end = pam.MovedEnd(self, line, pair.theta_b, pair.sym)
        self.half = torch.full([2], 0.5).to(self.rows)  # the weights of both ends
        self.act = ACTIONS[how.action]
        self.matrices = {n: doubly_stochastic.matrix(p).requires_grad_() for n, p in start.items()}
        self.adam = torch.optim.Adam(self.matrices.values())

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor, lr: float) -> Tensor:
        """As `train.Step`."""
        acting = {n: self.act(m) for n, m in self.matrices.items()}
        loss, slopes = self.end.slopes(acting, self.matrices, x, y, self.half)
        for name, matrix in self.matrices.items():
            matrix.grad = slopes[name]
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        return loss


def loss_matching(
    pair: Pair, images: Split, how: Descent, *, start: Perm | None = None, seed: int = 0
) -> Perm:
    """A permutation P that makes the loss at the middle of θ_A and Pθ_B small, on `images`.

    Action "straight-through": the nearest permutation acts, and its slope moves a free matrix (as
    Ainsworth et al. 2023, 3.3, who keep free weights instead). "sinkhorn": a doubly stochastic
    matrix acts, Sinkhorn's scaling of a free one, and slopes run back through the unrolled rounds
    (Peña et al. 2023 differentiate implicitly). Starts at the weight matching unless there is a
    `start`. Of the start, the nearest permutation and Birkhoff–von Neumann terms, the one with the
    lowest loss at the middle wins (BatchNorm recomputed, on the first 1,000 images). Raises
    TrainingError if the loss is not finite.
    """
    given = {"pair": pair, "images": images, "how": how, "seed": seed}
    rules = PAIRED | {"images": a(Split, "a data.Split"), "how": a(Descent, "a Descent")}
    require("loss_matching", given, rules)
    if not len(images):
        raise ValueError("loss_matching: images: got none, expected at least one")
    pam.check_only_parameters_move(pair.net, pair.sym)
    old = weight_matching(pair, seed=seed) if start is None else pair.sym.complete(start)
    line = curves.line(pair.theta_a, pair.permuted(old))
    step = MiddleStep(pair, line, old, how, images.device)
    train.run(step, line, Shown(images), seed, None)
    found = {n: m.detach() for n, m in step.matrices.items()}
    samples = 0
    if how.action == "sinkhorn":
        found = {n: doubly_stochastic.project(soft(m)) for n, m in found.items()}
        samples = how.samples
    probe = images.first(1000)

    def at_the_middle(perm: Perm) -> float:
        line = curves.line(pair.theta_a, pair.permuted(perm))
        return pam.objective(pair.net, line, probe, nodes=1)

    generator = torch.Generator().manual_seed(seed)
    offers = pam.candidates(found, old, samples, generator)
    _, perm, _ = pam.choose(offers, at_the_middle)
    return perm
