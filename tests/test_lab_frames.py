"""Tidy frames of the book's results: units, labels, what is computed from them, and tables."""

import numpy as np
import pandas as pd
import pytest

from mcnotes import evaluate
from mcnotes.lab import frames


def path(top: float) -> evaluate.Profile:
    """Up by `top` in the middle of a path whose first half is three times as long as its second."""
    return evaluate.Profile(
        t=np.array([0.0, 0.5, 1.0]),
        arc=np.array([0.0, 3.0, 4.0]),
        loss=np.array([0.2, 0.3 + top, 0.4]),
        accuracy=np.array([0.9, 0.5, 0.7]),
    )


@pytest.fixture
def points() -> pd.DataFrame:
    found = [
        ({"pair": pair, "method": method, "shape": "bezier"}, path(top))
        for method, tops in (("unaligned", (1.0, 3.0)), ("pam-aligned", (0.5, 0.5)))
        for pair, top in zip(("1–2", "3–4"), tops, strict=True)
    ]
    return frames.points(found)


def test_a_row_for_each_point_with_labels_and_units(points: pd.DataFrame) -> None:
    assert list(points) == ["pair", "method", "shape", "t", "arc", "loss (nats)", "accuracy (%)"]
    assert len(points) == 4 * 3
    assert set(points["method"]) == {"unaligned", "PAM aligned"}
    assert set(points["shape"]) == {"Bézier curve"}
    assert points["accuracy (%)"].tolist()[:3] == [90, 50, 70]


def test_the_summary_is_that_of_the_profiles(points: pd.DataFrame) -> None:
    rows = frames.summary(points)
    assert list(rows) == ["pair", "method", "shape", "barrier (nats)", "Min (%)", "Avg (%)"]
    assert rows["barrier (nats)"].tolist() == pytest.approx([1, 3, 0.5, 0.5])
    assert rows["Min (%)"].tolist() == [50] * 4
    mean = (3 * (90 + 50) / 2 + (50 + 70) / 2) / 4  # over the arc length
    assert rows["Avg (%)"].tolist() == pytest.approx([mean] * 4)
    alone = frames.summary(points[["pair", *frames.MEASURED]][:3])  # one label, too
    assert alone["pair"].tolist() == ["1–2"]


def test_means_and_deviations_over_pairs(points: pd.DataFrame) -> None:
    rows = frames.over(frames.summary(points), ["method"], {"barrier (nats)": 1, "Min (%)": 0})
    assert rows["method"].tolist() == ["unaligned", "PAM aligned"]
    assert rows["barrier (nats)"].tolist() == ["2.0 ± 1.4", "0.5 ± 0.0"]
    assert rows["Min (%)"].tolist() == ["50 ± 0", "50 ± 0"]
    assert rows["Avg (%)"].tolist() == ["67.50 ± 0.00"] * 2


def test_numbers_stand_to_the_right_in_a_table() -> None:
    frame = pd.DataFrame({"net": ["a", "b2c"], "n": [1, 20], "x (%)": [0.123456, 2], "y": "1 ± 2"})
    lines = frames.table(frame, digits={"x (%)": 1}).data.splitlines()
    assert lines[0] == "| net | n | x (%) | y |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2:] == ["| a | 1 | 0.1 | 1 ± 2 |", "| b2c | 20 | 2.0 | 1 ± 2 |"]


def test_what_rounds_to_zero_has_no_sign() -> None:
    text = frames.table(["x", "y"], [[-0.004, frames.mean_std([-0.04, 0.0])]]).data
    assert "| 0.00 | 0.0 ± 0.0 |" in text
    assert "| -0.01 |" in frames.table(["x"], [[-0.006]]).data


def test_a_table_of_cells() -> None:
    lines = frames.table(["method", "barrier"], [["line", "–"], ["curve", 0.5]]).data.splitlines()
    assert lines == ["| method | barrier |", "| --- | ---: |", "| line | – |", "| curve | 0.50 |"]
