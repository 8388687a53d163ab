"""Follow every hidden unit through the operator graph of a network (chapter 3).

Each index of each axis of each parameter starts as a *unit* with a number of its own. A tensor
is *marked*: it carries factors, integer arrays of unit numbers over the axes along which they
vary, with the slot (place within its unit) of each entry; 0 stands for "fixed", a negative
number for a constant. Data movement runs literally on these arrays, pointwise operators tie the
units that meet, contractions tie and then close them. Whatever an operator asks of its units
becomes a *fact*: two sets of tied units are interchangeable when their facts are the same.
What is not understood is pinned, so that ignorance loses symmetry and never soundness.
"""

import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Factor:
    """Units of a tensor: `label` and `slot` have its rank, and size 1 where they do not vary."""

    label: Tensor
    slot: Tensor


class Marked(NamedTuple):
    """What is known of a tensor: its shape, its units, the axes along which it is constant."""

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    uniform: frozenset[int] = frozenset()
    value: Tensor | None = None  # only of constants

    def varies(self) -> set[int]:
        return {k for k, n in enumerate(self.shape) if n > 1} - self.uniform


class Unknown(Exception):
    """An operator (or a use of it) for which there is no rule."""


def axes(t: Tensor) -> set[int]:
    """The axes along which a label array varies."""
    return {k for k, n in enumerate(t.shape) if n > 1}


def coordinates(shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """For each entry its position along `dims`, as one number; size 1 along all others."""
    out = torch.zeros([1] * len(shape), dtype=torch.long)
    for k in sorted(dims):
        step = torch.arange(shape[k]).view([-1 if j == k else 1 for j in range(len(shape))])
        out = out * shape[k] + step
    return out


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Split a reshape into the smallest independent ones: (axes before, axes after)."""
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        m = n = 1
        if i < len(old):
            m, i = old[i], i + 1
        if j < len(new):
            n, j = new[j], j + 1
        while m != n:
            if m < n:
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        yield range(a, i), range(b, j)


def functional(p: Factor, q: Factor) -> bool:
    """Whether one labelling refines the other, so that tying them merges no more than it must."""
    small, large = sorted((axes(p.label), axes(q.label)), key=len)
    if not small <= large or not small:
        return False
    u, v = (t.flatten() for t in torch.broadcast_tensors(p.label, q.label))
    u, v = u[both := (u > 0) & (v > 0)], v[both]
    pairs = len((u << 32 | v).unique())
    return pairs == max(len(u.unique()), len(v.unique()))


class Ledger:
    """The operations on marked tensors, and all that they ask of the units."""

    def __init__(self) -> None:
        self.facts: list[Tensor] = []  # [6, n]: event, unit, other unit, tag, slot, other slot
        self.pins: list[tuple[Tensor, str]] = []
        self.where = ""
        self._constants: dict[Any, int] = {}

    def fact(self, *columns: Tensor | int) -> None:
        """Record rows unit, other, tag, slot, other slot (broadcast); rows without unit drop."""
        rows = torch.broadcast_tensors(*(torch.as_tensor(c) for c in columns))
        table = torch.stack([r.flatten() for r in rows] + [rows[0].flatten() * 0] * (5 - len(rows)))
        event = torch.full_like(table[:1], len(self.facts) + 1)
        self.facts.append(torch.cat([event, table])[:, table[0] > 0])

    def pin(self, units: Tensor, why: str) -> None:
        """These units must stay where they are."""
        if len(units := units[units > 0]):
            self.pins.append((units, f"{why} at {self.where}" if self.where else why))

    def constant(self, key: Any) -> int:
        """A negative label for a constant: equal for equal keys."""
        return self._constants.setdefault(key, -1 - len(self._constants))

    # Pointwise meeting of units

    def see(self, *parts: Marked) -> None:
        """An operator reads these tensors, in one role: note which units and slots it gets."""
        seen = [
            torch.stack([f.label.flatten(), f.slot.flatten()]) for x in parts for f in x.factors
        ]
        if seen:
            units, slots = torch.cat(seen, 1).unique(dim=1)
            self.fact(units, 0, 0, slots)

    def context(self, f: Factor, dims: set[int]) -> bool:
        """The units of f must keep their place along `dims`. False if they cannot move at all."""
        if not (dims := dims & axes(f.label)):
            return True
        if dims == axes(f.label):
            self.pin(f.label, "meets something fixed")
            return False
        self.fact(f.label, 0, coordinates(f.label.shape, dims), f.slot)
        return True

    def join(self, p: Factor, q: Factor) -> Factor | None:
        """Tie two labellings of the same tensor entry by entry; the simpler one remains."""
        p, q = sorted((p, q), key=lambda f: (f.label.numel(), bool(f.slot.any())))
        if bool((p.label < 1).any()) and p.label.shape != q.label.shape:
            self.pin(p.label, "meets something fixed")
            self.pin(q.label, "meets something fixed")
            return None
        u, v, s, t = torch.broadcast_tensors(p.label, q.label, p.slot, q.slot)
        tag = coordinates(u.shape, axes(u) - axes(p.label)).expand_as(u)
        fixed = (u == 0) | (v == 0)
        self.fact(u.where(~fixed, 0), v, tag, s, t)
        self.fact(v.where((u < 0) & ~fixed, 0), u, tag, t, 0)
        self.pin(torch.cat([u[fixed], v[fixed]]), "meets something fixed")
        if not bool((p.label < 1).any()):
            return p
        return self.settle(torch.where(u > 0, u, v).where(~fixed, 0), s.where(u > 0, t))

    def untangle(self, x: Marked) -> Marked:
        """Factors of x that share an axis: tie them, or let each keep its place along it."""
        kept: list[Factor] = []
        for q in x.factors:
            alive = True
            for i, p in enumerate(kept):
                if functional(p, q):
                    joined = self.join(p, q)
                    kept[i : i + 1] = [joined] if joined else []
                    alive = False
                    break
                alive = self.context(q, axes(p.label))
                if not alive:
                    break
                if not self.context(p, axes(q.label)):
                    kept.remove(p)
                    break
            if alive:
                kept.append(q)
        return x._replace(factors=tuple(kept))

    def tie(self, a: Marked, b: Marked) -> Marked:
        """The result of a pointwise operator on a and b, which broadcast."""
        rank = max(len(a.shape), len(b.shape))
        a, b = (
            self.untangle(self.arrange(x, [None] * (rank - len(x.shape)) + [*range(len(x.shape))]))
            for x in (a, b)
        )
        rest, met, factors = list(b.factors), {id(f): set[int]() for f in a.factors + b.factors}, []
        pairs: list[tuple[Factor | None, list[Factor]]] = []
        for p in a.factors:
            joined: Factor | None = p
            group = [p]
            for q in list(rest):
                if joined is not None and functional(joined, q):
                    for f in group:
                        met[id(f)] |= axes(q.label)
                    met[id(q)] |= set().union(*(axes(f.label) for f in group))
                    rest.remove(q)
                    group.append(q)
                    joined = self.join(joined, q)
            pairs.append((joined, group))
        pairs += [(q, [q]) for q in rest]
        mine = {id(f) for f in a.factors}
        for joined, group in pairs:
            # Along an axis on which the other operand varies in its own way, a unit must stay.
            free = [
                self.context(f, (b if id(f) in mine else a).varies() - met[id(f)]) for f in group
            ]
            if all(free) and joined is not None:
                factors.append(joined)
        shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        return Marked(shape, tuple(factors), frozenset(range(rank)) - a.varies() - b.varies())

    def reduce(self, x: Marked, dims: Iterable[int], keepdim: bool = False) -> Marked:
        """Sum, mean, maximum … over `dims`: units that live there are closed."""
        dims = {d % len(x.shape) for d in dims}
        kept = self.spread(x, dims).factors
        x = x._replace(factors=tuple(f for f in kept if not axes(f.label) & dims))
        x = x._replace(shape=tuple(1 if k in dims else n for k, n in enumerate(x.shape)))
        return x if keepdim else self.arrange(x, [k for k in range(len(x.shape)) if k not in dims])

    def spread(self, x: Marked, dims: Iterable[int]) -> Marked:
        """Softmax, normalisation … over `dims`: a unit may only move within them or across all."""
        dims = {d % len(x.shape) for d in dims}
        alive = [
            f
            for f in x.factors
            if not axes(f.label) & dims
            or axes(f.label) <= dims
            or self.context(f, axes(f.label) - dims)
        ]
        return x._replace(factors=tuple(alive))

    def mix(self, x: Marked, dims: Iterable[int], why: str) -> Marked:
        """An operator that knows positions along `dims` (pooling, padding …): pin what lives there."""
        dims = {d % len(x.shape) for d in dims}
        for f in x.factors:
            if axes(f.label) & dims:
                self.pin(f.label, why)
        return x._replace(
            factors=tuple(f for f in x.factors if not axes(f.label) & dims),
            uniform=x.uniform - dims,
        )

    def einsum(self, equation: str, *operands: Marked) -> Marked:
        """Any contraction: the pointwise product in the space of all letters, then a sum."""
        sides, out = equation.split("->")
        letters = "".join(dict.fromkeys(sides.replace(",", "")))
        total: Marked | None = None
        for side, x in zip(sides.split(","), operands, strict=True):
            x = self.arrange(x, [side.index(c) if c in side else None for c in letters])
            total = x if total is None else self.tie(total, x)
        assert total is not None
        total = self.reduce(total, [k for k, c in enumerate(letters) if c not in out])
        kept = [c for c in letters if c in out]
        return self.arrange(total, [kept.index(c) for c in out])

    # Data movement

    def arrange(self, x: Marked, order: Sequence[int | None]) -> Marked:
        """Permute the axes of x to `order`, drop those not in it (size 1), add one at each None."""
        real = [k for k in order if k is not None]
        gone = [k for k in range(len(x.shape)) if k not in real]
        index = tuple(None if k is None else slice(None) for k in order)

        def moved(t: Tensor) -> Tensor:
            return (
                t.permute(real + gone).flatten(len(real)).select(-1, 0)[index]
                if gone
                else t.permute(real)[index]
            )

        shape = tuple(1 if k is None else x.shape[k] for k in order)
        uniform = frozenset(i for i, k in enumerate(order) if k in x.uniform)
        return Marked(
            shape, tuple(Factor(moved(f.label), moved(f.slot)) for f in x.factors), uniform
        )

    def view(self, x: Marked, new: Sequence[int]) -> Marked:
        """Reshape; only the blocks of axes in which units live are followed entry by entry."""
        factors = []
        pairs = list(blocks(x.shape, new))
        for f in x.factors:
            old_size, new_size = [1] * len(x.shape), [1] * len(new)
            for a, b in pairs:
                if axes(f.label) & set(a):
                    for k in a:
                        old_size[k] = x.shape[k]
                    for k in b:
                        new_size[k] = new[k]
            label, ident = self.literal(f, old_size)
            moved = self.settle(label.reshape(new_size), ident.reshape(new_size))
            factors += [moved] if moved else []
        uniform = {k for a, b in pairs if set(a) <= x.uniform for k in b}
        return Marked(tuple(new), tuple(factors), frozenset(uniform))

    def literal(self, f: Factor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Label and identity (slot and position along the other axes) of each entry, in full."""
        ident = coordinates(size, set(range(len(size))) - axes(f.label))
        return f.label.expand(size), (ident + f.slot * int(ident.max() + 1)).expand(size)

    def move(
        self,
        fn: Callable[[list[Tensor]], Any],
        parts: Sequence[Marked],
        local: set[int] | None = None,
    ) -> list[list[Factor]]:
        """Run `fn` (cat, slice, index …) on the labels of `parts`; the factors of each result.

        local: the axes on which fn acts; the others may then be followed in short.
        """
        columns: list[list[Factor | None]] = []
        for i, part in enumerate(parts):
            for f in part.factors:
                for column in columns:
                    if column[i] is None and any(
                        g and axes(g.label) & axes(f.label) for g in column
                    ):
                        column[i] = f
                        break
                else:
                    columns.append([f if j == i else None for j in range(len(parts))])
        results: list[list[Factor]] = []
        for column in columns:
            keep = set().union(*(axes(f.label) for f in column if f)) | (local or set())
            full = []
            for part, f in zip(parts, column, strict=True):
                size = [n if local is None or k in keep else 1 for k, n in enumerate(part.shape)]
                known = part.value is not None and not part.varies() and part.value.numel()
                fill = self.constant(float(part.value.flatten()[0])) if known else 0
                blank = torch.full([1] * len(size), fill)
                full.append(self.literal(f or Factor(blank, blank * 0), size))
            labels, idents = (fn([pair[k] for pair in full]) for k in (0, 1))
            if isinstance(labels, Tensor):
                labels, idents = [labels], [idents]
            results = results or [[] for _ in labels]
            for out, label, ident in zip(results, labels, idents, strict=True):
                moved = self.settle(label, ident)
                out += [moved] if moved else []
        return results

    def settle(self, label: Tensor, ident: Tensor) -> Factor | None:
        """The factor of moved labels: give the entries of a unit slots where they need them."""
        live = [
            k
            for k, n in enumerate(label.shape)
            if n > 1 and bool((label != label.narrow(k, 0, 1)).any())
        ]
        rest = [k for k in range(label.dim()) if k not in live]
        size = [label.shape[k] if k in live else 1 for k in range(label.dim())]
        ids = ident.permute(rest + live).reshape(-1, max(1, torch.Size(size).numel()))
        units = label.permute(rest + live).reshape(ids.shape)[0]
        slot = torch.zeros_like(units)
        if not bool((units > 0).any()):
            return None
        if not live:
            self.fact(units, 0, -1)  # alone in its tensor: nobody to change places with
            return None
        held = units > 0
        if bool((ids[:, held] != ids[:, held][:, :1]).any()) or len(units[held].unique()) < int(
            held.sum()
        ):
            order = ids.argsort(dim=1, stable=True)
            order = order.gather(1, units[order].argsort(dim=1, stable=True))
            ordered = units.sort().values
            ranks = torch.arange(len(units)) - torch.searchsorted(ordered, ordered)
            slots = torch.zeros_like(ids).scatter(1, order, ranks.expand_as(ids))
            self.fact(units, 0, ids, slots, torch.arange(len(ids))[:, None])
            if bool((slots != slots[:1])[:, held].any()):
                self.pin(units, "is moved in a way that differs from place to place")
                return None
            slot = slots[0].where(held, 0)
        return Factor(units.reshape(size), slot.reshape(size))
