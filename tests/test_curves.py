"""Curves: exact ends, partition of unity, degree 1 is the line, arc length."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcnotes import curves
from mcnotes.curves import Curve, Theta


def network(seed: int) -> Theta:
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(4, 3, generator=g),
        "b": torch.randn(4, generator=g),
        "count": torch.tensor(seed),
    }


A, B, C = network(1), network(2), network(3)
EVERY = [
    curves.line(A, B),
    curves.bezier(A, B),
    curves.bezier(A, B, degree=5),
    curves.chain(A, B),
    curves.chain(A, B, bends=4),
    Curve((A, C, B)),
    Curve((A, C, B), "chain"),
]


@pytest.mark.parametrize("curve", EVERY)
def test_ends_are_exact(curve: Curve) -> None:
    for t, end in ((0.0, A), (1.0, B)):
        for name, x in curve(t).items():
            assert torch.equal(x, end[name])


@pytest.mark.parametrize("curve", EVERY)
@given(t=st.floats(0, 1))
def test_weights_sum_to_one(curve: Curve, t: float) -> None:
    w = curve.weights(torch.tensor(t, dtype=torch.float64))
    assert w.shape == (len(curve.points),)
    assert (w >= 0).all()
    assert abs(w.sum().item() - 1) < 1e-12


@given(t=st.floats(0, 1))
def test_degree_one_is_the_line(t: float) -> None:
    point = curves.bezier(A, B, degree=1)(t)
    for name in ("w", "b"):
        torch.testing.assert_close(point[name], (1 - t) * A[name] + t * B[name])


@pytest.mark.parametrize("curve", EVERY[1:5])
@given(t=st.floats(0, 1))
def test_fresh_curves_lie_on_the_line(curve: Curve, t: float) -> None:
    torch.testing.assert_close(curve(t)["w"], curves.line(A, B)(t)["w"])


def test_quadratic_bezier_formula() -> None:
    t = 0.3
    expected = (1 - t) ** 2 * A["w"] + 2 * t * (1 - t) * C["w"] + t**2 * B["w"]
    torch.testing.assert_close(Curve((A, C, B))(t)["w"], expected)


def test_chain_meets_its_bends() -> None:
    torch.testing.assert_close(Curve((A, C, B), "chain")(0.5)["w"], C["w"], rtol=0, atol=0)


def test_integers_come_from_the_nearer_end() -> None:
    assert curves.line(A, B)(0.4)["count"] == 1
    assert curves.line(A, B)(0.6)["count"] == 2


def test_nothing_given_is_changed_or_shared() -> None:
    before = {name: x.clone() for name, x in A.items()}
    for x in curves.line(A, B)(0.0).values():
        x.add_(1)
    assert all(torch.equal(A[name], x) for name, x in before.items())


def test_length_of_a_line_is_its_distance() -> None:
    t = torch.linspace(0, 1, 5)
    distance = math.sqrt(sum(((A[n].double() - B[n]) ** 2).sum() for n in ("w", "b")))
    lengths = curves.line(A, B).lengths(t)
    torch.testing.assert_close(lengths, t.double() * distance, rtol=1e-9, atol=1e-9)
    only = curves.line(A, B).lengths(t, names=["b"])[-1]
    torch.testing.assert_close(only, (A["b"].double() - B["b"]).norm(), rtol=1e-9, atol=0)


def test_length_of_a_chain_is_the_sum_of_its_segments() -> None:
    t = torch.linspace(0, 1, 7)
    parts = curves.line(A, C).lengths(t)[-1] + curves.line(C, B).lengths(t)[-1]
    torch.testing.assert_close(Curve((A, C, B), "chain").lengths(t)[-1], parts)


def test_length_of_a_parabola() -> None:
    # The corners (0, 0), (1, 1), (2, 0) give y = x − x²/2.
    corners = [{"p": torch.tensor(c)} for c in ([0.0, 0.0], [1.0, 1.0], [2.0, 0.0])]
    exact = math.sqrt(2) + math.asinh(1)  # ∫₀² √(1 + (1 − x)²) dx
    got = Curve(tuple(corners)).lengths(torch.tensor([0.0, 1.0]), per_step=2000)[-1].item()
    assert abs(got - exact) < 1e-6


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"w": A["w"], "b": A["b"]}, "'count' is in one network only"),
        (A | {"b": torch.zeros(5)}, r"'b' is \(5,\)"),
        (A | {"b": A["b"].double()}, "float64"),
    ],
)
def test_points_of_different_spaces(other: Theta, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        curves.line(A, other)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"t = 1\.2, expected a number in \[0, 1\]"):
        curves.line(A, B)(1.2)
    with pytest.raises(ValueError, match="no control point"):
        Curve(())
    with pytest.raises(ValueError, match="degree: got 0"):
        curves.bezier(A, B, degree=0)
    with pytest.raises(ValueError, match="kind 'spline'"):
        Curve((A, B), "spline")  # type: ignore[arg-type]


@pytest.mark.parametrize("t", ["0.5", None, [0.5], 1j, float("nan"), -0.1, 1.5])
def test_places_that_a_curve_does_not_have(t: Any) -> None:
    point = {"weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"Curve: got t = .*, expected a number in .0, 1."):
        curves.line(point, point)(t)
