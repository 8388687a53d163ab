"""Neuron alignment: permute one network's units so that they resemble another's (chapter 4).

One pass over the images feeds both networks and accumulates, group by group, the moments of the
units' activations; the permutation that maximises the summed similarity is a linear assignment.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mcnotes import evaluate, matchers
from mcnotes.bundles import Blocks, bundles, solve, tiles
from mcnotes.curves import Theta, check_same_space
from mcnotes.data import Split
from mcnotes.symmetry import Perm, Symmetry

Cost = Literal["correlation", "covariance", "l2"]
At = Literal["post", "pre"]
PIECE = 2**14  # samples that stay in the cache
Streams = dict[str, list["Moments"]]  # by group, one for each tap
Tap = Callable[[Theta, Tensor], dict[str, list[Tensor]]]


class AlignmentError(ValueError):
    """The two networks cannot be matched; the text says why and what to do."""


@dataclass
class Moments:
    """Moments, in float64, of units of A and B over `samples`.

    They are taken about `origin`, one sample: no cancellation, and a constant unit gives 0.
    """

    origin: Tensor  # [2, U], of A and of B
    samples: int
    sums: Tensor  # [2, U]
    squares: Tensor  # [2, U]
    cross: Tensor  # [U, U], entry (i, j) = Σ (aᵢ − origin)(bⱼ − origin)

    @classmethod
    def about(cls, origin: Tensor) -> "Moments":
        """Nothing seen yet. origin: [2, U]."""
        origin, units = origin.double(), origin.shape[1]
        return cls(origin, 0, *(origin.new_zeros(rows, units) for rows in (2, 2, units)))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in activations a, b: [samples, U] each."""
        self.samples += len(a)
        start = self.origin.to(a.dtype)
        # In pieces that stay in the cache, each short enough for sums in float32 to be accurate.
        for pieces in zip(torch.split(a, PIECE), torch.split(b, PIECE), strict=True):
            u, v = (x - c for x, c in zip(pieces, start, strict=True))
            self.cross += u.T @ v
            self.sums += torch.stack([u.sum(0), v.sum(0)])
            self.squares += torch.stack([u.square_().sum(0), v.square_().sum(0)])

    def merge(self, other: "Moments") -> None:
        """Take in what `other`, about the same origin, has seen."""
        self.samples += other.samples
        self.sums += other.sums
        self.squares += other.squares
        self.cross += other.cross

    def covariance(self) -> Tensor:
        """Cov(aᵢ, bⱼ): [U, U]."""
        return self.cross / self.samples - torch.outer(*self.sums / self.samples)

    def variances(self) -> Tensor:
        """Those of the units of A and of B: [2, U], 0 for what varies by rounding only."""
        variance = self.squares / self.samples - (self.sums / self.samples) ** 2
        return torch.where(variance > 1e-12 * self.origin**2, variance, 0.0)

    def correlation(self) -> Tensor:
        """Pearson correlations [U, U]; 0 where a unit is constant (dead)."""
        scale = torch.outer(*self.variances().sqrt())
        return torch.where(scale > 0, self.covariance() / scale, 0.0).clamp(-1, 1)

    def similarity(self, cost: Cost) -> Tensor:
        """What the assignment maximises: [U, U]."""
        if cost == "correlation":
            return self.correlation()
        if cost == "covariance":
            return self.covariance()
        (va, vb), (ma, mb) = self.variances(), self.origin + self.sums / self.samples
        distance: Tensor = va[:, None] + vb + (ma[:, None] - mb) ** 2 - 2 * self.covariance()
        return -distance  # E(aᵢ − bⱼ)²


@dataclass(frozen=True, eq=False)
class Matching:
    """A permutation of network B's units, and how well the matched units agree, by group of A.

    Blocks (attention heads, groups of channels) agree as well as the units within, on average.
    """

    perm: Perm  # apply with `sym.permute(theta_b, matching.perm)`
    before: dict[str, Tensor]  # [U], correlation of A's unit i with B's, mean over the taps
    after: dict[str, Tensor]  # [U]
    dead: dict[str, Tensor]  # units of A that are constant; their partners are arbitrary
    ambiguous: dict[str, Tensor]  # units of A to which another of B is as similar within 0.01
    seconds: float


def match(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Split, sym: Symmetry, *,
    method: str = "activations", at: At = "post", cost: Cost = "correlation",
    batch_size: int | None = None, seed: int = 0
) -> Matching:  # fmt: skip
    """A permutation of B's units; by default that which makes them most similar to A's.

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation" (paper, algorithm 1); "covariance"; or
    "l2", which minimises E‖a − Pb‖², the discrete 2-Wasserstein matching. Groups that several
    layers share (residual streams) sum the evidence of all their taps. Blocks and the units within
    them are solved jointly and exactly. Units that are not seen (the axes of a table of
    coordinates) are matched by their weights. Memory does not grow with the number of images.
    method: "activations", or one of `matchers.METHODS` ("weights", "straight-through", "sinkhorn",
    "random", "identity"; chapter 9), drawing from `seed`; `at` and `cost` have no say in these, and
    `seconds` leaves out the correlations, which are measured for the report. Raises AlignmentError
    when the networks differ in shape, or there is nothing to correlate; ValueError for a method
    that is not known.
    """
    if method != "activations" and method not in matchers.METHODS:
        known = ["activations", *matchers.METHODS]
        raise ValueError(f"match: got method {method!r}, expected one of {known}")
    _check(theta_a, theta_b, images)
    start, perm = time.perf_counter(), sym.identity()
    if method in matchers.METHODS:
        perm |= matchers.METHODS[method](net, theta_a, theta_b, images, sym, seed)
    seconds = time.perf_counter() - start
    moments = stream(net, theta_a, theta_b, images, sym, at=at, batch_size=batch_size)
    parts = bundles(sym)
    seen = {
        n: b for n, b in parts.items() if all(moments[kind[0]] for kind in zip(*b, strict=True))
    }
    if method == "activations":
        for name, blocks in seen.items():
            kinds = [similarity(moments[names[0]], cost) for names in zip(*blocks, strict=True)]
            perm |= solve(name, blocks, [tiles(kind, len(blocks)) for kind in kinds])
        if unseen := parts.keys() - seen.keys():
            perm = matchers.by_weights(net, theta_a, theta_b, sym, start=perm, only=unseen)
        seconds = time.perf_counter() - start
    found = Matching(perm, {}, {}, {}, {}, seconds)
    for name, blocks in seen.items():
        _report(name, blocks, moments, found)
    return found


def _check(theta_a: Theta, theta_b: Theta, images: Split) -> None:
    try:
        check_same_space(theta_a, theta_b, "match")
    except ValueError as error:
        raise AlignmentError(str(error)) from error
    if len(images) < 2:
        raise AlignmentError(f"match: got {len(images)} images, expected 2 or more (thousands)")


def similarity(taps: list[Moments], cost: Cost) -> Tensor:
    """What the assignment maximises, summed over the taps: [U, U] on the CPU."""
    return torch.stack([m.similarity(cost) for m in taps]).sum(0).cpu()


def _report(name: str, blocks: Blocks, moments: Streams, found: Matching) -> None:
    """How well the units agree that `found.perm` brings together: fills in the rest of `found`."""
    nested = blocks != ((name,),)
    order = found.perm[name].tolist() if nested else [0]
    for names in zip(*blocks, strict=True):
        taps = moments[names[0]]
        correlation = torch.stack([m.correlation() / len(taps) for m in taps]).sum(0)
        similar = tiles(correlation, len(blocks))
        still = torch.stack([m.variances()[0] == 0 for m in taps]).all(0).cpu()
        for i, (j, dead) in enumerate(zip(order, still.chunk(len(blocks)), strict=True)):
            mine, p = names[i], found.perm[names[j]]
            after = similar[i, j].gather(1, p[:, None])
            rivals = (similar[i, j] > after - 0.01).sum(1) > 1
            found.before[mine], found.after[mine] = similar[i, i].diagonal().clone(), after[:, 0]
            found.dead[mine] = dead.nonzero().flatten()
            found.ambiguous[mine] = (rivals & ~dead).nonzero().flatten()
    if nested:
        for values in (found.before, found.after):
            means = [torch.cat([values[group] for group in block]).mean() for block in blocks]
            values[name] = torch.stack(means)


def stream(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Split, sym: Symmetry, *,
    at: At = "post", batch_size: int | None = None
) -> Streams:  # fmt: skip
    """The moments of every tap of every group, in one pass over `images`, evaluation mode.

    Those of groups within blocks stand under the name of the first block's group, and are over the
    units of all blocks. batch_size: images at a time; default 512 on a GPU. On a CPU the cores
    divide them, each follows its own share; default 64 a core, so that they stay in its cache.
    """
    _check(theta_a, theta_b, images)
    device = images.images.device
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    size = -(-batch_size // cores) if batch_size else 64 if device.type == "cpu" else 512
    kinds = [names for blocks in bundles(sym).values() for names in zip(*blocks, strict=True)]
    tap: Tap = sym.tapper(net, at=at)
    a, b = ({n: x.to(device) for n, x in theta.items()} for theta in (theta_a, theta_b))
    bar = tqdm(total=len(images), desc="correlating", leave=False)

    def follow(share: Split, start: Streams) -> Streams:
        found = {name: [Moments.about(m.origin) for m in taps] for name, taps in start.items()}
        with torch.no_grad():  # in each thread
            for x, _ in share.batches(size):
                seen = tap(a, x), tap(b, x)
                for names in kinds:
                    both = (_side_by_side([s[n] for n in names]) for s in seen)
                    pairs = list(zip(*both, strict=True))
                    if names[0] not in found:
                        about = [torch.stack([u[0], v[0]]) for u, v in pairs]
                        found[names[0]] = [Moments.about(origin) for origin in about]
                    for m, (u, v) in zip(found[names[0]], pairs, strict=True):
                        m.add(u, v)
                bar.update(len(x))
        return found

    with evaluate.mode(net, training=False), bar:
        moments = follow(images.first(size), {})
        for found in _side_jobs(partial(follow, start=moments), _shares(images, size, cores)):
            for name, taps in found.items():
                for m, other in zip(moments[name], taps, strict=True):
                    m.merge(other)
    for name, taps in moments.items():
        if not all(m.cross.isfinite().all() for m in taps):
            raise AlignmentError(f"match: activations of {name!r} are not finite; look for NaN "
                                 "weights or inputs in either network")  # fmt: skip
    return moments


def _side_by_side(seen: list[list[Tensor]]) -> list[Tensor]:
    """For each tap the units of all blocks [samples, units], from lists of taps, one for each."""
    return seen[0] if len(seen) == 1 else [torch.cat(parts, 1) for parts in zip(*seen, strict=True)]


def _shares(images: Split, size: int, cores: int) -> list[Split]:
    """All but the first `size` images, in `cores` parts of whole batches (fewer, if too few)."""
    batches = torch.arange(min(size, len(images)), len(images), size).tensor_split(cores)
    cuts = [*(int(part[0]) for part in batches if len(part)), len(images)]
    return [Split(images.images[i:j], images.labels[i:j]) for i, j in pairwise(cuts)]


def _side_jobs(work: Callable[[Split], Streams], shares: list[Split]) -> list[Streams]:
    """What `work` gives for each share: one thread each, which PyTorch splits no further."""
    if len(shares) < 2:
        return [work(share) for share in shares]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(shares), initializer=torch.set_num_threads, initargs=(1,)) as p:
            return list(p.map(work, shares))
    finally:
        torch.set_num_threads(threads)
