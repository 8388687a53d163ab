"""Load or compute: results are kept under the hash of their configuration (see the preface).

A result is looked up in `data/zoo` (ships with the book), then in the store (this machine);
else it is computed and kept in the store. Files appear whole or not at all; two processes never
compute the same entry at once; a killed computation goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

Config = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[1]
_loaded: Counter[tuple[str, str]] = Counter()


class StoreWarning(UserWarning):
    """Something could not be read or kept; the computation goes on."""


class BrokenFile(Exception):
    """A file of the store that cannot be read."""


def zoo() -> Path:
    """The folder of results that ship with the book: `$MCNOTES_ZOO` or data/zoo."""
    return Path(os.environ.get("MCNOTES_ZOO") or ROOT / "data" / "zoo")


def folder() -> Path:
    """The folder of this machine's results: `$MCNOTES_STORE` or data/store.

    `make zoo` sets the variable to data/zoo, so that what the chapters compute ships.
    """
    return Path(os.environ.get("MCNOTES_STORE") or ROOT / "data" / "store")


def key(config: Config) -> str:
    """16 hexadecimal digits that name a configuration (JSON values; order does not matter)."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:16]


def tensors(
    config: Config, compute: Callable[[Checkpoint], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors (on the CPU) that `config` describes: loaded if found, else computed and kept.

    config: JSON values; all that the result depends on, and "what": its kind, for the file's name.
    compute: called with a `Checkpoint` when nothing is found. A broken file is set aside with a
    StoreWarning; a result that cannot be written (a full disk) is returned all the same, with a
    StoreWarning.
    """
    found: dict[str, Tensor] = _get(
        config, lambda c: dict(compute(c)), ".safetensors", _pack, read_tensors
    )
    return found


def values(config: Config, compute: Callable[[], Any]) -> Any:
    """As `tensors`, for JSON values (numbers, lists, dicts with text keys)."""
    return _get(config, lambda _: compute(), ".json", _dump, read_values)


def report() -> str:
    """What was taken from where, such as "endpoint: 6 from the zoo, 1 computed on this machine"."""
    kinds = sorted({what for what, _ in _loaded})
    count = {k: (_loaded[k, "zoo"], _loaded[k, "here"]) for k in kinds}
    words = [
        f"{k}: "
        + ", ".join(f"{n} {where}" for n, where in zip(count[k], _PLACES, strict=True) if n)
        for k in kinds
    ]
    return "; ".join(words) or "nothing loaded"


_PLACES = ("from the zoo", "computed on this machine")


class Checkpoint:
    """A file that holds the state of unfinished work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the stored state, atomically. A full disk only costs the chance to resume."""
        try:
            write_atomic(self.path, _pack(dict(state), {"what": "checkpoint"}))
        except OSError as error:
            if not self._warned:
                warnings.warn(f"checkpoint {self.path}: {error}; going on without", StoreWarning, 2)
            self._warned = True

    def load(self) -> dict[str, Tensor] | None:
        """The stored state; None if there is none, or (with a StoreWarning) if it is broken."""
        state: dict[str, Tensor] | None = _read(self.path, read_tensors)
        return state

    def clear(self) -> None:
        """Forget the state."""
        self.path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises BrokenFile."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BrokenFile(f"{path}: {error}") from error


def read_values(path: Path) -> Any:
    """The value of a JSON entry. Raises BrokenFile."""
    try:
        return json.loads(path.read_bytes())["value"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BrokenFile(f"{path}: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that an entry was computed from. Raises BrokenFile."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_bytes())["config"])
        with safe_open(str(path), framework="pt") as file:
            return dict(json.loads(file.metadata()["config"]))
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise BrokenFile(f"{path}: {error}") from error


def file_name(config: Config, suffix: str) -> str:
    """The name of a configuration's file: its kind and its key."""
    return f"{config.get('what', 'result')}-{key(config)}{suffix}"


def provenance(seconds: float) -> dict[str, Any]:
    """Versions, hardware and seconds; kept beside a result, not part of its key."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def _get(
    config: Config,
    compute: Callable[[Checkpoint], Any],
    suffix: str,
    pack: Callable[[Any, dict[str, Any]], bytes],
    read: Callable[[Path], Any],
) -> Any:
    name = file_name(config, suffix)
    for source, place in (("zoo", zoo()), ("here", folder())):
        if (found := _read(place / name, read)) is not None:
            _loaded[config.get("what", "result"), source] += 1
            return found
    target = folder() / name
    with _lock(target):
        if (found := _read(target, read)) is None:
            checkpoint = Checkpoint(folder() / f"{name}.checkpoint")
            start = time.perf_counter()
            found = compute(checkpoint)
            meta = {"config": dict(config), "provenance": provenance(time.perf_counter() - start)}
            found = _keep(target, found, pack(found, meta), read)
            checkpoint.clear()
    _loaded[config.get("what", "result"), "here"] += 1
    return found


def _keep(target: Path, found: Any, content: bytes, read: Callable[[Path], Any]) -> Any:
    try:
        write_atomic(target, content)
    except OSError as error:
        warnings.warn(f"{target}: {error}; the result is used but not kept", StoreWarning, 4)
        return found
    return read(target)  # the same value, whether it was computed or loaded


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    if not path.exists():
        return None
    try:
        return read(path)
    except BrokenFile as error:
        warnings.warn(f"{error}; set aside as {path.name}.broken, computing again", StoreWarning, 4)
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(path.name + ".broken"))
        return None


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    lock = folder() / "locks" / f"{target.name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"{lock.parent}: {error}; working without a lock", StoreWarning, 5)
        yield
        return
    with FileLock(lock):
        yield


def _pack(found: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    flat = {name: x.detach().cpu().contiguous() for name, x in found.items()}
    return save(flat, {name: json.dumps(part, sort_keys=True) for name, part in meta.items()})


def _dump(found: Any, meta: dict[str, Any]) -> bytes:
    return (json.dumps({**meta, "value": found}, indent=1) + "\n").encode()


def _canonical(config: Config) -> str:
    try:
        return json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"store: a configuration holds JSON values only: {error}") from error
