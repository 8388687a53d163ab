"""Follow every hidden unit of a network through its operators (chapter 3).

The network runs once on tensors that carry labels instead of values. Each index of each axis of
each parameter is a unit. Data movement moves the labels as it would move the values; an operator
that acts entry by entry ties the units that meet; a sum over units forgets them. What operators see
of units is recorded as *facts*: sets of tied units of which the same facts hold are
interchangeable. Whatever is not understood pins the units that it touches: ignorance loses
symmetry, but never soundness.
"""

import re
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.symmetry import copies
from mcnotes.symmetry.foreign import first_line, place
from mcnotes.symmetry.units import (
    BITS,
    CONSTANT,
    UNIT,
    Labelled,
    SymmetryError,
    Tap,
    Tape,
    axes,
    factors_of,
    functional,
    independent,
    is_constant,
    is_uniform,
    labelled_in,
    op_name,
    padded,
    positions,
    units_in,
    units_of,
    with_distinct_slots,
    without_needless_axes,
    without_values,
)

ALIASES = {"unsqueeze", "squeeze", "expand", "clone", "_to_copy", "detach", "alias"}
"""Operators that change neither which units there are, nor their order; they tell no facts."""

LOOK_UPS = {"index": 1, "embedding": 1, "index_select": 2}
"""Operators that choose by indices, and which of their arguments these are."""
FILLING = {"full", "zeros", "ones", "new_full", "new_zeros", "new_ones", "fill", "zero"} | {
    f"{name}_like" for name in ("full", "zeros", "ones")
}
"""Operators that fill a new tensor with one number."""
EVEN = ALIASES | set(
    re.split(
        " ",
        "view _unsafe_view permute transpose t slice select split split_with_sizes unbind stack "
        "repeat roll flip index index_select sum mean amax amin prod any all fill zero copy",
    )
)
"""Operators, beside pointwise ones, that give one number throughout if each argument does."""


class LostWrite(SymmetryError):
    """Units would be written into a tensor that carries no labels."""


class Trace(Tape):
    """One run of a network on labelled tensors: what it shows of the units.

    rules: what operators do to units, by the operators' names (see `rules`). moving: the names of
    operators that only move data; passing: of those whose result is no activation of its own.
    modules: for the id of each module, how to name it in reasons. constants: ids of tensors that
    are what they are. merged [units]: in a second trace, the code that stands for each unit of the
    first.
    """

    def __init__(
        self,
        rules: Mapping[str, Callable[..., Any]],
        moving: Collection[str],
        passing: Collection[str],
        modules: Mapping[int, str],
        constants: Collection[int] = (),
        merged: Tensor | None = None,
    ) -> None:
        super().__init__(self.name_taps)
        self.rules, self.moving, self.passing, self.modules = rules, moving, passing, modules
        self.constants, self.merged = constants, merged
        self.adopted: dict[int, tuple[Tensor, Tensor]] = {}  # by id: what `adopt` got and made
        self.next_unit = 2
        self.facts: list[Tensor] = []  # each [4, entries]: event, code, other code, tag
        self.pins: list[tuple[Tensor, str]] = []  # units, and why they must stay
        self.seen: list[Tensor] = []  # units, see `see`
        self.contracted: dict[Tap, None] = {}  # what contractions read, in order
        self.read: list[Tensor] = []  # the units of each tensor that a sum or a product reads
        self.blocks: list[tuple[Tensor, Tensor]] = []  # units, and in which block, see `block`

    def parameter(self, tensor: Tensor, groups: int) -> Labelled:
        """A parameter, each axis of which gets units; groups: of the convolution it serves."""
        factors: list[Tensor] = []
        for k, n in enumerate(tensor.shape):
            unit = positions(tensor.shape, {k}) + self.next_unit
            if k == 1 and groups > 1:  # each group has input channels of its own
                unit = unit + positions(tensor.shape, {0}) // (len(tensor) // groups) * n
            self.next_unit = int(unit.max()) + 1 if n else self.next_unit
            if n > 1:
                factors += self.factor(unit << BITS if self.merged is None else self.merged[unit])
        for f in factors:
            self.record(f)
        return Labelled(self, tensor, factors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self.adopt, (args, kwargs or {}))
        if op_name(func) == "as_strided":
            self.refuse_a_part_of_memory(args[0])
        if op_name(func) == "_linalg_check_errors":  # of values, that is
            return None
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(FunctionalTensor, partial(self.label_made, op_name(func)), out)

    def adopt(self, x: Tensor) -> Tensor:
        """A tensor that was there before the run, and is no parameter: its entries are fixed.

        Even if all of them are one number, for they may be trained: raw parameters, reached by a
        list, a closure or a hook. Buffers that no state dict holds are what they are.
        """
        followed = isinstance(x, FunctionalTensor | Labelled) or torch._is_functional_tensor(x)
        if followed or x.numel() < 2:
            return x
        if id(x) not in self.adopted:
            known = self.label_known(x.detach().clone(), id(x) in self.constants)
            self.adopted[id(x)] = x, FunctionalTensor.to_functional(known)
        return self.adopted[id(x)][1]

    def label_made(self, name: str, x: FunctionalTensor) -> Tensor:
        """A tensor that an operator made of no other: as any other, it is seen from then on."""
        inner = torch._from_functional_tensor(x.elem)
        if isinstance(inner, Labelled) or inner.numel() < 2:
            return x
        return FunctionalTensor.to_functional(self.label_known(inner, name in FILLING))

    def label_known(self, values: Tensor, constant: bool = False) -> Labelled:
        """A tensor of known values, without units."""
        values = values.cpu()
        x = Labelled(self, values)
        x.value, x.constant = values, constant and is_uniform(values)
        return x

    @property
    def unit_count(self) -> int:
        """The number of units; those that are none, 0 and 1, count."""
        return self.next_unit if self.merged is None else int(units_of(self.merged).max()) + 1

    def name_taps(self, name: str, x: Any) -> None:
        """Name the results that an operator of the network brings."""
        if isinstance(x, FunctionalTensor):
            x = torch._from_functional_tensor(x.elem)
        for tap in x.taps if isinstance(x, Labelled) else ():
            if not tap.name:
                tap.name, tap.factors, tap.given = name, x.factors, x.given

    # What is recorded of units

    def record(self, factor: Tensor, other: Tensor | int = 0, tag: Tensor | int = 0) -> None:
        """Record a fact: at each unit of the factor there are this other code and this tag."""
        columns = map(torch.as_tensor, (len(self.facts), factor, other, tag))
        rows = torch.stack(torch.broadcast_tensors(*columns)).flatten(1)
        self.facts.append(rows[:, rows[1] >= UNIT])

    def pin(self, codes: Tensor, why: str = "meets something fixed") -> None:
        """Units must stay where they are."""
        if len(units := units_in(codes)):
            self.pins.append((units, why + self.where()))

    def pin_axes(self, x: Any, dims: Iterable[int], why: str) -> None:
        """An operator tells positions along `dims` apart: units there are pinned."""
        for f in factors_of(x):
            if axes(f).intersection(dims):
                self.pin(f, why)

    def pin_all(self, x: Any, why: str) -> None:
        """An operator does what is not understood: all units of a tensor are pinned."""
        self.pin_axes(x, range(x.dim()), why)

    def where(self) -> str:
        """The module at work, and the line of the network's own code."""
        return place(traceback.walk_stack(None), self.modules)

    def hold_axes(self, factor: Tensor, dims: frozenset[int]) -> Tensor:
        """Units must keep their place along `dims`; what remains of the factor."""
        self.record(factor, 0, positions(factor.shape, dims))
        if dims < axes(factor):
            return factor
        self.pin(factor)
        return factor * 0

    def tie(self, f: Tensor, g: Tensor) -> Tensor:
        """Tie the units of two factors entry by entry: the one factor that stands for both.

        Constants give way to units; units that meet something fixed are pinned. Where the smaller
        factor is repeated along an axis of the larger one, units keep their place along this axis.
        """
        f, g = sorted((f, g), key=Tensor.numel)
        u, v = torch.broadcast_tensors(f, g)
        fixed = (u < CONSTANT) | (v < CONSTANT)
        self.pin(torch.cat([u[fixed], v[fixed]]))
        first = u.where(u >= UNIT, v).where(~fixed, 0)
        repeated = positions(u.shape, axes(g) - axes(f)) + 1
        self.record(first, v.where((u >= UNIT) & (v >= CONSTANT), CONSTANT), repeated)
        return f if f.numel() < g.numel() and bool((f >= UNIT).all()) else first

    def factor(self, codes: Tensor, alone: str = "is taken out alone") -> list[Tensor]:
        """The factor, if any, of these codes: only the axes that it needs, and distinct slots.

        A unit without any other beside it is pinned; `alone` is the reason.
        """
        codes = without_needless_axes(codes)
        if codes.numel() == 1 or not bool((codes >= UNIT).any()):
            self.pin(codes, alone)
            return []
        return [with_distinct_slots(codes)]

    # What becomes of units

    def combine_pointwise(self, *xs: Any) -> list[Tensor]:
        """Any function of tensors that acts entry by entry: the factors of its result.

        xs: tensors, plain or labelled, of shapes that can be broadcast; anything else is ignored.
        """
        tensors = [x for x in tree_leaves(xs) if isinstance(x, Tensor)]
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        result: list[Tensor] = []
        for x in tensors:
            result = self.meet(self.reconcile(factors_of(x), len(shape)), result)
        fixed = [axis for x in tensors for axis in fixed_axes(x, len(shape))]
        whole = sorted({k for k, equal in fixed if equal is None})
        result = self.meet([positions(shape, {k}) * 0 for k in whole], result)
        for k, equal in fixed:
            for f in result:
                if equal is not None and k in axes(f):  # units may move where they meet the same
                    self.record(f, 0, equal.view([-1 if i == k else 1 for i in range(f.dim())]))
        return [f for f in result if bool((f >= UNIT).any())]

    def reconcile(self, factors: Iterable[Tensor], dims: int) -> list[Tensor]:
        """Factors of one tensor, such that each lets its units move without moving another's."""
        own: list[Tensor | None] = [padded(f, dims) for f in factors]
        for i, j in combinations(range(len(own)), 2):
            f, g = own[i], own[j]
            if f is None or g is None or not axes(f) & axes(g) or independent(f, g):
                continue
            if axes(f) == axes(g) and functional(f, g):
                # The finer one stands for both: what is independent of it is so of the other.
                finer = sorted((f, g), key=lambda h: -len(units_in(h).unique()))
                own[i], own[j] = None, self.tie(*finer)
            else:
                shared = axes(f) & axes(g)
                own[i], own[j] = self.hold_axes(f, shared), self.hold_axes(g, shared)
        return [f for f in own if f is not None]

    def meet(self, own: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        """The factors that remain where two sets of reconciled factors meet entry by entry.

        A factor has one partner at most, with which it is tied. Then it moves as its partner does,
        and so it lets the partner's fellows be. A factor without a partner keeps its place along
        all axes that it shares with any factor of the other set.
        """
        partner = partners(own, others)
        taken = {j: i for i, j in partner.items()}
        held, others_held = [*own], [*others]
        for i, f in enumerate(own):
            for j, g in enumerate(others):
                shared = axes(f) & axes(g)
                if shared and i not in partner:
                    held[i] = self.hold_axes(held[i], shared)
                if shared and j not in taken:
                    others_held[j] = self.hold_axes(others_held[j], shared)
        tied = [
            self.tie(own[taken[j]], g) if j in taken else others_held[j]
            for j, g in enumerate(others)
        ]
        return tied + [f for i, f in enumerate(held) if i not in partner]

    def move(self, run: Callable[[list[Tensor]], Any], *xs: Tensor) -> list[list[Tensor]]:
        """Data movement, run on each factor of the tensors: the factors of each result.

        run: takes a list of tensors, as long and of the same shapes as xs, and gives one tensor or
        several. A plain tensor of zeros is a constant; any other is fixed.
        """
        blank = [CONSTANT if is_zero(x) else 0 for x in xs]
        found: list[list[Tensor]] = []
        for lane in lanes(xs) or [{}]:
            codes = [lane.get(i, torch.tensor(code)) for i, code in enumerate(blank)]
            parts = [code.expand(x.shape) for code, x in zip(codes, xs, strict=True)]
            results = tree_leaves(run(parts))
            found = found or [[] for _ in results]
            for factors, result in zip(found, results, strict=True):
                factors += self.factor(result)
        return found

    # What an operator does

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on labelled tensors.

        By its rule if it has one, else by the simpler operators of which it is made; or else all
        units that it touches are pinned. Raises SymmetryError if it needs values.
        """
        name = op_name(func)
        if re.search("^new_|_like$", name):  # only the shape is taken
            return func(*tree_map_only(Labelled, zeros, args), **kwargs)
        given = args
        if name in LOOK_UPS:
            args = self.looked_up(args, LOOK_UPS[name])
        xs = labelled_in((args, kwargs))
        if not xs:
            return self.compute(func, args, kwargs, name)
        rule = self.rule(func, name)
        if rule is None:
            try:
                simpler = self.decompose(func, args, kwargs)
            except LostWrite:
                simpler = NotImplemented
            if simpler is not NotImplemented:
                return simpler
        self.refuse_lost_write(func, args, kwargs)
        self.use(xs, name)
        factors = self.apply(rule, func, args, kwargs)
        if factors is None:
            for x in xs:
                self.pin_all(x, f"{name} has no rule (use others, or see symmetry.RULES)")
        out = self.run_without_values(func, args, kwargs, name)
        results = self.label(out, factors, xs, name)
        if isinstance(results, Labelled):
            results.copies = self.copies_in(results, rule, func, given, kwargs)
        if all(x.value is not None for x in xs):
            computed = func(*known_values(args), **known_values(kwargs))
            for x, y in zip(tree_leaves(results), tree_leaves(computed), strict=True):
                x.value, x.stored = y, True
        return results

    def copies_in(
        self, out: Tensor, rule: Any, func: Any, args: Any, kwargs: Any
    ) -> copies.Markers:
        """Where the result of an operator is known to repeat itself."""
        if rule is not self.rules["pointwise"]:
            return copies.moved(func, op_name(func), args, out.shape)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return {}
        xs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return copies.met(xs, out.shape)

    def compute(self, func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """The results of an operator on tensors without units, of which all is known."""
        constant = all(x.constant for x in tree_leaves((args, kwargs)) if isinstance(x, Labelled))
        constant &= name in EVEN or torch.Tag.pointwise in func.tags
        constant |= name in FILLING
        out = func(*known_values(args), **known_values(kwargs))
        return tree_map_only(Tensor, partial(self.label_known, constant=constant), out)

    def looked_up(self, args: Sequence[Any], at: int) -> list[Any]:
        """The arguments of a look-up, its indices (the argument at `at`) as far as they are known.

        Those that are stored may be others in another network: what they choose from is pinned.
        """
        x, index = args[0], args[at]
        indices = index if isinstance(index, list | tuple) else [index]
        stored = [i for i in indices if isinstance(i, Labelled) and i.stored]
        if stored and not labelled_in(x):
            return [*args]
        indices = [plain for i in indices for plain in plain_indices(i)]
        if stored:
            many = isinstance(index, list | tuple)
            dims = [k for k, i in enumerate(indices) if i is not None] if many else [0]
            self.pin_axes(x, dims if at == 1 else [args[1] % x.dim()], "is looked up by a buffer")
            for i in stored:
                self.pin_all(i, "is an index")
                i.used = True
        return [
            *args[:at],
            indices if isinstance(index, list | tuple) else indices[0],
            *args[at + 1 :],
        ]

    def rule(self, func: Any, name: str) -> Callable[..., Any] | None:
        """The rule of an operator, or of its kind."""
        if rule := self.rules.get(name):
            return rule
        if re.search(r"(pool|pad|upsample_\w+)\dd", name):
            return self.rules["in_space"]
        return self.rules["pointwise"] if torch.Tag.pointwise in func.tags else None

    def decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator's decomposition gives; NotImplemented if it has none."""
        for way in (func.decompose, decomposition_table.get(func)):
            if way is not None:
                out = way(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        return NotImplemented

    def refuse_lost_write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise LostWrite if an operator would write units into a tensor without labels."""
        for k, argument in enumerate(func._schema.arguments):
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
            if argument.is_write and len(tensors) > len(labelled_in(tensors)):
                raise LostWrite(
                    f"find: {op_name(func)} writes units into a tensor that is no parameter, "
                    f"buffer or result of the network{self.where()}. Fix: make a new tensor."
                )

    def refuse_a_part_of_memory(self, x: Tensor) -> None:
        """Raise SymmetryError if x is a view that leaves out, or repeats, some of what it views."""
        extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        if not x.numel() == extent == x.untyped_storage().size() // x.element_size():
            raise SymmetryError(
                f"find: as_strided reads memory around a part of a tensor{self.where()}, of which "
                "nothing is known. Fix: index the whole tensor instead."
            )

    def use(self, xs: Iterable[Labelled], name: str) -> None:
        """Record that an operator reads tensors, and what it sees of their units."""
        meets_inputs = name not in self.moving and any(x.given for x in xs)
        for x in xs:
            x.used = True
            for source in x.sources:
                self.pin_all(source, f"gives a second result that has no rule, to {name}")
            x.sources = ()
            for f in x.factors:
                if name not in ALIASES:
                    self.record(f)
                if meets_inputs:
                    self.see(f)

    def see(self, factor: Tensor) -> None:
        """Units are more than moved: they meet something given, or a sum takes all of them."""
        self.seen.append(units_in(factor).unique())

    def block(self, factor: Tensor, dims: Collection[int]) -> None:
        """Units are summed along `dims` only: those at one place of the other axes are a block.

        It may move as a whole where its units must keep their order, as in rotary positions.
        """
        self.read.append(units_in(factor).unique())
        if (
            self.merged is None
            and axes(factor).intersection(dims)
            and axes(factor).difference(dims)
        ):
            rest = positions(factor.shape, axes(factor).difference(dims)).expand_as(factor)
            held = factor >= UNIT
            self.blocks.append((units_of(factor[held]), rest[held]))

    def apply(
        self, rule: Callable[..., Any] | None, func: Any, args: Any, kwargs: Any
    ) -> list[list[Tensor]] | None:
        """The factors of each result of an operator by its rule; None if the rule cannot tell."""
        # A rule may look up the operator, and its arguments by name.
        self.func, schema = func, func._schema
        self.arguments = {a.name: a.default_value for a in schema.arguments}
        self.arguments |= dict(zip(self.arguments, args, strict=False)) | kwargs
        found = rule(self, *self.arguments.values()) if rule else None
        return [factors_of(found)] if isinstance(found, Tensor) else found

    def run_without_values(self, func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """The results of an operator as meta tensors: their shapes, strides and dtypes."""
        args, kwargs = tree_map_only(Tensor, without_values, (args, kwargs))
        if "device" in kwargs:  # there is nothing to copy to another one
            kwargs = {**kwargs, "device": "meta"}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise SymmetryError(
                f"find: {name} needs values{self.where()}; PyTorch says {first_line(error)}. "
                "Fix: control flow must not depend on the data (torch.where instead of if); "
                "or take the part of the network without it."
            ) from error

    def label(
        self, out: Any, factors: list[list[Tensor]] | None, xs: list[Labelled], name: str
    ) -> Any:
        """The results of an operator on `xs` as labelled tensors."""
        taps = self.taps_of_result(factors[0] if factors else (), xs, name)
        results = []
        for k, x in enumerate(tree_leaves(out)):
            known = factors is None or k < len(factors)
            if isinstance(x, Tensor):
                x = Labelled(self, x, factors[k] if factors and known else (), taps)
                x.given = any(arg.given for arg in xs)
                # What a rule says nothing of may depend on units in any way, but is seldom used.
                x.sources = () if known else xs
            results.append(x)
        return results[0] if isinstance(out, Tensor) else results

    def taps_of_result(
        self, factors: Iterable[Tensor], xs: list[Labelled], name: str
    ) -> Sequence[Tap]:
        """The taps of an operator's result: those of its arguments, or a new one."""
        taps = list(dict.fromkeys(t for x in xs for t in x.taps))
        if name in self.passing:
            return taps
        unary = len(taps) == len({id(x) for x in xs}) == 1
        return [Tap([*factors], (taps[0].pre or taps[0]) if unary else None)]


def plain_indices(index: Any) -> Sequence[Any]:
    """An index as plain tensors, if its values are known; a mask as one for each of its axes."""
    values = index.value if isinstance(index, Labelled) and index.value is not None else index
    if (
        isinstance(values, Tensor)
        and values.dtype == torch.bool
        and not isinstance(values, Labelled)
    ):
        return values.nonzero(as_tuple=True)
    return [values]


def is_zero(x: Tensor) -> bool:
    """Whether all entries are zero, whatever shapes the inputs have."""
    if isinstance(x, Labelled):
        return x.constant and x.value is not None and not bool(x.value.any())
    return not bool(x.any())


def known_values(arguments: Any) -> Any:
    """Arguments of an operator with their values."""
    return tree_map_only(Labelled, lambda x: x.value, arguments)


def zeros(x: Tensor) -> Tensor:
    """Zeros of the same shape and kind, without labels."""
    return torch.zeros(x.shape, dtype=x.dtype)


def fixed_axes(x: Tensor, dims: int) -> Iterator[tuple[int, Tensor | None]]:
    """The axes, of `dims` after broadcasting, along which entries differ that are no units.

    And which of these are equal, if it is known.
    """
    if is_constant(x):
        return
    live = frozenset[int]().union(*map(axes, factors_of(x)))
    for k, n in enumerate(x.shape):
        if n > 1 and x.stride(k) and k not in live:
            yield k + dims - x.dim(), copies.marker(x, k)


def partners(own: list[Tensor], others: list[Tensor]) -> dict[int, int]:
    """Which factor of `others` each one of `own` is to be tied with, one to one.

    Those of which one refines the other come first; then those that at least share their axes.
    """
    found: dict[int, int] = {}

    def pair_up(fit: Callable[[Tensor, Tensor], bool]) -> None:
        for i, f in enumerate(own):
            free = (j for j in range(len(others)) if j not in found.values())
            if i not in found and (j := next((j for j in free if fit(f, others[j])), -1)) >= 0:
                found[i] = j

    pair_up(functional)
    pair_up(lambda f, g: bool(axes(f)) and axes(f) == axes(g))
    return found


def lanes(xs: Iterable[Tensor]) -> list[dict[int, Tensor]]:
    """The factors of several tensors that are moved together: in each lane, one for each number.

    Factors go together if they live on the same axes, or if no tensor has more than one.
    """
    alone = all(len(factors_of(x)) < 2 for x in xs)
    found: dict[Any, dict[int, Tensor]] = {}
    for i, x in enumerate(xs):
        count = Counter[frozenset[int]]()
        for f in factors_of(x):
            count[axes(f)] += 1
            found.setdefault((alone or axes(f), count[axes(f)]), {})[i] = f
    return [*found.values()]
