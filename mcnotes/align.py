"""Neuron alignment: permute one network's units so that they resemble another's (chapter 4).

One pass over the images feeds both networks and accumulates, group by group, the moments of the
units' activations; the permutation that maximises the summed similarity is a linear assignment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mcnotes import evaluate, perms
from mcnotes.curves import Theta, check_same_space
from mcnotes.data import Split
from mcnotes.symmetry import Perm, Symmetry

Cost = Literal["correlation", "covariance", "l2"]
At = Literal["post", "pre"]


class AlignmentError(ValueError):
    """The two networks cannot be matched; the text says why and what to do."""


@dataclass
class Moments:
    """Raw moments of units of A and B over `samples`: sums, sums of squares, cross products."""

    samples: int
    sum_a: Tensor  # [U]
    sum_b: Tensor  # [U]
    square_a: Tensor  # [U]
    square_b: Tensor  # [U]
    cross: Tensor  # [U, U], entry (i, j) = Σ aᵢ bⱼ

    @classmethod
    def zero(cls, units: int, device: torch.device) -> Moments:
        """Nothing seen yet; float64 on `device`."""
        v = torch.zeros(4, units, dtype=torch.float64, device=device)
        return cls(0, v[0], v[1], v[2], v[3], torch.outer(v[0], v[0]))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in activations a, b: [samples, U] each."""
        self.samples += len(a)
        exact = torch.float64  # a constant unit must come out constant
        self.sum_a += a.sum(0, dtype=exact)
        self.sum_b += b.sum(0, dtype=exact)
        self.square_a += torch.linalg.vector_norm(a, dim=0, dtype=exact) ** 2
        self.square_b += torch.linalg.vector_norm(b, dim=0, dtype=exact) ** 2
        self.cross += a.T @ b

    def covariance(self) -> Tensor:
        """Cov(aᵢ, bⱼ): [U, U]."""
        n = self.samples
        return self.cross / n - torch.outer(self.sum_a / n, self.sum_b / n)

    def deviations(self) -> tuple[Tensor, Tensor]:
        """Standard deviations of the units of A and of B: [U] each."""
        n = self.samples
        va = self.square_a / n - (self.sum_a / n) ** 2
        vb = self.square_b / n - (self.sum_b / n) ** 2
        # What is left of a constant after cancellation is rounding, not variance.
        va = va.where(va > 1e-10 * self.square_a / n, 0)
        vb = vb.where(vb > 1e-10 * self.square_b / n, 0)
        return va.sqrt(), vb.sqrt()

    def correlation(self) -> Tensor:
        """Pearson correlations [U, U]; 0 where a unit is constant (dead)."""
        sa, sb = self.deviations()
        scale = torch.outer(sa, sb)
        return torch.where(scale > 0, self.covariance() / scale, 0.0).clamp(-1, 1)

    def similarity(self, cost: Cost) -> Tensor:
        """What the assignment maximises: [U, U]."""
        if cost == "correlation":
            return self.correlation()
        if cost == "covariance":
            return self.covariance()
        squares = self.square_a[:, None] + self.square_b[None, :]
        return (2 * self.cross - squares) / self.samples  # −E(aᵢ − bⱼ)²


@dataclass(frozen=True, eq=False)
class Matching:
    """A permutation of network B's units, and how well the matched units agree.

    perm: apply with `sym.permute(theta_b, matching.perm)`. before, after: group → correlation of
    A's unit i with B's unit i, before and after [U] (mean over a group's taps). dead: group →
    units of A that are constant on the images; their partners are arbitrary. ambiguous: group →
    units of A for which another unit of B is as similar within 0.01. seconds: for the whole call.
    """

    perm: Perm
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    dead: dict[str, Tensor]
    ambiguous: dict[str, Tensor]
    seconds: float


def match(
    net: nn.Module,
    theta_a: Theta,
    theta_b: Theta,
    images: Split,
    sym: Symmetry,
    *,
    at: At = "post",
    cost: Cost = "correlation",
    batch_size: int | None = None,
) -> Matching:
    """The permutation of B's units that makes them most similar to A's (paper, algorithm 1).

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation"; "covariance"; or "l2", which minimises
    E‖a − Pb‖², the discrete 2-Wasserstein matching. Groups that several layers share (residual
    streams) sum the evidence of all their taps. Memory does not grow with the number of images.
    Raises AlignmentError when the networks differ in shape, or there is nothing to correlate.
    """
    start = time.perf_counter()
    moments = stream(net, theta_a, theta_b, images, sym, at=at, batch_size=batch_size)
    perm, before, after, dead, ambiguous = {}, {}, {}, {}, {}
    for name, taps in moments.items():
        similarity = torch.stack([m.similarity(cost) for m in taps]).sum(0)
        p = perms.assign(similarity)
        correlation = torch.stack([m.correlation() for m in taps]).mean(0).cpu()
        perm[name] = p
        before[name] = correlation.diagonal().clone()
        after[name] = correlation.gather(1, p[:, None]).squeeze(1)
        constant = torch.stack([m.deviations()[0] == 0 for m in taps]).all(0).cpu()
        dead[name] = constant.nonzero().flatten()
        rivals = (correlation > after[name][:, None] - 0.01).sum(1) > 1
        ambiguous[name] = (rivals & ~constant).nonzero().flatten()
    return Matching(perm, before, after, dead, ambiguous, time.perf_counter() - start)


def stream(
    net: nn.Module,
    theta_a: Theta,
    theta_b: Theta,
    images: Split,
    sym: Symmetry,
    *,
    at: At = "post",
    batch_size: int | None = None,
) -> dict[str, list[Moments]]:
    """The moments of every tap of every group, in one pass over `images`, evaluation mode.

    batch_size: default 64 on a CPU, where small batches stay in the cache, else 512.
    """
    try:
        check_same_space(theta_a, theta_b, "match")
    except ValueError as error:
        raise AlignmentError(str(error)) from error
    if len(images) < 2:
        raise AlignmentError(f"match: got {len(images)} images, expected 2 or more (thousands)")
    device = images.images.device
    size = batch_size or (64 if device.type == "cpu" else 512)
    moments: dict[str, list[Moments]] = {}
    tap: Callable[[Theta, Tensor], dict[str, list[Tensor]]] = sym.tapper(net, at=at)
    a, b = ({n: x.to(device) for n, x in theta.items()} for theta in (theta_a, theta_b))
    bar = tqdm(total=len(images), desc="correlating", leave=False)
    with evaluate.mode(net, training=False), torch.no_grad(), bar:
        for x, _ in images.batches(size):
            for (name, acts_a), acts_b in zip(tap(a, x).items(), tap(b, x).values(), strict=True):
                if name not in moments:
                    moments[name] = [Moments.zero(v.shape[1], device) for v in acts_a]
                for m, u, v in zip(moments[name], acts_a, acts_b, strict=True):
                    m.add(u, v)
            bar.update(len(x))
    for name, taps in moments.items():
        if not all(m.cross.isfinite().all() for m in taps):
            raise AlignmentError(f"match: activations of {name!r} are not finite; look for NaN "
                                 "weights or inputs in either network")  # fmt: skip
    return moments
