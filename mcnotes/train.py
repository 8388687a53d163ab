"""One training loop for single networks and for curves (chapters 1 and 2).

A network is a curve of degree 0. A step draws t, sets θ = r(t) = Σᵢ wᵢ(t) pᵢ, takes the gradient g
of the loss (with its L2 penalty) at θ, and gives control point pᵢ the gradient wᵢ(t) g.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from mcnotes import display, evaluate
from mcnotes.attacks import Perturb
from mcnotes.cache import Checkpoint
from mcnotes.calls import (
    Training,
    applied,
    arranged,
    call,
    count,
    duplicate,
    heads,
    seeded,
    sound_gradients,
    stated,
    swapped,
    within,
)
from mcnotes.checks import Rule, a, flag, function, number, one_of, optional, require, whole
from mcnotes.curves import Curve, Theta, check_same_space, views
from mcnotes.data import Split
from mcnotes.data.arrays import failure

Loss = Callable[[Any, Any], Tensor]  # outputs and targets of a batch → their mean loss


class TrainingError(RuntimeError):
    """Training cannot start or continue; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's for CIFAR."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # λ of ½λ‖r(t)‖², over all parameters of the point r(t)
    schedule: str = "paper"  # a name in `SCHEDULES`
    augment: bool = True
    precision: str = "float32"  # or "bfloat16": autocast of the forward pass
    compile: bool = False  # torch.compile

    def __post_init__(self) -> None:
        require("Recipe", vars(self), OPTIONS)

    def config(self) -> dict[str, Any]:
        """JSON values that describe the recipe, without `compile`, which only changes rounding."""
        return {name: value for name, value in asdict(self).items() if name != "compile"}


SCHEDULES: dict[str, Callable[[float, int], float]] = {
    "paper": lambda epoch, epochs: 0.5 ** (epoch // 20) * 0.9996 ** int(epoch),
    # For short runs: warm-up for one epoch (or a fifth of the run, if less), then linearly to 0.
    "linear": lambda epoch, epochs: (
        min(1.0, (epoch + 0.02) / min(1.0, epochs / 5)) * max(0.0, 1 - epoch / epochs)
    ),
    # The paper's for adversarial training: constant until half-way, then linear to 1 % at 90 %.
    "robust": lambda epoch, epochs: min(1.0, max(0.01, 1 - 0.99 * (epoch / epochs - 0.5) / 0.4)),
}
"""The factor of the learning rate, from the epoch (a float) and the number of epochs."""
PRECISIONS = ("float32", "bfloat16")


def native_precision(device: torch.device) -> str:
    """The precision to use on `device`: "bfloat16" where the hardware computes it natively.

    Returns "float32" where it does not, and where this cannot be determined.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"  # users can limit it
        native = allowed and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    *(aten.mm.default, aten.bmm.default),
    *(aten.addmm.default, aten.addbmm.default, aten.baddbmm.default),
    *(aten.convolution.default, aten.convolution_backward.default),
    *(aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default),
    *(ATTENTION, aten._scaled_dot_product_flash_attention_for_cpu_backward.default),
}
"""The operators for which `InFloat32` has a faster way."""


class InFloat32(TorchDispatchMode):
    """Computes products of bfloat16 in float32, and rounds them to bfloat16.

    For CPUs without instructions for bfloat16, on which PyTorch computes most products in plain
    loops. To be entered around the forward pass, under `torch.autocast`, and around the gradients.
    The product of two bfloat16 is exact in float32, and instructions for bfloat16 add in float32,
    too: theirs differ in the order of the additions, and in that they may take the smallest numbers
    for 0. `benchmarks/bfloat16.py` measures the speed.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtypes = {x.dtype for x in args if isinstance(x, Tensor)}
        if func not in PRODUCTS or torch.bfloat16 not in dtypes:
            return func(*args, **kwargs)
        args, kwargs = _converted(torch.bfloat16, torch.float32, (args, kwargs))
        out = func(*args, **kwargs)
        if func is ATTENTION:  # its second result, of the softmax, is in float32 natively, too
            return out[0].bfloat16(), out[1]
        return _converted(torch.float32, torch.bfloat16, out)


def _converted(old: torch.dtype, new: torch.dtype, values: Any) -> Any:
    """The values, nested as they are, with the tensors of type `old` as `new`."""
    return tree_map_only(Tensor, lambda x: x.to(new) if x.dtype == old else x, values)


EPOCHS = 1_000_000  # at most: `_epoch` draws by seed · 1,000,003 + epoch, all of them different
OPTIONS: dict[str, Rule] = {
    "epochs": whole(1, EPOCHS),
    "batch_size": whole(1),
    "lr": number(0, above=True),
    "momentum": number(0, 1),
    "weight_decay": number(0),
    "schedule": one_of(SCHEDULES),
    "augment": flag,
    "precision": one_of(PRECISIONS),
    "compile": flag,
}
"""The allowed values of the fields of a recipe."""


def trainable(value: object) -> str:
    """The rule of `task`: anything that follows the protocol `Training`."""
    fits = not evaluate.batched(getattr(value, "train", None)) and hasattr(value, "augment")
    return "" if fits else f"got a {type(value).__name__}, expected a data.Task or a data.Loader"


ARGUMENTS: dict[str, Rule] = {
    "net": a(nn.Module, "an nn.Module"),
    "curve": a(Curve, "a Curve"),
    "task": trainable,
    "recipe": a(Recipe, "a Recipe"),
    "seed": whole(-(2**63), 2**64 - 1),
    "pull": number(0),
    "perturb": optional(function),
    "checkpoint": optional(a(Checkpoint, "a cache.Checkpoint")),
    "loss": optional(function),
}
"""What the arguments of the functions below may be."""


class Fit(NamedTuple):
    """A trained curve, and the mean training loss of each epoch (in nats, without the penalty)."""

    curve: Curve
    losses: list[float]

    def __repr__(self) -> str:
        course = f", loss {self.losses[0]:.3g} → {self.losses[-1]:.3g}" if self.losses else ""
        return f"Fit({len(self.losses)} epochs{course}; {self.curve!r})"

    def _repr_html_(self) -> str:
        epochs = [float(k) for k in range(1, len(self.losses) + 1)]
        drawn = display.line(epochs, self.losses, "training loss of each epoch")
        return display.described(self, drawn if epochs else "")

    @property
    def theta(self) -> Theta:
        """The first control point, which is the trained network if a single one was trained."""
        return self.curve.points[0]


def initialise(net: nn.Module, seed: int) -> Theta:
    """A fresh state for `net`, drawn from `seed` by the `reset_parameters` of its modules.

    Inner modules come first. Raises TrainingError, naming the parameter, if no module draws it;
    pass `init` to `fit` then.
    """
    require("initialise", {"net": net, "seed": seed}, ARGUMENTS)
    fresh = duplicate(net).cpu()
    for name, p in fresh.named_parameters():
        if nn.parameter.is_lazy(p):
            raise TrainingError(f"initialise: {name!r} has no shape yet. Fix: run the network once")
        p.data.fill_(torch.nan)
    with seeded(seed, torch.device("cpu")):
        for module in reversed(list(fresh.modules())):  # a parent may overwrite its children
            for name in ("reset_parameters", "_reset_parameters"):
                getattr(module, name, lambda: None)()
    if odd := [n for n, p in fresh.named_parameters() if p.isnan().any()]:
        raise TrainingError(
            f"initialise: no module draws {odd[0]!r} ({len(odd)} in all). Fix: seed torch, build "
            "the network and pass init=net.state_dict()"
        )
    state = {n: x for n, x in fresh.state_dict().items() if isinstance(x, Tensor)}
    state |= {
        n: x for n, x in fresh.named_buffers() if n not in state
    }  # those that are not persistent
    return {n: x.detach() for n, x in state.items()}


def fit(
    net: nn.Module,
    task: Training,
    recipe: Recipe,
    *,
    seed: int,
    init: Theta | None = None,
    perturb: Perturb | None = None,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Train `net` on `task.train` from `init` (default: `initialise(net, seed)`).

    `Fit.theta` is the trained network. Its buffers are those that training left, except that
    BatchNorm's statistics are recomputed on the training images (`evaluate.batchnorm`), which are
    augmented if they were in training. perturb(model, images, labels) -> images is applied to every
    batch (adversarial training). With a `checkpoint`, an interrupted run resumes after its last
    epoch and ends with the same weights.
    """
    given = {"net": net, "task": task, "recipe": recipe, "seed": seed}
    require("fit", given | {"perturb": perturb, "checkpoint": checkpoint}, ARGUMENTS)
    start = initialise(net, seed) if init is None else init
    start = {name: x.to(task.device) for name, x in stated("fit: init", net, start).items()}
    curve = Curve((start,))
    step = Step(net, curve, slice(0, 1), recipe, task.device, perturb)
    fitted = run(step, curve, task, seed, checkpoint)
    theta = evaluate.batchnorm(net, fitted.theta, as_shown(task.train, task, recipe))
    return fitted._replace(curve=fitted.curve.with_points([theta]))


def fit_curve(
    net: nn.Module,
    curve: Curve,
    task: Training,
    recipe: Recipe,
    *,
    seed: int,
    pull: float = 0.0,
    perturb: Perturb | None = None,
    checkpoint: Checkpoint | None = None,
    loss: Loss | None = None,
) -> Fit:
    """Train the inner control points of `curve`: minimise E_{t~U[0,1]} L(r(t)) (paper, eq. 2).

    The end points do not change. The arguments are those of `fit`, and two more: `pull` adds
    ½ pull ‖φ − φ_old‖² to the loss, where φ_old are the inner points of `curve` (`matching.pam`);
    `loss` is `cost` by default. BatchNorm's statistics at inner points are mixtures: recompute them
    wherever the curve is evaluated (`evaluate.profile`).
    """
    given = {"net": net, "curve": curve, "task": task, "recipe": recipe, "seed": seed}
    given |= {"pull": pull, "perturb": perturb, "checkpoint": checkpoint, "loss": loss}
    require("fit_curve", given, ARGUMENTS)
    if curve.degree < 2:
        raise TrainingError(
            f"fit_curve: a curve of degree {curve.degree} has no inner point to train. Fix: use "
            "curves.bezier(a, b) or curves.chain(a, b)"
        )
    step = Step(net, curve, slice(1, -1), recipe, task.device, perturb, pull, loss or cost)
    return run(step, curve, task, seed, checkpoint)


def as_shown(images: Any, task: Training, recipe: Recipe) -> Any:
    """`images` as training by `recipe` shows them: augmented as those of `task` if it augments.

    BatchNorm's statistics and the training loss of what was trained so are computed on such images.
    Batches of a `data.Loader` are returned as they are.
    """
    augments = recipe.augment and isinstance(images, Split)
    return images.augmented(task.augment) if augments else images


def run(
    step: "Step", curve: Curve, task: Training, seed: int, checkpoint: Checkpoint | None
) -> Fit:
    """Run all epochs of `step` on `curve`, or those that `checkpoint` has not seen.

    The loop of `fit`, `fit_curve` and PAM.

    Raises TrainingError as soon as an epoch's mean loss is not finite.
    """
    epochs = step.recipe.epochs
    losses = _resume(step, checkpoint) if checkpoint else []
    bar = tqdm(range(len(losses), epochs), "epoch", epochs, leave=False, initial=len(losses))
    for epoch in bar:
        losses.append(_epoch(step, curve, task, seed, epoch))
        if not losses[-1] < float("inf"):
            raise TrainingError(
                f"train: the loss is {losses[-1]} in epoch {epoch + 1}. Fix: lower lr (now "
                f"{step.recipe.lr}) or look for broken inputs"
            )
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if checkpoint and epoch + 1 < epochs:
            checkpoint.save(step.state() | {"losses": torch.tensor(losses, dtype=torch.float64)})
    return Fit(curve.with_points(step.points(curve)), losses)


def _resume(step: "Step", checkpoint: Checkpoint) -> list[float]:
    """Restore the stored state, if it fits, and return the losses of the epochs so far."""
    state, epochs = checkpoint.load(), step.recipe.epochs
    if state is None:
        return []
    done = state.get("losses", torch.empty(0)).numel()
    losses = {"losses": torch.empty(done, dtype=torch.float64)}
    try:
        check_same_space(step.state() | losses, state, "checkpoint")
        if not 1 <= done <= epochs:
            raise ValueError(f"checkpoint: it holds {done} epochs, expected 1 to {epochs}")
    except ValueError as error:
        checkpoint.set_aside(error)
        return []
    step.restore(state)
    return [float(loss) for loss in state["losses"]]


def _epoch(step: "Step", curve: Curve, task: Training, seed: int, epoch: int) -> float:
    """One pass over the training images; all its randomness is determined by (seed, epoch)."""
    recipe, device, seed = step.recipe, task.device, (seed * 1_000_003 + epoch) % 2**64
    noise = torch.Generator(device).manual_seed(seed)
    batches, samples = task.train.count(recipe.batch_size), 0
    ts = torch.rand(batches, generator=noise, device=device, dtype=torch.float64)
    weights = curve.weights(ts).to(step.rows.dtype)
    augment = task.augment if recipe.augment else None
    data = task.train.batches(recipe.batch_size, generator=noise, augment=augment)
    total = torch.zeros((), dtype=torch.float64, device=device)
    # Dropout has a random stream of its own. Attacks share that of the shuffling, because the
    # robust networks of data/zoo were trained in this way.
    drawing = seeded(seed if step.perturb else _apart(seed), device)
    with evaluate.mode(step.net, training=True), drawing:
        for i, (x, y) in enumerate(data):
            if (n := count(x)) == 1 and not _takes_one(step.net, x, device):
                continue
            lr = recipe.lr * SCHEDULES[recipe.schedule](epoch + i / batches, recipe.epochs)
            try:
                total += step(x, y, weights[i], lr) * n
            except IndexError as error:
                cause = f"train: batch {i + 1} cannot be used ({failure(error)})"
                fix = "look for targets that are no class of the network"
                raise TrainingError(f"{cause}. Fix: {fix}") from error
            samples += n
    if not samples:
        cause = "train: the network cannot train on batches of one image (BatchNorm1d never can)"
        raise TrainingError(f"{cause}. Fix: use a batch_size of at least 2")
    return float(total) / samples


def _takes_one(net: nn.Module, x: Any, device: torch.device) -> bool:
    """Can the network train on this single sample? BatchNorm1d cannot, for lack of a variance.

    A last batch of one sample is then skipped. It is another sample in every epoch.
    """
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        with torch.no_grad(), seeded(0, device):
            call(net, buffers, x)
    except Exception:  # of the user's network
        return False
    return True


def _apart(seed: int) -> int:
    """A seed whose random stream is independent of that of `seed`."""
    mixed = np.random.SeedSequence(seed % 2**64, spawn_key=(1,))
    return int(mixed.generate_state(1, np.uint64)[0])


def cost(outputs: Any, y: Tensor) -> Tensor:
    """Mean cross-entropy; auxiliary heads (GoogLeNet) weigh 0.3 each (Szegedy et al. 2015)."""
    first, *others = (evaluate.classes_first(z, y).float() for z in heads(outputs))
    extra = [0.3 * cross_entropy(z, y) for z in others]
    return torch.stack([cross_entropy(first, y), *extra]).sum()


def _frozen(net: nn.Module, device: torch.device) -> Tensor | None:
    """Which parameters have requires_grad=False: bool [n], or None if there are none."""
    if all(p.requires_grad for p in net.parameters()):
        return None
    frozen = [torch.full((p.numel(),), not p.requires_grad) for p in net.parameters()]
    return torch.cat(frozen).to(device)


class Step:
    """One optimisation step on the free control points of a curve; a call returns the loss.

    The control points are the rows of one matrix [k, n]; θ [n] is one flat buffer, of which the
    network's tensors are views, so that a curve step costs what a plain step costs.
    """

    def __init__(
        self,
        net: nn.Module,
        curve: Curve,
        free: slice,
        recipe: Recipe,
        device: torch.device,
        perturb: Perturb | None = None,
        pull: float = 0.0,
        loss: Loss = cost,
    ) -> None:
        self.net, self.free, self.recipe = net, free, recipe
        self.perturb, self.pull, self.loss = perturb, pull, loss
        self.single = curve.degree == 0
        states = [stated("train", net, p) for p in curve.points]
        evaluate.check_mixable("train", net, states)
        parameters = dict(net.named_parameters())
        self.shapes = [p.shape for p in parameters.values()]
        flat = ([p[n].detach().to(device).flatten() for n in parameters] for p in states)
        self.rows = torch.stack([torch.cat(parts) for parts in flat])  # [k, n]
        self.phi = self.rows[free]  # [free points, n], a view of the rows
        self.anchor, self.velocity = self.phi.clone(), torch.zeros_like(self.phi)
        self.theta = self.rows[0] if self.single else torch.empty_like(self.rows[0])  # [n]
        self.leaves = [v.detach().requires_grad_() for v in views(self.theta, self.shapes)]
        middle = stated("train", net, curve(0.5))
        if not self.single:
            middle = evaluate.with_singular_vectors(net, middle)
        self.buffers = {n: middle[n].to(device).clone() for n, _ in net.named_buffers()}
        self.state_dict = dict(zip(parameters, self.leaves, strict=True)) | self.buffers
        self.compiled = torch.compile(partial(swapped, net)) if recipe.compile else None
        self.frozen = _frozen(net, device)
        self.native = native_precision(device) == "bfloat16"

    def __call__(self, x: Any, y: Any, weights: Tensor, lr: float) -> Tensor:
        """Step on one batch with the weights w(t) [k], all on the device; returns the loss."""
        loss, g = self.gradient(x, y, weights)
        if self.frozen is not None:
            g.masked_fill_(self.frozen, 0)
        slope = g[None] if self.single else torch.outer(weights[self.free], g)
        if self.pull:
            slope.add_(self.phi - self.anchor, alpha=self.pull)
        mu = self.recipe.momentum  # Nesterov's, as in torch.optim.SGD
        self.velocity.mul_(mu).add_(slope)
        self.phi.add_(slope.add_(self.velocity, alpha=mu), alpha=-lr)
        return loss

    def gradient(self, x: Any, y: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at θ = r(t), and the gradient in θ of loss and L2 penalty: [n].

        In all parameters: those with requires_grad=False are not trained, but symmetries move them.
        """
        if not self.single:
            torch.mv(self.rows.T, weights, out=self.theta)
        if self.perturb:
            x = self.attacked(x, y, self.perturb)
        with sound_gradients(self.net):
            if self.compiled:  # it recomputes for the gradient without the network
                loss, slopes = self.slopes(partial(self.compiled, self.state_dict), x, y)
            else:
                work = partial(self.slopes, partial(applied, self.net), x, y)
                loss, slopes = within(self.net, self.state_dict, work)
        g = torch.cat([s.flatten() for s in slopes])
        g.add_(self.theta, alpha=self.recipe.weight_decay)
        return loss.detach(), g

    def slopes(
        self, forward: Callable[[Any], Any], x: Any, y: Any
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss and its gradients in the leaves. forward: inputs → outputs at θ."""
        x, device = arranged(self.net, x), self.theta.device
        low = self.recipe.precision == "bfloat16"
        in_float32 = low and device.type == "cpu" and not self.native
        mode = InFloat32() if in_float32 else nullcontext()  # type: ignore[no-untyped-call]
        with mode:
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = self.loss(forward(x), y)
            slopes = torch.autograd.grad(
                loss, self.leaves, allow_unused=True, materialize_grads=True
            )
        return loss, slopes

    def attacked(self, x: Tensor, y: Tensor, perturb: Perturb) -> Tensor:
        """The batch as attacked by `perturb`, in evaluation mode; no buffer changes.

        On a curve, however, BatchNorm uses the statistics of the batch: the running statistics mix
        all t, and an attack on a network with wrong statistics misleads no other (chapter 8).
        """
        frozen = {n: v.detach() for n, v in self.state_dict.items()}
        with evaluate.mode(self.net, training=False):
            if not self.single:
                frozen |= {n: x.clone() for n, x in self.buffers.items()}
                for module in self.net.modules():
                    module.training = isinstance(module, _BatchNorm)
            if self.compiled:
                return perturb(partial(self.compiled, frozen), x.clone(), y)
            forward = lambda u: applied(self.net, arranged(self.net, u))  # noqa: E731
            return within(self.net, frozen, partial(perturb, forward, x.clone(), y))

    def points(self, curve: Curve) -> list[Theta]:
        """The current control points; the fixed ones are the same objects as in `curve`.

        A single network gets the buffers that training left. On a curve these would mix all t.
        """
        points = list(curve.points)
        names = list(self.net.named_parameters(remove_duplicate=False))  # tied weights have two
        held = list(self.net.named_buffers(remove_duplicate=False)) if self.single else []
        kept = dict(zip(self.net.buffers(), self.buffers.values(), strict=True))
        for i in range(len(points))[self.free]:
            new = dict(zip(self.net.parameters(), views(self.rows[i], self.shapes), strict=True))
            moved = {name: new[p].clone() for name, p in names}
            moved |= {name: kept[b].clone() for name, b in held}
            points[i] = points[i] | {n: x.to(points[i][n].device) for n, x in moved.items()}
        return points

    def state(self) -> dict[str, Tensor]:
        """Everything that a later process needs in order to resume. The tensors are not copied."""
        buffers = {f"buffer.{n}": x for n, x in self.buffers.items()}
        return {"phi": self.phi, "momentum": self.velocity, **buffers}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of an earlier `state()`."""
        for name, x in self.state().items():
            x.copy_(state[name])
