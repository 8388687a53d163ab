"""Run the tests as on other processors: `python -m tools.portable`, usually `make portable`.

PyTorch, oneDNN and MKL choose their kernels by the processor's instructions and the number of
threads, and each choice rounds in another way. A setting is INSTRUCTIONS-THREADS, as `avx2-1`:
`best` stands for all instructions of this processor, `avx2` for those of most laptops, `default`
for the oldest only. One line is printed for each setting and part; the exit status is 1 if a test
failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mcnotes.__main__ import sigterm_interrupts
from tools import chapters

INSTRUCTIONS = {
    "best": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
}
THREADS = (1, 2)
SETTINGS = [f"{name}-{threads}" for name in INSTRUCTIONS for threads in THREADS]
LIMIT = 3600  # seconds that a chapter's cell may take
NBVAL = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={LIMIT}"]


def environment(setting: str, store: Path) -> dict[str, str]:
    """The environment of a process that computes as `setting` says.

    store: an empty folder, so that no result of another setting is loaded. Raises ValueError for an
    unknown setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"got setting {setting!r}, expected one of {', '.join(SETTINGS)}")
    name, threads = setting.split("-")
    chosen = {v for values in INSTRUCTIONS.values() for v in values} | {"OMP_NUM_THREADS"}
    others = {k: v for k, v in os.environ.items() if k not in chosen}
    path = os.pathsep.join([str(chapters.ROOT), *filter(None, [others.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": threads, "MCNOTES_STORE": str(store), "PYTHONPATH": path}
    own |= {"MCNOTES_CELL_TIMEOUT": str(LIMIT), "OMP_WAIT_POLICY": "passive"}  # for busy machines
    return others | chapters.ENVIRONMENT | INSTRUCTIONS[name] | own


def run(setting: str, part: str, arguments: list[str], jobs: int) -> bool:
    """Run pytest on one part and print a line (and what failed). Returns whether all passed."""
    start = time.perf_counter()
    workers = ["-n", str(max(1, jobs // int(setting.split("-")[1]))), "--dist", "loadfile"]
    workers.append("--no-loadscope-reorder")  # long files come early
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers, *arguments]
    with tempfile.TemporaryDirectory() as store:
        done = subprocess.run(
            command,
            cwd=chapters.ROOT,
            env=environment(setting, Path(store)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    lines = done.stdout.splitlines()
    counts = Counter({how: int(n) for n, how in re.findall(r"(\d+) (\w+)", lines[-1])})
    failed = counts["failed"] + counts["error"] + counts["errors"]
    seconds = time.perf_counter() - start
    print(f"{setting:<10} {part:<9} {counts['passed']} passed, {failed} failed in {seconds:.0f} s")
    if done.returncode:
        names = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(f"    {line}" for line in names or lines[-20:]))
    sys.stdout.flush()
    return done.returncode == 0


def check(settings: list[str]) -> None:
    """Raise ValueError, before anything runs, for settings that this processor does not have."""
    for setting in settings:
        environment(setting, Path())
    from torch.backends import cpu  # heavy

    here = cpu.get_cpu_capability()
    if any(setting.startswith("avx2") for setting in settings) and "AVX" not in here:
        raise ValueError(
            f"this processor has no AVX2 (PyTorch found {here}). Fix: leave out the avx2 settings"
        )


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="all by default")
    parser.add_argument("--only", nargs="+", metavar="TESTS", help="these, as pytest takes them")
    parser.add_argument(
        "--chapters", nargs="*", help="those whose names contain one of these words"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cores to use")
    return parser.parse_args(arguments)


def main(settings: list[str], only: list[str] | None, words: list[str] | None, jobs: int) -> int:
    """Run the named parts, or everything if none is named. Returns the exit status."""
    check(settings)
    parts = {}
    if only or words is None:
        parts["tests"] = only or ["tests"]
    if words is not None or not only:
        parts["chapters"] = [*NBVAL, *map(str, chapters.select(words or []))]
    passed = [run(setting, *part, jobs) for setting in settings for part in parts.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    given = options()
    try:
        with sigterm_interrupts():  # which ends the tests, too
            sys.exit(main(given.settings, given.only, given.chapters, given.jobs))
    except ValueError as error:
        sys.exit(f"portable: {error}")
    except KeyboardInterrupt:
        sys.exit("portable: stopped")
