"""What each operator does to the units that it meets (chapter 3).

A rule is given the trace and all arguments of its operator's schema. It returns the factors of each
result; or a tensor that has them, made of the arguments by operators that have rules; or None, if
it does not know. A result of which it says nothing pins all units of the arguments when it is used.
For an operator of your own, RULES["mylib::gate"] = lambda trace, x, y: x * y will do.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mcnotes.symmetry.trace import Trace
from mcnotes.symmetry.units import (
    CONSTANT,
    UNIT,
    Labelled,
    axes,
    factors_of,
    is_constant,
    labelled_in,
    op_name,
    without_values,
)

Factors = list[list[Tensor]]  # of each result
Rule = Callable[..., Factors | Tensor | None]


def returns(trace: Trace) -> int:
    """How many results the operator at work has."""
    return len(trace.func._schema.returns)


# Entry by entry


def pointwise(trace: Trace, *xs: Any) -> Factors:
    """An operator that acts entry by entry; constants have now another value."""
    factors = [f.where(f >= UNIT, 0) for f in trace.combine_pointwise(*xs)]
    return [factors] * returns(trace)


# Data movement


def copy(trace: Trace, x: Tensor, y: Tensor, *_: Any) -> Factors:
    """What x becomes when y is written over all of it."""
    return [factors_of(y)]


def same(trace: Trace, x: Labelled, *_: Any) -> Factors:
    """Another tensor with the same entries at the same places."""
    return [x.factors]


def as_pairs(trace: Trace, x: Labelled) -> Factors:
    """Real and imaginary parts along a new last axis."""
    return [[f.unsqueeze(-1) for f in x.factors]]


def as_strided(
    trace: Trace, x: Labelled, shape: Sequence[int], stride: Sequence[int], start: int | None = None
) -> Tensor:
    """Entries by their places in memory, of which x must fill all that there is."""
    trace.refuse_a_part_of_memory(x)
    by_stride = sorted(range(x.dim()), key=lambda k: (x.stride(k), -x.shape[k]), reverse=True)
    index = torch.arange(x.numel()).as_strided(shape, stride, start or 0)
    return x.permute(by_stride).reshape(-1)[index]


def view(trace: Trace, x: Labelled, shape: Sequence[int]) -> Factors:
    """Another shape, the same order of entries."""
    return trace.move(lambda parts: parts[0].reshape(shape), x)


def reorder(trace: Trace, x: Labelled, *how: Any) -> Factors:
    """Axes in another order, or new ones of size 1: no entry comes or goes."""
    return [[trace.func(f, *how) for f in x.factors]]


def write_part(trace: Trace, x: Tensor, part: Tensor, *where: Any) -> Factors:
    """`part` written over a slice of x."""
    func = trace.func
    return trace.move(lambda parts: func(*parts, *where), x, part)


def shift(trace: Trace, first: Any, *rest: Any) -> Factors | None:
    """Data movement by the operator itself, of one tensor or of a list, at fixed indices."""
    func, many = trace.func, isinstance(first, list | tuple)
    index = [x for x in tree_leaves(rest) if isinstance(x, Tensor)]
    if len(index) > 1 or labelled_in(index):
        return None
    return trace.move(
        lambda parts: func(parts if many else parts[0], *rest), *(first if many else [first])
    )


def choose(trace: Trace, x: Tensor, *where: Any) -> Factors | None:
    """A choice by indices: as data movement, or by indices that depend on the inputs.

    Units on the axes that are looked up are then pinned, for nobody knows which are taken.
    """
    if found := shift(trace, x, *where):
        return found
    index = where[-1]
    indices = index if isinstance(index, list | tuple) else [index]
    if any(map(factors_of, indices)) or any(i is not None and is_mask(i) for i in indices):
        return None
    if op_name(trace.func) == "index_select":
        return [line(trace, x, {where[0] % x.dim()}).factors]
    chosen = line(trace, x, {k for k, i in enumerate(indices) if i is not None})
    first = [None if i is None else torch.zeros((1,) * i.dim(), dtype=torch.long) for i in indices]
    return [[trace.func(f, first) for f in chosen.factors]]


def put(
    trace: Trace, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, *_: Any
) -> Factors | None:
    """Values written at indices of the first axes, whatever these are; the other axes meet."""
    chosen = [i for i in indices if i is not None]
    if any(map(factors_of, chosen)) or any(i is None for i in indices[: len(chosen)]):
        return None
    written = sum(i.dim() if is_mask(i) else 1 for i in chosen)
    many = max(1 if is_mask(i) else i.dim() for i in chosen)
    rest = x.dim() - written
    values = values[(None,) * (many + rest - values.dim())]
    found = pointwise(trace, line(trace, x, range(written)), line(trace, values, range(many)))[0]
    return [[f.view((1,) * written + f.shape[f.dim() - rest :]) for f in found]]


def is_mask(index: Tensor) -> bool:
    """Whether an index is one of truth values."""
    return index.dtype in (torch.bool, torch.uint8)


def cat(trace: Trace, xs: Sequence[Tensor], dim: int = 0) -> Factors:
    """Units on `dim` stand side by side; those on other axes meet, as if entry by entry."""
    xs = [x for x in xs if x.shape != (0,)] or xs  # an empty vector may stand beside any shape
    dim %= xs[0].dim()
    (beside,) = trace.move(
        lambda parts: torch.cat(parts, dim), *(only_along(trace, x, dim) for x in xs)
    )
    return [beside + trace.combine_pointwise(*(x for y in xs for x in layers(trace, y, dim)))]


def only_along(trace: Trace, x: Tensor, dim: int) -> Tensor:
    """A tensor with those of its factors that live on `dim`."""
    if not isinstance(x, Labelled) or x.known:
        return x
    return Labelled(trace, without_values(x), [f for f in x.factors if dim in axes(f)])


def layers(trace: Trace, x: Tensor, dim: int) -> Sequence[Tensor]:
    """Tensors of size 1 along `dim` that stand for all of x, with its factors on other axes."""
    if not x.shape[dim]:
        return []
    if not isinstance(x, Labelled) or x.known:  # one layer may be constant where another is not
        return [*x.split(1, dim)]
    factors = [f for f in x.factors if dim not in axes(f)]
    return [Labelled(trace, without_values(x).narrow(dim, 0, 1), factors)]


def pad(trace: Trace, x: Labelled, sizes: Sequence[int], value: float = 0) -> Factors:
    """Zeros beside units are constants without a unit; any other number is fixed."""
    live = frozenset[int]().union(*map(axes, x.factors))
    kept = [n * (x.dim() - 1 - k // 2 in live) for k, n in enumerate(sizes)]
    code = 0 if value else CONSTANT
    return trace.move(lambda parts: torch.constant_pad_nd(parts[0], kept, code), x)


# What acts along some axes, on each line of entries alone


def line(trace: Trace, x: Tensor, dims: Collection[int]) -> Labelled:
    """A tensor of size 1 along `dims` that stands for x; its units on these axes are pinned.

    An operator tells positions along `dims` apart, and does the same to each line.
    """
    trace.pin_axes(x, dims, "order along an axis matters")
    like = without_values(x)
    for k in dims:
        like = like.narrow(k, 0, min(1, x.shape[k]))
    one = Labelled(trace, like, [f for f in factors_of(x) if not axes(f).intersection(dims)])
    one.constant = is_constant(x)
    return one


def along(trace: Trace, x: Tensor, *rest: Any) -> Factors | None:
    """Sorting, sums so far, choice and writing along some axes: a function of each line.

    Of all tensors together, if there are several, which lie side by side along the other axes; an
    index that is a vector is the same for all lines.
    """
    dim, keep = trace.arguments.get("dim"), trace.arguments.get("keepdim", True)
    if dim is None or not x.dim():
        return None
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)}
    xs = [x]
    for y in (y for y in rest if isinstance(y, Tensor)):
        if y.dim() == x.dim():
            if any(y.shape[k] != n for k, n in enumerate(x.shape) if k not in dims):
                return None
            xs.append(y)
        elif y.dim() > 1 or factors_of(y):
            return None
    factors = pointwise(trace, *(line(trace, y, dims) for y in xs))[0]
    return [factors if keep else [f.amax((*dims,)) for f in factors]] * returns(trace)


def extreme(trace: Trace, x: Labelled, *_: Any) -> Factors | None:
    """The largest, smallest, middle or most frequent entry along an axis, and where it stands.

    The entry itself is the same in any order of the units there.
    """
    if "other" in trace.arguments:  # of two tensors
        return None
    if "dim" not in trace.arguments:
        return reduce(trace, x)
    dim = trace.arguments["dim"] % max(x.dim(), 1)
    if any(dim in axes(f) for f in factors_of(x)):
        return reduce(trace, x)[:1]
    return along(trace, x)


def sample(trace: Trace, x: Tensor, grid: Tensor, *_: Any) -> Factors | None:
    """Images read between their pixels, each channel in the same way."""
    if factors_of(grid):
        return None
    return [line(trace, x, [0, *range(2, x.dim())]).factors]


def patches(trace: Trace, x: Tensor, kernel: Sequence[int], *_: Any) -> Factors | None:
    """The patches of images as columns: the places of a kernel for each channel."""
    if x.dim() != 4:
        return None
    size = math.prod(kernel)
    return trace.move(
        lambda parts: parts[0].flatten(2).expand(-1, -1, size).flatten(1).unsqueeze(-1),
        line(trace, x, (0, 2, 3)),
    )


def from_patches(
    trace: Trace, x: Tensor, _: Sequence[int], kernel: Sequence[int], *rest: Any
) -> Factors | None:
    """Images as sums of patches, for each channel."""
    if x.dim() != 3:
        return None
    parts = x.unflatten(1, (-1, math.prod(kernel)))
    return [[f.view(1, -1, 1, 1) for f in line(trace, parts, (0, 2, 3)).factors]]


# Sums and products


def reduce(trace: Trace, x: Labelled, *_: Any) -> Factors:
    """Sum, mean, maximum: a symmetric function of what stands along some axes."""
    dim, keep = trace.arguments.get("dim"), bool(trace.arguments.get("keepdim"))
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    for f in x.factors:
        trace.block(f, dims)
        if axes(f) & dims:
            trace.see(f)
            trace.hold_axes(f, axes(f) - dims)
    left = [f.amax(tuple(dims), keepdim=keep) for f in x.factors if not axes(f) & dims]
    return [left] * returns(trace)


def softmax(trace: Trace, x: Tensor, dim: int, *_: Any) -> Tensor:
    """Each entry and a sum over its fellows."""
    return x - x.sum(dim, keepdim=True)


def product(trace: Trace, a: Tensor, b: Tensor) -> Tensor:
    """The matrix product: one entry by entry, and a sum."""
    trace.contracted |= {t: None for x in labelled_in((a, b)) for t in x.taps}
    for x, dim in ((a, a.dim() - 1), (b, b.dim() - 2)):
        for f in factors_of(x):
            trace.block(f, {dim})
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def affine(trace: Trace, c: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    """A matrix product, and something added."""
    return c + product(trace, a, b)


def convolution(trace: Trace, x: Tensor, w: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """A matrix product for each group of channels; places in an image are not units."""
    transposed, groups, space = options[3], options[5], [*range(2, x.dim())]
    trace.pin_axes(w, space, "kernel position")
    w = w.sum(space).view(groups, len(w) // groups, -1)
    x = x.flatten(2).view(len(x), groups, x.shape[1] // groups, -1)
    out = product(trace, w.mT if transposed else w, x).flatten(1, 2)
    trace.pin_axes(out, [2], "image position")
    out = out.sum(2) if bias is None else out.sum(2) + bias
    return out[(..., *[None for _ in space])]


def in_space(trace: Trace, x: Labelled, *rest: Any) -> Factors | None:
    """Pooling, resizing, padding: what acts in space, on each channel alone."""
    if any(isinstance(y, Tensor) for y in tree_leaves(rest)):  # of each channel, perhaps
        return None
    space = int(re.findall(r"(\d)d", op_name(trace.func))[0])
    image = range(x.dim() - space, x.dim())
    trace.pin_axes(x, image, "image position")
    return [[f for f in x.factors if not axes(f).intersection(image)]] * returns(trace)


def trilinear(trace: Trace, a: Tensor, b: Tensor, c: Tensor, *how: Any) -> Tensor:
    """Three tensors, each with new axes of size 1, multiplied and summed over some axes."""
    parts = []
    for x, new in zip((a, b, c), how, strict=False):
        trace.contracted |= {t: None for y in labelled_in(x) for t in y.taps}
        for k in new:
            x = x.unsqueeze(k)
        parts.append(x)
    return (parts[0] * parts[1] * parts[2]).sum(how[3])


def by_expert(
    trace: Trace, x: Tensor, w: Tensor, ends: Tensor | None, bias: Tensor | None = None, *_: Any
) -> Tensor | None:
    """Rows of x [S, K], each times the matrix of its expert, of w [experts, K, N].

    The units of all experts move together.
    """
    if (x.dim(), w.dim()) != (2, 3) or factors_of(ends) or bias is not None:
        return None
    trace.pin_axes(x, [0], "order along an axis matters")
    trace.pin_axes(w, [0], "is chosen by the data")
    return product(trace, x, w.sum(0))


def distances(trace: Trace, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    """Between all pairs of rows: a sum over what the columns hold."""
    trace.contracted |= {t: None for x in labelled_in((a, b)) for t in x.taps}
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).sum(-1)


def lstm(
    trace: Trace,
    x: Tensor,
    w: Tensor,
    again: Tensor,
    bias: Tensor,
    bias_again: Tensor,
    h: Tensor,
    c: Tensor,
    *_: Any,
) -> Factors:
    """One layer of an LSTM on x [T, N, inputs]: its output, and the last states.

    What units see at one time they see at all: the third step brings nothing that the second did
    not.
    """
    biased = trace.arguments["has_biases"]
    trace.pin_axes(x, [0, 1], "order in time matters")
    given = product(trace, x, w.mT)
    if biased:
        given = given + bias + bias_again
    for _step in range(3):
        i, f, g, o = (given + product(trace, h.unsqueeze(0), again.mT)).chunk(4, -1)
        cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
        out = o.sigmoid() * cell.tanh()
        h, c = out.select(0, 0), cell.select(0, 0)
    return [factors_of(out), factors_of(h), factors_of(c)]


def embedding_bag(
    trace: Trace, w: Labelled, index: Tensor, offsets: Tensor, *rest: Any
) -> Factors | None:
    """Sums or means of chosen rows, or their largest entries; later results are left unsaid."""
    if any(factors_of(y) for y in (index, offsets, *rest)):
        return None
    trace.pin_axes(w, [0], "meets something fixed")
    return [factors_of(w.sum(0))]


def embedding(trace: Trace, w: Labelled, index: Tensor, *_: Any) -> Tensor | None:
    """A choice of rows."""
    if factors_of(index):
        return None
    trace.pin_axes(w, [0], "meets something fixed")
    return w.sum(0)


# Norms: their later results, the statistics, are left unsaid


def batch_norm(trace: Trace, x: Tensor, *params: Any) -> Factors:
    """Scales, shifts and statistics of channels."""
    rest = [None for _ in range(x.dim() - 2)]
    channels = (p[(slice(None), *rest)] for p in params if isinstance(p, Tensor))
    return [trace.combine_pointwise(x, *channels)]


def group_norm(
    trace: Trace, x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> Factors:
    """Statistics of each group of channels; then scales and shifts of the channels."""
    parts = x.reshape(n, groups, c // groups, hw)
    centred = parts - parts.mean((2, 3), keepdim=True)
    return batch_norm(trace, centred.view(x.shape), w, b)


def layer_norm(trace: Trace, x: Tensor, shape: Sequence[int], w: Any, b: Any, _: float) -> Factors:
    """Statistics along the last axes; then scales and shifts."""
    centred = x - x.mean([*range(-len(shape), 0)], keepdim=True)
    return [trace.combine_pointwise(centred, w, b)]


MOVES: dict[str, Rule] = {
    "copy": copy,
    "expand clone _to_copy detach alias": same,
    "as_strided": as_strided,
    "view _unsafe_view": view,
    "slice_scatter select_scatter": write_part,
    "permute transpose t unsqueeze": reorder,
    "stack repeat slice split split_with_sizes unbind select squeeze roll flip unfold": shift,
    "index index_select": choose,
    "constant_pad_nd": pad,
    "cat": cat,
    "view_as_real": as_pairs,
}
OTHERS: dict[str, Rule] = {
    "mm bmm": product,
    "_trilinear": trilinear,
    "_grouped_mm transformers::grouped_mm_fallback": by_expert,
    "_cdist_forward _euclidean_dist": distances,
    "mkldnn_rnn_layer": lstm,
    "_embedding_bag _embedding_bag_forward_only": embedding_bag,
    "sort topk cumsum cumprod cummax cummin logcumsumexp argmax argmin gather scatter scatter_add "
    "scatter_reduce index_add index_copy index_fill _fft_r2c _fft_c2r _fft_c2c": along,
    "max min median nanmedian kthvalue mode": extreme,
    "index_put": put,
    "grid_sampler_2d grid_sampler_3d": sample,
    "im2col": patches,
    "col2im": from_patches,
    "addmm baddbmm": affine,
    "convolution": convolution,
    "embedding": embedding,
    "native_batch_norm": batch_norm,
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    "_softmax _log_softmax _safe_softmax": softmax,
    "pointwise where masked_fill hardswish zero fill complex polar": pointwise,
    "in_space": in_space,
    "sum mean amax amin var var_mean prod linalg_vector_norm any all": reduce,
}


def by_name(rules: dict[str, Rule]) -> dict[str, Rule]:
    """A rule for each of the operators that share it."""
    return {name: rule for names, rule in rules.items() for name in names.split()}


MOVING = frozenset(by_name(MOVES))
PASSING = MOVING | {"mean", "avg_pool2d"}  # global pooling counts as a means to an activation
RULES: dict[str, Rule] = by_name(MOVES) | by_name(OTHERS)
