"""Kill a whole batch at random moments, resume it, and compare its numbers with a quiet run.

    python -m tools.kills --kills 50        # about half an hour on two cores

Each kill is SIGKILL to every process of the batch, SIGKILL to its first process alone (its
children live on), SIGTERM, or SIGINT (Ctrl-C). A batch that completes is compared and started from
the beginning again, until all kills are used up. The exit status is 1 if any number differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tools.batch import PATIENCE, send
from tools.presets import ROOT

WAYS = ("kill all", "kill the first", "terminate", "interrupt")
METHODS = ["unaligned", "aligned", "pam-unaligned", "pam-aligned"]
PARAMETERS = {"epochs": 3, "curve_epochs": 3}  # beside those of the smoke preset


def start(place: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start or resume the batch; everything that it writes is under `place`."""
    changes = {
        "presets": ["smoke"],
        "methods": METHODS,
        "parameters": PARAMETERS,
        "out": str(place / "runs"),
        "results": str(place / "results"),
    }
    words = [f"{name}={yaml.safe_dump(v, default_flow_style=True)}" for name, v in changes.items()]
    command = [sys.executable, "-m", "tools.batch", "run", "--set", *words]
    environment = os.environ | {
        "MCNOTES_STORE": str(place / "store"),
        "MCNOTES_ZOO": str(place / "no-zoo"),
        "TQDM_DISABLE": "1",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def stop(batch: subprocess.Popen[bytes], way: str) -> None:
    """Stop a running batch. All of its processes have ended when this returns."""
    first = psutil.Process(batch.pid)
    family = [first, *first.children(recursive=True)]
    if way == "kill all":
        for process in family:
            send(process, signal.SIGKILL)
    elif way == "kill the first":
        send(first, signal.SIGKILL)
    elif way == "terminate":
        send(first, signal.SIGTERM)
    else:
        os.killpg(batch.pid, signal.SIGINT)
    _, left = psutil.wait_procs(family, timeout=2 if way == "kill the first" else 2 * PATIENCE)
    for process in left:
        send(process, signal.SIGKILL)
    psutil.wait_procs(left)
    batch.wait()


def numbers(place: Path) -> Any:
    """The results of a completed batch, without what may differ: where and when it ran."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ("provenance", "collected")}
        return [without(v) for v in value] if isinstance(value, list) else value

    files = sorted((place / "results").glob("*.json"))
    return [without(json.loads(path.read_text("utf8"))) for path in files]


def finish(batch: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the batch to end. Raises RuntimeError, with its last output, if it failed."""
    if status := batch.wait():
        tail = log.read_text("utf8", errors="replace")[-3000:]
        raise RuntimeError(f"the batch ended with status {status}:\n{tail}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mean", type=float, default=15.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    draw = random.Random(args.seed)
    scratch = Path(tempfile.mkdtemp(prefix="kills-"))
    log, quiet, place = scratch / "log.txt", scratch / "quiet", scratch / "killed"

    begin = time.perf_counter()
    finish(start(quiet, log), log)
    expected, rounds, counts = numbers(quiet), 0, dict.fromkeys(WAYS, 0)
    print(f"a quiet run takes {time.perf_counter() - begin:.0f} s", flush=True)
    while True:
        batch = start(place, log)
        try:
            wait = draw.expovariate(1 / args.mean) if sum(counts.values()) < args.kills else None
            batch.wait(wait)
        except subprocess.TimeoutExpired:
            way = draw.choice(WAYS)
            stop(batch, way)
            counts[way] += 1
            print(f"{sum(counts.values())} of {args.kills}: {way}", flush=True)
            continue
        finish(batch, log)
        rounds += 1
        if numbers(place) != expected:
            print(f"DIFFERENT numbers after {sum(counts.values())} kills: {scratch}")
            return 1
        if sum(counts.values()) >= args.kills:
            break
        shutil.rmtree(place)
    print(f"{counts}: {rounds} batches completed, all with the numbers of the quiet run")
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
