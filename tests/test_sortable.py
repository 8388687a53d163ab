"""The tables that a reader sorts by a column, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.browser import Page, browser, program

STATIC = Path(__file__).parents[1] / "book" / "_static"
SCRIPT, STYLE = STATIC / "sort.js", STATIC / "book.css"
HEADS = ["method", "barrier (nats)", "time (s)", "paper"]
ROWS = [
    ["weights", "0.796 ± 0.1", "10.5", ""],
    ["identity", "1.517", "2", "−0.3"],
    ["10 starts", "0.821", "2", "0.2"],
    ["activations", "0.906", "1e-15", "12"],
]

pytestmark = pytest.mark.skipif(program() is None, reason="needs Chromium")


def html(kind: str) -> str:
    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}><p>{cell}</p></{tag}>' for cell in cells)}</tr>"

    body = "".join(row(cells, "td") for cells in ROWS)
    table = f"<table><thead>{row(HEADS, 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div class="cell {kind}">{table}</div>'


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    head = f"<!doctype html><meta charset=utf-8><script defer src='{SCRIPT.as_uri()}'></script>"
    (tmp_path / "page.html").write_text(head + html("tag_sortable") + html("tag_table"), "utf8")
    with browser(tmp_path / "profile") as opened:
        opened.open((tmp_path / "page.html").as_uri(), 390, 700)
        yield opened
        assert not opened.errors


def column(page: Page, number: int) -> list[str]:
    cells = f"document.querySelectorAll('.tag_sortable td:nth-child({number + 1})')"
    return list(page.run(f"[...{cells}].map(cell => cell.textContent)"))


def state(page: Page) -> list[str | None]:
    heads = "document.querySelectorAll('.tag_sortable th')"
    return list(page.run(f"[...{heads}].map(head => head.getAttribute('aria-sort'))"))


def click(page: Page, number: int) -> None:
    at = page.centre(f".tag_sortable th:nth-child({number + 1}) button")
    page.mouse("mousePressed", at)
    page.mouse("mouseReleased", at)


def test_a_click_sorts_numbers_as_numbers_and_a_second_one_turns_the_order(page: Page) -> None:
    assert state(page) == [None] * 4
    click(page, 1)
    assert column(page, 1) == ["0.796 ± 0.1", "0.821", "0.906", "1.517"]
    assert column(page, 0) == ["weights", "10 starts", "activations", "identity"], "whole rows"
    assert state(page) == [None, "ascending", None, None]
    click(page, 1)
    assert column(page, 1) == ["1.517", "0.906", "0.821", "0.796 ± 0.1"]
    assert state(page) == [None, "descending", None, None]


def test_equal_rows_keep_their_order_and_blank_cells_stand_last(page: Page) -> None:
    click(page, 2)
    assert column(page, 2) == ["1e-15", "2", "2", "10.5"]
    assert column(page, 0)[1:3] == ["identity", "10 starts"]
    click(page, 3)
    assert column(page, 3) == ["−0.3", "0.2", "12", ""]
    assert state(page) == [None, None, None, "ascending"]
    click(page, 3)
    assert column(page, 3) == ["12", "0.2", "−0.3", ""]


def test_the_keyboard_sorts_and_words_stand_by_the_alphabet(page: Page) -> None:
    page.key("Tab")
    assert page.run("document.activeElement.textContent") == "method"
    page.key("Enter")
    assert column(page, 0) == ["10 starts", "activations", "identity", "weights"]
    assert page.run("document.activeElement.textContent") == "method", "the focus stays"


def test_other_tables_stay_as_they_are(page: Page) -> None:
    assert page.run("document.querySelectorAll('.tag_table button').length") == 0
    assert page.run("document.querySelectorAll('.tag_sortable button').length") == 4


def test_on_a_phone_a_row_becomes_a_list_with_the_names_of_its_columns(tmp_path: Path) -> None:
    head = f"<!doctype html><meta charset=utf-8><script defer src='{SCRIPT.as_uri()}'></script>"
    head += "<meta name=viewport content='width=device-width'>"
    head += f"<link rel=stylesheet href='{STYLE.as_uri()}'>"
    wide = html("tag_sortable tag_stacked").replace("0.821", "a long sentence of words " * 9)
    (tmp_path / "page.html").write_text(f"{head}<div class=bd-article>{wide}</div>", "utf8")
    lefts = "[...document.querySelectorAll('td')].map(cell => cell.getBoundingClientRect().left)"
    shown = "getComputedStyle(document.querySelectorAll('td')[1], '::before').content"
    with browser(tmp_path / "profile") as page:
        page.open((tmp_path / "page.html").as_uri(), 390, 700)
        assert len({*page.run(lefts)}) == 1, "one below the other"
        assert page.run(shown) == '"barrier (nats)"'
        click(page, 1)
        assert column(page, 1)[0] == "0.796 ± 0.1", "it still sorts"
        page.open((tmp_path / "page.html").as_uri(), 1440, 900)
        assert len({*page.run(lefts)}) == 4, "four columns where there is room"
        assert page.run(shown) == "none"
