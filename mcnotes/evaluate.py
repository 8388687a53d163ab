"""Loss and accuracy of a network, along a curve and over a plane; BatchNorm; curvature (chapter 1).

Everything takes the network's state as a value: `net` is never changed.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from mcnotes.attacks import Perturb
from mcnotes.curves import Curve, Theta, combine, views
from mcnotes.data import Split

Array = NDArray[np.float64]
Batch = tuple[Tensor, Tensor]  # images, labels


class Score(NamedTuple):
    """Mean cross-entropy (nats) and accuracy (a share of 1) on a data set."""

    loss: float
    accuracy: float


def score(
    net: nn.Module, theta: Theta, split: Split, *, batch_size: int = 500,
    perturb: Perturb | None = None
) -> Score:  # fmt: skip
    """Loss and accuracy of `theta` on `split` (attacked, if there is `perturb`: robust ones)."""
    total = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    with mode(net, training=False), torch.no_grad():
        for x, y in attacked(net, theta, split.batches(batch_size), perturb):
            z = functional_call(net, theta, (x,))
            hits = (z.argmax(1) == y).sum()
            total += torch.stack([cross_entropy(z, y, reduction="sum"), hits]).double()
    return Score(*(total / len(split)).tolist())


def attacked(
    net: nn.Module, theta: Theta, batches: Iterable[Batch], perturb: Perturb | None
) -> Iterator[Batch]:
    """The batches, the images of each attacked in evaluation mode; repeatable noise (chapter 8)."""
    for i, (x, y) in enumerate(batches):
        if perturb:
            forked = torch.random.fork_rng([x.device] if x.is_cuda else [])
            with mode(net, training=False), forked:
                torch.manual_seed(i)
                x = perturb(lambda u: functional_call(net, theta, (u,)), x, y)
        yield x, y


def probabilities(net: nn.Module, theta: Theta, split: Split, *, batch_size: int = 500) -> Tensor:
    """Predicted class probabilities in evaluation mode: [N, classes], float32."""
    with mode(net, training=False), torch.no_grad():
        batches = (functional_call(net, theta, (x,)) for x, _ in split.batches(batch_size))
        return torch.cat([z.float().softmax(1) for z in batches])


def batchnorm(
    net: nn.Module, theta: Theta, split: Split, *, batch_size: int = 500,
    perturb: Perturb | None = None
) -> Theta:  # fmt: skip
    """`theta` with its BatchNorm running statistics computed anew on `split`, in one pass.

    The mean over equal batches of the batch mean and (unbiased) variance; a last partial batch is
    left out. The statistics of a mixture of two networks are no mixture of their statistics, which
    is why every point of a curve needs this (paper, section 4). Without BatchNorm: a plain copy.
    perturb: on attacked images; the attack meets the statistics of the images as they are.
    """
    theta = batchnorm(net, theta, split, batch_size=batch_size) if perturb else theta
    tracked = (m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats)
    if not (momenta := {m: m.momentum for m in tracked}):
        return dict(theta)
    buffers = dict(net.named_buffers())
    fresh = {n: x.clone() if n in buffers else x for n, x in theta.items()}
    for name in (n for n in fresh if n.endswith("num_batches_tracked")):
        fresh[name].zero_()
    with mode(net, training=False), torch.no_grad():
        try:
            batches = split.batches(min(batch_size, len(split)), drop_last=True)
            for k, (x, _) in enumerate(attacked(net, theta, batches, perturb), 1):
                for norm in momenta:
                    norm.train().momentum = 1 / k  # plain averages; for None, PyTorch would wait
                functional_call(net, fresh, (x,))
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
    return fresh


class Profile(NamedTuple):
    """What was measured along a curve, all arrays [points]. Accuracies are shares of 1."""

    t: Array
    arc: Array  # arc length from r(0), over the parameters
    loss: Array
    accuracy: Array

    @property
    def barrier(self) -> float:
        """max over t of L(r(t)) − [(1 − t) L(r(0)) + t L(r(1))], in nats; ≥ 0 (chapter 1)."""
        chord = (1 - self.t) * self.loss[0] + self.t * self.loss[-1]
        return float((self.loss - chord).max())

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
    net: nn.Module, curve: Curve, split: Split, *, statistics: Split | None, points: int = 25,
    perturb: Perturb | None = None, perturb_statistics: Perturb | None = None
) -> Profile:  # fmt: skip
    """Loss and accuracy on `split` at `points` equidistant t in [0, 1].

    statistics: the (training) images on which BatchNorm is recomputed at every point; None leaves
    the statistics as the curve mixes them, which is rarely what one wants. perturb: the attack on
    the images of `split` at every point, perturb_statistics: that on the images of `statistics`.
    """
    if points < 2:
        raise ValueError(f"profile: got points={points}, expected at least 2 (both ends)")
    ts = torch.linspace(0, 1, points, dtype=torch.float64)
    bar = tqdm(ts.tolist(), desc="along the curve", leave=False)
    loss, accuracy = _scores(net, map(curve, bar), split, statistics, perturb, perturb_statistics).T
    arc = curve.lengths(ts, names=dict(net.named_parameters()))
    return Profile(ts.numpy(), arc.numpy(), loss, accuracy)


class Plane(NamedTuple):
    """Loss and accuracy over the plane through three networks, in orthonormal coordinates."""

    x: Array  # [columns], distance in parameter space from the first network
    y: Array  # [rows]
    loss: Array  # [rows, columns]
    accuracy: Array  # [rows, columns]
    corners: Array  # [3, 2], where the three networks lie


def plane(
    net: nn.Module, corners: tuple[Theta, Theta, Theta], split: Split, *,
    statistics: Split | None, resolution: int = 17, margin: float = 0.2,
    perturb: Perturb | None = None
) -> Plane:  # fmt: skip
    """Evaluate a `resolution`² grid of the plane through three networks (paper, section 5).

    margin: how far the grid goes beyond the corners, as a share of their extent. `statistics` and
    `perturb` as in `profile`, in each cell. Raises ValueError when the three lie on one line.
    """
    at = coordinates(net, corners)
    pad = margin * np.ptp(at, axis=0).max()
    x, y = np.linspace(at.min(0) - pad, at.max(0) + pad, resolution).T
    # Barycentric weights of every cell: the affine map that sends the corners to themselves.
    solve = np.linalg.inv(np.vstack([at.T, np.ones(3)]))
    cells = tqdm([(solve @ [u, v, 1.0]).tolist() for v in y for u in x], desc="plane", leave=False)
    points = (combine(corners, weights) for weights in cells)
    found = _scores(net, points, split, statistics, perturb)
    loss, accuracy = found.T.reshape(2, resolution, resolution)
    return Plane(x, y, loss, accuracy, at)


def coordinates(net: nn.Module, corners: tuple[Theta, Theta, Theta]) -> Array:
    """Where three networks lie in the plane through them: [3, 2], Euclidean over the parameters.

    The first is the origin, the second on the first axis. Raises ValueError as `plane`.
    """
    gram = Curve(corners).gram(dict(net.named_parameters())).numpy()
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

    Lanczos (scipy's eigsh) on Hessian–vector products, evaluation mode. Parameters that the loss
    does not use, or only linearly, count with the zeros that their derivatives are. In float64
    where a parameter is, else in float32. Returns float64 [top]. Raises ValueError where there is
    no image, no such number of eigenvalues, or a product that is not finite.
    """
    names = [name for name, _ in net.named_parameters()]
    dtype = reduce(torch.promote_types, (theta[name].dtype for name in names), torch.float32)
    # Second names of tied weights are left out: they follow the first.
    twice = {name for name, _ in net.named_parameters(remove_duplicate=False)}.difference(names)
    state = {n: x.detach() for n, x in theta.items() if n not in twice}
    state = {n: x.to(dtype) if x.is_floating_point() else x for n, x in state.items()}
    free = {name: state[name].clone().requires_grad_() for name in names}
    leaves = list(free.values())
    n = sum(x.numel() for x in leaves)
    if not (len(split) and 1 <= top < n):
        raise ValueError(
            f"curvature: got {len(split)} images and top={top}, expected at least 1 image and top "
            f"from 1 to {n - 1}, below the number of parameters"
        )

    def product(v: Array) -> Array:
        direction = views(torch.from_numpy(v).to(leaves[0]).flatten(), [x.shape for x in leaves])
        total = torch.zeros(n, dtype=torch.float64, device=leaves[0].device)
        for x, y in split.batches(500):
            z = functional_call(net, state | free, (x.to(dtype),))
            loss = cross_entropy(z, y, reduction="sum")
            # Adds 0 to each product, and lets all derivatives exist, also where the loss has none.
            loss = loss + 0 * torch.stack([p.square().sum() for p in leaves]).sum()
            slopes = torch.autograd.grad(loss, leaves, create_graph=True)
            hv = torch.autograd.grad(slopes, leaves, grad_outputs=direction)
            total += torch.cat([h.flatten() for h in hv]).double() / len(split)
        if not total.isfinite().all():
            raise ValueError(
                "curvature: a Hessian–vector product is not finite. Fix: look for parameters and "
                "outputs that are not finite, or so large that their products are not"
            )
        return total.cpu().numpy()

    start = np.random.default_rng(0).standard_normal(n)
    options = {"which": "LA", "v0": start, "tol": tolerance, "return_eigenvectors": False}
    with mode(net, training=False):
        if not product(start).any():
            return np.zeros(top)  # H = 0, for which Lanczos has no direction to go on
        found = eigsh(LinearOperator((n, n), matvec=product, dtype=np.float64), top, **options)
    return np.sort(found)[::-1].copy()


@contextlib.contextmanager
def mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or evaluation mode for a while; every module's own flag comes back.

    By way of training mode, in which modules (LeViT's) forget what they kept of other parameters.
    """
    before = {m: m.training for m in net.modules()}
    net.train().train(training)
    try:
        yield
    finally:
        net.train()
        for module, flag in before.items():
            module.training = flag


def _scores(
    net: nn.Module, points: Iterable[Theta], split: Split, statistics: Split | None,
    perturb: Perturb | None = None, before: Perturb | None = None
) -> Array:  # fmt: skip
    """Loss and accuracy [points, 2], BatchNorm recomputed on `statistics` (if not None)."""
    fresh = (batchnorm(net, p, statistics, perturb=before) if statistics else p for p in points)
    return np.array([score(net, theta, split, perturb=perturb) for theta in fresh])
