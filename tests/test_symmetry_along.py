"""Operators that act along another axis than the units' leave the units free.

Sorting, sums so far, choice and writing by indices, graph networks, recurrent layers. Along the
units' own axis, and where indices or values differ from unit to unit, the units stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_symmetry_soundness import A, Case, Groups, O, check, layer, tensor
from torch import Tensor, arange, nn, tanh

from mcnotes import symmetry

BODY = {"a": layer(6, 8), "o": layer(8, 3)}
FREE: Groups = {"a": (8, A | O)}
SHAPE, OTHERS = (2, 4, 6), [(3, 9, 6), (2, 2, 6)]
Run = Callable[..., Any]


def columns(x: Tensor) -> Tensor:
    """An order of times that depends on the inputs, the same for all units [N, T, 1]."""
    return x.sum(-1, keepdim=True).argsort(1)


def by_unit(n: int, *shape: int) -> Tensor:
    """Indices below n that differ from unit to unit [*shape, 8]."""
    return (arange(8) % n).expand(*shape, 8).contiguous()


def neighbours(x: Tensor) -> Tensor:
    return arange(x.shape[1]) % 2


FREE_RUNS: dict[str, Run] = {
    "largest": lambda s, x: s.o(tanh(s.a(x)).max(1).values),
    "smallest, kept": lambda s, x: s.o(tanh(s.a(x)) - s.a(x).min(1, keepdim=True)[0]),
    "where largest": lambda s, x: s.o(tanh(s.a(x)).max(1).indices.to(x.dtype)),
    "middle": lambda s, x: s.o(tanh(s.a(x)).median(1).values),
    "quantile": lambda s, x: s.o(tanh(s.a(x)).quantile(0.3, 1)),
    "argmax": lambda s, x: s.o(s.a(x).argmax(1).to(x.dtype)),
    "sort": lambda s, x: s.o(tanh(s.a(x)).sort(1).values),
    "argsort": lambda s, x: s.o(s.a(x).argsort(1).to(x.dtype)),
    "topk": lambda s, x: s.o(tanh(s.a(x)).topk(2, 1).values),
    "kthvalue": lambda s, x: s.o(tanh(s.a(x)).kthvalue(2, 1).values),
    "cumsum": lambda s, x: s.o(tanh(s.a(x)).cumsum(1)),
    "cumprod": lambda s, x: s.o(tanh(s.a(x)).cumprod(1)),
    "cummax": lambda s, x: s.o(tanh(s.a(x)).cummax(1).values),
    "logcumsumexp": lambda s, x: s.o(s.a(x).logcumsumexp(1)),
    "spectrum": lambda s, x: s.o(torch.fft.fft(tanh(s.a(x)), dim=1).real),
    "spectrum and back": lambda s, x: s.o(
        torch.fft.irfft(torch.fft.rfft(s.a(x), dim=1).tanh(), n=x.shape[1], dim=1)
    ),
    "gather": lambda s, x: s.o(tanh(s.a(x)).gather(1, columns(x).expand(-1, -1, 8))),
    "gather by each unit's order": lambda s, x: s.o(tanh(s.a(x)).gather(1, s.a(x).argsort(1))),
    "index_add": lambda s, x: s.o(torch.zeros(len(x), 2, 8).index_add(1, neighbours(x), s.a(x))),
    "scatter_add": lambda s, x: s.o(
        torch.zeros(len(x), x.shape[1], 8).scatter_add(1, columns(x).expand(-1, -1, 8), s.a(x))
    ),
    "scatter_reduce": lambda s, x: s.o(
        tanh(s.a(x)).scatter_reduce(1, columns(x).expand(-1, -1, 8), s.a(x), "amax")
    ),
    "one time by data": lambda s, x: s.o(tanh(s.a(x))[arange(len(x)), x.sum(-1).argmax(1)]),
    "units between": lambda s, x: s.o(tanh(s.a(x)).mT[arange(len(x)), :, x.sum(-1).argmax(1)]),
    "last time": lambda s, x: s.o(tanh(s.a(x))[arange(len(x)), torch.full((len(x),), -1)]),
    "some times": lambda s, x: s.o(tanh(s.a(x)).index_select(1, x.sum((0, 2)).argsort())),
    "mask written": lambda s, x: s.o(tanh(s.a(x)).index_put((x.sum(-1) > 3,), torch.zeros(()))),
    "rows written": lambda s, x: s.o(
        tanh(s.a(x)).index_put((arange(len(x)), x.sum(-1).argmax(1)), s.a(x[:, 0]), True)
    ),
    # Along the units, but in any order the same.
    "largest unit": lambda s, x: s.o(tanh(s.a(x)) * s.a(x).max(-1, keepdim=True).values),
    "third unit": lambda s, x: s.o(tanh(s.a(x)) * s.a(x).kthvalue(3, -1, keepdim=True).values),
    "largest of all": lambda s, x: s.o(tanh(s.a(x)) * s.a(x).max()),
}
PINNED_RUNS: dict[str, Run] = {
    "sorted units": lambda s, x: s.o(tanh(s.a(x)).sort(-1).values),
    "sorted weights": lambda s, x: s.o(tanh(F.linear(x, s.a.weight.sort(0).values))),
    "units so far": lambda s, x: s.o(tanh(s.a(x)).cumsum(-1)),
    "spectrum of units": lambda s, x: s.o(torch.fft.fft2(tanh(s.a(x))).real),
    "which unit": lambda s, x: s.o(tanh(s.a(x)) * s.a(x).max(-1, keepdim=True)[1].to(x.dtype)),
    "which of all": lambda s, x: s.o(tanh(s.a(x)) * s.a(x).argmax().to(x.dtype)),
    "compared with others": lambda s, x: s.o(torch.max(tanh(s.a(x)), torch.linspace(-1, 1, 8))),
    "times by unit": lambda s, x: s.o(tanh(s.a(x)).gather(1, by_unit(2, len(x), 1))),
    "written at times by unit": lambda s, x: s.o(
        torch.zeros(len(x), 2, 8).scatter_add(1, by_unit(2, len(x), x.shape[1]), tanh(s.a(x)))
    ),
    "written values by unit": lambda s, x: s.o(
        tanh(s.a(x)).index_put((x.sum(-1) > 3,), arange(8.0))
    ),
    "some units written": lambda s, x: s.o(
        tanh(s.a(x)).scatter(1, by_unit(1, len(x), 1)[..., :4], torch.ones(len(x), 1, 4))
    ),
    "units in an order of the data": lambda s, x: s.o(
        tanh(s.a(x))[:, :, x.sum((0, 1))[[0, 1, 2, 3, 4, 5, 0, 1]].argsort()]
    ),
    "units in their own order": lambda s, x: s.o(tanh(s.a(x))[:, :, s.a(x).sum((0, 1)).argsort()]),
    "units added": lambda s, x: s.o(
        torch.zeros(len(x), x.shape[1], 8).index_add(2, arange(8) % 3, tanh(s.a(x)))
    ),
    "times and units": lambda s, x: s.o(tanh(s.a(x))[:, arange(8) * 0, arange(8)]),
    # Heads are lines of several units.
    "sorted heads": lambda s, x: s.o(tanh(s.a(x)).unflatten(-1, (2, 4)).sort(2)[0].flatten(2)),
    "heads so far": lambda s, x: s.o(tanh(s.a(x)).unflatten(-1, (2, 4)).cumsum(2).flatten(2)),
}


@pytest.mark.parametrize("name", FREE_RUNS)
def test_along_another_axis_units_are_free(name: str) -> None:
    net, x = Case(FREE_RUNS[name], BODY, FREE, SHAPE)()
    check(net, x, FREE, *map(torch.rand, OTHERS))


@pytest.mark.parametrize("name", PINNED_RUNS)
def test_along_the_units_or_by_unit_they_stay(name: str) -> None:
    net, x = Case(PINNED_RUNS[name], BODY, {}, SHAPE)()
    check(net, x, {})


# Graph networks: edges are inputs


class Convolution(nn.Module):
    """Sums over neighbours, twice, written in the two usual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = tanh(self.a(x))
        h = tanh(self.b(torch.zeros_like(h).index_add(0, edges[0], h[edges[1]])))
        m = h.index_select(0, edges[1])
        y: Tensor = self.o(torch.zeros_like(h).scatter_add(0, edges[0, :, None].expand_as(m), m))
        return y


class Attention(Convolution):
    """Weights of edges by a softmax over neighbours."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h, (i, j) = tanh(self.a(x)), edges
        w = (h[i] * h[j]).sum(-1).exp()
        w = w / torch.zeros(len(x)).index_add(0, i, w)[i]
        h = torch.zeros_like(h).index_put((i,), h[j] * w[:, None], accumulate=True)
        y: Tensor = self.o(tanh(self.b(h)))
        return y


class Largest(Convolution):
    """The largest message of all neighbours."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        m = tanh(self.a(x))[edges[1]]
        i = edges[0, :, None].expand_as(m)
        h = torch.zeros(len(x), 8).scatter_reduce(0, i, m, "amax", include_self=False)
        y: Tensor = self.o(tanh(self.b(h)))
        return y


@pytest.mark.parametrize("kind", [Convolution, Attention, Largest])
def test_graph_networks(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, edges = kind(), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    example = torch.rand(4, 6), edges
    sym = symmetry.find(net, example)
    assert {n: g.size for n, g in sym.groups.items()} == {"a": 8, "b": 7}
    other = torch.rand(5, 6), torch.randint(5, (2, 9))
    assert sym.verify(net, example, others=[other]) < 1e-9


def test_pooling_over_points() -> None:
    torch.manual_seed(0)
    net = Case(
        lambda s, x: s.o(tanh(s.b(torch.max(tanh(s.a(x.mT)), 2)[0]))),
        {"a": lambda: nn.Conv1d(3, 8, 1), "b": layer(8, 5), "o": layer(5, 2)},
        {},
    )()[0]
    groups = {
        "a": (8, A | {"b.weight[1]"}),
        "b": (5, {"b.weight[0]", "b.bias[0]", "o.weight[1]"}),
    }
    check(net, torch.rand(2, 9, 3), groups, torch.rand(3, 4, 3))


# Layers


def recurrent(inputs: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.LSTM(inputs, 8, batch_first=True, **options)


GATES = {f"r.{kind}_l0[0]" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
UNITS = GATES | {"r.weight_hh_l0[1]"} | O
B = {"b.weight[0]", "b.bias[0]"}
TABLE = {"p": tensor(5, 8)}
LAYERS: dict[str, Case] = {
    "lstm": Case(
        lambda s, x: s.o(s.r(x)[0]), {**BODY, "r": recurrent(6)}, {"r.weight_ih_l0": (8, UNITS)}
    ),
    "lstm without biases": Case(
        lambda s, x: s.o(s.r(x)[0]),
        {**BODY, "r": recurrent(6, bias=False)},
        {"r.weight_ih_l0": (8, UNITS - {"r.bias_ih_l0[0]", "r.bias_hh_l0[0]"})},
    ),
    "states of lstm": Case(
        lambda s, x: s.o(s.r(x)[1][0][0] + s.r(x)[1][1][0]),
        {**BODY, "r": recurrent(6)},
        {"r.weight_ih_l0": (8, UNITS)},
    ),
    "lstm in a stream": Case(
        lambda s, x: s.o(tanh(s.a(x)) + s.r(tanh(s.a(x)))[0]),
        {**BODY, "r": recurrent(8)},
        {"a": (8, UNITS | A | {"r.weight_ih_l0[1]"})},
    ),
    "lstm begins with a ramp": Case(
        lambda s, x: s.o(s.r(x, (arange(8.0).expand(1, len(x), 8), x.new_zeros(1, len(x), 8)))[0]),
        {**BODY, "r": recurrent(6)},
        {},
    ),
    "cell of lstm begins with a ramp": Case(
        lambda s, x: s.o(s.r(x, (x.new_zeros(1, len(x), 8), arange(8.0).expand(1, len(x), 8)))[0]),
        {**BODY, "r": recurrent(6)},
        {},
    ),
    "lstm is the output": Case(lambda s, x: s.r(x)[0], {"r": recurrent(6)}, {}),
    "bilinear": Case(
        lambda s, x: s.o(tanh(s.r(tanh(s.a(x)), tanh(s.b(x))))),
        {"a": layer(6, 8), "b": layer(6, 7), "r": lambda: nn.Bilinear(8, 7, 5), "o": layer(5, 3)},
        {
            "a": (8, A | {"r.weight[1]"}),
            "b": (7, B | {"r.weight[2]"}),
            "r": (5, {"r.weight[0]", "r.bias[0]"} | O),
        },
    ),
    "distances": Case(
        lambda s, x: torch.cdist(tanh(s.a(x)), tanh(s.b(x))),
        {"a": layer(6, 8), "b": layer(6, 8)},
        {"a": (8, A | B)},
    ),
    "distances to prototypes": Case(
        lambda s, x: torch.cdist(tanh(s.a(x)), s.p[None]) @ s.q,
        {"a": layer(6, 8), "p": tensor(5, 8), "q": tensor(5, 3)},
        {"p": (5, {"p[0]", "q[0]"}), "a": (8, A | {"p[1]"})},
    ),
    **{
        f"bag, {mode}": Case(
            lambda s, x, mode=mode: s.o(
                tanh(s.a(x)).sum(1) + F.embedding_bag((x[..., 0] > 0.5).long() + 1, s.p, mode=mode)
            ),
            {**BODY, **TABLE},
            {"a": (8, A | O | {"p[1]"})},
        )
        for mode in ("sum", "mean", "max")
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    case = LAYERS[name]._replace(shape=SHAPE)
    net, x = case()
    check(net, x, case.groups, torch.rand(3, 9, 6))


IMAGES: dict[str, tuple[Run, bool]] = {
    "sampled": (
        lambda s, x: F.grid_sample(
            tanh(s.a(x)), x[:, :2, :4, :4].permute(0, 2, 3, 1), align_corners=False
        ),
        True,
    ),
    "patches": (
        lambda s, x: F.unfold(tanh(s.a(x)), 2).view(len(x), 8, 4, -1).sum(2)[..., None],
        True,
    ),
    "windows": (
        lambda s, x: tanh(s.a(x)).unfold(2, 3, 2).unfold(3, 3, 1).mean((-1, -2)),
        True,
    ),
    "windows of channels": (
        lambda s, x: F.pad(tanh(s.a(x)), (0, 0, 0, 0, 1, 1)).unfold(1, 3, 1).amax(-1),
        False,
    ),
    "patches and back": (lambda s, x: F.fold(F.unfold(tanh(s.a(x)), 2), (6, 6), 2), True),
    "patches shifted": (lambda s, x: F.fold(F.unfold(s.a(x), 2).roll(1, 1), (6, 6), 2), False),
    "sampled by units": (
        lambda s, x: F.grid_sample(
            tanh(s.a(x)), tanh(s.a(x)).movedim(1, -1)[..., :2], align_corners=False
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_channels_of_images(name: str) -> None:
    run, free = IMAGES[name]
    case = Case(
        lambda s, x: s.o(tanh(s.b(run(s, x))).mean((2, 3))),
        {"a": lambda: nn.Conv2d(3, 8, 3), "b": lambda: nn.Conv2d(8, 5, 1), "o": layer(5, 3)},
        {},
        (2, 3, 8, 8),
    )
    groups: Groups = {"a": (8, A | {"b.weight[1]"})} if free else {}
    check(*case(), groups | {"b": (5, B | O)})


def test_experts_that_the_data_choose() -> None:
    """Of all experts, units move together; which expert is which is the router's own order.

    Two query heads share each of two heads of keys and values.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    net, ids = transformers.MixtralForCausalLM(config), torch.randint(20, (2, 5))
    sym = symmetry.find(net, ids)
    assert sorted(g.size for g in sym.groups.values()) == [2, 2, 2, 6, 6, 20, 24]
    assert sym.verify(net, ids, others=[torch.randint(20, (3, 9))]) < 1e-9


# Branches and experts


def selective(s: Any, x: Tensor) -> Any:
    """Two branches, of which each unit chooses by a softmax, as in SKNet."""
    mean = x.mean(1)
    gates = torch.stack([s.c(mean), s.d(mean)], 1).softmax(1)[:, :, None]
    return s.o((torch.stack([tanh(s.a(x)), tanh(s.b(x))], 1) * gates).sum(1))


def split(s: Any, x: Tensor) -> Any:
    """Both branches from one layer, both gates from another, as in ResNeSt."""
    branches = tanh(s.c(x)).unflatten(-1, (2, 8))
    gates = s.d(tanh(s.b(x.mean(1)))).unflatten(-1, (2, 8)).softmax(1)
    return s.o((branches * gates[:, None]).sum(2))


def stacked(s: Any, x: Tensor) -> Any:
    """Experts in one tensor, all of which are weighed."""
    gates = (x.mean(1) @ s.g).softmax(-1)[:, :, None, None]
    hidden = torch.einsum("nti,eih->neth", x, s.w).relu() * gates
    return torch.einsum("neth,eho->nto", hidden, s.v)


BRANCHES: dict[str, tuple[Run, dict[str, Callable[[], Any]], list[int]]] = {
    "selective": (selective, {n: layer(6, 8) for n in "abcd"} | {"o": layer(8, 3)}, [8]),
    "split": (
        split,
        {"b": layer(6, 4), "c": layer(6, 16), "d": layer(4, 16), "o": layer(8, 3)},
        [2, 2, 2, 2, 2, 2, 2, 2, 4, 8],  # the branches of each unit; the units
    ),
    "stacked": (
        stacked,
        {"w": tensor(4, 6, 5), "v": tensor(4, 5, 3), "g": tensor(6, 4)},
        [4, 5],  # the experts; the units of all of them together
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_and_experts(name: str) -> None:
    run, parts, sizes = BRANCHES[name]
    net, x = Case(run, parts, {}, SHAPE)()
    sym = symmetry.find(net, x)
    assert sorted(g.size for g in sym.groups.values()) == sizes
    assert sym.verify(net, x, others=[torch.rand(3, 9, 6)]) < 1e-9
