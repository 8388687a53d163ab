"""Query heads that share heads of keys and values, in all the ways that programs write it.

Within their group they may change places; groups may, with their keys and values; and so may units
within heads, where nothing tells them apart.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small import noisy
from torch import Tensor, nn

from mcnotes import matching, symmetry, train
from mcnotes.data.loader import Loader
from mcnotes.matching import Pair, bundles, weights
from mcnotes.matching.assignment import solve

HEADS, DIM, WIDTH = 6, 4, 5


def rotated(x: Tensor) -> Tensor:
    """Rotary positions [N, heads, T, 4]."""
    t = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
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


def test_no_order_of_heads_agrees_better_than_that_of_a_step() -> None:
    """Each of the parts that weights are matched in is solved exactly."""
    net = Attention("expand", rotary=True)
    sym = symmetry.find(net, X)
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    compare = partial(weights.agreement, weights.reference(Pair(net, sym, a, b)))
    b = weights.in_float64(b)
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
