"""What each operator of a network does to its units, in a line or two each (chapter 3).

A rule gets the ledger and the operator's arguments (tensors as `Marked`) and returns the marked
result. A rule of your own, for an operator that acts entry by entry on two tensors:

    @operators.rule("mylib::gate")
    def gate(t, x, y):
        return t.tie(x, y)
"""

import operator
import re
import string
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.graph import Factor, Ledger, Marked, Unknown

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators ("aten::relu", "mylib::gate"; in-place versions included)."""

    def register(function: Rule) -> Rule:
        RULES.update({n if "::" in n else f"aten::{n}": function for n in names})
        return function

    return register


POINTWISE = {
    *("dropout feature_dropout alpha_dropout hardswish hardtanh relu6 selu celu mish rrelu "
      "clone contiguous to _to_copy type_as detach alias lift_fresh_copy float double "
      "where masked_fill clamp copysign").split()
}  # fmt: skip
PASSING = {*"dropout feature_dropout contiguous clone to".split()}
RESHAPES = {
    *"view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as ravel".split()
}
MOVES = {
    **dict.fromkeys("permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT stack".split(), ()),
    **dict.fromkeys("cat concat slice split split_with_sizes chunk unbind narrow select tensor_split "
                    "index_select slice_scatter".split(), ("dim",)),
    **dict.fromkeys("roll flip".split(), ("dims",)),
    **dict.fromkeys("index select_scatter pixel_shuffle pixel_unshuffle channel_shuffle repeat tile "
                    "repeat_interleave index_put unfold diagonal".split(), None),
}  # fmt: skip


def tie_all(t: Ledger, *args: Any) -> Marked:
    """A pointwise operator of any number of tensors."""
    first, *others = [x for x in args if isinstance(x, Marked)]
    for x in others:
        first = t.tie(first, x)
    return first


def channel(t: Ledger, x: Marked, *params: Marked | None, dim: int = 1) -> Marked:
    """Scales, shifts and statistics with one entry per channel."""
    for p in params:
        if p is not None:
            x = t.tie(x, t.arrange(p, [0 if k == dim else None for k in range(len(x.shape))]))
    return x


@rule("linear")
def linear(t: Ledger, x: Marked, weight: Marked, bias: Marked | None = None) -> Marked:
    batch = string.ascii_uppercase[: len(x.shape) - 1]
    out = t.einsum(f"{batch}i,oi->{batch}o", x, weight)
    return out if bias is None else t.tie(out, bias)


@rule("bilinear")
def bilinear(t: Ledger, a: Marked, b: Marked, weight: Marked, bias: Marked | None) -> Marked:
    batch = string.ascii_uppercase[: len(a.shape) - 1]
    out = t.einsum(f"{batch}i,{batch}j,oij->{batch}o", a, b, weight)
    return out if bias is None else t.tie(out, bias)


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(t: Ledger, a: Marked, b: Marked, *_: Any) -> Marked:
    batch = string.ascii_uppercase[: max(len(a.shape), len(b.shape), 2) - 2]
    i, j = "i" * (len(a.shape) > 1), "j" * (len(b.shape) > 1)
    left, right = (
        batch[len(batch) - max(0, len(a.shape) - 2) :],
        batch[len(batch) - max(0, len(b.shape) - 2) :],
    )
    return t.einsum(f"{left}{i}k,{right}k{j}->{batch}{i}{j}", a, b)


@rule("addmm", "baddbmm", "addmv")
def addmm(t: Ledger, bias: Marked, a: Marked, b: Marked, *_: Any) -> Marked:
    return t.tie(matmul(t, a, b), bias)


@rule("einsum")
def einsum(t: Ledger, equation: str, operands: list[Marked], *_: Any) -> Marked:
    equation = equation.replace(" ", "")
    sides, arrow, out = equation.partition("->")
    if not arrow:
        once = sorted(c for c in set(sides) - set(",.") if sides.count(c) == 1)
        out = "..." * ("..." in sides) + "".join(once)
    if any(len(set(s.replace(".", ""))) < len(s.replace(".", "")) for s in sides.split(",")):
        raise Unknown("repeated letter in an einsum operand")
    spare = [c for c in string.ascii_letters if c not in equation]
    wide, parts = "", []
    for side, x in zip(sides.split(","), operands, strict=True):
        extra = "".join(spare[: len(x.shape) - len(side.replace("...", ""))])[::-1]
        wide = max(wide, extra, key=len)
        parts.append(side.replace("...", extra))
    return t.einsum(",".join(parts) + "->" + out.replace("...", wide), *operands)


def convolve(
    t: Ledger, x: Marked, weight: Marked, bias: Marked | None, groups: int, transposed: bool
) -> Marked:
    """Channels are contracted group by group; positions are the image's, not units."""
    space = string.ascii_uppercase[: len(weight.shape) - 2]
    batch = "b" * (len(x.shape) - len(space) - 1)
    weight = t.mix(weight, range(2, len(weight.shape)), "kernel position")
    n, m = weight.shape[:2]
    dims = x.shape[: len(batch)], x.shape[len(batch) + 1 :]
    x = t.view(x, (*dims[0], groups, x.shape[len(batch)] // groups, *dims[1]))
    weight = t.view(weight, (groups, n // groups, m, *weight.shape[2:]))
    w = "gij" if transposed else "gji"
    x = t.einsum(
        f"{batch}gi{space},{w}{space.lower()[::-1].translate(str.maketrans('abc', 'xyz'))}->{batch}gj{space}",
        x,
        weight,
    )
    shape = (*dims[0], groups * x.shape[len(batch) + 1], *dims[1])
    x = t.mix(t.view(x, shape), range(len(shape) - len(space), len(shape)), "image position")
    return channel(t, x, bias, dim=len(batch))


@rule("conv1d", "conv2d", "conv3d")
def conv(
    t: Ledger,
    x: Marked,
    weight: Marked,
    bias: Marked | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Marked:
    return convolve(t, x, weight, bias, groups, False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    t: Ledger,
    x: Marked,
    weight: Marked,
    bias: Marked | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    *_: Any,
) -> Marked:
    return convolve(t, x, weight, bias, groups, True)


@rule("scaled_dot_product_attention")
def attention(
    t: Ledger,
    q: Marked,
    k: Marked,
    v: Marked,
    mask: Marked | None,
    dropout: float,
    causal: bool,
    *_: Any,
    **options: Any,
) -> Marked:
    if any(a.shape[:-2] != q.shape[:-2] for a in (k, v)):
        raise Unknown("attention with grouped queries")
    scores = matmul(
        t, q, t.arrange(k, [*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2])
    )
    if causal:
        scores = t.mix(scores, (-1, -2), "position of a causal mask")
    if mask is not None:
        scores = t.tie(scores, mask)
    return matmul(t, t.spread(scores, (-1,)), v)


@rule("embedding")
def embedding(t: Ledger, weight: Marked, index: Marked, *_: Any) -> Marked:
    rows = t.mix(weight, (0,), "row that the input selects")
    rank = len(index.shape)
    table = t.reduce(rows, (0,), keepdim=True)
    return t.arrange(table, [None] * (rank - 1) + [0, 1]) if rank else t.arrange(table, [1])


@rule("batch_norm", "instance_norm")
def batch_norm(
    t: Ledger,
    x: Marked,
    weight: Marked | None,
    bias: Marked | None,
    mean: Marked | None,
    var: Marked | None,
    *_: Any,
) -> Marked:
    x = t.spread(x, [k for k in range(len(x.shape)) if k != 1])
    return channel(t, x, weight, bias, mean, var)


@rule("group_norm")
def group_norm(
    t: Ledger, x: Marked, groups: int, weight: Marked | None, bias: Marked | None, *_: Any
) -> Marked:
    split = t.view(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    split = t.spread(split, range(2, len(split.shape)))
    return channel(t, t.view(split, x.shape), weight, bias)


@rule("layer_norm", "rms_norm")
def layer_norm(t: Ledger, x: Marked, shape: list[int], *params: Any) -> Marked:
    return tie_all(t, t.spread(x, range(-len(shape), 0)), *params)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(t: Ledger, x: Marked, dim: int, *_: Any) -> Marked:
    return t.spread(x, (dim,))


@rule("_weight_norm")
def weight_norm(t: Ledger, v: Marked, g: Marked, dim: int) -> Marked:
    return t.tie(t.spread(v, {*range(len(v.shape))} - {dim % len(v.shape)}), g)


@rule("prelu")
def prelu(t: Ledger, x: Marked, weight: Marked) -> Marked:
    return channel(t, x, weight) if weight.shape[0] > 1 else x


@rule("glu")
def glu(t: Ledger, x: Marked, dim: int = -1) -> Marked:
    dim %= len(x.shape)
    half = x.shape[dim] // 2
    parts = t.move(lambda xs: list(xs[0].split(half, dim)), [x], {dim})
    shape = tuple(half if k == dim else n for k, n in enumerate(x.shape))
    return t.tie(*(Marked(shape, tuple(p)) for p in parts)) if parts else Marked(shape)


@rule("expand", "expand_as", "broadcast_to")
def expand(t: Ledger, x: Marked, size: Any, *_: Any) -> Marked:
    size = size.shape if isinstance(size, Marked) else size
    extra = len(size) - len(x.shape)
    x = t.arrange(x, [None] * extra + [*range(len(x.shape))])
    shape = tuple(n if m == -1 else m for n, m in zip(x.shape, size, strict=True))
    grown = {k for k, n in enumerate(x.shape) if n == 1}
    return x._replace(shape=shape, uniform=x.uniform | grown)


@rule("copy")
def copy(t: Ledger, old: Marked, new: Marked, *_: Any) -> Marked:
    return expand(t, new, old)


@rule("zero", "fill")
def fill(t: Ledger, x: Marked, value: Any = 0, *_: Any) -> Marked:
    if isinstance(value, Marked):
        raise Unknown("fill with a tensor")
    t.mix(x, range(len(x.shape)), "is overwritten")
    everywhere = frozenset(range(len(x.shape)))
    return Marked(x.shape, uniform=everywhere, value=torch.tensor(float(value)))


@rule("pad", "constant_pad_nd")
def pad(t: Ledger, x: Marked, amounts: list[int], *rest: Any) -> Marked:
    mode, value = (
        ("constant", *rest) if isinstance(next(iter(rest), 0), int | float) else (*rest, None)[:2]
    )
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    dims = {len(x.shape) - 1 - k for k, pair in enumerate(pairs) if any(pair)}
    if (
        mode != "constant"
        or not any(a.label.shape[k] > 1 for a in x.factors for k in dims)
        or min(amounts) < 0
    ):
        return t.mix(x, dims, "padded position")
    for k, pair in enumerate(pairs):
        if not any(pair):
            continue
        dim = len(x.shape) - 1 - k
        sizes = [tuple(n if k == dim else m for k, m in enumerate(x.shape)) for n in pair]
        ends = [
            Marked(s, value=torch.tensor(float(value or 0)), uniform=frozenset(range(len(s))))
            for s in sizes
        ]
        moved = t.move(lambda xs, dim=dim: torch.cat(xs, dim), [ends[0], x, ends[1]], {dim})
        x = Marked(
            tuple(n + sum(pair) * (j == dim) for j, n in enumerate(x.shape)),
            tuple(moved[0]) if moved else (),
        )
    return x


REDUCTIONS = {
    *"sum mean amax amin var std prod norm logsumexp linalg_vector_norm any all var_mean std_mean max min".split()
}
POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_", "lp_pool")
CONTRACTIONS = {
    *"linear bilinear matmul bmm mm mv dot vdot addmm baddbmm addmv einsum scaled_dot_product_attention embedding conv1d "
    "conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
}
CREATORS = {
    *"zeros ones full empty arange new_zeros new_ones new_full new_empty zeros_like ones_like full_like "
    "empty_like scalar_tensor eye linspace".split()
}


def short(node: Node) -> str:
    """An operator's bare name: `relu` for aten::relu_, `mylib::gate` for one of yours."""
    name = node.target._schema.name if isinstance(node.target, OpOverload) else str(node.target)
    return name.removeprefix("aten::").rstrip("_") if not name.endswith("__") else name


def place(node: Node) -> str:
    """Where a node comes from: `layer1.0 (BasicBlock), resnet.py:92`."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = modules[-1] if modules else ("", "")
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    source = f", {lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]}" if lines else ""
    return f"{path or 'the network'} ({str(kind).rsplit('.', 1)[-1]}){source}"


def sizes(value: Any) -> Any:
    """Shapes and symbolic integers as plain numbers: those of the example."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)
    return tuple(sizes(n) for n in value.shape) if isinstance(value, Tensor) else value


class Axis(NamedTuple):
    """One axis of a parameter (or `span` axes taken as one) and the unit of each of its entries."""

    name: str
    start: int
    span: int
    units: Tensor


class Walk(Ledger):
    """One pass over an exported program.

    merged: for a second pass, (new unit, slot) of each unit of the first one.
    """

    def __init__(
        self, program: ExportedProgram, merged: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.program, self.merged = program, merged
        self.marks: dict[Node, Any] = {}
        self.axes: list[Axis] = []
        self.opened: list[Tensor] = []
        self.readers: list[Node] = []
        self.live: set[Node] = set()
        self.count = 1
        specs = {s.arg.name: s for s in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            self.where = place(node) if node.op == "call_function" else ""
            if node.op == "placeholder":
                self.marks[node] = self.enter(node, specs[node.name])
            elif node.op == "call_function":
                self.marks[node] = self.step(node)
            elif node.op == "get_attr":
                self.marks[node] = None
            elif node.op == "output":
                outputs = [
                    s.arg.name
                    for s in program.graph_signature.output_specs
                    if s.kind == OutputKind.USER_OUTPUT
                ]
                for n in node.all_input_nodes:
                    if n.name in outputs:
                        self.forget(self.marks[n], "reaches the output")

    def forget(self, marked: Any, why: str) -> None:
        for x in (
            marked
            if isinstance(marked, list | tuple) and not isinstance(marked, Marked)
            else [marked]
        ):
            for f in x.factors if isinstance(x, Marked) else ():
                self.pin(f.label, why)

    def enter(self, node: Node, spec: Any) -> Any:
        """A placeholder: a parameter's axes are new units; an input and a constant are fixed."""
        shape = sizes(node.meta.get("val"))
        if not isinstance(node.meta.get("val"), Tensor):
            return shape
        if spec.kind == InputKind.USER_INPUT:
            self.live.add(node)
            return Marked(shape)
        stored = self.program.state_dict.get(spec.target) if spec.persistent is not False else None
        if stored is None or not stored.is_floating_point():
            value = stored if stored is not None else self.program.constants[spec.target]
            return known(value.detach().clone())
        factors = []
        for k, n in enumerate(shape):
            if n > 1:
                label, span = torch.arange(n), 1
                groups = {
                    g.args[6]
                    if len(g.args) > 6 and short(g) in ("conv1d", "conv2d", "conv3d")
                    else 1
                    for g in node.users
                }
                (groups,) = groups if len(groups) == 1 else (1,)
                if (
                    k == 1 and groups > 1
                ):  # each group of a convolution has input channels of its own
                    label = (torch.arange(shape[0]) // (shape[0] // groups) * n)[:, None] + label
                    span, k = 2, 0
                label = label + self.count
                self.count = int(label.max()) + 1
                self.axes.append(Axis(spec.target, k, span, label.flatten()))
                ident = torch.zeros_like(label)
                if self.merged is not None:
                    label, ident = self.merged[0][label], self.merged[1][label]
                if not node.users:
                    self.pin(label.flatten(), "is not used in this mode")
                size = [1] * k + list(label.shape) + [1] * (len(shape) - k - span)
                factor = self.settle(label.view(size), ident.view(size))
                factors += [factor] if factor else []
        return Marked(shape, tuple(factors))

    def step(self, node: Node) -> Any:
        value = node.meta.get("val")
        if value is None or isinstance(value, torch.SymInt | int | float | bool):
            return sizes(value)
        name = short(node)
        if any(n in self.live for n in node.all_input_nodes):
            self.live.add(node)
        if node.target is operator.getitem:
            return self.marks[node.args[0]][node.args[1]]
        given = map_arg((node.args, node.kwargs), self.marks.__getitem__)
        marked = [m for m in tree_leaves(given, is_leaf=is_marked) if is_marked(m)]
        out = self.evaluate(node, name, given, marked)
        if out is None:
            out = Marked(())
            if any(m.factors for m in marked) or name in ("zero", "fill"):
                try:
                    out = self.apply(node, name, given, marked)
                except Unknown as error:
                    for m in marked:
                        self.forget(m, str(error))
        out = fit(out, value)
        if name in CONTRACTIONS and is_marked(out):
            self.readers += [n for n in node.all_input_nodes if n in self.live]
            self.opened += [f.label.flatten() for f in out.factors]
        if inplace(node) and any(m.factors for m in [out, *marked]):
            self.write(node, out)
        return out

    def write(self, node: Node, out: Marked) -> None:
        """An in-place operator: the tensor that it was given, and what that is part of, change."""
        nodes = list(node.graph.nodes)
        later = set(nodes[nodes.index(node) + 1 :])
        base, stale = (
            root(node),
            {n for n in self.marks if root(n) is root(node) and later & set(n.users)},
        )
        view = node
        while view is not base:
            stale.discard(view)
            whole = view.all_input_nodes[0]
            if is_view(view) and stale:
                try:
                    out = self.scatter(view, self.marks[whole], out)
                except Unknown as error:
                    self.forget([self.marks[whole], out], str(error))
                    out = Marked(self.marks[whole].shape)
            self.marks[whole], view = out, whole
        for other in stale - {base}:
            self.forget([self.marks[other], out], "is written to through another view")
            self.marks[other] = Marked(self.marks[other].shape)

    def scatter(self, view: Node, whole: Marked, part: Marked) -> Marked:
        """`whole` after the slice that `view` took of it was overwritten by `part`."""
        if short(view) not in ("slice", "select"):
            raise Unknown(f"writing through a {short(view)}")
        fn = getattr(torch.ops.aten, f"{short(view)}_scatter").default
        moved = self.move(lambda xs: fn(*xs, *view.args[1:]), [whole, part])
        return Marked(whole.shape, tuple(moved[0]) if moved else ())

    def evaluate(self, node: Node, name: str, given: Any, marked: list[Marked]) -> Any:
        """The value of a constant; None for everything else."""
        if name not in CREATORS and any(m.value is None for m in marked):
            return None
        if (
            not isinstance(node.target, OpOverload)
            or torch.Tag.nondeterministic_seeded in node.target.tags
        ):
            return None
        args, kwargs = tree_map_only(
            Marked,
            lambda m: torch.empty(m.shape) if m.value is None else m.value,
            given,
            is_leaf=is_marked,
        )
        out = node.target(*args, **{k: "cpu" if k == "device" else v for k, v in kwargs.items()})
        return known(out) if isinstance(out, Tensor) else [known(o) for o in out]

    def apply(self, node: Node, name: str, given: Any, marked: list[Marked]) -> Any:
        """The result of an operator, by its rule."""
        if not isinstance(node.target, OpOverload):
            raise Unknown(f"{name} is not followed")
        named = {
            a.name: given[1].get(a.name, given[0][i] if i < len(given[0]) else a.default_value)
            for i, a in enumerate(node.target._schema.arguments)
        }
        if name in RESHAPES or name in MOVES:
            self.see(*marked)
        if name in RESHAPES:
            return self.view(marked[0], sizes(node.meta["val"]))
        if name in MOVES:
            return self.displace(node, named, given, marked)
        for m in marked:
            self.see(m)
        x = marked[0]
        if rule := RULES.get(name if "::" in name else f"aten::{name}"):
            out = rule(self, *named.values())
        elif torch.Tag.pointwise in node.target.tags or name in POINTWISE:
            out = tie_all(self, *marked)
        elif name in REDUCTIONS and len(marked) == 1:
            dims = named.get("dim")
            dims = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
            out = self.reduce(x, dims, bool(named.get("keepdim")))
        elif name.startswith(POOLS):
            out = self.mix(x, range(-int(name.split("d")[-2][-1]), 0), "image position")
        else:
            raise Unknown(
                f"operator {name} is not understood (give it a rule, or use plain operators)"
            )
        if is_marked(out) and any(bool((f.label < 0).any()) for f in out.factors):
            fresh = lambda c: self.constant((len(self.facts), c)) if c < 0 else c  # noqa: E731
            out = out._replace(
                factors=tuple(Factor(f.label.clone().apply_(fresh), f.slot) for f in out.factors)
            )
        return out

    def displace(self, node: Node, named: dict[str, Any], given: Any, marked: list[Marked]) -> Any:
        """Data movement: the operator itself, run on the labels."""
        name = short(node)
        parts = [
            m
            for m in marked
            if name not in ("index", "index_select", "index_put")
            or m is named["self"]
            or m is named.get("values")
        ]
        if any(m.value is None for m in marked if all(m is not p for p in parts)):
            raise Unknown(f"{name} with an index that depends on data")

        def run(labels: list[Tensor]) -> Any:
            swap = {id(p): t for p, t in zip(parts, labels, strict=True)}
            args, kwargs = tree_map_only(
                Marked, lambda m: swap.get(id(m), m.value), given, is_leaf=is_marked
            )
            return node.target(*args, **kwargs)

        local = None
        if (keys := MOVES[name]) is not None:
            values = [named[k] for k in keys]
            dims = [d for v in values for d in (v if isinstance(v, list | tuple) else [v])]
            local = {d % len(parts[0].shape) for d in dims} if dims or not keys else None
        return [Marked((), tuple(f)) for f in self.move(run, parts, local)]

    def sources(self, node: Node) -> Iterator[Node]:
        """The tensors that data movement and average pooling bring to `node`."""
        name = short(node)
        if (
            name in RESHAPES
            or name in MOVES
            or name in PASSING
            or name.startswith("adaptive_avg")
            or node.target is operator.getitem
        ):
            for n in node.all_input_nodes:
                if n in self.live:
                    yield from self.sources(n)
        elif is_marked(self.marks[node]):
            yield node

    def before(self, node: Node) -> Node:
        """The tensor that enters the nonlinearity (and pooling) of which `node` is the result."""
        while True:
            inputs = [n for n in node.all_input_nodes if n in self.live]
            name = short(node) if node.op == "call_function" else ""
            unary = (
                isinstance(node.target, OpOverload)
                and torch.Tag.pointwise in node.target.tags
                or name in POINTWISE
            )
            if len(inputs) != 1 or not (unary or name.startswith(POOLS) or name in RESHAPES):
                return node
            if len(node.all_input_nodes) != 1 or not is_marked(self.marks[inputs[0]]):
                return node
            node = inputs[0]


def plain(node: Node, kept: set[Node]) -> None:
    """Make a node of a copied graph act as in evaluation, and leave the tensors in `kept` whole."""
    if node.op == "output":
        node.graph.erase_node(node)
    elif node.op == "call_function" and isinstance(node.target, OpOverload):
        name = short(node)
        if name == "batch_norm":
            node.update_arg(5, False)
        if name in ("dropout", "feature_dropout", "alpha_dropout"):
            node.update_arg(2, False)
        if inplace(node) and node.args[0] in kept:
            node.target = getattr(getattr(torch.ops.aten, name), node.target._overloadname)


def is_view(node: Node) -> bool:
    """Whether the result shares memory with the first argument."""
    if not isinstance(node.target, OpOverload) or inplace(node):
        return False
    return any(r.alias_info and not r.alias_info.is_write for r in node.target._schema.returns)


def root(node: Node) -> Node:
    """The tensor whose memory a view, or the result of an in-place operator, is part of."""
    while is_view(node) or inplace(node):
        node = node.all_input_nodes[0]
    return node


def is_marked(m: Any) -> bool:
    return isinstance(m, Marked)


def inplace(node: Node) -> bool:
    return (
        isinstance(node.target, OpOverload)
        and node.target._schema.name.endswith("_")
        and not node.target._schema.name.endswith("__")
    )


def known(value: Tensor) -> Marked:
    """A constant."""
    uniform = {
        k
        for k in range(value.dim())
        if value.numel() and bool((value == value.narrow(k, 0, 1)).all())
    }
    return Marked(tuple(value.shape), uniform=frozenset(uniform), value=value)


def fit(out: Any, value: Any) -> Any:
    """Give results the shapes that the operator graph says they have."""
    if isinstance(value, list | tuple):
        outs = [out] * len(value) if is_marked(out) else out
        return [fit(o, v) for o, v in zip(outs, value, strict=True)]
    if not isinstance(value, Tensor):
        return sizes(value)
    out = out if is_marked(out) else out[0]
    assert all(f.label.dim() == value.dim() for f in out.factors), (out, value.shape)
    return out._replace(shape=sizes(value))
