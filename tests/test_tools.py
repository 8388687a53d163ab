"""The tools that build the book: notebooks as values, presets, runner, Sphinx extensions."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pydata_sphinx_theme
import pytest
import torch
from docutils import nodes
from docutils.core import publish_doctree
from myst_nb.sphinx_ import HideCodeCellNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from book._ext import fold, lighten, mathematics, pages, repository, signatures
from mcnotes import api, attacks, cache, calls, curves, matching, models, train
from mcnotes.curves import Curve
from mcnotes.evaluate import Score
from mcnotes.lab import Experiment
from tools import book, chapters, counts, notebooks, presets


def notebook(*sources: str, **parameters: object) -> Any:
    """A notebook with a parameters cell, a code cell per source, and some prose between."""
    literals = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cells = [new_code_cell(literals, metadata={"tags": ["parameters"]})]
    for source in sources:
        cells += [new_markdown_cell("Some prose."), new_code_cell(source)]
    return new_notebook(cells=cells)


class TestParameters:
    def test_are_read_with_their_values(self) -> None:
        made = notebook(seed=1, name="x", lr=0.1, widths=[8, 16], nothing=None)
        values = {"seed": 1, "name": "x", "lr": 0.1, "widths": [8, 16], "nothing": None}
        assert notebooks.parameters(made) == values

    def test_annotations_are_allowed(self) -> None:
        made = notebook()
        made.cells[0].source = "seed: int = 3"
        assert notebooks.parameters(made) == {"seed": 3}

    @pytest.mark.parametrize("line", ["import os", "seeds = range(3)", "a = b = 1", "seed: int"])
    def test_anything_but_literals_is_refused(self, line: str) -> None:
        made = notebook()
        made.cells[0].source = line
        with pytest.raises(ValueError, match=r"name = literal|malformed node"):
            notebooks.parameters(made)

    def test_a_missing_cell_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="expected one cell tagged `parameters`, found 0"):
            notebooks.parameters(new_notebook())


class TestPresets:
    def test_a_wrong_name_is_refused_with_the_closest_one(self) -> None:
        (fault,) = presets.check({"epoch": 3}, {"epochs": 12, "seed": 1})
        assert fault == "it has no parameter 'epoch'; did you mean 'epochs'?"

    def test_a_name_like_no_other_lists_what_there_is(self) -> None:
        (fault,) = presets.check({"zzz": 3}, {"epochs": 12, "seed": 1})
        assert fault.endswith("there are: epochs, seed")

    @pytest.mark.parametrize(("value", "default"), [("3", 3), (True, 1), ([1], 1)])
    def test_a_wrong_type_is_refused(self, value: object, default: object) -> None:
        (fault,) = presets.check({"x": value}, {"x": default})
        assert "is of type" in fault

    @pytest.mark.parametrize(("value", "default"), [(1, 0.1), (0.5, 8), ("a", "b"), (None, 3)])
    def test_a_fitting_value_is_accepted(self, value: object, default: object) -> None:
        assert presets.check({"x": value}, {"x": default}) == []

    def test_a_preset_is_a_file_of_the_folder_and_plain_yaml(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(presets, "FOLDER", tmp_path / "presets")
        (tmp_path / "presets" / "robust").mkdir(parents=True)
        for name in ("other", "presets/one", "presets/robust/two"):
            (tmp_path / f"{name}.yaml").write_text("seed: 1\n")
        assert presets.load("one") == presets.load("robust/two") == {"seed": 1}
        here = str(tmp_path / "presets" / "one")
        for name in ("../other", "robust/../one", "../presets/one", here, "./one", "one.yaml", ""):
            with pytest.raises(ValueError, match="no preset"):
                presets.load(name)
        for wrong in ("seed: 1\nseed: 2", "seed: [", "seed: !thing 1", "a: {b: 1, b: 2}"):
            (tmp_path / "presets" / "one.yaml").write_text(wrong)
            with pytest.raises(ValueError, match=r"one\.yaml: not plain YAML: .*"):
                presets.load("one")
        (tmp_path / "presets" / "one.yaml").write_text("a: &x {b: 1}\nc: {<<: *x, b: 2}")
        assert presets.load("one")["c"] == {"b": 2}, "what was merged may be changed"

    def test_an_unknown_preset_names_the_closest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(presets, "FOLDER", tmp_path)
        (tmp_path / "laptop.yaml").write_text("seed: 1\n")
        assert presets.load("laptop") == {"seed": 1}
        with pytest.raises(ValueError, match="did you mean 'laptop'"):
            presets.load("labtop")
        (tmp_path / "list.yaml").write_text("- 1\n")
        with pytest.raises(ValueError, match="got a list, expected `name: value` lines"):
            presets.load("list")


class TestNormalise:
    def untidy(self) -> Any:
        made = notebook("print(1)", seed=1)
        cell = made.cells[2]
        cell.metadata = nbformat.from_dict(
            {"tags": ["hide-input"], "papermill": {"duration": 1.5}, "execution": {}}
        )
        cell.id = made.cells[1].id
        cell.execution_count = 17
        cell.outputs = [
            new_output("stream", name="stdout", text="1\n"),
            new_output("display_data", data={notebooks.WIDGET: {}, "text/plain": "0%"}),
            new_output("stream", name="stdout", text="2\n"),
            new_output("execute_result", data={"text/plain": "3"}, execution_count=17),
        ]
        made.metadata = nbformat.from_dict({"papermill": {"start": "now"}, "widgets": {}})
        return made

    def test_keeps_what_the_book_reads_and_nothing_else(self) -> None:
        made = self.untidy()
        notebooks.normalise(made)
        assert dict(made.metadata) == notebooks.METADATA
        cell = made.cells[2]
        assert dict(cell.metadata) == {"tags": ["hide-input"]}
        assert [output.get("text") for output in cell.outputs] == ["1\n2\n", None]
        assert cell.execution_count == cell.outputs[1].execution_count == 2
        assert len({cell.id for cell in made.cells}) == len(made.cells)
        nbformat.validate(made)

    def test_is_idempotent(self) -> None:
        made = self.untidy()
        notebooks.normalise(made)
        once = nbformat.writes(made)
        notebooks.normalise(made)
        assert nbformat.writes(made) == once

    def test_writing_the_same_again_leaves_the_file_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "n.ipynb"
        assert notebooks.write(path, notebook("1", seed=1))
        assert not notebooks.write(path, notebooks.read(path))

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "3", '{"cells": 3}', '{"cells": [], "nbformat": 4}', '{"table": {}}'],
    )
    def test_what_is_no_notebook_is_said_in_one_line(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "n.ipynb"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"n\.ipynb is no notebook: .+") as fault:
            notebooks.read(path)
        assert "\n" not in str(fault.value)


class TestOutputs:
    def test_the_digest_sees_code_and_only_code(self) -> None:
        made, same, other = notebook("a = 1"), notebook("a = 1"), notebook("a = 2")
        same.cells[1].source = "Other prose."
        same.cells[2].outputs = [new_output("stream", text="x")]
        notebooks.stamp(same, "https://example.org/a/b")
        same.cells.insert(2, new_code_cell("s = 2", metadata={"tags": ["injected-parameters"]}))
        assert notebooks.digest(made) == notebooks.digest(same) != notebooks.digest(other)

    def test_are_taken_over_past_injected_cells(self) -> None:
        made, ran = notebook("a", "b", seed=1), notebook("a", "b", seed=1)
        ran.cells.insert(1, new_code_cell("seed = 2", metadata={"tags": ["injected-parameters"]}))
        ran.cells[-1].outputs = [new_output("stream", text="x")]
        notebooks.take_outputs(made, ran)
        assert made.cells[-1].outputs == ran.cells[-1].outputs
        assert made.cells[2].outputs == []

    def test_of_other_code_are_refused(self) -> None:
        with pytest.raises(ValueError, match="differ in their code"):
            notebooks.take_outputs(notebook("a"), notebook("b"))


class TestColabCell:
    def test_is_put_in_once_and_brought_up_to_date(self) -> None:
        made = notebook("a")
        count = len(made.cells)
        notebooks.stamp(made, "")
        notebooks.stamp(made, "https://example.org/a/b")
        assert len(made.cells) == count + 1
        assert made.cells[0].source == notebooks.setup_source("https://example.org/a/b")
        assert made.cells[0].source.endswith('set_up_colab("https://example.org/a/b")')

    def test_elsewhere_does_nothing_and_leaves_no_variable(self) -> None:
        names: dict[str, Any] = {}
        exec(notebooks.setup_source(""), names)
        assert {name for name in names if not name.startswith("__")} == {"set_up_colab"}

    def test_without_an_address_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())  # type: ignore[misc]
        with pytest.raises(RuntimeError, match="address to clone into the last line"):
            exec(notebooks.setup_source(""), {})

    def test_clones_enters_and_installs_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())  # type: ignore[misc]
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(tmp_path)
        calls: list[list[str]] = []

        def run(command: list[str], check: bool) -> None:
            assert check
            calls.append(command)
            if command[0] == "git":
                (Path(command[-1]) / "mcnotes").mkdir(parents=True)

        monkeypatch.setattr(subprocess, "run", run)
        for _ in range(2):
            exec(notebooks.setup_source("https://example.org/a/b"), {})
        assert [call[0] for call in calls] == ["git", sys.executable, sys.executable]
        assert "https://example.org/a/b" in calls[0]
        assert (Path.cwd() / "mcnotes").is_dir()
        assert sys.path[0] == str(Path.cwd())


@pytest.fixture
def small_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book of two chapters, the first of which fails unless `seed` is 1."""
    (tmp_path / "book").mkdir()
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    monkeypatch.setattr(chapters, "EXECUTED", tmp_path / "executed")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    for name, seed in {"laptop": 1, "smoke": 2}.items():
        (tmp_path / f"{name}.yaml").write_text(f"seed: {seed}\n")
    (tmp_path / "_toc.yml").write_text(
        "parts:\n  - chapters:\n    - {file: book/01_first}\n    - {file: book/02_second}\n"
        "    - {file: book/prose}\n"
    )
    first = notebook("assert seed == 1, f'seed is {seed}'", seed=1)
    notebooks.write(tmp_path / "book" / "01_first.ipynb", first)
    notebooks.write(tmp_path / "book" / "02_second.ipynb", notebook("print(seed)", seed=1))
    return tmp_path


class TestRunner:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_runs_once_goes_on_after_a_failure_and_keeps_what_ran(
        self, small_book: Path, capsys: pytest.CaptureFixture[str], jobs: int
    ) -> None:
        paths = chapters.chapters(small_book)
        assert [path.stem for path in paths] == ["01_first", "02_second"]

        failures = chapters.run(paths, "smoke", jobs=jobs)
        assert [failure.chapter for failure in failures] == ["01_first"]
        assert "code cell [3]: AssertionError: seed is 2" in failures[0].reason
        assert "assert seed == 1" in failures[0].reason
        assert "chapters: 1 passed, 1 failed" in capsys.readouterr().out

        second = notebooks.read(chapters.result_path(paths[1], "smoke"))
        assert second.cells[-1].outputs[0].text == "2\n"
        assert chapters.run(paths[1:], "smoke") == []
        assert "cached" in capsys.readouterr().out

        (small_book / "mcnotes").mkdir()
        (small_book / "mcnotes" / "new.py").write_text("")
        assert chapters.run(paths[1:], "laptop") == []
        assert "ran in" in capsys.readouterr().out

    @pytest.mark.parametrize("text", ["", "{", '{"cells": 3}', "[]"])
    def test_an_executed_copy_that_cannot_be_read_is_made_again(
        self, small_book: Path, capsys: pytest.CaptureFixture[str], text: str
    ) -> None:
        """A kill, or a full disk, may have left a part of it."""
        copy = chapters.result_path(small_book / "book" / "02_second.ipynb", "smoke")
        copy.parent.mkdir(parents=True)
        copy.write_text(text)
        assert not chapters.is_of(copy, "a stamp")
        if not text:  # one kernel shows it
            assert chapters.run(chapters.chapters(small_book)[1:], "smoke") == []
            assert notebooks.read(copy).cells[-1].outputs[0].text == "2\n"

    def test_folders_of_the_environment_do_not_depend_on_where_a_notebook_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MCNOTES_STORE", "mine/store")
        monkeypatch.setenv("MCNOTES_ZOO", str(tmp_path / "zoo"))
        monkeypatch.delenv("MCNOTES_DATA", raising=False)
        chapters.settle_folders()
        assert cache.folder() == tmp_path / "mine" / "store"
        assert cache.zoo() == tmp_path / "zoo"
        assert "MCNOTES_DATA" not in os.environ

    def test_the_key_depends_on_package_and_data_but_not_on_caches(self, small_book: Path) -> None:
        keys = [chapters.inputs()]
        for folder in ("mcnotes", "data", "data/zoo", "data/store", "data/downloads"):
            (small_book / folder).mkdir()
        for file in ("mcnotes/a.py", "data/images.npz", "data/zoo/a.json"):
            (small_book / file).write_text("x")
            keys.append(chapters.inputs())
        assert len(set(keys)) == 4
        for file in ("data/store/a.json", "data/downloads/a.npz", "data/zoo/a.checkpoint"):
            (small_book / file).write_text("x")
        assert chapters.inputs() == keys[-1]

    def test_every_tracked_file_of_package_and_data_is_in_the_key(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And so are those of subfolders to come."""
        monkeypatch.delenv("MCNOTES_DATA", raising=False)
        monkeypatch.delenv("MCNOTES_ZOO", raising=False)
        listing = ["git", "ls-files", "-z", "mcnotes", "data"]
        told = subprocess.run(listing, cwd=presets.ROOT, check=True, capture_output=True, text=True)
        tracked = {n for n in told.stdout.split("\0") if n and not n.endswith(".checkpoint")}
        assert {"data/paper.json", "mcnotes/lab/slider.html"} <= tracked
        tracked |= {"mcnotes/data/tasks.py", "mcnotes/store/locks/a.py", "data/results/a/b.json"}
        caches = {
            "data/store/a.json",
            "data/downloads/cifar10.npz",
            "data/zoo/a.checkpoint",
            "data/zoo/unfinished/a.safetensors.checkpoint",  # its number will be the same
            "data/zoo/locks/a.lock",
            "data/tiny-imagenet-200/train/a.JPEG",
            "mcnotes/__pycache__/a.pyc",
            "data/zoo/.a.json.3.part",
        }
        for file in tracked | caches:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("x")
        monkeypatch.setattr(chapters, "ROOT", tmp_path)
        seen: list[Path] = []
        monkeypatch.setattr(chapters, "digest", lambda _, files: seen.extend(files) or "")
        chapters.inputs()
        assert {path.relative_to(tmp_path).as_posix() for path in seen} == tracked

    def test_the_key_depends_on_other_folders_of_data(
        self,
        small_book: Path,
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("MCNOTES_DATA", "MCNOTES_ZOO"):
            keys, folder = [chapters.inputs()], tmp_path_factory.mktemp("elsewhere")
            monkeypatch.setenv(name, str(folder))
            for file in ("a.npz", "b.json"):
                (folder / file).write_text("x")
                keys.append(chapters.inputs())
            assert len(set(keys)) == 3

    @pytest.mark.parametrize("name", chapters.KERNELS)
    @pytest.mark.usefixtures("small_book")
    def test_the_key_depends_on_what_chooses_kernels(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What `make portable` has run as another processor, `make smoke` runs again."""
        before = chapters.inputs()
        monkeypatch.setenv(name, "another")
        assert chapters.inputs() != before

    def test_an_impossible_preset_stops_before_anything_runs(
        self, small_book: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(chapters, "run_one")
        (small_book / "smoke.yaml").write_text("seed: -1\n")
        failures = chapters.run(chapters.chapters(small_book), "smoke")
        assert len(failures) == 2
        assert all("seed: got -1, expected a whole number" in f.reason for f in failures)
        monkeypatch.setenv("MCNOTES_CELL_TIMEOUT", "soon")
        with pytest.raises(ValueError, match="MCNOTES_CELL_TIMEOUT: got 'soon'"):
            chapters.run(chapters.chapters(small_book), "laptop")

    def test_a_wrong_preset_stops_before_anything_runs(
        self, small_book: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(chapters, "run_one")
        (small_book / "smoke.yaml").write_text("sede: 1\n")
        failures = chapters.run(chapters.chapters(small_book), "smoke")
        assert [failure.chapter for failure in failures] == ["01_first", "02_second"]
        assert all("did you mean 'seed'?" in failure.reason for failure in failures)

    def test_an_unknown_chapter_is_an_error(
        self, small_book: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chapters, "chapters", lambda: [small_book / "book" / "01_first.ipynb"])
        assert len(chapters.select(["01"])) == len(chapters.select([])) == 1
        with pytest.raises(ValueError, match=r"no chapter matches \['99'\]; there are: .*01_first"):
            chapters.select(["99"])


class TestExtensions:
    def page(self, text: str) -> Any:
        return publish_doctree(
            f"Title\n=====\n\n{text}\n", settings_overrides={"doctitle_xform": False}
        )

    def project(self, folder: Path, urls: str) -> Path:
        (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\n{urls}\n')
        return folder

    def test_the_address_stands_in_pyproject_and_the_environment_wins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MCNOTES_REPO_URL", raising=False)
        assert repository.repository_url(self.project(tmp_path, "")) == ""
        root = self.project(tmp_path, '[project.urls]\nRepository = "https://example.org/a/b/"')
        assert repository.repository_url(root) == "https://example.org/a/b"
        monkeypatch.setenv("MCNOTES_REPO_URL", "https://example.org/c/d")
        assert repository.repository_url(root) == "https://example.org/c/d"

    @pytest.mark.parametrize("url", ["", "https://example.org/a/b"])
    def test_launch_buttons_come_with_the_address_only(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MCNOTES_REPO_URL", url)
        buttons = {"colab_url": "https://example.org"}
        config = SimpleNamespace(html_theme_options={"launch_buttons": buttons})
        repository.set_options(SimpleNamespace(confdir=self.project(tmp_path, "")), config)
        assert config.html_theme_options.get("repository_url", "") == url
        assert bool(config.html_theme_options["launch_buttons"]) == bool(url)

    def test_a_page_is_described_by_its_first_paragraph(self) -> None:
        text = "A path on which the loss stays low joins the two networks. " * 8
        tree = self.page(f"{text}\n\nMore text here.")
        found = pages.description(tree)
        assert found.startswith("A path on which the loss stays low")
        assert len(found) <= pages.LENGTH + 2
        assert found.endswith(" …")

    def test_tags_are_escaped_and_titles_lose_their_markup(self) -> None:
        context = {"title": '<span class="section-number">1. </span>Loss &amp; "line"'}
        tree = self.page('Where a < b, the loss is "low" enough for the curve.')
        pages.add_tags(SimpleNamespace(), "a", "page.html", context, tree)
        assert (
            '<meta property="og:title" content="1. Loss &amp; &quot;line&quot;" />'
            in (context["metatags"])
        )
        assert "a &lt; b" in context["metatags"]

    def test_a_formula_keeps_its_full_stop_and_a_number_its_spread(self) -> None:
        long = " + ".join("abcdefghijk")
        table = "===== =\n1 ± 2 b\n===== =\n"
        tree = self.page(f"Of :math:`x = y`. And :math:`z`, not :math:`{long}`, 1 ± 2.\n\n{table}")
        before = tree.astext()
        pages.keep_together(None, tree, "a")
        whole = list(tree.findall(nodes.inline))
        assert [node.astext() for node in whole] == ["x = y.", "z,"]
        assert all(node["classes"] == ["together"] for node in whole)
        entry, _ = tree.findall(nodes.entry)
        assert entry.astext() == "1 ±\xa02"
        assert tree.astext().replace("\xa0", " ") == before

    def test_folded_code_stands_below_what_it_gives_and_neighbours_share_one_line(self) -> None:
        def cell(code: str, *shown: str) -> nodes.container:
            folded = HideCodeCellNode("", nodes.literal_block(code, code))
            texts = [nodes.paragraph(text, text) for text in shown]
            return nodes.container("", folded, *texts, nb_element="cell_code")

        tree = publish_doctree("")
        tree += [cell("parameters"), cell("helpers"), cell("draw", "picture"), cell("a")]
        tree += [nodes.paragraph("", "text"), cell("b"), cell("c")]
        fold.rearrange(None, tree, "a")
        first, alone, _, last = tree.children
        assert [part.astext() for part in first.children] == [
            "picture",
            "parameters\n\nhelpers\n\ndraw",
        ]
        assert [alone.astext(), last.astext()] == ["a", "b\n\nc"]

    def test_the_mark_of_nbval_is_not_shown(self) -> None:
        code = "# NBVAL_CHECK_OUTPUT\nprint(1)\n# NBVAL_CHECK_OUTPUT\n"
        marked, plain = (nodes.literal_block(text, text) for text in (code, "print(2)"))
        marked["language"] = "python"
        tree = publish_doctree("")
        tree += [marked, plain]
        fold.drop_marks(None, tree, "a")
        assert marked.astext() == "print(1)\n# NBVAL_CHECK_OUTPUT\n", "only where it is a mark"
        assert plain.astext() == "print(2)"
        assert marked.rawsource == marked.astext(), "Sphinx highlights no other"
        assert marked["language"] == "python"

    def test_an_id_stands_once_and_no_header_is_empty(self) -> None:
        tree = self.page(".. note:: One.\n\n.. note:: Two.")
        for node in tree.findall(nodes.note):
            node["ids"] = ["proof"]
        pages.drop_repeated_ids(None, tree, "a")
        assert not any(node["ids"] for node in tree.findall(nodes.note))
        page = '<p id="a">id="b"</p><th class="head"><p>x</p></th><i class="x" id="b"></i>'
        assert pages.faults(page) == []
        assert pages.faults(page + '<br id="a"/><th class="head"><p> </p></th>') == [
            "2 elements have the id 'a'",
            "1 headers of tables are empty",
        ]

    def test_a_list_of_modules_becomes_sections(self) -> None:
        source = ["Before.\n\n```{modules}\ncurves\nperms\n```\n"]
        pages.list_modules(None, "api", source)
        assert source[0].startswith("Before.\n\n## `mcnotes.curves`")
        assert source[0].count(".. automodule:: mcnotes.") == 2

    def test_other_projects_docstrings_stay_out(self) -> None:
        for obj in (torch.nn.Linear, partial(torch.nn.init.zeros_), Score.loss):
            assert pages.skip_foreign(None, "class", "x", obj, False, None) is True
        for obj in (Experiment.task, Experiment.of, Curve, Curve.degree):
            assert pages.skip_foreign(None, "class", "x", obj, False, None) is None

    def test_formulas_render_without_a_script_and_faults_are_warnings(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        warnings: list[Any] = []
        monkeypatch.setattr(mathematics.logger, "warning", lambda *args, **_: warnings.append(args))
        rendered = mathematics.render(r"\argmin_P \E \norm{x - P y}^2")
        assert "<math" in rendered
        assert "katex-html" in rendered
        assert "katex-display" not in rendered
        assert "katex-display" in mathematics.render("x\n+ y", display=True)
        assert not warnings
        assert mathematics.render(r"\unknown{x}") == ""
        assert warnings[0][1] == r"\unknown{x}"
        mathematics.server().communicate()  # its input ends, so does it
        mathematics.server.cache_clear()


class TestSignatures:
    """The API page shows arguments as the source writes them."""

    @pytest.mark.parametrize(
        ("what", "obj", "expected"),
        [
            ("function", api.connect, "loss: Loss | None=None"),
            ("function", curves.line, "(a: Theta, b: Theta)"),
            ("method", Curve.gram, "(names: Collection[str] | None=None)"),
            ("class", Curve, "(points: tuple[Theta, ...], kind: Kind = 'bezier')"),
            ("class", Experiment, "pam_options: Mapping[str, Any] = dict()"),
            ("class", attacks.PGD, "(eps: float, steps: int = 5"),  # fields of its base
            ("class", models.MLP, "(num_classes: int=10, in_features"),  # with an own __init__
        ],
    )
    def test_names_of_types_and_defaults_stay(self, what: str, obj: Any, expected: str) -> None:
        found = signatures.as_written(None, what, "x", obj, None, "()", None)
        assert found is not None
        assert expected in found[0]

    def test_what_says_nothing_of_arguments_has_no_signature(self) -> None:
        found = signatures.as_written(None, "class", "x", calls.InputError, None, "()", None)
        assert found == ("", "")

    def test_results_lose_the_quotes_of_classes_further_down(self) -> None:
        found = signatures.as_written(None, "method", "x", Curve.with_points, None, "()", None)
        assert found == ("(points: Sequence[Theta])", "Curve")

    def test_tables_of_rules_are_left_out(self) -> None:
        for obj in (train.OPTIONS, api.ARGUMENTS):
            assert signatures.skip_rules(None, "data", "x", obj, False, None) is True
        for obj in (matching.METHODS, cache.VERSIONS, models.SIZED):
            assert signatures.skip_rules(None, "data", "x", obj, False, None) is None


class TestLighten:
    CSS = """/*! Notice. */
@charset "utf-8"; /* a comment with } in it */
:root { --x: "}"; }
.kept, .dropped > .kept { color: red; }
.dropped::after { content: "\\f00d"; }
a:is(h1, h2:not(.dropped)):hover .kept { margin: 0 }
.kept:not(.dropped) { background: url("data:image/svg+xml,rotate(45)") }
:focus-visible { outline: 1px }
html[data-set-by="script"] { top: 0 }
@media (max-width: 9px) { .dropped { top: 0 } .w\\.5 { top: 1px } }
@media print { .dropped { top: 0 } }
@keyframes turn { from { top: 0 } to { top: 1px } }
@font-face { font-family: F; src: url(fonts/f.woff2); }
"""

    def test_only_rules_that_no_page_can_use_are_dropped(self) -> None:
        kept = lighten.purge(re.sub(r"/\*.*?\*/", "", self.CSS), {"kept", "w", "w.5"})
        rules = dict(lighten.blocks(kept))
        assert list(rules) == [
            ":root",
            ".kept",
            "a:is(h1, h2:not(.dropped)):hover .kept",
            ".kept:not(.dropped)",
            ":focus-visible",
            'html[data-set-by="script"]',
            "@media (max-width: 9px)",
            "@keyframes turn",
            "@font-face",
        ]
        assert rules[":root"] == ' --x: "}"; '
        assert rules[".kept:not(.dropped)"] == (
            ' background: url("data:image/svg+xml,rotate(45)") '
        )
        assert ".w\\.5" in str(rules["@media (max-width: 9px)"])
        assert lighten.purge(kept, {"kept", "w", "w.5"}) == kept

    def test_sheets_are_merged_with_imports_notices_and_addresses(self, tmp_path: Path) -> None:
        (tmp_path / "styles").mkdir()
        (tmp_path / "styles" / "a.css").write_text('@import "../basic.css";\n' + self.CSS)
        (tmp_path / "basic.css").write_text("p { background: url(basic.png) }")
        merged = lighten.merge(tmp_path, ["styles/a.css"], {"kept"})
        assert merged.startswith("/*! Notice. */\np{")
        assert "url('basic.png')" in merged
        assert "url('styles/fonts/f.woff2')" in merged
        assert "rotate(45)" in merged

    def test_a_page_gets_one_sheet_and_no_script_that_blocks(self) -> None:
        page = """<head>
<link href="../_static/styles/theme.css?digest=1" rel="stylesheet" />
<link rel="stylesheet" type="text/css" href="../_static/book.css?v=2" />
<link rel="preload" as="script" href="../_static/scripts/bootstrap.js?digest=1" />
<script defer src="../_static/scripts/fontawesome.js?digest=1"></script>
<script src="../_static/documentation_options.js?v=1"></script>
<script src="../_static/doctools.js?v=1"></script>
<script data-x="y" src="../_static/tabs.js"></script>
<script src="../searchindex.js"></script>
<script>let inline = 1;</script>
</head>"""
        found = lighten.lighten_page(page, "chapter.html", "site.css?v=3", "let o;\n")
        assert found.splitlines() == [
            "<head>",
            '<link rel="stylesheet" href="../_static/site.css?v=3" />',
            "<script>let o;</script>",
            '<script defer src="../_static/doctools.js?v=1"></script>',
            '<script defer data-x="y" src="../_static/tabs.js"></script>',
            "<script>let inline = 1;</script>",
            "</head>",
        ]
        assert "searchindex.js" in lighten.lighten_page(page, "search.html", "a.css", "")

    def test_code_keeps_its_words_and_loses_the_spans_around_them(self) -> None:
        page = '<code><span class="pre">a</span> <span class="n"><span class="pre">b</span></span>'
        found = lighten.flat_code(page + '<span class="p">:</span><span class="w"> </span>c</code>')
        assert found == '<code>a <span class="n">b</span><span class="p">:</span> c</code>'

    def test_the_theme_looks_at_no_more_than_it_must(self) -> None:
        """Its script is minified: a new version may have to be read again."""
        folder = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme/static"
        scripts = [path.read_text("utf8") for path in (folder / "scripts").glob("*.js")]
        heavy = "".join(scripts)
        calm = "".join(map(lighten.calm, scripts))
        for pattern in (lighten.WIDTHS, lighten.MENUS):
            assert len(pattern.findall(heavy)) == 1, pattern
            assert not pattern.search(calm), pattern
        assert re.search(r"for\(let\{target:r\}=s;[^()]*\)if\(r\.matches\?\.\(e\)\)return", calm)

    def test_pictures_load_when_they_come_into_view(self, tmp_path: Path) -> None:
        Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
        page = '<img alt="x" src="a.png" /><img src="a.png" width="9" /><img src="b.svg" />'
        assert lighten.lazy_images(page, tmp_path) == (
            '<img loading="lazy" width="30" height="20" alt="x" src="a.png" />'
            '<img src="a.png" width="9" /><img src="b.svg" />'
        )


class TestCounts:
    def test_what_is_shown_and_what_is_folded(self) -> None:
        table = new_output("display_data", {"text/markdown": "| a |\n| --- |\n| 1 |"})
        picture = new_output("display_data", {"image/png": ""})
        printed = new_output("stream", name="stdout", text="1")
        folded = new_code_cell("x = 1\n\ny = 2", metadata={"tags": ["hide-input"]})
        shown = new_code_cell("z = 3\nz", outputs=[table, picture, printed])
        made = new_notebook(cells=[new_markdown_cell("Two words, 3 $x$."), folded, shown])
        assert counts.of(made) == counts.Counts(
            shown=2, folded=2, words=2, characters=7, figures=1, tables=1, printed=1
        )

    def test_html_tables_count_and_other_html_does_not(self) -> None:
        frame = new_output("display_data", {"text/html": "<div><table><tr></tr></table></div>"})
        slider = new_output("display_data", {"text/html": "<div></div>"})
        made = new_notebook(cells=[new_code_cell("x", outputs=[frame, slider])])
        assert counts.of(made).tables == 1


class TestPictures:
    def picture(self) -> bytes:
        buffer = io.BytesIO()
        colours = Image.linear_gradient("L").resize((300, 200))
        Image.merge("RGB", (colours, colours.rotate(180), colours)).save(buffer, "png")
        return buffer.getvalue()

    def test_few_colours_look_the_same(self) -> None:
        whole = self.picture()
        with Image.open(io.BytesIO(notebooks.of_few_colours(whole))) as light:
            found = np.asarray(light.convert("RGB")).astype(int)
        with Image.open(io.BytesIO(whole)) as before:
            expected = np.asarray(before).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 16  # of 255

    def test_a_thumbnail_has_its_size(self) -> None:
        with Image.open(io.BytesIO(notebooks.thumbnail(self.picture()))) as small:
            assert small.size == (360, 216)

    def test_the_landing_page_has_a_card_for_each_chapter(self) -> None:
        paths = chapters.chapters()
        assert {path.name[:2] for path in paths} == book.CARDS.keys()
        for path in paths:
            assert notebooks.figure(notebooks.read(path), book.CARDS[path.name[:2]]), path.name
        (hero,) = (path for path in paths if path.name.startswith(book.HERO))
        assert notebooks.living_figure(notebooks.read(hero))


def test_a_kernel_that_dies_at_its_start_is_started_once_more() -> None:
    tries: list[str] = []

    def start(says: str, dead: int) -> int:
        tries.append(says)
        if len(tries) <= dead:
            raise RuntimeError(says)
        return 3

    died = "Kernel died before replying to kernel_info"
    assert chapters.once_more_if_dead_at_start(start, died, dead=1) == 3
    for says, dead, tried in ((died, 2, 2), ("Kernel died", 1, 1)):
        tries.clear()
        with pytest.raises(RuntimeError, match=says):
            chapters.once_more_if_dead_at_start(start, says, dead=dead)
        assert len(tries) == tried
