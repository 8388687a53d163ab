"""One training loop for single networks and for curves (chapters 1 and 2).

A network is a curve of degree 0. A step draws t, sets θ = r(t) = Σᵢ wᵢ(t) pᵢ, takes the gradient g
of the loss (with its L2 penalty) at θ, and gives control point pᵢ the gradient wᵢ(t) g. All
parameters live in one flat buffer, of which the network's tensors are views, so that a curve step
costs what a plain step costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from mcnotes import evaluate
from mcnotes.curves import Curve, Theta, views
from mcnotes.data import Task
from mcnotes.store import Checkpoint

Perturb = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class TrainingError(RuntimeError):
    """Training cannot start or go on; the text says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the paper's for CIFAR; `schedule` is a name in `SCHEDULES`.

    weight_decay: λ of the penalty ½λ‖r(t)‖², on all parameters of the point that is evaluated.
    precision: "float32", or "bfloat16" (autocast of the forward pass). compile: torch.compile.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "paper"
    augment: bool = True
    precision: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Recipe: schedule {self.schedule!r}, expected one of {[*SCHEDULES]}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"Recipe: precision {self.precision!r}, expected float32 or bfloat16")
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Recipe: {name}={getattr(self, name)}, expected more than 0")

    def config(self) -> dict[str, Any]:
        """JSON values that describe the recipe (not `compile`: it changes only rounding)."""
        return {name: value for name, value in asdict(self).items() if name != "compile"}


def _linear(epoch: float, epochs: int) -> float:
    warm = min(1.0, epochs / 5)  # one epoch, or a fifth of a very short run
    return min(1.0, (epoch + 0.02) / warm) * max(0.0, 1 - epoch / epochs)


def _robust(epoch: float, epochs: int) -> float:
    return float(min(1.0, max(0.01, 1 - 0.99 * (epoch / epochs - 0.5) / 0.4)))


SCHEDULES: dict[str, Callable[[float, int], float]] = {
    "paper": lambda epoch, epochs: 0.5 ** (epoch // 20) * 0.9996 ** int(epoch),
    "linear": _linear,  # one epoch up, then linearly to 0: for short runs
    "robust": _robust,  # constant to half-way, linear to 1 % at 90 % (paper, adversarial training)
}
"""Learning-rate factor by (epoch, a float; epochs)."""


class Fit(NamedTuple):
    """A trained curve and the mean training loss of each epoch (nats, penalty left out)."""

    curve: Curve
    losses: list[float]

    @property
    def theta(self) -> Theta:
        """The first control point: the trained network, when a single network was trained."""
        return self.curve.points[0]


def initialise(net: nn.Module, seed: int) -> Theta:
    """A fresh state for `net` from `seed`: every module's own `reset_parameters`, inner ones first.

    Raises TrainingError naming the parameters that no module knows how to draw; pass `init` then.
    """
    fresh = copy.deepcopy(net).cpu()
    for p in fresh.parameters():
        p.data.fill_(torch.nan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in reversed(list(fresh.modules())):  # a parent may overrule its children
            for name in ("reset_parameters", "_reset_parameters"):
                if hasattr(module, name):
                    getattr(module, name)()
    if odd := [n for n, p in fresh.named_parameters() if p.isnan().any()]:
        raise TrainingError(
            f"initialise: no module draws {odd[0]!r} ({len(odd)} in all); build the network anew "
            "under torch.manual_seed and pass init=net.state_dict()"
        )
    return {n: x.detach() for n, x in fresh.state_dict().items()}


def fit(
    net: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    init: Theta | None = None,
    perturb: Perturb | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Train `net` on `task.train` from `init` (default: `initialise(net, seed)`).

    Returns the network as `Fit.theta`, BatchNorm statistics recomputed on the training images.
    perturb(model, images, labels) -> images is applied to every batch (adversarial training).
    With a `checkpoint` a stopped run goes on from its last epoch and ends with the same weights.
    """
    curve = Curve((init or initialise(net, seed),))
    fitted = _run(net, curve, slice(0, 1), task, recipe, seed, perturb, checkpoint)
    theta = evaluate.batchnorm(net, fitted.theta, task.train)
    return fitted._replace(curve=fitted.curve.with_points([theta]))


def fit_curve(
    net: nn.Module,
    curve: Curve,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    perturb: Perturb | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Train the inner control points of `curve`: minimise E_{t~U[0,1]} L(r(t)) (paper, eq. 2).

    The end points stay as they are. Arguments as in `fit`. BatchNorm statistics of inner points are
    those of the mixture: recompute them wherever the curve is evaluated (`evaluate.along`).
    """
    if curve.degree < 2:
        raise TrainingError(f"fit_curve: a curve of degree {curve.degree} has no inner point to "
                            "train; use curves.bezier(a, b) or curves.chain(a, b)")  # fmt: skip
    return _run(net, curve, slice(1, -1), task, recipe, seed, perturb, checkpoint)


def _run(
    net: nn.Module,
    curve: Curve,
    free: slice,
    task: Task,
    recipe: Recipe,
    seed: int,
    perturb: Perturb | None,
    checkpoint: Checkpoint | None,
) -> Fit:
    step = Step(net, curve, free, recipe, task.device, perturb)
    start, losses = _resume(checkpoint, step)
    bar = tqdm(range(start, recipe.epochs), initial=start, total=recipe.epochs, desc="epoch",
               leave=False)  # fmt: skip
    for epoch in bar:
        devices = [task.device] if task.device.type == "cuda" else []
        with evaluate.mode(net, training=True), torch.random.fork_rng(devices):
            torch.manual_seed(seed * 1_000_003 + epoch)  # dropout
            losses.append(_epoch(step, curve, task, recipe, seed, epoch))
        if not losses[-1] < float("inf"):
            raise TrainingError(f"train: the loss is {losses[-1]} in epoch {epoch + 1}; lower lr "
                                f"(now {recipe.lr}) or look for broken inputs")  # fmt: skip
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if checkpoint and epoch + 1 < recipe.epochs:
            done = {"losses": torch.tensor(losses, dtype=torch.float64)}
            checkpoint.save(step.state() | done)
    return Fit(curve.with_points(step.points(curve)), losses)


def _epoch(step: Step, curve: Curve, task: Task, recipe: Recipe, seed: int, epoch: int) -> float:
    """One pass over the training images; everything random in it comes from (seed, epoch)."""
    noise = torch.Generator(task.device).manual_seed(seed * 1_000_003 + epoch)
    batches = -(-len(task.train) // recipe.batch_size)
    ts = torch.rand(batches, generator=noise, device=task.device, dtype=torch.float64)
    weights = curve.weights(ts).float()
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    augment = task.augment if recipe.augment else None
    data = task.train.batches(recipe.batch_size, generator=noise, augment=augment)
    for i, (x, y) in enumerate(data):
        lr = recipe.lr * SCHEDULES[recipe.schedule](epoch + i / batches, recipe.epochs)
        total += step(x, y, weights[i], lr) * len(y)
    return float(total) / len(task.train)


class Step:
    """One optimisation step on the free control points of a curve; a call returns the loss.

    Holds the control points as the rows of one matrix [k, n]; θ [n] is one flat buffer, and the
    leaves that the network sees are views of it.
    """

    def __init__(
        self,
        net: nn.Module,
        curve: Curve,
        free: slice,
        recipe: Recipe,
        device: torch.device,
        perturb: Perturb | None = None,
    ) -> None:
        self.net, self.recipe, self.device, self.perturb = net, recipe, device, perturb
        self.low_precision = recipe.precision == "bfloat16"
        self.names = [name for name, _ in net.named_parameters()]
        first = {id(p): name for name, p in net.named_parameters()}
        everything = net.named_parameters(remove_duplicate=False)
        self.home = {name: first[id(p)] for name, p in everything}  # a tied weight has two names
        self.shapes = [curve.points[0][name].shape for name in self.names]
        self.rows = torch.stack([self._flat(p) for p in curve.points])  # [k, n]
        self.free = free
        self.phi = self.rows[free].requires_grad_()  # [free points, n], a view of the rows
        self.optimiser = torch.optim.SGD(
            [self.phi], recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0
        )
        single = curve.degree == 0
        self.theta = self.rows[0] if single else torch.empty_like(self.rows[0])  # [n]
        self.leaves = [v.detach().requires_grad_() for v in views(self.theta, self.shapes)]
        middle = curve(0.5)
        self.buffers = {n: middle[n].to(device).clone() for n, _ in net.named_buffers()}
        self.state_dict = dict(zip(self.names, self.leaves, strict=True)) | self.buffers
        call: Callable[..., Tensor] = partial(functional_call, net)
        self.forward = torch.compile(call) if recipe.compile else call

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor, lr: float) -> Tensor:
        """x [B, C, H, W], y [B], weights w(t) [k] on the device; returns the loss, detached."""
        with torch.no_grad():
            if len(self.rows) > 1:
                torch.mv(self.rows.T, weights, out=self.theta)
        if self.perturb:
            with evaluate.mode(self.net, training=False):
                frozen = {n: v.detach() for n, v in self.state_dict.items()}
                x = self.perturb(lambda u: self.forward(frozen, (u,)), x, y)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            loss = cross_entropy(self.forward(self.state_dict, (x,)).float(), y)
        slopes = torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            g = torch.cat([s.flatten() for s in slopes]).add_(
                self.theta, alpha=self.recipe.weight_decay
            )
            self.phi.grad = torch.outer(weights[self.free], g) if len(self.rows) > 1 else g[None]
            self.optimiser.param_groups[0]["lr"] = lr
            self.optimiser.step()
        return loss.detach()

    def points(self, curve: Curve) -> list[Theta]:
        """The control points as they stand; the fixed ones are the very values that came in."""
        free = range(len(self.rows))[self.free]
        return [
            self._unflat(self.rows[i], theta) if i in free else theta
            for i, theta in enumerate(curve.points)
        ]

    def state(self) -> dict[str, Tensor]:
        """All that a later process needs to go on."""
        buffer = self.optimiser.state[self.phi].get("momentum_buffer")
        momentum = torch.zeros_like(self.phi) if buffer is None else buffer
        buffers = {f"buffer.{n}": x for n, x in self.buffers.items()}
        return {"phi": self.phi.detach(), "momentum": momentum, **buffers}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave."""
        self.phi.data.copy_(state["phi"])
        self.optimiser.state[self.phi]["momentum_buffer"] = state["momentum"].to(self.device)
        for name, x in self.buffers.items():
            x.copy_(state[f"buffer.{name}"])

    def _flat(self, theta: Theta) -> Tensor:
        return torch.cat([theta[n].detach().to(self.device).flatten() for n in self.names])

    def _unflat(self, row: Tensor, like: Theta) -> Theta:
        new = dict(zip(self.names, views(row.detach(), self.shapes), strict=True))
        return {n: new[self.home[n]].clone() if n in self.home else x for n, x in like.items()}


def _resume(checkpoint: Checkpoint | None, step: Step) -> tuple[int, list[float]]:
    if checkpoint is None or (state := checkpoint.load()) is None:
        return 0, []
    step.restore(state)
    losses = state["losses"].tolist()
    return len(losses), losses
