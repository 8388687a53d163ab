"""Symmetries beyond permutations: scales, signs, rotations, changes of basis (chapter 13)::

    found = symmetry.find(net, example, kinds=symmetry.KINDS)
    found.verify(net, example)
    theta = found.transform(theta, found.random(generator))  # other numbers, the same function

What `find` says of permutations tells which units make a space, and where they stand; `exponents`
tells which larger groups act there. Norm gains that stand between a space and what reads it are
*folded* first: they become 1, and the matrices that read them take them over. Godfrey et al.
(2022) describe such groups.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from mcnotes import calls, checks, display
from mcnotes.calls import Inputs
from mcnotes.symmetry.activations import Theta
from mcnotes.symmetry.exponents import (
    LAWS,
    Capture,
    Found,
    Seat,
    capture,
    follow,
    solutions,
)
from mcnotes.symmetry.find import ARGUMENTS, Symmetry, Trial
from mcnotes.symmetry.find import find as find_permutations
from mcnotes.symmetry.groups import Group, Place
from mcnotes.symmetry.rotary import SAME
from mcnotes.symmetry.units import op_name

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["KINDS", "Bases", "Element", "Factor", "Site", "find"]

Element = dict[str, Tensor]  # index vectors by group, matrices [n, n] or vectors [n] by factor

KINDS = ("permutations", "scales", "signs", "rotations", "bases")
"""What `find` can look for."""


@dataclass(frozen=True)
class Site:
    """Where a factor acts: on the units of a place, with a power, and on θ + offset.

    A scale or sign s multiplies by sᵖ. Of a matrix M, p = 1 is M, and p = −1 its inverse
    transposed, as in what reads a space. A phase turns the pairs of slots of each unit by an angle.
    """

    place: Place
    power: int
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Factor:
    """A group that acts on one space of `size` units; kind: as in `exponents.LAWS`.

    folds: for each norm gain that is folded first the scales that bring it to 1; its own site is
    the first.
    """

    space: str
    kind: str
    size: int
    sites: tuple[Site, ...]
    folds: tuple[tuple[Site, ...], ...] = ()

    @property
    def dimension(self) -> int:
        """The dimension of the group; 0 for signs."""
        n = self.size
        return {
            "bases": n * n,
            "rotations": n * (n - 1) // 2,
            "rotations about 1": (n - 1) * (n - 2) // 2,
            "scales": n,
            "signs": 0,
            "phases": n,
        }[self.kind]

    @property
    def mixes(self) -> bool:
        """Whether its elements are matrices [n, n]; if not, vectors [n]."""
        return LAWS[self.kind].mixes and self.kind != "phases"

    def identity(self) -> Tensor:
        """The element that changes nothing, in float64."""
        n = self.size
        if self.kind == "phases":
            return torch.zeros(n).double()
        return torch.eye(n).double() if self.mixes else torch.ones(n).double()

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """An element of the whole group, in float64: uniformly random if it is compact.

        Scales lie between 1/2 and 2, and so do the singular values of changes of basis.
        """
        n = self.size
        if self.kind == "scales":
            return spread(n, generator)
        if self.kind == "phases":
            return 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
        if self.kind == "signs":
            return torch.randint(2, (n,), generator=generator).double() * 2 - 1
        if self.kind == "bases":
            return rotation(n, generator) * spread(n, generator) @ rotation(n, generator)
        if self.kind == "rotations":
            return rotation(n, generator)
        rest = beside_ones(n)
        return rest @ rotation(n - 1, generator) @ rest.T + torch.full(
            (n, n), 1 / n, dtype=torch.float64
        )

    def fault(self, x: Any, tolerance: float = 1e-3) -> str:
        """What is wrong with an element; "" if nothing is."""
        shape = (self.size,) * (2 if self.mixes else 1)
        if not isinstance(x, Tensor) or x.shape != shape or not x.is_floating_point():
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"got {got}, expected real numbers {list(shape)}"
        if not bool(x.isfinite().all()):
            return "got numbers that are not finite"
        if self.kind == "phases":
            return ""
        if self.kind == "scales":
            return "" if bool((x > 0).all()) else "got scales that are not positive"
        if self.kind == "signs":
            return "" if bool((x.abs() == 1).all()) else "got numbers that are not 1 or -1"
        if self.kind == "bases":
            return (
                ""
                if int(torch.linalg.matrix_rank(x.double())) == self.size
                else "is not invertible"
            )
        x = x.detach().double()
        if float((x @ x.T - torch.eye(self.size).to(x)).abs().max()) > tolerance:
            return "is not orthogonal"
        if LAWS[self.kind].ones and float((x.sum(1) - 1).abs().max()) > tolerance:
            return "moves the vector of ones"
        return ""

    def __repr__(self) -> str:
        where = ", ".join(f"{s.place.name}[{s.place.axis}]" for s in self.sites)
        return f"Factor({self.kind} of {self.size} units, {self.dimension} dimensions, at {where})"

    def _repr_html_(self) -> str:
        rows = [
            {"acts on": s.place.name, "axis": s.place.axis, "by": said(self.mixes, s.power)}
            for s in self.sites
        ]
        return display.described(self, display.table(rows))


def said(mixes: bool, power: int) -> str:
    """How a factor acts at a site, in symbols."""
    if mixes:
        return "M" if power > 0 else "M⁻ᵀ"
    return "s" if power == 1 else f"s^{power}"


def spread(n: int, generator: torch.Generator | None) -> Tensor:
    """Numbers [n] between 1/2 and 2, their logarithms uniformly random."""
    return (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1).mul(math.log(2)).exp()


def rotation(n: int, generator: torch.Generator | None) -> Tensor:
    """A uniformly random orthogonal matrix [n, n], in float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    signed: Tensor = q * r.diagonal().sign()
    return signed


def beside_ones(n: int) -> Tensor:
    """An orthonormal basis [n, n − 1] of the vectors that add up to 0, in float64."""
    basis: Tensor = torch.linalg.qr(torch.eye(n, dtype=torch.float64)[:, 1:] - 1 / n).Q
    return basis


@dataclass(frozen=True, eq=False)
class Bases:
    """All that was found in a network: its permutations, and other groups by name; a value.

    refused: for each space the groups that are not offered, and the operators that forbid them.
    """

    permutations: Symmetry
    factors: Mapping[str, Factor]
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)

    def identity(self) -> Element:
        """The element that only folds."""
        return self.permutations.identity() | {n: f.identity() for n, f in self.factors.items()}

    def random(self, generator: torch.Generator | None = None) -> Element:
        """An element of the whole group; see `Factor.random` (CPU generator)."""
        checks.require("random", {"generator": generator}, ARGUMENTS)
        perm = self.permutations.random(generator)
        return perm | {n: f.random(generator) for n, f in self.factors.items()}

    def check(self, element: Element) -> Element:
        """The element. Raises ValueError if it is of another group."""
        if not isinstance(element, Mapping):
            raise ValueError(
                f"got a {type(element).__name__}, expected an element: tensors by name"
            )
        self.permutations.complete({n: x for n, x in element.items() if n not in self.factors})
        for name, f in self.factors.items():
            if name in element and (fault := f.fault(element[name])):
                raise ValueError(f"factor {name!r}: {fault}")
        return element

    def fold(self, theta: Theta, names: Iterable[str] | None = None) -> Theta:
        """The same function with the gains at 1 that some factors (default: all) want folded.

        Raises ValueError for a gain of 0 beside which there is a bias.
        """
        self._check_shapes(theta)
        chosen = self.factors if names is None else [*names]
        if wrong := [n for n in chosen if n not in self.factors]:
            raise ValueError(f"no factor {wrong[0]!r} in this value; there are {[*self.factors]}")
        # One gain may be folded for several factors.
        folds = {f[0].place.name: f for n in chosen for f in self.factors[n].folds}
        for name, (own, *others) in folds.items():
            at = own.place
            gain = (at.of(theta) + own.offset).movedim(at.axis, 0)[entries(at)].flatten()
            if bool((gain == 0).any()) and any(s.power > 0 for s in others):
                raise ValueError(f"fold: a gain in {name!r} is 0, so its bias cannot be kept")
            theta = act(theta, own, torch.ones_like(gain), assign=True)
            for site in others:
                theta = act(theta, site, gain ** -float(site.power))
        return dict(theta)

    def transform(self, theta: Theta, element: Element) -> Theta:
        """Other parameters of the same function; `theta` is left as it is.

        element: what it leaves out stays. Gains are folded, then units permuted, then the factors
        act, in their order. Any device; differentiable. Raises ValueError for an element, or
        parameters, that do not fit.
        """
        self.check(element)
        theta = self.fold(theta, [n for n in self.factors if n in element])
        perm = {n: p for n, p in element.items() if n not in self.factors}
        return self.act(self.permutations.permute(theta, perm), element)

    def _check_shapes(self, theta: Theta) -> None:
        """Raise ValueError for tensors of other shapes than in the network that this is of."""
        if not isinstance(theta, Mapping):
            raise ValueError(f"transform: got a {type(theta).__name__}, expected tensors by name")
        shapes = self.permutations.shapes
        for name in self.names:
            if name not in theta or theta[name].shape != shapes.get(name, theta[name].shape):
                got = [*theta[name].shape] if name in theta else "nothing"
                raise ValueError(
                    f"transform: {name!r}: got {got}, expected {[*shapes[name]]}: is it of another "
                    "network?"
                )

    def act(self, theta: Theta, element: Element) -> Theta:
        """What the factors alone do to parameters that are folded; unchecked, differentiable."""
        for name, f in self.factors.items():
            if name not in element:
                continue
            x = element[name]
            dual = torch.linalg.inv(x).mT if f.kind == "bases" else x
            for site in f.sites:
                if f.kind == "phases":
                    theta = act(theta, site, x, turn=True)
                    continue
                how = (x if site.power > 0 else dual) if f.mixes else x ** float(site.power)
                theta = act(theta, site, how)
        return dict(theta)

    def verify(
        self,
        net: nn.Module,
        example: Inputs,
        theta: Theta | None = None,
        *,
        others: Sequence[Inputs] = (),
        tolerance: float = 1e-9,
        seed: int = 0,
    ) -> float:
        """As `Symmetry.verify`, with a random element of the whole group."""
        trial = Trial(self.permutations.train, self.names, self.random, self.transform)
        return trial.run(net, example, theta, others, tolerance, seed)

    @property
    def names(self) -> set[str]:
        """All parameters and buffers that change."""
        sites = [s for f in self.factors.values() for s in f.sites]
        sites += [s for f in self.factors.values() for fold in f.folds for s in fold]
        own = {p.name for g in self.permutations.groups.values() for p in g.places}
        return own | {s.place.name for s in sites}

    @property
    def folded(self) -> list[str]:
        """The norm gains that are folded."""
        names = [fold[0].place.name for f in self.factors.values() for fold in f.folds]
        return [*dict.fromkeys(names)]

    def table(self) -> DataFrame:
        """A row for each group; one for heads, and layers alike, with how many there are."""
        import pandas  # takes half a second

        rows: dict[Any, dict[str, Any]] = {}
        for f in self.factors.values():
            where = ", ".join(
                dict.fromkeys(
                    f"{s.place.name}[{s.place.axis}] {said(f.mixes, s.power)}" for s in f.sites
                )
            )
            folded = ", ".join(fold[0].place.name for fold in f.folds)
            stem = re.sub(r"\[\d+\]$", "", f.space)
            row = {
                "space": stem,
                "group": f.kind,
                "spaces": 0,
                "size": f.size,
                "dimension": 0,
                "acts on [axis]": where,
                "folded": folded,
            }
            own = rows.setdefault((stem, f.kind, f.size, where), row)
            own["spaces"] += 1
            own["dimension"] += f.dimension
        columns = ["space", "group", "spaces", "size", "dimension", "acts on [axis]", "folded"]
        return pandas.DataFrame([*rows.values()], columns=columns)

    def refusals(self) -> DataFrame:
        """A row for what is not offered in a space, or in several alike, and what forbids it."""
        import pandas  # takes half a second

        rows = Counter[tuple[str, str, str]]()
        for space, kinds in self.refused.items():
            for why in dict.fromkeys(kinds.values()):
                names = ", ".join(kind for kind in kinds if kinds[kind] == why)
                rows[re.sub(r"\.\d+\.", ".*.", space), names, why] += 1
        found = [(space, rows[space, names, why], names, why) for space, names, why in sorted(rows)]
        columns = ["space", "spaces", "not offered", "because of"]
        return pandas.DataFrame(found, columns=columns)

    def dimensions(self) -> DataFrame:
        """For each layer: the dimensions of each kind of group, and log₁₀ of its permutations."""
        import pandas  # takes half a second

        rows: dict[str, dict[str, Any]] = {}

        def row(name: str) -> dict[str, Any]:
            layer = re.sub(r"((?:^|.*?\.)\d+)\..*", r"\1", name.split("[")[0])
            blank = dict.fromkeys(LAWS, 0) | {"folded": 0, "log10 permutations": 0.0}
            return rows.setdefault(layer, {"layer": layer} | blank)

        for name, g in self.permutations.groups.items():
            row(name)["log10 permutations"] += math.lgamma(g.size + 1) / math.log(10)
        for f in self.factors.values():
            row(f.space)[f.kind] += f.dimension
        for name in self.folded:
            gains = {
                fold[0].place.index.size
                for f in self.factors.values()
                for fold in f.folds
                if fold[0].place.name == name
            }
            row(name.rpartition(".")[0])["folded"] += sum(gains)
        return pandas.DataFrame([*rows.values()])

    def __repr__(self) -> str:
        total = sum(f.dimension for f in self.factors.values())
        kinds = [k for k in LAWS if any(f.kind == k for f in self.factors.values())]
        return (
            f"Bases({len(self.factors)} groups{': ' * bool(kinds)}{', '.join(kinds)}; "
            f"{total:,} dimensions; {self.permutations!r})"
        )

    def _repr_html_(self) -> str:
        return display.described(self, self.table().to_html(index=False))


# How factors act


def entries(place: Place) -> Tensor:
    """[units, slots] of a place."""
    return torch.from_numpy(np.ascontiguousarray(place.index))


def act(
    theta: Theta, site: Site, how: Tensor, *, assign: bool = False, turn: bool = False
) -> Theta:
    """Parameters on which a matrix [n, n] has acted at a site, or numbers [n].

    assign: the numbers take the place of what is there. turn: they are angles.
    """
    at = site.place
    flat = at.of(theta).movedim(at.axis, 0)
    where = entries(at).to(flat.device)
    old = flat[where] + site.offset  # [units, slots, …]
    how = how.to(flat)
    if turn:
        pairs = old.unflatten(1, (-1, 2))
        x, y = pairs.unbind(2)
        cos, sin = (f(how).view(-1, *[1] * (x.dim() - 1)) for f in (torch.cos, torch.sin))
        new = torch.stack([cos * x - sin * y, sin * x + cos * y], 2).flatten(1, 2)
    elif how.dim() == 2:
        new = torch.einsum("ij,js...->is...", how, old)
    else:
        how = how.view(-1, *[1] * (old.dim() - 1)).expand_as(old)
        new = how if assign else how * old
    flat = flat.index_put((where,), new - site.offset)
    return {**theta, at.name: flat.movedim(0, at.axis).reshape(theta[at.name].shape)}


# Discovery


@overload
def find(net: nn.Module, example: Inputs, train: bool = False) -> Symmetry: ...
@overload
def find(
    net: nn.Module, example: Inputs, train: bool = False, *, kinds: Collection[str]
) -> Bases: ...
def find(
    net: nn.Module,
    example: Inputs,
    train: bool = False,
    *,
    kinds: Collection[str] | None = None,
) -> Symmetry | Bases:
    """The permutation symmetries of `net`, by following its units through one run.

    example: an input with its batch in front, a tuple of inputs, or a mapping of keywords; only
    shapes count. train: find those of training mode, in which auxiliary heads exist. The network is
    not changed. Raises SymmetryError where it cannot be followed: control flow on data. What is not
    understood is pinned, never guessed: see `Symmetry.pinned`, `Symmetry.explain`;
    `Symmetry.verify` proves. Numbers of Python that the network computes from the example's shape,
    such as indices, are taken as they are: `verify` tries other lengths and batch sizes, too.

    kinds: some of `KINDS`, to look for larger groups as well; the result is then `Bases`. Of each
    space the largest group counts: "bases", any invertible matrix, then "rotations", orthogonal
    ones, then positive "scales" and "signs" of single units. ValueError for other kinds.
    """
    wrong = isinstance(kinds, str) or any(k not in KINDS for k in kinds or ())
    if wrong:
        raise ValueError(f"find: got kinds {kinds!r}, expected some of {KINDS}")
    found = find_permutations(net, example, train)
    if kinds is None:
        return found
    captured = capture(net, calls.plain(example), train)
    factors, refused = discover(captured, found, kinds)
    if "permutations" not in kinds:
        found = Symmetry({}, (), train, found.shapes)
    return Bases(found, factors, refused)


class Discovery:
    """What one search knows: the operators, and where tensors of the state enter them."""

    def __init__(self, captured: Capture, sym: Symmetry, split: bool | None = None) -> None:
        self.captured, self.split = captured, split
        self.runs: dict[Any, Found] = {}
        self.starts: dict[Node, str] = {}
        self.offsets: dict[str, float] = {}
        for name, node in captured.nodes.items():
            start, offset = beginning(node)
            self.starts[start], self.offsets[name] = name, offset
        self.names: list[str] = []  # of the spaces
        self.seats: list[Seat] = []
        self.places: list[Place] = []  # of each seat
        for name, g in sym.groups.items() if split is not None else ():
            if not g.inner and (not split or any(1 < p.index.shape[1] <= 16 for p in g.places)):
                self.add(name, g.places)

    def add(self, name: str, places: Iterable[Place]) -> None:
        """Add a space."""
        slots = [
            Place(p.name, p.axes, p.index[:, k : k + 1]) if self.split else p
            for p in places
            for k in range(p.index.shape[1] if self.split else 1)
        ]
        for p in slots:
            if self.captured.tied.get(p.name) == p.name:
                self.seats.append(Seat(len(self.names), p.name, p.axes, entries(p)))
                self.places.append(p)
        self.names.append(name)

    def sites(self, space: int) -> list[int]:
        """The numbers of the seats of a space."""
        return [k for k, seat in enumerate(self.seats) if seat.space == space]

    def follow(self, kind: str, ones: Iterable[str] = ()) -> Found:
        """The equations between powers."""
        key = kind, frozenset(ones)
        if key not in self.runs:
            self.runs[key] = follow(self.captured, self.seats, self.starts, LAWS[kind], key[1])
        return self.runs[key]

    def why(self, kind: str, name: str) -> str:
        """The operators that forbid such a group of a space."""
        return self.follow(kind).why(self.names.index(name))

    def factors(
        self, kind: str, wanted: Collection[str], folds: Mapping[int, Mapping[int, int]]
    ) -> dict[str, list[Factor]]:
        """The groups of this kind of the wanted spaces; folds: of gains that are folded first."""
        if not {*self.names} & {*wanted}:
            return {}
        found = self.follow(kind, [self.seats[k].name for k in folds])
        factors: dict[str, list[Factor]] = {}
        for space, name in enumerate(self.names):
            sites = self.sites(space)
            own = tuple(self.placed(folds[k]) for k in sites if k in folds)
            size = len(self.seats[sites[0]].entries) if sites else 0
            for powers in self.solve(found, kind, space) if name in wanted else ():
                factor = Factor(name, kind, size, self.placed(powers), own)
                factors.setdefault(name, []).append(factor)
        return factors

    def solve(self, found: Found, kind: str, space: int) -> list[dict[int, int]]:
        """The symmetries of a space: powers by seat."""
        law, rows = LAWS[kind], [row for row, _ in found.equations[space]]
        basis = solutions(rows, self.sites(space), law.modulus)
        if law.mixes:  # a matrix is not multiplied by itself
            basis = [powers for powers in basis if all(abs(p) == 1 for p in powers.values())]
        return basis

    def placed(self, powers: Mapping[int, int]) -> tuple[Site, ...]:
        """The sites with these powers, at all names of tied tensors."""
        sites = []
        for k, power in powers.items():
            p = self.places[k]
            names = [n for n, first in self.captured.tied.items() if first == p.name]
            offset = self.offsets[p.name]
            sites += [Site(Place(n, p.axes, p.index), power, offset) for n in names]
        return tuple(sites)

    def gains(self) -> dict[int, dict[int, int]]:
        """For each gain that can be folded, by its seat: the powers of the scales that do it.

        A gain is a vector of the units of a space that only multiplies. Its scales may be negative,
        too, so that these powers must be those of signs as well.
        """
        scales, signs = self.follow("scales"), self.follow("signs")
        found: dict[int, dict[int, int]] = {}
        for space in range(len(self.names)):
            sites = self.sites(space)
            gains = [k for k in sites if self.is_gain(k)]
            for gain in gains:
                rows = [row for row, _ in scales.equations[space]]
                rows += [{k: Fraction(1)} for k in gains if k != gain]
                fitting = [w for w in solutions(rows, sites, 0) if abs(w.get(gain, 0)) == 1]
                for w in fitting[:1]:
                    powers = {k: p * w[gain] for k, p in w.items()}
                    odd = (
                        sum(c * powers.get(k, 0) for k, c in row.items()) % 2
                        for row, _ in signs.equations[space]
                    )
                    if not any(odd):
                        found[gain] = {gain: 1} | {k: p for k, p in powers.items() if k != gain}
        return found

    def is_gain(self, k: int) -> bool:
        """Whether a seat holds all of a vector, which only multiplies."""
        seat = self.seats[k]
        start = next((s for s, n in self.starts.items() if n == seat.name), None)
        return (
            start is not None
            and seat.entries.shape[1] == 1
            and math.prod(start.meta["val"].shape) == len(seat.entries)
            and only_multiplies(start)
        )


def beginning(node: Node) -> tuple[Node, float]:
    """Where a tensor of the state enters: at itself, or, of 1 + w, at the sum; and what it adds."""
    at = node
    while len(at.users) == 1:
        (user,) = at.users
        name = op_name(user.target) if hasattr(user.target, "_schema") else ""
        if name == "add" and user.args[0] is at and isinstance(user.args[1], int | float):
            return (node, 0.0) if user.kwargs else (user, float(user.args[1]))
        if name not in SAME:
            break
        at = user
    return node, 0.0


def only_multiplies(node: Node) -> bool:
    """Whether a tensor is used in products alone."""
    passing = SAME | {"view", "_unsafe_view", "unsqueeze", "expand"}

    def fits(user: Node) -> bool:
        name = op_name(user.target) if hasattr(user.target, "_schema") else ""
        if name in passing:
            return only_multiplies(user)
        norm = name in ("native_layer_norm", "_fused_rms_norm") and user.args[2] is node
        return name == "mul" or norm

    return all(map(fits, node.users)) and bool(node.users)


def discover(
    captured: Capture, sym: Symmetry, kinds: Collection[str]
) -> tuple[dict[str, Factor], dict[str, dict[str, str]]]:
    """The factors of a network by name, and what is refused, and why; see `find`."""
    factors: dict[str, Factor] = {}
    refused: dict[str, dict[str, str]] = {}
    searches = [Discovery(captured, sym, split) for split in (False, True)]
    gains = [search.gains() if "rotations" in kinds else {} for search in searches]
    mixed = set[str]()
    for kind, law in LAWS.items():
        if kind.split()[0] not in kinds:
            continue
        left = {name for name, g in sym.groups.items() if not g.inner} - mixed
        for search, own in zip(searches, gains, strict=True):
            found = search.factors(kind, left, own if law.modulus and law.mixes else {})
            factors |= {
                f"{f.space}:{kind}" + "'" * k: f for fs in found.values() for k, f in enumerate(fs)
            }
            left -= found.keys()
            mixed |= {*found} if law.mixes else set()
        for name in left:
            refused.setdefault(name, {})[kind] = searches[0].why(kind, name)
    turns = phases(captured, sym) if "rotations" in kinds else {}
    for kind in ("scales", "signs"):
        if kind in kinds:
            more = under_positions(captured, sym, kind)
            # A sign is half a turn.
            turned = {f.space for f in turns.values()} if kind == "signs" else set()
            factors |= {n: f for n, f in more.items() if f.space not in turned}
    factors |= turns
    return factors, refused


# Heads under rotary positions


Pairing = Callable[[Tensor, int], Tensor]
Heads = Callable[[Symmetry, Group, Pairing], list[list[Place]]]

PAIRINGS: dict[str, Pairing] = {
    "halves": lambda j, d: j % (d // 2),
    "neighbours": lambda j, d: j // 2,
    "whole": lambda j, d: j * 0,
}
"""Which coordinates of a head, of d, rotary positions may mix: the number of the set of each."""


def under_positions(captured: Capture, sym: Symmetry, kind: str) -> dict[str, Factor]:
    """Scales or signs of the coordinates of heads whose units must stay, because of positions.

    Coordinates that rotary positions turn into each other share one. Which these are is guessed;
    the equations tell whether it is right.
    """
    factors: dict[str, Factor] = {}
    for pairing in PAIRINGS.values():
        for of_blocks in (heads, sharing_heads):
            search = Discovery(captured, sym)
            for name, places in under(sym, of_blocks, pairing).items():
                search.add(name, places)
            new = {n for n in search.names if f"{n}:{kind}" not in factors}
            found = search.factors(kind, new, {})
            factors |= {f"{name}:{kind}": f for name, (f, *_) in found.items()}
    return factors


def phases(captured: Capture, sym: Symmetry) -> dict[str, Factor]:
    """Turns of the pairs of coordinates that rotary positions turn: one angle for each pair."""
    factors: dict[str, Factor] = {}
    for pairing in (PAIRINGS["halves"], PAIRINGS["neighbours"]):
        for of_blocks in (heads, sharing_heads):
            search, whole = Discovery(captured, sym), under(sym, of_blocks, pairing)
            for name, places in whole.items():
                for k in range(len(places[0].index)):
                    search.add(f"{name}~{k}", [pair_of(p, k) for p in places])
            found = search.factors("phases", search.names, {})
            for name, places in whole.items():
                angles = [found.get(f"{name}~{k}", []) for k in range(len(places[0].index))]
                acts = [acting(places, k, fs) for k, fs in enumerate(angles)]
                if acts[0] and all(a == acts[0] for a in acts):
                    sites = tuple(Site(places[i], 1) for i in acts[0])
                    made = Factor(name, "phases", len(angles), sites)
                    factors.setdefault(f"{name}:phases", made)
    return factors


def pair_of(place: Place, k: int) -> Place:
    """The two coordinates of a pair."""
    return Place(place.name, place.axes, place.index[k].reshape(-1, 2).T)


def acting(places: Sequence[Place], k: int, found: Sequence[Factor]) -> list[int]:
    """The numbers of the places at which the only group of a pair acts; none if it has not one."""
    acts = [s.place for s in found[0].sites] if len(found) == 1 else []

    def at(place: Place) -> bool:
        own = pair_of(place, k)
        return any(
            (p.name, p.axes) == (own.name, own.axes) and np.array_equal(p.index, own.index)
            for p in acts
        )

    return [i for i, place in enumerate(places) if at(place)]


def outermost(sym: Symmetry) -> dict[str, Group]:
    """The groups of blocks that are in no other's blocks, as query heads that share keys are."""
    inside = {n for g in sym.groups.values() for block in g.inner for n in block}
    return {n: g for n, g in sym.groups.items() if g.inner and n not in inside}


def under(sym: Symmetry, heads: Heads, pairing: Pairing) -> dict[str, list[Place]]:
    """By name, the places of the coordinates of the heads in each outermost group of blocks."""
    found, count = dict[str, list[Place]](), Counter[str]()
    for g in outermost(sym).values():
        for places in filter(None, heads(sym, g, pairing)):
            stem = places[0].name.removesuffix(".weight")
            found[f"{stem}[{count[stem]}]"] = places
            count[stem] += 1
    return found


def taken(sym: Symmetry, blocks: bool) -> dict[tuple[str, tuple[int, ...]], set[int]]:
    """The positions that move in some group of units, or in one of blocks, too."""
    found: dict[tuple[str, tuple[int, ...]], set[int]] = {}
    for g in sym.groups.values():
        for p in g.places if blocks or not g.inner else ():
            found.setdefault((p.name, p.axes), set()).update(p.index.flatten().tolist())
    return found


def within(sym: Symmetry, blocks: Group) -> list[tuple[Place, list[list[int]]]]:
    """For each place the positions in each block that move in no group of their own."""
    own = taken(sym, blocks=False)
    return [
        (p, [sorted({*row.tolist()} - own.get((p.name, p.axes), set())) for row in p.index])
        for p in blocks.places
    ]


def coordinates_of_a_head(sym: Symmetry, blocks: Group) -> int:
    """How many coordinates a head has: as many as values have, if that can be.

    So queries and keys of one tensor are told apart. If not, as many as keys have, the fewest.
    """
    left = [(p, len(rows[0])) for p, rows in within(sym, blocks) if rows[0]]
    sizes = {n for _, n in left}
    fused = len({p.name.rsplit(".", 1)[0] for p, _ in left}) == 1
    values = [sym.groups[n].size for n in blocks.inner[0] if not sym.groups[n].inner]
    fitting = values and (values[0] in sizes or (fused and min(sizes) % values[0] == 0))
    return values[0] if fitting else min(sizes, default=0)


def heads(sym: Symmetry, blocks: Group, pairing: Pairing) -> list[list[Place]]:
    """For each block the places of its coordinates that move in no group of their own.

    Queries that share keys are together, unless a tensor holds keys as well.
    """
    d, left = coordinates_of_a_head(sym, blocks), within(sym, blocks)
    left = [(p, rows) for p, rows in left if rows[0]]
    if left and all(len(rows[0]) > d for _, rows in left):  # keys come last
        parts = slice(-d), slice(-d, None)
        left = [(p, [row[at] for row in rows]) for p, rows in left for at in parts]
    return [paired([(p, rows[k]) for p, rows in left], d, pairing) for k in range(blocks.size)]


def sharing_heads(sym: Symmetry, blocks: Group, pairing: Pairing) -> list[list[Place]]:
    """As `heads`, of query heads that share keys and move in no block with them: all as one.

    The keys are guessed: as many positions as a head has coordinates, that stay, beside queries.
    """
    d, moved = coordinates_of_a_head(sym, blocks), taken(sym, blocks=True)
    left = [
        (p, [i for row in rows for i in row])
        for p, rows in within(sym, blocks)
        if rows[0] and p.axes == (0,)
    ]
    if blocks.inner[0] or not left:
        return []
    modules = {p.name.rsplit(".", 2)[0] for p, _ in left}
    for name, shape in sym.shapes.items():
        if "." in name and name.rsplit(".", 2)[0] in modules and shape:
            stays = sorted({*range(shape[0])} - moved.get((name, (0,)), set()))
            if len(stays) == d:
                left.append((Place(name, (0,), np.array(stays)[:, None]), stays))
    return [paired(left, d, pairing)]


def paired(rows: Iterable[tuple[Place, list[int]]], d: int, pairing: Pairing) -> list[Place]:
    """The places of sets of coordinates of heads, each of d, that stand at these positions."""
    made = []
    for place, row in rows:
        if row and d % 2 == 0 and len(row) % d == 0:
            unit = pairing(torch.arange(len(row)) % d, d)
            order = torch.argsort(unit, stable=True)
            at = np.array(row)[order.numpy()].reshape(int(unit.max()) + 1, -1)
            made.append(Place(place.name, place.axes, at))
    return made
