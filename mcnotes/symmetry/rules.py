"""What each operator does to the units that it meets (chapter 3).

A rule is given the walk and all arguments of its operator's schema. It returns the factors of each
result; or a tensor that has them, made of the arguments by operators that have rules; or None, if
it does not know. For an operator of your own, RULES["mylib::gate"] = lambda walk, x, y: x * y will
do.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mcnotes.symmetry.trace import Walk
from mcnotes.symmetry.units import UNIT, Marked, axes, bare, op_name


def entrywise(walk: Walk, *xs: Any) -> list[Any]:
    """An operator that acts entry by entry; constants have now another value."""
    return [[f.where(f >= UNIT, 0) for f in walk.combine_pointwise(*xs)]]


def shift(walk: Walk, first: Any, *rest: Any) -> list[Any] | None:
    """Data movement by the operator itself."""
    func, many = walk.func, isinstance(first, list | tuple)
    index = [x for x in tree_leaves(rest) if isinstance(x, Tensor)]
    if len(index) > 1 or any(isinstance(x, Marked) for x in index):
        return None
    return walk.move(
        lambda parts: func(parts if many else parts[0], *rest), *(first if many else [first])
    )


def cat(walk: Walk, xs: Sequence[Tensor], dim: int = 0) -> list[Any]:
    """Units on `dim` stand side by side; those on other axes meet, as if entry by entry."""
    xs = [x for x in xs if x.numel()] or xs[:1]  # an empty one, of any shape, adds nothing
    dim %= xs[0].dim()

    def part(x: Tensor, on: bool) -> Tensor:
        if not isinstance(x, Marked):
            return x if on else x.narrow(dim, 0, 1)
        factors = [f for f in x.factors if (dim in axes(f)) == on]
        return Marked(walk, bare(x) if on else bare(x).narrow(dim, 0, 1), factors)

    (beside,) = walk.move(lambda parts: torch.cat(parts, dim), *(part(x, True) for x in xs))
    return [beside + walk.combine_pointwise(*(part(x, False) for x in xs))]


def pad(walk: Walk, x: Marked, sizes: Sequence[int], value: float = 0) -> list[Any]:
    """Zeros beside units are places without a unit."""
    live = {k for f in x.factors for k in axes(f)}
    kept = [n * (x.dim() - 1 - k // 2 in live) for k, n in enumerate(sizes)]
    code = int(value == 0) << 32
    return walk.move(lambda parts: torch.constant_pad_nd(parts[0], kept, code), x)


def reduce(walk: Walk, x: Marked, *_: Any) -> list[Any]:
    """Sum, mean, maximum: a symmetric function of what stands along some axes."""
    dims, keep = walk.named.get("dim"), bool(walk.named.get("keepdim"))
    dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))}
    for f in (f for f in x.factors if axes(f) & dims):
        walk.hold_axes(f, axes(f) - dims)
    left = [f.amax(tuple(dims), keepdim=keep) for f in x.factors if not axes(f) & dims]
    return [left] * len(walk.func._schema.returns)


def product(walk: Walk, a: Tensor, b: Tensor) -> Tensor:
    """The matrix product: one entry by entry, and a sum."""
    walk.read |= {t: None for x in (a, b) if isinstance(x, Marked) for t in x.taps}
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def convolve(walk: Walk, x: Tensor, w: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """A matrix product for each group of channels; places in an image are not units."""
    transposed, groups, space = options[3], options[5], [*range(2, x.dim())]
    walk.fix(w, space, "kernel position")
    w = w.sum(space).view(groups, len(w) // groups, -1)
    x = x.flatten(2).view(len(x), groups, x.shape[1] // groups, -1)
    out = product(walk, w.mT if transposed else w, x).flatten(1, 2)
    walk.fix(out, [2], "image position")
    out = out.sum(2) if bias is None else out.sum(2) + bias
    return out[(..., *[None for _ in space])]


def space(walk: Walk, x: Marked, *rest: Any) -> list[Any] | None:
    """Pooling, resizing, padding: what acts in space, on each channel alone."""
    if any(isinstance(y, Marked) for y in tree_leaves(rest)):
        return None
    image = range(x.dim() - int(re.findall(r"(\d)d", op_name(walk.func))[0]), x.dim())
    walk.fix(x, image, "image position")
    return [[f for f in x.factors if not axes(f).intersection(image)]]


def embedding(walk: Walk, w: Marked, index: Tensor, *_: Any) -> Tensor | None:
    """A choice of rows."""
    if isinstance(index, Marked) and index.factors:
        return None
    walk.fix(w, [0], "meets something fixed")
    return w.sum(0)


def norm(walk: Walk, x: Tensor, *params: Any) -> list[Any]:
    """Scales, shifts and statistics of channels."""
    rest = [None for _ in range(x.dim() - 2)]
    return [
        walk.combine_pointwise(
            x, *(p[(slice(None), *rest)] for p in params if isinstance(p, Tensor))
        )
    ]


def group_norm(
    walk: Walk, x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, g: int, _: float
) -> Any:
    """Statistics of each group of channels; then scales and shifts of the channels."""
    parts = x.reshape(n, g, c // g, hw)
    return norm(walk, (parts - parts.mean((2, 3), keepdim=True)).view(x.shape), w, b)


def layer_norm(walk: Walk, x: Tensor, shape: Sequence[int], w: Any, b: Any, _: float) -> Any:
    """Statistics along the last axes; then scales and shifts."""
    return [walk.combine_pointwise(x - x.mean([*range(-len(shape), 0)], keepdim=True), w, b)]


RULES: dict[str, Callable[..., Any]] = {
    "mm bmm": product,
    "addmm baddbmm": lambda walk, c, a, b, *_: c + product(walk, a, b),
    "convolution": convolve,
    "embedding": embedding,
    "native_batch_norm": norm,
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    "_softmax _log_softmax _safe_softmax": lambda walk, x, dim, *_: x - x.sum(dim, keepdim=True),
    "pointwise where masked_fill hardswish zero fill": entrywise,
    "in space": space,
    "sum mean amax amin var var_mean prod linalg_vector_norm any all": reduce,
    "copy": lambda walk, x, y, *_: [y.factors if isinstance(y, Marked) else []],
    "expand clone _to_copy detach alias": lambda walk, x, *_: [x.factors],
    "as_strided": lambda walk, x, n, *_: [x.factors] if x.shape == torch.Size(n) else None,
    "view _unsafe_view": lambda walk, x, n: walk.move(lambda parts: parts[0].reshape(n), x),
    "slice_scatter select_scatter": lambda walk, x, y, *at: walk.move(
        lambda parts: walk.func(*parts, *at), x, y
    ),
    "permute transpose t unsqueeze": lambda walk, x, *at: [[walk.func(f, *at) for f in x.factors]],
    "stack repeat slice split split_with_sizes unbind select squeeze "
    "index_select roll flip index": shift,
    "constant_pad_nd": pad,
    "cat": cat,
}
# Operators whose result is not another activation; global pooling counts as such.
PASSING = {name for names in [*RULES][-9:] for name in names.split()} | {"mean", "avg_pool2d"}
RULES |= {name: rule for names, rule in RULES.items() for name in names.split()}
