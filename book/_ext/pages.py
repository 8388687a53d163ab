"""What search engines and link previews read: a description of each page, taken from its text."""

from __future__ import annotations

from html import escape
from typing import Any

from docutils import nodes

LENGTH = 155  # what search engines show


def description(doctree: nodes.document) -> str:
    """The first paragraph of running text, cut at a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if isinstance(paragraph.parent, nodes.section) and len(text) > 40:
            return text if len(text) <= LENGTH else text[:LENGTH].rsplit(" ", 1)[0] + " …"
    return ""


def add_tags(
    app: Any,
    pagename: str,
    templatename: str,
    context: dict[str, Any],
    doctree: Any,
) -> None:
    """Add description and Open Graph tags, unless the page brings its own description."""
    text = (
        description(doctree)
        if doctree
        else f"{context.get('title', pagename)}: {app.config.project}"
    )
    if not text or 'name="description"' in context.get("metatags", ""):
        return
    tags = {
        "og:title": context.get("title", ""),
        "og:description": text,
        "og:type": "article",
    }
    lines = [f'<meta name="description" content="{escape(text)}" />']
    lines += [f'<meta property="{k}" content="{escape(nodes_text(v))}" />' for k, v in tags.items()]
    context["metatags"] = context.get("metatags", "") + "\n".join(lines)


def nodes_text(markup: str) -> str:
    """Titles come as HTML: drop the tags."""
    out, inside = [], False
    for char in markup:
        inside = char == "<" or (inside and char != ">")
        if not inside and char != ">":
            out.append(char)
    return "".join(out)


def drop_repeated_ids(app: Any, doctree: nodes.document, docname: str) -> None:
    """sphinx-exercise gives every exercise on a page the same id; nothing links to it."""
    for section in doctree.findall(nodes.section):
        if section["ids"] in (["exercise-content"], ["solution-content"]):
            section["ids"] = []


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-resolved", drop_repeated_ids)
    app.connect("html-page-context", add_tags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
