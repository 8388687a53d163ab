"""The chapters in Colab: installing the package there changes nothing of what Colab brings."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_project import CHAPTERS, ROOT, tracked

from tools import notebooks

IPYTHON = "ipython==7.34.0"  # Colab's own code pins it
BROUGHT = ("torch", "torchvision", "numpy", "matplotlib", "scipy", "tqdm")
CELLS = 4  # set-up, parameters, imports, first figure

# What Colab does: cells run one after the other, in IPython, where there is a google.colab.
RUNNER = """
import json, sys, types
for name in ("google", "google.colab"):
    sys.modules[name] = types.ModuleType(name)
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for source in json.load(open(sys.argv[1])):
    shell.run_cell(source).raise_error()
import IPython
print("RAN", IPython.__version__, shell.user_ns["mcnotes"].__file__)
"""


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program away from this environment; what it prints is kept."""
    clean = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "MCNOTES_REPO_URL")}
    clean |= {"MPLBACKEND": "agg", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    clean["PIP_CONSTRAINT"] = os.devnull  # what this machine's pip is limited to, Colab's is not
    return subprocess.run(command, env=clean, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def with_requirements(names: tuple[str, ...]) -> dict[str, Distribution]:
    """These distributions of this environment and all that they need here."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        needed = waiting.pop()
        for extra in {"", *needed.extras} - {e for n, e in seen if n == needed.name}:
            seen.add((needed.name, extra))
            found[needed.name] = one = distribution(needed.name)
            further = map(Requirement, one.requires or ())
            waiting += [r for r in further if not r.marker or r.marker.evaluate({"extra": extra})]
    return found


def lend(distributions: dict[str, Distribution], folder: Path) -> None:
    """Links to these distributions in `folder`: outside of an environment, pip changes nothing."""
    folder.mkdir()
    for one in distributions.values():
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(one.locate_file(top))).resolve())


def versions(python: Path) -> dict[str, str]:
    done = run([python, "-m", "pip", "list", "--format=json"], check=True)
    return {entry["name"].lower(): entry["version"] for entry in json.loads(done.stdout)}


@pytest.fixture
def colab(tmp_path: Path) -> Path:
    """The Python of an environment that holds what Colab's does, as far as it matters here."""
    run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    lend(with_requirements(BROUGHT), tmp_path / "brought")
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "brought.pth").write_text(str(tmp_path / "brought"))
    run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools"])  # torch's is lent
    done = run([python, "-m", "pip", "install", "--quiet", IPYTHON])
    if done.returncode:
        pytest.skip(f"needs the package registry, which gave: {done.stderr.strip()[-200:]}")
    checked = run([python, "-m", "pip", "check"])
    assert checked.returncode == 0, checked.stdout  # else pip would repair it, by its own lights
    return python


@pytest.fixture
def repository(tmp_path: Path) -> str:
    """The address of a repository that holds the files as they are now, in one commit."""
    folder = tmp_path / "repository"
    for path in tracked():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        run([*git, *command], cwd=folder, check=True)
    return folder.as_uri()


@pytest.mark.slow
def test_a_chapter_starts_and_what_was_there_stays(
    colab: Path, repository: str, tmp_path: Path
) -> None:
    first = [cell.source for cell in notebooks.code_cells(notebooks.read(CHAPTERS[0]))]
    trees = (ast.parse(c.source) for p in CHAPTERS for c in notebooks.code_cells(notebooks.read(p)))
    nodes = (node for tree in trees for node in tree.body)
    imports = {ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)}
    cells = [notebooks.setup_source(repository), *first[1:CELLS]]
    cells += ["import mcnotes", "\n".join(sorted(imports))]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    (tmp_path / "runner.py").write_text(RUNNER)
    (tmp_path / "content").mkdir()

    before = versions(colab)
    assert before["ipython"] == "7.34.0"
    assert set(BROUGHT) <= before.keys()
    assert "mcnotes" not in before
    done = run([colab, tmp_path / "runner.py", tmp_path / "cells.json"], cwd=tmp_path / "content")
    after = versions(colab)
    assert {name: after.get(name) for name in before} == before, "Colab's packages were changed"
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"RAN 7.34.0 {tmp_path}/content/mcnotes-book/mcnotes/__init__.py" in done.stdout
    assert "mcnotes" in after
