"""Make the finished pages light: one small style sheet instead of the theme's thirteen.

The theme brings 0.5 MB of styles, 1.5 MB of icons as a script and 0.2 MB as a font, of which the
book uses a few per cent. After the build this module merges the style sheets and keeps the rules
whose classes and ids occur in a page or a script, cuts the icon fonts down to the icons that are
used, drops the icon script (the font draws the same icons) and lets no script block the page.

Without it a phone draws the first page much later (compare Lighthouse's mobile score). PurgeCSS
8.0.0 leaves about as much, but drops the outline of what has the keyboard's focus
(`:focus-visible`) and rules for attributes that only scripts set.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fontTools import subset

LINK = re.compile(r'<link[^>]*href="([^"]*?)_static/([^"?]+\.css)[^"]*"[^>]*>\n?')
PRELOAD = re.compile(r'<link rel="preload"[^>]*>\n?')  # the text comes first
SCRIPT = re.compile(r'<script(?: defer(?:="\w+")?)?([^>]*) src="([^"]+)"([^>]*)></script>\n?')
ICONS = "fontawesome"  # in the names of the script and of the fonts, in all versions of the theme
SEARCH = ("searchtools.js", "language_data.js", "searchindex.js")  # only the search page needs them
WIDTHS = re.compile(r'document\.querySelectorAll\(\["pre",[^\]]*\]\.join\(", "\)\)')
MENUS = re.compile(
    r"const \w=\w\.querySelectorAll\((\w)\);(for\(let\{target:(\w)\}=[^()]*\))"
    r"for\(const \w of \w\)if\(\w===\w\)return"
)
STRING = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''
URL = re.compile(rf"url\(({STRING}|[^)\"']*)\)")
IMAGE = re.compile(r'<img (?=[^>]*src="([^"]+\.png)")(?![^>]* (?:width|style|loading)=)')
TOKEN = re.compile(rf"{STRING}|{URL.pattern}|[{{}};]|[^{{}};\"'u]+|u")
SELECTOR = re.compile(r"(?:[^,()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))+")  # between commas


def blocks(css: str) -> Iterator[tuple[str, str | None]]:
    """The parts of a style sheet: (prelude, body), or (statement, None) for one without braces."""
    depth, prelude, body = 0, "", ""
    for token in (found[0] for found in TOKEN.finditer(css)):
        depth += (token == "{") - (token == "}")
        if token == "{" and depth == 1:
            continue
        if token == "}" and depth == 0:
            yield prelude.strip(), body
            prelude, body = "", ""
        elif token == ";" and depth == 0:
            yield prelude.strip(), None
            prelude = ""
        elif depth:
            body += token
        else:
            prelude += token


def used(selector: str, words: set[str]) -> bool:
    """Whether every class and id that `selector` asks for outside () and [] occurs in `words`."""
    plain, count = selector, 1
    while count:
        plain, count = re.subn(r"\([^()]*\)|\[[^\[\]]*\]", "", plain)
    names = re.findall(r"[.#]((?:\\.|[\w-])+)", plain)
    return all(name.replace("\\", "") in words for name in names)


def purge(css: str, words: set[str]) -> str:
    """The rules of `css` that can apply to a page made of `words`."""
    kept = []
    for prelude, body in blocks(css):
        if body is None:
            continue  # @charset; nothing else stands without braces
        if prelude.startswith(("@media", "@supports", "@layer", "@container")):
            body = purge(body, words)
        elif not prelude.startswith("@"):
            parts = SELECTOR.findall(prelude)
            prelude = ",".join(part.strip() for part in parts if used(part, words))
        if prelude and body.strip():
            kept.append(f"{prelude}{{{re.sub(chr(10) + ' *', '', body)}}}")
    return "\n".join(kept)


def load(static: Path, sheet: str) -> str:
    """A style sheet with what it imports, its addresses relative to the folder `static`."""
    folder = posixpath.dirname(sheet)

    def place(url: str) -> str:
        url = url.strip("\"'")
        outside = url.startswith(("data:", "#", "http"))
        return url if outside else posixpath.normpath(posixpath.join(folder, url))

    css = (static / sheet).read_text("utf8")
    imports = re.compile(r"@import (?:url\()?([^;)]+)\)?;")
    parts = imports.split(css)  # text, address, text, address, …, text
    parts[::2] = [URL.sub(lambda m: f"url({place(m[1])!r})", part) for part in parts[::2]]
    parts[1::2] = [load(static, place(address)) for address in parts[1::2]]
    return "".join(parts)


def merge(static: Path, sheets: list[str], words: set[str]) -> str:
    """One style sheet for the folder `static`, with the notices of those it is made of."""
    css = "\n".join(load(static, sheet) for sheet in sheets)
    notices = dict.fromkeys(re.findall(r"/\*!.*?\*/", css, re.DOTALL))
    return "\n".join([*notices, purge(re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL), words)])


def cut_icons(static: Path, css: str) -> str:
    """Replace the icon fonts by ones that hold only the icons `css` names, and refer to these."""
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it reports on every table
    icons = {int(code, 16) for code in re.findall(r"\\([0-9a-f]{2,4})\b", css)}
    icons |= {ord(char) for char in css if ord(char) > 127}
    for font in (static / "vendor" / ICONS).rglob("*.ttf"):
        small = font.with_suffix(".woff")
        options = subset.Options(flavor="woff", notdef_outline=True)
        opened = subset.load_font(str(font), options)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=icons)
        cutter.subset(opened)
        subset.save_font(opened, str(small), options)
        source = re.compile(rf"src:url\([^)]*{font.stem}\.[^;}}]*")
        css = source.sub(f"src:url('{small.relative_to(static)}') format('woff')", css)
        font.unlink()
        font.with_suffix(".woff2").unlink(missing_ok=True)
    return css


def lighten_page(html: str, name: str, style: str, options: str) -> str:
    """Refer to the one style sheet, and let no script hold up the page.

    options: the text of Sphinx's documentation_options.js, which scripts within the page read.
    """

    def script(found: re.Match[str]) -> str:
        source = found[2].split("?")[0]
        if ICONS in source or (source.endswith(SEARCH) and name != "search.html"):
            return ""
        if source.endswith("documentation_options.js"):
            return f"<script>{options.strip()}</script>\n"
        return f'<script defer{found[1]} src="{found[2]}"{found[3]}></script>\n'

    if not (first := LINK.search(html)):
        return html
    link = f'<link rel="stylesheet" href="{first[1]}_static/{style}" />\n'
    before, after = html[: first.start()], LINK.sub("", html[first.end() :])
    return SCRIPT.sub(script, PRELOAD.sub("", before + link + after))


def calm(script: str) -> str:
    """A script of the theme without what makes a living figure slow on a phone.

    To see which blocks of code scroll, the theme lays out the whole page when it opens and after
    every change: most of a second. book.js looks at what comes near the screen. And Bootstrap looks
    for all its menus in the page at every click, where one look at what was clicked will do.
    """
    return MENUS.sub(r"\2if(\3.matches?.(\1))return", WIDTHS.sub("[]", script))


def flat_code(html: str) -> str:
    """Code without the spans that Sphinx puts around each of its words and spaces.

    Nothing is styled by them, and on the API page they are two elements of five.
    """
    words = re.sub(r'<span class="pre">([^<]*)</span>', r"\1", html)
    return words.replace('<span class="w"> </span>', " ")


def lazy_images(html: str, folder: Path) -> str:
    """Let pictures load when they come into view, in a space of their size that is kept free."""

    def image(found: re.Match[str]) -> str:
        header = (folder / found[1]).read_bytes()[16:24]  # of a PNG: width and height
        width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
        return f'<img loading="lazy" width="{width}" height="{height}" '

    return IMAGE.sub(image, html)


def lighten(app: Any, exception: Exception | None) -> None:
    if exception or app.builder.name != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    pages = {path: path.read_text("utf8") for path in out.rglob("*.html")}
    for path in [path for path in static.rglob("*.js") if ICONS in path.as_posix()]:
        path.unlink()
    for path in (static / "scripts").glob("*.js"):
        path.write_text(calm(path.read_text("utf8")), "utf8")
    scripts = [path.read_text("utf8") for path in static.rglob("*.js")]
    words = {word for text in [*pages.values(), *scripts] for word in re.findall(r"[\w-]+", text)}
    links = [sheet for html in pages.values() for _, sheet in LINK.findall(html)]
    css = cut_icons(static, merge(static, list(dict.fromkeys(links)), words))
    (static / "site.css").write_text(css, "utf8")
    style = f"site.css?v={zlib.crc32(css.encode()):08x}"
    options = (static / "documentation_options.js").read_text("utf8")
    for path, html in pages.items():
        page = flat_code(lighten_page(html, path.name, style, options))
        path.write_text(lazy_images(page, path.parent), "utf8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", lighten, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
