"""What others get: the version, the files, a light import, the checks and the workflow."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

import mcnotes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


class TestVersion:
    def test_is_the_same_everywhere(self) -> None:
        written = SETTINGS["project"]["version"]
        assert mcnotes.__version__ == written, "install the package again: make setup"
        releases = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text("utf8"), re.M)
        assert releases[0] == written
        numbers = [tuple(map(int, release.split("."))) for release in releases]
        assert numbers == sorted(set(numbers), reverse=True)

    def test_each_entry_of_the_changelog_has_its_date_and_kinds(self) -> None:
        text = (ROOT / "CHANGELOG.md").read_text("utf8")
        for entry in re.split(r"^## ", text, flags=re.M)[1:]:
            heading, body = entry.split("\n", 1)
            found = re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", heading)
            assert heading == "[Unreleased]" or (found and date.fromisoformat(found[1])), heading
            kinds = re.findall(r"^### (.*)", body, re.M)
            assert kinds
            assert set(kinds) <= KINDS
            assert len(set(kinds)) == len(kinds)


class TestPackage:
    def test_every_file_is_installed(self) -> None:
        """Types (py.typed) and what is read at run time, in every package that holds some."""
        listed = SETTINGS["tool"]["setuptools"]["package-data"]
        files = [
            path for path in (ROOT / "mcnotes").rglob("*.*") if "__pycache__" not in path.parts
        ]
        for path in files:
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert path.suffix == ".py" or path.name in listed.get(package, []), path
        assert ROOT / "mcnotes/py.typed" in files

    def test_importing_it_is_no_work(self) -> None:
        code = (
            "import sys, time; start = time.process_time(); import mcnotes; "
            "print(time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
        )
        runs = [
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
            for _ in range(3)
        ]
        fields = [run.stdout.decode().split() for run in runs]
        assert {(torch, numpy) for _, torch, numpy in fields} == {("False", "False")}
        assert min(float(seconds) for seconds, *_ in fields) < 0.05

    def test_what_it_does_not_have_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'mcnotes' has no attribute 'algin'"):
            mcnotes.algin  # noqa: B018


class TestChecks:
    def test_before_a_commit_the_same_runs_as_in_make_check(self) -> None:
        repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf8"))["repos"]
        hooks = [hook["id"] for repo in repos for hook in repo["hooks"]]
        assert hooks == ["ruff-check", "ruff-format", "mypy"]
        (bound,) = (
            text.removeprefix("ruff>=")
            for text in SETTINGS["project"]["optional-dependencies"]["test"]
            if text.startswith("ruff>=")
        )
        assert repos[0]["rev"].startswith(f"v{bound}.")

    def test_the_quick_tests_are_there(self) -> None:
        makefile = (ROOT / "Makefile").read_text("utf8")
        (names,) = re.findall(r"QUICK := \$\(addprefix tests/test_, (.*)\)", makefile)
        missing = [name for name in names.split() if not (ROOT / f"tests/test_{name}").exists()]
        assert not missing

    def test_the_workflow_publishes_what_continuous_integration_built(self) -> None:
        workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text("utf8"))
        build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
        assert ".ci/run" in [step.get("run") for step in build["steps"]]
        (upload,) = (s for s in build["steps"] if "upload-pages-artifact" in s.get("uses", ""))
        assert upload["with"]["path"] == "_build/html"
        assert publish["needs"] == "build"
        assert upload["if"] == publish["if"] == "github.ref == 'refs/heads/main'"
        assert workflow["permissions"] == {"contents": "read"}
