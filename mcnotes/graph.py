"""Follow every hidden unit of a network through its operators (chapter 3).

Each index of each axis of each parameter is a *unit*. The network runs once on tensors without
values, which carry *factors*: integer arrays of codes, `unit << 32 | slot`, that say which unit
(0: something fixed, 1: a constant) stands at each position along some axes, and at which of its
slots. Data movement runs literally on the codes; operators entry by entry tie the units that meet;
sums close them. What operators see of units are *facts*: sets of tied units that have the same
facts are interchangeable. What is not understood is pinned: ignorance loses symmetry and never
soundness.
"""

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CONSTANT, UNIT, SLOT = 1 << 32, 2 << 32, (1 << 32) - 1  # codes from UNIT on are units


class SymmetryError(ValueError):
    """A network cannot be followed, or a symmetry does not hold; the text says why and where."""


@dataclass(eq=False)
class Tap:
    """A result in the network: its name, its factors, and what entered its nonlinearity."""

    factors: Sequence[Tensor] = ()
    pre: "Tap | None" = None
    name: str = ""


class Marked(Tensor):
    """A tensor without values that carries factors. taps: the results of which it is made."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, walk: "Walk", bare: Tensor, factors: Any = (), taps: Any = ()) -> "Marked":
        shape, strides = bare.shape, bare.stride()
        self = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=bare.dtype)
        self.walk, self.bare, self.taps, self.used = walk, bare, taps, False
        self.factors = [f[(None,) * (bare.dim() - f.dim())] for f in factors]
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        walk = next(x.walk for x in tree_leaves((args, kwargs)) if isinstance(x, Marked))
        return walk.operator(func, args, kwargs or {})


@cache
def op_name(func: Any) -> str:
    """`relu` for aten::relu and aten::relu_; one name for BatchNorm on all devices."""
    name = re.sub("^aten::|_$", "", func._schema.name)
    return re.sub(r"^\w*batch_norm\w*", "native_batch_norm", name)


class Tape(TorchDispatchMode):
    """Show each result of an operator, under a name that is the same in every run of a network."""

    def __init__(self, show: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.show, self.count = show, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op_name(func)
        self.count[name] += 1
        out = self.run(func, args, kwargs or {})
        self.show(f"{name}:{self.count[name]}", out[0] if isinstance(out, list | tuple) else out)
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a subclass may replace."""
        return func(*args, **kwargs)


def axes(factor: Tensor) -> frozenset[int]:
    """The axes along which a factor lives; its size along all others is 1."""
    return frozenset(k for k, n in enumerate(factor.shape) if n > 1)


def positions(shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """Number the positions along `dims`; size 1 along all other axes."""
    size = torch.Size(n if k in dims else 1 for k, n in enumerate(shape))
    return torch.arange(size.numel()).view(size)


def distinct(*columns: Tensor) -> int:
    """How many different rows integer columns have."""
    return torch.stack([c.flatten() for c in torch.broadcast_tensors(*columns)]).unique(dim=1).shape[1]


def functional(f: Tensor, g: Tensor) -> bool:
    """Whether one labelling refines the other, so that tying them merges no more than it must."""
    if not (axes(f) <= axes(g) or axes(g) <= axes(f)):
        return False
    u, v = ((t >> 32).flatten() for t in torch.broadcast_tensors(f, g))
    u, v = u[both := (u > 1) & (v > 1)], v[both]
    return bool(both.any()) and distinct(u, v) == max(distinct(u), distinct(v))


def independent(f: Tensor, g: Tensor) -> bool:
    """Whether units of two factors are as rows and columns: each pair meets once, in like slots."""
    if axes(f) != axes(g) or bool((torch.minimum(f, g) < UNIT).any()):
        return False
    u, v, s, t = f >> 32, g >> 32, f & SLOT, g & SLOT
    rows = distinct(u, v) == f.numel() and distinct(s, v) == distinct(v)
    return rows and distinct(t, u) == distinct(u)


class Walk(Tape):
    """One run of a network on marked tensors. names: of its modules, by id. merged: in a second
    walk, the code that stands for each unit of the first."""

    def __init__(self, names: dict[int, str], merged: Tensor | None = None) -> None:
        super().__init__(self.label)
        self.facts: list[Tensor] = []  # rows: event, code, other code, tag
        self.pins: list[tuple[Tensor, str]] = []
        self.read: dict[Tap, None] = {}  # what contractions read
        self.opened: list[Tensor] = []  # the units of what they give
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # storages with units, their codes
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
                factors += self.settle(unit << 32 if self.merged is None else self.merged[unit])
        for f in factors:
            self.fact(f)
        return Marked(self, tensor.detach().to("meta"), factors)

    def label(self, name: str, x: Any) -> None:
        """Name the results that an operator of the network brings."""
        for tap in x.taps if isinstance(x, Marked) else ():
            if not tap.name:
                tap.name, tap.factors = name, x.factors

    # What becomes of units

    def fact(self, factor: Tensor, other: Tensor | int = 0, tag: Tensor | int = 0) -> None:
        """Record what (broadcast) holds wherever there is a unit."""
        columns = map(torch.as_tensor, (len(self.facts), factor, other, tag))
        rows = torch.stack(torch.broadcast_tensors(*columns))
        self.facts.append(rows[:, rows[1] >= UNIT])

    def pin(self, factor: Tensor, why: str = "meets something fixed") -> None:
        """Units must stay where they are."""
        if len(units := factor[factor >= UNIT] >> 32):
            self.pins.append((units, why + self.where()))

    def where(self) -> str:
        """The module at work, and the line of the network's own code."""
        frames = [(f.f_locals.get("self"), f, n) for f, n in traceback.walk_stack(None)]
        inside = [k for k, (it, _, _) in enumerate(frames) if id(it) in self.names]
        if not inside:
            return ""
        files = [(f.f_code.co_filename, n) for _, f, n in frames[: inside[-1] + 1]]
        own = [f", {f.rsplit('/', 1)[-1]}:{n}" for f, n in files if "/torch/" not in f]
        own = [at for at in own if not re.match(", (graph|symmetry).py", at)]
        return f" at {self.names[id(frames[inside[0]][0])]}{''.join(own[:1])}"

    def fix(self, x: Marked, dims: Iterable[int], why: str) -> None:
        """An operator tells positions along `dims` apart: units there are pinned."""
        for f in (f for f in x.factors if axes(f).intersection(dims)):
            self.pin(f, why)

    def stay(self, factor: Tensor, dims: frozenset[int]) -> Tensor:
        """Units must keep their place along `dims`; what remains of the factor."""
        self.fact(factor, 0, positions(factor.shape, dims))
        if dims < axes(factor):
            return factor
        self.pin(factor)
        return factor * 0

    def meet(self, *xs: Any) -> list[Tensor]:
        """Any function of tensors entry by entry: the factors of the result."""
        xs = [x for x in tree_leaves(xs) if isinstance(x, Tensor)]
        shape = torch.broadcast_shapes(*(x.shape for x in xs))
        rank, done, fixed = len(shape), list[Tensor](), set[int]()
        tensors: list[list[Tensor]] = []
        for x in xs:
            marks = x.factors if isinstance(x, Marked) else []
            varies = isinstance(x, Marked) or bool((x != x.flatten()[:1].squeeze()).any())
            wide = {k for k, n in enumerate(x.shape) if varies and n > 1 and x.stride(k)}
            fixed |= {k + rank - x.dim() for k in wide.difference(*map(axes, marks))}
            tensors.append([f[(None,) * (rank - f.dim())] for f in marks])
        for own in (*tensors, [positions(shape, {k}) * 0 for k in fixed]):
            for i, j in combinations(range(len(own)), 2):  # both act on x
                if (shared := axes(own[i]) & axes(own[j])) and not independent(own[i], own[j]):
                    own[i], own[j] = self.stay(own[i], shared), self.stay(own[j], shared)
            pairs = [(i, j) for i in range(len(own)) for j in range(len(done))]
            like = {i: j for i, j in pairs if functional(own[i], done[j])}
            for i, j in pairs:
                f, g = own[i], done[j]
                if like.get(i) == j or axes(f) == axes(g) and not (i in like and j in like.values()):
                    own[i], done[j] = torch.zeros([1] * rank, dtype=torch.long), self.join(f, g)
                elif (shared := axes(f) & axes(g)) and not (i in like and j in like.values()):
                    own[i], done[j] = self.stay(f, shared), self.stay(g, shared)
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

    def settle(self, codes: Tensor, alone: str = "is taken out alone") -> list[Tensor]:
        """The factor, if any, of these codes: only the axes that it needs, and distinct slots."""
        codes = codes[tuple(slice(None) if s else slice(1) for s in codes.stride())]
        for k, n in enumerate(codes.shape):  # an axis goes if all units move along it as one
            first = codes.narrow(k, 0, 1)
            if n > 1 and bool((codes >> 32 == first >> 32).all()):
                drift = (codes - first).movedim(k, 0).reshape(n, -1)[:, (first >= UNIT).flatten()]
                codes = first if bool((drift == drift[:, :1]).all()) else codes
        held = codes >= UNIT
        if codes.numel() == 1 or not bool(held.any()):
            self.pin(codes, alone)
            return []
        slot = (codes & SLOT).unique(return_inverse=True)[1].where(held, 0)
        sorted_, order = (codes >> 32 << 32 | slot).flatten().sort(stable=True)
        copy = torch.arange(len(order)) - torch.searchsorted(sorted_, sorted_)
        copy = torch.empty_like(copy).scatter(0, order, copy).view(codes.shape).where(held, 0)
        return [codes >> 32 << 32 | slot * (int(copy.max()) + 1) + copy]

    def move(self, run: Callable[..., Any], *xs: Tensor) -> list[list[Tensor]]:
        """Data movement, run on each factor of the tensors: the factors of each result."""
        lanes: dict[Any, dict[int, Tensor]] = {}  # factors that go together
        for i, x in enumerate(xs):
            seen = Counter[frozenset[int]]()
            for f in x.factors if isinstance(x, Marked) else ():
                seen[axes(f)] += 1
                lanes.setdefault((axes(f), seen[axes(f)]), {})[i] = f
        blank = [CONSTANT * (not isinstance(x, Marked) and not bool(x.any())) for x in xs]
        found: list[list[Tensor]] = []
        for lane in [*lanes.values()] or [{}]:
            parts = [lane.get(i, torch.tensor(c)).expand(x.shape) for i, (x, c) in enumerate(zip(xs, blank))]
            outs = tree_leaves(run(parts))
            found = found or [[] for _ in outs]
            for factors, out in zip(found, outs, strict=True):
                factors += self.settle(out)
        return found

    # Tensors that the network makes itself, and fills with units

    def load(self, t: Tensor) -> Tensor:
        """A plain tensor; marked, if units were written into it."""
        known = None if isinstance(t, Marked) else self.memory.get(t.untyped_storage().data_ptr())
        if not known:
            return t
        codes = known[1].as_strided(t.shape, t.stride(), t.storage_offset())
        if bool((codes == CONSTANT).all()):
            return torch.zeros_like(t)
        return Marked(self, t.to("meta"), self.settle(codes))

    def store(self, t: Tensor, x: Marked) -> Tensor:
        """Note that x was written into t, a plain tensor or a part of one."""
        storage, best = t.untyped_storage(), max(x.factors, key=Tensor.numel, default=None)
        flat = t.new_empty(0).set_(storage)
        codes = self.memory.setdefault(storage.data_ptr(), (flat, (flat == 0) * CONSTANT))[1]
        for f in (f for f in x.factors if f is not best):
            self.pin(f, "is written into a tensor along with other units")
        at = codes.as_strided(t.shape, t.stride(), t.storage_offset())
        at.copy_(torch.tensor(0) if best is None else best)
        return t

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator of the network itself."""
        if self.memory and not func.is_view:
            given, kwargs = tree_map_only(Tensor, self.load, (args, kwargs))
        else:
            given = args
        if not any(isinstance(x, Marked) for x in tree_leaves((given, kwargs))):
            return func(*given, **kwargs)
        out = self.operator(func, given, kwargs)
        into = args[0] if func._schema.name[-1] == "_" else None
        return out if into is None or isinstance(into, Marked) else self.store(into, out)

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on marked tensors: by its rule, by simpler ones, or else all is pinned."""
        name, inplace = op_name(func), func._schema.name[-1] == "_"
        if re.search("^new_|_like$", name):  # a constant
            return func(*tree_map_only(Marked, lambda x: torch.zeros(x.shape), args), **kwargs)
        rule = RULES.get(name, RULES["where"] if torch.Tag.pointwise in func.tags else None)
        rule = Walk.space if re.search(r"(pool|pad|upsample_\w+)\dd", name) else rule
        if not rule and not inplace:
            simpler = decomposition_table.get(func, lambda *_, **__: NotImplemented)
            for way in (func.decompose, simpler):
                if (out := way(*args, **kwargs)) is not NotImplemented:
                    return out
        xs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Marked)]
        for x in xs:
            x.used = True
            for f in x.factors if name not in SAME else ():
                self.fact(f)
        self.func, self.named = func, {a.name: a.default_value for a in func._schema.arguments}
        self.named |= dict(zip(self.named, args, strict=False)) | kwargs
        found = rule(self, *self.named.values()) if rule else None
        for x in xs if found is None else ():
            self.fix(x, range(x.dim()), f"{name} has no rule")
        found = [found.factors] if isinstance(found, Marked) else found or []
        found += [[] for _ in func._schema.returns]
        taps = list(dict.fromkeys(t for x in xs for t in x.taps))
        if name not in PASSING:
            unary = len(taps) == len({id(x) for x in xs}) == 1
            taps = [Tap(found[0], (taps[0].pre or taps[0]) if unary else None)]
        bare = tree_map_only(Marked, lambda x: x.bare, (args, kwargs))
        args_, kwargs_ = tree_map_only(Tensor, lambda x: x.to("meta"), bare)
        try:
            out = func(*args_, **kwargs_)
        except (RuntimeError, NotImplementedError) as error:
            raise SymmetryError(
                f"find: {name} needs values{self.where()}; it says: {str(error).splitlines()[0]} "
                "Cure: control flow must not depend on the data (torch.where instead of if); or "
                "take the part of the network without it."
            ) from error
        if inplace and isinstance(x := args[0], Marked):
            self.grow(x, found[0])
            x.taps = taps
            return x
        outs = [Marked(self, o, f, taps) for o, f in zip(tree_leaves(out), found, strict=False)]
        return outs[0] if isinstance(out, Tensor) else outs

    def grow(self, x: Marked, factors: list[Tensor]) -> None:
        """x is written in place; it has other names, perhaps, which must not miss new units."""
        old = {axes(f): f for f in x.factors}
        for f in factors:
            if axes(f) not in old or bool(((f >= UNIT) & (old[axes(f)] < UNIT)).any()):
                raise SymmetryError(
                    f"find: units are written in place over constants{self.where()}. "
                    "Cure: write y = y + x instead of y += x, or use torch.cat"
                )
        x.factors = factors

    # Rules: what operators do, given all arguments of their schemas

    def entrywise(self, *xs: Any) -> list[Any]:
        """An operator that acts entry by entry; constants have now another value."""
        return [[f.where(f >= UNIT, 0) for f in self.meet(*xs)]]

    def copy(self, x: Tensor, y: Tensor, *_: Any) -> list[Any]:
        """y written over x: what a plain tensor held before is gone."""
        return [self.meet(x, y) if isinstance(x, Marked) else self.meet(y)]

    def shift(self, first: Any, *rest: Any) -> list[Any] | None:
        """Data movement by the operator itself."""
        func, many = self.func, isinstance(first, list | tuple)
        index = [x for x in tree_leaves(rest) if isinstance(x, Tensor)]
        if len(index) > 1 or any(isinstance(x, Marked) for x in index):
            return None
        return self.move(
            lambda parts: func(parts if many else parts[0], *rest), *(first if many else [first])
        )

    def cat(self, xs: Sequence[Tensor], dim: int = 0) -> list[Any]:
        """Units on `dim` stand side by side; those on other axes meet, as if entry by entry."""
        dim %= xs[0].dim()

        def part(x: Tensor, on: bool) -> Tensor:
            if not isinstance(x, Marked):
                return x if on else x.narrow(dim, 0, 1)
            factors = [f for f in x.factors if (dim in axes(f)) == on]
            return Marked(self, x.bare if on else x.bare.narrow(dim, 0, 1), factors)

        (beside,) = self.move(lambda parts: torch.cat(parts, dim), *(part(x, True) for x in xs))
        return [beside + self.meet(*(part(x, False) for x in xs))]

    def pad(self, x: Marked, sizes: Sequence[int], value: float = 0) -> list[Any]:
        """Zeros beside units are places without a unit."""
        live = {k for f in x.factors for k in axes(f)}
        kept = [n * (x.dim() - 1 - k // 2 in live) for k, n in enumerate(sizes)]
        code = int(value == 0) << 32
        return self.move(lambda parts: torch.constant_pad_nd(parts[0], kept, code), x)

    def reduce(self, x: Marked, *_: Any) -> list[Any]:
        """Sum, mean, maximum: a symmetric function of what stands along some axes."""
        dims, keep = self.named.get("dim"), bool(self.named.get("keepdim"))
        dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))}
        for f in (f for f in x.factors if axes(f) & dims):
            self.stay(f, axes(f) - dims)
        left = [f.amax(tuple(dims), keepdim=keep) for f in x.factors if not axes(f) & dims]
        return [left] * len(self.func._schema.returns)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product: one entry by entry, and a sum."""
        self.read |= {t: None for x in (a, b) if isinstance(x, Marked) for t in x.taps}
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)

    def convolve(self, x: Marked, w: Marked, bias: Tensor | None, *options: Any) -> Tensor:
        """A matrix product for each group of channels; places in an image are not units."""
        transposed, groups, space = options[3], options[5], [*range(2, x.dim())]
        self.fix(w, space, "kernel position")
        w = w.sum(space).view(groups, len(w) // groups, -1)
        n = len(x)
        x = x.flatten(2).view(n, groups, x.shape[1] // groups, -1)
        out = self.product(x.permute(1, 0, 3, 2).flatten(1, 2), w if transposed else w.mT)
        x = out.view(groups, n, -1, out.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)
        self.fix(x, [2], "image position")
        x = x.sum(2) if bias is None else x.sum(2) + bias
        return x[(..., *[None for _ in space])]

    def space(self, x: Marked, *_: Any) -> list[Any]:
        """Pooling, resizing, padding: what acts in space, on each channel alone."""
        image = range(x.dim() - int(re.findall(r"(\d)d", op_name(self.func))[0]), x.dim())
        self.fix(x, image, "image position")
        return [[f for f in x.factors if not axes(f).intersection(image)]]

    def norm(self, x: Marked, *params: Any) -> list[Any]:
        """Scales, shifts and statistics of channels."""
        rest = [None for _ in range(x.dim() - 2)]
        return [self.meet(x, *(p[(slice(None), *rest)] for p in params if isinstance(p, Tensor)))]

    def group_norm(self, x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, g: int, _: float) -> Any:
        """Statistics of each group of channels; then scales and shifts of the channels."""
        parts = x.reshape(n, g, c // g, hw)
        return self.norm((parts - parts.mean((2, 3), keepdim=True)).view(x.shape), w, b)


# What operators do to a Walk, given all arguments of their schemas: the factors of each result, or
# a tensor that has them. For your own, RULES["mylib::gate"] = lambda walk, x, y: x * y will do.
RULES: dict[str, Callable[..., Any]] = {
    "mm bmm": Walk.product,
    "addmm baddbmm": lambda walk, c, a, b, *_: c + walk.product(a, b),
    "convolution": Walk.convolve,
    "embedding": lambda walk, w, *_: walk.fix(w, [0], "meets something fixed") or w.sum(0),
    "native_batch_norm": Walk.norm,
    "native_group_norm": Walk.group_norm,
    "where masked_fill hardswish zero fill": Walk.entrywise,
    "copy": Walk.copy,
    "sum mean amax amin var var_mean prod linalg_vector_norm any all": Walk.reduce,
    "expand clone _to_copy detach alias": lambda walk, x, *_: [x.factors],
    "as_strided": lambda walk, x, n, *_: [x.factors] if x.shape == torch.Size(n) else None,
    "view _unsafe_view": lambda walk, x, n: walk.move(lambda parts: parts[0].reshape(n), x),
    "permute transpose t stack repeat slice split split_with_sizes unbind select squeeze "
    "unsqueeze index_select roll flip index": Walk.shift,
    "constant_pad_nd": Walk.pad,
    "cat": Walk.cat,
}
SAME = {"unsqueeze", "squeeze", "expand", "clone", "_to_copy", "detach", "alias"}
PASSING = {name for names in [*RULES][-6:] for name in names.split()} | {"mean", "avg_pool2d"}
RULES = {name: rule for names, rule in RULES.items() for name in names.split()}
