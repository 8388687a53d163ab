"""The book's numbers on other processors: the same seeds, other kernels, other threads.

PyTorch, oneDNN and MKL choose their kernels by the processor's instructions and the number of
threads; each choice rounds in another way, and training magnifies the rounding until the networks
are other ones. For each setting of `tools.portable` a fresh process trains the endpoints of the
book's three pairs, aligns them, and measures the line before and after, on the test images; nothing
is loaded from a store. What moves from setting to setting stands beside what moves from pair to
pair. `data/results/machines.json` is written after each setting: a second
call computes what it lacks. The last line is JSON: the file's path and its settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import portable  # noqa: E402 (the tools are no installed package)

FILE = ROOT / "data" / "results" / "machines.json"
PAIRS = [[1, 2], [3, 4], [5, 6]]


def measure() -> None:
    """In a process that was started with a setting: print what there is to know, as JSON."""
    import torch
    from tqdm.auto import tqdm

    from mcnotes import cache, curves, evaluate, matching, train
    from mcnotes.lab import Experiment

    start = time.perf_counter()
    lab = Experiment(device="cpu")
    recipe, few = lab.recipe(lab.epochs), lab.task.train.first(lab.statistics)
    rows = []
    for pair in tqdm(PAIRS, desc="pairs"):
        a, b = (train.fit(lab.net, lab.task, recipe, seed=seed).theta for seed in pair)
        images = lab.task.train.first(lab.match_images)
        perm = matching.match(matching.Pair(lab.net, lab.sym, a, b), images).perm
        row: dict[str, object] = {"pair": pair}
        for order, end in {"unaligned": b, "aligned": lab.sym.permute(b, perm)}.items():
            line = curves.line(a, end)
            found = evaluate.profile(
                lab.net, line, lab.task.test, points=lab.points, statistics=few
            )
            row["ends"] = [float(found.accuracy[0]), float(found.accuracy[-1])]
            row[order] = found.barrier
        rows.append(row)
    origin = cache.provenance(time.perf_counter() - start)
    origin["instructions"] = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"pairs": rows, "provenance": origin}))


def run(setting: str) -> dict[str, object]:
    """What `measure` prints in a process that computes as `setting` says."""
    with tempfile.TemporaryDirectory() as store:
        done = subprocess.run(
            [sys.executable, __file__, "--here"],
            env=portable.environment(setting, Path(store)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=portable.SETTINGS, help="all by default")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        return measure()
    portable.check(given.settings)
    from mcnotes import cache

    kept = json.loads(FILE.read_text("utf8")) if FILE.exists() else {}
    for setting in given.settings:
        if setting in kept:
            continue
        kept[setting] = run(setting)
        cache.write_atomic(FILE, (json.dumps(kept, indent=1) + os.linesep).encode())
    print(json.dumps({"file": str(FILE.relative_to(ROOT)), "settings": list(kept)}))


if __name__ == "__main__":
    main()
