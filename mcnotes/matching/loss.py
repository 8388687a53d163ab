"""Matching by the loss at the middle of the line between two networks (chapter 9)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mcnotes.curves import Curve, Theta, check_same_space
from mcnotes.data import Split, Task
from mcnotes.matching import doubly_stochastic, pam
from mcnotes.matching.weights import weight_matching
from mcnotes.symmetry import Perm, Symmetry
from mcnotes.train import Recipe, run


class Midpoint(Curve):
    """The middle of a line, whatever t: the network whose loss Git Re-Basin minimises."""

    def weights(self, t: Tensor) -> Tensor:
        """Of both ends, one half each: [n, 2]."""
        return torch.full((*t.shape, 2), 0.5, dtype=t.dtype, device=t.device)


def through(x: Tensor) -> Tensor:
    """The permutation matrix nearest to x [n, n], with the slope of x itself: straight through."""
    return doubly_stochastic.nearest(x.detach()) + (x - x.detach())


def soft(x: Tensor, temperature: float = 0.1, rounds: int = 20) -> Tensor:
    """exp(x / temperature) scaled by Sinkhorn's rounds to doubly stochastic; differentiable."""
    x = x / temperature
    for _ in range(rounds):
        x = x - x.logsumexp(1, keepdim=True)
        x = x - x.logsumexp(0, keepdim=True)
    return x.exp()


ACTIONS: dict[str, Callable[[Tensor], Tensor]] = {"straight-through": through, "sinkhorn": soft}
"""How a free matrix acts while its loss is minimised."""
RATES = {"straight-through": 3.0, "sinkhorn": 0.3}
"""Step sizes, chosen by validation loss (benchmarks/matchers.py --choose, chapter 9)."""


class Descent(pam.PermutationStep):
    """Adam on one free matrix for each group; what acts on the network is `ACTIONS[action]` of it.

    The matrices begin at the permutation `old`, and are never projected.
    """

    def __init__(self, *args: object, action: str) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.act = ACTIONS[action]
        self.matrices = {n: m.requires_grad_() for n, m in self.matrices.items()}
        self.adam = torch.optim.Adam(self.matrices.values())

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor, lr: float) -> Tensor:
        """As `train.Step`."""
        acting = {n: self.act(m) for n, m in self.matrices.items()}
        moved = self.sym.apply_matrices(self.end, acting)
        flat = torch.cat([moved[n].to(self.rows).flatten() for n in self.names])
        torch.add(self.base, torch.outer(self.share, flat.detach()), out=self.rows)
        loss, g = self.gradient(x, y, weights)
        self.adam.zero_grad()
        flat.backward((weights @ self.share) * g)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        return loss


def loss_matching(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Split, sym: Symmetry, *,
    action: str = "straight-through", start: Perm | None = None, epochs: int = 10,
    lr: float | None = None, samples: int = 16, batch_size: int = 100, seed: int = 0
) -> Perm:  # fmt: skip
    """A permutation P that makes the loss at the middle of θ_A and Pθ_B small, on `images`.

    action "straight-through": the nearest permutation acts, and its slope moves a free matrix (as
    Ainsworth et al. 2023, 3.3, who keep free weights instead). "sinkhorn": a doubly stochastic
    matrix acts, Sinkhorn's scaling of a free one, and slopes run back through the unrolled rounds
    (Peña et al. 2023 differentiate implicitly). Starts at the weight matching unless there is a
    `start`. Of the start, the nearest permutation and `samples` Birkhoff–von Neumann terms, the one
    with the lowest loss at the middle wins (BatchNorm recomputed, on the first 1,000 images).
    lr: Adam's largest step size; default `RATES[action]`.
    """
    check_same_space(theta_a, theta_b, "loss_matching")
    old = start or weight_matching(net, theta_a, theta_b, sym, seed=seed)
    task = Task("matching", images, images, images, ())
    curve = Midpoint((theta_a, sym.permute(theta_b, old)))
    lr = RATES[action] if lr is None else lr
    recipe = Recipe(epochs, batch_size, lr, weight_decay=0.0, schedule="linear", augment=False)
    settings = pam.Settings(p_epochs=epochs)
    step = Descent(net, curve, theta_b, recipe, task.device, sym, old, settings, action=action)
    run(step, curve, task, seed, None)
    found = {n: m.detach() for n, m in step.matrices.items()}
    if action == "sinkhorn":
        found = {n: doubly_stochastic.project(soft(m)) for n, m in found.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = samples if action == "sinkhorn" else 0
    probe = images.first(1000)

    def score(perm: Perm) -> float:
        middle = Midpoint((theta_a, sym.permute(theta_b, perm)))
        return pam.objective(net, middle, probe, nodes=1)

    return pam.choose(pam.candidates(found, old, drawn, generator), score)[1]
