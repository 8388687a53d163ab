"""Neuron alignment: permute one network's units so that they resemble another's (chapter 4).

One pass over the images feeds both networks and accumulates, group by group, the moments of the
units' activations; the permutation that maximises the summed similarity is a linear assignment.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
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
PIECE = 2**14  # samples that stay in the cache
Streams = dict[str, list["Moments"]]  # by group, one for each tap
Tap = Callable[[Theta, Tensor], dict[str, list[Tensor]]]
Blocks = tuple[tuple[str, ...], ...]  # for each block, the groups within


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
    at: At = "post", cost: Cost = "correlation", batch_size: int | None = None
) -> Matching:  # fmt: skip
    """The permutation of B's units that makes them most similar to A's (paper, algorithm 1).

    images: what to correlate on, some thousands of training images. at: activations after ("post")
    or before ("pre") the nonlinearity. cost: "correlation"; "covariance"; or "l2", which minimises
    E‖a − Pb‖², the discrete 2-Wasserstein matching. Groups that several layers share (residual
    streams) sum the evidence of all their taps. Blocks and the units within them are solved jointly
    and exactly. Memory does not grow with the number of images. Raises AlignmentError when the
    networks differ in shape, or there is nothing to correlate.
    """
    start = time.perf_counter()
    moments = stream(net, theta_a, theta_b, images, sym, at=at, batch_size=batch_size)
    found = Matching(sym.identity(), {}, {}, {}, {}, 0.0)
    for name, blocks in bundles(sym).items():
        _solve(name, blocks, moments, cost, found)
    return replace(found, seconds=time.perf_counter() - start)


def bundles(sym: Symmetry) -> dict[str, Blocks]:
    """What is matched at once: group → for each of its blocks, the groups within.

    An ordinary group is one block that holds itself; those within blocks come with their blocks.
    """
    nested = {name: g.inner for name, g in sym.groups.items() if g.inner and g.inner[0]}
    inside = {name for blocks in nested.values() for block in blocks for name in block}
    alone = sym.groups.keys() - nested.keys() - inside
    return {n: nested.get(n, ((n,),)) for n in sym.groups if n in alone or n in nested}


def _solve(name: str, blocks: Blocks, moments: Streams, cost: Cost, found: Matching) -> None:
    """Match the units for every pair of blocks, then the blocks by what their units achieve."""
    score = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    best: list[list[list[Tensor]]] = []  # for each kind of group, block of A and block of B
    for names in zip(*blocks, strict=True):
        similar = _tiles([m.similarity(cost) for m in moments[names[0]]], len(blocks))
        best.append([[perms.assign(tile) for tile in row] for row in similar])
        chosen = torch.stack([torch.stack(row) for row in best[-1]])  # [blocks, blocks, n]
        score += similar.gather(3, chosen[..., None]).sum((2, 3))
    order = perms.assign(score)
    for names, solved in zip(zip(*blocks, strict=True), best, strict=True):
        taps = moments[names[0]]
        tiles = _tiles([m.correlation() / len(taps) for m in taps], len(blocks))
        still = torch.stack([m.variances()[0] == 0 for m in taps]).all(0).cpu()
        for i, (j, dead) in enumerate(zip(order.tolist(), still.chunk(len(blocks)), strict=True)):
            mine, p = names[i], solved[i][j]
            after = tiles[i, j].gather(1, p[:, None])
            rivals = (tiles[i, j] > after - 0.01).sum(1) > 1
            found.perm[names[j]] = p  # B's units, in the block that goes where A has block i
            found.before[mine], found.after[mine] = tiles[i, i].diagonal().clone(), after.squeeze(1)
            found.dead[mine] = dead.nonzero().flatten()
            found.ambiguous[mine] = (rivals & ~dead).nonzero().flatten()
    if blocks != ((name,),):
        found.perm[name] = order
        for values in (found.before, found.after):
            means = [torch.cat([values[group] for group in block]).mean() for block in blocks]
            values[name] = torch.stack(means)


def _tiles(matrices: list[Tensor], count: int) -> Tensor:
    """[blocks of A, blocks of B, n, n] on the CPU: the sum of matrices over the blocks' units."""
    total = torch.stack(matrices).sum(0).cpu()
    return total.view(count, len(total) // count, count, -1).transpose(1, 2)


def stream(
    net: nn.Module, theta_a: Theta, theta_b: Theta, images: Split, sym: Symmetry, *,
    at: At = "post", batch_size: int | None = None
) -> Streams:  # fmt: skip
    """The moments of every tap of every group, in one pass over `images`, evaluation mode.

    Those of groups within blocks stand under the name of the first block's group, and are over the
    units of all blocks. batch_size: images at a time; default 512 on a GPU. On a CPU the cores
    divide them, each follows its own share; default 64 a core, so that they stay in its cache.
    """
    try:
        check_same_space(theta_a, theta_b, "match")
    except ValueError as error:
        raise AlignmentError(str(error)) from error
    if len(images) < 2:
        raise AlignmentError(f"match: got {len(images)} images, expected 2 or more (thousands)")
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
