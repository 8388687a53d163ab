"""What the book's figures show: dots of each pair, the surface that is turned."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mcnotes.evaluate import Plane
from mcnotes.lab.figures import Surface, dots
from tools.browser import browser, program


@pytest.mark.parametrize("down", [False, True])
def test_dots_join_what_belongs_to_a_pair_in_the_order_of_the_rows(down: bool) -> None:
    rows = [("1–2", "weights", 0.5), ("1–2", "activations", 0.1)]
    rows += [("3–4", "weights", 0.7), ("3–4", "activations", 0.2)]
    frame = pd.DataFrame(rows, columns=["pair", "method", "barrier"])
    x, y = ("barrier", "method") if down else ("method", "barrier")
    figure, ax = plt.subplots()
    dots(ax, frame, y, x=x)
    values = [line.get_xdata() if down else line.get_ydata() for line in ax.lines]
    assert [list(v) for v in values if len(v)] == [[0.5, 0.1], [0.7, 0.2]]
    axis = ax.yaxis if down else ax.xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == ["weights", "activations"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1] or not down, "the first category is on top"
    plt.close(figure)


def surface() -> Surface:
    """A bowl over the plane, cut at 2; a line between two corners."""
    x, y = np.linspace(-1, 5, 7), np.linspace(-1, 3, 5)
    loss = 0.1 * ((x - 2) ** 2 + y[:, None] ** 2)
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [2.0, 2.0]])
    line = {"#0072B2": corners[:2]}
    names = {"A": "#000000", "B": "#D55E00", "C": "#0072B2"}
    return Surface(
        Plane(x, y, loss, loss, corners), line, names, "a bowl", label="loss (nats)", top=1.0
    )


def test_heights_are_the_losses_as_shares_of_the_top() -> None:
    data = surface().data
    assert np.array(data["z"]).shape == (5, 7)
    assert np.max(data["z"]) == 1, "0.1 · (9 + 9) is cut"
    assert [at[2] for _, _, at in data["names"]] == pytest.approx([0.4, 0.4, 0.4])
    assert [p[2] for p in data["lines"][0][1]] == pytest.approx([0.4, 0.4])
    assert data["ticks"]["z"][-1] == (1.0, "1")
    for place, word in data["ticks"]["x"]:
        assert place == pytest.approx((float(word) - 2) / 3, abs=1e-3), "of half the width"


@pytest.mark.skipif(program() is None, reason="needs Chromium")
def test_mouse_and_keys_turn_it(tmp_path: Path) -> None:
    page = f"<!doctype html><meta charset=utf-8>{surface()._repr_html_()}"
    (tmp_path / "page.html").write_text(page, "utf8")
    picture = "document.querySelector('svg').innerHTML"
    turn = "+document.querySelector('input').value"
    with browser(tmp_path / "profile") as p:
        p.open((tmp_path / "page.html").as_uri(), 390, 700)
        before, angle = p.run(picture), p.run(turn)
        assert before.count("<polygon") == 4 * 6
        p.mouse("mousePressed", (100, 150))
        p.mouse("mouseMoved", (140, 150))
        p.mouse("mouseReleased", (140, 150))
        assert p.run(turn) == angle - 20
        dragged = p.run(picture)
        assert dragged != before
        p.run("document.querySelector('input').focus()")
        p.key("ArrowRight")
        assert p.run(turn) == angle - 18
        assert p.run(picture) != dragged
        assert not p.errors
