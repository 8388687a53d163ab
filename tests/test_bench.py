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


def test_a_row_names_the_commit_of_its_seconds(bench: ModuleType) -> None:
    rows = saved(bench, [row("identity", 2.0), row("weights", 1.0)], [row("identity", 2.0)])
    assert rows["identity"]["commit"] == "c"
    assert "commit" not in rows["weights"], "it was not measured again"


def test_settings_that_were_not_tried_again_stay(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CHOICE", tmp_path / "descents.json")

    def choose(name: str, how: Any, pair: tuple[int, int]) -> dict[str, Any]:
        tried = {"network": name, "pair": [*pair], "method": how.action, "loss": how.lr}
        tried.update(bench.numbers(how.settings))
        return tried

    monkeypatch.setattr(bench, "choose", choose)
    for text in ("sinkhorn,1,0.3,0.5", "sinkhorn,2,0.3,0.3", "sinkhorn,1,0.3,0.5"):
        bench.chosen(["MLP 8"], [bench.descent(text)], 1, keep=True)
    rows = json.loads(bench.CHOICE.read_text())["rows"]
    assert [row["scale"] for row in rows] == [1.0, 2.0]


def test_rows_of_other_packages_that_were_not_measured_again_stay(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = importlib.import_module("peers")
    monkeypatch.setattr(peers, "FILE", tmp_path / "peers.json")
    some = {"pair": [1, 2], "task": "pair", "who": "rebasin"}
    peers.save([some | {"network": "TinyTen", "barrier": 1.0}])
    peers.save([some | {"network": "MLP 8", "barrier": 2.0}])
    peers.save([some | {"network": "TinyTen", "barrier": 3.0}])
    rows = json.loads(peers.FILE.read_text())["rows"]
    assert [(row["network"], row["barrier"]) for row in rows] == [("TinyTen", 3.0), ("MLP 8", 2.0)]


def test_a_broken_results_file_is_not_written_over(bench: ModuleType) -> None:
    bench.FILE.write_text('{"rows": [')
    with pytest.raises(SystemExit, match=r"is broken .*move it away"):
        bench.save([])
    assert bench.FILE.read_text() == '{"rows": ['


def test_what_the_store_lacks_a_part_of_is_not_saved(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `--save` would compute it."""
    cell = ("MLP 8", (1, 2), "identity", 0)
    there = {json.dumps(bench.configuration(cell), sort_keys=True)}

    def origin(config: Any) -> dict[str, Any]:
        return {"commit": "c"} if json.dumps(config, sort_keys=True) in there else {}

    monkeypatch.setattr(bench.cache, "origin", origin)
    assert not bench.measured(cell), "without its bound"
    there.add(json.dumps(bench.of_bound("MLP 8", (1, 2)), sort_keys=True))
    assert bench.measured(cell)
