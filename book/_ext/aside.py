"""Move the numbers of living figures out of the pages, into files that are loaded after the text.

A page is drawn when its HTML has come; a quarter of a megabyte of numbers in the midst of it keeps
the reader waiting. In notebooks they stay where they are, so that one file is the whole chapter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

NUMBERS = re.compile(r'<script>(window\["([\w-]+)"\]=.*?;)</script>', re.DOTALL)
LARGE = 100_000  # characters; less is not worth a request of its own


def move(page: Path, root: Path) -> None:
    """Replace each large block of numbers by a script of its own under _static."""
    text = page.read_text("utf8")
    up = "../" * len(page.parent.relative_to(root).parts)

    def moved(found: re.Match[str]) -> str:
        numbers, name = found.groups()
        if len(numbers) < LARGE:
            return found[0]
        (root / "_static" / f"{name}.js").write_text(numbers, "utf8")
        return f'<script defer src="{up}_static/{name}.js"></script>'

    light = NUMBERS.sub(moved, text)
    if light != text:
        page.write_text(light, "utf8")


def move_all(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        root = Path(app.outdir)
        for page in root.rglob("*.html"):
            move(page, root)


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", move_all, priority=900)  # after all others have done their work
    return {"parallel_read_safe": True, "parallel_write_safe": True}
