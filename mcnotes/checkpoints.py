"""Networks and checkpoints of your own, validated before use (chapter 10).

What does not fit is refused before any long work, with what was found, what was expected and how to
fix it. Nothing is unpickled that could run code, and no value is changed.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as pack
from torch import Tensor, nn

from mcnotes import cache, display, evaluate
from mcnotes.calls import call, duplicate
from mcnotes.curves import Theta
from mcnotes.data import Task
from mcnotes.names import resolve

Shapes = Mapping[str, torch.Size]  # by the names of a state_dict
COUNTER = "num_batches_tracked"  # BatchNorm's; nothing here reads it, and some tools leave it out
MOST_CHARACTERS = 50_000_000  # of all names in a file together
SHOWN = 100  # characters of a name in a message


class CheckpointError(ValueError):
    """A network or a checkpoint cannot be used; the text says why and what to do."""


class Loaded(NamedTuple):
    """A checkpoint that fits its network."""

    theta: Theta  # all of the network's state_dict, and buffers that it leaves out; on the CPU
    prefix: str  # what stood in the file before the network's own names
    outside: list[str]  # tensors that stand elsewhere in the file, and were left there
    sha256: str  # of the file

    def __repr__(self) -> str:
        numbers = sum(x.numel() for x in self.theta.values())
        below = f" under {self.prefix!r}" if self.prefix else ""
        left = f", {len(self.outside)} tensors left in the file" if self.outside else ""
        return f"Loaded({len(self.theta)} tensors, {numbers:,} numbers{below}{left})"

    def _repr_html_(self) -> str:
        rows = ({"tensor": n, "shape": [*x.shape], "dtype": x.dtype} for n, x in self.theta.items())
        return display.described(self, display.table(rows))


def build(factory: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The nn.Module that `factory`, "package.module:callable", makes of keyword arguments.

    In evaluation mode. Raises ValueError for a factory that cannot be imported, CheckpointError for
    one that cannot be called, and for what it gives if that is no network of float32 parameters.
    """
    who, make = f"checkpoints.build: {factory} with {arguments or {}}", resolve(factory)
    try:
        net = make(**(arguments or {}))
    except TypeError as error:
        raise CheckpointError(
            f"{who} cannot be called ({error}). Fix: see its signature"
        ) from error
    if not isinstance(net, nn.Module):
        raise CheckpointError(f"{who} gave a {type(net).__name__}, expected an nn.Module")
    if (kinds := {x.dtype for x in net.parameters()}) != {torch.float32}:
        raise CheckpointError(f"{who} has parameters of {kinds or 'no kind'}, expected float32")
    return net.eval()


def normalised(
    net: nn.Module, mean: Sequence[float] = (0,), std: Sequence[float] = (1,), channels: int = 0
) -> nn.Module:
    """A copy of `net` for images in [0, 1]: (x − mean) / std comes first, by channel.

    channels: how many the network wants, if images are grey: they are repeated. All is in a hook,
    so that the names in the copy's state_dict stay those of `net`.
    """

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].expand(-1, channels or -1, -1, -1)
        full = (list(v) * (x.shape[1] // len(v)) for v in (mean, std))
        shift, scale = (x.new_tensor(v).view(-1, 1, 1) for v in full)
        return ((x - shift) / scale, *args[1:])

    net = duplicate(net)
    net.register_forward_pre_hook(before)
    return net


def check(net: nn.Module, task: Task) -> None:
    """Raise CheckpointError unless `net` makes logits [N, classes] of the task's images."""
    x = task.example
    expected = len(x), task.num_classes
    who = f"checkpoints.check: of images {[*x.shape]} the network"
    try:
        with evaluate.mode(net, training=False), torch.no_grad():
            z = call(net, {}, x)
    except Exception as error:  # of the user's network
        raise CheckpointError(f"{who} fails ({error}). Fix: see channels and image_size") from error
    if (got := getattr(z, "shape", type(z).__name__)) != expected:
        raise CheckpointError(f"{who} makes {got}, expected {expected}, for {task.class_names}. "
                              "Fix: build it with as many classes")  # fmt: skip


def load(path: str | Path, net: nn.Module, prefix: str | None = None) -> Loaded:
    """The checkpoint of `net` in a .safetensors file, or in one that torch.save wrote.

    What stands before the network's names is found, not asked for: dictionaries ("state_dict"),
    wrappers ("module.", "_orig_mod."). prefix: which, if several fit. Raises CheckpointError for
    a file that cannot be read, and for one that does not hold all of the network's tensors, or
    holds others beside them, in their shapes and dtypes and with finite values.
    """
    path, expected = Path(path), net.state_dict()
    who = f"checkpoints.load: {path.name}"
    tensors = _tensors(_read(path), who)
    _refuse_quantised(tensors, who)
    shapes = {n: x.shape for n, x in expected.items() if not n.endswith(COUNTER)}
    prefix = _prefix(tensors, shapes, prefix, who)
    found = {n: tensors.get(prefix + n, x) for n, x in expected.items()}
    for name, x in found.items():
        if fault := _fault(x, expected[name].dtype):
            raise CheckpointError(f"{who}: {prefix + name!r:.{SHOWN}} {fault}")
    theta = {n: x.detach().cpu().clone() for n, x in (dict(net.named_buffers()) | found).items()}
    outside = [n for n in tensors if not n.startswith(prefix)]
    return Loaded(theta, prefix, outside, hashlib.sha256(path.read_bytes()).hexdigest())


def load_pair(
    a: str | Path, b: str | Path, net: nn.Module, prefix: str | None = None
) -> list[Loaded]:
    """Two checkpoints of `net`. Raises CheckpointError, also if both are the same network."""
    one, two = found = [load(path, net, prefix) for path in (a, b)]
    if all(torch.equal(one.theta[n], two.theta[n]) for n, _ in net.named_parameters()):
        raise CheckpointError(
            "checkpoints.load_pair: both files hold the same weights, expected two networks. "
            "Fix: take networks that were trained from different seeds"
        )
    return found


def save(path: str | Path, theta: Theta, net: nn.Module, **about: Any) -> None:
    """Write `theta` as safetensors, under the names that the class of `net` loads.

    about: what it is and where it comes from (JSON values), kept as the file's metadata.
    """
    flat = {n: theta[n].detach().cpu().clone().contiguous() for n in net.state_dict()}
    meta = {n: v if isinstance(v, str) else json.dumps(v) for n, v in about.items()}
    cache.write_atomic(Path(path), pack(flat, meta))


def _read(path: Path) -> Any:
    """What a file holds: tensors in dictionaries, and values without code."""
    try:
        if path.suffix == ".safetensors":
            return cache.read_tensors(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their reader meets first
        cause = f"{path.name} cannot be read ({str(error).split('. ')[0]})"
        why = "expected tensors in dictionaries, because unpickling anything else can run any code"
        fix = "if you trust it, torch.load(…, weights_only=False), and save the state_dict()"
        raise CheckpointError(f"checkpoints.load: {cause}, {why}. Fix: {fix}") from error


def _tensors(held: Any, who: str) -> dict[str, Tensor]:
    """All tensors, by the names of the dictionaries around them, as "state_dict/fc.weight".

    Raises CheckpointError for two tensors of one name, and for dictionaries without end, such as
    one that holds itself.
    """
    tensors: dict[str, Tensor] = {}
    waiting, characters = [("", held)], 0
    while waiting:
        name, value = waiting.pop()
        characters += len(name)
        if characters > MOST_CHARACTERS:
            raise CheckpointError(f"{who} holds dictionaries that are nested without end, expected "
                                  "a network's. Fix: save the state_dict() alone")  # fmt: skip
        if isinstance(value, Tensor):
            name = name.removesuffix("/").replace("_orig_mod.", "")
            if name in tensors:
                raise CheckpointError(f"{who} holds two tensors of the name {name!r:.{SHOWN}}, "
                                      "expected one. Fix: save the state_dict() alone")  # fmt: skip
            tensors[name] = value
        elif isinstance(value, Mapping):
            inner = [(f"{name}{key}/", x) for key, x in value.items()]
            waiting.extend(reversed(inner))
    return tensors


def _refuse_quantised(tensors: Theta, who: str) -> None:
    for name, x in tensors.items():
        if x.is_quantized or name.endswith("zero_point"):
            raise CheckpointError(f"{who}: {name!r:.{SHOWN}} is quantised, which loses precision "
                                  "permanently. Fix: take the float32 file")  # fmt: skip


def _prefix(tensors: Theta, shapes: Shapes, wanted: str | None, who: str) -> str:
    """What stands before the network's names in the file.

    shapes: of the network's tensors. wanted: which, if several fit; dots and slashes at its ends do
    not matter. Raises CheckpointError if none fits, or several that hold different networks.
    """
    hits = _count_prefixes(tensors, shapes)
    fitting = [start for start in hits if hits[start] == len(shapes)]
    fitting = [s for s in fitting if all(tensors[s + n].shape == x for n, x in shapes.items())]
    chosen = [s for s in fitting if wanted is None or s.strip("./") == wanted.strip("./")]
    if (fitting and not chosen) or not _same_network(tensors, chosen, shapes):
        raise CheckpointError(f"{who} holds networks that fit at {fitting}. Fix: name one of them "
                              "as `prefix`")  # fmt: skip
    nearest = min(hits, key=lambda s: (-hits[s], len(s)), default="")
    start = chosen[0] if chosen else nearest  # which then is a miss
    own = {n[len(start) :]: x.shape for n, x in tensors.items() if n.startswith(start)}
    own = {n: shape for n, shape in own.items() if "/" not in n and not n.endswith(COUNTER)}
    if fault := _misfit(own, shapes):
        raise CheckpointError(f"{who} does not fit the network: {fault}")
    return start


def _count_prefixes(tensors: Theta, shapes: Shapes) -> Counter[str]:
    """How many of the network's names stand behind each prefix, which is "" or ends a word.

    Only ends of names that are as long as one of the network's are looked at: a name of any length
    costs no more.
    """
    lengths = sorted({len(name) for name in shapes}, reverse=True)
    hits: Counter[str] = Counter()
    for name in tensors:
        for cut in (len(name) - length for length in lengths if length <= len(name)):
            if (cut == 0 or name[cut - 1] in "./") and name[cut:] in shapes:
                hits[name[:cut]] += 1
    return hits


def _same_network(tensors: Theta, prefixes: Sequence[str], shapes: Shapes) -> bool:
    """Do the same values stand behind all these prefixes?"""
    return all(
        torch.equal(tensors[start + name], tensors[prefixes[0] + name])
        for start in prefixes[1:]
        for name in shapes
    )


def _misfit(own: Shapes, expected: Shapes) -> str:
    """How the shapes in a file differ from the network's, and what to do; "" if they do not."""
    faults = []
    for verb, names in (
        ("lacks", expected.keys() - own.keys()),
        ("has besides", own.keys() - expected.keys()),
    ):
        if names:
            faults.append(f"it {verb} {len(names)} tensors, as {min(names)!r:.{SHOWN}}")
    wrong = [n for n in expected if n in own and own[n] != expected[n]]
    heads = {n.rpartition(".")[0] for n in wrong if own[n][1:] == expected[n][1:]}
    fix = "build the architecture it was trained as (factory, factory_arguments)"
    if not faults and len(heads) == 1 and len(wrong) < 3:
        fix = "the head differs, so give the factory its number of classes"
    faults += [f"{n!r} is {[*own[n]]}, expected {[*expected[n]]}" for n in wrong[:2]]
    return f"{'; '.join(faults)}. Fix: {fix}" if faults else ""


def _fault(x: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a tensor, and what to do; "" where it is sound."""
    if x.is_meta or x.layout != torch.strided:
        return f"holds no plain values ({x.device}, {x.layout}). Fix: save it from a loaded network"
    if x.dtype != dtype:
        why = ": half precision is too coarse to average or train" if x.itemsize == 2 else ""
        return f"is {x.dtype}, expected {dtype}{why}. Fix: save it converted"
    return "" if x.isfinite().all() else "holds NaN or infinity. Fix: take an earlier checkpoint"
