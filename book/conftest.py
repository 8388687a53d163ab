"""What pytest needs to know when it runs the chapters by nbval."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from nbval import kernel
from tools.chapters import once_more_if_dead_at_start

OUTPUT_SECONDS = 120.0
START = Path(tempfile.gettempdir()) / "mcnotes-kernel.lock"
start_new_kernel = kernel.start_new_kernel


def start_alone(*args: Any, **kwargs: Any) -> Any:
    """Start one kernel at a time, and once more if it dies."""
    with FileLock(START):
        return once_more_if_dead_at_start(start_new_kernel, *args, **kwargs)


kernel.start_new_kernel = start_alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Wait longer for a cell's output than nbval's five seconds.

    They are no option of it, and a busy machine may hold output back.
    """
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_SECONDS
