"""Find the permutation symmetries of any network, prove them, apply them (chapter 3)::

    sym = symmetry.find(net, example)
    sym.verify(net, example)
    theta = sym.permute(theta, sym.random(generator))   # another network, the same function

A permutation `p` of a group's units acts by `new[i] = old[p[i]]` at every place of the group. The
units of a nested group are blocks (attention heads, groups of a convolution); `inner` names the
groups that permute within each block, and these act first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from threading import Lock, get_ident
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from mcnotes import calls, checks
from mcnotes.calls import Inputs
from mcnotes.symmetry import foreign, permutations
from mcnotes.symmetry.activations import Reader, Theta
from mcnotes.symmetry.execute import Shared, inference_copy, outputs, unfused_attention
from mcnotes.symmetry.foreign import first_line
from mcnotes.symmetry.groups import Group, Pinned, Place, discover
from mcnotes.symmetry.units import SymmetryError

Perm = dict[str, Tensor]  # index vectors by group


def exemplary(value: object) -> str:
    """Inputs of a network, with a tensor among them."""
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    if tensors or isinstance(value, Mapping):
        return ""
    return f"got a {type(value).__name__}, expected a tensor, or a tuple or mapping of some"


def examples(value: object) -> str:
    """A list of inputs."""
    if not isinstance(value, list | tuple):
        return f"got a {type(value).__name__}, expected a list of inputs"
    return next((fault for x in value if (fault := exemplary(x))), "")


ARGUMENTS: dict[str, checks.Rule] = {
    "net": checks.a(nn.Module, "an nn.Module"),
    "example": exemplary,
    "others": examples,
    "train": checks.flag,
    "at": checks.one_of(["post", "pre"]),
    "tolerance": lambda x: "" if x == math.inf else checks.number(0, above=True)(x),
    "seed": checks.whole(-(2**63), 2**64 - 1),
    "generator": checks.optional(checks.a(torch.Generator, "a torch.Generator, or None")),
}
"""What the arguments of the functions below may be."""
TRACED: WeakKeyDictionary[nn.Module, dict[Any, Symmetry]] = WeakKeyDictionary()
"""What `find` found, by network, and by mode and form of the inputs; `tapper` looks it up."""
SMALL = 2**16  # entries of an example that `verify` also makes longer; larger ones get shorter
VISIBLE = 1e-7
"""Relative change of an output above which it counts.

The rounding of sums in float64, some 1e-14 of them, then stays below the usual tolerance.
"""


@dataclass(frozen=True, eq=False)
class Symmetry:
    """All that may be permuted in a network without changing its function: a value.

    A group of n units stands for n! copies of the network. train: the mode it was found in.
    shapes: of the tensors of that network, by name.
    """

    groups: Mapping[str, Group]
    pinned: tuple[Pinned, ...] = ()
    train: bool = False
    shapes: Mapping[str, torch.Size] = field(default_factory=dict, repr=False)

    def identity(self) -> Perm:
        """The permutation that moves nothing."""
        return {name: permutations.identity(g.size) for name, g in self.groups.items()}

    def random(self, generator: torch.Generator | None = None) -> Perm:
        """An independent, uniformly random permutation of every group (CPU generator)."""
        checks.require("random", {"generator": generator}, ARGUMENTS)
        return {name: permutations.random(g.size, generator) for name, g in self.groups.items()}

    def complete(self, perm: Perm) -> Perm:
        """`perm`, with the identity for groups that it leaves out. ValueError if it misfits."""
        if not isinstance(perm, Mapping):
            raise ValueError(f"got a {type(perm).__name__}, expected index vectors by group")
        if wrong := [name for name in perm if name not in self.groups]:
            raise ValueError(f"no group {wrong[0]!r} in this symmetry; there are {[*self.groups]}")
        checked = {
            n: permutations.check(p, self.groups[n].size, f"group {n!r}") for n, p in perm.items()
        }
        return self.identity() | checked

    def compose(self, p: Perm, q: Perm) -> Perm:
        """First p, then q, as one: `permute(θ, compose(p, q)) = permute(permute(θ, p), q)`."""
        p, q = self.complete(p), self.complete(q)
        return {old: permutations.compose(p[old], q[new]) for new, old in self._carried(p).items()}

    def inverse(self, p: Perm) -> Perm:
        """The permutation that undoes p."""
        p = self.complete(p)
        return {new: permutations.invert(p[old]) for new, old in self._carried(p).items()}

    def _carried(self, p: Perm) -> dict[str, str]:
        """For each group the one whose units p brings to its place: another where blocks move."""
        source = {name: name for name in self.groups}
        for name, g in self.groups.items():
            for block, k in zip(g.inner, p[name].tolist(), strict=False):
                source |= zip(block, g.inner[k], strict=True)
        return source

    def permute(self, theta: Theta, perm: Perm) -> Theta:
        """Parameters of the same function in another order; `theta` is left as it is.

        perm: group → index vector; groups that it leaves out stay. Any device. Raises ValueError
        for permutations, or parameters, that do not fit.
        """
        self._check_shapes(theta)
        # For each parameter and axes the order in which positions are taken: all groups at once.
        orders: dict[tuple[str, tuple[int, ...]], tuple[Place, Tensor]] = {}
        for name, p in self.complete(perm).items():  # those within blocks before the blocks
            for at in self.groups[name].places if name in perm else ():
                size = at.of(theta).shape[at.axis]
                order = orders.setdefault((at.name, at.axes), (at, torch.arange(size)))[1]
                order[at.index] = order[at.index[p]]
        out = dict(theta)
        # Channels within the groups of a convolution (two axes) move before the groups do.
        for at, order in sorted(orders.values(), key=lambda o: -len(o[0].axes)):
            flat = at.of(out)
            moved = flat.index_select(at.axis, order.to(flat.device))
            out[at.name] = moved.view(theta[at.name].shape)
        return out

    def _check_shapes(self, theta: Theta) -> None:
        """Raise ValueError for tensors of other shapes than in the network that this is of."""
        if not isinstance(theta, Mapping):
            raise ValueError(f"permute: got a {type(theta).__name__}, expected tensors by name")
        for name in {at.name for group in self.groups.values() for at in group.places}:
            if name in theta and theta[name].shape != self.shapes.get(name, theta[name].shape):
                raise ValueError(
                    f"permute: {name!r} has shape {[*theta[name].shape]}, expected "
                    f"{[*self.shapes[name]]}: is it of another network?"
                )

    def apply_matrices(self, theta: Theta, matrices: Mapping[str, Tensor]) -> Theta:
        """`permute` by square matrices [size, size], differentiably: new = M · old at each place.

        `torch.eye(size)[p]` is the permutation p; doubly stochastic matrices lie between
        permutations (chapter 7). Groups that are left out stay.
        """
        if not isinstance(matrices, Mapping):
            raise ValueError(f"got a {type(matrices).__name__}, expected matrices by group")
        if wrong := [name for name in matrices if name not in self.groups]:
            raise ValueError(f"no group {wrong[0]!r} in this symmetry; there are {[*self.groups]}")
        for name, matrix in matrices.items():
            size, got = self.groups[name].size, getattr(matrix, "shape", type(matrix).__name__)
            if got != (size, size):
                raise ValueError(f"group {name!r}: got {got}, expected a matrix {[size, size]}")
        self._check_shapes(theta)
        out = dict(theta)
        for name, group in self.groups.items():
            for at in group.places if name in matrices else ():
                flat, index = at.of(out).movedim(at.axis, 0), torch.from_numpy(at.index)
                whole = not (flat.is_floating_point() or flat.is_complex())  # or a mask
                like = matrices[name] if whole else flat
                parts = matrices[name].to(like), flat[index].to(like)
                mixed = torch.einsum("ij,js...->is...", *parts).to(flat)
                flat = flat.index_put((index.to(flat.device),), mixed)
                out[at.name] = flat.movedim(0, at.axis).reshape(theta[at.name].shape)
        return out

    def verify(
        self,
        net: nn.Module,
        example: Inputs,
        theta: Theta | None = None,
        *,
        others: Sequence[Inputs] = (),
        tolerance: float = 1e-6,
        seed: int = 0,
    ) -> float:
        """The relative difference of the outputs when a random cycle permutes every group.

        Of the example, of `others`, and of the example at other batch sizes and lengths, as far as
        the network takes them: the largest. Differences count relative to how much outputs change
        with the input. In float64, dropout left out; a cycle moves every unit. theta: default the
        network's own parameters; they are jittered first, so that equal units (fresh biases,
        statistics) cannot hide an error. Raises SymmetryError above `tolerance`, with the group
        that is worst alone; and if nothing can be compared.
        """
        movable = {p.name for g in self.groups.values() for p in g.places}

        def cycle(generator: torch.Generator) -> Perm:
            return {n: random_cycle(g.size, generator) for n, g in self.groups.items()}

        trial = Trial(self.train, movable, cycle, self.permute)
        return trial.run(net, example, theta, others, tolerance, seed)

    def tapper(
        self, net: nn.Module, at: Literal["post", "pre"] = "post"
    ) -> Callable[..., dict[str, list[Tensor]]]:
        """A function `(θ, *inputs) → {group: [activations [samples, units], …]}`, in one run.

        at: "post", what the next contraction sees, after the nonlinearity; "pre", before it. All
        positions but those of the units are samples. Evaluation mode, any batch size, no gradients.
        Raises SymmetryError if `net` has other groups than this symmetry. Do not rebuild it in
        place after `find`: it is traced again only for inputs of another form.
        """
        checks.require("tapper", {"net": net, "at": at}, ARGUMENTS)
        readers: dict[Any, Reader] = {}
        lock = Lock()

        def run(theta: Theta, *given: Any) -> dict[str, list[Tensor]]:
            inputs = calls.plain(given[0] if len(given) == 1 else given)
            few = calls.first(inputs, 2)
            with lock:
                taps = {n: getattr(g, at) for n, g in self._as_traced(net, few).items()}
                # Each thread has a copy of the network, and each device runs other operators.
                key = get_ident(), form(few), devices(inputs)
                if key not in readers:
                    names = {t.name for places in taps.values() for t in places}
                    readers[key] = Reader(net, self.train, names, theta, few)
                read = readers[key]
            kept = read(theta, inputs)
            return {n: [t.samples(kept[t.name]) for t in ts] for n, ts in taps.items()}

        return run

    def _as_traced(self, net: nn.Module, inputs: Inputs) -> Mapping[str, Group]:
        """These groups, with the taps of `net` for inputs of this form.

        How inputs lie in memory decides which operators PyTorch runs, and taps are named by them.
        """
        traced = TRACED.get(net, {}).get((self.train, form(inputs)))
        groups = (traced or find(net, inputs, self.train)).groups
        if {n: g.size for n, g in groups.items()} != {n: g.size for n, g in self.groups.items()}:
            raise SymmetryError("tapper: other groups than here; find this network's own")
        return groups

    def log10_orbit(self) -> float:
        """log₁₀ of the number of copies of a generic network: the sum over groups of log₁₀ n!."""
        return sum(math.lgamma(g.size + 1) for g in self.groups.values()) / math.log(10)

    def explain(self, name: str) -> str:
        """What is known of the parameter or buffer `name`, axis by axis, in words."""
        lines = [
            f"axis {p.axis}: {p.index.size} positions of group {n!r} ({g.size} units)"
            for n, g in self.groups.items()
            for p in g.places
            if p.name == name
        ]
        lines += [f"axis {p.axis}: {p.count} stay: {p.why}" for p in self.pinned if p.name == name]
        lines = lines or ["no floating-point entry of the state dict"]
        return "\n".join(f"{name}, {line}" for line in lines)

    def table(self) -> list[dict[str, Any]]:
        """A row for each group, or for groups of one name that differ in their number [k] only."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for name, g in self.groups.items():
            stem = re.sub(r"\[\d+\]", "", name)
            where = ", ".join(f"{p.name}[{p.axis}]" for p in g.places)
            row = {"group": stem, "groups": 0, "units": g.size, "acts on [axis]": where}
            rows.setdefault((stem, g.size), row)["groups"] += 1
        return list(rows.values())

    def _repr_markdown_(self) -> str:
        rows = self.table() or [{"no groups": ""}]
        lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

    def __repr__(self) -> str:
        return f"Symmetry({len(self.groups)} groups, 10^{self.log10_orbit():.0f} copies)"


def form(inputs: Inputs) -> tuple[Any, ...]:
    """What a trace depends on: shapes, types, how inputs lie in memory, and what is no tensor."""
    if isinstance(inputs, tuple) and len(inputs) == 1:
        inputs = inputs[0]  # the same call
    leaves, structure = tree_flatten(inputs)
    return str(structure), *(
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves
    )


def devices(inputs: Inputs) -> tuple[torch.device, ...]:
    """Where the tensors among the inputs lie."""
    return tuple(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))


# What `verify` computes


@dataclass(frozen=True)
class Trial:
    """A comparison of a network's outputs with those of transformed parameters; see `verify`.

    movable: names of the parameters that change. draw: of a generator, an element, by groups.
    move: what elements, or parts of one, do to parameters.
    """

    train: bool
    movable: Collection[str]
    draw: Callable[[torch.Generator], dict[str, Tensor]]
    move: Callable[[Theta, dict[str, Tensor]], Theta]

    def run(
        self,
        net: nn.Module,
        example: Inputs,
        theta: Theta | None,
        others: Sequence[Inputs],
        tolerance: float,
        seed: int,
    ) -> float:
        """The largest relative difference; the arguments are those of `Symmetry.verify`."""
        asked = {"net": net, "example": example, "others": others}
        checks.require("verify", asked | {"tolerance": tolerance, "seed": seed}, ARGUMENTS)
        generator = torch.Generator().manual_seed(seed)
        kept = {n: t for n, t in net.state_dict().items() if isinstance(t, Tensor)}
        if theta is None and any(t.is_meta for t in kept.values()):
            raise SymmetryError("verify: the network has shapes alone. Fix: give values as theta.")
        state = calls.stated("verify", net, kept if theta is None else theta)
        # Buffers that are not in the state_dict are constants of the network, as in `find`.
        given = {
            n: jitter(t, generator, n in self.movable) if n in kept else in_float64(t)
            for n, t in state.items()
        }
        run = partial(float64_outputs, net, self.train, seed=seed)

        def harm(
            p: dict[str, Tensor], x: Inputs, before: list[Tensor], scales: list[float]
        ) -> float:
            return relative_difference(before, run(self.move(given, p), x), scales)

        element = self.draw(generator)
        worst, visible, usual = 0.0, False, list[bool]()
        for inputs, wanted in shown(calls.plain(example), map(calls.plain, others)):
            try:
                before = run(given, inputs)
            except Exception as error:
                if wanted:
                    raise cannot_run(error) from error
                continue
            own = [len(z) == calls.count(inputs) for z in before if z.dim()]
            usual = usual or own
            if own != usual and not wanted:
                continue  # `x.view(-1, n)` has made other samples of an image of another size
            scales = changes(before, partial(run, given), inputs, generator)
            visible |= any(scales)
            compared = inputs, before, scales
            if not (total := harm(element, *compared)) <= tolerance:
                if (again := harm({}, *compared)) > tolerance:
                    raise SymmetryError(
                        f"verify: a second run on the same inputs differs by {again:.1e}, so that "
                        "nothing can be compared. Fix: let outputs be finite, and chance be drawn "
                        "by PyTorch."
                    )
                alone = {n: harm({n: p}, *compared) for n, p in element.items()}
                name = max(alone, key=lambda n: alone[n])
                raise SymmetryError(
                    f"verify: outputs differ by {total:.1e} (relative, float64), allowed "
                    f"{tolerance:.0e}; group {name!r} alone by {alone[name]:.1e}"
                    + ("" if wanted else f"; on inputs of shapes {shapes(inputs)}")
                )
            worst = max(worst, total)
        if element and not visible:
            raise SymmetryError(
                "verify: the outputs do not depend on the inputs, so that nothing can be compared. "
                "Fix: give an example, or parameters, for which they do."
            )
        return worst


def random_cycle(size: int, generator: torch.Generator) -> Tensor:
    """A permutation that moves all of `size` things, in one cycle of random order."""
    order = permutations.random(size, generator)
    return torch.empty_like(order).scatter(0, order, order.roll(1))


def shown(example: Inputs, others: Iterable[Inputs]) -> Iterator[tuple[Inputs, bool]]:
    """Inputs to compare outputs of, and whether the network must take them."""
    yield example, True
    for inputs in others:
        yield inputs, True
    tensors = [x for x in tree_leaves(example) if isinstance(x, Tensor)]
    small = sum(x.numel() for x in tensors) <= SMALL
    for axis in range(max((x.dim() for x in tensors), default=0)):
        size = next(x.shape[axis] for x in tensors if x.dim() > axis)
        for new in (size + 1 if axis == 0 else 2 * size, (size + 1) // 2):
            # A batch of one may be something else.
            if new != size and new > (axis == 0) and (small or new < size):
                yield resized(example, axis, size, new), False


def resized(inputs: Inputs, axis: int, size: int, new: int) -> Inputs:
    """Inputs of another length: tensors of this size along an axis are cut, or begin again.

    What comes again is smaller: of equal entries rounding alone would say which is the larger, and
    a network that sorts them would seem to change.
    """
    index = torch.arange(new)

    def other(x: Tensor) -> Tensor:
        if x.dim() <= axis or x.shape[axis] != size:
            return x
        found = x.index_select(axis, (index % size).to(x.device))
        if not x.is_floating_point():
            return found
        smaller = 1 - (index // size) / 8
        return found * smaller.to(found).view(-1, *[1] * (x.dim() - axis - 1))

    return tree_map_only(Tensor, other, inputs)  # type: ignore[no-any-return]


def shapes(inputs: Inputs) -> str:
    """The shapes of the tensors among the inputs."""
    return ", ".join(str(tuple(x.shape)) for x in tree_leaves(inputs) if isinstance(x, Tensor))


def changes(
    before: Sequence[Tensor],
    run: Callable[[Inputs], list[Tensor]],
    inputs: Inputs,
    generator: torch.Generator,
) -> list[float]:
    """How much each output changes when the inputs are others; 0: hardly, or it is not known."""
    try:
        after = run(tree_map_only(Tensor, partial(altered, generator=generator), inputs))
        return [change(x, y) for x, y in zip(before, after, strict=True)]
    except Exception:  # the network does not take such inputs
        return [1.0 for _ in before]


def altered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other inputs of the same kind: noise on real numbers; integers in another order."""
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return x + (x.std() if x.numel() > 1 and x.std() > 0 else 1.0) * noise
    return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view(x.shape)


def float64_outputs(
    net: nn.Module, train: bool, theta: Theta, inputs: Inputs, seed: int
) -> list[Tensor]:
    """The tensors that a network returns in float64, buffers not in theta among its parameters.

    Random numbers within come from `seed`; those outside are left alone.
    """
    device = next((t.device for t in theta.values()), torch.device("cpu"))
    values = {n: in_float64(b) for n, b in net.named_buffers()} | theta
    for n, _ in net.named_buffers():
        values[n] = values[n].clone()  # which a forward pass may change
    copied = inference_copy(
        net, train
    )  # PyTorch copies no tensors of another than the default type
    with float64_default, unfused_attention, torch.no_grad(), calls.seeded(seed, device):
        given = tree_map_only(Tensor, lambda x: in_float64(x).to(device), inputs)
        with InFloat64():
            return outputs(copied, values, given)


class InFloat64(TorchDispatchMode):
    """Operators that name another precision, or meet one, compute in float64 all the same."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.is_mutable:
            args, kwargs = tree_map_only(Tensor, in_float64, (args, kwargs or {}))
        args, kwargs = tree_map_only(torch.dtype, widest, (args, kwargs or {}))
        return func(*args, **kwargs)


def widest(dtype: torch.dtype) -> torch.dtype:
    """float64 for any floating-point type, complex128 for any complex one."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def in_float64(t: Tensor) -> Tensor:
    """The same numbers in float64, if they are floating-point, or complex128."""
    return t.to(widest(t.dtype))


def cannot_run(error: Exception) -> SymmetryError:
    """What to say if a network fails in float64."""
    if isinstance(error, SymmetryError):
        return error
    return SymmetryError(
        f"verify: the network fails when it is run in float64: {first_line(error)}. Fix: give an "
        "example, and parameters with values, that it takes; it must not insist on a precision."
    )


@Shared
@contextmanager
def float64_default() -> Iterator[None]:
    """Tensors that a network makes are float64, too: `with float64_default:`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def change(before: Tensor, after: Tensor) -> float:
    """The largest difference of an entry; 0 if rounding may bring it, 1 if it is not finite."""
    if before.shape != after.shape or not before.numel():
        return 0.0
    x, y = (t if t.is_complex() else t.double() for t in (before, after))
    largest = float((x - y).abs().max())
    if not math.isfinite(largest):
        return 1.0
    return largest if largest > VISIBLE * float(x.abs().max()) else 0.0


def relative_difference(
    before: Sequence[Tensor], after: Sequence[Tensor], scales: Iterable[float] = repeat(0.0)
) -> float:
    """The largest difference of an entry, relative to its tensor's scale; infinite if NaN.

    Where the scale is 0, or larger than that, to the tensor's largest entry.
    """
    worst = 0.0
    for (x, y), scale in zip(zip(before, after, strict=True), scales, strict=False):
        if x.numel():
            x, y = (t if t.is_complex() else t.double() for t in (x, y))
            largest = float(x.abs().max())
            error = float((x - y).abs().max()) / max(min(scale or largest, largest), 1e-300)
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def jitter(t: Tensor, generator: torch.Generator, movable: bool = True) -> Tensor:
    """Float64; each entry scaled by about 1, equal ones moved apart; positive ones stay so.

    Weights that are tiny for their fan-in (as heads may start) are scaled up, so that they count.
    Masks and integers change only if they are movable, for others may be indices.
    """
    t = t.detach()
    if t.is_complex():
        return torch.complex(*(jitter(part.contiguous(), generator) for part in (t.real, t.imag)))
    if not t.numel() or not (movable or t.is_floating_point()):
        return in_float64(t)
    noise = torch.rand(2, *t.shape, dtype=torch.float64, generator=generator).to(t.device)
    if not t.is_floating_point():
        return t ^ (noise[0] < 0.5).to(t.dtype)
    t = t.double()
    if bool((t == t.flatten()[0]).all()):
        return t * (0.75 + noise[0] / 2) + 0.1 * noise[1]
    reach = float(t.std()) * t[0].numel() ** 0.5 if t.dim() > 1 else 10 * float(t.abs().mean())
    return t * (0.75 + noise[0] / 2) / (reach if 0 < reach < 1 else 1)


def find(net: nn.Module, example: Inputs, train: bool = False) -> Symmetry:
    """The permutation symmetries of `net`: `symmetry.find` without `kinds`."""
    given = {"net": net, "example": example, "train": train}
    checks.require("find", given, ARGUMENTS, SymmetryError)
    foreign.check(net)
    inputs = calls.plain(example)
    shapes = {n: x.shape for n, x in net.state_dict().items() if isinstance(x, Tensor)}
    found = Symmetry(*discover(net, inputs, train), train, shapes)
    TRACED.setdefault(net, {})[train, form(inputs)] = found
    return found
