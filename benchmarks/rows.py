"""A results file whose rows are measured one by one, and none of them twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mcnotes import cache
from mcnotes.lab import Experiment

Record = dict[str, Any]


def opened(file: Path | None, lab: Experiment, *lists: str) -> Record:
    """The file's record, or a new one with these empty lists. SystemExit for another experiment."""
    configuration = json.loads(json.dumps(lab.config()))  # as it comes back from a file
    kept = json.loads(file.read_text("utf8")) if file and file.exists() else None
    record: Record = kept or {"configuration": configuration} | {name: [] for name in lists}
    if record["configuration"] != configuration:
        raise SystemExit(f"{file} is of another configuration. Fix: remove it")
    return record


def add(
    record: Record,
    name: str,
    labels: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
    file: Path | None,
) -> None:
    """Measure a row of the list `name` and write the record, unless a row has these labels.

    What is measured may bring its own provenance: a result that was found in the store.
    """
    if any(row.items() >= labels.items() for row in record[name]):
        return
    start = time.perf_counter()
    found = measure()
    origin = cache.provenance(time.perf_counter() - start)
    record[name].append({**labels, "provenance": origin, **found})
    if file:
        cache.write_atomic(file, (json.dumps(record, indent=1) + "\n").encode())
