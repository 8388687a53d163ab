"""Run the tests as on other processors: `python -m tools.portable`, usually `make portable`.

PyTorch, oneDNN and MKL choose their kernels by the processor's instructions and the number of
threads, and each choice rounds in another way. A setting is INSTRUCTIONS-THREADS, as `avx2-1`:
`best` stands for all instructions of this processor, `avx2` for those of most laptops, `default`
for the oldest only. The parts are the unit tests, the chapters as they stand, and the chapters at
the smallest preset, whose networks have hardly learned anything. One line is printed for each
setting and part; the exit status is 1 if something failed.
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
PARTS = ("tests", "chapters", "smoke")
NBVAL = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={LIMIT}"]


def environment(setting: str, store: Path) -> dict[str, str]:
    """The environment of a process that computes as `setting` says.

    store: an empty folder, so that no result of another setting is loaded. Raises ValueError for an
    unknown setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"got setting {setting!r}, expected one of {', '.join(SETTINGS)}")
    name, threads = setting.split("-")
    others = {k: v for k, v in os.environ.items() if k not in chapters.KERNELS}
    path = os.pathsep.join([str(chapters.ROOT), *filter(None, [others.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": threads, "MCNOTES_STORE": str(store), "PYTHONPATH": path}
    own |= {"MCNOTES_CELL_TIMEOUT": str(LIMIT), "OMP_WAIT_POLICY": "passive"}  # for busy machines
    return others | chapters.ENVIRONMENT | INSTRUCTIONS[name] | own


def run(setting: str, part: str, command: list[str]) -> bool:
    """Run one part and print a line (and what failed). Returns whether all passed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as store:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=chapters.ROOT,
            env=environment(setting, Path(store)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    lines = done.stdout.splitlines() or [""]
    counts = Counter({how: int(n) for n, how in re.findall(r"(\d+) (\w+)", lines[-1])})
    failed = counts["failed"] + counts["error"] + counts["errors"]
    seconds = time.perf_counter() - start
    print(f"{setting:<10} {part:<9} {counts['passed']} passed, {failed} failed in {seconds:.0f} s")
    if done.returncode:
        names = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(f"    {line}" for line in names or lines[-20:]))
    sys.stdout.flush()
    return done.returncode == 0


def command(setting: str, part: str, tests: list[str], words: list[str], jobs: int) -> list[str]:
    """What follows `python -m` to run a part in a setting.

    tests: as pytest takes them. words: chapters whose names contain one of them; all if there are
    none, which raises ValueError if no chapter does.
    """
    workers = str(max(1, jobs // int(setting.split("-")[1])))
    found = chapters.select(words)
    if part == "smoke":
        return ["tools.book", "run", *words, "--preset", "smoke", "--force", "--jobs", workers]
    pytest = ["pytest", "-p", "no:cacheprovider", "-n", workers, "--dist", "loadfile"]
    pytest.append("--no-loadscope-reorder")  # long files come early
    return [*pytest, *(tests if part == "tests" else [*NBVAL, *map(str, found)])]


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
    add = parser.add_argument
    add("--settings", nargs="+", default=SETTINGS, help="all by default")
    add("--parts", nargs="+", default=PARTS, choices=PARTS, help="all by default")
    add("--tests", nargs="+", default=["tests"], help="these, as pytest takes them")
    add("--chapters", nargs="+", default=[], help="whose names contain one of these words")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="cores to use")
    return parser.parse_args(arguments)


def main(given: argparse.Namespace) -> int:
    """Run the parts in each setting. Returns the exit status."""
    check(given.settings)
    runs = [
        (setting, part, command(setting, part, given.tests, given.chapters, given.jobs))
        for setting in given.settings
        for part in given.parts
    ]
    passed = [run(*each) for each in runs]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    try:
        with sigterm_interrupts():  # which ends the tests, too
            sys.exit(main(options()))
    except ValueError as error:
        sys.exit(f"portable: {error}")
    except KeyboardInterrupt:
        sys.exit("portable: stopped")
