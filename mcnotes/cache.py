"""Load or compute: results are kept under the hash of their configuration (see data/README.md).

A result is looked up in `data/zoo` (ships with the book), then in the store (this machine);
else it is computed and kept in the store. Files appear whole or not at all; two processes never
compute the same entry at once; a killed computation goes on from its last checkpoint.

What cannot be kept is returned all the same, with a StoreWarning, and this process holds it in
memory. A file is trusted only if it holds the configuration that is asked for and a hash that fits
its content; otherwise it is set aside as `….broken` (in the zoo: left alone) and computed again. A
file that is there and *cannot be read* (no permission, too many open files, a network file system's
hiccup) may hold the work of hours: after a few tries OSError is raised, nothing is computed and
nothing touched.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import psutil
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

Config = Mapping[str, Any]  # JSON values
State = dict[str, Tensor]

VERSIONS = {"endpoint": 1, "matching": 1, "curve": 1, "pam": 1, "path": 1}
"""The version of the code behind each kind of entry; data/README.md says when to raise one.

"pam" stands for the algorithm (`matching.pam`), "curve" for the training of any curve. The
`KINDS` say in their configurations which others they rest on (`versions`). Every other kind, a
chapter's own, may rest on all of them; a line here for it counts besides.
"""
KINDS = frozenset({"endpoint", "matching", "curve", "pam", "path"})

ROOT = Path(__file__).resolve().parents[1]
PAUSES = (0.1, 0.4, 1.5)  # seconds before a file that cannot be read is tried again
FOREIGN_PART = 24 * 3600.0  # seconds after which another place's unfinished file is an orphan
# What reading wrong content raises: its form, its names, its types; nested too deeply.
WRONG = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_PLACES = ("from the zoo", "computed on this machine")
_loaded: Counter[tuple[str, str]] = Counter()
_parts = itertools.count()
_unkept: dict[Path, bytes] = {}  # what could not be written: not to be computed again here


class StoreWarning(UserWarning):
    """Something could not be trusted, kept or locked; the computation goes on."""


class BrokenFile(Exception):
    """The content of a file is not what it must be."""


class Entry(NamedTuple):
    """What a file of the store holds: a result, and where it comes from."""

    config: dict[str, Any]
    origin: dict[str, Any]  # `provenance`; of a checkpoint, the seconds so far
    value: Any  # tensors by name, or a JSON value

    def __repr__(self) -> str:
        held = f"{len(self.value)} values" if isinstance(self.value, Mapping) else "a JSON value"
        return f"Entry({held}, of a configuration of {len(self.config)} names)"


class Checkpoint:
    """A file that holds the state of unfinished work.

    config: all that the state depends on; the state of another configuration is not taken. shipped:
    a file that came from another machine; its state is taken where `path` has none, and it stays.
    """

    def __init__(
        self, path: Path, config: Config | None = None, shipped: Path | None = None
    ) -> None:
        self.path, self.config, self.shipped = path, _normal(dict(config or {})), shipped
        self._warned, self._start = False, time.perf_counter()
        self._before: float | None = None  # seconds of the processes before this one

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {'there' if self.path.exists() else 'not yet'})"

    @property
    def seconds(self) -> float:
        """How long the work took so far, in all processes that worked on it."""
        return (self._before or 0.0) + time.perf_counter() - self._start

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the stored state, atomically. A full disk only costs the chance to resume."""
        self._before = self._before or 0.0
        content = _pack(state, self.config, {"seconds": self.seconds})
        try:
            write_atomic(self.path, content)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"checkpoint {self.path}: {error}; going on without", StoreWarning, 2)
            self._warned = True

    def load(self) -> State | None:
        """The stored state; None if there is none, or (with a StoreWarning) if it is set aside.

        Whoever takes it over checks that it fits, and calls `set_aside` otherwise. Raises OSError
        if the file is there and cannot be read.
        """
        entry = self._entry(self.path) or (self._entry(self.shipped) if self.shipped else None)
        if entry is None:
            return None
        if self._before is None:
            self._before = float(entry.origin.get("seconds", 0.0))
        return dict(entry.value)

    def _entry(self, path: Path) -> Entry | None:
        try:
            return _read(path, self.config)
        except BrokenFile as error:
            self.set_aside(error)
            return None

    def set_aside(self, error: Exception) -> None:
        """Rename the file, with a StoreWarning: it is wrong, or an older version's.

        If there is none, it is the shipped one, which stays and is not used again.
        """
        if self.shipped and not self.path.exists():
            warnings.warn(f"{self.shipped}: {error}; not used", StoreWarning, 3)
            self.shipped = None
        else:
            set_aside(self.path, error)


class Recording(Checkpoint):
    """In memory: every state that a run passes, in `states`, and the one that it begins with.

    Runs branch off by it (chapter 1), and networks are looked at while they learn (chapter 14).
    """

    def __init__(self, beginning: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(Path(os.devnull))
        self.beginning, self.states = beginning, list[State]()

    def __repr__(self) -> str:
        return f"Recording({len(self.states)} states)"

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Keep a copy."""
        self.states.append({name: x.clone() for name, x in state.items()})

    def load(self) -> State | None:
        """The state to begin with, if there is one."""
        return None if self.beginning is None else dict(self.beginning)

    def set_aside(self, error: Exception) -> None:
        """Refuse a beginning that does not fit: there is no other to fall back to."""
        raise error


def home() -> Path:
    """Where data lies: `data/` of the repository; installed without it, the user's cache folder."""
    return ROOT / "data" if _cloned() else platformdirs.user_cache_path("mcnotes", appauthor=False)


def zoo() -> Path:
    """The folder of results that ship with the book: `$MCNOTES_ZOO` or data/zoo."""
    return Path(os.environ.get("MCNOTES_ZOO") or ROOT / "data" / "zoo")


def folder() -> Path:
    """The folder of this machine's results: `$MCNOTES_STORE` (`make zoo` sets it) or data/store."""
    return Path(os.environ.get("MCNOTES_STORE") or home() / "store")


def versions(*kinds: str) -> dict[str, Any]:
    """What a configuration says of the `kinds` that it rests on: nothing of those in version 1."""
    later = {kind: n for kind in kinds if (n := VERSIONS.get(kind, 1)) > 1}
    return {"versions": later} if later else {}


def key(config: Config) -> str:
    """16 hexadecimal digits that name a configuration; the order of its names does not matter."""
    try:
        text = _text(_versioned(config), allow_nan=False)
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
    StoreWarning, a file of wrong content is set aside, and what cannot be kept (a full disk, a
    store that is read-only or no folder) is returned all the same. Raises OSError, before any
    work, if the entry or its checkpoint is there and cannot be read.
    """
    return dict(_get(config, ".safetensors", lambda checkpoint: dict(compute(checkpoint))))


def values(config: Config, compute: Callable[[], Any]) -> Any:
    """As `tensors`, for JSON values (numbers, lists, dicts with text keys).

    Raises ValueError for a result that is none.
    """

    def computed(_: Checkpoint) -> Any:
        found = compute()
        try:
            return _normal(found)
        except (TypeError, ValueError, RecursionError) as error:
            kind = config.get("what", "result")
            raise ValueError(
                f"store: {kind}: the result cannot be kept: {error}. Fix: return numbers, text, "
                "True, False, None, and lists and dicts of these"
            ) from error

    return _get(config, ".json", computed)


def report() -> str:
    """What was taken from where, such as "endpoint: 6 from the zoo, 1 computed on this machine"."""
    kinds = sorted({kind for kind, _ in _loaded})
    counts = {k: [f"{n} {place}" for place in _PLACES if (n := _loaded[k, place])] for k in kinds}
    return "; ".join(f"{k}: {', '.join(words)}" for k, words in counts.items()) or "nothing loaded"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks sees the old content or the new one, never a part.

    First removes what writers that were killed left unfinished in the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    pid = os.getpid()
    part = path.with_name(f".{_place()}-{pid}-{_started(pid)}-{next(_parts)}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file, an entry or not. Raises BrokenFile, or OSError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise BrokenFile(f"{path}: {error}") from error


def read(path: Path) -> Entry:
    """An entry or a checkpoint. Raises BrokenFile unless its content is what its hash says.

    Raises OSError if it cannot be read, after a few tries.
    """
    content = _content(path)
    try:
        config, origin, value, told = (_undump if path.suffix == ".json" else _unpack)(content)
        found = _digest(config, origin, value)
    except WRONG as error:
        raise BrokenFile(f"{path}: {type(error).__name__}: {error}") from error
    if told is None:
        raise BrokenFile(f"{path}: it has no hash of its content, as older versions left it")
    if told != found:
        raise BrokenFile(f"{path}: its content is not what was written, going by its hash")
    return Entry(config, origin, value)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that an entry was computed from. Raises as `read`."""
    return read(path).config


def origin(config: Config) -> dict[str, Any]:
    """The provenance of the entry that `config` describes; empty where none is kept."""
    names = [file_name(config, suffix) for suffix in (".safetensors", ".json")]
    config = _normal(_versioned(config))
    for path in (place / name for place in (zoo(), folder()) for name in names):
        with contextlib.suppress(BrokenFile):
            if entry := _read(path, config):
                return entry.origin
    return {}


def provenance(seconds: float) -> dict[str, Any]:
    """Versions, hardware, commit and seconds; kept beside a result, not part of its key."""
    kernels = torch.backends.cpu.get_cpu_capability()  # numbers differ between them
    cpu = f"{platform.machine()} CPU ({kernels}), {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "hardware": hardware,
    }


def _cloned() -> bool:
    """Does the package lie in a clone of the repository, or was it installed without it?"""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "data").is_dir()


@functools.cache
def _commit() -> str:
    """The commit of the code, with a + if files differ from it; "unknown" outside a clone."""
    git = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    if not _cloned():
        return "unknown"  # a clone around the installation would be another project's
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


# --- Load or compute --------------------------------------------------------------------------


def _get(config: Config, suffix: str, compute: Callable[[Checkpoint], Any]) -> Any:
    name, kind = file_name(config, suffix), config.get("what", "result")
    full: dict[str, Any] = _normal(_versioned(config))
    shipped, target = zoo() / name, folder() / name
    for path, place in zip((shipped, target), _PLACES, strict=True):
        try:
            entry = _read(path, full)
        except BrokenFile as error:  # the store's is set aside below, under the lock
            entry = None
            if path == shipped:
                warnings.warn(f"{error}; not used, computing again", StoreWarning, 3)
        if entry is not None:
            _loaded[kind, place] += 1
            return entry.value
    ours = target.resolve() != shipped.resolve()  # not so when `make zoo` fills data/zoo
    with _alone(folder() / "locks" / f"{name}.lock"):
        value = _get_alone(full, target, compute, ours)
    _loaded[kind, _PLACES[1]] += 1
    return value


def _get_alone(
    config: dict[str, Any], target: Path, compute: Callable[[Checkpoint], Any], ours: bool
) -> Any:
    """Under the lock: another process may have been faster. Only what is `ours` is set aside."""
    try:
        if (entry := _read(target, config)) is not None:
            return entry.value
    except BrokenFile as error:
        if ours:
            set_aside(target, error)
    name = f"{target.name}.checkpoint"
    checkpoint = Checkpoint(target.with_name(name), config, zoo() / "unfinished" / name)
    pack, unpack = (_dump, _undump) if target.suffix == ".json" else (_pack, _unpack)
    if target not in _unkept:
        found = compute(checkpoint)
        _unkept[target] = pack(found, config, provenance(checkpoint.seconds))
    content = _unkept[target]
    try:
        write_atomic(target, content)
    except OSError as error:  # the checkpoint stays: the next process goes on from it
        text = f"{target}: {error}; the result is used but not kept"
        warnings.warn(text, StoreWarning, 4)
    else:
        del _unkept[target]
        with contextlib.suppress(OSError):
            checkpoint.path.unlink(missing_ok=True)
    return unpack(content)[2]  # the same value, whether it was computed or loaded


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock; where there can be none (a read-only store), go on with a StoreWarning.

    FileLock's RuntimeError: this process has it still, since releasing it failed.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, RuntimeError) as error:
        text = f"{path}: {error}; going on, though another process may compute the same"
        warnings.warn(text, StoreWarning, 5)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def _read(path: Path, config: Config) -> Entry | None:
    """The entry of `config`; None if there is no such file. Raises BrokenFile, or OSError."""
    try:
        entry = read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if _text(entry.config) != _text(config):
        raise BrokenFile(f"{path}: it belongs to another configuration, {entry.config}")
    return entry


def _content(path: Path) -> bytes:
    """The bytes of a file, if need be at the fourth try."""
    for pause in PAUSES:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        text = f"{error.strerror}; nothing was changed: make the file readable, or move it away"
        raise OSError(error.errno, text, str(path)) from error


def set_aside(path: Path, error: Exception) -> None:
    """Rename a file of wrong content, so that nothing is lost, and say so."""
    names = (f"{path.name}.broken{n or ''}" for n in itertools.count())
    aside = next(p for p in map(path.with_name, names) if not p.exists())
    try:
        os.replace(path, aside)
        done = f"set aside as {aside.name}"
    except OSError as fault:
        done = f"not used, and not set aside ({fault})"
    where = "" if str(path) in str(error) else f"{path}: "
    warnings.warn(f"{where}{error}; {done}, computing again", StoreWarning, 4)


# --- The form of the files --------------------------------------------------------------------

_Parsed = tuple[dict[str, Any], dict[str, Any], Any, str | None]  # an entry's parts, and its hash


def _versioned(config: Config) -> dict[str, Any]:
    """With the versions of its own kind, and of all kinds that it may rest on without saying so."""
    kind = config.get("what", "result")
    own = versions(kind) if kind in KINDS else versions(kind, *VERSIONS)
    if not own:
        return dict(config)
    return {**config, "versions": config.get("versions", {}) | own["versions"]}


def _text(value: Any, allow_nan: bool = True) -> str:
    """One text for a JSON value, whatever the order of its names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=allow_nan)


def _normal(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def _digest(config: Any, origin: Any, value: Any) -> str:
    """SHA-256 of an entry: of tensors, names, dtypes, shapes and bytes."""
    named = value if isinstance(value, dict) else {}
    flat = {n: x for n, x in named.items() if isinstance(x, Tensor)}
    rest = None if flat else value
    state = hashlib.sha256(_text([config, origin, rest]).encode())
    for name, x in sorted(flat.items()):
        state.update(_text([name, str(x.dtype), list(x.shape)]).encode())
        state.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _pack(found: Mapping[str, Tensor], config: Config, origin: Config) -> bytes:
    """Tensors as a safetensors file; clones, since two names may share their memory."""
    contiguous = torch.contiguous_format
    flat = {n: x.detach().cpu().clone(memory_format=contiguous) for n, x in found.items()}
    config, origin = _normal(dict(config)), _normal(dict(origin))
    parts = {"config": config, "provenance": origin, "hash": _digest(config, origin, flat)}
    return save(flat, {name: json.dumps(part, sort_keys=True) for name, part in parts.items()})


def _unpack(content: bytes) -> _Parsed:
    found = load(content)  # checks the header
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    parts = {name: json.loads(part) for name, part in header["__metadata__"].items()}
    return parts["config"], parts["provenance"], found, parts.get("hash")


def _dump(found: Any, config: Config, origin: Config) -> bytes:
    """A JSON value as a file that reads as text."""
    found, config, origin = (_normal(part) for part in (found, dict(config), dict(origin)))
    told = _digest(config, origin, found)
    parts = {"config": config, "provenance": origin, "hash": told, "value": found}
    return (json.dumps(parts, indent=1) + "\n").encode()


def _undump(content: bytes) -> _Parsed:
    parts = json.loads(content)
    return parts["config"], parts["provenance"], parts["value"], parts.get("hash")


# --- Unfinished files -------------------------------------------------------------------------

_PART = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-\d+\.part")


@functools.cache
def _place() -> str:
    """Eight digits for where process numbers mean something: host, namespace, user."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # containers may share a host's name
    except OSError:
        space = ""
    user = getattr(os, "getuid", lambda: 0)()  # others' processes may be hidden
    text = f"{platform.node()} {uuid.getnode()} {space} {user}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _started(pid: int) -> int:
    """When a process started, in seconds since 1970; 0 if nobody knows."""
    try:
        return int(psutil.Process(pid).create_time())
    except (psutil.Error, OSError):
        return 0


def _runs(pid: int, start: int) -> bool:
    """Is it still the process that started then? A minute's grace, as a clock may be set."""
    try:
        dead = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        dead = True
    except (psutil.Error, OSError):
        dead = False
    return not dead and abs(_started(pid) - start) < 60


def _sweep(where: Path) -> None:
    """Remove the unfinished files of our processes on this machine that are gone.

    Others may still be written to: they go when nobody has touched them for a day.
    """
    for part in where.glob(".*.part"):
        if named := _PART.fullmatch(part.name):
            place, pid, start = named.groups()
            with contextlib.suppress(OSError):
                if place == _place():
                    orphan = not _runs(int(pid), int(start))
                else:
                    orphan = time.time() - part.stat().st_mtime > FOREIGN_PART
                if orphan:
                    part.unlink()
