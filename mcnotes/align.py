"""Neuron alignment: permute one network's units so that they resemble another's (chapter 4).

One pass over the images feeds both networks and accumulates, group by group, the moments of the
units' activations; the permutation that maximises the summed similarity is a linear assignment.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """Raw moments, in float64, of units of A and B over `samples`."""

    samples: int
    sums: Tensor  # [2, U], of A and of B
    squares: Tensor  # [2, U]
    cross: Tensor  # [U, U], entry (i, j) = Σ aᵢ bⱼ

    @classmethod
    def zero(cls, units: int, device: torch.device) -> "Moments":
        """Nothing seen yet."""
        shapes = ((2, units), (2, units), (units, units))
        return cls(0, *(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in activations a, b: [samples, U] each."""
        self.samples += len(a)
        self.cross += a.T @ b
        exact = torch.float64  # a constant unit must come out constant
        for i, x in enumerate((a, b)):
            self.sums[i] += x.sum(0, dtype=exact)
            self.squares[i] += torch.linalg.vector_norm(x, dim=0, dtype=exact) ** 2

    def covariance(self) -> Tensor:
        """Cov(aᵢ, bⱼ): [U, U]."""
        return self.cross / self.samples - torch.outer(*self.sums / self.samples)

    def deviations(self) -> Tensor:
        """Standard deviations of the units of A and of B: [2, U]."""
        n = self.samples
        variance = self.squares / n - (self.sums / n) ** 2
        # What is left of a constant after cancellation is rounding, not variance.
        return variance.where(variance > 1e-10 * self.squares / n, 0).sqrt()

    def correlation(self) -> Tensor:
        """Pearson correlations [U, U]; 0 where a unit is constant (dead)."""
        scale = torch.outer(*self.deviations())
        return torch.where(scale > 0, self.covariance() / scale, 0.0).clamp(-1, 1)

    def similarity(self, cost: Cost) -> Tensor:
        """What the assignment maximises: [U, U]."""
        if cost == "correlation":
            return self.correlation()
        if cost == "covariance":
            return self.covariance()
        squares = self.squares[0][:, None] + self.squares[1]
        return (2 * self.cross - squares) / self.samples  # −E(aᵢ − bⱼ)²


@dataclass(frozen=True, eq=False)
class Matching:
    """A permutation of network B's units, and how well the matched units agree, by group."""

    perm: Perm  # apply with `sym.permute(theta_b, matching.perm)`
    before: dict[str, Tensor]  # [U], correlation of A's unit i with B's, mean over the taps
    after: dict[str, Tensor]  # [U]
    dead: dict[str, Tensor]  # units of A that are constant; their partners are arbitrary
    ambiguous: dict[str, Tensor]  # units of A to which another of B is as similar within 0.01
    seconds: float


def match(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Split, sym: Symmetry, *,
    at: At = "post", cost: Cost = "correlation", batch_size: int | None = None
) -> Matching:  # fmt: skip
    """The permutation of B's units that makes them most similar to A's (paper, algorithm 1).

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation"; "covariance"; or "l2", which minimises
    E‖a − Pb‖², the discrete 2-Wasserstein matching. Groups that several layers share (residual
    streams) sum the evidence of all their taps. Memory does not grow with the number of images.
    Raises AlignmentError when the networks differ in shape, or there is nothing to correlate.
    """
    start = time.perf_counter()
    moments = stream(net, theta_a, theta_b, images, sym, at=at, batch_size=batch_size)
    found = Matching({}, {}, {}, {}, {}, 0.0)
    for name, taps in moments.items():
        p = perms.assign(torch.stack([m.similarity(cost) for m in taps]).sum(0))
        correlation = torch.stack([m.correlation() for m in taps]).mean(0).cpu()
        after = correlation.gather(1, p[:, None])
        constant = torch.stack([m.deviations()[0] == 0 for m in taps]).all(0).cpu()
        rivals = (correlation > after - 0.01).sum(1) > 1
        found.perm[name] = p
        found.before[name], found.after[name] = correlation.diagonal().clone(), after.squeeze(1)
        found.dead[name] = constant.nonzero().flatten()
        found.ambiguous[name] = (rivals & ~constant).nonzero().flatten()
    return replace(found, seconds=time.perf_counter() - start)


def stream(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Split, sym: Symmetry, *,
    at: At = "post", batch_size: int | None = None
) -> dict[str, list[Moments]]:  # fmt: skip
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
