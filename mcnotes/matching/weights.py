"""Weight matching: a permutation of B's units that brings its weights close to A's (chapter 9)."""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mcnotes.checks import require, whole
from mcnotes.curves import Theta
from mcnotes.matching import doubly_stochastic
from mcnotes.matching.assignment import Bundle, bundles, solve
from mcnotes.matching.pair import PAIRED, Pair, magnitude, scaled
from mcnotes.symmetry import Perm, Symmetry, permutations

Agreement = Callable[[Theta], Tensor]  # ⟨θ_A, θ⟩ [], float64
ENOUGH = 1e-9  # of the sum of what rises and what falls: what a change must gain
LONGEST = 30  # times what is not constant: how long a network counts in what is enough
CONSTANT = 100  # times as long as the rest: what is the same in every order is left out


def weight_matching(
    pair: Pair,
    *,
    start: Perm | None = None,
    only: Collection[str] | None = None,
    seed: int = 0,
    sweeps: int = 100,
) -> Perm:
    """Weight matching: a permutation P that makes ⟨θ_A, Pθ_B⟩ large (Ainsworth et al. 2023, 3.2).

    No data is needed. Block coordinate ascent: one group at a time, the others held fixed, is a
    linear assignment (blocks come with the units within, as in alignment; see `best_order`); in
    random order, drawn from `seed`, until a sweep gains nothing, but at most `sweeps` times. It
    begins at `start` (default: the identity) and ends in a local optimum. Where a group stands on
    both axes of a tensor, the assignment is that of the linear part. only: the names (of `bundles`)
    that may change. Raises ValueError for weights that are not finite.
    """
    given = {"pair": pair, "seed": seed, "sweeps": sweeps}
    require("weight_matching", given, PAIRED | {"sweeps": whole(1)})
    sym, parts = pair.sym, _named(bundles(pair.sym), only)
    alone = {bundle.name: symmetry_of(sym, bundle) for bundle in parts}
    a, b = compared(pair, "weight_matching")
    fixed = {name: a.theta[name] for name in pair.names}
    generator = torch.Generator().manual_seed(seed)
    perm = sym.identity() if start is None else sym.complete(start)
    here = sym.permute(b.theta, perm)
    for _ in range(sweeps):
        gained = False
        for k in torch.randperm(len(parts), generator=generator).tolist():
            own = alone[parts[k].name]
            near = {name: here[name] for name in own.shapes}
            step = best_order(own, parts[k], near, partial(agreement, fixed))
            if all(torch.equal(p, permutations.identity(len(p))) for p in step.values()):
                continue
            moved = own.permute(near, step)
            if gains(fixed, near, moved):
                perm, here, gained = sym.compose(perm, step), here | moved, True
        if not gained:
            break
    return perm


def _named(parts: list[Bundle], only: Collection[str] | None) -> list[Bundle]:
    """The bundles whose names are in `only`, all of them for None. Raises ValueError."""
    known = [bundle.name for bundle in parts]
    if only is None:
        return parts
    if isinstance(only, str) or not {*only} <= {*known}:
        raise ValueError(f"weight_matching: only: got {only!r}, expected names among {known}")
    return [bundle for bundle in parts if bundle.name in only]


def best_order(sym: Symmetry, bundle: Bundle, theta: Theta, agreement: Agreement) -> Perm:
    """The order of a bundle, of which this is the symmetry, with the largest agreement.

    Exact, but for blocks with heads that share keys and values: there it is the better of two that
    are found part by part, from where units stand, and from the best of a linear estimate.
    """
    linear = solve(bundle, *pairings(sym, bundle, theta, agreement))
    if len(parts := linear_parts(sym, bundle)) == 1:
        return linear
    found = []
    for perm in (sym.identity(), linear):
        for part in parts:
            here = sym.permute(theta, perm)
            perm = sym.compose(perm, solve(part, *pairings(sym, part, here, agreement)))
        found.append(perm)
    return max(found, key=lambda perm: float(agreement(sym.permute(theta, perm))))


def linear_parts(sym: Symmetry, bundle: Bundle) -> list[Bundle]:
    """A bundle in parts, in the units of each of which the agreement is linear.

    Heads that share keys and values act where the units within them act, and are matched alone.
    """
    if not bundle.nested:
        return [bundle]
    heads = [n for block in bundle.blocks for n in block if sym.groups[n].inner]
    units = tuple(tuple(n for n in block if n not in heads) for block in bundle.blocks)
    return [Bundle(bundle.name, units), *(Bundle(n, ((n,),)) for n in heads)]


def symmetry_of(sym: Symmetry, bundle: Bundle) -> Symmetry:
    """The symmetry of the units of one bundle alone, over the tensors in which they stand."""
    inside = {bundle.name, *(name for block in bundle.blocks for name in block)}
    groups = {name: g for name, g in sym.groups.items() if name in inside}
    standing = {place.name for g in groups.values() for place in g.places}
    shapes = {name: shape for name, shape in sym.shapes.items() if name in standing}
    return Symmetry(groups, train=sym.train, shapes=shapes)


class Movable(NamedTuple):
    """A network as its orders are compared: what is the same in all of them is left out or small.

    Such a constant adds the same to the agreement of every order. A large one, such as a bias of
    the outputs, would hide in its rounding, and in what counts as a gain, what an order brings.
    """

    theta: Theta  # in float64
    length: float  # the norm of the parameters, at most `LONGEST` times what is not constant


def movable(sym: Symmetry, names: Collection[str], theta: Theta) -> Movable:
    """See `Movable`; theta: in float64, its parameters `names` of about 1 at most (`scaled`).

    The constant part is the mean over the orders of each place alone, as if an axis could be
    ordered by itself: what stays in all orders of a group with two axes in a tensor, such as a
    multiple of the identity, counts as movable.
    """
    means, out, lengths = _means(sym, names, theta), dict(theta), list[float]()
    for name in names:
        rest, constant = theta[name] - means[name], float(means[name].norm())
        length = float(rest.norm())
        if length <= torch.finfo(torch.float64).eps * sum(rest.shape) * constant:
            rest, length = torch.zeros_like(rest), 0.0  # but for rounding, units are all alike
        if constant > CONSTANT * length:
            out[name] = rest
        lengths.append(length)
    whole = math.hypot(*(float(theta[name].norm()) for name in names))
    return Movable(out, min(whole, LONGEST * math.hypot(*lengths)))


def _means(sym: Symmetry, names: Collection[str], theta: Theta) -> Theta:
    """Parameters in the mean over all orders of their units."""
    means = {name: theta[name] for name in names}
    for group in sym.groups.values():
        for at in (at for at in group.places if at.name in means):
            flat, index = at.of(means).movedim(at.axis, 0), torch.from_numpy(at.index)
            units = flat[index]
            mean = units.mean(0, keepdim=True).expand_as(units)
            flat = flat.index_put((index.to(flat.device),), mean)
            means[at.name] = flat.movedim(0, at.axis).reshape(theta[at.name].shape)
    return means


def compared(pair: Pair, who: str) -> tuple[Movable, Movable]:
    """A and B, each divided by a power of two and without large constants: see `Movable`.

    No order is better or worse by that. Raises AlignmentError, in the name of `who`, where a
    parameter is not finite, or complex.
    """
    pair.check_finite(who)
    pair.check_real(who)
    names = pair.names
    both = (scaled(names, x, magnitude(names, x)) for x in (pair.theta_a, pair.theta_b))
    a, b = (movable(pair.sym, names, x) for x in both)
    return a, b


def agreement(fixed: Theta, theta: Theta) -> Tensor:
    """⟨fixed, θ⟩ over the tensors that both have, of which there may be none: []."""
    terms = ((x * theta[name]).sum() for name, x in fixed.items() if name in theta)
    return sum(terms, torch.zeros((), dtype=torch.float64))


def gains(fixed: Theta, old: Theta, new: Theta) -> bool:
    """Does `new` agree better with `fixed` than `old` does, by more than rounding may bring?

    By the entries that change alone: others, however large, hide nothing.
    """
    change, size = 0.0, 0.0
    for name in (name for name in fixed if name in new):
        terms = fixed[name] * (new[name] - old[name])
        change += float(terms.sum())
        size += float(terms.abs().sum())
    return change > ENOUGH * size


def pairings(
    sym: Symmetry, bundle: Bundle, theta: Theta, agreement: Agreement
) -> tuple[list[Tensor], Tensor]:
    """The agreement that each pairing brings: what `solve` needs, as it needs it.

    Of units: for each kind of group, [blocks, blocks, n, n]. Of blocks, besides that of their
    units, such as from a bias for each head: [blocks, blocks]. Units are compared between blocks
    that stand in each other's place, so the blocks are shifted cyclically.
    """
    count = len(bundle.blocks)
    sizes = [sym.groups[name].size for name in bundle.blocks[0]]
    units = [torch.zeros(count, count, n, n, dtype=torch.float64) for n in sizes]
    blocks = torch.zeros(count, count, dtype=torch.float64)
    for shift in range(count):
        order = torch.arange(count).roll(-shift)
        slope = slopes(sym, bundle, theta, agreement, order)
        for i, j in enumerate(order.tolist()):
            for tile, names in zip(units, bundle.kinds, strict=True):
                tile[i, j] = slope[names[j]]
            if bundle.nested:
                blocks[i, j] = slope[bundle.name][i, j]
    if bundle.nested and units:  # the slope of a block holds what its units bring where they stand
        standing = [tile.diagonal(dim1=2, dim2=3).sum(2) for tile in units]
        blocks -= torch.stack(standing).sum(0)
    return units, blocks


def slopes(
    sym: Symmetry, bundle: Bundle, theta: Theta, agreement: Agreement, order: Tensor
) -> dict[str, Tensor]:
    """By group, the slope [n, n] of the agreement in the matrix that acts on it.

    The agreement is linear in these matrices, so the slope is what each pairing brings. order
    [blocks]: how the blocks stand; the units within stand as they do in `theta`.
    """
    groups = [name for block in bundle.blocks for name in block]
    acting = {n: torch.eye(sym.groups[n].size, dtype=torch.float64) for n in groups}
    if bundle.nested:
        acting[bundle.name] = doubly_stochastic.matrix(order)
    leaves = [matrix.requires_grad_() for matrix in acting.values()]
    value = agreement(sym.apply_matrices(theta, acting))
    # Adds 0: units that stand in buffers alone have a slope, too.
    value = value + 0 * torch.stack([leaf.sum() for leaf in leaves]).sum()
    return dict(zip(acting, torch.autograd.grad(value, leaves), strict=True))
