"""Loss and accuracy of a network, along a curve and over a plane; BatchNorm; curvature (chapter 1).

All functions take the network's state as an argument and leave `net` unchanged. What they measure
is a mapping from names to quantities (`Quantity`): `CLASSIFICATION` holds those of the book, and
`averaged` makes one from any function of outputs and targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from tqdm.auto import tqdm

from mcnotes import display
from mcnotes.attacks import Perturb
from mcnotes.calls import (
    Batch,
    Batches,
    InputError,
    applied,
    arranged,
    call,
    count,
    logits,
    seeded,
    sound_gradients,
    stated,
    within,
)
from mcnotes.checks import Rule, a, function, got, mapping_of, number, optional, require, whole
from mcnotes.curves import Curve, Theta, combine, views
from mcnotes.data import Split

if TYPE_CHECKING:
    from pandas import DataFrame

Array = NDArray[np.float64]
Quantity = Callable[[Any, Any, int], tuple[Tensor, Tensor | int]]
"""(outputs, targets, samples) of a batch → the sum over what is counted, and the count."""
IGNORED = -100  # a target that `cross_entropy` leaves out


def batched(value: object) -> str:
    """The rule of data: anything that provides batches of inputs and targets."""
    if callable(getattr(value, "batches", None)) and hasattr(value, "device"):
        return ""
    return f"got a {type(value).__name__}, expected a data.Split or a data.Loader"


ARGUMENTS: dict[str, Rule] = {
    "net": a(nn.Module, "an nn.Module"),
    "data": batched,
    "split": batched,
    "statistics": optional(batched),
    "curve": a(Curve, "a Curve"),
    "wanted": mapping_of(function, least=1),
    "batch_size": whole(1),
    # Both ends; more would take days, as would a plane of more than the square of its resolution.
    "points": whole(2, 1_000_000),
    "resolution": whole(2, 1_000),
    "margin": number(0),
    "tolerance": number(0, above=True),
    "perturb": optional(function),
    "perturb_statistics": optional(function),
}
"""What the arguments of the functions below may be."""


class Score(NamedTuple):
    """Mean cross-entropy (nats) and accuracy (a share of 1) on a data set."""

    loss: float
    accuracy: float


def score(
    net: nn.Module,
    theta: Theta,
    split: Batches,
    *,
    batch_size: int = 500,
    perturb: Perturb | None = None,
) -> Score:
    """Mean cross-entropy (nats) and accuracy (a share of 1) of `theta` on `split`.

    perturb: an attack on every image; loss and accuracy are then the robust ones (chapter 8).
    Raises ValueError as `means`.
    """
    found = means(net, theta, split, CLASSIFICATION, batch_size=batch_size, perturb=perturb)
    return Score(**found)


def means(
    net: nn.Module,
    theta: Theta,
    data: Batches,
    wanted: Mapping[str, Quantity],
    *,
    batch_size: int = 500,
    perturb: Perturb | None = None,
) -> dict[str, float]:
    """The mean of each quantity over one pass in evaluation mode.

    wanted: the quantities by name, such as `CLASSIFICATION`. batch_size: for a `Split`; a `Loader`
    has its own. perturb: an attack on the inputs, as in `score`. Raises ValueError for a state that
    does not fit the network, and if there is no batch, or no target that counts.
    """
    given = {"data": data, "wanted": wanted, "batch_size": batch_size, "perturb": perturb}
    require("evaluate", given, ARGUMENTS)
    theta = stated("evaluate", net, theta, data.device)
    total: Tensor | None = None
    with mode(net, training=False), torch.no_grad():
        for x, y in attacked(net, theta, data.batches(batch_size), perturb):
            found = sums(net, theta, (x, y), wanted, data.device)
            total = found if total is None else total + found
    if total is None:
        raise ValueError("evaluate: got no batch, expected at least one")
    check_counted(dict(zip(wanted, total[:, 1].tolist(), strict=True)))
    return dict(zip(wanted, (total[:, 0] / total[:, 1]).tolist(), strict=True))


def sums(
    net: nn.Module,
    theta: Mapping[str, Tensor],
    batch: Batch,
    wanted: Mapping[str, Quantity],
    device: torch.device,
) -> Tensor:
    """The sum and the count of each quantity over a batch: float64 [quantities, 2]."""
    inputs, targets = batch
    outputs, n = call(net, theta, inputs), count(inputs)
    pairs = [quantity(outputs, targets, n) for quantity in wanted.values()]
    return torch.stack([torch.stack([_exact(v, device) for v in pair]) for pair in pairs])


def check_counted(counts: Mapping[str, float]) -> None:
    """Raise ValueError if no target counts for one of the quantities."""
    for name, n in counts.items():
        if n == 0:
            raise ValueError(
                f"evaluate: found nothing that counts for {name!r}, only targets {IGNORED}, "
                "expected at least one other"
            )


def _exact(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device)


def entropy(outputs: Any, y: Tensor, _: int = 0) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits in nats, over all targets except `IGNORED` ones."""
    z = classes_first(logits(outputs), y)
    return total_entropy(z, y), (y != IGNORED).sum()


def total_entropy(z: Tensor, y: Tensor) -> Tensor:
    """The summed cross-entropy of logits [N, C, …]; ValueError for a target that is no class."""
    try:
        return cross_entropy(z, y, reduction="sum")
    except IndexError as error:
        cause = f"cross-entropy: {str(error).rstrip('.')} for a network of {z.shape[1]} classes"
        raise ValueError(f"{cause}, expected 0 to {z.shape[1] - 1}, or {IGNORED}") from error


def hits(outputs: Any, y: Tensor, _: int = 0) -> tuple[Tensor, Tensor]:
    """How often the largest logit is that of the target, over the same targets as `entropy`."""
    z = classes_first(logits(outputs), y)
    return (z.argmax(1) == y).sum(), (y != IGNORED).sum()


def averaged(value: Callable[[Any, Any], Any]) -> Quantity:
    """A quantity from a function (outputs, targets) → mean over a batch, a number or a tensor."""
    return lambda outputs, y, n: (value(outputs, y) * n, n)


CLASSIFICATION: dict[str, Quantity] = {"loss": entropy, "accuracy": hits}
"""What the book measures."""


def classes_first(z: Tensor, y: Tensor) -> Tensor:
    """Logits with their classes on axis 1, as `cross_entropy` expects; y: class numbers.

    z: [N, C], [N, C, …] or [N, …, C], for y: [N] or [N, …]. Raises ValueError for other shapes, and
    for shapes that are ambiguous.
    """
    if z.dim() == 2 and y.shape == z.shape[:1] and not y.is_floating_point():
        return z
    ways = [z] if y.shape == z.shape[:1] + z.shape[2:] else []
    ways += [z.movedim(-1, 1)] if z.dim() > 2 and y.shape == z.shape[:-1] else []
    if len(ways) != 1 or z.dim() < 2 or y.is_floating_point():
        raise ValueError(
            f"cross-entropy of logits {[*z.shape]} and targets {y.dtype} {[*y.shape]} is not "
            "defined, expected class numbers, one for each place. Fix: pass a loss (outputs, "
            "targets) of your own"
        )
    return ways[0]


def attacked(
    net: nn.Module, theta: Theta, batches: Iterable[Batch], perturb: Perturb | None
) -> Iterator[Batch]:
    """The batches with their images attacked in evaluation mode, from fixed seeds (chapter 8)."""

    def model(u: Tensor) -> Tensor:
        return logits(applied(net, arranged(net, u)))

    for i, (x, y) in enumerate(batches):
        if perturb:
            with mode(net, training=False), seeded(i, x.device):
                own = x.clone()  # which the attack may write over
                x = within(net, theta, partial(perturb, model, own, y))
        yield x, y


def probabilities(net: nn.Module, theta: Theta, split: Split, *, batch_size: int = 500) -> Tensor:
    """Predicted class probabilities in evaluation mode: [N, classes], float32.

    Raises ValueError for a state that does not fit the network, and for a split without images.
    """
    require("probabilities", {"split": split, "batch_size": batch_size}, ARGUMENTS)
    theta = stated("probabilities", net, theta, split.device)
    if not len(split):
        raise ValueError("probabilities: got no image, expected at least one")
    with mode(net, training=False), torch.no_grad():
        batches = (logits(call(net, theta, x)) for x, _ in split.batches(batch_size))
        return torch.cat([z.float().softmax(1) for z in batches])


def batchnorm(
    net: nn.Module,
    theta: Theta,
    split: Batches,
    *,
    batch_size: int = 500,
    perturb: Perturb | None = None,
) -> Theta:
    """`theta` with BatchNorm's running statistics recomputed on `split`, in one pass.

    They become the averages over equal batches of the batch mean and the (unbiased) variance; a
    last partial batch is left out. The statistics of a mixture of two networks are not the mixture
    of their statistics, so every point of a curve needs this (paper, section 4). The running
    statistics of InstanceNorm are recomputed in the same way, and the singular vectors of
    `spectral_norm` from the weights. A network without any of these is just copied. perturb: an
    attack on the images, made on the network with the statistics of the clean images. Raises
    ValueError for a state that does not fit the network, and if there is no batch.
    """
    given = {"split": split, "batch_size": batch_size, "perturb": perturb}
    require("batchnorm", given, ARGUMENTS)
    theta = batchnorm(net, theta, split, batch_size=batch_size) if perturb else theta
    fresh = with_singular_vectors(net, stated("batchnorm", net, theta, split.device))
    norms = [module for module in net.modules() if _tracks(module)]
    if not norms:
        return fresh
    _forget_counts(net, fresh)
    empty = True
    with mode(net, training=False), torch.no_grad(), _plain_averages(norms):
        batches = split.batches(batch_size, drop_last=split.count(batch_size) > 1)
        for x, _ in attacked(net, theta, batches, perturb):
            empty = False
            for norm in norms:
                norm.training = True  # also of a class whose `train` does not change it
            with understood(x):
                call(net, fresh, x)
    if empty:
        raise ValueError("batchnorm: got no batch, expected at least one")
    return fresh


def _forget_counts(net: nn.Module, theta: Theta) -> None:
    """Set the layers' counters of batches in `theta` to 0, in place."""
    for path, module in net.named_modules(remove_duplicate=False):
        counter = f"{path}.num_batches_tracked".lstrip(".")
        if _tracks(module) and counter in theta:
            theta[counter].zero_()


@contextlib.contextmanager
def _plain_averages(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Let running statistics be plain averages over the batches of one pass.

    In call number k of a layer its momentum is 1 / k; at the end it is again what it was.
    """
    momenta = [norm.momentum for norm in norms]
    calls = dict.fromkeys(norms, 0)

    def average(norm: _NormBase, _: Any) -> None:
        if norm.training:
            calls[norm] += 1
            norm.momentum = 1 / calls[norm]  # with None, PyTorch would wait for the counter

    hooks = [norm.register_forward_pre_hook(average) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextlib.contextmanager
def understood(inputs: Any) -> Iterator[None]:
    """Explain the error that BatchNorm raises for a batch of one, which has no variance."""
    try:
        yield
    except ValueError as error:
        if count(inputs) > 1:
            raise
        raise ValueError(
            f"batchnorm: got a batch of one, which has no variance ({error}). Fix: take at least 2 "
            "images, and a batch_size of at least 2"
        ) from error


def _tracks(module: nn.Module) -> TypeGuard[_NormBase]:
    """Does it keep running statistics that can be recomputed?"""
    return isinstance(module, _NormBase) and module.track_running_stats


def with_singular_vectors(net: nn.Module, theta: Theta) -> Theta:
    """`theta` with the buffers of `spectral_norm` set to the first singular vectors of the weights.

    The vectors of a mixture of weights are not a mixture of vectors, whose signs are arbitrary.
    """

    def write(matrix: Tensor, u: Tensor, v: Tensor) -> None:
        matrix = matrix.double()
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
        u.copy_(left)
        v.copy_(nn.functional.normalize(matrix.T @ left, dim=0))

    def renew() -> None:
        for module in net.modules():
            if isinstance(module, ParametrizationList):
                many = range(0 if module.is_tensor else module.ntensors)
                x = [getattr(module, f"original{i}") for i in many] or [module.original]
                for step in module:
                    if isinstance(step, _SpectralNorm) and x[0].ndim > 1:
                        write(step._reshape_weight_to_matrix(x[0]), step._u, step._v)
                    x = [step(*x)]
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm):
                    weight, u, v = (getattr(module, hook.name + n) for n in ("_orig", "_u", "_v"))
                    write(hook.reshape_weight_to_matrix(weight), u, v)

    if any(map(_spectral, net.modules())):
        with mode(net, training=False), torch.no_grad():
            within(net, theta, renew)
    return theta


def _spectral(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in hooks)


def check_mixable(who: str, net: nn.Module, points: Sequence[Theta]) -> None:
    """Raise InputError for buffers that differ between the networks and cannot be recomputed.

    A mixture of masks is not a mask, and a mixture of unknown running statistics means nothing.
    Buffers that `batchnorm` recomputes may differ, and so may integers.
    """
    known: set[str] = set()
    for path, module in net.named_modules(remove_duplicate=False):
        if _tracks(module) or _spectral(module):
            known |= {f"{path}.{name}".lstrip(".") for name in module._buffers}
    for name, own in net.named_buffers(remove_duplicate=False):
        values = [p[name] for p in points if name in p]
        if not own.is_floating_point() or name in known or not values:
            continue
        if not all(torch.equal(x, values[0]) for x in values):
            kind = type(net.get_submodule(name.rpartition(".")[0])).__name__
            raise InputError(
                f"{who}: the buffer {name!r} (of a {kind}) differs between the networks, and a "
                "mixture of buffers is not understood, except of BatchNorm, InstanceNorm and "
                "spectral_norm. Fix: make it a parameter, or give it one value in all networks"
            )


def barrier(t: Array, loss: Array) -> float:
    """How far the loss rises above the straight line between its ends; t, loss: [points]."""
    return float((loss - ((1 - t) * loss[0] + t * loss[-1])).max())


class Profile(NamedTuple):
    """Loss and accuracy (a share of 1) along a curve. All arrays have the shape [points]."""

    t: Array
    arc: Array  # arc length from r(0), over the parameters
    loss: Array
    accuracy: Array

    def __repr__(self) -> str:
        low, mean = self.min_accuracy, self.mean_accuracy
        words = f"barrier {self.barrier:.3g}, accuracy at least {low:.3g}, on average {mean:.3g}"
        return f"Profile({len(self.t)} points: {words})"

    def _repr_html_(self) -> str:
        drawn = display.line(self.t.tolist(), self.loss.tolist(), "loss along the curve")
        return display.described(self, drawn)

    def frame(self) -> DataFrame:
        """One row for each point: t, arc, loss and accuracy."""
        import pandas  # takes half a second

        return pandas.DataFrame(self._asdict())

    @property
    def barrier(self) -> float:
        """max over t of L(r(t)) − [(1 − t) L(r(0)) + t L(r(1))], in nats; ≥ 0 (chapter 1)."""
        return barrier(self.t, self.loss)

    @property
    def min_accuracy(self) -> float:
        """The smallest accuracy on the path ("Min" in the paper's table)."""
        return float(self.accuracy.min())

    @property
    def mean_accuracy(self) -> float:
        """The accuracy averaged over arc length by the trapezoid rule ("Avg" in the table)."""
        length = self.arc[-1]
        return float(np.trapezoid(self.accuracy, self.arc) / length if length else self.accuracy[0])


def profile(
    net: nn.Module,
    curve: Curve,
    split: Batches,
    *,
    statistics: Batches | None,
    points: int = 25,
    perturb: Perturb | None = None,
    perturb_statistics: Perturb | None = None,
) -> Profile:
    """Loss and accuracy on `split` at `points` equidistant t in [0, 1], including both ends.

    The paper measures its curves in this way (section 5; here chapters 2, 6 and 8). statistics: the
    (training) images on which BatchNorm's running statistics are recomputed at every point; with
    None they are those that the curve mixes, which are rarely the right ones. perturb: the attack
    on the images of `split` at every point. perturb_statistics: the attack on those of
    `statistics`. Raises ValueError as `means` does, and for buffers that cannot be mixed
    (`check_mixable`).
    """
    t, arc, loss, accuracy = along(
        net,
        curve,
        split,
        CLASSIFICATION,
        statistics=statistics,
        points=points,
        perturb=perturb,
        perturb_statistics=perturb_statistics,
    ).T
    return Profile(t, arc, loss, accuracy)


def along(
    net: nn.Module,
    curve: Curve,
    data: Batches,
    wanted: Mapping[str, Quantity],
    *,
    statistics: Batches | None,
    points: int,
    perturb: Perturb | None = None,
    perturb_statistics: Perturb | None = None,
) -> Array:
    """Like `profile`, for any quantities: float64 [points, 2 + quantities].

    The columns are t, the arc length, and the mean of each quantity. wanted: as in `means`. Raises
    ValueError as `profile` does.
    """
    given = {"curve": curve, "data": data, "wanted": wanted, "statistics": statistics}
    given |= {"points": points, "perturb": perturb, "perturb_statistics": perturb_statistics}
    require("profile", given, ARGUMENTS)
    check_mixable("profile", net, [stated("profile", net, p, data.device) for p in curve.points])
    ts = torch.linspace(0, 1, points, dtype=torch.float64)
    bar = tqdm(ts.tolist(), desc="along the curve", leave=False)
    found = _means(net, map(curve, bar), data, wanted, statistics, perturb, perturb_statistics)
    arc = curve.lengths(ts, names=dict(net.named_parameters()))
    return np.column_stack([ts.numpy(), arc.numpy(), found])


class Plane(NamedTuple):
    """Loss and accuracy on the plane through three networks, in orthonormal coordinates."""

    x: Array  # [columns], distance in parameter space from the first network
    y: Array  # [rows]
    loss: Array  # [rows, columns]
    accuracy: Array  # [rows, columns]
    corners: Array  # [3, 2], where the three networks lie

    def __repr__(self) -> str:
        low, high = self.loss.min(), self.loss.max()
        return f"Plane({len(self.x)} x {len(self.y)} cells, loss {low:.3g} to {high:.3g})"

    def _repr_html_(self) -> str:
        finite = self.loss[np.isfinite(self.loss)]
        if not finite.size:
            return display.described(self)
        low, high = finite.min(), finite.max()
        height = np.where(np.isfinite(self.loss), (self.loss - low) / ((high - low) or 1.0), 1.0)
        shades = torch.from_numpy((255 * (1 - height[::-1])).astype(np.uint8))  # y points up
        cells = shades.repeat_interleave(6, 0).repeat_interleave(6, 1)
        drawn = display.strip(cells[None, None], "loss over the plane, dark where it is high")
        return display.described(self, drawn)


def plane(
    net: nn.Module,
    corners: tuple[Theta, Theta, Theta],
    split: Batches,
    *,
    statistics: Batches | None,
    resolution: int = 17,
    margin: float = 0.2,
    perturb: Perturb | None = None,
) -> Plane:
    """Evaluate a square grid in the plane through three networks (paper, section 5).

    resolution: the number of points along a side. margin: how far the square extends beyond the
    corners, as a share of their extent. statistics, perturb: as in `profile`, in each cell. Raises
    ValueError as `profile` does, and if the three networks lie on one line.
    """
    given = {"split": split, "statistics": statistics, "resolution": resolution}
    require("plane", given | {"margin": margin, "perturb": perturb}, ARGUMENTS)
    states = [stated("plane", net, p, split.device) for p in _three(corners)]
    check_mixable("plane", net, states)
    at = coordinates(net, corners)
    pad = margin * np.ptp(at, axis=0).max()
    x, y = np.linspace(at.min(0) - pad, at.max(0) + pad, resolution).T
    # Barycentric weights of every cell: the affine map that sends the corners to themselves.
    solve = np.linalg.inv(np.vstack([at.T, np.ones(3)]))
    cells = tqdm([(solve @ [u, v, 1.0]).tolist() for v in y for u in x], desc="plane", leave=False)
    points = (combine(corners, weights) for weights in cells)
    found = _means(net, points, split, CLASSIFICATION, statistics, perturb)
    loss, accuracy = found.T.reshape(2, resolution, resolution)
    return Plane(x, y, loss, accuracy, at)


def _three(corners: Sequence[Theta]) -> Sequence[Theta]:
    if not isinstance(corners, tuple | list) or len(corners) != 3:
        raise ValueError("plane: corners: " + got(corners, "the states of three networks"))
    return corners


def coordinates(net: nn.Module, corners: tuple[Theta, Theta, Theta]) -> Array:
    """Where three networks lie in the plane through them: [3, 2], Euclidean over the parameters.

    The first is the origin, the second on the first axis. Raises ValueError as `plane`.
    """
    states = tuple(stated("plane", net, corner) for corner in _three(corners))
    gram = Curve(states).gram(dict(net.named_parameters())).numpy()
    a = np.sqrt(gram[1, 1])
    height = gram[2, 2] - (gram[1, 2] / a) ** 2 if a > 0 else 0.0
    if height <= 1e-10 * gram[2, 2]:
        raise ValueError(
            "plane: the three networks lie on one line. Fix: take three different ones"
        )
    return np.array([[0, 0], [a, 0], [gram[1, 2] / a, np.sqrt(height)]])


def curvature(
    net: nn.Module, theta: Theta, split: Split, *, top: int = 1, tolerance: float = 1e-2
) -> Array:
    """The `top` largest eigenvalues of the loss's Hessian in the parameters on `split`, descending.

    Computed by the Lanczos method (scipy's eigsh) from Hessian–vector products in evaluation mode,
    in float64 if a parameter is, else in float32. Parameters that the loss does not use, or uses
    only linearly, contribute zeros. Returns float64 [top]. Raises ValueError if there is no image,
    if there are not so many eigenvalues, and if a product is not finite.
    """
    given = {"split": split, "top": top, "tolerance": tolerance}
    require("curvature", given, ARGUMENTS | {"top": whole(0)})
    theta = stated("curvature", net, theta, split.device)
    n = sum(p.numel() for p in net.parameters())
    if not (len(split) and 1 <= top < n):
        raise ValueError(
            f"curvature: got {len(split)} images and top={top}, expected at least 1 image and top "
            f"from 1 to {n - 1}, below the number of parameters"
        )
    product = _hessian(net, theta, split)
    start = np.random.default_rng(0).standard_normal(n)
    options = {"which": "LA", "v0": start, "tol": tolerance, "return_eigenvectors": False}
    with mode(net, training=False), sound_gradients(net):
        if not product(start).any():
            return np.zeros(top)  # H = 0, from which Lanczos cannot continue
        found = eigsh(LinearOperator((n, n), matvec=product, dtype=np.float64), top, **options)
    return np.sort(found)[::-1].copy()


def _hessian(net: nn.Module, theta: Theta, split: Split) -> Callable[[Array], Array]:
    """v [n] → Hv [n], for the Hessian H of the mean loss on `split` in the n parameters.

    Call it in evaluation mode. It raises ValueError for a product that is not finite.
    """
    state, free = _leaves(net, theta)
    leaves = list(free.values())
    dtype, shapes = leaves[0].dtype, [x.shape for x in leaves]

    def curved(x: Tensor, y: Tensor, direction: list[Tensor]) -> tuple[Tensor, ...]:
        z = applied(net, arranged(net, x))
        loss = cross_entropy(z, y, reduction="sum")
        # This adds 0 to each product, so that all derivatives exist, even where the loss has none.
        loss = loss + 0 * torch.stack([p.square().sum() for p in leaves]).sum()
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(slopes, leaves, grad_outputs=direction)

    def product(v: Array) -> Array:
        direction = views(torch.from_numpy(v).to(leaves[0]).flatten(), shapes)
        total = torch.zeros(v.size, dtype=torch.float64, device=leaves[0].device)
        for x, y in split.batches(500):
            hv = within(net, state | free, partial(curved, x.to(dtype), y, direction))
            total += torch.cat([h.flatten() for h in hv]).double() / len(split)
        if not total.isfinite().all():
            raise ValueError(
                "curvature: a Hessian–vector product is not finite. Fix: look for parameters and "
                "outputs that are not finite, or so large that their products are not"
            )
        return total.cpu().numpy()

    return product


def _leaves(net: nn.Module, theta: Theta) -> tuple[Theta, Theta]:
    """The network's state, and copies of its parameters that require gradients.

    Floating-point tensors become float64 if a parameter is, else float32. The second names of tied
    weights are left out, because they follow the first.
    """
    names = [name for name, _ in net.named_parameters()]
    dtype = reduce(torch.promote_types, (theta[name].dtype for name in names), torch.float32)
    twice = {name for name, _ in net.named_parameters(remove_duplicate=False)}.difference(names)
    state = {n: x.detach() for n, x in theta.items() if n not in twice}
    state = {n: x.to(dtype) if x.is_floating_point() else x for n, x in state.items()}
    return state, {name: state[name].clone().requires_grad_() for name in names}


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_ONE = Lock()


@contextlib.contextmanager
def mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Set training or evaluation mode in a context; the flag of every module is restored.

    Training mode is set first, as it makes some modules (LeViT's) drop what they cached for other
    parameters. Only one thread at a time may enter, because a network has one mode and one set of
    parameters.
    """
    require("mode", {"net": net}, ARGUMENTS)
    with _ONE:
        lock = _LOCKS.setdefault(net, RLock())
    with lock:
        before = {m: m.training for m in net.modules()}
        net.train().train(training)
        try:
            yield
        finally:
            net.train()
            for module, flag in before.items():
                module.training = flag


def _means(
    net: nn.Module,
    points: Iterable[Theta],
    data: Batches,
    wanted: Mapping[str, Quantity],
    statistics: Batches | None,
    perturb: Perturb | None,
    perturb_statistics: Perturb | None = None,
) -> Array:
    """The means [points, quantities], with BatchNorm recomputed on `statistics` unless None."""
    rows = []
    for theta in points:
        if statistics is not None:
            theta = batchnorm(net, theta, statistics, perturb=perturb_statistics)
        rows.append([*means(net, theta, data, wanted, perturb=perturb).values()])
    return np.array(rows)
