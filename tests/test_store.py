"""The store: load or compute, atomic, under kills, broken files, full disks and two processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mcnotes import store
from mcnotes.store import Checkpoint, StoreWarning

CONFIG = {"what": "thing", "seed": 1, "sizes": [1, 2]}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MCNOTES_ZOO", str(tmp_path / "zoo"))


def make(_: Checkpoint) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(3.0), "n": torch.tensor(7)}


def never(_: Checkpoint) -> dict[str, torch.Tensor]:
    raise AssertionError("computed again")


def test_computed_once() -> None:
    first = store.tensors(CONFIG, make)
    again = store.tensors(CONFIG, never)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert store.values({"what": "number"}, lambda: {"a": [1, 2.5]}) == {"a": [1, 2.5]}
    assert store.values({"what": "number"}, lambda: never) == {"a": [1, 2.5]}


def test_key_ignores_order_and_sees_values() -> None:
    assert store.key({"a": 1, "b": 2}) == store.key({"b": 2, "a": 1})
    assert store.key({"a": 1}) != store.key({"a": 2})
    with pytest.raises(TypeError, match="JSON values only"):
        store.key({"a": torch.zeros(1)})
    with pytest.raises(TypeError, match="JSON values only"):
        store.key({"a": float("nan")})


def test_zoo_comes_first_and_is_said() -> None:
    store.tensors(CONFIG, make)
    store.folder().rename(store.zoo())
    assert store.tensors(CONFIG, never).keys() == {"x", "n"}
    assert "from the zoo" in store.report()
    assert not store.folder().exists(), "the zoo was enough"


def test_configuration_is_kept_beside_the_result() -> None:
    store.tensors(CONFIG, make)
    store.values(CONFIG, lambda: 1)
    for suffix in (".safetensors", ".json"):
        assert store.read_config(store.folder() / store.file_name(CONFIG, suffix)) == CONFIG


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file_is_set_aside(keep: int) -> None:
    store.tensors(CONFIG, make)
    path = store.folder() / store.file_name(CONFIG, ".safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(StoreWarning, match="set aside"):
        again = store.tensors(CONFIG, make)
    assert torch.equal(again["x"], torch.arange(3.0))
    assert path.with_name(path.name + ".broken").exists()
    store.tensors(CONFIG, never)


def test_truncated_json_is_set_aside() -> None:
    store.values(CONFIG, lambda: [1, 2, 3])
    path = store.folder() / store.file_name(CONFIG, ".json")
    path.write_text(path.read_text()[:-4])
    with pytest.warns(StoreWarning, match="computing again"):
        assert store.values(CONFIG, lambda: [1, 2, 3]) == [1, 2, 3]


def test_full_disk_loses_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_atomic", full)
    with pytest.warns(StoreWarning, match="No space left"):
        assert torch.equal(store.tensors(CONFIG, make)["x"], torch.arange(3.0))
    checkpoint = Checkpoint(store.folder() / "c")
    with pytest.warns(StoreWarning, match="going on without"):
        checkpoint.save({"x": torch.zeros(1)})
    checkpoint.save({"x": torch.zeros(1)})  # warned once


def test_failed_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from mcnotes import store
steps = ["fsync", "replace"]
fatal, count = sys.argv[1], int(sys.argv[2])
real = getattr(os, fatal)
def deadly(*args, **kw):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kw)
setattr(os, fatal, deadly)
def work(checkpoint):
    state = checkpoint.load() or {"i": torch.zeros((), dtype=torch.int64)}
    for i in range(int(state["i"]), 3):
        checkpoint.save({"i": torch.tensor(i + 1)})
    return {"x": torch.tensor([1.0, 2.0])}
store.tensors({"what": "killed"}, work)
"""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_kill_at_every_write(call: str, nth: int) -> None:
    dead = subprocess.run([sys.executable, "-c", KILLED, call, str(nth)], check=False)
    assert dead.returncode == -9
    path = store.folder() / store.file_name({"what": "killed"}, ".safetensors")
    assert not path.exists()
    done = subprocess.run([sys.executable, "-c", KILLED, call, "99"], check=False)
    assert done.returncode == 0
    assert torch.equal(store.read_tensors(path)["x"], torch.tensor([1.0, 2.0]))
    assert not list(store.folder().glob("*.checkpoint"))


SLOW = """
import time, torch, sys
from pathlib import Path
from mcnotes import store
def work(_):
    with open(sys.argv[1], "a") as log: log.write("computed\\n")
    time.sleep(0.5)
    return {"x": torch.ones(1)}
print(store.tensors({"what": "shared"}, work)["x"].item())
"""


def test_two_processes_compute_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [subprocess.Popen([sys.executable, "-c", SLOW, str(log)]) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert log.read_text() == "computed\n"


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = subprocess.Popen([sys.executable, "-c", SLOW, str(log)])
    while not log.exists():
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = subprocess.run([sys.executable, "-c", SLOW, str(log)], timeout=60, check=False)
    assert done.returncode == 0
    assert log.read_text() == "computed\n" * 2


def test_json_entry_reads_as_text() -> None:
    store.values(CONFIG, lambda: 0.5)
    entry = json.loads((store.folder() / store.file_name(CONFIG, ".json")).read_text())
    assert entry["value"] == 0.5
    assert entry["config"] == CONFIG
    assert entry["provenance"]["torch"] == torch.__version__
