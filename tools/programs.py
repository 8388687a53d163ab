"""Search for unsound symmetries, in random programs and around PyTorch's operators.

    python -m tools.programs --minutes 60

A random program is a network of operations that have rules, in any order. For each operator in
PyTorch's own list of samples (`op_db`), networks are built in which its arguments are parameters,
hidden units, or both. Every symmetry that is found must hold; the exit status is 1 if one does not.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes import symmetry

WIDTH, LENGTH, INPUTS = 6, 4, 3


class Program(nn.Module):
    """Steps on a list of values [N, T, 6]; each takes two of them and adds one.

    A step is the name of an operation, and how far back in the list its operands are.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps, self.weights, self.next = steps, nn.ParameterList(), 0
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 2)

    def take(self, *shape: int) -> Tensor:
        """The next parameter, which is created in the first run."""
        self.next += 1
        if self.next > len(self.weights):
            self.weights.append(nn.Parameter(torch.randn(shape) / 2))
        weight: Tensor = self.weights[self.next - 1]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        self.next, values = 0, [self.first(x)]
        for name, i, j in self.steps:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(OPERATIONS[name](self, a, b))
        last: Tensor = self.last(values[-1])
        return last


Operation = Callable[[Program, Tensor, Tensor], Tensor]


def write_half(p: Program, a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros_like(a)
    y[..., :3] = a[..., 3:]
    y[:, :1, 3:] += b[:, :1, 3:]
    return y


def attention(p: Program, a: Tensor, b: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        y: Tensor = (x @ p.take(WIDTH, WIDTH)).unflatten(-1, (2, 3))
        return y.transpose(1, 2)

    out = F.scaled_dot_product_attention(heads(a), heads(b), heads(b), is_causal=True)
    joined: Tensor = out.transpose(1, 2).flatten(2)
    return joined


def shared_heads(p: Program, a: Tensor, b: Tensor) -> Tensor:
    """Six query heads, of which each three share keys and values."""
    q, k, v = (x @ p.take(WIDTH, n) for x, n in ((a, 12), (b, 4), (b, 4)))
    q, k, v = (x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    joined: Tensor = (q @ k.mT).softmax(-1) @ v
    return joined.transpose(1, 2).flatten(2) @ p.take(12, WIDTH)


def grouped(p: Program, a: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(a.mT, p.take(WIDTH, 2, 1), p.take(WIDTH), groups=3).mT


def complex_product(p: Program, a: Tensor, b: Tensor) -> Tensor:
    return (torch.complex(a, b) * torch.complex(p.take(WIDTH), p.take(WIDTH))).real


def circular(p: Program, a: Tensor, b: Tensor) -> Tensor:
    return F.conv1d(F.pad(a.mT, (1, 1), mode="circular"), p.take(WIDTH, WIDTH, 3)).mT


def strided(p: Program, a: Tensor, b: Tensor) -> Tensor:
    w = p.take(WIDTH, WIDTH)
    return a @ w.as_strided((WIDTH, WIDTH), (1, WIDTH)) + b


def recurrent(p: Program, a: Tensor, b: Tensor) -> Tensor:
    """An LSTM, and its last state."""
    shapes = [(4 * WIDTH, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (4 * WIDTH,)]
    start = b[:, 0][None], a.new_zeros(1, len(a), WIDTH)
    weights = [p.take(*shape) for shape in shapes]
    out, _, cell = torch.lstm(a, start, weights, True, 1, 0.0, False, False, True)
    return out + cell[0][:, None]


def order(b: Tensor, axis: int) -> Tensor:
    """Indices along an axis that depend on all that stands there, as columns.

    On largest entries: sums may be zero but for rounding, and then decide nothing.
    """
    return b.amax(3 - axis, keepdim=True).argsort(axis)


def edges(p: Program, a: Tensor, b: Tensor) -> Tensor:
    """As in graph networks: each time takes from its neighbours."""
    index = torch.arange(a.shape[1])
    y = torch.zeros_like(a).index_add(1, index.roll(1), a[:, index // 2])
    return torch.zeros_like(y).scatter_reduce(1, order(b, 1).expand_as(a), y, "amax") + y


def bag(p: Program, a: Tensor, b: Tensor) -> Tensor:
    index = (a.amax(-1) > 0.1).long() + 1
    return b + F.embedding_bag(index, p.take(4, WIDTH), mode="max")[:, None]


def write_rows(p: Program, a: Tensor, b: Tensor) -> Tensor:
    first = torch.arange(len(a)), b.amax(-1).argmax(1)
    return a.index_put(first, b[:, -1], accumulate=True)


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
    "shared heads": shared_heads,
    "repeat": lambda p, a, b: a * b[..., :2].repeat_interleave(3, -1),
    "tile": lambda p, a, b: a + b.unflatten(-1, (2, 3)).mean(-2).repeat(1, 1, 2),
    "spread": lambda p, a, b: (
        b.unflatten(-1, (2, 3)).mean(-1, True) * a.unflatten(-1, (2, 3))
    ).flatten(2),
    "grouped": grouped,
    "complex": complex_product,
    "circular": circular,
    "strided": strided,
    "largest in time": lambda p, a, b: a - b.max(1, keepdim=True).values,
    "where largest": lambda p, a, b: b * a.max(1, keepdim=True).indices.to(a.dtype),
    "largest unit": lambda p, a, b: a * b.max(-1, keepdim=True).values,
    "which unit": lambda p, a, b: a + b.argmax(-1, keepdim=True).to(a.dtype),
    "sum until now": lambda p, a, b: a.cumsum(1),
    "sort in time": lambda p, a, b: a.sort(1).values + b,
    "top in time": lambda p, a, b: a + b.topk(1, 1).values,
    "spectrum": lambda p, a, b: torch.fft.fft(a, dim=1).abs() + b,
    "spectrum of units": lambda p, a, b: torch.fft.fft(a, dim=-1).abs() + b,
    "gather in time": lambda p, a, b: a.gather(1, order(b, 1).expand_as(a)),
    "gather by unit": lambda p, a, b: a.gather(1, b.argsort(1)),
    "gather units": lambda p, a, b: a.gather(2, order(b, 2).expand_as(a)),
    "one time": lambda p, a, b: a + b[torch.arange(len(a)), b.amax(-1).argmax(1)][:, None],
    "some times": lambda p, a, b: a[:, b.amax((0, 2)).argsort()],
    "edges": edges,
    "bag": bag,
    "write rows": write_rows,
    "recurrent": recurrent,
    "bilinear": lambda p, a, b: F.bilinear(a, b, p.take(WIDTH, WIDTH, WIDTH), p.take(WIDTH)),
    "distances": lambda p, a, b: torch.cdist(a, p.take(WIDTH, WIDTH)[None]) + b,
}

step = st.tuples(st.sampled_from([*OPERATIONS]), st.integers(0, 3), st.integers(0, 3))

PROGRAMS = st.tuples(st.lists(step, min_size=1, max_size=7), st.booleans())
"""The steps of a program, and whether it is also tried on shorter inputs."""


def check_program(steps: list[tuple[str, int, int]], shorter: bool) -> None:
    """Raise an error if the symmetry found in a program does not hold, or not at other sizes."""
    torch.manual_seed(0)
    net, x = Program(steps), torch.randn(2, LENGTH, INPUTS)
    with torch.no_grad():
        if torch.equal(net(x), net(torch.randn_like(x))):
            return  # constant, as `verify` says, too: what does not depend on inputs shows nothing
    found = symmetry.find(net, x, kinds=symmetry.KINDS)
    others = [torch.randn(3, 9, INPUTS), torch.randn(1, 1, INPUTS), torch.randn(2, 2, INPUTS)]
    others = others if shorter else others[:1]
    found.permutations.verify(net, x, others=others)
    found.verify(net, x, others=others)


def try_programs(seconds: float, first: int = 0) -> int:
    """Try programs for `seconds` and return how many. Raises the error of the smallest failure.

    first: the seed of the first hundred; the next ones have the seeds after it.
    """
    end, tried, chunk = time.monotonic() + seconds, 0, first
    while time.monotonic() < end:

        @seed(chunk)
        @settings(
            max_examples=100,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(PROGRAMS)
        def run(program: tuple[list[tuple[str, int, int]], bool]) -> None:
            nonlocal tried
            if time.monotonic() < end:
                tried += 1
                check_program(*program)

        run()
        chunk += 1
    return tried


# PyTorch's operators

INSIDE = 3  # inputs of a network around an operator
SAMPLES = 4  # for each operator
SIZES = 4, 1000  # the least and largest total number of entries of its arguments


class Around(nn.Module):
    """An operator on a sample's arguments, in a network whose outputs depend on all its results.

    hidden: which of the tensors, in their order, are hidden units; the others are parameters.
    Tensors of integers and booleans are buffers.
    """

    def __init__(self, op: Callable[..., Any], sample: Any, hidden: Callable[[int], bool]) -> None:
        super().__init__()
        self.op, self.sample = op, sample
        self.parts, self.outer = nn.ParameterDict(), nn.ParameterList()
        for k, x in enumerate(self.tensors()):
            if x.is_floating_point() or x.is_complex():
                self.parts[f"p{k}"] = nn.Parameter(x.detach().clone())
                if hidden(k):
                    self.parts[f"w{k}"] = nn.Parameter(torch.randn(*x.shape, INSIDE) / 10)
            else:
                self.register_buffer(f"b{k}", x.clone())
        self.outer.extend(nn.Parameter(torch.randn(y.shape)) for y in self.results(torch.rand(3)))

    def tensors(self) -> list[Tensor]:
        given = (self.sample.input, self.sample.args, self.sample.kwargs)
        return [x for x in tree_leaves(given) if isinstance(x, Tensor)]

    def results(self, x: Tensor) -> list[Tensor]:
        """The operator's results, as finite real numbers."""
        tensors = iter(range(len(self.tensors())))

        def part(_: Tensor) -> Tensor:
            if f"p{(k := next(tensors))}" not in self.parts:
                return self.get_buffer(f"b{k}").clone()  # the operator may write to it
            y: Tensor = self.parts[f"p{k}"].clone()
            return y + (self.parts[f"w{k}"] * x).sum(-1).tanh() if f"w{k}" in self.parts else y

        arguments = (self.sample.input, self.sample.args, self.sample.kwargs)
        first, rest, keywords = tree_map_only(Tensor, part, arguments)
        found = [y for y in tree_leaves(self.op(first, *rest, **keywords)) if isinstance(y, Tensor)]
        return [
            (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y.to(x.dtype)).nan_to_num(
                0.0, 0.0, 0.0
            )
            for y in found
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = [(y * w).sum() for y, w in zip(self.results(x), self.outer, strict=True)]
        return torch.stack(y) + x.sum()


def size_of(sample: Any) -> int:
    """The total number of entries of the tensors of a sample."""
    given = tree_leaves((sample.input, sample.args, sample.kwargs))
    return sum(x.numel() for x in given if isinstance(x, Tensor))


def around(op: Any) -> Iterator[nn.Module]:
    """Networks around an operator, for the samples that it accepts in this form."""
    samples = op.sample_inputs("cpu", torch.float32, requires_grad=False)
    fit = [s for s in samples if SIZES[0] <= size_of(s) <= SIZES[1]]
    for sample in fit[:: -(-len(fit) // SAMPLES) or 1]:
        for hidden in (lambda k: True, lambda k: k == 0, lambda k: k > 0):
            torch.manual_seed(0)
            try:
                yield Around(op.op, sample, hidden)
            except Exception:  # it does not accept copies of its samples, or such numbers
                continue


NO_NUMBERS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"}
NO_NUMBERS |= {"new_empty_strided"}
"""Operators whose results are uninitialised memory."""


def outcome(net: nn.Module) -> tuple[str, str]:
    """What happens to a network, in a word, and the message of the error, if any."""
    x = torch.rand(INSIDE)
    try:
        sym = symmetry.find(net, x)
    except symmetry.ExampleError as error:
        return "fails itself", str(error)
    except symmetry.SymmetryError as error:
        return "refused", str(error)
    except Exception as error:
        return "crashes", f"{type(error).__name__}: {error}"
    try:
        sym.verify(net, x)
    except symmetry.SymmetryError as error:
        text = str(error)
        return "unsound" if "outputs differ" in text else "not verified", text
    return "with groups" if sym.groups else "without groups", ""


def try_operators(show: Callable[[str], None]) -> Counter[str]:
    """Try all operators of PyTorch's list, and count the outcomes of the networks."""
    from torch.testing._internal.common_methods_invocations import op_db

    total, handled = Counter[str](), 0
    for op in (op for op in op_db if op.name not in NO_NUMBERS):
        found = Counter[str]()
        for net in around(op):
            word, text = outcome(net)
            if word in ("unsound", "crashes") and not found[word]:
                show(f"{op.name} {op.variant_test_name}: {word}: {text[:400]}")
            elif word in ("refused", "not verified", "fails itself") and not found[word]:
                show(f"  {op.name} {op.variant_test_name}: {word}: {text[:200]}")
            found[word] += 1
        handled += bool(found["with groups"] + found["without groups"])
        total += found
    show(f"{len(op_db)} operators, {handled} of them followed")
    return total


def main() -> int:
    """Try operators, then programs. Returns 1 if anything was unsound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--minutes", type=float, default=60.0, help="of random programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first hundred programs")
    parser.add_argument("--no-operators", action="store_true", help="random programs alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # about deprecated operators
    torch.set_num_threads(1)
    found = Counter[str]() if args.no_operators else try_operators(print)
    for word, count in found.most_common():
        print(f"{count} networks around an operator: {word}")
    print(f"{try_programs(60 * args.minutes, args.seed)} random programs: all that was found holds")
    return int(found["unsound"] + found["crashes"] > 0)


RAW = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    raise SystemExit(main())
