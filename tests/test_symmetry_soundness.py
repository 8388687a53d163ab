"""Graphs in which units look interchangeable and are not, or are lost on the way.

Each is a member of a kind of fault. What must be found is written out: the groups by name, and for
each its size and the axes on which it acts.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import Graph, normal
from torch import Tensor, nn, tanh

from mcnotes import symmetry
from mcnotes.symmetry.execute import Shared, unfused_attention

Groups = dict[str, tuple[int, set[str]]]
A = {"a.weight[0]", "a.bias[0]"}  # the units that layer `a` makes
O = {"o.weight[1]"}  # noqa: E741 (those that layer `o` reads)


def found(sym: symmetry.Symmetry) -> Groups:
    return {
        name: (g.size, {f"{p.name}[{p.axis}]" for p in g.places}) for name, g in sym.groups.items()
    }


def check(net: nn.Module, example: Tensor, expected: Groups, *others: Tensor) -> None:
    """These groups are found, and hold for the example and for other inputs."""
    sym = symmetry.find(net, example)
    assert found(sym) == expected
    for x in (example, *others):
        assert sym.verify(net, x) < 1e-9


class Case(NamedTuple):
    run: Callable[..., Any]
    parts: dict[str, Callable[[], Any]]
    groups: Groups
    shape: tuple[int, ...] = (2, 6)

    def __call__(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        net = Graph(self.run, **{n: make() for n, make in self.parts.items()})
        return net, torch.rand(self.shape)


def layer(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


def tensor(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: normal(*shape)


# Several factors on one axis: all of them meet what stands there.

SHARED_AXIS = {
    "linear": Case(
        lambda s, x: s.o(tanh(F.linear(x, s.w.flatten(1)))),
        {"w": tensor(8, 2, 3), "o": layer(8, 3)},
        {"w": (8, {"w[0]"} | O)},
    ),
    "einsum": Case(
        lambda s, x: s.o(tanh(torch.einsum("bhd,hde->be", x.view(-1, 2, 3), s.w))),
        {"w": tensor(2, 3, 8), "o": layer(8, 3)},
        {"w": (8, {"w[2]"} | O)},
    ),
    "convolution": Case(
        lambda s, x: s.o(tanh(F.conv2d(x, s.w.view(8, 6, 3, 3))).mean((2, 3))),
        {"w": tensor(8, 2, 3, 3, 3), "o": layer(8, 3)},
        {"w": (8, {"w[0]"} | O)},
        (2, 6, 5, 5),
    ),
    # The output's axis is a grid of u's and v's units: one of them is kept.
    "kron": Case(
        lambda s, x: s.o(tanh(x @ torch.kron(s.u, s.v))),
        {"u": tensor(2, 4), "v": tensor(3, 2), "o": layer(8, 3)},
        {"u": (4, {"u[1]"} | O)},
    ),
    "constant": Case(
        lambda s, x: s.o(tanh(torch.linspace(1, 2, 6) * s.w.flatten() * x.sum(1, keepdim=True))),
        {"w": tensor(2, 3), "o": layer(6, 3)},
        {},
    ),
    "input": Case(
        lambda s, x: s.o(tanh(x + s.w.flatten())),
        {"w": tensor(2, 3), "o": layer(6, 3)},
        {},
    ),
    "condition": Case(
        lambda s, x: s.o(tanh(torch.where(x > 0.5, s.w.flatten(), 0.0))),
        {"w": tensor(2, 3), "o": layer(6, 3)},
        {},
    ),
    "three": Case(
        lambda s, x: s.o(tanh(x * s.w.flatten())),
        {"w": tensor(2, 3, 2), "o": layer(12, 3)},
        {},
        (2, 12),
    ),
    "hidden meets three": Case(
        lambda s, x: s.o(tanh(s.w.flatten() * tanh(s.a(x)))),
        {"a": layer(6, 12), "w": tensor(2, 3, 2), "o": layer(12, 3)},
        {"w": (2, {"w[0]"} | A | O)},
    ),
    # Another grid of the same length: nothing can move.
    "two grids": Case(
        lambda s, x: s.o(tanh(s.v.flatten() * s.w.flatten()) * x.sum(1, keepdim=True)),
        {"v": tensor(3, 2), "w": tensor(2, 3), "o": layer(6, 3)},
        {},
    ),
    "one grid twice": Case(
        lambda s, x: (s.v.flatten() * s.w.flatten() * x.sum(1, keepdim=True)).exp().sum(1),
        {"v": tensor(3, 2), "w": tensor(3, 2)},
        {"v[0]": (3, {"v[0]", "w[0]"}), "v[1]": (2, {"v[1]", "w[1]"})},
    ),
    # A constant that is the same in its first layer, and not in the second.
    "concatenation": Case(
        lambda s, x: s.o(
            tanh(torch.cat([s.a(x)[:, None], s.ramp.expand(len(x), -1, -1)], 1)).sum(1)
        ),
        {"a": layer(6, 6), "o": layer(6, 3)},
        {},
    ),
}


@pytest.mark.parametrize("name", SHARED_AXIS)
def test_every_factor_on_an_axis_is_tied_or_pinned(name: str) -> None:
    net, x = SHARED_AXIS[name]()
    net.ramp = torch.stack([torch.ones(6), torch.arange(6.0)])
    check(net, x, SHARED_AXIS[name].groups)


# Writing in place, where PyTorch makes an operator of simpler ones

WRITTEN = {
    "complex": Case(
        lambda s, x: s.o(torch.complex(tanh(s.a(x)), tanh(s.b(x))).abs()),
        {"a": layer(6, 8), "b": layer(6, 8), "o": layer(8, 3)},
        {"a": (8, A | O | {"b.weight[0]", "b.bias[0]"})},
    ),
    "polar": Case(
        lambda s, x: s.o(torch.view_as_real(torch.polar(s.a(x).exp(), s.b(x))).sum(-1)),
        {"a": layer(6, 8), "b": layer(6, 8), "o": layer(8, 3)},
        {"a": (8, A | O | {"b.weight[0]", "b.bias[0]"})},
    ),
    "no difference": Case(
        lambda s, x: s.o(torch.diff(tanh(s.a(x)), n=0)),
        {"a": layer(6, 8), "o": layer(8, 3)},
        {"a": (8, A | O)},
    ),
    "identity matrix": Case(
        lambda s, x: s.o(tanh(s.a(x)) @ torch.matrix_power(s.w, 0)),
        {"a": layer(6, 8), "w": tensor(8, 8), "o": layer(8, 3)},
        {},
    ),
    "matrix power": Case(
        lambda s, x: s.o(tanh(s.a(x)) @ torch.matrix_power(s.w, 3)),
        {"a": layer(6, 8), "w": tensor(8, 8), "o": layer(8, 3)},
        {"w": (8, A | O | {"w[0]", "w[1]"})},
    ),
    # Those at the ends stand twice, and each is taken out alone.
    "circle of units": Case(
        lambda s, x: s.o(F.pad(tanh(s.a(x))[:, None], (1, 1), mode="circular")[:, 0]),
        {"a": layer(6, 8), "o": layer(10, 3)},
        {"a": (6, A | O)},
    ),
    "blocks": Case(
        lambda s, x: s.o(tanh(x @ torch.block_diag(s.u, s.v))),
        {"u": tensor(2, 4), "v": tensor(4, 4), "o": layer(8, 3)},
        {"u": (4, {"u[1]"} | O), "v": (4, {"v[1]"} | O)},
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_in_place_keeps_its_units(name: str) -> None:
    net, x = WRITTEN[name]()
    check(net, x, WRITTEN[name].groups)


def test_circular_padding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
    )
    check(
        net,
        torch.rand(2, 2, 6, 6),
        {
            "0": (6, {"0.weight[0]", "0.bias[0]", "2.weight[1]"}),
            "2": (5, {"2.weight[0]", "2.bias[0]", "6.weight[1]"}),
        },
    )
    sym = symmetry.find(net, torch.rand(2, 2, 6, 6))
    acts = sym.tapper(net)(dict(net.state_dict()), torch.rand(3, 2, 6, 6))
    assert [a.shape[1] for taps in acts.values() for a in taps] == [6, 5]


# Second and later results of operators

SECOND = {
    "pooling": Case(
        lambda s, x: s.o(F.max_pool2d(s.a(x), 2, return_indices=True)[1].to(x.dtype).flatten(1)),
        {"a": lambda: nn.Conv2d(2, 6, 1), "o": layer(24, 3)},
        {"a": (6, A | O)},
        (2, 2, 4, 4),
    ),
    "adaptive pooling": Case(
        lambda s, x: s.o(
            F.adaptive_max_pool2d(s.a(x), 2, return_indices=True)[1].to(x.dtype).flatten(1)
        ),
        {"a": lambda: nn.Conv2d(2, 6, 1), "o": layer(24, 3)},
        {"a": (6, A | O)},
        (2, 2, 4, 4),
    ),
    "exponents": Case(
        lambda s, x: s.o(torch.frexp(s.a(x))[1].to(x.dtype)),
        {"a": layer(6, 8), "o": layer(8, 3)},
        {"a": (8, A | O)},
    ),
    # Nobody has told what units the statistics hold.
    "layer norm": Case(
        lambda s, x: s.o(
            torch.native_layer_norm(s.a(x).view(2, 8, 2), (2,), None, None, 0.1)[1][..., 0]
        ),
        {"a": layer(6, 16), "o": layer(8, 3)},
        {},
    ),
    "group norm": Case(
        lambda s, x: s.o(
            torch.native_group_norm(s.a(x)[..., None], None, None, 2, 8, 1, 4, 0.1)[1]
        ),
        {"a": layer(6, 8), "o": layer(4, 3)},
        {},
    ),
    "batch norm": Case(
        lambda s, x: s.o(
            x @ s.w + torch.native_batch_norm(s.a(x), None, None, None, None, True, 0.1, 0.1)[1]
        ),
        {"a": layer(6, 8), "w": tensor(6, 8), "o": layer(8, 3)},
        {},
    ),
    "unpooling": Case(
        lambda s, x: s.o(
            F.max_unpool2d(*F.max_pool2d(s.a(x), 2, return_indices=True), 2).flatten(1)
        ),
        {"a": lambda: nn.Conv2d(2, 6, 1), "o": layer(96, 3)},
        {},
        (2, 2, 4, 4),
    ),
    # First results alone are as good as ever.
    "first of layer norm": Case(
        lambda s, x: s.o(torch.native_layer_norm(s.a(x), (8,), None, None, 0.1)[0]),
        {"a": layer(6, 8), "o": layer(8, 3)},
        {"a": (8, A | O)},
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_results_have_units_or_pin_them(name: str) -> None:
    net, x = SECOND[name]()
    check(net, x, SECOND[name].groups)


def test_explain_says_that_a_second_result_pins() -> None:
    net, x = SECOND["layer norm"]()
    reason = "gives a second result that has no rule, to select"
    assert reason in symmetry.find(net, x).explain("a.weight")


# What an example does not reach

P = {"p[1]"}
UNREACHED = {
    "rows": Case(
        lambda s, x: s.o(tanh(s.a(x) + s.p[: x.shape[1]])),
        {"a": layer(5, 8), "p": tensor(16, 8), "o": layer(8, 3)},
        {"a": (8, A | O | P)},
    ),
    "rows by index": Case(
        lambda s, x: s.o(tanh(s.a(x) + s.p.index_select(0, torch.arange(x.shape[1])))),
        {"a": layer(5, 8), "p": tensor(16, 8), "o": layer(8, 3)},
        {"a": (8, A | O | P)},
    ),
    "columns": Case(
        lambda s, x: s.o(tanh(s.a(x) + s.p.narrow(1, 0, x.shape[1]).mT)),
        {"a": layer(5, 8), "p": tensor(8, 16), "o": layer(8, 3)},
        {"p": (8, A | O | {"p[0]"})},
    ),
    "both": Case(
        lambda s, x: s.o(tanh(s.p[: x.shape[1], : x.shape[1]].softmax(-1) @ s.a(x))),
        {"a": layer(5, 8), "p": tensor(16, 16), "o": layer(8, 3)},
        {"a": (8, A | O)},
    ),
    # Operators that see the parameter alone, and all of it, know no more.
    "after a function": Case(
        lambda s, x: s.o(tanh(s.a(x) + (s.p.sin() * s.q)[: x.shape[1]])),
        {"a": layer(5, 8), "p": tensor(16, 8), "q": tensor(16, 8), "o": layer(8, 3)},
        {"a": (8, A | O | P | {"q[1]"})},
    ),
    "after a norm and a layer": Case(
        lambda s, x: s.o(tanh(s.a(x) + s.b(F.layer_norm(s.p, (4,)))[: x.shape[1]])),
        {"a": layer(5, 8), "p": tensor(16, 4), "b": layer(4, 8), "o": layer(8, 3)},
        {"a": (8, A | O | {"b.weight[0]", "b.bias[0]"}), "p": (4, {"b.weight[1]", "p[1]"})},
    ),
    # In a flat table, rows beyond the example's would have to move with its columns.
    "flat table": Case(
        lambda s, x: s.o(tanh(s.a(x) + s.p.view(16, 8)[: x.shape[1]])),
        {"a": layer(5, 8), "p": tensor(128), "o": layer(8, 3)},
        {},
    ),
    # What an operator sees together with the input is used, even if its result is not.
    "dead half": Case(
        lambda s, x: s.o(tanh(s.a(x))[..., :4]),
        {"a": layer(5, 8), "o": layer(4, 3)},
        {"a[0]": (4, A | O), "a[1]": (4, A)},
    ),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_what_the_example_does_not_reach_stays(name: str) -> None:
    net, x = UNREACHED[name]._replace(shape=(2, 4, 5))()
    check(net, x, UNREACHED[name].groups, torch.rand(2, 9, 5), torch.rand(3, 1, 5))


def test_a_buffer_that_is_not_reached_stays() -> None:
    net, x = UNREACHED["rows"]._replace(shape=(2, 4, 5))()
    del net.p
    net.register_buffer("p", torch.randn(16, 8))
    check(net, x, {"a": (8, A | O | P)}, torch.rand(2, 9, 5))
    assert "is not used as a whole by this input" in symmetry.find(net, x).explain("p")


# What networks return


@dataclass
class Output:
    logits: Any
    extra: Any = None


class Plain:
    def __init__(self, y: Tensor) -> None:
        self.y = y


class Slots:
    __slots__ = ("y",)

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Custom(OrderedDict[str, Tensor]):
    pass


LOOKED_INTO: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Output,
    "nested": lambda y: (None, [Output("logits", {"y": Plain(y)})]),
    "namespace": lambda y: SimpleNamespace(y=y),
    "object": Plain,
    "slots": Slots,
    "dictionary of its own type": lambda y: Custom(y=y),
    "beside a tensor": lambda y: (y.sum(), Plain(y)),
    "distribution": lambda y: torch.distributions.Normal(y, y.new_ones(()), validate_args=False),
    "classes and truths": lambda y: (y.argmax(1), y > 0, y),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "generator": (lambda y: (t for t in [y]), "a value of type generator"),
    "map": (lambda y: map(torch.exp, [y]), "a value of type map"),
    "function beside a tensor": (lambda y: (y.sum(), lambda: y), "a value of type function"),
    "nothing": (lambda y: None, "returns no tensor, but NoneType"),
    "numbers": (lambda y: {"size": y.shape[0]}, "returns no tensor, but dict"),
    "empty list": (lambda y: [], "returns no tensor, but list"),
}


def returning(wrap: Callable[[Tensor], Any]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Graph(lambda s, x: wrap(s.o(tanh(s.a(x)))), a=nn.Linear(6, 8), o=nn.Linear(8, 5))
    return net, torch.rand(2, 6)


@pytest.mark.parametrize("name", LOOKED_INTO)
def test_tensors_are_found_in_outputs(name: str) -> None:
    net, x = returning(LOOKED_INTO[name])
    check(net, x, {"a": (8, A | O)})
    sym = symmetry.find(net, x)
    wrong = symmetry.Symmetry({"a": symmetry.Group(8, sym.groups["a"].places[:2])})
    with pytest.raises(symmetry.SymmetryError, match="outputs differ"):
        wrong.verify(net, x)


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_without_tensors_are_refused(name: str) -> None:
    wrap, message = REFUSED[name]
    net, x = returning(wrap)
    with pytest.raises(symmetry.SymmetryError, match=message):
        symmetry.find(net, x)
    good = symmetry.find(*returning(lambda y: y))
    with pytest.raises(symmetry.SymmetryError, match=message):
        good.verify(net, x)


def test_outputs_that_cannot_be_followed_are_refused() -> None:
    net, x = returning(torch.zeros_like)
    with pytest.raises(symmetry.SymmetryError, match="depend neither on the inputs nor on"):
        symmetry.find(net, x)


# Heads of one output, tensors of no entries


@pytest.mark.parametrize("name", ["attention", "attention_by_head", "shared_keys", "experts"])
def test_a_head_of_one_output(name: str) -> None:
    torch.manual_seed(0)
    net, (x,) = getattr(nets, name)()
    expected = found(symmetry.find(net, x))
    net.last = nn.Linear(net.last.in_features, 1)
    check(net, x, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_head_of_one_output_after_grouped_convolutions(groups: int, bias: bool) -> None:
    def net(outputs: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=groups), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, outputs, bias=bias)),
        )

    x = torch.rand(2, 3, 5, 5)
    expected = found(symmetry.find(net(3), x))
    assert len(expected) == 2 * groups + 1
    check(net(1), x, expected)


@pytest.mark.parametrize(
    "join",
    [
        lambda h: torch.cat([torch.empty(0), h], 1),
        lambda h: torch.cat([h, h.new_empty(0)], -1),
        lambda h: torch.cat([h.new_empty(2, 0, 8), h[:, None]], 1).sum(1),
        lambda h: torch.cat([h, h[:, :0]], 1),
    ],
)
def test_concatenation_with_nothing(join: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Graph(lambda s, x: s.o(join(tanh(s.a(x)))), a=nn.Linear(6, 8), o=nn.Linear(8, 3))
    check(net, torch.rand(2, 6), {"a": (8, A | O)})


# Settings of the process


def test_threads_share_a_setting() -> None:
    """The first to enter makes it, the last to leave undoes it, whoever that is."""
    events: list[str] = []

    @Shared
    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        events.append("made")
        yield
        events.append("undone")

    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with setting:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with setting:
        thread.start()
        inside.wait()
    assert events == ["made"]
    leave.set()
    thread.join()
    assert events == ["made", "undone"]


def test_attention_is_as_before_even_after_an_error() -> None:
    def settings() -> list[bool]:
        cuda = torch.backends.cuda
        return [
            torch.backends.mha.get_fastpath_enabled(),
            *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
            *(cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        ]

    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = settings()
        inside, leave = threading.Event(), threading.Event()

        def other() -> None:
            with unfused_attention:
                inside.set()
                leave.wait()

        thread = threading.Thread(target=other)
        with contextlib.suppress(ZeroDivisionError), unfused_attention:
            thread.start()
            inside.wait()
            raise ZeroDivisionError
        assert settings() == [False, False, False, True, False]
        leave.set()
        thread.join()
        assert settings() == before
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


# What depends on the sizes of the example


def by_sizes(run: Any) -> nn.Module:
    torch.manual_seed(0)
    return Graph(run, a=nn.Linear(6, 8), o=nn.Linear(8, 3))


def mask(x: Tensor) -> Tensor:
    """All true for four positions or more."""
    return torch.arange(8) < 2 * x.shape[1]


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.o(tanh(s.a(x) * mask(x))),
        lambda s, x: s.o(tanh(torch.where(mask(x), s.a(x), 0.0))),
        lambda s, x: s.o(tanh(s.a(x).masked_fill(~mask(x), 0.0))),
        lambda s, x: s.o(tanh(s.a(x) + torch.full((1, 8), 2.0 * x.shape[1]).tril(9))),
        lambda s, x: s.o(tanh(s.a(x) * torch.ones(x.shape[1], 8).tril(10))),
    ],
)
def test_constants_that_look_uniform_at_one_length_pin(run: Any) -> None:
    net, x = by_sizes(run), torch.rand(2, 4, 6)
    assert not symmetry.find(net, x).groups
    assert not symmetry.find(net, x, kinds=symmetry.KINDS).factors


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.o(tanh(s.a(x))) + s.a(x)[..., 8 - min(8, max(0, x.shape[1] - 4)) :].sum(),
        lambda s, x: s.o(tanh(s.a(x)) if x.shape[1] < 5 else tanh(s.a(x)).flip(-1).cumsum(-1)),
    ],
)
def test_verify_tries_lengths_by_itself(run: Any) -> None:
    """A number of Python that comes from a shape is no tensor, and `find` does not see it."""
    net, x = by_sizes(run), torch.rand(2, 4, 6)
    sym = symmetry.find(net, x)
    assert sym.groups["a"].size == 8
    with pytest.raises(symmetry.SymmetryError, match=r"on inputs of shapes \(2, 8, 6\)"):
        sym.verify(net, x)
    with pytest.raises(symmetry.SymmetryError, match=r"on inputs of shapes \(2, 8, 6\)"):
        symmetry.find(net, x, kinds=symmetry.KINDS).verify(net, x)
