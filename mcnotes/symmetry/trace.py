"""Follow every hidden unit of a network through its operators (chapter 3).

Each index of each axis of each parameter is a *unit*. The network runs once on tensors that carry
marks. Data movement runs literally on the marks; operators entry by entry tie the units that meet;
sums close them. What operators see of units are *facts*: sets of tied units that have the same
facts are interchangeable. What is not understood is pinned: ignorance loses symmetry and never
soundness.
"""

import re
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.symmetry import units
from mcnotes.symmetry.units import (
    CONSTANT,
    UNIT,
    Marked,
    Tap,
    Tape,
    axes,
    functional,
    padded,
    positions,
)

ALIASES = {"unsqueeze", "squeeze", "expand", "clone", "_to_copy", "detach", "alias"}


class Walk(Tape):
    """One run of a network on marked tensors.

    rules: what operators do, by name; passing: those that only move data. names: of the modules,
    by id. merged: in a second walk, the code that stands for each unit of the first.
    """

    def __init__(
        self, rules: Mapping[str, Callable[..., Any]], passing: Collection[str],
        names: Mapping[int, str], merged: Tensor | None = None
    ) -> None:  # fmt: skip
        super().__init__(self.label)
        self.rules, self.passing = rules, passing
        self.facts: list[Tensor] = []  # rows: event, code, other code, tag
        self.pins: list[tuple[Tensor, str]] = []
        self.read: dict[Tap, None] = {}  # what contractions read
        self.names, self.merged, self.count_units = names, merged, 2

    def parameter(self, tensor: Tensor, groups: int) -> Marked:
        """A parameter, each axis of which gets units; groups: of the convolution it serves."""
        factors: list[Tensor] = []
        for k, n in enumerate(tensor.shape):
            unit = positions(tensor.shape, {k}) + self.count_units
            if k == 1 and groups > 1:  # each group has input channels of its own
                unit = unit + positions(tensor.shape, {0}) // (len(tensor) // groups) * n
            self.count_units = int(unit.max()) + 1 if n else self.count_units
            if n > 1:
                factors += self.compact(unit << 32 if self.merged is None else self.merged[unit])
        for f in factors:
            self.fact(f)
        return Marked(self, tensor, factors)

    def label(self, name: str, x: Any) -> None:
        """Name the results that an operator of the network brings."""
        for tap in x.taps if isinstance(x, Marked) else ():
            if not tap.name:
                tap.name, tap.factors = name, x.factors

    # What becomes of units

    def fact(self, factor: Tensor, other: Tensor | int = 0, tag: Tensor | int = 0) -> None:
        """Record what (broadcast) holds wherever there is a unit."""
        columns = map(torch.as_tensor, (len(self.facts), factor, other, tag))
        rows = torch.stack(torch.broadcast_tensors(*columns)).flatten(1)
        self.facts.append(rows[:, rows[1] >= UNIT])

    def pin(self, factor: Tensor, why: str = "meets something fixed") -> None:
        """Units must stay where they are."""
        if len(units := factor[factor >= UNIT] >> 32):
            self.pins.append((units, why + self.where()))

    def where(self) -> str:
        """The module at work, and the line of the network's own code."""
        at = line = ""
        for frame, number in traceback.walk_stack(None):
            if name := self.names.get(id(frame.f_locals.get("self"))):
                at, file = at or f" at {name}", frame.f_code.co_filename
                if not line and "/torch/" not in file:
                    line = f", {file.rsplit('/', 1)[-1]}:{number}"
        return at + line

    def fix(self, x: Tensor, dims: Iterable[int], why: str) -> None:
        """An operator tells positions along `dims` apart: units there are pinned."""
        factors = x.factors if isinstance(x, Marked) else []
        for f in (f for f in factors if axes(f).intersection(dims)):
            self.pin(f, why)

    def hold_axes(self, factor: Tensor, dims: frozenset[int]) -> Tensor:
        """Units must keep their place along `dims`; what remains of the factor."""
        self.fact(factor, 0, positions(factor.shape, dims))
        if dims < axes(factor):
            return factor
        self.pin(factor)
        return factor * 0

    def combine_pointwise(self, *xs: Any) -> list[Tensor]:
        """Any function of tensors entry by entry: the factors of the result."""
        given = [x for x in tree_leaves(xs) if isinstance(x, Tensor)]
        shape = torch.broadcast_shapes(*(x.shape for x in given))
        rank, done, fixed = len(shape), list[Tensor](), set[int]()
        tensors: list[list[Tensor]] = []
        none = torch.zeros([1] * rank, dtype=torch.long)
        for x in given:
            codes = x.factors if isinstance(x, Marked) else []
            varies = isinstance(x, Marked) or bool((x != x.flatten()[:1].squeeze()).any())
            wide = {k for k, n in enumerate(x.shape) if varies and n > 1 and x.stride(k)}
            fixed |= {k + rank - x.dim() for k in wide.difference(*map(axes, codes))}
            tensors.append([padded(f, rank) for f in codes])
        for own in (*tensors, [positions(shape, {k}) * 0 for k in fixed]):
            for i, j in combinations(range(len(own)), 2):  # both act on x
                shared = axes(own[i]) & axes(own[j])
                if axes(own[i]) == axes(own[j]) and functional(own[i], own[j]):
                    own[i], own[j] = none, self.join(own[i], own[j])
                elif shared and not units.independent(own[i], own[j]):
                    own[i], own[j] = self.hold_axes(own[i], shared), self.hold_axes(own[j], shared)
            pairs = [(i, j) for i in range(len(own)) for j in range(len(done))]
            like = {i: j for i, j in pairs if functional(own[i], done[j])}
            for i, j in pairs:
                f, g, matched = own[i], done[j], i in like and j in like.values()
                if like.get(i) == j or (axes(f) == axes(g) and not matched):
                    own[i], done[j] = none, self.join(f, g)
                elif (shared := axes(f) & axes(g)) and not matched:
                    own[i], done[j] = self.hold_axes(f, shared), self.hold_axes(g, shared)
            done += own
        return [f for f in done if bool((f >= UNIT).any())]

    def join(self, f: Tensor, g: Tensor) -> Tensor:
        """Tie two factors entry by entry; constants give way to units."""
        f, g = sorted((f, g), key=Tensor.numel)
        u, v = torch.broadcast_tensors(f, g)
        fixed = (u < CONSTANT) | (v < CONSTANT)
        self.pin(torch.cat([u[fixed], v[fixed]]))
        first = u.where(u >= UNIT, v).where(~fixed, 0)
        tag = positions(u.shape, axes(g) - axes(f)) + 1
        self.fact(first, v.where((u >= UNIT) & (v >= CONSTANT), CONSTANT), tag)
        return f if f.numel() < g.numel() and bool((f >= UNIT).all()) else first

    def compact(self, codes: Tensor, alone: str = "is taken out alone") -> list[Tensor]:
        """The factor, if any, of these codes: only the axes that it needs, and distinct slots."""
        codes = codes[tuple(slice(None) if s else slice(1) for s in codes.stride())]
        for k in axes(codes):  # one along which all units move as one is not needed
            if units.as_one(codes.narrow(k, 0, 2), k) and units.as_one(codes, k):
                codes = codes.narrow(k, 0, 1)
        held = codes >= UNIT
        if codes.numel() == 1 or not bool(held.any()):
            self.pin(codes, alone)
            return []
        order = codes[held].sort().values
        if bool((order[1:] > order[:-1]).all()):
            return [codes]
        slot = (codes & units.SLOT).unique(return_inverse=True)[1].where(held, 0)
        sorted_, order = (codes >> 32 << 32 | slot).flatten().sort(stable=True)
        copy = torch.arange(len(order)) - torch.searchsorted(sorted_, sorted_)
        copy = torch.empty_like(copy).scatter(0, order, copy).view(codes.shape).where(held, 0)
        return [codes >> 32 << 32 | slot * (int(copy.max()) + 1) + copy]

    def move(self, run: Callable[..., Any], *xs: Tensor) -> list[list[Tensor]]:
        """Data movement, run on each factor of the tensors: the factors of each result."""
        lanes: dict[Any, dict[int, Tensor]] = {}  # factors that go together
        alone = all(len(x.factors) < 2 for x in xs if isinstance(x, Marked))
        for i, x in enumerate(xs):
            seen = Counter[frozenset[int]]()
            for f in x.factors if isinstance(x, Marked) else ():
                seen[axes(f)] += 1
                lanes.setdefault((alone or axes(f), seen[axes(f)]), {})[i] = f
        zero = (not isinstance(x, Marked) and not bool(x.any()) for x in xs)
        blank = [torch.tensor(CONSTANT * z) for z in zero]
        found: list[list[Tensor]] = []
        for lane in [*lanes.values()] or [{}]:
            codes = [lane.get(i, code) for i, code in enumerate(blank)]
            parts = [code.expand(x.shape) for code, x in zip(codes, xs, strict=True)]
            outs = tree_leaves(run(parts))
            found = found or [[] for _ in outs]
            for factors, out in zip(found, outs, strict=True):
                factors += self.compact(out)
        return found

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on marked tensors: by its rule, by simpler ones, or else all is pinned."""
        name = units.op_name(func)
        if re.search("^new_|_like$", name):  # a constant
            return func(*tree_map_only(Marked, lambda x: torch.zeros(x.shape), args), **kwargs)
        kind = "pointwise" if torch.Tag.pointwise in func.tags else ""
        kind = "in space" if re.search(r"(pool|pad|upsample_\w+)\dd", name) else kind
        rule = self.rules.get(name) or self.rules.get(kind)
        if not rule:
            simpler = decomposition_table.get(func, lambda *_, **__: NotImplemented)
            for way in (func.decompose, simpler):
                if (out := way(*args, **kwargs)) is not NotImplemented:
                    return out
        xs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Marked)]
        for x in xs:
            x.used = True
            for f in x.factors if name not in ALIASES else ():
                self.fact(f)
        self.func, self.named = func, {a.name: a.default_value for a in func._schema.arguments}
        self.named |= dict(zip(self.named, args, strict=False)) | kwargs
        found = rule(self, *self.named.values()) if rule else None
        for x in xs if found is None else ():
            self.fix(x, range(x.dim()), f"{name} has no rule (use others, or see symmetry.RULES)")
        found = [found.factors] if isinstance(found, Marked) else found or []
        found += [[] for _ in func._schema.returns]
        taps = list(dict.fromkeys(t for x in xs for t in x.taps))
        if name not in self.passing:
            unary = len(taps) == len({id(x) for x in xs}) == 1
            taps = [Tap(found[0], (taps[0].pre or taps[0]) if unary else None)]
        args, kwargs = tree_map_only(Tensor, units.bare, (args, kwargs))
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise units.SymmetryError(
                f"find: {name} needs values{self.where()}; it says: {str(error).splitlines()[0]} "
                "Fix: control flow must not depend on the data (torch.where instead of if); or "
                "take the part of the network without it."
            ) from error
        outs = [Marked(self, o, f, taps) for o, f in zip(tree_leaves(out), found, strict=False)]
        return outs[0] if isinstance(out, Tensor) else outs
