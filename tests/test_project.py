"""What holds for the project as a whole: layers, size, set-up files, the form of a chapter."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kept
import pytest
import yaml

from book._ext.repository import repository_url
from mcnotes.lab import Experiment
from tools import book, chapters, counts, notebooks, presets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted({*(ROOT / "mcnotes").rglob("*.py")} - {ROOT / "mcnotes/__init__.py"})
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))

# From the ground up: a module imports only from those above it in this list. The last of a wing is
# its `__init__`, which stands for the wing.
ORDER = [
    "names",
    "checks",
    "display",
    "models",
    "curves",
    "calls",
    "attacks",
    "cache",
    "symmetry.permutations",
    "symmetry.units",
    "symmetry.copies",
    "symmetry.foreign",
    "symmetry.execute",
    "symmetry.trace",
    "symmetry.rules",
    "symmetry.groups",
    "symmetry.activations",
    "symmetry.find",
    "symmetry.rotary",
    "symmetry.exponents",
    "symmetry.bases",
    "symmetry",
    "data.augment",
    "data.sources",
    "data.tasks",
    "data.arrays",
    "data.folders",
    "data.loader",
    "data",
    "evaluate",
    "train",
    "checkpoints",
    "matching.pair",
    "matching.assignment",
    "matching.doubly_stochastic",
    "matching.weights",
    "matching.activations",
    "matching.cca",
    "matching.pam",
    "matching.frank_wolfe",
    "matching.polish",
    "matching.certificate",
    "matching.loss",
    "matching.bases",
    "matching.methods",
    "matching.many",
    "matching.repair",
    "matching.diagnose",
    "matching",
    "lab.parameters",
    "lab.frames",
    "lab.prose",
    "lab.experiment",
    "lab.results",
    "lab.figures",
    "lab.permuter",
    "lab",
    "prepare",
    "api",
    "__main__",
]
INNER = {
    "__main__",
    "display",
    "prepare",
    "symmetry.units",
    "symmetry.copies",
    "symmetry.foreign",
    "symmetry.execute",
    "symmetry.trace",
    "symmetry.rules",
    "symmetry.activations",
    "symmetry.rotary",
    "symmetry.exponents",
    "data.arrays",
    "names",
}
REPOSITORY_BYTES, NOTEBOOK_BYTES = 40_000_000, 1_000_000
CELL_LINES, WORDS, EXERCISES = 25, 600, range(3, 7)
FOLDED_LINES = {False: 100, True: 40}  # all helpers of a chapter; what draws a figure
SHOWN_LINES = 2500  # of code, in the whole book


def tracked() -> list[Path]:
    """The files of the repository; those that git would ignore are not among them."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]


def module_name(path: Path) -> str:
    """`matching.pam` for mcnotes/matching/pam.py, `matching` for mcnotes/matching/__init__.py."""
    return ".".join(path.relative_to(ROOT / "mcnotes").with_suffix("").parts).removesuffix(
        ".__init__"
    )


def imports(source: str, known: Iterable[str]) -> set[str]:
    """The modules of the package that `source` imports; known: their names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("mcnotes.") in known else str(node.module))
    return {name.removeprefix("mcnotes.") for name in found if name.startswith("mcnotes.")}


class TestPackage:
    def test_imports_are_found_in_every_form(self) -> None:
        source = (
            "import torch, mcnotes.curves\nfrom mcnotes import data, cache as c\n"
            "from mcnotes.train import Recipe\nfrom mcnotes.matching import pam, match\n"
        )
        known = {"curves", "data", "cache", "train", "matching", "matching.pam"}
        assert imports(source, known) == known

    def test_every_module_has_its_place(self) -> None:
        assert sorted(ORDER) == sorted(module_name(path) for path in PACKAGE)

    @pytest.mark.parametrize("path", PACKAGE, ids=module_name)
    def test_imports_run_downwards_only(self, path: Path) -> None:
        name = module_name(path)
        wrong = imports(path.read_text("utf8"), ORDER) - {*ORDER[: ORDER.index(name)]}
        assert not wrong, f"{name} imports {sorted(wrong)}, which stand above it in ORDER"

    def test_one_name_means_one_thing(self) -> None:
        """RULES are those of operators; what arguments may be is called ARGUMENTS."""
        modules = [importlib.import_module(f"mcnotes.{name}") for name in ORDER]
        rules = {id(m.RULES) for m in modules if hasattr(m, "RULES")}
        assert rules == {id(importlib.import_module("mcnotes.symmetry.rules").RULES)}

    def test_importing_the_package_does_no_work(self) -> None:
        """But for type checkers; what it loads when it is asked, tests/test_api.py tells."""
        tree = ast.parse((ROOT / "mcnotes/__init__.py").read_text("utf8"))
        whole = [node for node in tree.body if not isinstance(node, ast.If)]
        assert imports(ast.unparse(ast.Module(whole, [])), ORDER) == set()
        conditions = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
        assert conditions == ["TYPE_CHECKING"]

    def test_the_reference_lists_every_module_that_readers_call(self) -> None:
        (block,) = re.findall(r"```\{modules\}\n(.*?)```", (ROOT / "book/api.md").read_text(), re.S)
        assert set(block.split()) == {*ORDER} - INNER


class TestRepository:
    def test_it_stays_small(self) -> None:
        sizes = {path: path.stat().st_size for path in tracked()}
        largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
        assert sum(sizes.values()) < REPOSITORY_BYTES, largest

    def test_no_code_is_kept_from_the_formatter(self) -> None:
        """What looks bad when it is formatted is opened up until it reads from top to bottom."""
        code = [path for path in tracked() if path.suffix in (".py", ".ipynb")]
        kept = [p.name for p in code if re.search(r"# fmt: (skip|off)", p.read_text("utf8"))]
        assert not kept

    def test_no_file_holds_a_path_of_the_machine_it_was_made_on(self) -> None:
        pattern = re.compile(r"(?<![\w.:/+-])/(?:home|Users|root|tmp|work|private|mnt)/\w")
        image = re.compile(r'"image/\w+": "[^"]*"')  # base64 may spell anything
        for path in tracked():
            try:
                text = image.sub("", path.read_text("utf8"))
            except UnicodeDecodeError:
                continue
            found = pattern.search(text)
            assert not found, f"{path.name}: {text[found.start() : found.start() + 60]!r}"

    def test_conda_and_pip_install_the_same(self) -> None:
        environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
        *conda, pip = environment["dependencies"]
        metadata = project()
        assert environment["name"] == metadata["name"]
        assert f"python {metadata['requires-python']}" in conda
        (requirement,) = pip["pip"]
        extras = re.fullmatch(r"-e \.\[(.*)\]", requirement)
        assert extras, f"expected an editable install with extras, got {requirement!r}"
        assert set(extras[1].split(",")) == set(metadata["optional-dependencies"])
        named = {re.split(r"[ <>=]", name)[0] for name in conda} - {"python", "pip", "make"}
        assert not named, f"{named} are given in environment.yml and in pyproject.toml"

    def test_make_installs_every_group(self) -> None:
        (extras,) = re.findall(r"'\.\[(.*)\]'", (ROOT / "Makefile").read_text("utf8"))
        assert set(extras.split(",")) == set(project()["optional-dependencies"])

    def test_the_citation_names_this_version(self) -> None:
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
        metadata = project()
        assert str(citation["version"]) == metadata["version"]
        assert citation["license"] == metadata["license"]
        assert citation.get("repository-code", "") == metadata["urls"].get("Repository", "")

    def test_the_contents_list_every_chapter_once(self) -> None:
        assert chapters.chapters() == CHAPTERS
        assert CHAPTERS

    def test_the_book_shows_little_code(self) -> None:
        """A reader who never opens a folded cell meets at most so much of it."""
        shown = sum(counts.of(notebooks.read(path)).shown for path in CHAPTERS)
        assert shown <= SHOWN_LINES

    def test_every_work_cited_is_in_the_bibliography(self) -> None:
        known = re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text("utf8"), re.M)
        assert len(known) == len(set(known))
        texts = [*ROOT.glob("*.md"), *ROOT.glob("book/*.md"), *CHAPTERS]
        cited = {
            key.strip()
            for path in texts
            for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text("utf8"))
            for key in keys.split(",")
        }
        assert cited <= set(known), sorted(cited - set(known))


def test_what_a_kept_value_depends_on_is_found() -> None:
    source = "few = 2 * 100\ndef draw(lab):\n    return few + images\n"
    assert kept.unnamed(f"{source}lab.keep(draw)", {"images"}) == {"few"}
    assert kept.unnamed(f"{source}lab.keep(draw, few)", {"images"}) == set()
    further = f"images = lab.first(2000)\n{source}net = lab.keep(draw, few)"
    assert kept.unnamed(further, set()) == {"images"}


class TestReadme:
    @pytest.mark.parametrize("name", book.README_PICTURES)
    def test_its_pictures_are_those_that_the_chapters_drew(self, name: str) -> None:
        file = book.README_PICTURES[name]
        (chapter,) = (ROOT / "book").glob(f"{name.split('-')[1]}_*.ipynb")
        assert notebooks.figure(notebooks.read(chapter), name) == file.read_bytes()
        assert f"({file.relative_to(ROOT)})" in (ROOT / "README.md").read_text("utf8")

    def test_a_missing_figure_is_none(self) -> None:
        notebook = notebooks.read(ROOT / "book" / "04_neuron_alignment.ipynb")
        assert notebooks.figure(notebook, "fig-00-none") is None


class TestPresets:
    @pytest.mark.parametrize("name", presets.names())
    def test_every_name_is_a_parameter_of_every_chapter(self, name: str) -> None:
        assert chapters.check_all(CHAPTERS, name) == []

    def test_presets_of_one_chapter_fit_it(self) -> None:
        """A folder of presets is for the chapter whose name holds the folder's."""
        found = sorted(presets.FOLDER.glob("*/*.yaml"))
        assert found
        for path in found:
            name = f"{path.parent.name}/{path.stem}"
            theirs = [c for c in CHAPTERS if path.parent.name in c.stem]
            assert len(theirs) == 1, "a folder's name must fit one chapter"
            assert chapters.check_all(theirs, name) == []

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_laptop_is_what_the_chapters_do_by_themselves(self, path: Path) -> None:
        defaults = notebooks.parameters(notebooks.read(path))
        assert chapters.changed(presets.load("laptop"), defaults) == {}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
class TestChapters:
    def test_is_small_and_stored_in_normal_form_with_its_outputs(self, path: Path) -> None:
        assert path.stat().st_size < NOTEBOOK_BYTES
        stored = notebooks.read(path)
        normal = copy.deepcopy(stored)
        notebooks.normalise(normal)
        assert normal == stored, "run `make notebooks`"
        assert any(cell.outputs for cell in notebooks.code_cells(stored)), "run `make notebooks`"

    def test_starts_with_the_colab_set_up(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MCNOTES_REPO_URL", raising=False)
        first = notebooks.read(path).cells[0]
        expected = notebooks.setup_source(repository_url(ROOT))
        assert first.source == expected, "run `make notebooks`"
        assert notebooks.tags(first) == ["remove-cell"]

    def test_has_one_title_enough_prose_and_short_cells(self, path: Path) -> None:
        notebook = notebooks.read(path)
        prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        titles = [line for text in prose for line in text.splitlines() if line.startswith("# ")]
        assert len(titles) == 1, titles
        assert sum(len(text.split()) for text in prose) >= WORDS
        code = [c for c in notebooks.code_cells(notebook) if "parameters" not in notebooks.tags(c)]
        for cell in code:
            lines = cell.source.splitlines()
            most = FOLDED_LINES[bool(cell.outputs)] if counts.is_folded(cell) else CELL_LINES
            assert len(lines) <= most, f"a cell of {len(lines)} lines: {lines[0]}"
            defined = (ast.FunctionDef, ast.ClassDef)
            parts = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, defined)]
            long = [n.name for n in parts if (n.end_lineno or 0) - n.lineno >= CELL_LINES]
            assert not long, f"functions of more than {CELL_LINES} lines: {long}"

    def test_the_story_outweighs_the_code_and_pictures_the_tables(self, path: Path) -> None:
        found = counts.of(notebooks.read(path))
        assert found.words > found.characters / 5
        assert found.figures >= 2 * found.tables

    def test_the_key_of_a_kept_value_names_all_numbers_that_it_depends_on(self, path: Path) -> None:
        code = notebooks.code_cells(notebooks.read(path))
        named = {field.name for field in dataclasses.fields(Experiment)} | {"pairs"}  # as a and b
        assert kept.unnamed("\n".join(cell.source for cell in code), named) == set()

    def test_headline_numbers_are_compared_with_the_stored_ones(self, path: Path) -> None:
        """By nbval, in `make test`."""
        code = [cell.source for cell in notebooks.code_cells(notebooks.read(path))]
        assert any(source.startswith("# NBVAL_CHECK_OUTPUT") for source in code)

    def test_stored_outputs_hold_no_error_no_warning_and_no_address(self, path: Path) -> None:
        for cell in notebooks.code_cells(notebooks.read(path)):
            for output in cell.outputs:
                assert output.output_type != "error", output.get("evalue")
                assert output.get("name") != "stderr", output.text
                shown = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                assert not re.search(r"0x[0-9a-f]{6,}", shown), shown

    def test_every_figure_has_a_caption_and_alternative_text(self, path: Path) -> None:
        for cell in notebooks.code_cells(notebooks.read(path)):
            kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
            if "image/png" in kinds or "image/svg+xml" in kinds:
                settings = cell.metadata.get("mystnb", {})
                start = cell.source[:200]
                assert len(settings.get("image", {}).get("alt", "")) >= 20, start
                assert settings.get("figure", {}).get("caption"), start
                assert settings.get("figure", {}).get("name", "").startswith("fig-"), start
            page = "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
            for svg in re.findall(r"<svg[^>]*>", page):
                assert "aria-label" in svg or "aria-hidden" in svg, svg

    def test_every_exercise_has_its_solution(self, path: Path) -> None:
        cells = notebooks.read(path).cells
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        blocks = re.findall(r"^`{3,}\{exercise(?:-start)?\}(?:(?!^`{3,})[\s\S])*", prose, re.M)
        asked = [re.search(r":label: (\S+)", block) for block in blocks]
        labels = [found[1] for found in asked if found]
        solved = re.findall(r"^`{3,}\{solution(?:-start)?\} (\S+)", prose, re.M)
        assert len(labels) in EXERCISES
        assert labels == solved
        assert prose.count("{solution-start}") == prose.count("{solution-end}")
