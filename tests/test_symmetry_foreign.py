"""What others bring is followed, or refused: in a paragraph that says where, why, what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import normal
from test_symmetry_soundness import A, Case, O, check, found, layer
from torch import Tensor, nn, tanh
from torch.utils.checkpoint import checkpoint

from mcnotes import symmetry

X = torch.rand(2, 6)
FREE = {"a": (8, A | O)}
BODY = {"a": layer(6, 8), "o": layer(8, 3)}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class OldSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()


class NewSwish(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


def energy(s: Any, x: Tensor) -> Tensor:
    """The gradient of a sum, as networks of forces take it."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(tanh(s.a(y)).sum(), y, create_graph=True)
    return s.o(tanh(s.a(x))) + force.sum(1, keepdim=True)


# Followed: whether all units are found free.

FOLLOWED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "to device and type": (lambda s, x: s.o(tanh(s.a(x)).to(device=x.device, dtype=x.dtype)), FREE),
    "to double": (lambda s, x: s.o(tanh(s.a(x)).to("cpu", torch.float64).float()), FREE),
    "to like": (lambda s, x: s.o(tanh(s.a(x)).to(x)), FREE),
    "softmax in a type": (lambda s, x: s.o(s.a(x).softmax(-1, dtype=torch.float32)), FREE),
    "log-softmax in a type": (lambda s, x: s.o(F.log_softmax(s.a(x), -1, dtype=x.dtype)), FREE),
    "sum in a type": (lambda s, x: s.o(tanh(s.a(x)) * s.a(x).sum(-1, True, dtype=x.dtype)), FREE),
    "quantile": (lambda s, x: s.o(tanh(s.a(x))) * s.a(x).quantile(0.5, -1, keepdim=True), {}),
    "median": (lambda s, x: s.o(tanh(s.a(x))) * s.a(x).median(-1, keepdim=True).values, FREE),
    "own gradient, old": (lambda s, x: s.o(OldSwish.apply(s.a(x))), FREE),
    "own gradient, new": (lambda s, x: s.o(NewSwish.apply(s.a(x))), FREE),
    "checkpoint, reentrant": (
        lambda s, x: s.o(checkpoint(lambda y: tanh(s.a(y)), x, use_reentrant=True)),
        FREE,
    ),
    "checkpoint": (
        lambda s, x: s.o(checkpoint(lambda y: tanh(s.a(y)), x, use_reentrant=False)),
        FREE,
    ),
    "gradient within": (energy, FREE),
    "functional gradient": (
        lambda s, x: s.o(tanh(s.a(x))) + torch.func.grad(lambda y: tanh(s.a(y)).sum())(x).sum(),
        FREE,
    ),
    "vmap": (lambda s, x: torch.vmap(lambda y: s.o(tanh(s.a(y))))(x), FREE),
    "solve": (lambda s, x: s.o(tanh(torch.linalg.solve(s.w, s.a(x).T).T)), {}),
    "inverse": (lambda s, x: s.o(tanh(s.a(x)) @ torch.linalg.inv(s.w)), {}),
    "determinant": (lambda s, x: s.o(tanh(s.a(x))) * torch.linalg.det(s.w), FREE),
    "orthogonal": (lambda s, x: s.o(tanh(s.a(x)) @ torch.linalg.qr(s.w)[0]), {}),
    "diagonal": (
        lambda s, x: s.o(tanh((s.a(x)[..., None] * s.a(x)[:, None]).sum(0).fill_diagonal_(0.0))),
        {},
    ),
    "sparse": (
        lambda s, x: s.o(tanh(torch.sparse.mm(torch.eye(2, dtype=x.dtype).to_sparse(), s.a(x)))),
        {},
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_followed(name: str) -> None:
    run, groups = FOLLOWED[name]
    net, x = Case(run, BODY, {})()
    net.w = normal(8, 8)
    check(net, x, groups)


@pytest.mark.parametrize(
    "example",
    [
        {"x": X},
        {"x": X, "mask": None},
        (X, None),
        (X,),
        {"x": X, "scale": 2.0, "name": "text"},
        {"x": X, "more": [{"y": (X, None)}, 3]},
    ],
)
def test_examples_of_many_forms(example: Any) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Any = None, **more: Any) -> Tensor:
            return self.o(tanh(self.a(x)))

    net = Keywords()
    sym = symmetry.find(net, example)
    assert found(sym) == FREE
    assert sym.verify(net, example) < 1e-12


@pytest.mark.parametrize("net", [nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Softmax(-1))])
def test_networks_without_parameters_have_no_groups(net: nn.Module) -> None:
    sym = symmetry.find(net, X)
    assert sym.groups == {}
    assert sym.verify(net, X) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype: torch.dtype) -> None:
    net, x = mlp().to(dtype), X.to(dtype)
    sym = symmetry.find(net, x)
    assert [g.size for g in sym.groups.values()] == [8]
    assert sym.verify(net, x) < 1e-12


class Holder:
    """A plain object with a tensor."""

    def __init__(self) -> None:
        self.scale = torch.full((1,), 2.0)


def test_tensors_in_objects_are_followed() -> None:
    net = Case(lambda s, x: s.o(tanh(s.a(x)) * s.holder.scale), BODY, {})()[0]
    net.holder = Holder()
    check(net, X, FREE)


def test_a_scripted_layer_among_others() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(6, 8))
    net = nn.Sequential(scripted, nn.Tanh(), nn.Linear(8, 3))
    sym = symmetry.find(net, X)
    assert [g.size for g in sym.groups.values()] == [8]
    assert sym.verify(net, X) < 1e-12


# Refused


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(mlp())


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp(), X)


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


def with_generator() -> nn.Module:
    net = mlp()
    net.rest = (i for i in range(3))
    return net


def graph(run: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Case(run, BODY, {})()[0]


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "script": (scripted, X, "compiled by torch.jit"),
    "trace": (traced, X, "compiled by torch.jit"),
    "data parallel": (lambda: nn.DataParallel(mlp()), X, "wrapped in DataParallel"),
    "quantised": (quantised, X, r"0 \(Linear\) holds quantised weights"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), X, r"0 \(LazyLinear\) has parameters"),
    "generator": (with_generator, X, r"cannot be copied, for .*'rest' cannot \(cannot pickle"),
    "shape": (mlp, torch.rand(2, 5), r"itself fails on this example at 0 \(Linear\): RuntimeError"),
    "keyword": (mlp, {"y": X}, "itself fails on this example .* unexpected keyword argument 'y'"),
    "own fault": (
        graph(lambda s, x: s.o(s.a(x)) / (1 // 0)),
        X,
        r"itself fails on this example at the network \(Graph\), .*ZeroDivisionError",
    ),
    "branch": (graph(lambda s, x: s.o(s.a(x)) if x.sum() > 0 else x), X, "needs values at"),
    "some rows": (graph(lambda s, x: s.o(tanh(s.a(x))[x.sum(1) > 0])), X, "needs values at"),
    "how many": (graph(lambda s, x: s.o(s.a(x))[x.nonzero()[0]]), X, "needs values at the network"),
    "ragged": (
        graph(lambda s, x: s.o(s.a(torch.nested.nested_tensor([*x])).to_padded_tensor(0.0))),
        X,
        "needs values at the network",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused(name: str) -> None:
    make, example, message = REFUSED[name]
    with pytest.raises(symmetry.SymmetryError, match=message) as caught:
        symmetry.find(make(), example)
    text = str(caught.value)
    assert re.search(r"\. Fix: .*\.$", text)
    assert "\n" not in text
    assert len(text) < 600


@pytest.mark.parametrize(("net", "example"), [(torch.tanh, X), (mlp(), None), (mlp(), [1.0])])
def test_what_is_no_network_or_example_is_refused(net: Any, example: Any) -> None:
    with pytest.raises(symmetry.SymmetryError, match=r"find: (net|example): got .*, expected a"):
        symmetry.find(net, example)


def test_verify_needs_values() -> None:
    net = mlp().to("meta")
    sym = symmetry.find(net, X)
    assert [g.size for g in sym.groups.values()] == [8]
    with pytest.raises(symmetry.SymmetryError, match="Fix: give values as theta"):
        sym.verify(net, X)


def test_growth_is_linear_in_depth() -> None:
    """Counted in facts and in calls, which no other work on this machine disturbs."""
    import cProfile
    import pstats

    import transformers

    from mcnotes.symmetry.groups import run_trace

    def cost(layers: int) -> tuple[int, int]:
        config = transformers.LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            use_cache=False,
        )
        torch.manual_seed(0)
        net, ids = transformers.LlamaForCausalLM(config), torch.randint(20, (2, 4))
        profile = cProfile.Profile()
        profile.runcall(symmetry.find, net, ids)
        trace, _ = run_trace(net, ids, False)
        return pstats.Stats(profile).total_calls, sum(f.shape[1] for f in trace.facts)

    cost(1)  # what is computed once for a process does not count
    one, two, four = (cost(n) for n in (2, 4, 8))
    for a, b, c in zip(one, two, four, strict=True):
        assert c - b < 2.2 * (b - a)


class Masked(nn.Module):
    """Attention of one head with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.o = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).mT + mask).softmax(-1)
        read: Tensor = self.o(weights @ x)
        return read


@pytest.mark.parametrize(
    ("samples", "mask"), [(3, (1, 4, 4)), (3, (4, 4)), (3, (3, 4, 4)), (1, (1, 4, 4)), (1, (4, 4))]
)
def test_a_mask_may_be_for_all_samples(samples: int, mask: tuple[int, ...]) -> None:
    net, example = Masked(), (torch.randn(samples, 4, 6), torch.randn(mask))
    found = symmetry.find(net, example, kinds=symmetry.KINDS)
    assert [g.size for g in found.permutations.groups.values()] == [8]
    assert [f.kind for f in found.factors.values()] == ["bases"]
    assert found.verify(net, example) < 1e-9
    assert found.permutations.verify(net, example) < 1e-9
