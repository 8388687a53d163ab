"""Rotary positions in the ways that programs write them, and what only looks like them.

Two heads of eight coordinates. Pairs that are turned by one angle may be turned before, too
("phases"), and share a scale; if they are no such pairs, signs alone may be left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Graph
from torch import Tensor, nn

from mcnotes import symmetry
from mcnotes.symmetry import KINDS

WIDTH = 5
Turn = Callable[[Tensor, Tensor], Tensor]  # of coordinates [.., T, d], by angles [T, d / 2]


def found(net: nn.Module, x: Tensor) -> dict[tuple[str, int], int]:
    """How many larger groups there are of each kind and size; they hold at other lengths."""
    net, x = net.double(), x.double()
    bases = symmetry.find(net, x, kinds=KINDS)
    others = [torch.randn(3, 7, WIDTH), torch.randn(1, 2, WIDTH), torch.randn(2, 11, WIDTH)]
    for seed in (0, 1):
        theta = {n: torch.randn_like(t) for n, t in net.state_dict().items()}
        assert bases.verify(net, x, theta, others=others, seed=seed) < 1e-9
    return dict(Counter((f.kind, f.size) for f in bases.factors.values()))


def angles(x: Tensor, frequencies: list[float]) -> Tensor:
    """[T, frequencies] of coordinates [.., T, d]."""
    return torch.arange(float(x.shape[-2]))[:, None] * torch.tensor(frequencies)


def scores(turn: Turn, after: Callable[[Tensor], Tensor] = lambda u: u) -> Any:
    """Attention of two heads under positions, its scores as the output."""

    def run(s: Any, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (s.q, s.k))
        t = angles(q, [1.0, 0.5, 0.2, 0.1])
        return (after(turn(q, t)) @ after(turn(k, t)).mT / 9).sigmoid().sum(1)

    return run


def by_halves(half: Callable[[Tensor], Tensor], neighbours: bool = False) -> Turn:
    """The form x · cos + half(x) · sin."""

    def turn(u: Tensor, t: Tensor) -> Tensor:
        t = t.repeat_interleave(2, -1) if neighbours else torch.cat([t, t], -1)
        return u * t.cos() + half(u) * t.sin()

    return turn


def chunks(u: Tensor) -> Tensor:
    a, b = u.chunk(2, -1)
    return torch.cat([-b, a], -1)


def tensor_split(u: Tensor) -> Tensor:
    a, b = u.tensor_split(2, -1)
    return torch.cat([-b, a], -1)


def split(u: Tensor) -> Tensor:
    a, b = u.split(4, -1)
    return torch.cat((-b, a), -1)


def unbound(u: Tensor) -> Tensor:
    a, b = u.unflatten(-1, (2, 4)).unbind(-2)
    return torch.stack([-b, a], -2).flatten(-2)


def quarters(u: Tensor) -> Tensor:
    a, b, c, d = u.chunk(4, -1)
    return torch.cat([-c, -d, a, b], -1)


def pairs(u: Tensor) -> Tensor:
    return torch.stack([-u[..., 1::2], u[..., ::2]], -1).flatten(-2)


def apart(u: Tensor, t: Tensor) -> Tensor:
    """Each half by itself, as in GPT-OSS."""
    a, b = u.chunk(2, -1)
    return torch.cat([a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()], -1)


def pairs_apart(u: Tensor, t: Tensor) -> Tensor:
    a, b = u[..., ::2], u[..., 1::2]
    return torch.stack([a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()], -1).flatten(-2)


FORMS: dict[str, Any] = {
    "chunk": scores(by_halves(chunks)),
    "tensor_split": scores(by_halves(tensor_split)),
    "split": scores(by_halves(split)),
    "unbind and stack": scores(by_halves(unbound)),
    "quarters": scores(by_halves(quarters)),
    "neighbours": scores(by_halves(pairs, neighbours=True)),
    "halves apart": scores(apart),
    "neighbours apart": scores(pairs_apart),
    "twice": scores(lambda u, t: by_halves(chunks)(apart(u, t), t)),
    "a gain for each pair": scores(by_halves(lambda u: chunks(u) * torch.arange(1.0, 5).repeat(2))),
}


def swapped(u: Tensor) -> Tensor:
    a, b = u.chunk(2, -1)
    return torch.cat([b, a], -1)


def crossed(u: Tensor) -> Tensor:
    a, b, c, d = u.chunk(4, -1)
    return torch.cat([-d, -c, b, a], -1)


def two_speeds(u: Tensor, t: Tensor) -> Tensor:
    a, b = u.chunk(2, -1)
    return torch.cat([a * t.cos() - b * t.sin(), b * (2 * t).cos() + a * t.sin()], -1)


def out_of_order(u: Tensor, t: Tensor) -> Tensor:
    a, b = u[..., ::2], u[..., 1::2]
    return torch.cat([a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()], -1)


def backwards(u: Tensor, t: Tensor) -> Tensor:
    t = torch.cat([t, t], -1)
    return u * t.cos() + chunks(u.flip(2)) * t.sin()


UNLIKE: dict[str, Any] = {
    "a reflection": scores(by_halves(swapped)),
    "pairs across": scores(by_halves(crossed)),
    "halves, angles of neighbours": scores(by_halves(chunks, neighbours=True)),
    "neighbours, angles of halves": scores(by_halves(pairs)),
    "a gain for each coordinate": scores(by_halves(lambda u: chunks(u) * torch.arange(1.0, 9))),
    "two speeds": scores(two_speeds),
    "neighbours become halves": scores(out_of_order),
    "times that are exchanged": scores(backwards),
    "a function after it": scores(by_halves(chunks), torch.tanh),
    "a ramp after it": scores(by_halves(chunks), lambda u: u * torch.arange(1.0, 9)),
    "a number before it": scores(lambda u, t: apart(u + 1, t)),
    "squares": scores(lambda u, t: apart(u * u, t)),
}


def attention(run: Any) -> nn.Module:
    torch.manual_seed(0)
    return Graph(run, q=nn.Linear(WIDTH, 16), k=nn.Linear(WIDTH, 16))


@pytest.mark.parametrize("name", FORMS)
def test_turns_in_all_forms(name: str) -> None:
    kinds = found(attention(FORMS[name]), torch.randn(2, 5, WIDTH))
    assert kinds == {("scales", 4): 2, ("phases", 4): 2}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_only_looks_like_turns(name: str) -> None:
    kinds = found(attention(UNLIKE[name]), torch.randn(2, 5, WIDTH))
    assert "phases" not in {kind for kind, _ in kinds}


# Queries, keys and values in one projection: six heads of queries, those of keys and values fewer


def projected(order: str, shared: int, by_head: bool) -> nn.Module:
    """order: of queries, keys and values, in the projection or within each head of keys."""
    count, d = 6 // shared, 4
    sizes = {"q": count * d, "k": d, "v": d}

    def run(s: Any, x: Tensor) -> Tensor:
        z = s.c(x).unflatten(-1, (shared if by_head else 1, -1))
        times = 1 if by_head else shared
        split = z.split([times * sizes[name] for name in order], -1)
        parts = dict(zip(order, split, strict=True))
        q, k, v = (parts[n].flatten(2).unflatten(-1, (-1, d)).transpose(1, 2) for n in "qkv")
        t = angles(q, [1.0, 0.3])
        k, v = (u.repeat_interleave(count, 1) for u in (apart(k, t), v))
        y: Tensor = s.o(((apart(q, t) @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y

    torch.manual_seed(0)
    return Graph(run, c=nn.Linear(WIDTH, (6 + 2 * shared) * d), o=nn.Linear(24, 3))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("order", ["qkv", "vqk"])
def test_queries_and_keys_of_one_projection(order: str, shared: int, by_head: bool) -> None:
    """A key head shares scales and phases with all its query heads, also where it is alone."""
    kinds = found(projected(order, shared, by_head), torch.randn(2, 5, WIDTH))
    assert kinds == {("bases", 4): shared, ("scales", 2): shared, ("phases", 2): shared}


def test_keys_before_queries_are_not_guessed() -> None:
    kinds = found(projected("kqv", 2, by_head=False), torch.randn(2, 5, WIDTH))
    assert kinds == {("bases", 4): 2}


class Shared(nn.Module):
    """Six heads of queries and one of keys and values, each by its own projection."""

    def __init__(self, change: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.change, self.gain = change, nn.Parameter(torch.rand(6, 1, 1))
        self.q, self.o = nn.Linear(WIDTH, 24), nn.Linear(24, 3)
        self.k, self.v = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = self.change(self, q, k, v)
        t = angles(q, [1.0, 0.3])
        y: Tensor = self.o(
            ((apart(q, t) @ apart(k, t).mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        return y


VALUES, TURNED = {("bases", 4): 1}, {("scales", 2): 1, ("phases", 2): 1}
CHANGES: dict[str, Any] = {
    "none": (lambda s, q, k, v: (q, k, v), VALUES | TURNED),
    "an odd function of keys": (lambda s, q, k, v: (q, k.tanh(), v), VALUES | {("signs", 2): 1}),
    "keys are values": (lambda s, q, k, v: (q, k, k), {}),
    "keys are added to values": (lambda s, q, k, v: (q, k, v + k), {}),
    "a function of one head": (
        lambda s, q, k, v: (torch.cat([q[:, :1].relu(), q[:, 1:]], 1), k, v),
        VALUES | {("scales", 2): 1},
    ),
    "one head is turned twice": (  # phases would be right, too, and are not seen
        lambda s, q, k, v: (torch.cat([apart(q[:, :1], angles(q, [1.0, 2.0])), q[:, 1:]], 1), k, v),
        VALUES | {("scales", 2): 1, ("signs", 2): 1},
    ),
    "one head is turned by other pairs": (
        lambda s, q, k, v: (
            torch.cat([pairs_apart(q[:, :1], angles(q, [1.0, 2.0])), q[:, 1:]], 1),
            k,
            v,
        ),
        VALUES,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_head_of_keys(name: str) -> None:
    change, expected = CHANGES[name]
    torch.manual_seed(0)
    kinds = found(Graph(lambda s, x: s.att(x), att=Shared(change)), torch.randn(2, 5, WIDTH))
    assert {k: n for k, n in kinds.items() if k[1] != 1} == expected


# Operators by which larger groups are followed to heads


def chosen(index: Any) -> Any:
    return lambda s, x: s.b(s.a(x).unflatten(-1, (2, 4))[:, :, index].flatten(2))


INDICES: dict[str, Any] = {
    "a head": (chosen([-1]), 4, {("bases", 4): 2}),  # the other one is not read,
    "heads in order": (chosen([0, 1]), 8, {("bases", 8): 1}),
    "a head twice": (chosen([0, 0, 1]), 12, {("bases", 4): 2}),
    "another order": (chosen([1, 0]), 8, {}),
    "positions": (
        lambda s, x: s.b(s.a(x)[:, torch.tensor([1, 0, 1])].flatten(2)),
        8,
        {("bases", 8): 1},
    ),
    "positions that the input tells": (
        lambda s, x: s.b(s.a(x)[torch.arange(len(x)), x[..., 0].argmax(-1)]),
        8,
        {("bases", 8): 1},
    ),
    "another unit of each head": (lambda s, x: s.b(s.a(x)[..., torch.arange(8) // 2]), 8, {}),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str) -> None:
    run, width, expected = INDICES[name]
    torch.manual_seed(0)
    net = Graph(run, a=nn.Linear(WIDTH, 8), b=nn.Linear(width, 3))
    assert found(net, torch.randn(2, 5, WIDTH)) == expected


class Doubled(torch.autograd.Function):
    """A function with a backward of its own, in the old form: without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0]


def test_a_function_with_a_backward_of_its_own() -> None:
    net = Graph(
        lambda s, x: s.b(F.relu(Doubled.apply(s.a(x)))), a=nn.Linear(WIDTH, 8), b=nn.Linear(8, 3)
    )
    assert found(net, torch.randn(2, 5, WIDTH)) == {("scales", 8): 1}
