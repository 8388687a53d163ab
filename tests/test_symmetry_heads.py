"""Query heads that share heads of keys and values, in all the ways that programs write it.

Within their group they may change places; groups may, with their keys and values; and so may units
within heads, where nothing tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import noisy
from torch import Tensor, nn

from mcnotes import matching, symmetry, train
from mcnotes.data.loader import Loader
from mcnotes.matching import Pair, bundles, weights
from mcnotes.matching.assignment import solve
from mcnotes.matching.pair import in_float64

HEADS, DIM, WIDTH = 6, 4, 5


def rotated(x: Tensor, speed: int = 1) -> Tensor:
    """Rotary positions [N, heads, T, 4]."""
    t = speed * torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
    turned = torch.cat([-x[..., 2:], x[..., :2]], -1)
    return x * t.cos() + turned * t.sin()


class Attention(nn.Module):
    """[N, T, 5] → [N, T, 3]; `way`: how keys and values reach the query heads."""

    def __init__(self, way: str, shared: int = 2, rotary: bool = False) -> None:
        super().__init__()
        self.way, self.times, self.rotary = way, HEADS // shared, rotary
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = (nn.Linear(WIDTH, shared * DIM) for _ in range(2))
        self.o = nn.Linear(HEADS * DIM, 3)
        self.register_buffer("which", torch.arange(HEADS) // self.times, way == "buffer")
        if way == "scaled":
            self.scale = nn.Parameter(torch.rand(HEADS) + 0.5)

    def repeated(self, x: Tensor) -> Tensor:
        """[N, shared heads, T, 4] → one for each query head."""
        n = self.times
        if self.way == "tile":
            return x.repeat(1, n, 1, 1)
        if self.way == "index":
            return x[:, torch.arange(HEADS) // n]
        if self.way == "buffer":
            return x[:, self.which]
        if self.way == "expand":
            return x[:, :, None].expand(-1, -1, n, -1, -1).reshape(len(x), HEADS, -1, DIM)
        if self.way == "functions":  # of one head of keys, which differ
            return torch.cat([x, x.tanh(), x.relu()], 1)
        return x if self.way == "broadcast" else x.repeat_interleave(n, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.way == "five axes":
            q = q.unflatten(1, (-1, self.times))
            a = torch.einsum("ngmid,ngjd->ngmij", q, k).softmax(-1)
            return self.o(torch.einsum("ngmij,ngjd->nigmd", a, v).flatten(2))
        if self.way == "fused":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(out.transpose(1, 2).flatten(2))
        k, v = self.repeated(k), self.repeated(v)
        if self.way == "scaled":
            k = k * self.scale[:, None, None]
        scores = q @ k.mT
        if self.way == "slopes":
            scores = scores + torch.arange(1.0, 1 + HEADS)[:, None, None] * torch.arange(x.shape[1])
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


WAYS = ["interleave", "tile", "index", "expand", "fused", "five axes", "scaled"]
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def found(net: nn.Module) -> tuple[symmetry.Symmetry, list[int], list[int]]:
    """What is found and holds, also at another length: sizes of groups of units, and of blocks."""
    sym = symmetry.find(net, X)
    assert sym.verify(net, X, others=[torch.rand(3, 7, WIDTH)]) < 1e-9
    groups = sym.groups.values()
    return (
        sym,
        sorted(g.size for g in groups if not g.inner),
        sorted(g.size for g in groups if g.inner),
    )


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_query_heads_change_places_within_their_group(way: str, rotary: bool) -> None:
    sym, units, blocks = found(Attention(way, rotary=rotary))
    assert units == [4, 4] if rotary else [4, 4, 4, 4]
    assert blocks == [2, 3, 3]
    (outer,) = [g for g in sym.groups.values() if g.inner and g.inner[0]]
    assert [len(names) for names in outer.inner] == [2 if rotary else 3] * 2


@pytest.mark.parametrize("rotary", [False, True])
def test_all_query_heads_change_places_where_they_share_one(rotary: bool) -> None:
    _, units, blocks = found(Attention("broadcast", shared=1, rotary=rotary))
    assert units == ([4] if rotary else [4, 4])
    assert blocks == [6]


@pytest.mark.parametrize("way", ["functions", "slopes"])
def test_heads_that_differ_in_what_they_meet_stay(way: str) -> None:
    """Copies of keys that are no copies, and a slope for each head."""
    _, units, blocks = found(Attention(way))
    assert units == [4, 4, 4, 4]
    assert blocks == ([2] if way == "functions" else [])


def test_a_buffer_may_tell_other_heads_in_another_network() -> None:
    _, units, blocks = found(Attention("buffer"))
    assert 3 not in units + blocks


@pytest.mark.parametrize("way", ["expand", "broadcast"])
def test_permutations_compose_as_they_act(way: str) -> None:
    net = Attention(way, shared=1 if way == "broadcast" else 2)
    sym, theta = symmetry.find(net, X), dict(net.state_dict())
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        p, q = sym.random(generator), sym.random(generator)
        one, two = sym.permute(theta, sym.compose(p, q)), sym.permute(sym.permute(theta, p), q)
        back = sym.permute(sym.permute(theta, p), sym.inverse(p))
        assert all(torch.equal(one[n], two[n]) and torch.equal(back[n], theta[n]) for n in theta)


@pytest.mark.parametrize("method", ["activations", "weights"])
@pytest.mark.parametrize(("way", "rotary"), [("expand", True), ("five axes", False)])
def test_planted_orders_of_heads_are_found(way: str, rotary: bool, method: str) -> None:
    net = Attention(way, rotary=rotary)
    sym, theta = symmetry.find(net, X), train.initialise(net, 1)
    planted = sym.random(torch.Generator().manual_seed(2))
    assert any(
        not torch.equal(p, q)
        for p, q in zip(planted.values(), sym.identity().values(), strict=True)
    )
    copy = sym.permute(noisy(theta, 3), planted)
    data = Loader([torch.randn(50, 6, WIDTH) for _ in range(4)], torch.device("cpu"))
    perm = matching.match(Pair(net, sym, theta, copy), data, method=method).perm
    for group, p in sym.compose(planted, perm).items():
        assert torch.equal(p, torch.arange(len(p))), group


def planted(net: nn.Module) -> tuple[Pair, symmetry.Bases]:
    """A network, and a copy of it that any of its symmetries may have made."""
    bases = symmetry.find(net, X, kinds=symmetry.KINDS)
    theta = {n: t.double() if t.is_floating_point() else t for n, t in net.state_dict().items()}
    copy = bases.transform(theta, bases.random(torch.Generator().manual_seed(1)))
    return Pair(net.double(), bases.permutations, theta, copy), bases


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("way", "shared"), [("broadcast", 1), ("scaled", 2), ("fused", 3)])
def test_larger_groups_and_orders_of_heads_are_found_together(
    way: str, shared: int, rotary: bool
) -> None:
    torch.manual_seed(0)
    pair, bases = planted(Attention(way, shared, rotary))
    result = matching.match_bases(pair, bases)
    assert result.before > 0.5
    assert result.after < 1e-6


@pytest.mark.parametrize("shared", [2, 3])
def test_all_layers_at_once_find_planted_heads(shared: int) -> None:
    torch.manual_seed(0)
    net = Attention("fused", shared, rotary=True)
    sym, theta = symmetry.find(net, X), dict(net.state_dict())
    made = sym.random(torch.Generator().manual_seed(2))
    found = matching.frank_wolfe(Pair(net, sym, theta, sym.permute(noisy(theta, 3), made)))
    for group, p in sym.compose(made, found).items():
        assert torch.equal(p, torch.arange(len(p))), group


def test_no_order_of_heads_agrees_better_than_that_of_a_step() -> None:
    """Each of the parts that weights are matched in is solved exactly."""
    net = Attention("expand", rotary=True)
    sym = symmetry.find(net, X)
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    compare = partial(weights.agreement, {n: in_float64(a)[n] for n, _ in net.named_parameters()})
    b = in_float64(b)
    here = float(compare(b))
    (bundle,) = [bundle for bundle in bundles(sym) if bundle.nested]
    parts = weights.linear_parts(sym, bundle)
    assert len(parts) == 3
    for part in parts:
        step = solve(part, *weights.pairings(sym, part, b, compare))
        best = float(compare(sym.permute(b, step)))
        assert best >= here
        for seed in range(50):
            other = sym.random(torch.Generator().manual_seed(seed))
            other = {n: p for n, p in other.items() if n in step}
            assert float(compare(sym.permute(b, other))) <= best + 1e-9


# What tells heads apart, or seems to. Of each case the sizes of what is found, of groups of units
# and of groups of blocks, and the kinds of larger groups.

Run = Callable[[Any, Tensor], Tensor]


class Case(nn.Module):
    """Six query heads, and two of keys and values; `steps` change what its names say."""

    def __init__(self, steps: dict[str, Run], parts: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self.steps, self.data = steps, X
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = (nn.Linear(WIDTH, 2 * DIM) for _ in range(2))
        self.o = nn.Linear(HEADS * DIM, 3)
        for name, make in parts.items():
            part = make()
            if isinstance(part, tuple):
                self.register_buffer(name, *part)
            else:
                setattr(self, name, part)

    def after(self, step: str, x: Tensor) -> Tensor:
        return self.steps[step](self, x) if step in self.steps else x

    def forward(self, x: Tensor) -> Tensor:
        self.data = x
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.after("q", q), self.after("k", k)
        k = self.steps["copied"](self, k) if "copied" in self.steps else thrice(k)
        scores = self.after("scores", q @ k.mT).softmax(-1)
        return self.o(self.after("out", scores @ thrice(v)).transpose(1, 2).flatten(2))


def thrice(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, 1)


def apart(scores: Tensor) -> Tensor:
    """How far positions are from each other: [T, T]."""
    t = torch.arange(scores.shape[-1])
    return (t[:, None] - t).abs()


def on_one(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, :1] + s.b, x[:, 1:]], 1)


def own_frequencies(s: Any, x: Tensor) -> Tensor:
    return torch.cat([rotated(x[:, h : h + 1], h + 1) for h in range(x.shape[1])], 1)


def windows(per: int) -> Run:
    """How far heads see: each `per` in a row equally far."""

    def masked(_: Any, scores: Tensor) -> Tensor:
        width = 1 + torch.arange(HEADS)[:, None, None] // per
        return scores.masked_fill(apart(scores) >= width, -1e9)

    return masked


TURNED: dict[str, Run] = {"q": lambda s, x: rotated(x), "k": lambda s, x: rotated(x)}
NORMED: dict[str, Run] = {"q": lambda s, x: s.n(x), "k": lambda s, x: s.n(x)}
SLOPES: dict[str, Run] = {"scores": lambda s, x: x + s.m[:, None, None] * apart(x)}
ALL, STAY = [2, 3, 3], list[int]()
FOUR, TWO = [4] * 4, [4] * 2
FREE, SPUN = {"bases"}, {"bases", "scales", "phases"}

Expected = tuple[list[int], list[int], set[str]]
CASES: dict[str, tuple[dict[str, Run], dict[str, Callable[[], Any]], Expected]] = {
    "positions": (TURNED, {}, (TWO, ALL, SPUN)),
    "positions of each head": ({"q": own_frequencies, "k": TURNED["k"]}, {}, (TWO, STAY, FREE)),
    "a norm of each head": (
        NORMED,
        {"n": lambda: nn.RMSNorm(DIM)},
        ([4] * 3, [3, 3], {"bases", "signs"}),
    ),
    "a gain of each head": (
        {"q": lambda s, x: F.rms_norm(x, (DIM,)) * s.g},
        {"g": lambda: nn.Parameter(torch.rand(HEADS, 1, DIM))},
        (TWO, [2], {"bases", "signs"}),
    ),
    "a bias on one head": (
        {"q": on_one},
        {"b": lambda: nn.Parameter(torch.rand(1, DIM))},
        ([4] * 3, [2, 3], FREE),
    ),
    "a result's bias on one head": (
        {"out": on_one},
        {"b": lambda: nn.Parameter(torch.rand(1, DIM))},
        ([4] * 3, [2, 3], FREE),
    ),
    "slopes of the state": (SLOPES, {"m": lambda: (torch.ones(HEADS), True)}, (FOUR, ALL, FREE)),
    "slopes beside the state": (
        SLOPES,
        {"m": lambda: (torch.ones(HEADS), False)},
        (FOUR, STAY, FREE),
    ),
    "relative biases": (
        {"scores": lambda s, x: x + s.e(apart(x).clamp(max=3)).permute(2, 0, 1)},
        {"e": lambda: nn.Embedding(4, HEADS)},
        (FOUR, ALL, FREE),
    ),
    "relative biases of keys": (
        {"scores": lambda s, x: x + thrice(s.e(apart(x).clamp(max=3)).permute(2, 0, 1)[None])},
        {"e": lambda: nn.Embedding(4, 2)},
        (FOUR, [2], FREE),
    ),
    "windows": ({"scores": windows(1)}, {}, (FOUR, STAY, FREE)),
    "windows of keys": ({"scores": windows(3)}, {}, (FOUR, STAY, FREE)),
    "gates that the data set": (
        {"out": lambda s, x: x * s.g(s.data).sigmoid().mT[..., None]},
        {"g": lambda: nn.Linear(WIDTH, HEADS)},
        (FOUR, ALL, FREE),
    ),
    "gates across groups": (
        {"out": lambda s, x: x * s.g(s.data).sigmoid().mT.repeat(1, 3, 1)[..., None]},
        {"g": lambda: nn.Linear(WIDTH, 2)},
        (FOUR, STAY, FREE),
    ),
    "temperatures": (
        {"scores": lambda s, x: x * s.t.exp()} | TURNED,
        {"t": lambda: nn.Parameter(torch.rand(HEADS, 1, 1))},
        (TWO, ALL, SPUN),
    ),
    "a negative copy": (
        {
            "copied": lambda s, k: (
                thrice(k) * (1 - 2.0 * (torch.arange(HEADS) % 3 == 1))[:, None, None]
            )
        },
        {},
        (FOUR, STAY, FREE),
    ),
    "one copy of the other": (
        {"copied": lambda s, k: torch.cat([thrice(k)[:, :5], k[:, :1]], 1)},
        {},
        ([4] * 3, STAY, FREE),
    ),
    "other copies of keys than of values": (
        {"copied": lambda s, k: k.repeat(1, 3, 1, 1)},
        {},
        (FOUR, [2, 2], FREE),
    ),
    "a sum over heads": ({"out": lambda s, x: x + x.roll(1, 1)}, {}, ([4] * 3, STAY, FREE)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_tells_heads_apart(name: str) -> None:
    """All that is found, larger groups too, holds for other numbers in all parameters."""
    steps, parts, expected = CASES[name]
    torch.manual_seed(0)
    net = Case(steps, parts).double()
    bases = symmetry.find(net, X.double(), kinds=symmetry.KINDS)
    groups = bases.permutations.groups.values()
    units = sorted(g.size for g in groups if not g.inner)
    blocks = sorted(g.size for g in groups if g.inner)
    assert (units, blocks, {f.kind for f in bases.factors.values()}) == expected
    theta = {n: torch.randn_like(t) for n, t in net.state_dict().items()}
    others = [torch.rand(3, 7, WIDTH), torch.rand(2, 1, WIDTH)]
    assert bases.permutations.verify(net, X.double(), theta, others=others) < 1e-9
    assert bases.verify(net, X.double(), theta, others=others) < 1e-9
