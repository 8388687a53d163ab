"""Count what each chapter consists of: `python -m tools.counts`.

It counts the lines of code that a reader sees and those that are folded or left out, the words of
text, the characters of shown code, figures, tables and printed outputs. The last row is the total.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, fields

from tools import chapters, notebooks

FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


@dataclass(frozen=True)
class Counts:
    """The counts of one chapter, or of several together."""

    shown: int = 0  # lines of code
    folded: int = 0  # lines of code that open with a click, or are left out
    words: int = 0
    characters: int = 0  # of shown code
    figures: int = 0
    tables: int = 0
    printed: int = 0  # cells whose output is printed text

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def lines(source: str) -> int:
    """The number of lines that are not blank."""
    return sum(bool(line.strip()) for line in source.splitlines())


def is_table(data: dict[str, str]) -> bool:
    """Is this output a table, of Markdown or of HTML?"""
    return "<table" in data.get("text/html", "") or data.get("text/markdown", "").startswith("|")


def is_folded(cell: notebooks.Notebook) -> bool:
    """Does a reader see the cell's code only after a click, or not at all?"""
    return bool(FOLDED & set(notebooks.tags(cell)))


def of_code(cell: notebooks.Notebook) -> Counts:
    folded = is_folded(cell)
    size = lines(cell.source)
    shown = [o.get("data", {}) for o in cell.outputs]
    return Counts(
        shown=0 if folded else size,
        folded=size if folded else 0,
        characters=0 if folded else len(cell.source),
        figures=sum("image/png" in data for data in shown),
        tables=sum(map(is_table, shown)),
        printed=any(o.output_type == "stream" for o in cell.outputs),
    )


def of(notebook: notebooks.Notebook) -> Counts:
    """The counts of a chapter with its outputs."""
    total = Counts()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            total += of_code(cell)
        else:
            total += Counts(words=len(re.findall(r"[^\W\d_]{2,}", cell.source)))
    return total


def main() -> None:
    names = [field.name for field in fields(Counts)]
    print(f"{'chapter':<28}" + "".join(f"{name:>11}" for name in names))
    book = Counts()
    for path in chapters.select([]):
        found = of(notebooks.read(path))
        book += found
        print(f"{path.stem:<28}" + "".join(f"{n:>11,}" for n in astuple(found)))
    print(f"{'the book':<28}" + "".join(f"{n:>11,}" for n in astuple(book)))


if __name__ == "__main__":
    main()
