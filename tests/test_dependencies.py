"""What is imported is declared in pyproject.toml, and what is declared there is used."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mcnotes", "tools", "book", "tests", "benchmarks", "data")
OWN = {
    *FOLDERS,
    *(path.stem for name in ("tests", "benchmarks") for path in (ROOT / name).glob("*.py")),
}
PROVIDERS = packages_distributions()

# Imported, though not declared: by whom it is installed.
ELSEWHERE = {"rebasin": "benchmarks/peers.py, in environments of their own"}

# Declared, though no line imports it: by whom it is used.
NOT_IMPORTED = {
    "ipykernel": "papermill, nbval and Jupyter Book run the chapters in its kernel",
    "ipywidgets": "tqdm draws its bars with it in a notebook",
    "snakemake": "tools/batch.py starts the program",
    "snakemake-executor-plugin-slurm": "a plugin of snakemake, for experiments/profiles/slurm",
    "pytest-xdist": "a plugin of pytest: `-n` in the Makefile",
    "nbval": "a plugin of pytest: `--nbval-lax` in the Makefile",
    "axe-core-python": "tests/test_permuter.py reads the script in it",
    "expecttest": "PyTorch's list of samples, for tools/programs.py, imports it",
    "mypy": "the Makefile runs the program",
    "ruff": "the Makefile runs the program",
    "mcnotes": "the tests need what the book and full-scale runs need: mcnotes[…]",
}


def canonical(name: str) -> str:
    """A distribution's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    return {canonical(re.split(r"[^\w.-]", text)[0]) for text in requirements}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
CORE = declared(PROJECT["dependencies"])
EXTRA = {name: declared(texts) for name, texts in PROJECT["optional-dependencies"].items()}


def modules(source: str) -> set[str]:
    """Dotted names of all that is imported, wherever in `source` it is."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(path: Path) -> list[str]:
    """The Python in a file: all of it, a notebook's code cells, a Snakefile's imports."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return [cell.source for cell in cells if cell.cell_type == "code"]
    text = path.read_text("utf8")
    if path.name == "Snakefile":
        return re.findall(r"^(?:import|from) .+$", text, re.M)
    return [text]


def imported(paths: Iterable[Path]) -> set[str]:
    """Dotted names that these files import, and what the modules of tools/ do that they import."""
    found, waiting = set[str](), [*paths]
    seen = {*waiting}
    while waiting:
        new = {name for source in sources(waiting.pop()) for name in modules(source)}
        tools = {ROOT / "tools" / f"{n.split('.')[1]}.py" for n in new if n.startswith("tools.")}
        waiting += tools - seen
        found, seen = found | new, seen | tools
    return found


def distributions(names: Iterable[str]) -> set[str]:
    """The distributions that provide these modules; without Python's own and the project's."""
    found = set()
    for name in names:
        top = name.split(".")[0]
        if top in OWN or top in sys.stdlib_module_names:
            continue
        providers = {canonical(provider) for provider in PROVIDERS.get(top, [top])}
        if len(providers) > 1:  # a namespace, such as sphinxcontrib.bibtex
            providers &= {canonical("-".join(name.split(".")[:2]))}
        assert len(providers) == 1, f"no one distribution provides {name}: {providers}"
        found |= providers
    return found


def check(used: set[str], own: set[str], allowed: set[str]) -> None:
    missing, idle = used - own - allowed, own - used - NOT_IMPORTED.keys()
    assert not missing, f"imported, not declared in pyproject.toml: {sorted(missing)}"
    assert not idle, f"declared in pyproject.toml, not imported: {sorted(idle)}"


def test_the_package() -> None:
    """It says itself what to install for folders of transformers."""
    paths = {*(ROOT / "mcnotes").rglob("*.py")} - {ROOT / "mcnotes/__main__.py"}
    used = imported([*paths, *(ROOT / "data").glob("*.py")])
    check(distributions(used), CORE | EXTRA["transformers"], set())


def test_the_command() -> None:
    """It says itself what to install for a report."""
    check(distributions(imported([ROOT / "mcnotes/__main__.py"])), EXTRA["report"], CORE)


def test_the_book() -> None:
    """The chapters, the tools, and the extensions that `_config.yml` names."""
    paths = [*(ROOT / "book").glob("*.ipynb"), *(ROOT / "book/_ext").glob("*.py")]
    used = imported([*paths, ROOT / "tools/book.py", ROOT / "tools/colab_setup.py"])
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["sphinx"]
    used |= {*config["config"]["extensions"]} - config["local_extensions"].keys()
    check(distributions(used), EXTRA["book"], CORE)


def test_full_scale_runs() -> None:
    experiments = ROOT / "experiments"
    paths = [*experiments.glob("*.ipynb"), experiments / "Snakefile", ROOT / "tools/batch.py"]
    check(distributions(imported(paths)), EXTRA["batch"], CORE)


def test_tests_and_benchmarks() -> None:
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    used = distributions(imported(paths)) - ELSEWHERE.keys()
    others = ("book", "report", "batch", "transformers")
    check(used, EXTRA["test"], CORE.union(*(EXTRA[name] for name in others)))
    assert f"mcnotes[{','.join(others)}]" in PROJECT["optional-dependencies"]["test"]


def test_what_is_excused_is_declared() -> None:
    assert NOT_IMPORTED.keys() <= set[str]().union(*EXTRA.values())


def test_imports_are_found_wherever_they_are(tmp_path: Path) -> None:
    """In functions, in cells of code, under the name of another distribution, in a namespace."""
    cells = [new_markdown_cell("import seaborn"), new_code_cell("def f():\n    import yaml")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    (tmp_path / "b.py").write_text(
        "import os\nfrom PIL import Image\nfrom sphinxcontrib import bibtex"
    )
    names = imported([tmp_path / "a.ipynb", tmp_path / "b.py"])
    assert names == {"yaml", "os", "PIL.Image", "sphinxcontrib.bibtex"}
    assert distributions(names) == {"pyyaml", "pillow", "sphinxcontrib-bibtex"}
