"""What the benchmarks share: quiet memory, and a clock that waits for the device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


def keep_freed_memory() -> None:
    """Start this process again so that freed memory stays in it; before anything else is done.

    Page faults of large tensors are most of the noise on a CPU.
    """
    if "MALLOC_MMAP_MAX_" not in os.environ:
        os.environ.update(
            MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1", MALLOC_TOP_PAD_="536870912"
        )
        os.execv(sys.executable, [sys.executable, *sys.argv])


def seconds(work: Callable[[], object], device: object, steps: int = 1) -> float:
    """Of one of `steps` calls of `work`, the device's queue empty before and after."""
    from torch import cuda  # heavy: not before the process has settled

    on_cpu = str(device) == "cpu"
    wait: Callable[[], None] = (lambda: None) if on_cpu else cuda.synchronize
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        work()
    wait()
    return (time.perf_counter() - start) / steps
