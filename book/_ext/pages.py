"""What a page says of itself to search engines and link previews, and corrections to its text."""

from __future__ import annotations

import re
from collections import Counter
from html import escape, unescape
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)

LENGTH = 155  # what search engines show
WINGS = ("symmetry", "data", "matching", "lab")
SHORT = 30  # letters of LaTeX in a formula that need not be broken on a phone

REPEATED = (["exercise-content"], ["solution-content"], ["proof-content"], ["proof"])


def description(doctree: nodes.document) -> str:
    """The first paragraph of running text, cut at a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if isinstance(paragraph.parent, nodes.section) and len(text) > 40:
            return text if len(text) <= LENGTH else text[:LENGTH].rsplit(" ", 1)[0] + " …"
    return ""


def add_tags(app: Any, pagename: str, templatename: str, context: Any, doctree: Any) -> None:
    """Add description and Open Graph tags, unless the page brings its own description."""
    title = unescape(re.sub("<[^>]*>", "", context.get("title", pagename)))
    text = description(doctree) if doctree else f"{title}: {app.config.html_title}"
    if not text or 'name="description"' in context.get("metatags", ""):
        return
    tags = {"og:title": title, "og:description": text, "og:type": "article"}
    lines = [f'<meta name="description" content="{escape(text)}" />']
    lines += [f'<meta property="{name}" content="{escape(tags[name])}" />' for name in tags]
    context["metatags"] = context.get("metatags", "") + "\n".join(lines)


def drop_repeated_ids(app: Any, doctree: nodes.document, docname: str) -> None:
    """sphinx-exercise and sphinx-proof give many nodes of a page one id; nothing links to it."""
    for node in doctree.findall(nodes.Element):
        if node.get("ids") in REPEATED:
            node["ids"] = []


def faults(html: str) -> list[str]:
    """Ids that stand twice in a page, and headers of tables that say nothing."""
    ids = Counter(re.findall(r'<[^>]* id="([^"]+)"', html))
    found = [f"{count} elements have the id {name!r}" for name, count in ids.items() if count > 1]
    empty = len(re.findall(r"<th\b[^>]*>(?:\s|</?p>)*</th>", html))
    return found + [f"{empty} headers of tables are empty"] * bool(empty)


def check(app: Any, error: Exception | None) -> None:
    """Warn of faults in finished pages (an error under -W)."""
    if error or app.builder.name != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        for fault in faults(page.read_text("utf8")):
            logger.warning("%s: %s", page.relative_to(app.outdir), fault)


def keep_together(app: Any, doctree: nodes.document, docname: str) -> None:
    """A short formula and the sign after it stand on one line; 0.20 ± 0.02 may break before ±."""
    for formula in list(doctree.findall(nodes.math)):
        parent, i = formula.parent, formula.parent.index(formula)
        after = "".join(x for x in parent[i + 1 : i + 2] if isinstance(x, nodes.Text))
        rest = after.lstrip(".,;:!?)’")
        if rest != after and len(formula.astext()) <= SHORT:
            parent[i] = whole = nodes.inline(classes=["together"])
            whole += [formula, nodes.Text(after[: len(after) - len(rest)])]
            parent[i + 1] = nodes.Text(rest)
    for entry in doctree.findall(nodes.entry):
        for text in [text for text in entry.findall(nodes.Text) if " ± " in text]:
            text.parent.replace(text, nodes.Text(text.replace(" ± ", " ±\xa0")))


def list_modules(app: Any, docname: str, source: list[str]) -> None:
    """Expand a `{modules}` block, one name a line, into a section for each module."""

    def section(name: str) -> str:
        # What a wing re-exports stands under the module that defines it.
        members = "\n   :no-members:" if name in WINGS else ""
        directive = f".. automodule:: mcnotes.{name}{members}"
        return f"## `mcnotes.{name}`\n\n```{{eval-rst}}\n{directive}\n```\n"

    def sections(block: re.Match[str]) -> str:
        return "\n".join(map(section, block[1].split()))

    source[0] = re.sub(r"```\{modules\}\n(.*?)```", sections, source[0], flags=re.DOTALL)


def skip_foreign(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what brings another project's docstring: aliases, partials, fields of tuples."""
    inner = getattr(obj, "func", obj)  # of a cached property, or of a partial
    home = getattr(inner, "__module__", None) or type(inner).__module__
    return True if home.split(".")[0] not in ("mcnotes", "builtins") else None


def find_home(app: Any, env: Any, node: Any, text: Any) -> Any:
    """The link to what a wing re-exports leads to the module that defines it."""
    wing, name, *rest = [*node.get("reftarget", "").removeprefix("mcnotes.").split("."), "", ""]
    if node.get("refdomain") != "py" or wing not in WINGS:
        return None
    found = getattr(import_module(f"mcnotes.{wing}"), name, None)
    if not hasattr(found, "__qualname__"):
        return None
    target = ".".join([found.__module__, found.__qualname__, *filter(None, rest)])
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, text
    )


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", list_modules)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("missing-reference", find_home)
    app.connect("doctree-resolved", drop_repeated_ids)
    app.connect("doctree-resolved", keep_together)
    app.connect("html-page-context", add_tags)
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
