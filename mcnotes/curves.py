"""Curves through parameter space: lines, Bézier curves, polygonal chains (chapter 2).

A point is a network's state, `Theta = dict[str, Tensor]`. Every curve here is linear in its control
points, r(t) = Σᵢ wᵢ(t) pᵢ with Σᵢ wᵢ = 1, so training and evaluation need only the weights w(t).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Literal

import torch
from torch import Tensor

from mcnotes import display
from mcnotes.checks import require, whole

Theta = dict[str, Tensor]
Kind = Literal["bezier", "chain"]


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve r: [0, 1] → parameters; r(0) is the first control point and r(1) the last.

    kind: "bezier" (Bernstein polynomials; degree 1 is the straight line, degree 0 one network) or
    "chain" (the polygon through the points, each segment taking an equal share of t). Raises
    ValueError unless all points have the same names, shapes and dtypes and lie on one device.
    """

    points: tuple[Theta, ...]
    kind: Kind = "bezier"

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("Curve: got no control point, expected at least one")
        if self.kind not in ("bezier", "chain"):
            raise ValueError(f"Curve: got kind {self.kind!r}, expected 'bezier' or 'chain'")
        for i, point in enumerate(self.points[1:], start=1):
            check_same_space(self.points[0], point, f"Curve: control point {i}")
        places = {str(x.device) for point in self.points for x in point.values()}
        if len(places) > 1 or "meta" in places:
            raise ValueError(f"Curve: the points lie on {sorted(places)}, expected one device")

    def __repr__(self) -> str:
        numbers = sum(x.numel() for x in self.points[0].values())
        return f"Curve({self.kind}, {len(self.points)} control points of {numbers:,} numbers)"

    def _repr_html_(self) -> str:
        names = [n for n, x in self.points[0].items() if x.is_floating_point()]
        apart = self.gram(names)
        distances = apart.diagonal().sqrt().tolist()
        rows = [
            {"control point": i, "distance from the first": distance}
            for i, distance in enumerate(distances)
        ]
        return display.described(self, display.table(rows))

    @property
    def degree(self) -> int:
        """The number of control points minus one."""
        return len(self.points) - 1

    def weights(self, t: Tensor) -> Tensor:
        """The weights w(t) of the k control points, [..., k], at t [...] in [0, 1] of any shape."""
        n = self.degree
        if self.kind == "chain":  # hat functions
            knots = torch.arange(n + 1, dtype=t.dtype, device=t.device)
            return (1 - (t[..., None] * n - knots).abs()).clamp_min(0)
        bernstein = [comb(n, i) * (1 - t) ** (n - i) * t**i for i in range(n + 1)]
        return torch.stack(bernstein, dim=-1)

    def __call__(self, t: float) -> Theta:
        """The point r(t), exactly the ends at t = 0 and 1.

        Integer buffers are taken from the nearer end. Raises ValueError for t outside [0, 1].
        """
        if not isinstance(t, int | float) or not 0 <= t <= 1:
            raise ValueError(f"Curve: got t = {t!r:.200}, expected a number in [0, 1]")
        w = self.weights(torch.tensor(t, dtype=torch.float64)).tolist()
        return combine(self.points, w, 0 if t < 0.5 else -1)

    def with_points(self, points: Sequence[Theta]) -> "Curve":
        """A curve of the same kind with other control points."""
        return replace(self, points=tuple(points))

    def lengths(
        self, t: Tensor, names: Collection[str] | None = None, per_step: int = 64
    ) -> Tensor:
        """Arc length from r(t[0]) to each r(t[i]): float64 [n], beginning with 0.

        t: [n], increasing. names: the tensors that count; by default all of floating point. Each
        interval is divided into `per_step` chords, whose lengths ‖r(s) − r(t)‖² = Δwᵀ G Δw cost the
        same for any number of parameters.
        """
        t = t.to(torch.float64)
        steps = torch.linspace(0, 1, per_step + 1, dtype=torch.float64)[:-1]
        fine = torch.cat([(t[:-1, None] + t.diff()[:, None] * steps).flatten(), t[-1:]])
        dw = self.weights(fine).diff(dim=0)  # [m, k]
        chords = torch.einsum("mi,ij,mj->m", dw, self.gram(names), dw).clamp_min(0).sqrt()
        return torch.cat([torch.zeros(1, dtype=torch.float64), chords.cumsum(0)])[::per_step]

    def gram(self, names: Collection[str] | None = None) -> Tensor:
        """G[i, j] = ⟨pᵢ − p₀, pⱼ − p₀⟩ over the tensors `names`. Float64 [k, k], on the CPU."""
        gram = torch.zeros(len(self.points), len(self.points), dtype=torch.float64)
        for name in names or self.points[0]:
            if self.points[0][name].is_floating_point():
                rows = torch.stack([p[name].double().flatten() for p in self.points])
                rows -= rows[0].clone()
                gram += (rows @ rows.T).cpu()
        return gram


def combine(points: Sequence[Theta], weights: Sequence[float], near: int = 0) -> Theta:
    """The point Σᵢ wᵢ pᵢ, for points of one space and weights that sum to 1.

    A tensor that is the same in all points, such as a mask, is kept to the last bit. Integer
    buffers are taken from the point `near`.
    """
    used = [(w, p) for w, p in zip(weights, points, strict=True) if w != 0]
    mixed = {}
    for name, x in points[near].items():
        if not x.is_floating_point() or all(torch.equal(p[name], x) for _, p in used):
            mixed[name] = x.clone()
            continue
        (w, p), *others = used
        mixed[name] = p[name] * w
        for w, p in others:
            mixed[name].add_(p[name], alpha=w)
    return mixed


def line(a: Theta, b: Theta) -> Curve:
    """The straight line (1 − t) a + t b. Raises ValueError unless both are of one space."""
    return Curve((a, b))


def bezier(a: Theta, b: Theta, degree: int = 2) -> Curve:
    """A Bézier curve from a to b whose inner control points start on the line (paper, section 2).

    degree: at least 1; degree 1 is the line itself. Raises ValueError unless a and b are of one
    space.
    """
    require("bezier", {"degree": degree}, {"degree": whole(1)})
    return Curve(_on_line(a, b, degree))


def chain(a: Theta, b: Theta, bends: int = 1) -> Curve:
    """A polygonal chain from a to b whose bends start on the line (Garipov et al. 2018).

    bends: at least 0; without bends it is the line itself. Raises ValueError unless a and b are of
    one space.
    """
    require("chain", {"bends": bends}, {"bends": whole(0)})
    return Curve(_on_line(a, b, bends + 1), "chain")


def check_same_space(a: Theta, b: Theta, who: str) -> None:
    """Raise ValueError, naming the tensor, unless names, shapes and dtypes agree."""
    for state in (a, b):
        if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(f"{who}: got a {type(state).__name__}, expected tensors by name")
    if odd := sorted(a.keys() ^ b.keys()):
        raise ValueError(
            f"{who}: {odd[0]!r} is in one network only ({len(odd)} such names). "
            "Fix: take both from the same architecture"
        )
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"{who}: {name!r} is {tuple(y.shape)} {y.dtype}, expected {tuple(x.shape)} "
                f"{x.dtype}. Fix: build both networks with the same arguments"
            )


def views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of a flat vector [n] as tensors of these shapes, one after the other."""
    parts = torch.split(flat, [s.numel() for s in shapes])
    return [part.view(s) for part, s in zip(parts, shapes, strict=True)]


def _on_line(a: Theta, b: Theta, segments: int) -> tuple[Theta, ...]:
    return (a, *(line(a, b)(i / segments) for i in range(1, segments)), b)
