"""Full-scale runs: what is refused before anything runs; kill, resume, and do nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mcnotes import results
from mcnotes.zoo import Experiment
from tools import batch, notebooks, presets

ROOT = presets.ROOT


class TestPlan:
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"preset": ["smoke"]}, "the configuration: got 'preset'; did you mean 'presets'"),
            ({"presets": []}, r"presets: got \[\], expected a list"),
            ({"presets": ["smok"]}, "no preset 'smok'.*did you mean 'smoke'"),
            ({"methods": ["alligned"]}, "methods: got 'alligned'; did you mean 'aligned'"),
            ({"shapes": ["spiral"]}, "shapes: got 'spiral'"),
            ({"parameters": {"epoch": 3}}, "no parameter 'epoch'; did you mean 'epochs'"),
            ({"parameters": {"epochs": "3"}}, "epochs = '3' is of type str"),
        ],
    )
    def test_a_mistake_is_named_before_anything_runs(
        self, config: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            batch.plan(config)

    def test_what_a_preset_leaves_open_comes_from_the_notebook(self) -> None:
        (values,) = batch.plan({"presets": ["smoke"], "parameters": {"epochs": 2}}).values()
        assert (values["epochs"], values["width"], values["lr"]) == (2, 4, 0.1)

    @pytest.mark.parametrize("preset", presets.names())
    def test_every_preset_can_be_planned(self, preset: str) -> None:
        assert preset in batch.plan({"presets": [preset]})

    def test_missing_data_and_a_missing_gpu_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = batch.plan({"presets": ["paper-tinyten-cifar10"]})
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(batch.PlanError, match="'paper-tinyten-cifar10' needs a GPU"):
            batch.check_machine(runs)
        monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
        with pytest.raises(batch.PlanError, match=r"found no cifar10.npz in .*download=True"):
            batch.check_machine(runs, gpu_here=False)

    def test_a_step_is_given_what_it_depends_on_and_no_more(self) -> None:
        values = {"epochs": 2, "curve_epochs": 3, "pairs": [[1, 2]], "seed": 1}
        assert batch.words("endpoint", values) == "epochs=2 seed=1"
        told = batch.words("results", values).split(" ", 2)[2]
        assert told == "'pairs=[[1, 2]]' seed=1"
        assert batch.assignments(["pairs=[[1, 2]]", "schedule=linear"]) == {
            "pairs": [[1, 2]],
            "schedule": "linear",
        }
        with pytest.raises(batch.PlanError, match="got 'epochs', expected NAME=VALUE"):
            batch.assignments(["epochs"])

    def test_changes_may_be_given_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(
            batch, "run", lambda config, changes, options: seen.append(changes) or 0
        )
        batch.main(["run", "--set", "presets=[smoke]", "out=x", "--set", "results=y"])
        assert seen == [{"presets": ["smoke"], "out": "x", "results": "y"}]

    def test_a_step_refuses_an_unknown_parameter(self, tmp_path: Path) -> None:
        with pytest.raises(batch.PlanError, match="no parameter 'sed'; did you mean 'seed'"):
            batch.step(ROOT / "experiments/endpoint.ipynb", tmp_path / "out.ipynb", {"sed": 1})

    def test_the_steps_share_their_parameters(self) -> None:
        for name, own in batch.OWN.items():
            notebook = notebooks.read(ROOT / "experiments" / f"{name}.ipynb")
            assert set(own) <= notebooks.parameters(notebook).keys()
            notebooks.normalise(notebook)
            assert not any(cell.outputs for cell in notebooks.code_cells(notebook)), name


class TestRecord:
    def record(self) -> results.Record:
        path = {"t": [0, 0.5, 1], "arc": [0, 1, 2], "loss": [0.1, 1, 0.1], "accuracy": [0.9, 0, 1]}
        named = {"pair": [1, 2], "method": "aligned", "shape": "bezier"}
        here = {"hardware": "a laptop", "torch": "2"}
        parts = {"path": here | {"seconds": 1.5}, "curve": here | {"seconds": 2}}
        curve = named | path | {"provenance": parts}
        nets = [{"seed": 1, "provenance": here | {"seconds": 3}}]
        return {
            "format": results.FORMAT, "preset": "p", "experiment": {"width": 4}, "endpoints": nets,
            "curves": [curve], "collected": "2026-01-01", "provenance": {},
        }  # fmt: skip

    def test_it_comes_back_from_its_file(self, tmp_path: Path) -> None:
        results.save(self.record(), tmp_path / "p.json")
        (tmp_path / "other.json").write_text('{"models": 80}')
        (found,) = results.load(tmp_path)
        assert found == self.record()
        assert results.seconds(found) == 6.5
        (path,) = results.paths(found, "aligned", "bezier")
        assert path.barrier == pytest.approx(0.9)
        assert results.paths(found, "unaligned", "bezier") == []

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("accuracy", [0.9, 90, 1], "accuracy"),
            ("loss", [0.1, float("nan"), 0.1], "arc or loss"),
            ("t", [0, 1, 0.5], ": t;"),
            ("arc", [0, 1], "sizes"),
            ("method", "alined", "unknown: curve"),
            ("provenance", {}, "no provenance"),
            ("provenance", {"path": {"seconds": 1}}, "no full provenance"),
        ],
    )
    def test_an_impossible_path_is_refused(self, name: str, value: Any, says: str) -> None:
        record = self.record()
        record["curves"][0][name] = value
        with pytest.raises(results.ResultsError, match=says):
            results.check(record, "p.json")

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "p.json").write_text("{")
        with pytest.raises(results.ResultsError, match=r"p\.json.*collect it again"):
            results.load(tmp_path)

    def test_every_record_of_the_book_is_sound(self) -> None:
        results.load(ROOT / "data" / "results")


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path: Path) -> None:
    """The whole graph at the smoke preset: killed within a curve, run again, run idle."""
    config = {
        "presets": ["smoke"], "parameters": {"curve_epochs": 4}, "methods": ["aligned"],
        "out": str(tmp_path / "runs"), "results": str(tmp_path / "results"),
    }  # fmt: skip
    file, store = tmp_path / "run.yaml", tmp_path / "store"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tools.batch", "run", "--config", str(file)]
    environment = os.environ | {"MCNOTES_STORE": str(store), "OMP_NUM_THREADS": "1"}

    def start(*options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *options], cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip

    running, deadline = start(), time.monotonic() + 600
    while not list(store.glob("curve-*.checkpoint")):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline, "no epoch of a curve was finished"
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    trained = {path.name: path.stat().st_mtime_ns for path in store.glob("endpoint-*")}
    assert len(trained) == 2

    text, _ = (again := start()).communicate()
    assert again.returncode == 0, text
    assert {p.name: p.stat().st_mtime_ns for p in store.glob("endpoint-*")} == trained
    (record,) = results.load(tmp_path / "results")
    known = json.loads(json.dumps(record["curves"][0]))
    assert known["provenance"]["curve"]["seconds"] > 0

    changes = start("--set", "parameters={curve_epochs: 5}", "--", "--dry-run")
    plan = changes.communicate()[0]
    assert "rule curve:" in plan
    assert "rule endpoint:" not in plan
    assert "rule alignment:" not in plan
    assert "Nothing to be done" in start().communicate()[0]

    with pytest.MonkeyPatch.context() as patch:  # the same without a kill
        patch.setenv("MCNOTES_STORE", str(tmp_path / "other"))
        values = presets.load("smoke") | config["parameters"]
        lab = Experiment.of(values, also=["pairs"])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the steps ran
        direct = lab.path(1, 2, "aligned", "bezier")
        torch.set_num_threads(threads)
    for name, array in direct._asdict().items():
        assert known[name] == array.tolist(), f"{name} differs after the kill"
