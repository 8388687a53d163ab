"""Weight matching: a permutation of B's units that brings its weights close to A's (chapter 9)."""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from mcnotes.checks import require, whole
from mcnotes.curves import Theta
from mcnotes.matching import doubly_stochastic
from mcnotes.matching.assignment import Bundle, bundles, solve
from mcnotes.matching.pair import PAIRED, Pair
from mcnotes.symmetry import Perm, Symmetry

Agreement = Callable[[Theta], Tensor]  # ⟨θ_A, θ⟩ [], float64


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
    fixed = reference(pair)
    generator = torch.Generator().manual_seed(seed)
    perm = sym.identity() if start is None else sym.complete(start)
    here = sym.permute(in_float64(pair.theta_b), perm)
    terms = products(fixed, here)
    best = total(terms)
    for _ in range(sweeps):
        before = best
        for k in torch.randperm(len(parts), generator=generator).tolist():
            own = alone[parts[k].name]
            near = {name: here[name] for name in own.shapes}
            step = best_order(own, parts[k], near, partial(agreement, fixed))
            moved = own.permute(near, step)
            trial = terms | products(fixed, moved)
            if (value := total(trial)) > best + 1e-9 * abs(best):
                perm, best = sym.compose(perm, step), value
                here, terms = here | moved, trial
        if best == before:
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


def in_float64(theta: Theta) -> Theta:
    """The same numbers, without gradients, those of floating point in float64."""
    return {n: x.detach().double() if x.is_floating_point() else x for n, x in theta.items()}


def reference(pair: Pair) -> Theta:
    """The parameters of A in float64, with which those of B are compared."""
    return {name: pair.theta_a[name].double() for name in pair.names}


def products(fixed: Theta, theta: Theta) -> dict[str, Tensor]:
    """The inner product with `fixed` [], tensor by tensor, of those that are in `theta`."""
    return {name: (x * theta[name]).sum() for name, x in fixed.items() if name in theta}


def total(terms: dict[str, Tensor]) -> float:
    """The sum of `products`."""
    return float(torch.stack([*terms.values()]).sum())


def agreement(fixed: Theta, theta: Theta) -> Tensor:
    """⟨fixed, θ⟩ over the tensors that both have, of which there may be none: []."""
    return sum(products(fixed, theta).values(), torch.zeros((), dtype=torch.float64))


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
