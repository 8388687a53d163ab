"""Values that look uniform and may be others, values that leave the network, and what proves.

A number that stands at all units alike lets them change places; but not if it may be trained, or
was alike for this length alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Graph, normal
from test_symmetry_soundness import A, Case, O, check, found, layer, tensor
from torch import Tensor, nn, tanh

from mcnotes import symmetry

Groups = dict[str, tuple[int, set[str]]]
CHANCE = np.random.default_rng(0)
BODY = {"a": layer(6, 8), "o": layer(8, 3)}
FREE: Groups = {"a": (8, A | O)}


def built(run: Callable[..., Any], **tensors: Tensor) -> nn.Module:
    """A layer, a function, a layer; buffers by name."""
    net, _ = Case(run, BODY, {})()
    for name, t in tensors.items():
        net.register_buffer(name, t.clone())
    return net


# Integers and truth values of the state dict move along with the units at which they stand.

MASK = torch.ones(8, dtype=torch.bool)
MASKED: dict[str, tuple[Callable[..., Any], Tensor, set[str]]] = {
    "product": (lambda s, x: s.o(tanh(s.a(x)) * s.m), MASK, A | O | {"m[0]"}),
    "where": (lambda s, x: s.o(torch.where(s.m, tanh(s.a(x)), 0.0)), MASK, A | O | {"m[0]"}),
    "filled": (lambda s, x: s.o(tanh(s.a(x)).masked_fill(~s.m, 0.0)), MASK, A | O | {"m[0]"}),
    "as numbers": (lambda s, x: s.o(tanh(s.a(x)) * s.m.float()), MASK, A | O | {"m[0]"}),
    "of weights": (
        lambda s, x: s.o(tanh(F.linear(x, s.a.weight * s.m))),
        torch.ones(8, 6, dtype=torch.bool),
        {"a.weight[0]", "m[0]"} | O,
    ),
    "steps": (
        lambda s, x: s.o(tanh(s.a(x)) * (s.m / 127)),
        torch.ones(8, dtype=torch.int8),
        A | O | {"m[0]"},
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_move_with_their_units(name: str) -> None:
    run, mask, places = MASKED[name]
    net, x = built(run, m=mask), torch.rand(2, 6)
    sym = symmetry.find(net, x)
    assert list(found(sym).values()) == [(8, places)]
    torch.manual_seed(1)
    net.m.copy_(torch.rand(mask.shape) < 0.5)  # pruned later
    before = net(x)
    net.load_state_dict(sym.permute(dict(net.state_dict()), sym.random()))
    torch.testing.assert_close(net(x), before)


ORDERS: dict[str, Callable[..., Any]] = {
    "index": lambda s, x: s.o(tanh(s.a(x))[:, s.m]),
    "select": lambda s, x: s.o(tanh(s.a(x)).index_select(1, s.m)),
    "of weights": lambda s, x: s.o(tanh(F.linear(x, s.a.weight[s.m]))),
    "in two steps": lambda s, x: s.o(tanh(s.a(x))[:, s.m.flip(0).flip(0)]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_is_stored_may_be_another(name: str) -> None:
    net = built(ORDERS[name], m=torch.arange(8))
    check(net, torch.rand(2, 6), {})
    assert "is looked up by a buffer" in symmetry.find(net, torch.rand(2, 6)).explain("a.weight")


def test_a_mask_that_chooses_units_pins_them() -> None:
    check(built(lambda s, x: s.o(tanh(s.a(x))[:, s.m]), m=MASK), torch.rand(2, 6), {})


def test_a_table_of_indices_leaves_the_other_axis_free() -> None:
    """As relative positions do: which rows are taken is stored, the columns are units."""
    run = lambda s, x: s.o(tanh(s.a(x) + s.p[s.m.flatten()].view(2, 2, 8).sum((0, 1))))  # noqa: E731
    net = built(run, m=torch.tensor([[1, 0], [2, 1]]))
    net.p = normal(3, 8)
    check(net, torch.rand(2, 6), {"a": (8, A | O | {"p[1]"})})


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.o((s.c * s.a(x)).abs()),
        lambda s, x: s.o(torch.view_as_real(s.c + s.a(x)).sum(-1)),
        lambda s, x: s.o((s.a(x) - s.c).real),
    ],
)
def test_complex_parameters_have_units(run: Callable[..., Any]) -> None:
    net = built(run)
    net.c = nn.Parameter(torch.zeros(8, dtype=torch.cfloat))
    sym = symmetry.find(net, torch.rand(2, 6))
    assert list(found(sym).values()) == [(8, A | O | {"c[0]"})]
    assert sym.verify(net, torch.rand(2, 6)) < 1e-9


# What reaches operators by other ways than the state dict stays as it is.


def behind(kind: str) -> nn.Module:
    """Numbers, all alike, that the network reaches by a way of this kind."""
    raw = nn.Parameter(torch.ones(8))
    net = built(lambda s, x: s.o(s.step(tanh(s.a(x)))))
    net.step = nn.Identity()
    if kind == "list":
        net.hidden = [raw]
        net.run = lambda s, x: s.o(tanh(s.a(x)) * s.hidden[0])
    elif kind == "closure":
        net.run = lambda s, x: s.o(tanh(s.a(x)) * raw)
    elif kind == "closure over a registered one":
        net.scale = raw
        net.run = lambda s, x: s.o(tanh(s.a(x)) * raw)
    elif kind == "hook":
        net.scale = raw
        net.step.register_forward_hook(lambda m, i, out: out + raw)
    elif kind == "modules in a list":
        net.hidden = [nn.LayerNorm(8)]
        net.run = lambda s, x: s.o(s.hidden[0](tanh(s.a(x))))
    elif kind == "zeros in a product":
        raw.data.zero_()
        net.run = lambda s, x: s.o(tanh(s.a(x)) + x.sum(1, keepdim=True) @ raw[None])
    elif kind == "view":
        net.run = lambda s, x: s.o(tanh(s.a(x)) * raw.detach().view(2, 4).flatten())
    elif kind == "concatenated":
        net.run = lambda s, x: s.o(torch.stack([tanh(s.a(x)), raw.expand(len(x), -1)]).sum(0))
    else:
        net.step = lambda h: h * torch.ones(8)
    return net


KINDS = [
    *("list", "closure", "closure over a registered one", "hook", "modules in a list"),
    *("zeros in a product", "view", "concatenated"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_registered_is_fixed(kind: str) -> None:
    check(behind(kind), torch.rand(2, 6), {})


# Alike by construction, or alike for this length only

ALIKE: dict[str, tuple[Callable[..., Any], Groups]] = {
    "ones": (lambda s, x: s.o(tanh(s.a(x)) * torch.ones(8)), FREE),
    "computed": (lambda s, x: s.o(tanh(s.a(x)) * (x.new_zeros(2, 8) + 3).exp()), FREE),
    "expanded": (lambda s, x: s.o(tanh(s.a(x)) * torch.tensor([2.0]).expand(8)), FREE),
    "written over": (lambda s, x: s.o(tanh(s.a(x)) * torch.empty(8).fill_(2.0)), FREE),
    "compared": (lambda s, x: s.o(tanh(s.a(x)) * (torch.arange(8) < 2 * x.shape[1])), {}),
    "divided": (lambda s, x: s.o(tanh(s.a(x)) * (torch.arange(8) // 8 + x.shape[1])), {}),
    "triangle": (
        lambda s, x: s.o(tanh(s.a(x)) * torch.ones(2, 8).tril(x.shape[1] + 3)[-1]),
        {},
    ),
    "written": (
        lambda s, x: s.o(
            tanh(s.a(x)) * torch.zeros(8).index_fill(0, torch.arange(x.shape[1] + 2), 1)
        ),
        {},
    ),
}


def ones_until(n: int) -> Tensor:
    y = torch.zeros(8)
    y[:n] = 1.0
    return y


@pytest.mark.parametrize("name", ALIKE)
def test_numbers_are_alike_by_construction_or_not_at_all(name: str) -> None:
    run, groups = ALIKE[name]
    check(built(run), torch.rand(2, 6), groups)


def test_known_indices_and_masks_are_followed() -> None:
    even = torch.arange(8) % 2 == 0
    half = {"a.weight[0]", "a.bias[0]"}
    for pick in (even, torch.arange(0, 8, 2), [0, 2, 4, 6]):
        net = built(lambda s, x, pick=pick: s.b(tanh(s.a(x))[:, pick]))
        net.b = nn.Linear(4, 3)
        sym = symmetry.find(net, torch.rand(2, 6))
        assert (4, half | {"b.weight[1]"}) in found(sym).values()
        assert sym.verify(net, torch.rand(2, 6)) < 1e-9


# Values that leave the network

LEAVING: dict[str, Callable[..., Any]] = {
    "numpy": lambda s, x: s.o(torch.from_numpy(s.a(x).detach().numpy())),
    "array": lambda s, x: s.o(torch.from_numpy(np.asarray(s.a(x)) * 2)),
    "list": lambda s, x: s.o(torch.tensor(s.a(x).tolist())),
    "list of inputs": lambda s, x: s.o(s.a(torch.tensor(x.tolist()))),
    "parameter": lambda s, x: s.o(s.a(x)) * float(s.a.bias.detach().numpy().sum()),
    "number": lambda s, x: s.o(s.a(x)) * s.a(x).sum().item(),
    "numbers": lambda s, x: s.o(s.a(x)) * float(sum(v for v in s.a.bias)),
    "stored": lambda s, x: s.o(s.a(x)) if s.m.all() else x,
}


@pytest.mark.parametrize("name", LEAVING)
def test_values_that_leave_are_refused(name: str) -> None:
    net = built(LEAVING[name], m=MASK)
    with pytest.raises(symmetry.SymmetryError) as caught:
        symmetry.find(net, torch.rand(2, 6))
    text = str(caught.value)
    assert "takes values out" in text or "needs values" in text
    assert "at the network (Graph), test_symmetry_values.py:" in text or "nets.py:" in text
    assert "Fix: " in text


@pytest.mark.parametrize(
    "size",
    [
        lambda: torch.arange(3).tolist()[2],
        lambda: float(torch.arange(3).numpy()[2]),
        lambda: float(np.asarray(torch.full((3,), 2.0))[0]),
        lambda: torch.arange(3).max().item(),
    ],
)
def test_known_values_may_leave(size: Callable[[], float]) -> None:
    check(built(lambda s, x: s.o(tanh(s.a(x)) * size())), torch.rand(2, 6), FREE)


# Memory

W = {"w": tensor(8, 8), **BODY}
STRIDED = {
    "same": Case(lambda s, x: s.o(tanh(s.a(x)).as_strided((2, 8), (8, 1))), BODY, FREE),
    "transposed": Case(
        lambda s, x: s.o(tanh((s.w.as_strided((8, 8), (1, 8)) @ s.a(x).T).T)),
        W,
        {"w[0]": (8, {"w[0]"} | A), "w[1]": (8, {"w[1]"} | O)},
    ),
    "of a transposed one": Case(
        lambda s, x: s.o(tanh((s.w.T.as_strided((8, 8), (8, 1)) @ s.a(x).T).T)),
        W,
        {"w": (8, {"w[0]"} | O), "a": (8, {"w[1]"} | A)},
    ),
    "repeated": Case(lambda s, x: s.o(tanh(s.a(x)).as_strided((2, 8), (0, 1))), BODY, FREE),
    # The first half comes from the first row, the second half from the second.
    "shifted": Case(
        lambda s, x: s.o(tanh(s.a(x)).as_strided((1, 8), (8, 1), 4)),
        BODY,
        {"a[0]": (4, A | O), "a[1]": (4, A | O)},
    ),
    "diagonal": Case(lambda s, x: s.o(tanh(s.a(x)[:1] * s.w.as_strided((8,), (9,)))), W, {}),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_heeded(name: str) -> None:
    net, x = STRIDED[name]()
    sym = symmetry.find(net, x)
    assert found(sym) == STRIDED[name].groups
    assert sym.verify(net, x) < 1e-9


@pytest.mark.parametrize(
    "part",
    [
        lambda h: h[:, 4:].as_strided((2, 8), (8, 1), 0),
        lambda h: F.pad(h[:, :4].as_strided((2, 4), (8, 1), 4), (0, 4)),
        lambda h: h[1:].as_strided((2, 8), (8, 1), 0),
        lambda h: h.expand(3, 2, 8).as_strided((2, 8), (8, 1)),
    ],
)
def test_memory_around_a_view_is_refused(part: Callable[[Tensor], Tensor]) -> None:
    net = built(lambda s, x: s.o(part(tanh(s.a(x)))))
    with pytest.raises(symmetry.SymmetryError, match="as_strided reads memory around a part"):
        symmetry.find(net, torch.rand(2, 6))


# What proves


def claimed(run: Callable[..., Any], shape: tuple[int, ...], **parts: Any) -> tuple[Any, Any, Any]:
    """A network in which `a` makes units that `o` reads, and the claim that all are free."""
    net, x = Case(run, {"a": layer(5, 8), "o": layer(8, 3), **parts}, {}, shape)()
    free = symmetry.find(Graph(lambda s, x: s.o(tanh(s.a(x))), a=net.a, o=net.o), x)
    return net, x, free


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.o(tanh(s.a(x)) * (torch.arange(8) < 4 * x.shape[1])),
        lambda s, x: s.o(tanh(s.a(x)) * ones_until(4 * x.shape[1])),
        lambda s, x: s.o(tanh(s.a(x)).mT.flatten(1)[:, :8]),
        lambda s, x: s.o(tanh(s.a(x)) + F.pad(s.p, (0, 0, 0, 8))[x.shape[1] // 2 - 1]),
        lambda s, x: s.o(tanh(s.a(x)) * (torch.arange(8) < 2 * len(x))[:, None].T),
    ],
)
@pytest.mark.parametrize("by_itself", [True, False])
def test_verify_tries_other_sizes(run: Callable[..., Any], by_itself: bool) -> None:
    net, x, free = claimed(run, (4, 2, 5), p=tensor(2, 8))
    if "flatten" in run.__code__.co_names:
        x = x[:, :1]
    net.p.data[0] = 0.0
    if by_itself:
        with pytest.raises(symmetry.SymmetryError, match=r"on inputs of shapes \("):
            free.verify(net, x)
    else:
        others = [torch.rand(1, 1, 5), torch.rand(3, 5, 5)]
        with pytest.raises(symmetry.SymmetryError, match="outputs differ"):
            free.verify(net, x, others=others)


def test_verify_takes_several_examples() -> None:
    net, x, free = claimed(lambda s, x: s.o(tanh(s.a(x))), (2, 4, 5))
    assert free.verify(net, x, others=[torch.rand(7, 5), torch.rand(1, 2, 3, 5)]) < 1e-12
    with pytest.raises(symmetry.SymmetryError, match="the network fails when it is run in float64"):
        free.verify(net, x, others=[torch.rand(7, 4)])


HARDLY: dict[str, Callable[..., Any]] = {
    "a large constant": lambda s, x: 1e6 + s.o(tanh(s.a(x))),
    "a tiny head": lambda s, x: 1.0 + 1e-7 * s.o(tanh(s.a(x))),
    "a scaled branch": lambda s, x: 1.0 + s.o(s.g * tanh(s.a(x))),
}


@pytest.mark.parametrize("name", HARDLY)
def test_verify_is_not_fooled_by_constants(name: str) -> None:
    net, x, free = claimed(HARDLY[name], (2, 5), g=lambda: nn.Parameter(torch.rand(8) * 1e-9))
    a, bias, *_ = free.groups["a"].places
    wrong = replace(free, groups={"a": replace(free.groups["a"], places=(a, bias))})
    with pytest.raises(symmetry.SymmetryError, match="outputs differ"):
        wrong.verify(net, x)
    places = (*free.groups["a"].places, symmetry.Place("g", (0,), a.index))
    right = replace(free, groups={"a": replace(free.groups["a"], places=places)})
    assert right.verify(net, x) < 1e-6


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.o(tanh(s.a(torch.zeros_like(x)))),
        lambda s, x: s.o(tanh(s.a.bias)).expand(len(x), -1),
        lambda s, x: s.o(tanh(s.a(x))) * 0.0 + 1.0,
    ],
)
def test_verify_refuses_to_compare_constants(run: Callable[..., Any]) -> None:
    net, x, free = claimed(run, (2, 5))
    with pytest.raises(symmetry.SymmetryError, match="do not depend on the inputs"):
        free.verify(net, x)


def test_verify_refuses_to_compare_chance() -> None:
    net, x, free = claimed(lambda s, x: s.o(tanh(s.a(x))) * CHANCE.random(), (2, 5))
    with pytest.raises(symmetry.SymmetryError, match="a second run on the same inputs differs"):
        free.verify(net, x)


def test_verify_sees_through_heads_of_zeros() -> None:
    net, x, free = claimed(lambda s, x: s.o(tanh(s.a(x))), (2, 5))
    for p in net.o.parameters():
        nn.init.zeros_(p)
    assert free.verify(net, x) < 1e-12
    a, bias, *_ = free.groups["a"].places
    wrong = replace(free, groups={"a": replace(free.groups["a"], places=(a, bias))})
    with pytest.raises(symmetry.SymmetryError, match="outputs differ"):
        wrong.verify(net, x)


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.o(tanh(s.a(x)).softmax(-1, dtype=torch.float32)),
        lambda s, x: s.o(tanh(s.a(x)).float().half().float()),
        lambda s, x: s.o(tanh(s.a(x)) @ torch.eye(8, dtype=torch.float32)[:, :8].fill_(1.0)),
    ],
)
def test_verify_computes_in_float64_whatever_the_network_names(run: Callable[..., Any]) -> None:
    net, x, free = claimed(run, (2, 5))
    assert free.verify(net, x) < 1e-12


def test_verify_jitters_masks_that_move() -> None:
    net, x, free = claimed(lambda s, x: s.o(tanh(s.a(x)) * s.m), (2, 5))
    net.register_buffer("m", torch.ones(8, dtype=torch.bool))
    assert symmetry.find(net, x).verify(net, x) < 1e-12
    index = free.groups["a"].places[0].index
    places = (*free.groups["a"].places, symmetry.Place("m", (0,), np.roll(index, 1, 0)))
    wrong = replace(free, groups={"a": replace(free.groups["a"], places=places)})
    with pytest.raises(symmetry.SymmetryError, match="outputs differ"):
        wrong.verify(net, x)
