"""Processes that use the store at the same time, or are killed in the middle.

They are forked from one that has imported PyTorch already, so that each starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mcnotes import cache

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mcnotes.cache"])


def start(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that calls a function of this module, with the store that is set here."""
    process = FORKS.Process(target=work, args=(cache.folder(), function, *arguments))
    process.start()
    return process


def work(store: Path, function: Callable[..., object], *arguments: object) -> None:
    os.environ["MCNOTES_STORE"] = str(store)  # the environment is that of the first process
    os.environ["MCNOTES_ZOO"] = str(store / "none")
    function(*arguments)


def end(*processes: BaseProcess) -> list[int | None]:
    """The exit statuses of processes that end: −9 of a killed one.

    One that takes longer than two minutes is killed, and its status is None.
    """
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(file: Path) -> None:
    """Be killed while a file of 1,000 bytes is written."""
    os.fsync = kill  # type: ignore[assignment]
    cache.write_atomic(file, bytes(1000))


def compute(call: str, fatal: int) -> None:
    """Compute an entry in three steps, and be killed in a call of `os`, after so many of it."""
    real, calls = getattr(os, call), 0

    def deadly(*arguments: Any, **named: Any) -> object:
        nonlocal calls
        calls += 1
        return kill() if calls > fatal else real(*arguments, **named)

    def steps(checkpoint: cache.Checkpoint) -> dict[str, torch.Tensor]:
        state = checkpoint.load() or {"i": torch.zeros((), dtype=torch.int64)}
        for i in range(int(state["i"]), 3):
            checkpoint.save({"i": torch.tensor(i + 1)})
        return {"x": torch.tensor([1.0, 2.0])}

    setattr(os, call, deadly)
    cache.tensors({"what": "killed"}, steps)


def share(log: Path) -> None:
    """Ask for an entry that takes half a second, and log that it is computed."""

    def slow(_: cache.Checkpoint) -> dict[str, torch.Tensor]:
        with open(log, "a") as file:
            file.write("computed\n")
        time.sleep(0.5)
        return {"x": torch.ones(1)}

    assert cache.tensors({"what": "shared"}, slow)["x"].item() == 1
