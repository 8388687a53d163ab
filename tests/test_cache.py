"""The store: load or compute, atomic, under kills, broken files, full disks and two processes."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import processes
import psutil
import pytest
import torch
from filelock import FileLock
from processes import end, start

from mcnotes import cache, data
from mcnotes.cache import Checkpoint, StoreWarning

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
    first = cache.tensors(CONFIG, make)
    again = cache.tensors(CONFIG, never)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert cache.values({"what": "number"}, lambda: {"a": [1, 2.5]}) == {"a": [1, 2.5]}
    assert cache.values({"what": "number"}, lambda: never) == {"a": [1, 2.5]}


def test_key_ignores_order_and_sees_values() -> None:
    assert cache.key({"a": 1, "b": 2}) == cache.key({"b": 2, "a": 1})
    assert cache.key({"a": 1}) != cache.key({"a": 2})
    with pytest.raises(TypeError, match="JSON values only"):
        cache.key({"a": torch.zeros(1)})
    with pytest.raises(TypeError, match="JSON values only"):
        cache.key({"a": float("nan")})


def test_zoo_comes_first_and_is_said() -> None:
    cache.tensors(CONFIG, make)
    cache.folder().rename(cache.zoo())
    assert cache.tensors(CONFIG, never).keys() == {"x", "n"}
    assert "from the zoo" in cache.report()
    assert not cache.folder().exists(), "the zoo was enough"


def test_configuration_is_kept_beside_the_result() -> None:
    cache.tensors(CONFIG, make)
    cache.values(CONFIG, lambda: 1)
    for suffix in (".safetensors", ".json"):
        assert cache.read_config(cache.folder() / cache.file_name(CONFIG, suffix)) == CONFIG


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file_is_set_aside(keep: int) -> None:
    cache.tensors(CONFIG, make)
    path = cache.folder() / cache.file_name(CONFIG, ".safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(StoreWarning, match="set aside"):
        again = cache.tensors(CONFIG, make)
    assert torch.equal(again["x"], torch.arange(3.0))
    assert path.with_name(path.name + ".broken").exists()
    cache.tensors(CONFIG, never)


def test_truncated_json_is_set_aside() -> None:
    cache.values(CONFIG, lambda: [1, 2, 3])
    path = cache.folder() / cache.file_name(CONFIG, ".json")
    path.write_text(path.read_text()[:-4])
    with pytest.warns(StoreWarning, match="computing again"):
        assert cache.values(CONFIG, lambda: [1, 2, 3]) == [1, 2, 3]


def test_full_disk_loses_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_atomic", full)
    with pytest.warns(StoreWarning, match="No space left"):
        assert torch.equal(cache.tensors(CONFIG, make)["x"], torch.arange(3.0))
    checkpoint = Checkpoint(cache.folder() / "c")
    with pytest.warns(StoreWarning, match="going on without"):
        checkpoint.save({"x": torch.zeros(1)})
    checkpoint.save({"x": torch.zeros(1)})  # warned once


@contextlib.contextmanager
def mounted(path: Path, *commands: list[str]) -> Iterator[None]:
    """File systems that are what no permission stops root from: full, or read-only."""
    path.mkdir(exist_ok=True)
    try:
        for command in commands:
            done = subprocess.run(["mount", *command], capture_output=True, check=False)
            if done.returncode:
                pytest.skip("mounting is not allowed here")
        yield
    finally:
        while not subprocess.run(["umount", path], capture_output=True, check=False).returncode:
            pass


def unwritable(kind: str, monkeypatch: pytest.MonkeyPatch) -> contextlib.ExitStack:
    """Make the store one that cannot be written to, in one of several ways."""
    where, stack = cache.folder(), contextlib.ExitStack()
    small = ["-t", "tmpfs", "-o", "size=1m,nr_inodes=4", "none", str(where)]
    fixed = ["-o", "remount,ro", str(where)]
    if kind == "a file":
        where.write_text("no folder")
    elif kind == "within a file":
        where.write_text("no folder")
        monkeypatch.setenv("MCNOTES_STORE", str(where / "store"))
    elif kind == "a dangling link":
        where.symlink_to("nowhere/at/all")
    elif kind in ("read-only", "read-only with locks"):
        stack.enter_context(mounted(where, small))
        if kind == "read-only with locks":
            (where / "locks").mkdir()
        subprocess.run(["mount", *fixed], check=True)
    elif kind in ("without inodes", "without inodes, with locks"):
        stack.enter_context(mounted(where, small))
        if kind != "without inodes":
            (where / "locks").mkdir()
        with contextlib.suppress(OSError):
            for i in range(9):
                (where / f"{i}").touch()
    else:  # every call that would change something fails, the last one too
        refused = OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

        def refuse(*_: object, **__: object) -> None:
            raise refused

        (where / "locks").mkdir(parents=True)
        opened = Path.open

        def read_only(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
            return refuse() if "w" in mode else opened(self, mode, *rest, **options)

        monkeypatch.setattr(Path, "open", read_only)
        for name in ("unlink", "mkdir", "touch"):
            monkeypatch.setattr(Path, name, refuse)
        monkeypatch.setattr(os, "replace", refuse)
        monkeypatch.setattr(FileLock, "acquire", refuse)
    return stack


UNWRITABLE = (
    "a file",
    "within a file",
    "a dangling link",
    "read-only",
    "read-only with locks",
    "without inodes",
    "without inodes, with locks",
    "EROFS",
    "ENOSPC",
    "EDQUOT",
    "EACCES",
    "ENOLCK",
)


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_store_that_cannot_be_written_loses_no_result(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        for i in range(3):
            assert checkpoint.load() is None
            checkpoint.save({"x": torch.tensor(i)})
        return make(checkpoint)

    with unwritable(kind, monkeypatch), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = cache.tensors(CONFIG, compute)
        number = cache.values(CONFIG, lambda: {"a": (1, float("inf"))})
        monkeypatch.undo()
    assert {warning.category for warning in said} == {StoreWarning}
    assert sum("used but not kept" in str(warning.message) for warning in said) == 2
    assert torch.equal(found["x"], torch.arange(3.0))
    assert number == {"a": [1, float("inf")]}, "as it would be loaded"


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_what_could_not_be_kept_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Not by this process; and it is kept as soon as there is room."""
    real, times = cache.write_atomic, list[int]()

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def compute(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        times.append(1)
        return make(checkpoint)

    def found() -> Any:
        if suffix == ".json":
            return cache.values(CONFIG, lambda: compute(Checkpoint(Path()))["x"].tolist())
        return cache.tensors(CONFIG, compute)["x"].tolist()

    monkeypatch.setattr(cache, "_unkept", {})
    monkeypatch.setattr(cache, "write_atomic", full)
    with pytest.warns(StoreWarning, match="No space left"):
        first = found()
    with pytest.warns(StoreWarning, match="No space left"):
        second = found()
    first.clear()  # what one caller does to it, another does not see
    monkeypatch.setattr(cache, "write_atomic", real)
    third, fourth = found(), found()
    assert second == third == fourth != first
    assert times == [1]
    assert cache._unkept == {}
    assert list(cache.folder().glob(f"*{suffix}"))


def test_a_lock_that_could_not_be_released_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the entry could not be kept either, the next call asks for the lock once more."""
    real = fcntl.flock

    def stuck(file: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, "Input/output error")
        real(file, operation)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", stuck)
        patch.setattr(cache, "write_atomic", full)
        with pytest.warns(StoreWarning, match="No space left"):
            assert cache.values(CONFIG, lambda: 5) == 5
    with pytest.warns(StoreWarning, match="already held"):
        assert cache.values(CONFIG, lambda: 6) == 5


def test_what_could_not_be_kept_goes_on_from_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, steps = cache.write_atomic, []

    def full(path: Path, content: bytes) -> None:
        if path.suffix != ".checkpoint":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    def compute(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        if not checkpoint.load():
            steps.append(1)
            checkpoint.save({"x": torch.zeros(1)})
        return make(checkpoint)

    monkeypatch.setattr(cache, "write_atomic", full)
    with pytest.warns(StoreWarning, match="No space left"):
        cache.tensors(CONFIG, compute)
    monkeypatch.setattr(cache, "write_atomic", real)
    cache._unkept.clear()  # as in the next process
    cache.tensors(CONFIG, compute)
    assert steps == [1]
    assert not list(cache.folder().glob("*.checkpoint"))


def test_tensors_that_share_memory_are_kept() -> None:
    x = torch.arange(6.0)
    found = cache.tensors(CONFIG, lambda _: {"a": x, "b": x, "c": x[2:4], "d": x.view(2, 3).T})
    assert torch.equal(found["c"], x[2:4])
    assert torch.equal(found["d"], x.view(2, 3).T)
    cache.tensors(CONFIG, never)


# --- Files that are wrong ---------------------------------------------------------------------

OTHER = CONFIG | {"seed": 2}


def entry(config: dict[str, Any], suffix: str) -> Path:
    """An entry of `config`, made if there is none: the same value for every configuration."""
    if suffix == ".json":
        cache.values(config, lambda: [i / 7 for i in range(40)])
    else:
        cache.tensors(config, make)
    return cache.folder() / cache.file_name(config, suffix)


def take(suffix: str) -> str:
    """The value of CONFIG's entry, by its bits; "computed" if it was computed."""
    if suffix == ".json":
        return repr(cache.values(CONFIG, lambda: "computed"))
    found = cache.tensors(CONFIG, lambda _: {"computed": torch.zeros(0)})
    return repr({n: (x.dtype, x.shape, x.numpy().tobytes()) for n, x in sorted(found.items())})


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_an_entry_of_another_configuration_is_not_taken(suffix: str) -> None:
    path = cache.folder() / cache.file_name(CONFIG, suffix)
    other = shutil.copy(entry(OTHER, suffix), path).read_bytes()
    with pytest.warns(StoreWarning, match="belongs to another configuration.*'seed': 2.*set aside"):
        assert "computed" in take(suffix)
    assert cache.read_config(path) == CONFIG
    assert path.with_name(path.name + ".broken").read_bytes() == other, "nothing is lost"


def test_a_checkpoint_of_another_configuration_is_not_taken(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c", OTHER).save({"x": torch.zeros(1)})
    with pytest.warns(StoreWarning, match="belongs to another configuration"):
        assert Checkpoint(tmp_path / "c", CONFIG).load() is None
    assert Checkpoint(tmp_path / "c.broken", OTHER).load()


def counted(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    state = checkpoint.load() or {"x": torch.zeros(())}
    return {"x": state["x"] + 1}


def unfinished(config: dict[str, object]) -> Path:
    """A checkpoint of this entry that came from another machine, after 3 steps and 50 seconds."""
    path = cache.zoo() / "unfinished" / f"{cache.file_name(CONFIG, '.safetensors')}.checkpoint"
    there = Checkpoint(path, config)
    there._before = 50.0
    there.save({"x": torch.tensor(3.0)})
    return path


def test_work_goes_on_from_a_checkpoint_that_came_with_the_zoo() -> None:
    path = unfinished(cache._versioned(CONFIG))
    before = path.read_bytes()
    assert cache.tensors(CONFIG, counted)["x"] == 4
    (entry,) = cache.folder().glob("*.safetensors")
    assert cache.read(entry).origin["seconds"] >= 50
    assert path.read_bytes() == before, "it stays as it is"


def test_this_machine_s_own_checkpoint_comes_first() -> None:
    path = unfinished(cache._versioned(CONFIG))
    Checkpoint(cache.folder() / path.name, cache._versioned(CONFIG)).save({"x": torch.tensor(8.0)})
    assert cache.tensors(CONFIG, counted)["x"] == 9


@pytest.mark.parametrize("fault", ["another configuration", "damage", "older code"])
def test_a_shipped_checkpoint_that_does_not_fit_is_left_alone(fault: str) -> None:
    path = unfinished(OTHER if fault.startswith("another") else cache._versioned(CONFIG))
    if fault == "damage":
        path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()

    def compute(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        if checkpoint.load() is not None:
            checkpoint.set_aside(ValueError("it lacks a name"))
        assert checkpoint.load() is None, "one warning, and it is not offered again"
        return {"x": torch.ones(())}

    with pytest.warns(StoreWarning, match="not used"):
        assert cache.tensors(CONFIG, compute)["x"] == 1
    assert path.read_bytes() == before


def without_hash(path: Path) -> None:
    """As older versions wrote it."""
    old = cache.read(path)
    if path.suffix == ".json":
        parts = {"config": old.config, "provenance": old.origin, "value": old.value}
        path.write_text(json.dumps(parts))
    else:
        from safetensors.torch import save_file

        parts = {"config": json.dumps(old.config), "provenance": json.dumps(old.origin)}
        save_file(old.value, path, parts)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_an_entry_without_a_hash_is_not_trusted(suffix: str) -> None:
    path = entry(CONFIG, suffix)
    without_hash(path)
    with pytest.warns(StoreWarning, match=r"no hash of its content.*set aside as .*\.broken"):
        assert "computed" in take(suffix)
    without_hash(path)
    with pytest.warns(StoreWarning, match=r"no hash of its content.*set aside as .*\.broken1"):
        assert "computed" in take(suffix)


def damage(content: bytes, random: Random) -> bytes:
    """One to three flipped bits, or a tail or a page of zeros, or a tail that is missing."""
    changed, n = bytearray(content), len(content)
    what = random.randrange(5)
    if what < 2:
        for _ in range(random.randint(1, 3)):
            changed[random.randrange(n)] ^= 1 << random.randrange(8)
    elif what == 2:
        start = random.randrange(n)
        changed[start:] = bytes(n - start)
    elif what == 3:
        start = random.randrange(n)
        changed[start : start + 64] = bytes(len(changed[start : start + 64]))
    else:
        del changed[random.randrange(n) :]
    return bytes(changed)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.filterwarnings("ignore::mcnotes.cache.StoreWarning")
def test_no_damage_goes_unseen(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,200 damaged files of each kind: what is returned is what was kept, or it is computed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path, random = entry(CONFIG, suffix), Random(1)
    content, truth = path.read_bytes(), take(suffix)
    silent, again = 0, 0
    for _ in range(1200):
        path.write_bytes(damage(content, random))
        found = take(suffix)
        again += "computed" in found
        silent += "computed" not in found and found != truth
        for broken in cache.folder().glob("*.broken*"):
            broken.unlink()
    assert silent == 0
    assert again > 1000, "damage was hardly ever done"


@pytest.mark.filterwarnings("ignore::mcnotes.cache.StoreWarning")
def test_no_damage_of_a_checkpoint_goes_unseen(tmp_path: Path) -> None:
    checkpoint, random = Checkpoint(tmp_path / "c", CONFIG), Random(2)
    state = {"phi": torch.randn(2, 7), "losses": torch.zeros(3, dtype=torch.float64)}
    checkpoint.save(state)
    content = checkpoint.path.read_bytes()
    for _ in range(1200):
        checkpoint.path.write_bytes(damage(content, random))
        found = checkpoint.load()
        assert found is None or all(torch.equal(found[n], x) for n, x in state.items())
        for broken in tmp_path.glob("*.broken*"):
            broken.unlink()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("fault", ["content", "hash", "configuration"])
def test_a_shipped_entry_is_never_touched(suffix: str, fault: str) -> None:
    """Wrong or not: the zoo is the repository's. What is computed instead goes to the store."""
    path = entry(CONFIG, suffix)
    if fault == "content":
        path.write_bytes(path.read_bytes()[:-9])
    elif fault == "hash":
        without_hash(path)
    else:
        shutil.copy(entry(OTHER, suffix), path)
    cache.folder().rename(cache.zoo())
    before = {p.name: p.read_bytes() for p in cache.zoo().glob("*.*")}
    with pytest.warns(StoreWarning, match="zoo.*not used, computing again"):
        first = take(suffix)
    assert "computed" in first
    assert {p.name: p.read_bytes() for p in cache.zoo().glob("*.*")} == before
    with pytest.warns(StoreWarning, match="zoo.*not used"):
        assert take(suffix) == first
    assert cache.origin(CONFIG), "the store's"
    assert [p.suffix for p in cache.folder().glob("*.*")] == [suffix]


def test_nothing_is_set_aside_when_the_store_is_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry(CONFIG, ".json")
    monkeypatch.setenv("MCNOTES_ZOO", str(cache.folder()))
    path.write_bytes(b"{")
    with pytest.warns(StoreWarning, match="not used"):
        assert "computed" in take(".json")
    assert not list(cache.folder().glob("*.broken*"))


# --- Files that cannot be read ----------------------------------------------------------------


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAUSES", (0.0, 0.0, 0.0), raising=False)


def unreadable(path: Path, code: int, monkeypatch: pytest.MonkeyPatch, times: int = 99) -> None:
    """The next `times` that the file is read it fails."""
    real, left = Path.read_bytes, [times]

    def read(self: Path) -> bytes:
        if self == path and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("shipped", [False, True])
def test_what_cannot_be_read_is_not_touched(
    code: int, suffix: str, shipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, truth = entry(CONFIG, suffix), take(suffix)
    if shipped:
        cache.folder().rename(cache.zoo())
        path = cache.zoo() / path.name
    before = path.read_bytes()
    unreadable(path, code, monkeypatch)
    with pytest.raises(OSError, match="nothing was changed: make the file readable") as caught:
        take(suffix)
    assert caught.value.errno == code
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p for p in path.parent.iterdir() if p.name != "locks"] == [path]
    monkeypatch.setenv("MCNOTES_STORE", str(path.parent))
    monkeypatch.setattr(cache, "PAUSES", (0.0, 0.0, 0.0), raising=False)
    unreadable(path, code, monkeypatch, times=3)
    assert take(suffix) == truth, "a hiccup"


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_folder_in_the_place_of_an_entry_is_not_touched(suffix: str) -> None:
    path = cache.folder() / cache.file_name(CONFIG, suffix)
    (path / "precious").mkdir(parents=True)
    with pytest.raises(OSError, match="nothing was changed"):
        take(suffix)
    assert (path / "precious").is_dir()


@pytest.mark.usefixtures("hurry")
def test_a_checkpoint_that_cannot_be_read_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may hold the epochs of days: an error, before the work begins anew."""

    def stopped(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        checkpoint.load()
        checkpoint.save({"x": torch.zeros(1)})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.tensors(CONFIG, stopped)
    (path,) = cache.folder().glob("*.checkpoint")
    before = path.read_bytes()
    unreadable(path, errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="nothing was changed"):
        cache.tensors(CONFIG, stopped)
    monkeypatch.undo()
    assert path.read_bytes() == before


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_too_many_open_files(suffix: str) -> None:
    path, truth = entry(CONFIG, suffix), take(suffix)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        with pytest.raises(OSError, match="Too many open files"):
            take(suffix)
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [p for p in cache.folder().iterdir() if p.name != "locks"] == [path]
    assert take(suffix) == truth


# --- Versions ---------------------------------------------------------------------------------


def test_a_version_enters_the_key_of_what_rests_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mcnotes.lab import Experiment

    lab = Experiment()

    def keys() -> dict[str, str]:
        configs: dict[str, dict[str, Any]] = {"endpoint": lab.endpoint_config(1)}
        for method in ("unaligned", "aligned", "pam-unaligned", "pam-aligned"):
            for shape in ("line", "bezier"):
                name = f"{method} {shape}"
                configs[f"path {name}"] = lab.path_config(1, 2, method, shape)
                if shape == "bezier":
                    configs[f"curve {name}"] = lab.curve_config(1, 2, method, shape)
        for method in ("pam-unaligned", "pam-aligned"):
            configs[f"record {method}"] = lab.curve_config(1, 2, method, "bezier") | {"what": "pam"}
        aligned = lab.curve_config(1, 2, "aligned", "line")
        configs["matching"] = aligned | {"what": "matching"}
        configs["of a chapter"] = lab.config() | {"what": "bends"}
        return {name: cache.key(config) for name, config in configs.items()}

    plain, everything = keys(), set(keys())

    def changed(kind: str) -> set[str]:
        with monkeypatch.context() as patch:
            patch.setitem(cache.VERSIONS, kind, 2)
            later = keys()
            patch.setitem(cache.VERSIONS, kind, 3)
            assert {n for n in later if keys()[n] == later[n] != plain[n]} == set()
        return {name for name in everything if later[name] != plain[name]}

    trained = {n for n in everything if "bezier" in n or "pam" in n}
    aligned = {n for n in everything if "aligned" in n and "unaligned" not in n}
    assert changed("endpoint") == everything
    assert changed("matching") == aligned | {"matching", "of a chapter"}
    assert changed("curve") == trained | {"of a chapter"}
    assert changed("pam") == {n for n in everything if "pam" in n} | {"of a chapter"}
    assert changed("path") == {n for n in everything if "path" in n} | {"of a chapter"}
    assert changed("bends") == {"of a chapter"}


def test_a_later_version_is_computed_and_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"what": "path", "seed": 1}
    assert cache.values(config, lambda: "wrong") == "wrong"
    monkeypatch.setitem(cache.VERSIONS, "path", 2)
    assert cache.values(config, lambda: "right") == "right"
    assert cache.values(config, never_value) == "right"
    assert cache.origin(config)
    names = {p.name for p in cache.folder().glob("*.json")}
    for name in names & {cache.file_name(config, ".json")}:
        found = cache.read_config(cache.folder() / name)
        assert cache.file_name(found, ".json") == name, "an entry still names its file"
    monkeypatch.setitem(cache.VERSIONS, "path", 1)
    assert cache.values(config, never_value) == "wrong"


def never_value() -> None:
    raise AssertionError("computed again")


# --- Where things lie -------------------------------------------------------------------------


def test_an_installed_package_keeps_nothing_beside_itself(tmp_path: Path) -> None:
    """Copied as an installation does it: no clone around it, a stranger's `data` package is."""
    site = tmp_path / "site-packages"
    shutil.copytree(Path(cache.__file__).parent, site / "mcnotes")
    (site / "data").mkdir()
    script = (
        "from mcnotes import cache, data\n"
        "cache.values({'what': 'x'}, lambda: 1)\n"
        "print(cache.folder(), data.default_folder(), cache.provenance(0)['commit'], sep='\\n')\n"
    )
    base = {n: x for n, x in os.environ.items() if not n.startswith("MCNOTES_")}
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    before = sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts)

    def run(**more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=base | home | {"PYTHONPATH": str(site)} | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    where, images, commit = run()
    assert sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts) == before
    assert Path(where).name == "store"
    assert Path(where).parent == Path(images)
    assert commit == "unknown"
    if platform.system() == "Linux":
        assert Path(where) == tmp_path / "cache" / "mcnotes" / "store"
    assert list(Path(where).glob("x-*.json"))
    named = run(MCNOTES_STORE=str(tmp_path / "mine"))
    assert named[0] == str(tmp_path / "mine")


def test_a_clone_keeps_its_results_in_its_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MCNOTES_STORE")
    assert cache.folder() == cache.ROOT / "data" / "store" == data.HOME / "store"


# --- Unfinished files -------------------------------------------------------------------------

WAITS = """
import os, sys, time
from pathlib import Path
from mcnotes import cache
def stop(_):
    print("writing", flush=True)
    time.sleep(600)
os.fsync = stop
cache.write_atomic(Path(sys.argv[1]) / "f", bytes(1000))
"""


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    assert end(start(processes.write, tmp_path / "f")) == [-signal.SIGKILL]
    (left,) = parts(tmp_path)
    assert left.stat().st_size == 1000
    cache.write_atomic(tmp_path / "another", b"new")
    assert parts(tmp_path) == []


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    writing = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writing.stdout
    writing.stdout.readline()
    cache.write_atomic(tmp_path / "f", b"new")
    (left,) = parts(tmp_path)
    writing.kill()
    while psutil.Process(writing.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    cache.write_atomic(tmp_path / "f", b"newer")
    assert not left.exists(), "a zombie writes no more"
    writing.communicate()


def test_the_process_number_of_a_dead_writer_may_be_anothers(tmp_path: Path) -> None:
    start = cache._started(os.getpid())
    for began in (start, start - 3600):
        (tmp_path / f".{cache._place()}-{os.getpid()}-{began}-0.part").touch()
    cache.write_atomic(tmp_path / "f", b"new")
    assert [p.name.split("-")[2] for p in parts(tmp_path)] == [str(start)]


def test_what_another_machine_is_writing_stays_for_a_day(tmp_path: Path) -> None:
    part = tmp_path / ".0123abcd-1-1-0.part"
    strange = tmp_path / ".notes.part"
    part.touch()
    strange.touch()
    for hours, there in ((0, True), (20, True), (30, False)):
        before = time.time() - 3600 * hours
        for path in (part, strange):
            if path.exists():
                os.utime(path, (before, before))
        cache.write_atomic(tmp_path / "f", b"new")
        assert part.exists() == there
    assert strange.exists(), "not ours"


@pytest.mark.parametrize("broken", [False, True])
def test_four_processes_compute_once(broken: bool, tmp_path: Path) -> None:
    """Even if each of them finds a file that must be set aside."""
    log, name = tmp_path / "log", cache.file_name({"what": "shared"}, ".safetensors")
    path = cache.folder() / name
    if broken:
        path.parent.mkdir()
        path.write_bytes(b"broken")
    assert end(*(start(processes.share, log) for _ in range(4))) == [0] * 4
    assert log.read_text() == "computed\n"
    assert len(list(cache.folder().glob("*.broken*"))) == broken


def test_setting_aside_waits_for_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading a broken file and renaming it another process may have made it good."""
    path = entry(CONFIG, ".json")
    good = path.read_bytes()
    path.write_bytes(b"broken")
    real = cache._alone

    @contextlib.contextmanager
    def late(lock: Path) -> Iterator[None]:
        path.write_bytes(good)
        with real(lock):
            yield

    monkeypatch.setattr(cache, "_alone", late)
    assert "computed" not in take(".json")
    assert path.read_bytes() == good


def test_failed_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        cache.write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_kill_at_every_write(call: str, nth: int) -> None:
    assert end(start(processes.compute, call, nth)) == [-signal.SIGKILL]
    path = cache.folder() / cache.file_name({"what": "killed"}, ".safetensors")
    assert not path.exists()
    assert end(start(processes.compute, call, 99)) == [0]
    assert torch.equal(cache.read_tensors(path)["x"], torch.tensor([1.0, 2.0]))
    assert not list(cache.folder().glob("*.checkpoint"))


def test_two_processes_compute_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert end(*(start(processes.share, log) for _ in range(2))) == [0, 0]
    assert log.read_text() == "computed\n"


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(processes.share, log)
    while not log.exists():
        assert first.is_alive() or log.exists()
        time.sleep(0.02)
    first.kill()
    assert end(first) == [-signal.SIGKILL]
    assert end(start(processes.share, log)) == [0]
    assert log.read_text() == "computed\n" * 2


def test_json_entry_reads_as_text() -> None:
    cache.values(CONFIG, lambda: 0.5)
    entry = json.loads((cache.folder() / cache.file_name(CONFIG, ".json")).read_text())
    assert entry["value"] == 0.5
    assert entry["config"] == CONFIG
    assert entry["provenance"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert f"({torch.backends.cpu.get_cpu_capability()})" in entry["provenance"]["hardware"]


def test_what_is_kept_says_in_one_line_what_it_is(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.checkpoint", CONFIG)
    assert repr(checkpoint) == f"Checkpoint({str(checkpoint.path)!r}, not yet)"
    checkpoint.save({"x": torch.arange(3.0)})
    assert repr(checkpoint).endswith(", there)")
    entry = cache.read(checkpoint.path)
    assert repr(entry) == "Entry(1 values, of a configuration of 3 names)"
    assert "a JSON value" in repr(cache.Entry({}, {}, [1.0]))


def test_a_recording_keeps_copies_and_gives_a_beginning() -> None:
    state = {"x": torch.zeros(1)}
    record = cache.Recording()
    assert record.load() is None
    record.save(state)
    state["x"] += 1
    record.save(state)
    assert [float(kept["x"]) for kept in record.states] == [0, 1]
    branch = cache.Recording(record.states[0])
    begun = branch.load()
    assert begun
    assert float(begun["x"]) == 0
    with pytest.raises(ValueError, match="does not fit"):
        branch.set_aside(ValueError("does not fit"))
