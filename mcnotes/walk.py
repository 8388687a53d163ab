"""Walk through the operator graph of a network with the ledger in hand (chapter 3)."""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.graph import Ledger, Marked
from mcnotes.tracing import CREATORS, Unknown, inplace, origin, short


class Axis(NamedTuple):
    """One axis of a parameter (or `span` axes taken as one)."""

    name: str
    start: int
    span: int


class Walk(Ledger):
    """One pass over an exported program.

    rules: operator → what it does, see `operators.rule`. merged: in a second pass, (unit, slot)
    for each unit of the first. After the pass: `entries` [4, n], the axis, position, unit and slot
    of each entry of each parameter axis; `marks`, what is known of each tensor; `readers`, the
    activations that contractions read, and `opened`, the units that they bring in; `live`, what
    depends on the input.
    """

    def __init__(
        self,
        program: ExportedProgram,
        rules: Mapping[str, Callable[..., Any]],
        merged: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.program, self.rules, self.merged, self.count = program, rules, merged, 1
        self.marks: dict[Node, Any] = {}
        self.axes: list[Axis] = []
        self.opened: list[Tensor] = []
        self.readers: list[Node] = []
        self.live: set[Node] = set()
        columns = [torch.zeros(4, 0, dtype=torch.long)]
        signature = program.graph_signature
        specs = {s.arg.name: s for s in signature.input_specs}
        outputs = {s.arg.name for s in signature.output_specs if s.kind == OutputKind.USER_OUTPUT}
        for node in program.graph.nodes:
            self.where = origin(node) if node.op == "call_function" else ""
            self.marks[node] = None
            if node.op == "placeholder":
                self.marks[node] = self.enter(node, specs[node.name], columns)
            elif node.op == "call_function":
                self.marks[node] = self.step(node)
            elif node.op == "output":
                results = [self.marks[n] for n in node.all_input_nodes if n.name in outputs]
                self.forget(filter(is_marked, results), "reaches the output")
        self.entries = torch.cat(columns, 1).numpy()

    def enter(self, node: Node, spec: Any, columns: list[Tensor]) -> Any:
        """A placeholder: a parameter's axes are new units; an input and a constant are fixed."""
        shape = sizes(node.meta.get("val"))
        if not isinstance(node.meta.get("val"), Tensor):
            return shape
        if spec.kind == InputKind.USER_INPUT:
            self.live.add(node)
            return Marked(shape)
        kept = spec.target in self.program.state_dict and spec.persistent is not False
        stored = (self.program.state_dict if kept else self.program.constants)[spec.target]
        if not (kept and stored.is_floating_point()):
            return constant(stored.detach().cpu().clone())
        groups, factors = convolution_groups(node), []
        for k, n in enumerate(shape):
            units, start, span = torch.arange(n), k, 1
            if k == 1 and groups > 1:  # each group has input channels of its own
                rows = torch.arange(shape[0]) // (shape[0] // groups)
                units, start, span = rows[:, None] * n + units, 0, 2
            if n == 1:
                continue
            units = units + self.count
            self.count = int(units.max()) + 1
            slots = torch.zeros_like(units)
            if self.merged is not None:
                units, slots = self.merged[:, units]
            position = torch.arange(units.numel()).view_as(units)
            axis = torch.full_like(units, len(self.axes))
            columns.append(torch.stack([axis, position, units, slots]).flatten(1))
            self.axes.append(Axis(spec.target, start, span))
            size = [1] * start + list(units.shape) + [1] * (len(shape) - start - span)
            factors.append(self.settle(units.view(size), slots.view(size)))
        marked = Marked(shape).having(factors)
        if not node.users:
            self.forget([marked], "is not used in this mode")
        return marked

    def step(self, node: Node) -> Any:
        """An operator: the marks of its result."""
        value = node.meta.get("val")
        if value is None or isinstance(value, torch.SymInt | int | float | bool):
            return sizes(value)
        if any(n in self.live for n in node.all_input_nodes):
            self.live.add(node)
        given: Any = map_arg((node.args, node.kwargs), self.marks.__getitem__)
        if node.target is operator.getitem:
            return given[0][0][given[0][1]]
        marked = [m for m in tree_leaves(given, is_leaf=is_marked) if isinstance(m, Marked)]
        self.contracted = False
        out = self.evaluate(node, given, marked)
        if out is None:
            try:
                out = self.apply(node, given, marked)
            except Unknown as error:
                self.forget(marked, str(error))
                out = Marked(())
        out = fit(out, value)
        if self.contracted:
            self.readers += [n for n in node.all_input_nodes if n in self.live]
            self.opened += [f.label.flatten() for f in out.factors]
        base = node
        while inplace(base):  # the tensor that was given holds the result from now on
            base = base.all_input_nodes[0]
            self.marks[base] = out
        return out

    def evaluate(self, node: Node, given: Any, marked: list[Marked]) -> Any:
        """The value of a constant; None for everything else."""
        if short(node) not in CREATORS and any(m.value is None for m in marked):
            return None
        if not isinstance(node.target, OpOverload):
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None

        def real(m: Marked) -> Tensor:
            return torch.empty(m.shape) if m.value is None else m.value

        args, kwargs = tree_map_only(Marked, real, given, is_marked)
        kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        out = node.target(*args, **kwargs)
        return constant(out) if isinstance(out, Tensor) else [constant(o) for o in out]

    def apply(self, node: Node, given: Any, marked: list[Marked]) -> Any:
        """The result of an operator by its rule. Raises Unknown if there is none."""
        name, target = short(node), node.target
        if not isinstance(target, OpOverload):
            raise Unknown(f"{name} (no_grad, autocast or cond) is not followed")
        is_pointwise = name not in self.rules and torch.Tag.pointwise in target.tags
        rule = self.rules.get("pointwise" if is_pointwise else name)
        if rule is None:
            raise Unknown(f"{name} has no rule (use other operators, or see symmetry.rule)")
        for m in marked:
            self.see(m)

        def run(marked: list[Marked], labels: list[Tensor]) -> Any:
            swap = {id(p): t for p, t in zip(marked, labels, strict=True)}
            args, kwargs = tree_map_only(
                Marked, lambda m: swap.get(id(m), m.value), given, is_marked
            )
            return target(*args, **kwargs)

        schema = target._schema.arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound |= dict(zip((a.name for a in schema), given[0], strict=False)) | given[1]
        shape = sizes(node.meta["val"])
        bound |= {"marked": marked, "name": name, "shape": shape, "run": run, "bound": bound}
        wanted = list(inspect.signature(rule).parameters)[1:]
        return rule(self, **{k: bound.get(k) for k in wanted})


def convolution_groups(node: Node) -> int:
    """The number of groups, if this is the weight of grouped convolutions and of nothing else."""
    users = [(short(n).startswith("conv") and "_" not in short(n), n.args) for n in node.users]
    groups = {args[6] if conv and len(args) > 6 else 1 for conv, args in users}
    return groups.pop() if len(groups) == 1 else 1  # type: ignore[return-value]


def is_marked(x: Any) -> bool:
    return isinstance(x, Marked)


def sizes(value: Any) -> Any:
    """Shapes and symbolic integers as plain numbers: those of the example."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint)  # type: ignore[arg-type]
    return tuple(sizes(n) for n in value.shape) if isinstance(value, Tensor) else value


def constant(value: Tensor) -> Marked:
    """What is known of a constant tensor."""
    same = (
        bool((value == value.narrow(k, 0, 1)).all()) for k in range(value.dim()) if value.numel()
    )
    return Marked(
        tuple(value.shape), uniform=frozenset(k for k, s in enumerate(same) if s), value=value
    )


def fit(out: Any, value: Any) -> Any:
    """Give results the shapes that the graph says they have."""
    if isinstance(value, list | tuple):
        outs = [out] * len(value) if is_marked(out) else out
        return [fit(o, v) for o, v in zip(outs, value, strict=True)]
    if not isinstance(value, Tensor):
        return None
    out = out if is_marked(out) else out[0]
    if any(f.label.dim() != value.dim() for f in out.factors):
        return None  # a second result of another form, which nothing may read
    return out._replace(shape=sizes(value))
