"""Build the book: `python -m tools.book COMMAND`, usually through make.

book       run the chapters (what is cached is not run), then build the HTML
html       build the HTML from the outputs stored in the notebooks
notebooks  run the chapters, write normalised outputs back into the notebooks
run        only run the chapters, at any preset
katex      fetch the style sheet and fonts for formulas (once; part of `make setup`)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from book._ext.mathematics import fetch
from book._ext.repository import repository_url
from tools import chapters, notebooks, presets

ROOT = presets.ROOT
STAGE = ROOT / "_build" / "stage"
NEW = ROOT / "_build" / "new"
HTML = ROOT / "_build" / "html"
README_PICTURES = {  # of the README: a chapter's figure, and the file that shows it
    "fig-04-main": ROOT / "book" / "main-result.png",
    "fig-11-column": ROOT / "book" / "full-scale.png",
}
CARDS = {  # of the landing page: a chapter's number, and the figure that stands for it
    "01": "fig-01-planes",
    "02": "fig-02-plane",
    "03": "fig-03-plane",
    "04": "fig-04-matrices",
    "05": "fig-05-ladder",
    "06": "fig-06-along",
    "07": "fig-07-paths",
    "08": "fig-08-main",
    "09": "fig-09-width",
    "10": "fig-10-paths",
    "11": "fig-11-column",
    "12": "fig-12-shell",
    "13": "fig-13-left",
    "14": "fig-14-time",
}
HERO = "03"  # the chapter whose living figure the landing page shows
KEY = ROOT / "_build" / "html.key"  # what the pages were built from
SITE = ["_config.yml", "_toc.yml", "index.md", "pyproject.toml"]


def stage(ran: list[Path], preset: str) -> None:
    """Copy the book's sources to a separate folder, with the outputs of the chapters in `ran`."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "book", STAGE / "book", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SITE:
        shutil.copy(ROOT / name, STAGE)
    for path in ran:
        notebook = notebooks.read(path)
        notebooks.take_outputs(notebook, notebooks.read(chapters.result_path(path, preset)))
        notebooks.write(STAGE / path.relative_to(ROOT), notebook)
    landing_page()


def landing_page() -> None:
    """Extract what the landing page shows of the chapters' outputs, for the staged sources."""
    static = STAGE / "book" / "_static"
    (static / "cards").mkdir()
    for path in sorted((STAGE / "book").glob("*.ipynb")):
        number, notebook = path.name[:2], notebooks.read(path)
        if picture := notebooks.figure(notebook, CARDS.get(number, "")):
            (static / "cards" / f"{number}.png").write_bytes(notebooks.thumbnail(picture))
        if number == HERO and (living := notebooks.living_figure(notebook)):
            (static / "hero.html").write_text(living, "utf8")


def html(ran: list[Path], preset: str) -> int:
    """Build the pages unless they are up to date. Warnings are errors. Returns the exit status."""
    fetch()
    stage(ran, preset)
    sources = [path for path in STAGE.rglob("*") if path.is_file()]
    key = chapters.digest(ROOT, [*sources, *ROOT.glob("mcnotes/**/*.py")]) + repository_url(ROOT)
    if not ((HTML / "index.html").exists() and KEY.exists() and KEY.read_text() == key):
        if status := build():
            return status
        KEY.write_text(key)
    print(f"The book is at {HTML / 'index.html'}")
    return 0


def build() -> int:
    """Build the pages from scratch, from the staged sources, and return the exit status."""
    shutil.rmtree(NEW, ignore_errors=True)
    flags = ["--path-output", str(NEW), "-W", "-n", "--keep-going", "--quiet"]
    program = Path(sys.executable).with_name("jupyter-book")
    done = subprocess.run(
        [str(program), "build", str(STAGE), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print("\n".join(line for line in done.stdout.splitlines() if line.strip()))
    if (NEW / "_build" / "html").exists():  # the old pages stay readable until here
        KEY.unlink(missing_ok=True)
        shutil.rmtree(HTML, ignore_errors=True)
        (NEW / "_build" / "html").rename(HTML)
    shutil.rmtree(NEW, ignore_errors=True)
    return done.returncode


def write_back(paths: list[Path], preset: str) -> None:
    """Normalise the notebooks, with the outputs of the last run."""
    for path in paths:
        notebook = notebooks.read(path)
        notebooks.take_outputs(notebook, notebooks.read(chapters.result_path(path, preset)))
        notebooks.normalise(notebook)
        notebooks.lighten_pictures(notebook)
        print(f"{path.name}: {'written' if notebooks.write(path, notebook) else 'unchanged'}")
        for figure, file in README_PICTURES.items():
            if picture := notebooks.figure(notebook, figure):
                file.write_bytes(picture)


def stamp_all(paths: list[Path]) -> None:
    """Update the first cell of each notebook before it runs."""
    url = repository_url(ROOT)
    for path in paths:
        notebook = notebooks.read(path)
        notebooks.stamp(notebook, url)
        notebooks.write(path, notebook)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["book", "html", "notebooks", "run", "katex"])
    parser.add_argument("only", nargs="*", help="chapters to run, by a part of their name")
    parser.add_argument("--preset", default="laptop", help="a file of experiments/presets")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many run at a time"
    )
    parser.add_argument("--force", action="store_true", help="also run what is cached")
    return parser.parse_args()


def main(command: str, only: list[str], preset: str, force: bool, jobs: int) -> int:
    if command == "katex":
        return 0 if fetch() else 1
    if command == "html":
        return html([], preset)
    paths = chapters.select(only)
    if command == "notebooks":
        stamp_all(paths)
    if chapters.run(paths, preset, force, jobs):
        return 1
    if command == "notebooks":
        write_back(paths, preset)
    return html(paths, preset) if command == "book" else 0


if __name__ == "__main__":
    try:
        sys.exit(main(**vars(options())))
    except ValueError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        os._exit(130)  # the chapters' threads would wait for their kernels, which end with us
