"""Random programs: whatever symmetry is found holds, also for other batch sizes and lengths.

`make soak` tries many more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mcnotes import symmetry

PROGRAMS = int(os.environ.get("MCNOTES_PROGRAMS", "30"))
WIDTH, LENGTH, INPUTS = 6, 4, 3


class Program(nn.Module):
    """Steps on a list of values [N, T, 6]; each takes two of them and adds one.

    A step is the name of an operation, and how far back its operands stand.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps, self.weights, self.next = steps, nn.ParameterList(), 0
        self.masks = nn.ModuleList()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 2)

    def take(self, *shape: int) -> Tensor:
        """The next parameter; made at the first run."""
        self.next += 1
        if self.next > len(self.weights):
            self.weights.append(nn.Parameter(torch.randn(shape) / 2))
        return self.weights[self.next - 1]

    def forward(self, x: Tensor) -> Tensor:
        self.next, values = 0, [self.first(x)]
        for name, i, j in self.steps:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(OPERATIONS[name](self, a, b))
        return self.last(values[-1])


Operation = Callable[[Program, Tensor, Tensor], Tensor]


def write_half(p: Program, a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros_like(a)
    y[..., :3] = a[..., 3:]
    y[:, :1, 3:] += b[:, :1, 3:]
    return y


def attention(p: Program, a: Tensor, b: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return (x @ p.take(WIDTH, WIDTH)).unflatten(-1, (2, 3)).transpose(1, 2)

    out = F.scaled_dot_product_attention(heads(a), heads(b), heads(b), is_causal=True)
    return out.transpose(1, 2).flatten(2)


def grouped(p: Program, a: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(a.mT, p.take(WIDTH, 2, 1), p.take(WIDTH), groups=3).mT


def complex_product(p: Program, a: Tensor, b: Tensor) -> Tensor:
    return (torch.complex(a, b) * torch.complex(p.take(WIDTH), p.take(WIDTH))).real


def circular(p: Program, a: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(F.pad(a.mT, (1, 1), mode="circular"), p.take(WIDTH, WIDTH, 3)).mT


def strided(p: Program, a: Tensor, b: Tensor) -> Tensor:
    w = p.take(WIDTH, WIDTH)
    return a @ w.as_strided((WIDTH, WIDTH), (1, WIDTH)) + b


OPERATIONS: dict[str, Operation] = {
    "layer": lambda p, a, b: F.linear(a, p.take(WIDTH, WIDTH), p.take(WIDTH)),
    "tanh": lambda p, a, b: a.tanh(),
    "gate": lambda p, a, b: a * b.sigmoid(),
    "add": lambda p, a, b: a + b,
    "shift": lambda p, a, b: a + p.take(WIDTH),
    "scale by pairs": lambda p, a, b: a * p.take(2, 3).flatten(),
    "kron": lambda p, a, b: a @ torch.kron(p.take(2, 2), p.take(3, 3)),
    "three axes": lambda p, a, b: F.linear(a, p.take(WIDTH, 2, 3).flatten(1)),
    "einsum": lambda p, a, b: torch.einsum(
        "nthd,hde->nte", a.unflatten(-1, (2, 3)), p.take(2, 3, 6)
    ),
    "blocks": lambda p, a, b: torch.einsum(
        "nthd,hde->nthe", a.unflatten(-1, (2, 3)), p.take(2, 3, 3)
    ).flatten(2),
    "position": lambda p, a, b: a + p.take(16, WIDTH)[: a.shape[1]],
    "causal": lambda p, a, b: p.take(16, 16)[: a.shape[1], : a.shape[1]].tril().softmax(-1) @ a,
    "norm": lambda p, a, b: F.layer_norm(a, (WIDTH,), p.take(WIDTH), p.take(WIDTH)),
    "norm of halves": lambda p, a, b: F.group_norm(a.flatten(0, 1), 2, p.take(WIDTH)).view_as(a),
    "softmax": lambda p, a, b: a.softmax(-1) * b,
    "reverse": lambda p, a, b: a.flip(-1),
    "roll": lambda p, a, b: a + b.roll(2, -1),
    "shuffle": lambda p, a, b: a.unflatten(-1, (2, 3)).mT.flatten(2),
    "halves": lambda p, a, b: torch.cat([a[..., :3].relu(), b[..., 3:]], -1),
    "rotate": lambda p, a, b: torch.cat([-a[..., 3:], a[..., :3]], -1),
    "time": lambda p, a, b: torch.cat([a[:, :1], b[:, 1:]], 1),
    "back in time": lambda p, a, b: a + b.roll(1, 1),
    "choose": lambda p, a, b: a[..., [0, 2, 4, 1, 3, 5]],
    "constant": lambda p, a, b: a * torch.full((WIDTH,), 2.0),
    "ramp": lambda p, a, b: a * torch.arange(1.0, 1 + WIDTH),
    "by length": lambda p, a, b: a * (torch.arange(WIDTH) < 2 * a.shape[1]),
    "where": lambda p, a, b: torch.where(b > 0, a, p.take(WIDTH)),
    "mean": lambda p, a, b: a - b.mean(-1, keepdim=True),
    "pool": lambda p, a, b: a + b.mean(1, keepdim=True),
    "largest": lambda p, a, b: a * b.amax(-1, keepdim=True),
    "sum so far": lambda p, a, b: a.cumsum(-1),
    "sort": lambda p, a, b: a.sort(-1).values,
    "exponents": lambda p, a, b: torch.frexp(a)[1].to(a.dtype),
    "outer": lambda p, a, b: torch.einsum("nti,ntj->nij", a, b).sum(1)[:, None] + a,
    "write": write_half,
    "attention": attention,
    "grouped": grouped,
    "complex": complex_product,
    "circular": circular,
    "strided": strided,
}

step = st.tuples(st.sampled_from([*OPERATIONS]), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, min_size=1, max_size=7), st.booleans())
def test_what_is_found_in_random_programs_holds(
    steps: list[tuple[str, int, int]], halves: bool
) -> None:
    torch.manual_seed(0)
    net, x = Program(steps), torch.randn(2, LENGTH, INPUTS)
    with torch.no_grad():
        net(x)
    sym = symmetry.find(net, x)
    others = [torch.randn(3, 9, INPUTS), torch.randn(1, 1, INPUTS), torch.randn(2, 2, INPUTS)]
    assert sym.verify(net, x, others=others if halves else others[:1]) < 1e-6
