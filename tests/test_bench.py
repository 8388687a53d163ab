"""The results file of the bench: what stays in it when rows are measured again."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mcnotes import cache


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/matchers.py`, with a results file of its own."""
    monkeypatch.setattr(sys, "path", [str(cache.ROOT / "benchmarks"), *sys.path])
    module = importlib.import_module("matchers")
    monkeypatch.setattr(module, "FILE", tmp_path / "matchers.json")
    return module


def row(method: str, loss: float, **more: Any) -> dict[str, Any]:
    """Of one pair: a line that is flat but for its middle."""
    line = {"loss": [0.5, loss, 0.5]}
    return {"network": "MLP 8", "pair": [1, 2], "method": method, "line": line} | more


def saved(bench: ModuleType, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Any:
    """The rows of the file after `save`, by method."""
    record = {"hardware": [], "torch": [], "commit": [], "rows": old}
    bench.FILE.write_text(json.dumps(record))
    origin = {"hardware": "CPU", "torch": "2", "commit": "c"}
    bench.save([some | {"provenance": origin} for some in new])
    return {some["method"]: some for some in json.loads(bench.FILE.read_text())["rows"]}


@pytest.mark.parametrize(("loss", "stays"), [(1.0, True), (1.1, False)])
def test_a_curve_stays_with_its_permutation(bench: ModuleType, loss: float, stays: bool) -> None:
    old = [row("identity", 2.0), row("weights", 1.0, curve={"epochs": 3})]
    rows = saved(bench, old, [row("identity", 2.0), row("weights", loss)])
    assert rows["weights"]["line"]["loss"][1] == loss
    assert ("curve" in rows["weights"]) == stays


def test_rows_by_other_settings_do_not_stay(bench: ModuleType) -> None:
    old = [row("identity", 2.0), row("sinkhorn", 1.0, descent=[10.0, 3.0, 1.0])]
    today = [*bench.settings("sinkhorn").values()]
    old += [row("sinkhorn-both", 1.0, descent=today), row("weights", 1.5)]
    rows = saved(bench, old, [row("identity", 2.0)])
    assert [*rows] == ["identity", "weights", "sinkhorn-both"]


def test_rows_of_other_networks_do_not_stay(bench: ModuleType) -> None:
    old = [row("identity", 2.0), row("weights", 1.0)]
    first = [row(m, 1.0, descent=[*bench.settings(m).values()]) for m in bench.FIRST]
    assert "weights" in saved(bench, old, [row("identity", 2.5)]), "until the new ones are whole"
    assert [*saved(bench, [*old, row("cca", 1.0)], first)] == [
        m for m in bench.CALLS if m in bench.FIRST
    ]
