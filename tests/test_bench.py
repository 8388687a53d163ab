"""The results files of the bench: what stays in them when rows are measured again."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from mcnotes import cache


def module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program of `benchmarks/`, with a results file of its own."""
    monkeypatch.setattr(sys, "path", [str(cache.ROOT / "benchmarks"), *sys.path])
    found = importlib.import_module(name)
    monkeypatch.setattr(found, "FILE", tmp_path / f"{name}.json")
    return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("matchers", tmp_path, monkeypatch)


def row(method: str, loss: float, **more: Any) -> dict[str, Any]:
    """Of one pair: a line that is flat but for its middle."""
    line = {"loss": [0.5, loss, 0.5], "barrier": loss - 0.5}
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


def test_where_a_descent_ended_elsewhere_stays(bench: ModuleType) -> None:
    """Of the same two networks, by the same settings; other methods have no such excuse."""
    today = {"descent": [*bench.settings("sinkhorn").values()]}
    rows = {"identity": row("identity", 2.0), "weights": row("weights", 1.0)}
    rows["sinkhorn"] = row("sinkhorn", 1.5, commit="b") | today
    b = {"barrier": 1.0, "commit": "b", "hardware": None}
    c = {"barrier": 0.5, "commit": "c", "hardware": "CPU"}
    for loss, before in ((1.0, [b]), (1.0, [b]), (0.75, [b, c]), (1.5, [c, c | {"barrier": 0.25}])):
        new = [row("identity", 2.0), row("weights", loss), row("sinkhorn", loss) | today]
        rows = saved(bench, [*rows.values()], new)
        assert rows["sinkhorn"]["line"]["barrier"] == loss - 0.5
        assert rows["sinkhorn"]["elsewhere"] == before, "each once, and not where it is now"
        assert not {"elsewhere"} & {*rows["weights"], *rows["identity"]}


def test_networks_are_known_by_their_hashes(bench: ModuleType) -> None:
    """Others can have the same losses along the line, as far as they are told apart."""
    old = [row("identity", 2.0, hashes=["a", "b"]), row("weights", 1.0, hashes=["a", "b"])]
    kept = saved(bench, old, [row("identity", 2.0, hashes=["a", "b"])])
    assert {*kept} == {"identity", "weights"}
    assert kept["identity"]["commit"] == "c"
    other = saved(bench, old, [row("identity", 2.0, hashes=["a", "x"])])
    assert other["identity"]["hashes"] == ["a", "b"], "left out until they are whole"
    new = [{"method": m, "hashes": ["a", "x"]} for m in bench.FIRST]
    whole = [
        row(x["method"], 2.0, descent=[*bench.settings(x["method"]).values()]) | x for x in new
    ]
    assert {*saved(bench, [*old, row("cca", 1.0, hashes=["a", "b"])], whole)} == {*bench.FIRST}


def test_a_curve_that_is_dropped_is_named(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [row("identity", 2.0), row("weights", 1.0, curve={"epochs": 3})]
    saved(bench, old, [row("identity", 2.0), row("weights", 1.0)])
    assert "curve" not in capsys.readouterr().out
    saved(bench, old, [row("identity", 2.0), row("weights", 1.1)])
    assert '["MLP 8", 1, 2, "weights"]' in capsys.readouterr().out


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = module("peers", tmp_path, monkeypatch)
    some = {"pair": [1, 2], "task": "pair", "who": "rebasin"}
    peers.save([some | {"network": "TinyTen", "barrier": 1.0}])
    peers.save([some | {"network": "MLP 8", "barrier": 2.0}])
    peers.save([some | {"network": "TinyTen", "barrier": 3.0}])
    peers.save([some | {"network": name, "error": "too slow"} for name in ("TinyTen", "CNN")])
    rows = json.loads(peers.FILE.read_text())["rows"]
    found = [(row["network"], row.get("barrier", row.get("error"))) for row in rows]
    assert found == [("TinyTen", 3.0), ("CNN", "too slow"), ("MLP 8", 2.0)]


def test_a_broken_results_file_is_not_written_over(bench: ModuleType) -> None:
    bench.FILE.write_text('{"rows": [')
    with pytest.raises(SystemExit, match=r"cannot be read: .*move it away"):
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


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(49, 4), nn.ReLU(), nn.Linear(4, 10))


def one_trial(name: str, *of: Any) -> dict[str, Any]:
    """In place of a planted permutation: recovered, in no time."""
    *_, noise, seed, method = of
    found = {"network": name, "noise": noise, "method": method, "seed": seed, "whole": True}
    return found | {"astray": 0, "twins": {}, "dead": {}, "seconds": 0.0}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/planted.py` for two tiny networks, four trials of each kind in its file."""
    found = module("planted", tmp_path, monkeypatch)
    monkeypatch.setattr(found, "KINDS", {"one": (tiny, 4), "two": (tiny, 4)})
    monkeypatch.setattr(found, "METHODS", ("weights",))
    monkeypatch.setattr(found, "trial", one_trial)
    called(found, monkeypatch, "--trials", "4", "--minutes", "inf")
    return found


def called(program: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """The file after a run with these words."""
    monkeypatch.setattr(sys, "argv", ["planted.py", *words])
    program.main()
    record: dict[str, Any] = json.loads(program.FILE.read_text())
    return record


def trials(record: dict[str, Any]) -> list[int]:
    return [row["trials"] for row in record["rows"]]


@pytest.mark.parametrize("change", [{}, {"IMAGES": 8}])
@pytest.mark.parametrize(
    "words", [("--minutes", "0"), ("--trials", "3", "--minutes", "inf")], ids=["stopped", "fewer"]
)
def test_fewer_trials_do_not_take_the_place_of_more(
    planted: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    change: dict[str, Any],
) -> None:
    before = planted.FILE.read_bytes()
    for name, value in change.items():
        monkeypatch.setattr(planted, name, value)
    called(planted, monkeypatch, *words)
    assert planted.FILE.read_bytes() == before
    assert "stays as it is: it has 4 trials of each kind" in capsys.readouterr().err


def test_a_run_of_another_configuration_takes_the_place_once_it_is_whole(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted, "IMAGES", 8)
    seen = []

    def watched(*of: Any) -> dict[str, Any]:
        seen.append(json.loads(planted.FILE.read_text())["images"])
        return one_trial(*of)

    monkeypatch.setattr(planted, "trial", watched)
    record = called(planted, monkeypatch, "--trials", "5", "--minutes", "inf")
    assert trials(record) == [5] * 4
    assert record["images"] == 8
    assert set(seen) == {64}, "until the last trial"


def test_more_trials_name_all_commits(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(planted.FILE.read_text())
    planted.FILE.write_text(json.dumps(record | {"commit": ["old"]}))
    before = planted.FILE.read_bytes()
    called(planted, monkeypatch, "--trials", "4", "--resume")
    assert planted.FILE.read_bytes() == before, "no trial came, so no commit"
    record = called(planted, monkeypatch, "--trials", "6", "--resume", "--minutes", "inf")
    assert trials(record) == [6] * 4
    assert "old" in record["commit"]
    assert len(record["commit"]) == 2


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [("IMAGES", 8, "images"), ("KINDS", {"one": (tiny, 4)}, "networks"), ("SHIFT", 0.2, "shift")],
)
def test_trials_of_another_configuration_are_not_gone_on_from(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, word: str
) -> None:
    before = planted.FILE.read_bytes()
    monkeypatch.setattr(planted, name, value)
    monkeypatch.setattr(planted, "run", None)  # before any work
    with pytest.raises(SystemExit, match=f"are of other {word} than today's"):
        called(planted, monkeypatch, "--resume")
    assert planted.FILE.read_bytes() == before


@pytest.mark.parametrize("words", [(), ("--resume",)])
@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda text: text[:-9], "Expecting"),
        (lambda text: "[]", "list indices"),
        (lambda text: "{}", "it lacks 'rows'"),
        (lambda text: text.replace('"recovered": 4', '"recovered": 3'), "do not add up"),
        (lambda text: text.replace('"network": "two"', '"network": "six"'), "rows are not"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch, break_it: Any, why: str, words: Any
) -> None:
    planted.FILE.write_text(break_it(planted.FILE.read_text()))
    before = planted.FILE.read_bytes()
    monkeypatch.setattr(planted, "run", None)
    with pytest.raises(SystemExit, match=f"cannot be read: .*{why}.*Fix: restore the file"):
        called(planted, monkeypatch, *words)
    assert planted.FILE.read_bytes() == before


def test_the_results_file_is_of_todays_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [str(cache.ROOT / "benchmarks"), *sys.path])
    program = importlib.import_module("planted")
    assert program.changed(program.stored()) == []


@pytest.mark.parametrize(
    ("name", "methods"),
    [("pam_steps", [None]), ("pam_curves", ["unaligned", "aligned", "pam-unaligned"])],
)
def test_rows_of_pam_are_measured_once(
    name: str,
    methods: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    program = module(name, tmp_path, monkeypatch)
    words = ["--preset", "smoke", "--pairs", "1", "--rates", "0.5", "--out", str(program.FILE)]
    monkeypatch.setattr(sys, "argv", [name, *words])
    less = {"images": 250, "probe": 50, "samples": 2}
    few = {"validation": 9_000, "pam_options": less}  # of 10,000 images
    if name == "pam_curves":
        monkeypatch.setattr(program, "settled", lambda lab: lab)  # the authors' settings take long
    values = program.presets.load("smoke") | few
    monkeypatch.setattr(program.presets, "load", lambda name: values)
    program.main()
    kept = program.FILE.read_bytes()
    rows = json.loads(kept)["rows"]
    assert [row.get("method") for row in rows] == methods
    assert (rows[-1]["pair"], rows[-1]["p_lr"]) == ([1, 2], 0.5)
    assert 0 <= rows[-1]["as_aligned"] <= 1
    for row in rows:
        assert row["provenance"].keys() >= {"commit", "hardware", "seconds"}
    program.main()
    assert program.FILE.read_bytes() == kept
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(rows)
