"""Other ways to match two networks (chapter 9): by their weights, by the loss between them.

`align.match(…, method=…)` calls these by name; the functions themselves have more to set. All give
a `Perm` of B's units, as alignment does.
"""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from mcnotes import birkhoff, pam
from mcnotes.bundles import Blocks, bundles, solve
from mcnotes.curves import Curve, Theta, check_same_space
from mcnotes.data import Split, Task
from mcnotes.symmetry import Perm, Symmetry
from mcnotes.train import Recipe, run


def by_weights(
    net: nn.Module, theta_a: Theta, theta_b: Theta, sym: Symmetry, *, start: Perm | None = None,
    only: Collection[str] | None = None, seed: int = 0, sweeps: int = 100
) -> Perm:  # fmt: skip
    """Weight matching: a permutation P that makes ⟨θ_A, Pθ_B⟩ large (Ainsworth et al. 2023, 3.2).

    No data is needed. Block coordinate ascent: one group at a time, the others held fixed, is a
    linear assignment (blocks come with the units within, as in alignment); in random order, until
    a sweep gains nothing. It begins at `start` (default: the identity) and ends in a local optimum.
    Where a group stands on both axes of a tensor, the assignment is that of the linear part.
    only: the names (of `bundles`) that may change.
    """
    check_same_space(theta_a, theta_b, "by_weights")
    names = [name for name, _ in net.named_parameters()]
    fixed = {name: theta_a[name].double() for name in names}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in theta_b.items()}

    def agreement(theta: Theta) -> Tensor:
        return torch.stack([(fixed[name] * theta[name]).sum() for name in names]).sum()

    parts = {n: blocks for n, blocks in bundles(sym).items() if only is None or n in only}
    perm = start or sym.identity()
    generator = torch.Generator().manual_seed(seed)
    best = float(agreement(sym.permute(exact, perm)))
    for _ in range(sweeps):
        before = best
        for k in torch.randperm(len(parts), generator=generator).tolist():
            name, blocks = list(parts.items())[k]
            here = sym.permute(exact, perm)
            step = solve(name, blocks, *_slopes(sym, name, blocks, here, agreement))
            trial = sym.compose(perm, step)
            value = float(agreement(sym.permute(exact, trial)))
            if value > best + 1e-9 * abs(best):
                perm, best = trial, value
        if best == before:
            break
    return perm


def _slopes(
    sym: Symmetry, name: str, blocks: Blocks, theta: Theta, agreement: Callable[[Theta], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What `solve` needs: the agreement that each pairing of units, and of blocks, brings.

    It is linear in the matrices that act on one bundle, so its slopes are these numbers. For units
    within blocks the blocks are shifted cyclically: each stands once in each other's place.
    """
    count, nested = len(blocks), blocks != ((name,),)
    size = {group: sym.groups[group].size for block in blocks for group in block}
    similar = [torch.zeros(count, count, size[g], size[g]).double() for g in blocks[0]]
    outer = torch.zeros(count, count, dtype=torch.float64)
    for shift in range(count):
        order = torch.arange(count).roll(-shift)
        leaves = {g: torch.eye(n, dtype=torch.float64) for g, n in size.items()}
        leaves |= {name: birkhoff.matrix(order)} if nested else {}
        for leaf in leaves.values():
            leaf.requires_grad_()
        value = agreement(sym.apply_matrices(theta, leaves))
        # Adds 0: units that stand in buffers alone have a slope, too.
        value = value + 0 * torch.stack([leaf.sum() for leaf in leaves.values()]).sum()
        slopes = torch.autograd.grad(value, list(leaves.values()))
        slope = dict(zip(leaves, slopes, strict=True))
        for i, j in enumerate(order.tolist()):
            for tile, group in zip(similar, blocks[j], strict=True):
                tile[i, j] = slope[group]
            if nested:
                outer[i, j] = slope[name][i, j]
    if nested:  # what is left when the units' part is taken away, such as a bias for each head
        outer -= torch.stack([t.diagonal(dim1=2, dim2=3).sum(2) for t in similar]).sum(0)
    return similar, outer


class Midpoint(Curve):
    """The middle of a line, whatever t: the network whose loss Git Re-Basin minimises."""

    def weights(self, t: Tensor) -> Tensor:
        """Of both ends, one half each: [n, 2]."""
        return torch.full((*t.shape, 2), 0.5, dtype=t.dtype, device=t.device)


def through(x: Tensor) -> Tensor:
    """The permutation matrix nearest to x [n, n], with the slope of x itself: straight through."""
    return birkhoff.nearest(x.detach()) + (x - x.detach())


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


def by_loss(
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
    check_same_space(theta_a, theta_b, "by_loss")
    old = start or by_weights(net, theta_a, theta_b, sym, seed=seed)
    task = Task("matching", images, images, images, ())
    curve = Midpoint((theta_a, sym.permute(theta_b, old)))
    lr = RATES[action] if lr is None else lr
    recipe = Recipe(epochs, batch_size, lr, weight_decay=0.0, schedule="linear", augment=False)
    settings = pam.Settings(p_epochs=epochs)
    step = Descent(net, curve, theta_b, recipe, task.device, sym, old, settings, action=action)
    run(step, curve, task, seed, None)
    found = {n: m.detach() for n, m in step.matrices.items()}
    if action == "sinkhorn":
        found = {n: birkhoff.project(soft(m)) for n, m in found.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = samples if action == "sinkhorn" else 0
    probe = images.first(1000)

    def score(perm: Perm) -> float:
        middle = Midpoint((theta_a, sym.permute(theta_b, perm)))
        return pam.objective(net, middle, probe, nodes=1)

    return pam.choose(pam.candidates(found, old, drawn, generator), score)[1]


Method = Callable[[nn.Module, Theta, Theta, Split, Symmetry, int], Perm]


def _by_action(
    action: str, net: nn.Module, a: Theta, b: Theta, images: Split, sym: Symmetry, seed: int
) -> Perm:
    return by_loss(net, a, b, images, sym, action=action, seed=seed)


METHODS: dict[str, Method] = {
    "weights": lambda net, a, b, _, sym, seed: by_weights(net, a, b, sym, seed=seed),
    **{action: partial(_by_action, action) for action in ACTIONS},
    "random": lambda net, a, b, _, sym, seed: sym.random(torch.Generator().manual_seed(seed)),
    "identity": lambda net, a, b, _, sym, seed: sym.identity(),
}
"""All but alignment, by the name that `align.match` knows: from (net, A, B, images, sym, seed)."""
