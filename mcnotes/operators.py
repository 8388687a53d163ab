"""What each operator of a network does to its units (chapter 3).

A rule for an operator of your own takes a few lines:

    @symmetry.rule("mylib::gate")
    def gate(t, x, y):          # arguments as in the operator's schema, tensors as graph.Marked
        return t.tie(x, y)      # t is the graph.Ledger, with tie, reduce, einsum, mix, …
"""

import string
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mcnotes.graph import Factor, Ledger, Marked
from mcnotes.tracing import DROPOUTS, Unknown

Function = TypeVar("Function", bound=Callable[..., Any])
Run = Callable[[list[Marked], list[Tensor]], Any]

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Function], Function]:
    """Register a rule for operators: "relu" for aten::relu and aten::relu_, "mylib::gate".

    It gets the ledger and what else it names: arguments of the operator; `marked`, all of its
    tensors; `shape`, that of the result; `name`, the operator's; `run`, the operator on labels.
    It raises `tracing.Unknown` for what it does not cover.
    """

    def register(function: Function) -> Function:
        RULES.update({name: function for text in names for name in text.split()})
        return function

    return register


IDENTITIES = [
    *("contiguous", "clone", "to", "_to_copy", "type_as", "detach", "alias", "lift_fresh_copy"),
    *DROPOUTS,
]
RESHAPES = [
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("view_as", "reshape_as", "ravel"),
]
MOVES: dict[str, str | None] = {  # operator → the argument that names the axes it acts on
    **dict.fromkeys(("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "mT"), ""),
    **dict.fromkeys(("moveaxis", "stack"), ""),
    **dict.fromkeys(("cat", "concat", "slice", "split", "split_with_sizes", "chunk"), "dim"),
    **dict.fromkeys(("unbind", "narrow", "select", "index_select", "slice_scatter"), "dim"),
    **dict.fromkeys(("roll", "flip"), "dims"),
    **dict.fromkeys(("index", "index_put", "select_scatter", "repeat", "repeat_interleave")),
    **dict.fromkeys(("tile", "unfold", "diagonal", "pixel_shuffle", "pixel_unshuffle")),
    **dict.fromkeys(("channel_shuffle",)),
}
POOLS = [
    *(f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "lp")),
    *(f"adaptive_{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg")),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d")),
    *(f"upsample_{kind}" for kind in ("bilinear2d", "bicubic2d", "trilinear3d")),
]


def per_channel(t: Ledger, x: Marked, *params: Marked | None, dim: int = 1) -> Marked:
    """Scales, shifts and statistics with one entry per channel."""
    for p in params:
        if p is not None:
            x = t.tie(x, t.arrange(p, [0 if k == dim else None for k in range(len(x.shape))]))
    return x


def batch(*operands: Marked, inner: int = 1) -> str:
    """Letters for the axes in front of the last `inner` ones."""
    return string.ascii_uppercase[: max(0, max(len(x.shape) for x in operands) - inner)]


@rule(*RESHAPES, *IDENTITIES)
def reshape(t: Ledger, marked: list[Marked], shape: tuple[int, ...]) -> Marked:
    return t.view(marked[0], shape)


@rule(*MOVES)
def move(t: Ledger, marked: list[Marked], name: str, run: Run, bound: Mapping[str, Any]) -> Any:
    index = [m for m in marked if name.startswith("index") and m is not marked[0]]
    index = [m for m in index if m is not bound.get("values")]
    if any(m.value is None for m in index):
        raise Unknown(f"{name} with an index that depends on the data")
    parts = [m for m in marked if all(m is not i for i in index)]
    local, key = None, MOVES[name]
    if key is not None:
        dims = bound.get(key, 0) if key else ()
        dims = [dims] if isinstance(dims, int) else dims
        local = {d % len(marked[0].shape) for d in dims} if dims or not key else None
    moved = t.move(lambda labels: run(parts, labels), parts, local)
    return [Marked(()).having(factors) for factors in moved] or Marked(())


@rule("pointwise hardswish hardtanh relu6 selu celu mish rrelu masked_fill addcmul layer_scale")
def pointwise(t: Ledger, marked: list[Marked]) -> Marked:
    """Any operator that acts entry by entry on tensors that broadcast."""
    out = marked[0]
    for x in marked[1:]:
        out = t.tie(out, x)
    # Constants among the units change their value: from here on they are just fixed.
    return out.having(Factor(f.label.clamp(min=0), f.slot) for f in out.factors)


@rule("linear")
def linear(t: Ledger, input: Marked, weight: Marked, bias: Marked | None) -> Marked:
    b = batch(input)
    return per_channel(t, t.einsum(f"{b}i,oi->{b}o", input, weight), bias, dim=len(b))


@rule("matmul bmm mm mv dot vdot")
def matmul(t: Ledger, marked: list[Marked]) -> Marked:
    x, y = marked
    b, i, j = batch(x, y, inner=2), "i" * (len(x.shape) > 1), "j" * (len(y.shape) > 1)
    left, right = (b[len(b) - len(batch(z, inner=2)) :] for z in marked)
    return t.einsum(f"{left}{i}k,{right}k{j}->{b}{i}{j}", x, y)


@rule("addmm baddbmm addmv")
def addmm(t: Ledger, marked: list[Marked]) -> Marked:
    return t.tie(matmul(t, marked[1:]), marked[0])


@rule("einsum")
def einsum(t: Ledger, equation: str, tensors: list[Marked]) -> Marked:
    sides, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        out = "..." * ("." in sides) + "".join(sorted(c for c in sides if sides.count(c) == 1))
    spare = "".join(c for c in string.ascii_letters if c not in equation)
    parts = sides.split(",")
    extra = [len(x.shape) - len(s.replace("...", "")) for s, x in zip(parts, tensors, strict=True)]
    parts = [s.replace("...", spare[:n][::-1]) for s, n in zip(parts, extra, strict=True)]
    if any(len(set(s)) < len(s) for s in parts):
        raise Unknown("einsum with a diagonal")
    return t.einsum(f"{','.join(parts)}->{out.replace('...', spare[: max(extra)][::-1])}", *tensors)


def convolve(t: Ledger, x: Marked, w: Marked, bias: Marked | None, groups: int, ji: str) -> Marked:
    """Channels are contracted group by group; positions belong to the image, not to units."""
    rank = len(w.shape) - 2
    at = len(x.shape) - rank - 1  # the axis of channels
    space, kernel, b = "STU"[:rank], "stu"[:rank], "b"[:at]
    w = t.mix(w, range(2, 2 + rank), "kernel position")
    w = t.view(w, (groups, w.shape[0] // groups, *w.shape[1:]))
    x = t.view(x, (*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :]))
    x = t.einsum(f"{b}gi{space},g{ji}{kernel}->{b}gj{space}", x, w)
    x = t.view(x, (*x.shape[:at], groups * x.shape[at + 1], *x.shape[at + 2 :]))
    x = t.mix(x, range(at + 1, at + 1 + rank), "image position")
    return per_channel(t, x, bias, dim=at)


@rule("conv1d conv2d conv3d")
def conv(t: Ledger, input: Marked, weight: Marked, bias: Marked | None, groups: int) -> Marked:
    return convolve(t, input, weight, bias, groups, "ji")


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def conv_back(t: Ledger, input: Marked, weight: Marked, bias: Marked | None, groups: int) -> Marked:
    return convolve(t, input, weight, bias, groups, "ij")


@rule("scaled_dot_product_attention")
def attention(t: Ledger, marked: list[Marked], is_causal: bool) -> Marked:
    query, key, value, *mask = marked
    if key.shape[:-2] != query.shape[:-2]:
        raise Unknown("attention that shares keys between queries")
    b = batch(query, inner=2)
    scores = t.einsum(f"{b}nk,{b}mk->{b}nm", query, key)
    if is_causal:
        scores = t.mix(scores, (-1, -2), "position of a causal mask")
    scores = t.spread(pointwise(t, [scores, *mask]), (-1,))
    return t.einsum(f"{b}nm,{b}mv->{b}nv", scores, value)


@rule("embedding")
def embedding(t: Ledger, weight: Marked, indices: Marked) -> Marked:
    b = string.ascii_uppercase[: len(indices.shape)]
    one_hot = Marked((*indices.shape, weight.shape[0]))
    return t.einsum(f"{b}v,vd->{b}d", one_hot, weight)


@rule("batch_norm instance_norm _native_batch_norm_legit_no_training")
def batch_norm(t: Ledger, marked: list[Marked]) -> Marked:
    x, *params = marked
    return per_channel(t, t.spread(x, [k for k in range(len(x.shape)) if k != 1]), *params)


@rule("group_norm")
def group_norm(t: Ledger, marked: list[Marked], num_groups: int) -> Marked:
    x, *params = marked
    n, c, *space = x.shape
    split = t.view(x, (n, num_groups, c // num_groups, *space))
    split = t.spread(split, range(2, len(split.shape)))
    return per_channel(t, t.view(split, x.shape), *params)


@rule("layer_norm rms_norm")
def layer_norm(t: Ledger, marked: list[Marked], normalized_shape: list[int]) -> Marked:
    x = t.spread(marked[0], range(-len(normalized_shape), 0))
    return pointwise(t, [x, *marked[1:]])


@rule("softmax log_softmax _softmax _log_softmax")
def softmax(t: Ledger, marked: list[Marked], dim: int) -> Marked:
    return t.spread(marked[0], (dim,))


@rule("_weight_norm")
def weight_norm(t: Ledger, v: Marked, g: Marked, dim: int) -> Marked:
    return t.tie(t.spread(v, {*range(len(v.shape))} - {dim % len(v.shape)}), g)


@rule("prelu")
def prelu(t: Ledger, marked: list[Marked]) -> Marked:
    x, weight = marked
    return per_channel(t, x, weight) if weight.shape[0] > 1 else x


@rule("glu")
def glu(t: Ledger, marked: list[Marked], dim: int, shape: tuple[int, ...]) -> Marked:
    halves = t.move(lambda xs: torch.split(xs[0], shape[dim], dim), marked, {dim % len(shape)})
    return t.tie(*(Marked(shape).having(h) for h in halves or ((), ())))


@rule("expand expand_as broadcast_to copy")
def expand(t: Ledger, marked: list[Marked], name: str, shape: tuple[int, ...]) -> Marked:
    x = marked[1 if name == "copy" else 0]
    x = t.arrange(x, [None] * (len(shape) - len(x.shape)) + [*range(len(x.shape))])
    return x._replace(uniform=x.uniform | {k for k, n in enumerate(x.shape) if n == 1})


@rule("zero fill")
def fill(t: Ledger, marked: list[Marked], value: float | None) -> Marked:
    if len(marked) > 1:
        raise Unknown("filling with a tensor")
    t.forget(marked, "is overwritten")
    return blank(marked[0].shape, value)


def blank(shape: tuple[int, ...], value: float | None) -> Marked:
    """A tensor of one value."""
    return Marked(shape, (), frozenset(range(len(shape))), torch.tensor(float(value or 0)))


@rule("pad constant_pad_nd")
def pad(t: Ledger, marked: list[Marked], pad: list[int], mode: str, value: float | None) -> Marked:
    (x,) = marked
    widths = {len(x.shape) - 1 - k: pad[2 * k : 2 * k + 2] for k in range(len(pad) // 2)}
    dims = {k for k, pair in widths.items() if any(pair)}
    if mode not in (None, "constant") or min(pad) < 0 or not any(f.axes & dims for f in x.factors):
        return t.mix(x, dims, "padded position")
    for k in dims:  # constants in front and behind
        ends = [blank((*x.shape[:k], n, *x.shape[k + 1 :]), value) for n in widths[k]]
        parts = [p for p in (ends[0], x, ends[1]) if p.shape[k]]
        moved = t.move(lambda xs, k=k: torch.cat(xs, k), parts, {k})  # type: ignore[misc]
        shape = (*x.shape[:k], x.shape[k] + sum(widths[k]), *x.shape[k + 1 :])
        x = Marked(shape).having(moved[0])
    return x


@rule("sum mean amax amin var std prod norm logsumexp linalg_vector_norm any all var_mean")
def reduction(t: Ledger, marked: list[Marked], dim: Any, keepdim: bool) -> Marked:
    dims = [dim] if isinstance(dim, int) else dim
    return t.reduce(marked[0], dims or range(len(marked[0].shape)), bool(keepdim))


@rule(*POOLS)
def pool(t: Ledger, marked: list[Marked], name: str) -> Marked:
    return t.mix(marked[0], range(-int(next(c for c in name if c.isdigit())), 0), "image position")
