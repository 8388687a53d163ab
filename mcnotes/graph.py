"""Which units of a network may change places: the bookkeeping (chapter 3).

Each index of each axis of each parameter starts as a *unit* with a number of its own. A tensor
is *marked*: it carries factors, integer arrays of unit numbers over the axes along which they
vary, with the slot (place within its unit) of each entry; 0 stands for "fixed", a negative
number for a constant. Data movement runs literally on these arrays, pointwise operators tie the
units that meet, contractions tie and then close them. Whatever an operator asks of its units
becomes a *fact*: two sets of tied units are interchangeable when their facts are the same.
What is not understood is pinned, so that ignorance loses symmetry and never soundness.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[list[Tensor]], Any]


@dataclass(frozen=True, eq=False)
class Factor:
    """Units of a tensor: `label` and `slot` have its rank, and size 1 where they do not vary."""

    label: Tensor
    slot: Tensor

    @property
    def axes(self) -> set[int]:
        return {k for k, n in enumerate(self.label.shape) if n > 1}


class Marked(NamedTuple):
    """What is known of a tensor: its shape, its units, the axes along which it is constant."""

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    uniform: frozenset[int] = frozenset()
    value: Tensor | None = None  # of constants only

    def varies(self) -> set[int]:
        return {k for k, n in enumerate(self.shape) if n > 1} - self.uniform

    def having(self, factors: Iterable[Factor]) -> "Marked":
        """The same with these factors; empty ones are left out."""
        return self._replace(factors=tuple(f for f in factors if f.axes))


Parts = Sequence[Marked]
broadcast: Callable[..., Sequence[Tensor]] = torch.broadcast_tensors


def empty(rank: int) -> Factor:
    """No units at all."""
    return Factor(*torch.zeros([2] + [1] * rank, dtype=torch.long))


def coordinates(shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """For each entry its position along `dims`, as one number; size 1 along all other axes."""
    out = torch.zeros([1] * len(shape), dtype=torch.long)
    for k in sorted(dims):
        step = torch.arange(shape[k]).view([-1 if j == k else 1 for j in range(len(shape))])
        out = out * shape[k] + step
    return out


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[set[int], set[int]]]:
    """Split a reshape into the smallest independent ones: (axes before, axes after)."""
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (m := math.prod(old[a:i])) != (n := math.prod(new[b:j])):
            i, j = (i + 1, j) if m < n else (i, j + 1)
        yield set(range(a, i)), set(range(b, j))


def functional(p: Factor, q: Factor) -> bool:
    """Whether one labelling refines the other, so that tying them merges no more than it must."""
    if not (p.axes and q.axes and (p.axes <= q.axes or q.axes <= p.axes)):
        return False
    u, v = (t.flatten() for t in broadcast(p.label, q.label))
    u, v = u[both := (u > 0) & (v > 0)], v[both]
    return len(torch.unique(u << 32 | v)) == max(len(torch.unique(u)), len(torch.unique(v)))


class Ledger:
    """The operations on marked tensors, and all that they ask of the units."""

    def __init__(self) -> None:
        self.facts: list[Tensor] = []  # [6, n]: event, unit, other unit, tag, slot, other slot
        self.pins: list[tuple[Tensor, str]] = []
        self.where = ""  # the operator at work, for the reasons of pins
        self.contracted = False  # whether it contracts
        self._constants: dict[float, int] = {}

    def fact(self, unit: Tensor, *columns: Tensor | int) -> None:
        """Note rows (unit, other, tag, slot, other slot), broadcast, zeros where left out."""
        rows = broadcast(unit, *(torch.as_tensor(c) for c in columns))
        table = torch.zeros(6, rows[0].numel(), dtype=torch.long)
        table[0] = len(self.facts)
        table[1 : len(rows) + 1] = torch.stack([row.flatten() for row in rows])
        self.facts.append(table[:, table[1] > 0])

    def pin(self, units: Tensor, why: str) -> None:
        """These units must stay where they are."""
        if len(units := units[units > 0]):
            self.pins.append((units, f"{why} at {self.where}" if self.where else why))

    def forget(self, parts: Iterable[Marked], why: str) -> None:
        """Pin all units of these tensors."""
        for f in (f for x in parts for f in x.factors):
            self.pin(f.label, why)

    def see(self, x: Marked) -> None:
        """An operator reads x: only this tells which of the tensors that share units it reads."""
        for f in x.factors:
            self.fact(f.label, 0, 0, f.slot)

    def context(self, f: Factor, dims: set[int]) -> Factor:
        """f, whose units must keep their place along `dims`; empty if that leaves them no move."""
        dims = dims & f.axes
        if dims and dims == f.axes:
            self.pin(f.label, "meets something fixed")
            return empty(f.label.dim())
        if dims:
            self.fact(f.label, 0, coordinates(f.label.shape, dims), f.slot)
        return f

    def join(self, p: Factor, q: Factor) -> Factor:
        """Tie two labellings of the same tensor entry by entry; the simpler one remains."""
        p, q = sorted((p, q), key=lambda f: (f.label.numel(), bool(f.slot.any())))
        u, v, s, t = broadcast(p.label, q.label, p.slot, q.slot)
        whole = bool((p.label > 0).all())
        fixed = (u == 0) | (v == 0) if whole or p.axes == q.axes else torch.ones_like(u) > 0
        tag = coordinates(u.shape, q.axes - p.axes)
        self.fact(u.where(~fixed, 0), v, tag, s, t)
        self.fact(v.where(~fixed & (u < 0), 0), u, tag, t)
        self.pin(torch.cat([u[fixed], v[fixed]]), "meets something fixed")
        if whole:
            return p
        return self.settle(u.where(u > 0, v).where(~fixed, 0), s.where(u > 0, t))

    def untangle(self, x: Marked) -> Marked:
        """Factors of x that share an axis: tie them, or let each keep its place along it."""
        kept: list[Factor] = []
        for q in x.factors:
            for i, p in enumerate(kept):
                if functional(p, q):
                    kept[i], q = empty(len(x.shape)), self.join(p, q)
                else:
                    q = self.context(q, p.axes)
                    kept[i] = self.context(p, q.axes)
            kept.append(q)
        return x.having(kept)

    def tie(self, a: Marked, b: Marked) -> Marked:
        """A pointwise operator: where the other operand varies in its own way, a unit must stay."""
        rank = max(len(a.shape), len(b.shape))
        wide = ([None] * (rank - len(x.shape)) + [*range(len(x.shape))] for x in (a, b))
        a, b = (self.untangle(self.arrange(x, w)) for x, w in zip((a, b), wide, strict=True))
        others, out = list(b.factors), []
        for p in a.factors:
            q = next((q for q in others if functional(p, q)), empty(rank))
            others = [o for o in others if o is not q]
            moves = self.context(p, b.varies() - q.axes).axes
            if q.axes:
                moves &= self.context(q, a.varies() - p.axes).axes
                p = self.join(p, q)
            out += [p] if moves else []
        out += [self.context(q, a.varies()) for q in others]
        shape = tuple(map(max, a.shape, b.shape))
        return Marked(shape, (), frozenset(range(rank)) - a.varies() - b.varies()).having(out)

    def spread(self, x: Marked, dims: Iterable[int]) -> Marked:
        """Softmax, normalisation … over `dims`: units move within them, or all else alike."""
        over = {d % len(x.shape) for d in dims}
        x = self.untangle(x)
        return x.having(self.context(f, f.axes - over) if f.axes & over else f for f in x.factors)

    def reduce(self, x: Marked, dims: Iterable[int], keepdim: bool = False) -> Marked:
        """Sum, mean, maximum … over `dims`: units that live there are closed."""
        over = {d % len(x.shape) for d in dims}
        kept = [f for f in self.spread(x, over).factors if not f.axes & over]
        shape = tuple(1 if k in over else n for k, n in enumerate(x.shape))
        x = x._replace(shape=shape).having(kept)
        return x if keepdim else self.arrange(x, [k for k in range(len(shape)) if k not in over])

    def mix(self, x: Marked, dims: Iterable[int], why: str) -> Marked:
        """An operator that knows positions along `dims` (pooling, padding …): pin units there."""
        over = {d % len(x.shape) for d in dims}
        self.forget([x.having(f for f in x.factors if f.axes & over)], why)
        x = x._replace(uniform=x.uniform - over)
        return x.having(f for f in x.factors if not f.axes & over)

    def einsum(self, equation: str, *operands: Marked) -> Marked:
        """Any contraction: the pointwise product in the space of all letters, then a sum."""
        self.contracted = True
        sides, out = equation.split("->")
        letters = "".join(dict.fromkeys(sides.replace(",", "")))
        total = Marked(())
        for side, x in zip(sides.split(","), operands, strict=True):
            x = self.arrange(x, [side.index(c) if c in side else None for c in letters])
            total = self.tie(total, x)
        total = self.reduce(total, [k for k, c in enumerate(letters) if c not in out])
        kept = [c for c in letters if c in out]
        return self.arrange(total, [kept.index(c) for c in out])

    def arrange(self, x: Marked, order: Sequence[int | None]) -> Marked:
        """Permute the axes of x to `order`, drop those not in it (size 1), add one at each None."""
        real = [k for k in order if k is not None]
        gone = [k for k in range(len(x.shape)) if k not in real]
        index = (*(None if k is None else slice(None) for k in order), *(0 for _ in gone))
        factors = (
            Factor(*(t.permute(real + gone)[index] for t in (f.label, f.slot))) for f in x.factors
        )
        shape = tuple(1 if k is None else x.shape[k] for k in order)
        uniform = frozenset(i for i, k in enumerate(order) if k in x.uniform)
        return Marked(shape, tuple(factors), uniform)

    def view(self, x: Marked, new: Sequence[int]) -> Marked:
        """Reshape; only the blocks of axes in which units live are followed entry by entry."""
        pairs, factors = list(blocks(x.shape, new)), []
        for f in x.factors:
            old_axes = {k for a, _ in pairs if a & f.axes for k in a}
            new_axes = {k for a, b in pairs if a & f.axes for k in b}
            size = [n if k in new_axes else 1 for k, n in enumerate(new)]
            full = self.literal(f, [n if k in old_axes else 1 for k, n in enumerate(x.shape)])
            factors.append(self.settle(*(t.reshape(size) for t in full)))
        uniform = frozenset(k for a, b in pairs if a <= x.uniform for k in b)
        return Marked(tuple(new), (), uniform).having(factors)

    def literal(self, f: Factor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Label and identity (slot, and position along the other axes) of each entry, in full."""
        ident = coordinates(size, set(range(len(size))) - f.axes)
        return f.label.expand(*size), (ident + f.slot * ident.numel()).expand(*size)

    def move(self, fn: Run, parts: Parts, local: set[int] | None = None) -> list[list[Factor]]:
        """Run `fn` (cat, slice, index …) on the labels of `parts`; the factors of each result.

        local: the axes on which fn acts, if only some; the others are then followed in short.
        """
        columns: list[dict[int, Factor]] = []  # factors of the parts that go together
        for i, part in enumerate(parts):
            for f in part.factors:
                same = (c for c in columns if any(g.axes & f.axes for g in c.values()))
                column = next((c for c in same if i not in c), None)
                if column is None:
                    columns.append(column := {})
                column[i] = f
        results: list[list[Factor]] = []
        for column in columns:
            keep = set().union(*(f.axes for f in column.values())) | (local or set())
            full = []
            for i, part in enumerate(parts):
                size = [n if local is None or k in keep else 1 for k, n in enumerate(part.shape)]
                blank = torch.full([1] * len(size), self.constant(part))
                full.append(self.literal(column.get(i) or Factor(blank, blank * 0), size))
            moved = [fn([pair[k] for pair in full]) for k in (0, 1)]
            labels, idents = ([m] if isinstance(m, Tensor) else m for m in moved)
            results = results or [[] for _ in labels]
            for out, label, ident in zip(results, labels, idents, strict=True):
                out.append(self.settle(label, ident))
        return results

    def constant(self, x: Marked) -> int:
        """The label of a tensor without units: negative, by its value, if that is one number."""
        if x.value is None or x.varies() or not x.value.numel():
            return 0
        return self._constants.setdefault(float(x.value.ravel()[0]), -1 - len(self._constants))

    def settle(self, label: Tensor, ident: Tensor) -> Factor:
        """The factor of moved labels; the entries of a unit get slots where they need them."""
        axes = [k for k in range(label.dim()) if bool((label != label.narrow(k, 0, 1)).any())]
        rest = [k for k in range(label.dim()) if k not in axes]
        size = [n if k in axes else 1 for k, n in enumerate(label.shape)]
        ids = ident.permute(rest + axes).reshape(-1, torch.Size(size).numel())
        units = label.permute(rest + axes).reshape(ids.shape)[0]
        held = units > 0
        if not axes or not bool(held.any()):
            self.fact(units, 0, -1)  # a unit alone in its tensor has nobody to change places with
            return empty(label.dim())
        slot = torch.zeros_like(units)
        repeated = len(torch.unique(units[held])) < int(held.sum())
        if repeated or bool((ids[:, held] != ids[:, held][:, :1]).any()):
            order = ids.argsort(dim=1, stable=True)
            order = order.gather(1, units[order].argsort(dim=1, stable=True))
            ordered = units.sort().values
            ranks = torch.arange(len(units)) - torch.searchsorted(ordered, ordered)
            slots = torch.zeros_like(ids).scatter(1, order, ranks.expand_as(ids))
            self.fact(units, 0, ids, slots, torch.arange(len(ids))[:, None])
            if bool((slots != slots[:1])[:, held].any()):
                self.pin(units, "is moved in a way that differs from place to place")
                return empty(label.dim())
            slot = slots[0].where(held, 0)
        return Factor(units.reshape(size), slot.reshape(size))
