"""The operator graph of a network: export it, and cut it down to some of its tensors."""

import copy
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Theta = dict[str, Tensor]

CREATORS = {
    *("zeros", "ones", "full", "empty", "arange", "eye", "linspace", "scalar_tensor"),
    *(f"new_{what}" for what in ("zeros", "ones", "full", "empty")),
    *(f"{what}_like" for what in ("zeros", "ones", "full", "empty")),
}
DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout"}


class Unknown(Exception):
    """An operator, or a use of it, that no rule covers; the text becomes the reason of a pin."""


class SymmetryError(ValueError):
    """A network cannot be followed, or a symmetry does not hold; the text says why and where."""


def short(node: Node) -> str:
    """An operator's bare name: `relu` for aten::relu and aten::relu_, `mylib::gate` for yours."""
    if not isinstance(node.target, OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    name = node.target._schema.name.removeprefix("aten::")
    return name[:-1] if inplace(node) else name


def inplace(node: Node) -> bool:
    """Whether the operator overwrites its first argument."""
    return isinstance(node.target, OpOverload) and bool(
        re.search(r"[^_]_$", node.target._schema.name)
    )


def origin(node: Node) -> str:
    """Where a node comes from: `layer1.0 (BasicBlock), resnet.py:92`."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = modules[-1] if modules else ("", "")
    files = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [f"{f.rsplit('/', 1)[-1]}:{n}" for f, n in files if "/torch/nn/" not in f]
    name = f"{path or 'the network'} ({str(kind).rsplit('.', 1)[-1]})"
    return ", ".join([name, *lines[-1:]])


def root(node: Node) -> Node:
    """The tensor whose memory a view of it, or the result of writing into it, is part of."""
    while inplace(node) or (
        isinstance(node.target, OpOverload)
        and any(r.alias_info and not r.alias_info.is_write for r in node.target._schema.returns)
    ):
        node = node.all_input_nodes[0]
    return node


def written_elsewhere(program: ExportedProgram) -> bool:
    """Whether the graph writes into a tensor and then reads it under another name."""
    nodes = list(program.graph.nodes)
    order = {n: k for k, n in enumerate(nodes)}
    last = {n: max((order[u] for u in n.users), default=-1) for n in nodes}
    family: dict[Node, list[Node]] = {}
    for node in nodes:
        family.setdefault(root(node), []).append(node)
    for node in filter(inplace, nodes):
        names, base = {node}, node
        while inplace(base):  # a result and the tensor itself hold the same from now on
            base = base.all_input_nodes[0]
            names.add(base)
        constant = short(root(node)) in CREATORS and len(node.all_input_nodes) == 1
        others = [n for n in family[root(node)] if n not in names and order[n] < order[node]]
        if not constant and any(last[n] > order[node] for n in others):
            return True
    return False


@contextmanager
def mode(net: nn.Module, train: bool) -> Iterator[None]:
    """Set and restore the training flags of all modules; keep attention on its plain path."""
    flags = {m: m.training for m in net.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        net.train(train)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, flag in flags.items():
            m.training = flag


def export(net: nn.Module, inputs: Sequence[Tensor], train: bool) -> ExportedProgram:
    """The operator graph of `net`, for any batch size where the network allows it.

    Raises SymmetryError where the network cannot be traced, naming the line and a cure.
    """
    device = next((p.device for p in net.parameters()), None)
    inputs = tuple(torch.cat([t, t]) if t.dim() and len(t) == 1 else t for t in inputs)
    inputs = tuple(t.to(device) for t in inputs)
    shapes = tuple({0: Dim.AUTO} if t.dim() else None for t in inputs)
    with (
        mode(net, train),
        warnings.catch_warnings(),
        redirect_stderr(StringIO()),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(net, inputs, dynamic_shapes=shapes, strict=False)
            return program.run_decompositions({}) if written_elsewhere(program) else program
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
            at = next(
                (f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}, `{f.line}`" for f in own[::-1]), "?"
            )
            raise SymmetryError(
                f"find: torch.export cannot follow {type(net).__name__} at {at}. It says: "
                f"{str(error).splitlines()[0]} Cure: control flow must not depend on the data "
                "(torch.where instead of if); or take the part of the network without it."
            ) from error


def cut(
    program: ExportedProgram, names: Sequence[str], device: torch.device
) -> Callable[..., list[Tensor]]:
    """A function (θ, *inputs) that computes the tensors of these names, in evaluation mode.

    Raises SymmetryError when there is no such tensor.
    """
    graph = Graph()
    graph.graph_copy(program.graph, {})
    nodes = {n.name: n for n in graph.nodes}
    if missing := [n for n in names if n not in nodes]:
        raise SymmetryError(
            f"tapper: no tensor {missing[0]!r} in this network; find its symmetry anew"
        )
    wanted = [nodes[n] for n in names]
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
        if short(node) == "batch_norm":
            node.update_arg(5, False)
        elif short(node) in DROPOUTS:
            node.update_arg(2, False)
        elif short(node) == "bernoulli":  # stochastic depth: keep every sample, in proportion
            node.target = torch.ops.aten.fill_.Scalar
        if inplace(node) and node.args[0] in wanted:
            node.target = getattr(getattr(torch.ops.aten, short(node)), node.target._overloadname)
    graph.output(wanted)
    graph.eliminate_dead_code()
    module = GraphModule(program.graph_module, graph)
    stored = {**program.constants, **program.state_dict}
    sources = [s.target for s in program.graph_signature.input_specs]
    fixed = {n: t.to(device) for n, t in stored.items() if n in sources}

    def run(theta: Theta, *inputs: Tensor) -> list[Tensor]:
        given = iter(inputs)
        values = [next(given) if n is None else theta.get(n, fixed.get(n)) for n in sources]
        out: list[Tensor] = module(*values)
        return out

    return run


def batch_sizes(program: ExportedProgram) -> list[int | None]:
    """The batch size that each input must have; None for any."""
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.target is None}
    shapes = [n.meta["val"].shape for n in program.graph.nodes if n.name in inputs]
    return [known_size(s[0]) if s else None for s in shapes]


def known_size(n: int | torch.SymInt) -> int | None:
    """A size, unless it depends on the batch."""
    return n if isinstance(n, int) else n.node.maybe_as_int()


class NoDropout(TorchFunctionMode):
    """Leaves dropout out: it draws a mask for each unit, which would hide an invariance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


def exact(
    net: nn.Module, inputs: Sequence[Tensor], train: bool, seed: int
) -> Callable[[Theta], list[Tensor]]:
    """A function of float64 parameters: all outputs of `net`, the noise the same each time."""
    # What is in the state dict gets replaced; of the rest take a copy.
    net = copy.deepcopy(net, {id(t): t for t in net.state_dict(keep_vars=True).values()})
    for module in net.modules():
        for name in module._non_persistent_buffers_set:
            if (b := getattr(module, name)) is not None and b.is_floating_point():
                setattr(module, name, b.double())
    buffers = {n for n, _ in net.named_buffers()}

    def run(theta: Theta) -> list[Tensor]:
        device = next((t.device for t in theta.values()), None)
        given = tuple((t.double() if t.is_floating_point() else t).to(device) for t in inputs)
        values = {n: t.clone() if n in buffers else t for n, t in theta.items()}
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with mode(net, train), torch.no_grad(), NoDropout(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                out = functional_call(net, values, given, tie_weights=False)
        finally:
            torch.set_default_dtype(default)
        return [o for o in tree_leaves(out) if isinstance(o, Tensor)]

    return run


def jitter(t: Tensor, generator: torch.Generator) -> Tensor:
    """Float64; each entry scaled by about 1, equal ones moved apart; positive ones stay so.

    Weights that are tiny for their fan-in (as heads may start) are scaled up, so that they count.
    """
    if not t.is_floating_point() or not t.numel():
        return t.detach()
    t = t.detach().double()
    noise = torch.rand(2, *t.shape, dtype=t.dtype, generator=generator).to(t.device)
    if bool((t == t.flatten()[0]).all()):
        return t * (0.75 + noise[0] / 2) + 0.1 * noise[1]
    reach = float(t.std()) * t[0].numel() ** 0.5 if t.dim() > 1 else 1.0
    return t * (0.75 + noise[0] / 2) / (reach if 0 < reach < 0.1 else 1)


def samples(x: Tensor, dims: Sequence[int], index: np.ndarray) -> Tensor:
    """[samples, units] of an activation whose units sit at `index` [units, slots] of axes `dims`.

    A view of x if the units are its last axis in memory.
    """
    x = x.movedim(tuple(dims), tuple(range(-len(dims), 0))).flatten(-len(dims))
    order = index.T.ravel()
    if not np.array_equal(order, np.arange(x.shape[-1])):
        x = x.index_select(-1, torch.from_numpy(order).to(x.device))
    return x.reshape(-1, len(index))
