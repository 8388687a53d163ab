"""Match two networks by all symmetries that are known, not by permutations alone (chapter 13).

First both networks are brought into one gauge: norm gains are folded, and scales and changes of
basis balanced, so that what writes a space and what reads it have equal norms. What is then left of
every group is orthogonal, and has a closed form: Procrustes for matrices, an assignment for
permutations, a comparison for signs. One space at a time is solved, the others held fixed, in the
order in which they become known: a space next to the inputs first, then what it reads.

`Learn` goes on from there by the loss at the middle of the line, or along all of it: matrices move
as exponentials, scales too, permutations straight through. The line between two ends that both move
is that to one end that moves, moved itself, so that moving network B loses nothing.

Sources: Zhang et al. 2025 (rotations of transformers), Theus et al. 2025 (learned symmetries).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcnotes import curves, display, evaluate, train
from mcnotes.cache import Checkpoint
from mcnotes.calls import Batches
from mcnotes.checks import a, flag, function, optional, require, whole
from mcnotes.curves import Curve, Theta
from mcnotes.matching import doubly_stochastic, pam
from mcnotes.matching.assignment import assign
from mcnotes.matching.loss import ACTIONS, Shown, through
from mcnotes.matching.pair import PAIRED, AlignmentError, Pair, in_float64
from mcnotes.symmetry import Bases, Element, Factor
from mcnotes.symmetry.bases import beside_ones, entries, heads, outermost
from mcnotes.symmetry.groups import Place

Usable = Callable[[str], bool]  # whether what else acts on a parameter is known


@dataclass(frozen=True)
class Learn:
    """How `match_bases` descends. Raises ValueError for a field that is out of its range."""

    epochs: int = 10
    lr: float = 0.01  # Adam's largest step size for logarithms of matrices and scales
    batch_size: int = 100
    permute: bool = True  # permutations move, too, straight through
    along: bool = False  # by the loss at random points of the line, not at its middle alone

    def __post_init__(self) -> None:
        require("Learn", vars(self), {"permute": flag, "along": flag})
        _ = self.recipe  # which checks the rest

    @property
    def recipe(self) -> train.Recipe:
        """As the training loop knows it."""
        return train.Recipe(
            self.epochs,
            self.batch_size,
            self.lr,
            weight_decay=0.0,
            schedule="linear",
            augment=False,
        )


@dataclass(frozen=True, eq=False)
class BasesMatching:
    """Two networks in one gauge, each with the function that it had, and B close to A.

    before, gauged, after: the distance of the parameters, relative to A's norm: as given; in one
    gauge, where another norm is the measure; and there, matched. losses: where `Learn` looks, at
    the middle of the line or along it, the mean of each epoch.
    """

    theta_a: Theta
    theta_b: Theta
    before: float
    gauged: float
    after: float
    losses: tuple[float, ...]
    seconds: float

    def __repr__(self) -> str:
        course = f", loss {self.losses[0]:.3g} → {self.losses[-1]:.3g}" if self.losses else ""
        gauge = f"distance {self.before:.3g}, in one gauge {self.gauged:.3g} → {self.after:.3g}"
        return f"BasesMatching({gauge}{course})"

    def _repr_html_(self) -> str:
        epochs = [float(k + 1) for k in range(len(self.losses))]
        return display.described(self, display.line(epochs, self.losses, "loss of each epoch"))


def match_bases(
    pair: Pair,
    bases: Bases,
    images: Batches | None = None,
    learn: Learn | None = None,
    *,
    rounds: int = 20,
    loss: train.Loss = train.cost,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> BasesMatching:
    """Bring network B close to A by all that `bases` holds; both keep their functions.

    The pair's own symmetry is not used, but that of `bases`. Query heads that share keys and values
    are ordered once these are matched, and again in each round. rounds: at most so many passes over
    all spaces by weights, until one gains nothing. learn: then descend, on `images`, from `seed`;
    the result is kept if it has a smaller loss there than what weights gave. loss: of outputs and
    targets. checkpoint: from which an interrupted descent resumes after its last epoch. Raises
    AlignmentError for parameters that are not finite, for gains that cannot be folded, and where
    what is to be learned acts on a buffer; TrainingError if the loss is not finite.
    """
    given = {"pair": pair, "bases": bases, "images": images, "learn": learn, "rounds": rounds}
    rules = {
        "bases": a(Bases, "a symmetry.Bases"),
        "images": optional(evaluate.ARGUMENTS["data"]),
        "learn": optional(a(Learn, "a matching.Learn")),
        "rounds": whole(1),
        "loss": function,
        "checkpoint": optional(a(Checkpoint, "a cache.Checkpoint")),
    }
    given |= {"loss": loss, "seed": seed, "checkpoint": checkpoint}
    require("match_bases", given, PAIRED | rules)
    if learn and not (images and any(True for _ in images.batches(learn.batch_size))):
        raise ValueError("match_bases: images: got none, expected those to learn from")
    if learn:
        check_learnable(pair, bases)
    start = time.perf_counter()
    try:
        folded = [bases.fold(in_float64(x)) for x in (pair.theta_a, pair.theta_b)]
    except ValueError as error:
        raise AlignmentError(f"match_bases: {error}") from error
    ends = [balanced(bases, x) for x in folded]
    if not all(bool(x.isfinite().all()) for end in ends for x in end.values()):
        raise AlignmentError("match_bases: parameters are NaN or infinite, or have lost their rank")
    end_a, end_b = ends[0], Search(bases, *ends).run(rounds)
    losses: Sequence[float] = ()
    if learn and images is not None:
        line = end_a, end_b
        end_b, losses = learned(pair, bases, line, images, learn, loss, seed, checkpoint)
    names = pair.names
    theta_a, theta_b = like(end_a, pair.theta_a), like(end_b, pair.theta_b)
    return BasesMatching(
        theta_a,
        theta_b,
        distance(pair.theta_a, pair.theta_b, names),
        distance(ends[0], ends[1], names),
        distance(theta_a, theta_b, names),
        tuple(losses),
        time.perf_counter() - start,
    )


def check_learnable(pair: Pair, bases: Bases) -> None:
    """Raise AlignmentError where a group acts on a buffer, which learning does not move."""
    buffers = {n for n, _ in pair.net.named_buffers()}
    for f in bases.factors.values():
        if held := sorted(buffers.intersection(s.place.name for s in f.sites)):
            raise AlignmentError(
                f"match_bases: {f.kind} of {f.space!r} act on the buffer {held[0]!r}, which "
                f"learning does not move. Fix: leave out `learn`, or find no {f.kind.split()[0]}"
            )
    try:
        pam.check_only_parameters_move(pair.net, bases.permutations)
    except ValueError as error:
        raise AlignmentError(str(error)) from error


def like(theta: Theta, given: Theta) -> Theta:
    """In the precision of other parameters."""
    return {n: x.to(given[n].dtype) for n, x in theta.items()}


def distance(one: Theta, two: Theta, names: Sequence[str]) -> float:
    """‖θ₁ − θ₂‖ / ‖θ₁‖ over these parameters."""
    apart = sum(float((one[n].double() - two[n].double()).square().sum()) for n in names)
    return float(
        (apart / max(sum(float(one[n].double().square().sum()) for n in names), 1e-300)) ** 0.5
    )


def rows(theta: Theta, place: Place, offset: float = 0.0) -> Tensor:
    """What belongs to each unit of a place: [units, numbers]."""
    flat = place.of(theta).movedim(place.axis, 0)
    return (flat[entries(place).to(flat.device)] + offset).flatten(1)


# One gauge


def balanced(bases: Bases, theta: Theta, sweeps: int = 200) -> Theta:
    """The same function, with the smallest parameters that scales and bases allow."""
    free = {n: f for n, f in bases.factors.items() if f.kind in ("scales", "bases")}
    for _ in range(sweeps):
        moved = 0.0
        for name, f in free.items():
            how = balancing_scales(f, theta) if f.kind == "scales" else balancing_basis(f, theta)
            moved = max(moved, float((how - f.identity().to(how)).abs().max()))
            theta = bases.act(theta, {name: how})
        if moved < 1e-13 * len(theta):
            break
    return theta


def balancing_scales(f: Factor, theta: Theta) -> Tensor:
    """Scales [n] that make the norm of all sites smallest, where there is such a minimum."""
    powers = torch.tensor([float(s.power) for s in f.sites], dtype=torch.float64)
    norms = torch.stack([rows(theta, s.place, s.offset).square().sum(1) for s in f.sites])
    powers = powers.to(norms)[:, None]
    bound = ((norms * (powers > 0)).sum(0) > 0) & ((norms * (powers < 0)).sum(0) > 0)
    low, high = torch.full_like(norms[0], -30.0), torch.full_like(norms[0], 30.0)
    for _ in range(100):  # of log s: the slope of a convex function grows
        middle = (low + high) / 2
        rising = (powers * norms * (2 * powers * middle).exp()).sum(0) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return torch.where(bound, low.exp(), 1.0)


def balancing_basis(f: Factor, theta: Theta) -> Tensor:
    """The symmetric matrix [n, n] after which writers and readers have one Gram matrix."""
    grams = [torch.zeros(f.size, f.size, dtype=torch.float64), torch.zeros(f.size, f.size).double()]
    for site in f.sites:
        x = rows(theta, site.place, site.offset)
        grams[site.power < 0] = grams[site.power < 0].to(x) + x @ x.T
    writes, reads = grams
    if not (bool(writes.any()) and bool(reads.any())):
        return torch.eye(f.size).to(writes)
    root, inverse = powered(writes, 0.5), powered(writes, -0.5)
    return powered(inverse @ powered(root @ reads @ root, 0.5) @ inverse, 0.5)


def powered(gram: Tensor, power: float) -> Tensor:
    """The power of a symmetric, positive matrix [n, n]; missing directions count little."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    found: Tensor = vectors * values.clamp(min=1e-12 * float(values.max())) ** power @ vectors.T
    return found


# Spaces, in the order in which they become known


class Space(NamedTuple):
    """Units of one space; group: of their permutations, or ""; factors by name."""

    group: str
    places: tuple[tuple[Place, float], ...]  # with offsets
    factors: dict[str, Factor]

    @property
    def mixing(self) -> tuple[str, Factor] | None:
        """What mixes the units, if anything does."""
        return next(((n, f) for n, f in self.factors.items() if f.mixes), None)


class Step(NamedTuple):
    """What is solved at once: spaces; or blocks of spaces and, in `group`, their permutations."""

    group: str
    blocks: tuple[tuple[Space, ...], ...]

    @property
    def names(self) -> set[str]:
        """The parameters on which it acts."""
        return {p.name for block in self.blocks for space in block for p, _ in space.places}


def steps(bases: Bases) -> Iterator[Step]:
    """All that is to be solved."""
    groups = bases.permutations.groups
    by_space: dict[str, dict[str, Factor]] = {}
    for name, f in bases.factors.items():
        by_space.setdefault(f.space, {})[name] = f

    def spaces_of(name: str) -> list[Space]:
        """What mixes units by itself, for other factors may act on other slots of a head."""
        factors = by_space.pop(name, {})
        mixing = {n: f for n, f in factors.items() if f.mixes}
        others = {n: f for n, f in factors.items() if not f.mixes}
        found = [Space("", at_sites({n: f}), {n: f}) for n, f in mixing.items()]
        group = name if name in groups and not mixing else ""
        if group or others:
            places = [(p, 0.0) for p in groups[name].places] if group else at_sites(others)
            found.append(Space(group, tuple(places), others))
        return found

    def alone(name: str) -> Space:
        """Blocks, such as query heads, in an order of their own: with all that moves with them."""
        return Space(name, tuple((p, 0.0) for p in groups[name].places), {})

    outer = outermost(bases.permutations)
    for name, g in outer.items():
        blocks = []
        for block, rest in zip(g.inner, heads(bases.permutations, g, lambda j, d: j), strict=True):
            spaces = [s for n in block if not groups[n].inner for s in spaces_of(n)]
            own = [n for n in by_space if n not in groups and inside(by_space[n], rest)]
            spaces += [s for n in own for s in spaces_of(n)] or (
                [Space("", tuple((p, 0.0) for p in rest), {})] * bool(rest)
            )
            blocks.append(tuple(spaces))
        within = [alone(n) for block in g.inner for n in block if groups[n].inner]
        if any(s.group or s.factors for block in blocks for s in block):
            yield Step(name, tuple(blocks))
        else:
            within = [alone(name)]
        if within:
            yield Step("", tuple((s,) for s in within))
    inner = {n for g in groups.values() for block in g.inner for n in block}
    for name in [n for n in groups if not groups[n].inner and n not in inner] + [*by_space]:
        if name in by_space or name in groups:
            yield Step("", tuple((s,) for s in spaces_of(name)))


def at_sites(factors: dict[str, Factor]) -> tuple[tuple[Place, float], ...]:
    """Where factors act, with offsets."""
    return tuple((s.place, s.offset) for f in factors.values() for s in f.sites)


def inside(factors: dict[str, Factor], places: Sequence[Place]) -> bool:
    """Whether factors act on entries of these places alone."""
    held = {(p.name, p.axes, i) for p in places for i in p.index.flatten().tolist()}
    return all(
        (s.place.name, s.place.axes, i) in held
        for f in factors.values()
        for s in f.sites
        for i in s.place.index.flatten().tolist()
    )


class Search:
    """Two networks in one gauge, and what brings B to A, one step after another."""

    def __init__(self, bases: Bases, end_a: Theta, end_b: Theta) -> None:
        self.bases, self.sym, self.a, self.b = bases, bases.permutations, end_a, end_b
        self.steps = [*steps(bases)]
        self.known: set[int] = set()

    def run(self, rounds: int) -> Theta:
        """B after at most so many rounds."""
        names = sorted({n for step in self.steps for n in step.names})
        while len(self.known) < len(self.steps):
            k = max((k for k in range(len(self.steps)) if k not in self.known), key=self.share)
            self.solve(k, self.usable(k) if self.share(k) else lambda _: True)
            self.known.add(k)
        best = distance(self.a, self.b, names)
        for _ in range(rounds - 1):
            kept = self.b
            for k in range(len(self.steps)):
                self.solve(k, lambda _: True)
            now = distance(self.a, self.b, names)
            if not now < best * (1 - 1e-6):
                self.b = self.b if now < best else kept
                break
            best = now
        return self.b

    def usable(self, k: int) -> Usable:
        """Whether all other steps that act on a parameter have been solved."""
        others = {
            n for j, s in enumerate(self.steps) if j != k and j not in self.known for n in s.names
        }
        return lambda name: name not in others

    def share(self, k: int) -> float:
        """How much of what a step acts on can be used: from 0 to 1."""
        usable, step = self.usable(k), self.steps[k]
        sizes = {n: self.a[n].numel() for n in step.names}
        return sum(size for n, size in sizes.items() if usable(n)) / max(sum(sizes.values()), 1)

    def solve(self, k: int, usable: Usable) -> None:
        """Bring what step k acts on close to A."""
        step = self.steps[k]
        if step.group:
            score = [
                [
                    sum(self.gain(x, y, usable) for x, y in zip(one, two, strict=True))
                    for two in step.blocks
                ]
                for one in step.blocks
            ]
            self.b = self.sym.permute(self.b, {step.group: assign(torch.tensor(score).double())})
        for space in (space for block in step.blocks for space in block):
            if space.mixing:
                name, f = space.mixing
                matrix = procrustes(f, self.products(space, space, usable)[0].sum(0))
                self.b = self.bases.act(self.b, {name: matrix})
                continue
            if space.group:
                order = assign(self.scores(space, space, usable))
                self.b = self.sym.permute(self.b, {space.group: order})
            for name, f in space.factors.items():
                if f.kind == "signs":
                    self.b = self.bases.act(self.b, {name: self.signs(space, f, usable)})
                if f.kind == "phases":
                    angles = self.phases(f, f, usable).angle()
                    self.b = self.bases.act(self.b, {name: angles})

    def products(self, one: Space, two: Space, usable: Usable) -> tuple[Tensor, list[Place]]:
        """For each place of two alike spaces the products of A's units and B's: [places, n, n]."""
        found, places = [], []
        for (p, offset), (q, _) in zip(one.places, two.places, strict=True):
            if usable(p.name):
                found.append(rows(self.a, p, offset) @ rows(self.b, q, offset).T)
                places.append(p)
        n = len(one.places[0][0].index)
        return (torch.stack(found) if found else torch.zeros(1, n, n).double()), places

    def scores(self, one: Space, two: Space, usable: Usable) -> Tensor:
        """How well units go together [n, n], whatever their signs."""
        products, places = self.products(one, two, usable)
        total = torch.zeros_like(products[0])
        left = [*range(len(places))]
        for f in one.factors.values():
            if f.kind == "signs":
                odd = [k for k in left if any(same(places[k], s.place) for s in f.sites)]
                left = [k for k in left if k not in odd]
                total = total + products[odd].sum(0).abs()
        return total + products[left].sum(0)

    def gain(self, one: Space, two: Space, usable: Usable) -> float:
        """How well A's space and B's go together at best."""
        if one.mixing:
            _, f = one.mixing
            product = self.products(one, two, usable)[0].sum(0)
            return float((procrustes(f, product) * product).sum())
        for f, g in zip(one.factors.values(), two.factors.values(), strict=True):
            if f.kind == "phases":
                return float(self.phases(f, g, usable).abs().sum())
        score = self.scores(one, two, usable)
        order = assign(score) if one.group else torch.arange(len(score))
        return float(score.gather(1, order.to(score.device)[:, None]).sum())

    def signs(self, space: Space, f: Factor, usable: Usable) -> Tensor:
        """The signs [n] that bring B's units to A's."""
        agree = torch.zeros(f.size, dtype=torch.float64)
        for s in f.sites:
            if usable(s.place.name):
                one, two = (rows(end, s.place, s.offset) for end in (self.a, self.b))
                agree = agree.to(one) + (one * two).sum(1)
        return torch.where(agree < 0, -1.0, 1.0).double()

    def phases(self, f: Factor, g: Factor, usable: Usable) -> Tensor:
        """The complex products of A's units and B's [n]: how far, and how well, B's may turn."""
        total = torch.zeros(f.size, dtype=torch.complex128)
        for s, t in zip(f.sites, g.sites, strict=True):
            if usable(s.place.name):
                one, two = planes(self.a, s.place), planes(self.b, t.place)
                total = total.to(one) + (one * two.conj()).sum(1)
        return total


def planes(theta: Theta, place: Place) -> Tensor:
    """The pairs of slots of each unit as complex numbers: [units, numbers]."""
    flat = place.of(theta).movedim(place.axis, 0)
    x, y = flat[entries(place).to(flat.device)].unflatten(1, (-1, 2)).unbind(2)
    return torch.complex(x, y).flatten(1)


def same(p: Place, q: Place) -> bool:
    """Whether two places are one."""
    return (p.name, p.axes) == (q.name, q.axes) and np.array_equal(p.index, q.index)


def procrustes(f: Factor, product: Tensor) -> Tensor:
    """The orthogonal M [n, n] of a factor with the largest ⟨M, product⟩; product: A Bᵀ."""
    about_ones = f.kind == "rotations about 1"
    rest = beside_ones(f.size) if about_ones else torch.eye(f.size)
    rest = rest.to(product)
    u, _, v = torch.linalg.svd(rest.T @ product @ rest)
    found: Tensor = rest @ u @ v @ rest.T
    return found + 1 / f.size if about_ones else found


# By the loss on the line


class GroupStep(train.Step):
    """A step of Adam on logarithms of matrices and scales, and on matrices that are rounded.

    The loss is that on the line from A to B: at its middle, whatever t is drawn, or at this t if
    `how.along`.
    """

    def __init__(
        self,
        pair: Pair,
        bases: Bases,
        line: Curve,
        how: Learn,
        device: torch.device,
        loss: train.Loss,
    ) -> None:
        super().__init__(pair.net, line, slice(0, 0), how.recipe, device, loss=loss)
        self.bases, self.lr, self.along = bases, how.lr, how.along
        self.end = {n: x.to(device) for n, x in line.points[-1].items()}
        self.half = torch.full([2], 0.5).to(self.rows)
        self.logs = {
            n: torch.zeros_like(f.identity()).to(device).requires_grad_()
            for n, f in bases.factors.items()
            if f.kind != "signs"
        }
        spaces = [space for step in steps(bases) for block in step.blocks for space in block]
        self.matrices = {
            s.group: torch.eye(
                bases.permutations.groups[s.group].size, device=device
            ).requires_grad_()
            for s in spaces
            if s.group and how.permute
        }
        rates = [{"params": [*self.logs.values()]}, {"params": [*self.matrices.values()]}]
        self.adam = torch.optim.Adam([group for group in rates if group["params"]])
        for x in (*self.logs.values(), *self.matrices.values()):  # so that they can be restored
            moments = {n: torch.zeros_like(x.detach()) for n in ("exp_avg", "exp_avg_sq")}
            self.adam.state[x] = {"step": torch.zeros(()), **moments}
        self.names = [name for name, _ in pair.net.named_parameters()]

    def element(self) -> Element:
        """What the logarithms stand for."""
        return {n: exponential(self.bases.factors[n], x) for n, x in self.logs.items()}

    def __call__(self, x: Any, y: Any, weights: Tensor, lr: float) -> Tensor:
        """As `train.Step`."""
        rounded = {n: through(m) for n, m in self.matrices.items()}
        moved = self.bases.permutations.apply_matrices(self.end, rounded)
        moved = self.bases.act(moved, self.element())
        flat = torch.cat([moved[n].to(self.rows).flatten() for n in self.names])
        self.rows[-1].copy_(flat.detach())
        shares = weights if self.along else self.half  # of both ends
        loss, g = self.gradient(x, y, shares)
        leaves = [*self.logs.values(), *self.matrices.values()]
        slopes = torch.autograd.grad(flat, leaves, g * shares[-1], allow_unused=True)
        for leaf, slope in zip(leaves, slopes, strict=True):
            leaf.grad = slope
        for group in self.adam.param_groups:
            rounds = group["params"][0] in {*self.matrices.values()}
            group["lr"] = lr * ACTIONS["straight-through"].lr / self.lr if rounds else lr
        self.adam.step()
        return loss

    def state(self) -> dict[str, Tensor]:
        """As `train.Step`: the free numbers, and the moments of each."""
        free = {f"log.{n}": x for n, x in self.logs.items()}
        free |= {f"matrix.{n}": x for n, x in self.matrices.items()}
        found = super().state()
        for name, x in free.items():
            found[name] = x.detach()
            found |= {f"{name}.{moment}": y for moment, y in self.adam.state[x].items()}
        return found


def exponential(f: Factor, x: Tensor) -> Tensor:
    """The element of a group of which x is the logarithm (of phases: angles); differentiable."""
    if f.kind in ("scales", "phases"):
        return x.exp() if f.kind == "scales" else x
    about_ones = f.kind == "rotations about 1"
    turning = x if f.kind == "bases" else x - x.T
    if about_ones:
        rest = beside_ones(f.size).to(x)
        turning = rest @ (rest.T @ turning @ rest) @ rest.T  # which keeps the vector of ones
    found: Tensor = torch.linalg.matrix_exp(turning)
    return found


def learned(
    pair: Pair,
    bases: Bases,
    ends: tuple[Theta, Theta],
    images: Batches,
    how: Learn,
    loss: train.Loss,
    seed: int,
    checkpoint: Checkpoint | None,
) -> tuple[Theta, Sequence[float]]:
    """B after the descent, or as it was if the loss on the line has not become smaller."""
    device, (end_a, end_b) = images.device, ends
    near = like({n: x.to(device) for n, x in end_b.items()}, pair.theta_b)
    line = curves.line(like({n: x.to(device) for n, x in end_a.items()}, pair.theta_a), near)
    step = GroupStep(pair, bases, line, how, device, loss)
    if not (step.logs or step.matrices):
        return end_b, ()
    fit = train.run(step, line, Shown(images), seed, checkpoint)
    order = {n: doubly_stochastic.nearest(m.detach()).argmax(1) for n, m in step.matrices.items()}
    element = {n: x.detach() for n, x in step.element().items()}
    moved = bases.act(bases.permutations.permute(end_b, order), element)

    def on_the_line(end: Theta) -> float:
        moving = curves.line(line.points[0], like({n: x.to(device) for n, x in end.items()}, near))
        wanted, total = {"loss": evaluate.averaged(loss)}, 0.0
        for t in (0.25, 0.5, 0.75) if how.along else (0.5,):
            fresh = evaluate.batchnorm(pair.net, moving(t), images, batch_size=how.batch_size)
            found = evaluate.means(pair.net, fresh, images, wanted, batch_size=how.batch_size)
            total += found["loss"]
        return total

    return (moved if on_the_line(moved) < on_the_line(end_b) else end_b), fit.losses
