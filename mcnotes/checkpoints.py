"""Networks and checkpoints of your own, validated before use (chapter 10).

What does not fit is refused before any long work, with what was found, what was expected and what
to do. Nothing is unpickled that could run code, and no value is changed.
"""

import copy
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as pack
from torch import Tensor, nn

from mcnotes import cache, display
from mcnotes.curves import Theta
from mcnotes.data import Task
from mcnotes.names import resolve

COUNTER = "num_batches_tracked"  # BatchNorm's; nothing here reads it, and some tools leave it out


class CheckpointError(ValueError):
    """A network or a checkpoint cannot be used; the text says why and what to do."""


class Loaded(NamedTuple):
    """A checkpoint that fits its network."""

    theta: Theta  # all of the network's state_dict, and buffers that it leaves out; on the CPU
    part: str  # what stood in the file before the network's own names
    outside: list[str]  # tensors that stand elsewhere in the file, and were left there
    sha256: str  # of the file

    def __repr__(self) -> str:
        numbers = sum(x.numel() for x in self.theta.values())
        part = f" under {self.part!r}" if self.part else ""
        left = f", {len(self.outside)} tensors left in the file" if self.outside else ""
        return f"Loaded({len(self.theta)} tensors, {numbers:,} numbers{part}{left})"

    def _repr_html_(self) -> str:
        rows = ({"tensor": n, "shape": [*x.shape], "dtype": x.dtype} for n, x in self.theta.items())
        return display.described(self, display.table(rows))


def build(factory: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The nn.Module that `factory`, "package.module:callable", makes of keyword arguments."""
    who, make = f"checkpoints.build: {factory} with {arguments or {}}", resolve(factory)
    try:
        net = make(**(arguments or {}))
    except TypeError as error:
        raise CheckpointError(f"{who} cannot be called ({error}); see its signature") from error
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

    net = copy.deepcopy(net)
    net.register_forward_pre_hook(before)
    return net


def check(net: nn.Module, task: Task) -> None:
    """Raise CheckpointError unless `net` makes logits [N, classes] of the task's images."""
    x = task.example
    expected, who = (
        (len(x), task.num_classes),
        f"check: of images {[*x.shape]} the network",
    )
    try:
        with torch.no_grad():
            z = net.eval()(x)
    except Exception as error:  # of the user's network
        raise CheckpointError(f"{who} fails ({error}): mind channels and image_size") from error
    if (got := getattr(z, "shape", type(z).__name__)) != expected:
        raise CheckpointError(f"{who} makes {got}, expected {expected}, for {task.class_names}")


def load(path: str | Path, net: nn.Module, part: str | None = None) -> Loaded:
    """The checkpoint of `net` in a .safetensors file, or in one that torch.save wrote.

    What stands before the network's names is found, not asked for: dictionaries ("state_dict"),
    wrappers ("module.", "_orig_mod."). part: which, if several fit. Raises CheckpointError.
    """
    path, expected = Path(path), net.state_dict()
    tensors, who = dict(_flat(_read(path), "")), f"checkpoints.load: {path.name}"
    part = _part(tensors, expected, part, who)
    found = {n: tensors.get(part + n, x) for n, x in expected.items()}
    for name, x in found.items():
        if fault := _fault(x, expected[name].dtype):
            raise CheckpointError(f"{who}: {part + name!r} {fault}")
    theta = {n: x.detach().cpu().clone() for n, x in (dict(net.named_buffers()) | found).items()}
    outside = [n for n in tensors if not n.startswith(part)]
    return Loaded(theta, part, outside, hashlib.sha256(path.read_bytes()).hexdigest())


def load_pair(
    a: str | Path, b: str | Path, net: nn.Module, part: str | None = None
) -> list[Loaded]:
    """Two checkpoints of `net`. Raises CheckpointError, also if both are the same network."""
    one, two = found = [load(path, net, part) for path in (a, b)]
    if all(torch.equal(one.theta[n], two.theta[n]) for n, _ in net.named_parameters()):
        raise CheckpointError(
            "checkpoints.load_pair: both files hold the same weights, expected two networks"
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
    try:
        if path.suffix == ".safetensors":
            return cache.read_tensors(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their reader meets first
        cause = f"{path.name} cannot be read ({str(error).split('. ')[0]})"
        cure = "if you trust it, torch.load(…, weights_only=False), and save the state_dict()"
        why = "expected tensors in dictionaries, as to unpickle more can run any code"
        raise CheckpointError(f"checkpoints.load: {cause}, {why}; {cure}") from error


def _flat(found: Any, before: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors, by the names of the dictionaries around them, as "state_dict/fc.weight"."""
    if isinstance(found, Tensor):
        yield before.removesuffix("/").replace("_orig_mod.", ""), found
    elif isinstance(found, Mapping):
        for name, value in found.items():
            yield from _flat(value, f"{before}{name}/")


def _part(tensors: Theta, expected: Theta, wanted: str | None, who: str) -> str:
    """What stands before the network's names in the file; CheckpointError if nothing fits."""
    if odd := [n for n, x in tensors.items() if x.is_quantized or n.endswith("zero_point")]:
        raise CheckpointError(f"{who}: {odd[0]!r} is quantised, for good: take the float32 file")
    need = {n: x.shape for n, x in expected.items() if not n.endswith(COUNTER)}
    starts = [(n[:i], n[i:]) for n in tensors for i in range(len(n)) if not i or n[i - 1] in "./"]
    hits = Counter(start for start, name in starts if name in need)
    held = {s: {n: tensors[s + n] for n in need if s + n in tensors} for s in hits}
    whole = [s for s in held if {n: x.shape for n, x in held[s].items()} == need]
    named = [s for s in whole if wanted is None or s.strip("./") == wanted.strip("./")]
    same = (torch.equal(held[s][n], held[named[0]][n]) for s in named[1:] for n in need)
    if not all(same) or (whole and not named):
        raise CheckpointError(f"{who} holds networks that fit at {whole}: name one as `part`")
    start = named[0] if named else min(hits, key=lambda s: (-hits[s], len(s)), default="")
    own = {n[len(start) :]: x.shape for n, x in tensors.items() if n.startswith(start)}
    own = {n: s for n, s in own.items() if "/" not in n and not n.endswith(COUNTER)}
    lists = {"lacks": need.keys() - own.keys(), "has besides": own.keys() - need.keys()}
    odd = [f"it {k} {len(v)} tensors, as {min(v)!r}" for k, v in lists.items() if v]
    wrong = [n for n in need if own.get(n, need[n]) != need[n]]
    heads = {n.rpartition(".")[0] for n in wrong if own[n][1:] == need[n][1:]}
    cure = "build the architecture it was trained as (factory, factory_arguments)"
    if not odd and len(heads) == 1 and len(wrong) < 3:
        cure = "the head differs: give the factory its number of classes"
    if odd := odd + [f"{n!r} is {[*own[n]]}, expected {[*need[n]]}" for n in wrong[:2]]:
        raise CheckpointError(f"{who} does not fit the network: {'; '.join(odd)}; {cure}")
    return start


def _fault(x: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a tensor, and the cure; nothing where it is sound."""
    if x.is_meta or x.layout != torch.strided:
        return f"holds no plain values ({x.device}, {x.layout}); save it from a loaded network"
    if x.dtype != dtype:
        why = ": half precision is too coarse to average or train" if x.itemsize == 2 else ""
        return f"is {x.dtype}, expected {dtype}{why}; save it converted"
    return "" if x.isfinite().all() else "holds NaN or infinity; take an earlier checkpoint"
