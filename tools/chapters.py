"""Run the chapters; each is run again only if its result could differ.

Each executed notebook carries a key that identifies its inputs. Snakemake, which runs
`experiments/`, keeps keys in a folder of its own and takes a result without a key to be up to date.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import papermill
import yaml
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellTimeoutError

from mcnotes.__main__ import LATE
from tools import notebooks, presets

ROOT = presets.ROOT
EXECUTED = ROOT / "_build" / "executed"
CACHES = ("store", "downloads", "locks", "zoo/locks", "tiny-imagenet-200")  # in the data folder
UNFINISHED = (".checkpoint", ".part", ".broken")
FOLDERS = ("MCNOTES_DATA", "MCNOTES_STORE", "MCNOTES_ZOO")  # in the environment
KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OMP_NUM_THREADS")
ENVIRONMENT = {"TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}  # no bars, no times in stored outputs


class Failure(NamedTuple):
    """A chapter that failed: its name, and what went wrong where."""

    chapter: str
    reason: str


def chapters(root: Path = ROOT) -> list[Path]:
    """The notebooks that `_toc.yml` lists, in its order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    entries = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    paths = [root / f"{entry}.ipynb" for entry in entries]
    return [path for path in paths if path.exists()]


def select(only: list[str]) -> list[Path]:
    """The chapters whose names contain one of `only`, or all of them."""
    found = [path for path in chapters() if not only or any(word in path.stem for word in only)]
    if not found:
        raise ValueError(f"no chapter matches {only}; there are: {[p.stem for p in chapters()]}")
    return found


def digest(root: Path, files: Iterable[Path]) -> str:
    """Hash of the names and contents of `files`, and of the versions of Python and PyTorch."""
    state = hashlib.sha256(f"torch {version('torch')} python {sys.version}".encode())
    for path in sorted(files):
        state.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return state.hexdigest()


def inputs() -> str:
    """Hash of everything that a chapter's numbers depend on, except its code and parameters."""
    package, data = ROOT / "mcnotes", ROOT / "data"
    state = digest(ROOT, [*files_of(package), *files_of(data, CACHES)])
    state += repr([os.environ.get(name) for name in KERNELS])
    for name in ("MCNOTES_DATA", "MCNOTES_ZOO"):  # these are read instead of the repository's data
        if elsewhere := os.environ.get(name):
            state += digest(Path(elsewhere), files_of(Path(elsewhere), CACHES))
    return state


def files_of(folder: Path, caches: Collection[str] = ()) -> Iterator[Path]:
    """All files in `folder`, except those in its `caches` and those of unfinished work."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        kept = (n for n in folders if n != "__pycache__" and (inside / n).as_posix() not in caches)
        folders[:] = list(kept)
        yield from (Path(place) / name for name in names if not name.endswith(UNFINISHED))


def changed(preset: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What a preset changes. The default preset changes nothing, so no cell is injected."""
    return {name: value for name, value in preset.items() if value != defaults[name]}


def setting(name: str, least: int) -> int | None:
    """A whole number from the environment, or None if it is not set. Raises ValueError."""
    if not (text := os.environ.get(name)):
        return None
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name}: got {text!r}, expected a whole number of at least {least}")
    return number


def cell_timeout() -> int | None:
    """Seconds that a cell may take, from $MCNOTES_CELL_TIMEOUT; None means no limit."""
    return setting("MCNOTES_CELL_TIMEOUT", 0) or None


def execute(path: Path, out: Path, values: dict[str, Any]) -> None:
    """Run one notebook and write it to `out`. Raises RuntimeError, which names the failed cell."""
    limit = cell_timeout()
    bar: Any = {"leave": False, "desc": path.stem} if sys.stderr.isatty() else False
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        once_more_if_dead_at_start(
            papermill.execute_notebook,
            path,
            out,
            parameters=values,
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=bar,
            execution_timeout=limit,
            iopub_timeout=LATE,
            extra_arguments=["--log-level=50"],
        )
    except papermill.PapermillExecutionError as error:
        source = "\n".join("      " + line for line in error.source.splitlines()[-8:])
        where = f"code cell [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise RuntimeError(f"{where}\n{source}\n      (full traceback in {out})") from error
    except CellTimeoutError as error:
        if limit is None:
            raise RuntimeError(f"the last output of a cell has not come in {LATE} s") from error
        raise RuntimeError(
            f"a cell ran longer than the {limit} seconds of MCNOTES_CELL_TIMEOUT; 0: no limit"
        ) from error


def once_more_if_dead_at_start(start: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `start`, and again if its kernel dies before any cell ran.

    Kernels that start at the same moment in several processes may be given the same ports.
    """
    try:
        return start(*args, **kwargs)
    except RuntimeError as error:
        if "before replying to kernel_info" not in str(error):
            raise
        return start(*args, **kwargs)


def run_one(path: Path, preset: str, key: str, force: bool) -> bool:
    """Run one chapter unless its result is cached. Returns whether it ran."""
    notebook = notebooks.read(path)
    values = changed(presets.load(preset), notebooks.parameters(notebook))
    stamp = hashlib.sha256(
        json.dumps([key, notebooks.digest(notebook), values], sort_keys=True).encode()
    ).hexdigest()
    result = result_path(path, preset)
    if not force and is_of(result, stamp):
        return False
    running = result.with_suffix(".running.ipynb")
    execute(path, running, values)
    executed = notebooks.read(running)
    executed.metadata["key"] = stamp
    notebooks.write(running, executed)
    os.replace(running, result)
    return True


def result_path(path: Path, preset: str) -> Path:
    return EXECUTED / preset / path.name


def is_of(result: Path, stamp: str) -> bool:
    """Whether an executed copy is there, whole, and of what the stamp names."""
    try:
        return bool(notebooks.read(result).metadata.get("key") == stamp)
    except (OSError, ValueError):
        return False


def settle_folders() -> None:
    """Make the environment's folders absolute: a notebook runs in another folder than its tool."""
    for name in FOLDERS:
        if given := os.environ.get(name):
            os.environ[name] = os.path.abspath(given)


def check_all(paths: list[Path], preset: str) -> list[Failure]:
    """Check the preset against every chapter before anything runs."""
    values, failures = presets.load(preset), []
    for path in paths:
        try:
            known = notebooks.parameters(notebooks.read(path))
            faults = presets.check(values, known) or presets.impossible(known | values)
        except ValueError as error:
            faults = [str(error)]
        failures += [Failure(path.stem, f"preset {preset!r}: {fault}") for fault in faults]
    return failures


def run(paths: list[Path], preset: str, force: bool = False, jobs: int = 1) -> list[Failure]:
    """Run chapters, `jobs` at a time, and print a line for each. A failure stops no other."""
    if failures := check_all(paths, preset):
        return report(failures, 0)
    cell_timeout()  # raises before anything runs
    settle_folders()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the stored outputs were made
    key, home = inputs(), Path.cwd()
    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(_timed, path, preset, key, force): path for path in paths}
        for number, done in enumerate(as_completed(running), 1):
            path = running[done]
            how, error = done.result()
            print(f"[{number}/{len(paths)}] {path.stem:<24} {how}", flush=True)
            failures += [Failure(path.stem, error)] if error else []
    finally:  # an interrupt does not wait for running chapters
        pool.shutdown(wait=False, cancel_futures=True)
        os.chdir(home)  # papermill changes the working folder, which all threads share
    return report(failures, len(paths) - len(failures))


def _timed(path: Path, preset: str, key: str, force: bool) -> tuple[str, str]:
    """Run one chapter; returns how it went, and the error message, if any."""
    start = time.perf_counter()
    try:
        ran = run_one(path, preset, key, force)
    except Exception as error:
        return f"FAILED after {time.perf_counter() - start:.0f} s", str(error) or repr(error)
    finally:
        ensure_event_loop().close()  # this thread's, which papermill opened
    return f"ran in {time.perf_counter() - start:.0f} s" if ran else "cached", ""


def report(failures: list[Failure], passed: int) -> list[Failure]:
    """Print the failures and the counts, and return the failures."""
    for failure in failures:
        print(f"  {failure.chapter}: {failure.reason}")
    print(f"chapters: {passed} passed, {len(failures)} failed", flush=True)
    return failures
