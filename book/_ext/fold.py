"""Let a page show what code gives before the code: folded code stands below its picture or text.

Code cells that are folded one after the other share one line to open them. So a chapter opens with
its question and its picture, and then there is one line for parameters, imports and helpers. The
mark by which nbval knows what to compare says nothing to a reader, and is left out.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode

MARK = "# NBVAL_CHECK_OUTPUT\n"


def fold_of(node: nodes.Node) -> HideCodeCellNode | None:
    """What hides the code of a cell; None if `node` is no cell, or its code is not folded."""
    is_cell = isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"
    first = node.children[0] if is_cell and node.children else None
    return first if isinstance(first, HideCodeCellNode) else None


def rearrange(app: Any, doctree: nodes.document, docname: str) -> None:
    """Join neighbours that are folded whole, and put folded code after what it gives."""
    before: nodes.Node | None = None
    for cell in list(doctree.findall(nodes.container)):
        if (fold := fold_of(cell)) is None:
            continue
        earlier = fold_of(before) if before is not None else None
        if earlier is not None and cell.previous_sibling() is before:
            fold[:0] = earlier.children
            before.parent.remove(before)
        has_output = len(cell.children) > 1
        if has_output:
            cell.remove(fold)
            cell.append(fold)
        before = None if has_output else cell


def drop_marks(app: Any, doctree: nodes.document, docname: str) -> None:
    """Leave nbval's mark out of the code that is shown."""
    for block in doctree.findall(nodes.literal_block):
        if (code := block.astext()).startswith(MARK):
            block.rawsource = code.removeprefix(MARK)  # the same text, else it is not highlighted
            block[:] = [nodes.Text(block.rawsource)]


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-resolved", rearrange)
    app.connect("doctree-resolved", drop_marks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
