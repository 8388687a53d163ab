"""Load or compute: results are kept under the hash of their configuration (see the preface).

A result is looked up in `data/zoo` (ships with the book), then in the store (this machine);
else it is computed and kept in the store. Files appear whole or not at all; two processes never
compute the same entry at once; a killed computation goes on from its last checkpoint.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

T = TypeVar("T")
Config = Mapping[str, Any]  # JSON values
ROOT = Path(__file__).resolve().parents[1]
_PLACES = ("from the zoo", "computed on this machine")
_loaded: Counter[tuple[str, str]] = Counter()


class StoreWarning(UserWarning):
    """Something could not be read or kept; the computation goes on."""


class BrokenFile(Exception):
    """A file of the store that cannot be read."""


class Checkpoint:
    """A file that holds the state of unfinished work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the stored state, atomically. A full disk only costs the chance to resume."""
        try:
            write_atomic(self.path, _pack(state, {"what": "checkpoint"}))
        except OSError as error:
            if not self._warned:
                warnings.warn(f"checkpoint {self.path}: {error}; going on without", StoreWarning, 2)
            self._warned = True

    def load(self) -> dict[str, Tensor] | None:
        """The stored state; None if there is none, or (with a StoreWarning) if it is broken."""
        return _read(self.path, read_tensors)


def zoo() -> Path:
    """The folder of results that ship with the book: `$MCNOTES_ZOO` or data/zoo."""
    return Path(os.environ.get("MCNOTES_ZOO") or ROOT / "data" / "zoo")


def folder() -> Path:
    """The folder of this machine's results: `$MCNOTES_STORE` (`make zoo` sets it) or data/store."""
    return Path(os.environ.get("MCNOTES_STORE") or ROOT / "data" / "store")


def key(config: Config) -> str:
    """16 hexadecimal digits that name a configuration; the order of its names does not matter."""
    try:
        text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"store: a configuration holds JSON values only: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(config: Config, suffix: str) -> str:
    """The name of a configuration's file: its kind and its key."""
    return f"{config.get('what', 'result')}-{key(config)}{suffix}"


def tensors(
    config: Config, compute: Callable[[Checkpoint], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors (on the CPU) that `config` describes: loaded if found, else computed and kept.

    config: all that the result depends on, and "what": its kind, for the file's name. With a
    StoreWarning, a broken file is set aside, and what a full disk cannot keep is returned all the
    same.
    """
    return dict(_get(config, ".safetensors", lambda checkpoint: dict(compute(checkpoint))))


def values(config: Config, compute: Callable[[], Any]) -> Any:
    """As `tensors`, for JSON values (numbers, lists, dicts with text keys)."""
    return _get(config, ".json", lambda _: compute())


def report() -> str:
    """What was taken from where, such as "endpoint: 6 from the zoo, 1 computed on this machine"."""
    kinds = sorted({kind for kind, _ in _loaded})
    counts = {k: [f"{n} {place}" for place in _PLACES if (n := _loaded[k, place])] for k in kinds}
    return "; ".join(f"{k}: {', '.join(words)}" for k, words in counts.items()) or "nothing loaded"


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
    with _reading(path), safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_values(path: Path) -> Any:
    """The value of a JSON entry. Raises BrokenFile."""
    with _reading(path):
        return json.loads(path.read_bytes())["value"]


def read_config(path: Path, part: str = "config") -> dict[str, Any]:
    """The configuration (or "provenance") that an entry was computed from. Raises BrokenFile."""
    with _reading(path):
        if path.suffix == ".json":
            return dict(json.loads(path.read_bytes())[part])
        with safe_open(str(path), framework="pt") as file:
            return dict(json.loads(file.metadata()[part]))


def origin(config: Config) -> dict[str, Any]:
    """The provenance of the entry that `config` describes; empty where none is kept."""
    kinds = (".safetensors", ".json")
    paths = [place / file_name(config, kind) for place in (zoo(), folder()) for kind in kinds]
    return next((read_config(path, "provenance") for path in paths if path.exists()), {})


def provenance(seconds: float) -> dict[str, Any]:
    """Versions, hardware, commit and seconds; kept beside a result, not part of its key."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"seconds": round(seconds, 1), "torch": torch.__version__, "commit": _commit(),
            "python": platform.python_version(), "hardware": hardware}  # fmt: skip


@functools.cache
def _commit() -> str:
    """The commit of the code, with a + if files differ from it; "unknown" outside a clone."""
    git = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _get(config: Config, suffix: str, compute: Callable[[Checkpoint], Any]) -> Any:
    pack, read = (_dump, read_values) if suffix == ".json" else (_pack, read_tensors)
    kind, name = config.get("what", "result"), file_name(config, suffix)
    target, locks = folder() / name, folder() / "locks"
    for path, place in zip((zoo() / name, target), _PLACES, strict=True):
        if (found := _read(path, read)) is not None:
            _loaded[kind, place] += 1
            return found
    with contextlib.suppress(OSError):
        locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{name}.lock") if locks.is_dir() else contextlib.nullcontext():
        if (found := _read(target, read)) is None:  # another process may have been faster
            checkpoint = Checkpoint(folder() / f"{name}.checkpoint")
            start = time.perf_counter()
            found = compute(checkpoint)
            meta = {"config": dict(config), "provenance": provenance(time.perf_counter() - start)}
            try:
                write_atomic(target, pack(found, meta))
                found = read(target)  # the same value, whether it was computed or loaded
            except OSError as error:
                text = f"{target}: {error}; the result is used but not kept"
                warnings.warn(text, StoreWarning, 3)
            checkpoint.path.unlink(missing_ok=True)
    _loaded[kind, _PLACES[1]] += 1
    return found


def _read(path: Path, read: Callable[[Path], T]) -> T | None:
    """What a file holds; None if there is none, or if it is broken: it is then set aside."""
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
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise BrokenFile(f"{path}: {error}") from error


def _pack(found: Mapping[str, Tensor], meta: Config) -> bytes:
    flat = {name: x.detach().cpu().contiguous() for name, x in found.items()}
    return save(flat, {name: json.dumps(part, sort_keys=True) for name, part in meta.items()})


def _dump(found: Any, meta: Config) -> bytes:
    return (json.dumps({**meta, "value": found}, indent=1) + "\n").encode()
