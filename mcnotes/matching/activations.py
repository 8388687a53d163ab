"""Neuron alignment: permute one network's units so that they resemble another's (chapter 4).

One pass over the images feeds both networks and accumulates, group by group, the moments of the
units' activations; the permutation that maximises the summed similarity is a linear assignment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mcnotes import evaluate
from mcnotes.calls import Batch, Batches, count, stated
from mcnotes.checks import one_of, optional, require, whole
from mcnotes.matching.assignment import bundles, solve
from mcnotes.matching.pair import PAIRED, AlignmentError, Pair
from mcnotes.matching.weights import weight_matching
from mcnotes.symmetry import Perm

Cost = Literal["correlation", "covariance", "l2"]
At = Literal["post", "pre"]
ARGUMENTS = {
    "at": one_of(get_args(At)),
    "cost": one_of(get_args(Cost)),
    "batch_size": optional(whole(1)),
    "images": evaluate.batched,
    "seed": PAIRED["seed"],
}
"""What the arguments of the functions below, and of `match`, may be."""
PIECE = 2**18  # numbers that stay in the cache
Streams = dict[str, list["Moments"]]  # by group, one for each tap
Seen = dict[str, list[Tensor]]  # activations [samples, units] by group, one for each tap


@dataclass
class Moments:
    """Moments, in float64, of units of A and B over `samples`.

    They are taken about `origin`: 0, or a value of the unit itself where numbers would cancel.
    """

    origin: Tensor  # [2, U], of A and of B
    shifted: bool  # whether any of it is not 0
    samples: int
    sums: Tensor  # [2, U]
    squares: Tensor  # [2, U]
    cross: Tensor  # [U, U], entry (i, j) = Σ (aᵢ − origin)(bⱼ − origin)

    def __repr__(self) -> str:
        return f"Moments({len(self.cross)} units, {self.samples} samples)"

    @classmethod
    def about(cls, origin: Tensor) -> "Moments":
        """Moments about `origin` [2, U] that have not seen anything yet."""
        origin, units = origin.double(), origin.shape[1]
        zeros = (origin.new_zeros(rows, units) for rows in (2, 2, units))
        return cls(origin, bool(origin.any()), 0, *zeros)

    @classmethod
    def like(cls, *both: Tensor) -> "Moments":
        """Moments that have not seen anything yet, of units that vary like these.

        both: activations of A and of B, [samples, U] each. The origin of a unit is its first value
        where its mean is large beside its deviation, else 0.
        """
        few = (x[:: -(-len(x) // 1000)].double() for x in both)
        still = torch.stack([x.mean(0) ** 2 > 10 * x.var(0, correction=0) for x in few])
        return cls.about(torch.where(still, torch.stack([x[0] for x in both]), 0.0))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in activations a, b: [samples, U] each."""
        self.samples += len(a)
        start = self.origin.to(a.dtype)
        # In pieces that stay in the cache, each short enough for sums in float32 to be accurate.
        rows = min(max(PIECE // a.shape[1], 2**10), 2**14)
        for pair in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
            u, v = (x - c for x, c in zip(pair, start, strict=True)) if self.shifted else pair
            self.cross += u.T @ v
            self.sums += torch.stack([u.sum(0), v.sum(0)])
            self.squares += torch.stack([torch.linalg.vecdot(x, x, dim=0) for x in (u, v)])

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
        """What the assignment maximises, by `cost` as in `match`: [U, U]."""
        if cost != "l2":
            return self.correlation() if cost == "correlation" else self.covariance()
        (va, vb), (ma, mb) = self.variances(), self.origin + self.sums / self.samples
        distance: Tensor = va[:, None] + vb + (ma[:, None] - mb) ** 2 - 2 * self.covariance()
        return -distance  # E(aᵢ − bⱼ)²


def similarity(taps: list[Moments], cost: Cost) -> Tensor:
    """What the assignment maximises, summed over the taps: [U, U] on the CPU."""
    require("similarity", {"cost": cost}, ARGUMENTS)
    return torch.stack([m.similarity(cost) for m in taps]).sum(0).cpu()


def align(pair: Pair, similar: Mapping[str, Tensor]) -> Perm:
    """The permutation of B's units that brings the most similarity together: exact, by group.

    similar: [U, U] by group, of blocks over the units of all blocks. Groups that are not in it are
    matched by weights.
    """
    perm, unseen = pair.sym.identity(), []
    for bundle in bundles(pair.sym):
        if all(names[0] in similar for names in bundle.kinds):
            perm |= solve(bundle, [bundle.tiles(similar[names[0]]) for names in bundle.kinds])
        else:
            unseen.append(bundle.name)
    return weight_matching(pair, start=perm, only=unseen) if unseen else perm


def stream(
    pair: Pair, images: Batches, *, at: At = "post", batch_size: int | None = None
) -> Streams:
    """The moments of every tap of every group, in one pass over `images`, evaluation mode.

    Groups within blocks stand under the first block's, over the units of all blocks. at: as in
    `match`. batch_size: images at a time; default 512 on a GPU, 64 a core on a CPU, where each
    core takes its share. Raises AlignmentError for fewer than two images, and for activations
    that are not finite.
    """
    given = {"pair": pair, "images": images, "at": at, "batch_size": batch_size}
    require("match", given, ARGUMENTS | PAIRED)
    device = images.device
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    size = _share_size(device, cores, batch_size)
    kinds = [names for bundle in bundles(pair.sym) for names in bundle.kinds]
    tap = pair.sym.tapper(pair.net, at=at)
    states = (stated("match", pair.net, theta) for theta in (pair.theta_a, pair.theta_b))
    a, b = ({n: x.to(device) for n, x in theta.items()} for theta in states)
    bar = tqdm(total=images.count(size) or None, desc="correlating", leave=False)
    samples = list[int]()

    @torch.no_grad()
    def follow(share: Iterable[Batch], start: Streams) -> Streams:
        found = {name: [Moments.about(m.origin) for m in taps] for name, taps in start.items()}
        for x, _ in share:
            _take_in(found, kinds, tap(a, x), tap(b, x))
            samples.append(count(x))
            bar.update()
        return found

    with evaluate.mode(pair.net, training=False), bar:
        first, *shares = images.shares(size, cores)
        moments = follow(first, {})
        for found in _side_jobs(partial(follow, start=moments), shares):
            _merge(moments, found)
    _check_moments(moments, sum(samples))
    return moments


def _share_size(device: torch.device, cores: int, batch_size: int | None) -> int:
    """How many images a core takes at a time, its part of `batch_size` rounded up."""
    if batch_size:
        return -(-batch_size // cores)
    return 64 if device.type == "cpu" else 512


def _take_in(found: Streams, kinds: Sequence[Sequence[str]], a: Seen, b: Seen) -> None:
    """Add the activations of A and of B on one batch to the moments, which begin with the first.

    The activations should live no longer than this call.
    """
    for names in kinds:
        sides = [_side_by_side([seen[name] for name in names]) for seen in (a, b)]
        pairs = list(zip(*sides, strict=True))
        if names[0] not in found:
            found[names[0]] = [Moments.like(u, v) for u, v in pairs]
        for moments, (u, v) in zip(found[names[0]], pairs, strict=True):
            moments.add(u, v)


def _merge(moments: Streams, others: Streams) -> None:
    """Add other moments, of the same taps about the same origins, to `moments`."""
    for name, taps in others.items():
        for mine, other in zip(moments[name], taps, strict=True):
            mine.merge(other)


def _check_moments(moments: Streams, samples: int) -> None:
    """Raise AlignmentError where they say nothing about units."""
    if samples < 2:
        raise AlignmentError(f"match: got {samples} images, expected at least 2, better thousands")
    for name, taps in moments.items():
        if not all(m.cross.isfinite().all() for m in taps):
            raise AlignmentError(
                f"match: activations of {name!r} are not finite. Fix: look for NaN weights or "
                "inputs in either network"
            )


def _side_by_side(seen: list[list[Tensor]]) -> list[Tensor]:
    """For each tap the units of all blocks [samples, units], from lists of taps, one for each."""
    return seen[0] if len(seen) == 1 else [torch.cat(parts, 1) for parts in zip(*seen, strict=True)]


_THREADS = Lock()  # held by who has changed how many threads PyTorch takes


def _side_jobs(
    work: Callable[[Iterable[Batch]], Streams], shares: Sequence[Iterable[Batch]]
) -> list[Streams]:
    """What `work` gives for each share: one thread each, which PyTorch splits no further."""
    if len(shares) < 2:
        return [work(share) for share in shares]
    with _THREADS:
        threads, parts = torch.get_num_threads(), len(shares)
        try:
            start = partial(torch.set_num_threads, 1)
            with ThreadPoolExecutor(parts, initializer=start) as pool:
                return list(pool.map(work, shares))
        finally:
            torch.set_num_threads(threads)
