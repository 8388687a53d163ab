"""Full-scale runs: what is refused before anything runs; kill, resume, and do nothing twice."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from mcnotes import cache
from mcnotes.lab import Experiment, results
from tools import batch, chapters, notebooks, presets

DEAF = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's `nohup … &` does
os.execv(sys.argv[1], sys.argv[1:])"""

LATE = """import time
kernel = get_ipython().kernel
publish = kernel._publish_status
def late(status, *rest, **named):
    time.sleep(5 * (status == "idle"))
    publish(status, *rest, **named)
kernel._publish_status = late
print("done")"""

ROOT = presets.ROOT
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)


class TestPlan:
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"preset": ["smoke"]}, "the configuration: got name 'preset'; did you mean 'presets'"),
            ({"presets": []}, r"presets: got \[\], expected a list"),
            ({"presets": ["smok"]}, "no preset 'smok'.*did you mean 'smoke'"),
            (
                {"methods": ["alligned"]},
                "methods: got 'alligned', expected one of.*did you mean 'aligned'",
            ),
            ({"shapes": ["spiral"]}, "shapes: got 'spiral'"),
            ({"parameters": {"epoch": 3}}, "no parameter 'epoch'; did you mean 'epochs'"),
            ({"parameters": {"epochs": "3"}}, "epochs = '3' is of type str"),
            ({"parameters": {"points": 1}}, "'smoke'.*points: got 1, expected .* at least 2"),
            ({"parameters": {"points": 10**10}}, "points: got 10000000000, expected .* to 1000000"),
            ({"parameters": {"pairs": [[1, 2**60]]}}, "pairs: .* expected a pair of seeds"),
            ({"parameters": {"pam_options": {"p_epochs": 10**9}}}, "p_epochs: got 1000000000"),
            ({"parameters": {"match_images": 1}}, "match_images: got 1"),
            ({"parameters": {"epochs": 0}}, "epochs: got 0"),
            ({"parameters": {"epochs": 2.5}}, "epochs: got 2.5, expected a whole number"),
            ({"parameters": {"curve_epochs": None}}, "curve_epochs: got None"),
            ({"parameters": {"width": 0}}, "width: got 0"),
            ({"parameters": {"network": "tiny"}}, "network: got 'tiny'.*mean 'tinyten'"),
            ({"parameters": {"device": "tpu"}}, "device: got 'tpu'.*auto, cpu, cuda"),
            ({"parameters": {"lr": float("nan")}}, "lr: got nan"),
            ({"parameters": {"statistics": 0}}, "statistics: got 0"),
            ({"parameters": {"pairs": []}}, "pairs: got \\[\\]"),
            ({"parameters": {"pairs": [[1]]}}, "pairs: got \\[1\\], expected a pair"),
            ({"parameters": {"pairs": [[1, 2, 3]]}}, "pairs: got \\[1, 2, 3\\]"),
            ({"parameters": {"pairs": [[1, 1]]}}, "two different seeds"),
            ({"parameters": {"pam_options": {"sample": 3}}}, "did you mean 'samples'"),
            ({"parameters": 3}, "parameters: got 3, expected names and values"),
            ({"parameters": ["epochs"]}, "parameters: got .* names and values"),
            ({"presets": [1]}, "presets: got 1, expected some text"),
            ({"presets": [["smoke"]]}, "presets: got \\['smoke'\\], expected some text"),
            ({"presets": ["smoke", "smoke"]}, "presets: .*'smoke' only once"),
            ({"presets": ["../presets/smoke"]}, "no preset '../presets/smoke'"),
            ({"presets": [str(presets.FOLDER / "smoke")]}, "no preset '/.*smoke'"),
            ({"presets": ["./smoke"]}, "no preset './smoke'.*; did you mean 'smoke'"),
            ({"presets": ["robust/../smoke"]}, "no preset 'robust/../smoke'"),
            ({"methods": ["aligned", "aligned"]}, "methods: .*'aligned' only once"),
            ({"methods": "aligned"}, "methods: got 'aligned', expected a list"),
            ({"runs_per_gpu": 0}, "runs_per_gpu: got 0, expected a whole number"),
            ({"runs_per_gpu": "4"}, "runs_per_gpu: got '4'"),
            ({"runs_per_gpu": True}, "runs_per_gpu: got True"),
            ({"out": None}, "out: got None"),
            ({"out": "runs/{x}"}, "out: got 'runs/{x}', expected .* without braces"),
            ({"results": ["a"]}, "results: got"),
            ({"out": ""}, "out: got '', expected the name of a folder"),
            ({"out": "-runs"}, "out: got '-runs', expected .* no - in front"),
            ({"results": "a\nb"}, "results: got .*printable"),
            ({"out": "README.md"}, "out: got .*a folder: .*README.md is a file"),
            ({"results": "README.md/deeper"}, "results: got .*a folder: .*README.md is a file"),
            ({"presets": ["a{b}"]}, "presets: got 'a{b}', expected .*without braces"),
        ],
    )
    def test_a_mistake_is_named_before_anything_runs(
        self, config: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            batch.plan(config)

    def test_a_few_of_several_options_may_be_changed(self) -> None:
        config = {"presets": ["cpu-tinyten-cifar10"], "parameters": {"pam_options": {"samples": 8}}}
        (values,) = batch.plan(config).values()
        known = presets.load("cpu-tinyten-cifar10")["pam_options"]
        assert values["pam_options"] == known | {"samples": 8}

    def test_more_images_than_the_data_has_is_refused(self) -> None:
        runs = batch.plan({"presets": ["smoke"], "parameters": {"statistics": 10_001}})
        with pytest.raises(batch.PlanError, match=r"'smoke': .*statistics: got 10001.*most 10000"):
            batch.check_machine(runs)
        batch.check_machine(
            batch.plan({"presets": ["smoke"], "parameters": {"statistics": 10_000}})
        )

    def test_outputs_and_a_store_that_cannot_be_written_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before networks are trained, whose numbers nobody could keep."""
        runs = batch.plan({"presets": ["smoke"]})
        monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
        batch.check_machine(runs, [tmp_path / "a" / "b"])
        assert list((tmp_path / "a" / "b").iterdir()) == []
        nowhere = Path("/proc/here")
        with pytest.raises(batch.PlanError, match=r"/proc/here: .*choose a folder that can be"):
            batch.check_machine(runs, [tmp_path, nowhere])
        monkeypatch.setenv("MCNOTES_STORE", str(nowhere))
        with pytest.raises(batch.PlanError, match="/proc/here"):
            batch.check_machine(runs)

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
        monkeypatch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(batch.PlanError, match=r"store: .*No space left"):
            batch.check_machine(runs)

    def test_what_is_set_adds_to_what_the_file_sets(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mappings name by name, at any depth, from wherever they come."""
        said = ["parameters={curve_epochs: 2, pam_options: {samples: 3}}", "methods=[aligned]"]
        said.append("parameters={epochs: 3, pam_options: {p_epochs: 4}}")
        found = batch.merged(
            {"parameters": {"width": 6, "pam_options": {"samples": 1, "probe": 5}}},
            batch.assignments(said),
        )
        inner = {"samples": 3, "probe": 5, "p_epochs": 4}
        parameters = {"width": 6, "epochs": 3, "curve_epochs": 2, "pam_options": inner}
        assert found == {"parameters": parameters, "methods": ["aligned"]}
        (tmp_path / "run.yaml").write_text("presets: [smoke]\nparameters: {width: 6}")
        planned = list[dict[str, Any]]()

        def stop(config: dict[str, Any]) -> None:
            planned.append(config)
            raise batch.PlanError

        monkeypatch.setattr(batch, "plan", stop)
        with pytest.raises(batch.PlanError):
            batch.run(tmp_path / "run.yaml", {"parameters": {"epochs": 3}}, [])
        assert planned[0]["parameters"] == {"width": 6, "epochs": 3}

    @pytest.mark.parametrize(
        "words", [["methods=[a]", "methods=[b]"], ["out=a", "out=a"], ["x={a: 1}", "x=1"]]
    )
    def test_two_values_of_one_name_are_refused(self, words: list[str]) -> None:
        with pytest.raises(batch.PlanError, match=r"got two values, .*, expected one"):
            batch.assignments(words)

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

    @given(JSON)
    @example("one\ntwo\n")
    @example({"a: b": ["it's", '"', "\x85\u2028\t\\", None, {}], "": [[], [[1]]]})
    @example("e" * 3000 + " " + "ü😀\ud800\x00\x7f" * 100)
    @example(["null", "1e-3", "yes", "~", "2001-01-01", "# no", "- a", "{x}", "$HOME `id` \\"])
    @example([1e-05, 1e300, -0.0, float("inf"), 10**30])
    def test_every_value_comes_back_from_its_words(self, value: Any) -> None:
        text = batch.words("results", {"x": value, "y": value})
        assert "\n" not in text
        assert text.isascii()
        assert batch.assignments(shlex.split(text)) == {"x": value, "y": value}

    def test_a_shell_hands_on_every_value(self) -> None:
        values = {"x": "a\n\n b'\"$HOME`\\ ü😀", "y": [None, "two\nlines", [1, {"a": "\n"}]]}
        command = f"printf '%s\\0' {batch.words('results', values)}"
        told = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert batch.assignments(told.stdout.split("\0")[:-1]) == values

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


class TestCommand:
    """What is wrong with a command is said in one line, and its exit status is not 0."""

    def says(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tools.batch", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        assert done.returncode not in (0, None)
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "cannot be read: .*No such file"),
            (b"presets: [smoke", "not plain YAML"),
            (b"presets: [smoke]\n\tout: x", "not plain YAML"),
            (b"- smoke", "got a list, expected `name: value` lines"),
            (b"smoke", "got a str, expected `name: value` lines"),
            (b"presets: !!python/object/apply:os.system ['true']", "not plain YAML"),
            (b"presets: !names [smoke]", "not plain YAML"),
            (b"runs_per_gpu: !!int four", "not plain YAML"),
            (b"out: !!timestamp later", "not plain YAML"),
            (b"presets: [smoke]\npresets: [laptop]", "'presets' appears twice"),
            (b"\xff\xfe\x00", "cannot be read|not plain YAML"),
            (b"parameters: 3", "parameters: got 3"),
            (b"presets: [1]", "presets: got 1"),
            (b"presets: &a [*a]", "presets: got"),
            (b"1: 2", "got name 1"),
        ],
    )
    def test_a_wrong_configuration(
        self, content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In this process, since a new one takes seconds."""
        file = tmp_path / "run.yaml"
        if content is not None:
            file.write_bytes(content)
        monkeypatch.setattr(subprocess, "run", None)
        with pytest.raises(ValueError, match=says) as caught:
            batch.main(["run", "--config", str(file)])
        assert "\n" not in str(caught.value)

    def test_a_folder_for_a_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"cannot be read: .*directory"):
            batch.main(["run", "--config", str(tmp_path)])

    def test_in_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "broken.yaml").write_text("presets: [smoke\nout: x\n")
        assert "broken.yaml: not plain YAML" in self.says(
            "run", "--config", str(tmp_path / "broken.yaml")
        )
        assert "not plain YAML" in self.says("run", "--set", "presets=[smoke")
        missing = str(tmp_path / "none.ipynb")
        assert "none.ipynb" in self.says("step", missing, str(tmp_path / "out.ipynb"))

    def test_a_limit_that_is_none_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(subprocess, "run", None)
        (tmp_path / "run.yaml").write_text("presets: [smoke]")
        for wrong in ("soon", "-1", "1.5", "1h", "nan"):
            monkeypatch.setenv("MCNOTES_CELL_TIMEOUT", wrong)
            with pytest.raises(ValueError, match=f"MCNOTES_CELL_TIMEOUT: got '{wrong}', expected"):
                batch.main(["run", "--config", str(tmp_path / "run.yaml")])

    def test_a_number_of_runs_that_is_none_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        for wrong in ("0", "many"):
            monkeypatch.setenv("MCNOTES_RUNS_PER_GPU", wrong)
            with pytest.raises(ValueError, match="MCNOTES_RUNS_PER_GPU: got"), batch.gpu("auto"):
                pass


class TestLimit:
    """A cell may take as long as it needs, unless a limit is set."""

    def slow(self, folder: Path) -> Path:
        cells = [new_code_cell("seconds = 3", metadata={"tags": ["parameters"]})]
        cells.append(new_code_cell("import time\ntime.sleep(seconds)\nprint('done')"))
        notebooks.write(folder / "slow.ipynb", new_notebook(cells=cells))
        return folder / "slow.ipynb"

    def test_a_step_goes_on_past_what_was_the_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MCNOTES_CELL_TIMEOUT", raising=False)
        monkeypatch.setattr(chapters, "CELL_TIMEOUT", 1, raising=False)  # once 1800
        batch.step(self.slow(tmp_path), tmp_path / "out.ipynb", {})
        assert notebooks.read(tmp_path / "out.ipynb").cells[-1].outputs[0].text == "done\n"

    def test_output_that_comes_late_is_waited_for(self, tmp_path: Path) -> None:
        """As after a cell that ended at the moment at which the machine was suspended."""
        cells = [new_code_cell("", metadata={"tags": ["parameters"]}), new_code_cell(LATE)]
        notebooks.write(tmp_path / "late.ipynb", new_notebook(cells=cells))
        batch.step(tmp_path / "late.ipynb", tmp_path / "out.ipynb", {})
        assert notebooks.read(tmp_path / "out.ipynb").cells[-1].outputs[0].text == "done\n"

    def test_a_limit_that_is_set_holds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MCNOTES_CELL_TIMEOUT", "1")
        with pytest.raises(RuntimeError, match="longer than the 1 seconds of MCNOTES_CELL_TIMEOUT"):
            batch.step(self.slow(tmp_path), tmp_path / "out.ipynb", {"seconds": 30})
        assert not (tmp_path / "out.ipynb").exists()

    def test_none_is_set_but_in_tests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, limit in {"": None, "0": None, "7": 7}.items():
            monkeypatch.setenv("MCNOTES_CELL_TIMEOUT", value)
            assert chapters.cell_timeout() == limit
        make = subprocess.run(
            ["make", "-n", "test", "smoke", "book", "notebooks", "figures", "zoo"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        ).stdout.splitlines()
        limited = [line for line in make if "MCNOTES_CELL_TIMEOUT" in line]
        assert any("tools.book run --preset smoke" in line for line in limited)
        assert all("pytest" in line or "--preset smoke" in line for line in limited)


class TestRecord:
    def record(self) -> results.Record:
        path = {"t": [0, 0.5, 1], "arc": [0, 1, 2], "loss": [0.1, 1, 0.1], "accuracy": [0.9, 0, 1]}
        named = {"pair": [1, 2], "method": "aligned", "shape": "bezier"}
        here = {"hardware": "a laptop", "torch": "2"}
        parts = {"path": here | {"seconds": 1.5}, "curve": here | {"seconds": 2}}
        curve = named | path | {"versions": {"endpoint": 1}, "provenance": parts}
        nets = [{"seed": 1, "provenance": here | {"seconds": 3}}]
        return {
            "format": results.FORMAT,
            "preset": "p",
            "experiment": {"width": 4},
            "endpoints": nets,
            "curves": [curve],
            "collected": "2026-01-01",
            "provenance": {},
        }

    def test_it_comes_back_from_its_file(self, tmp_path: Path) -> None:
        results.save(self.record(), tmp_path / "p.json")
        (tmp_path / "other.json").write_text('{"models": 80}')
        (found,) = results.load(tmp_path)
        assert found == self.record()
        assert results.seconds(found) == 6.5
        (path,) = results.paths(found, "aligned", "bezier")
        assert path.barrier == pytest.approx(0.9)
        assert results.paths(found, "unaligned", "bezier") == []

    def test_a_file_grows_by_what_is_measured_later(self, tmp_path: Path) -> None:
        """And keeps no curve that its experiment would no longer give."""
        file = tmp_path / "p.json"
        first, second, other = self.record(), self.record(), self.record()
        first["curves"] += [c | {"method": "pam-aligned"} for c in first["curves"]]
        results.save(first, file)
        second["experiment"] = {"width": 4, "pam_options": {"samples": 3}}
        second["curves"] = [second["curves"][0] | {"pair": [1, 3]}]
        second["endpoints"] = [net | {"seed": 3} for net in second["endpoints"]]
        results.save(second, file)
        (found,) = results.load(tmp_path)
        named = [(*c["pair"], c["method"]) for c in found["curves"]]
        assert named == [(1, 2, "aligned"), (1, 3, "aligned")], "PAM's settings are others"
        assert [net["seed"] for net in found["endpoints"]] == [1, 3]
        assert found["experiment"] == second["experiment"]
        results.save(self.record(), file)
        assert [c["pair"] for c in results.load(tmp_path)[0]["curves"]] == [[1, 2], [1, 3]]
        other["experiment"] = {"width": 5}
        results.save(other, file)
        assert results.load(tmp_path) == [other]
        file.write_text("{")
        with pytest.warns(cache.StoreWarning, match="set aside as p.json.broken"):
            results.save(other, file)
        assert results.load(tmp_path) == [other]
        assert (tmp_path / "p.json.broken").read_text() == "{"

    @pytest.mark.parametrize(
        ("kind", "method", "stays"),
        [
            ("endpoint", "unaligned", False),
            ("path", "aligned", False),
            ("matching", "aligned", False),
            ("matching", "unaligned", True),
            ("pam", "aligned", True),
            ("pam", "pam-unaligned", False),
        ],
    )
    def test_a_curve_of_an_older_version_is_measured_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, method: str, stays: bool
    ) -> None:
        """In a file that names its versions, and in one from before there were any."""
        for older in ({}, {"versions": dict(cache.VERSIONS)}):
            record = self.record()
            del record["curves"][0]["versions"]
            record["curves"] = [record["curves"][0] | older | {"method": method}]
            asked = (Experiment(width=4), [[1, 2]], [method], ["bezier"])
            with monkeypatch.context() as patch:
                assert results.holds(record, *asked)
                patch.setitem(cache.VERSIONS, kind, 2)
                assert results.holds(record, *asked) == stays
                new = self.record() | {"curves": [self.record()["curves"][0] | {"pair": [1, 3]}]}
                assert len(results.merged(new, record)["curves"]) == 1 + stays

    @pytest.mark.parametrize(("loss", "grows"), [(0.1 + 1e-8, True), (0.101, False)])
    def test_it_does_not_mix_networks_of_two_machines(
        self, tmp_path: Path, loss: float, grows: bool
    ) -> None:
        """The same seed may be another network: then its loss is another."""
        first, second = self.record(), self.record()
        results.save(first, tmp_path / "p.json")
        second["curves"] = [second["curves"][0] | {"method": "unaligned", "loss": [loss, 1, 0.1]}]
        results.save(second, tmp_path / "p.json")
        (found,) = results.load(tmp_path)
        assert len(found["curves"]) == 1 + grows

    def test_it_grows_between_networks_of_two_experiments(self, tmp_path: Path) -> None:
        ends = (Experiment(width=4), Experiment(width=4, lr=0.2))
        record = self.record() | {"experiment": asdict(Experiment(width=4, between=ends))}
        for method in ("aligned", "unaligned"):
            record["curves"] = [record["curves"][0] | {"method": method}]
            results.save(record, tmp_path / "p.json")
        assert len(results.load(tmp_path)[0]["curves"]) == 2

    def test_a_file_of_an_experiment_that_is_none_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "p.json").write_text(json.dumps(self.record() | {"experiment": {"width": -1}}))
        with pytest.warns(cache.StoreWarning, match="width: got -1"):
            results.save(self.record(), tmp_path / "p.json")
        assert results.load(tmp_path) == [self.record()]

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("accuracy", [0.9, 90, 1], "accuracy"),
            ("loss", [0.1, float("nan"), 0.1], "arc or loss"),
            ("t", [0, 1, 0.5], ": t\\."),
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

    @pytest.mark.parametrize(
        "text", ["{", "3", "null", "[]", '"preset"', "[" * 100_000, '["preset"]', '{"preset": 1}']
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "smoke.json").write_text(text)
        if text != "[]":
            with pytest.raises(results.ResultsError, match=r"smoke\.json.*collect it again"):
                results.load(tmp_path)
        config = {"presets": ["smoke"], "results": str(tmp_path)}
        assert batch.incomplete(config, batch.plan(config)) == [f"{tmp_path}/smoke.json"]

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            ("experiment", []),
            ("experiment", None),
            ("experiment", {"between": [1, 2]}),
            ("endpoints", 3),
            ("endpoints", [3]),
            ("curves", 3),
            ("curves", [3]),
            ("pair", 3),
            ("pair", None),
            ("pair", [1, 2, 3]),
            ("t", ["a", "b", "c"]),
            ("t", [[1], 2, 3]),
            ("loss", [None] * 3),
            ("method", [1]),
            ("arc", [0, None, 2]),
            ("versions", 3),
            ("versions", {"path": "x"}),
        ],
    )
    def test_whatever_is_wrong_in_a_file_it_is_one_sentence(
        self, tmp_path: Path, where: str, value: Any
    ) -> None:
        record, file = self.record(), tmp_path / "p.json"
        (record if where in record else record["curves"][0])[where] = value
        file.write_text(json.dumps(record))
        with pytest.raises(results.ResultsError, match=r"p\.json.*collect it again"):
            results.load(tmp_path)
        with pytest.warns(cache.StoreWarning, match="set aside"):
            results.save(self.record(), file)
        assert results.load(tmp_path) == [self.record()]

    @pytest.mark.parametrize(
        ("change", "again"),
        [
            ({}, False),
            ({"methods": ["aligned"]}, False),
            ({"methods": ["aligned", "pam-aligned"]}, True),
            ({"shapes": ["bezier", "line"]}, True),
            ({"parameters": {"pairs": [[1, 2], [3, 4], [5, 6], [7, 8]]}}, True),
            ({"parameters": {"curve_epochs": 13}}, True),
            ({"parameters": {"device": "cpu"}}, False),
        ],
    )
    def test_a_file_that_lacks_what_is_asked_for_is_collected_again(
        self, change: dict[str, Any], again: bool
    ) -> None:
        config = {"presets": ["laptop"]} | change
        expected = ["data/results/laptop.json"] if again else []
        assert batch.incomplete(config, batch.plan(config)) == expected

    def test_a_file_of_other_measurements_is_collected_again(self, tmp_path: Path) -> None:
        config = {"presets": ["laptop"], "results": str(tmp_path)}
        assert batch.incomplete(config, batch.plan(config)) == []  # Snakemake sees what is missing
        (tmp_path / "laptop.json").write_text('{"models": 80}')
        assert batch.incomplete(config, batch.plan(config)) == [f"{tmp_path}/laptop.json"]

    def test_every_record_of_the_book_is_sound_and_of_todays_code(self) -> None:
        for record in results.load(ROOT / "data" / "results"):
            lab = presets.experiment(record["experiment"])
            for curve in record["curves"]:
                asked = [curve["pair"]], [curve["method"]], [curve["shape"]]
                assert results.holds(record, lab, *asked), record["preset"]


def test_a_step_leaves_pytorch_to_its_notebook() -> None:
    """A batch has many steps, and on two cores PyTorch takes seconds to import."""
    code = "import sys, tools.batch; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert shown.stdout.split() == [b"False"]


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing running behind a test that failed."""
    with contextlib.suppress(ProcessLookupError):  # all of its group have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The whole graph at the smoke preset: stopped, killed within a curve, run again, run idle."""
    config = {
        "presets": ["smoke"],
        "parameters": {"curve_epochs": 40, "validation": 9_000},  # epochs of a tenth of a second
        "methods": ["aligned"],
        "out": str(tmp_path / "runs"),
        "results": str(tmp_path / "results"),
    }
    file, store = tmp_path / "run.yaml", tmp_path / "store"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tools.batch", "run", "--config", str(file)]
    environment = os.environ | {"MCNOTES_STORE": str(store), "OMP_NUM_THREADS": "1"}

    def start(*options: str, first: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*first, *command, *options],
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        request.addfinalizer(partial(end, process))
        return process

    def started_until(kind: str, first: Sequence[str] = ()) -> subprocess.Popen[str]:
        running, deadline = start(first=first), time.monotonic() + 600
        while not list(store.glob(f"{kind}-*")):
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline, f"no epoch of this kind was finished: {kind}"
            time.sleep(0.05)
        return running

    running = started_until("endpoint", [sys.executable, "-c", DEAF])
    family = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    said = running.communicate(timeout=100)[0]
    assert said.count("stopped: the same command goes on") > 1, "steps end by themselves, too"
    assert running.returncode == 128 + signal.SIGTERM
    assert len(family) > 1
    assert not psutil.wait_procs(family, timeout=10)[1], "SIGTERM stops the steps, too"

    running = started_until("curve")
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
