"""Networks and checkpoints of your own, validated before use (chapter 10).

What does not fit is refused before any long work, with what was found, what was expected and how to
fix it. Nothing is unpickled that could run code, and no value is changed.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor, nn

from mcnotes import cache, display, evaluate
from mcnotes.calls import call, duplicate, logits, stated
from mcnotes.checks import Rule, listed, number, require
from mcnotes.curves import Theta
from mcnotes.data import Task
from mcnotes.data.arrays import failure
from mcnotes.names import resolve

Shapes = Mapping[str, torch.Size]  # by the names of a state_dict
Places = dict[str, dict[str, str]]  # by prefix, the network's names and those in the file
Numbers = float | Sequence[float]  # one for all channels, or one for each
COUNTER = "num_batches_tracked"  # BatchNorm's; nothing here reads it, and some tools leave it out
EXTRA = "_extra_state"  # what a module keeps beside tensors
MOST_CHARACTERS = 50_000_000  # of all names in a file together
ROOM = 2**28  # bytes that a tensor may have without a file holding them
SHOWN = 100  # characters of a name in a message
COMMON = (  # in files of which nothing lists the classes
    "argparse.Namespace",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)
TOKENIZERS = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "spiece",
    "sentencepiece",
)
"""How files begin of which a tokenizer is made."""
KEPT_AS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of floats in safetensors."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
ASKS_TOO_MUCH = {
    "auto_map": "code of its own, which is never run. Fix: use a model of transformers itself",
    "quantization_config": "for weights that have lost precision. Fix: take those before that",
    "transformers_weights": "weights of another name. Fix: rename them to model.safetensors",
}
"""What a folder may not ask for, and what to do."""
OLDER = {"original0": "_g", "original1": "_v", "original": "_orig", "0._u": "_u", "0._v": "_v"}
"""The names that weight_norm and spectral_norm use in `parametrizations`, and those before."""


def by_channel(other: Rule) -> Rule:
    """A number such as `other` takes, or a list of one for each channel."""
    several = listed(other, once=False)

    def rule(value: object) -> str:
        fault = several(value if isinstance(value, list | tuple) else [value])
        text = isinstance(value, str) and value.startswith("[")
        return (
            f"{fault} (it is text: papermill reads lists after -y, not after -p)" if text else fault
        )

    return rule


NORMALISATION = {"mean": by_channel(number(0, 1)), "std": by_channel(number(0, above=True))}
"""What a normalisation of pixels in [0, 1] may be."""


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
    who, make = f"checkpoints.build: {factory} with {arguments or {}!s:.200}", resolve(factory)
    try:
        net = unwrapped(make(**(arguments or {})))
    except TypeError as error:
        cause = f"{who} cannot be called ({failure(error)})"
        raise CheckpointError(f"{cause}. Fix: see its signature") from error
    except (Exception, SystemExit) as error:  # of the user's network
        cause = f"{who} fails ({failure(error)})"
        raise CheckpointError(f"{cause}. Fix: see its arguments") from error
    if not isinstance(net, nn.Module):
        raise CheckpointError(f"{who} gave a {type(net).__name__}, expected an nn.Module")
    if (kinds := {x.dtype for x in net.parameters()}) != {torch.float32}:
        raise CheckpointError(f"{who} has parameters of {kinds or 'no kind'}, expected float32")
    for name, x in net.named_parameters():
        if x.is_meta or nn.parameter.is_lazy(x):
            fix = "make it on the CPU, and run a lazy network once"
            raise CheckpointError(f"{who} has no values in {name!r}. Fix: {fix}")
    return net.eval()


def unwrapped(net: Any) -> Any:
    """What was given to `torch.compile`, `DataParallel` or `DistributedDataParallel`."""
    while isinstance(net, nn.Module):
        parallel = isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = net.module if parallel else getattr(net, "_orig_mod", None)
        if inner is None:
            break
        net = inner
    return net


def normalised(net: nn.Module, mean: Numbers = 0, std: Numbers = 1, channels: int = 0) -> nn.Module:
    """A copy of `net` for images in [0, 1]: (x − mean) / std comes first.

    mean, std: one number, or one for each channel. channels: how many the network wants, if images
    are grey: they are repeated. All is in a hook, so that the names in the copy's state_dict stay
    those of `net`. Raises CheckpointError for a mean outside of [0, 1] and for a std that is not
    above 0.
    """
    given = {"mean": mean, "std": std}
    require("checkpoints.normalised", given, NORMALISATION, CheckpointError)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].expand(-1, channels or -1, -1, -1)
        shift, scale = (x.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
        return ((x - shift) / scale, *args[1:])

    net = duplicate(net)
    net.register_forward_pre_hook(before)
    return net


def check(net: nn.Module, task: Task) -> None:
    """Raise CheckpointError unless `net` makes logits [N, classes] of the task's images."""
    x = task.example
    who = f"checkpoints.check: of images {[*x.shape]} the network"
    try:
        with evaluate.mode(net, training=False), torch.no_grad():
            made = call(net, {}, x)
    except (Exception, SystemExit) as error:  # of the user's network
        fix = _fix(net, x, error)
        raise CheckpointError(f"{who} fails ({failure(error)}). Fix: {fix}") from error
    try:
        z = logits(made)
    except TypeError as error:
        raise CheckpointError(f"{who} makes a {type(made).__name__}, expected logits") from error
    if z.shape == (len(x), task.num_classes):
        return
    fix = "let it make one row of logits for each image"
    if z.ndim == 2 and len(z) == len(x):
        fix = "build it with as many classes"
    names = f"{', '.join(task.class_names):.{SHOWN}}"
    expected = f"[{len(x)}, {task.num_classes}] for {task.num_classes} classes ({names})"
    raise CheckpointError(f"{who} makes {[*z.shape]}, expected {expected}. Fix: {fix}")


def _fix(net: nn.Module, x: Tensor, error: BaseException) -> str:
    """What to do about a network that fails on images."""
    try:
        inspect.signature(net.forward).bind(x)
    except TypeError:
        return "images are its one input; of a network with others, pass batches to mcnotes.align"
    channels = re.search(r"to have (\d+) channels, but got (\d+) channels", str(error))
    if channels is None:
        return "see image_size, and the size of images that it is built for"
    wanted, came = map(int, channels.groups())
    has = x.shape[1]
    if came != has:
        return f"{came} numbers in mean or std repeat grey images; give one number"
    if has == 1:
        return f"{wanted} numbers in mean and std, one for each channel, repeat grey images"
    return f"build it for {has} channels"


def load(path: str | Path, net: nn.Module, prefix: str | None = None) -> Loaded:
    """The checkpoint of `net` in a .safetensors file, or in one that torch.save wrote.

    What stands before the network's names is found, not asked for: dictionaries ("state_dict"),
    wrappers ("module.", "_orig_mod."). prefix: which, if several fit. Tied tensors may be there
    once; weight_norm and spectral_norm in their older or newer form; and what the class's own
    load_state_dict takes is taken. Objects beside tensors are passed over unread. Raises
    CheckpointError for a file that cannot be read, and for one that does not hold all of the
    network's tensors, or holds others beside them, in their shapes and dtypes and with finite
    values.
    """
    if not isinstance(path, str | Path):
        got = type(path).__name__
        raise CheckpointError(f"checkpoints.load: got a {got}, expected the path of a file")
    path = Path(path)
    who = f"checkpoints.load: {path.name:.{SHOWN}}"
    held, unread = _read(path)
    tensors, extras = _tensors(held, who)
    _refuse_quantised(tensors, who)
    state: dict[str, Any] = net.state_dict(keep_vars=True)
    expected = {n: x.detach() for n, x in state.items() if isinstance(x, Tensor)}
    shapes = {n: x.shape for n, x in expected.items() if not n.endswith(COUNTER)}
    places = _places(tensors, _spellings(state))
    start = _prefix(tensors, shapes, places, prefix, who)
    named = {n: at[len(start) :] for n, at in places.get(start, {}).items()}
    theirs = {n[len(start) :]: x for n, x in tensors.items() if n.startswith(start)}
    own = {*named.values()}
    theirs = {n: x for n, x in theirs.items() if "/" not in n or n in own}
    if fault := _misfit(theirs, named, shapes):
        found = _as_the_class_loads(net, theirs)
        if not found:
            reason = f"{who} does not fit the network: {fault}"
            raise CheckpointError(reason + (f". {_refusal(unread)}" if unread else ""))
    else:
        found = {n: theirs[named[n]] if n in named else x for n, x in expected.items()}
        _refuse_values(found, state, start, who)
    _refuse_extras(extras, state, start, who)
    theta = {n: x.detach().cpu().clone() for n, x in (dict(net.named_buffers()) | found).items()}
    inside = {start + n for n in theirs}
    outside = [n for n in tensors if n not in inside]
    return Loaded(theta, start, outside, hashlib.sha256(path.read_bytes()).hexdigest())


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

    about: what it is and where it comes from (JSON values), kept as the file's metadata. Raises
    ValueError for a theta that is no state of `net`.
    """
    state = {n: x for n, x in net.state_dict().items() if isinstance(x, Tensor)}
    theta = stated("checkpoints.save", net, theta)
    flat = {n: theta[n].detach().cpu().clone().contiguous() for n in state}
    meta = {n: v if isinstance(v, str) else json.dumps(v) for n, v in about.items()}
    cache.write_atomic(Path(path), pack(flat, meta))


# Folders of `transformers`


def from_folder(path: str | Path) -> nn.Module:
    """The model in a folder that `save_pretrained` of `transformers` wrote, in evaluation mode.

    It keeps the precision of its files, whatever its config.json says, and the higher of several.
    These are safetensors, one or more with their index. No code in the folder is run, nothing is
    unpickled and nothing fetched. Raises CheckpointError without `transformers`, for a folder that
    asks for anything else, and for tensors that are not those of the model, in their shapes and
    with finite values.
    """
    who, path = f"checkpoints.from_folder: {path!s:.{SHOWN}}", _folder(path)
    transformers, config = _transformers(who), _config(path, who)
    _refuse_weights(path, who)
    model_class, precision = _model_class(transformers, config, who), _precision(path, who)
    with _quiet(transformers):
        try:
            net, found = model_class.from_pretrained(
                str(path),
                attn_implementation=None,  # else config.json may name one to fetch
                experts_implementation=None,
                dtype=precision,  # "auto" would round to what config.json says
                ignore_mismatched_sizes=True,  # so that they are listed
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (Exception, SystemExit) as error:  # transformers raises whatever it meets first
            cause = f"{who} cannot be loaded ({failure(error)})"
            raise CheckpointError(f"{cause}. Fix: see that all of it was copied") from error
    verbs = {"missing": "lacks", "unexpected": "has besides", "mismatched": "misfits"}
    faults = [
        f"{verb} {min(map(str, names))}"
        for kind, verb in verbs.items()
        if (names := found[f"{kind}_keys"])
    ]
    if faults:
        cause = f"{who} does not fit its config.json: {'; '.join(faults)}"
        raise CheckpointError(f"{cause}. Fix: see that weights and config.json are of one model")
    for name, x in net.state_dict().items():
        if fault := _fault(x, x.dtype):
            raise CheckpointError(f"{who}: {name!r:.{SHOWN}} {fault}")
    made: nn.Module = net.eval()
    return made


def to_folder(path: str | Path, model: Any, like: str | Path) -> None:
    """Write a model of `transformers` as `from_folder` reads it, with the tokenizer of a folder.

    Raises CheckpointError for other models, and OSError where the folder cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        got = f"got a {type(model).__name__}"
        raise CheckpointError(f"checkpoints.to_folder: {got}, expected a model of transformers")
    with _quiet(_transformers("checkpoints.to_folder")):
        try:
            model.save_pretrained(path)
        except SafetensorError as error:  # such as of a full disk
            raise OSError(failure(error)) from error
    for file in _folder(like).iterdir():
        copy = Path(path) / file.name
        belongs = file.name.startswith((*TOKENIZERS, "chat_template"))
        if belongs and file.is_file() and file.resolve() != copy.resolve():
            shutil.copyfile(file, copy)


def tokenizer(path: str | Path) -> Callable[[str], list[int]] | None:
    """What turns text into token ids, from a folder as in `from_folder`; None if it has none.

    Tokens that mark the beginning or the end of a text are not added. Raises CheckpointError.
    """
    who, path = f"checkpoints.tokenizer: {path!s:.{SHOWN}}", _folder(path)
    if not any(file.name.startswith(TOKENIZERS) for file in path.iterdir()):
        return None
    transformers = _transformers(who)
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).exists():
            _config(path, who, name)
    with _quiet(transformers):
        try:
            made = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except (Exception, SystemExit) as error:  # as above
            cause = f"{who} has a tokenizer that cannot be loaded ({failure(error)})"
            raise CheckpointError(f"{cause}. Fix: see that all of it was copied") from error
    return lambda text: list(made(text, add_special_tokens=False, verbose=False)["input_ids"])


def _folder(path: str | Path) -> Path:
    """The path of a folder. Raises CheckpointError for anything else."""
    if not isinstance(path, str | Path) or not os.path.isdir(path):
        raise CheckpointError(f"checkpoints: got {path!r:.{SHOWN}}, expected the path of a folder")
    return Path(path)


def _transformers(who: str) -> Any:
    """The package. Raises CheckpointError if it cannot be imported."""
    try:
        import transformers
    except ImportError as error:
        fix = "pip install 'mcnotes[transformers]'"
        raise CheckpointError(f"{who}: needs transformers ({error}). Fix: {fix}") from error
    return transformers


def _config(path: Path, who: str, name: str = "config.json") -> dict[str, Any]:
    """What this file says. Raises CheckpointError if it cannot be read, or asks for too much."""
    try:
        found = json.loads((path / name).read_text("utf8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        asked = {key for part in _parts(found) for key in part}
    except (OSError, ValueError, RecursionError) as error:
        cause = f"{who} has no {name} that can be read ({failure(error)})"
        expected = "expected a folder as save_pretrained of transformers writes"
        raise CheckpointError(f"{cause}, {expected}") from error
    for key, why in ASKS_TOO_MUCH.items():
        if key in asked:
            raise CheckpointError(f"{who}: {name} has {key!r}, {why}")
    return found


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    """All objects in what JSON gave, however deep."""
    if isinstance(config, dict):
        yield config
    for part in config.values() if isinstance(config, dict) else config:
        if isinstance(part, dict | list):
            yield from _parts(part)


def _model_class(transformers: Any, config: Mapping[str, Any], who: str) -> Any:
    """The class of `transformers` that a config.json names. Raises CheckpointError for others."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "nothing"
    try:
        kind = getattr(transformers, name, None)
    except Exception:  # a class that needs what is not installed
        kind = None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        of_class: Any = getattr(kind, "config_class", None)
        own, named = getattr(of_class, "model_type", None), config.get("model_type")
        if named not in (None, own):  # Gemma's class takes Llama's tensors, and computes otherwise
            cause = f"{who} is of class {name!r}, whose model_type is {own!r}, and says {named!r}"
            raise CheckpointError(f"{cause:.300}. Fix: see both in its config.json")
        return kind
    cause = f"{who} is of class {name!r:.{SHOWN}}, which is no model of transformers here"
    raise CheckpointError(f"{cause}. Fix: see `architectures` in its config.json")


def _refuse_weights(path: Path, who: str) -> None:
    """Raise CheckpointError unless a folder holds the weights of a whole model as safetensors."""
    if (path / "adapter_config.json").exists():
        fix = "save what merge_and_unload() of peft gives"
        raise CheckpointError(f"{who} holds an adapter, expected a whole model. Fix: {fix}")
    if any((path / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
    if pickled:
        cause = f"{who} holds {pickled[0]} and no safetensors, and unpickling can run any code"
        fix = "if you trust it, load it with transformers, and save_pretrained"
        raise CheckpointError(f"{cause}. Fix: {fix}")
    raise CheckpointError(f"{who} holds no model.safetensors, nor an index of several")


def _precision(path: Path, who: str) -> torch.dtype:
    """The precision that holds all floats of a folder's safetensors.

    Raises CheckpointError for files that cannot be read, and for weights of 8 bits, which would be
    read as floats, without their scales.
    """
    index = path / "model.safetensors.index.json"
    found: set[torch.dtype] = set()
    try:
        names = {"model.safetensors"}
        if not (path / "model.safetensors").exists():  # transformers looks in the same order
            names = {*json.loads(index.read_text("utf8"))["weight_map"].values()}
        for name in sorted(names):
            for tensor, dtype in _header(path / name).items():
                if dtype not in KEPT_AS and (dtype.startswith("F") or tensor.endswith("weight")):
                    cause = (
                        f"{who}: {tensor!r:.{SHOWN}} is {dtype:.{SHOWN}}, and has lost precision"
                    )
                    raise CheckpointError(f"{cause}. Fix: take the weights before that")
                found |= {KEPT_AS[dtype]} if dtype in KEPT_AS else set()
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        cause = f"{who} cannot be loaded ({failure(error)})"
        raise CheckpointError(f"{cause}. Fix: see that all of it was copied") from error
    return reduce(torch.promote_types, found) if found else torch.float32


def _header(path: Path) -> dict[str, str]:
    """The type of each tensor in a .safetensors file."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name:.{SHOWN}} is no .safetensors")
    with safe_open(str(path), framework="pt") as file:
        return {n: file.get_slice(n).get_dtype() for n in file.keys()}  # noqa: SIM118


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no notes of `transformers`, which stand in errors where they matter."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# Files that torch.save wrote


class _Unread:
    """Stands for any class or function that a file names. It gives a dictionary, and runs nothing.

    PyTorch fills dictionaries alone: so what is in those of a class of their own can be read.
    """

    def __new__(cls, *_: Any) -> Any:
        return Counter()


class _Blank:
    """As `_Unread`, where the state is no dictionary: nothing is read."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


_READING = Lock()  # what stands for the names in a file is the same for all threads


def _read(path: Path) -> tuple[Any, list[str]]:
    """What a file holds, and the classes and functions that it names, which stay unread.

    Each of these names stands for an empty class while the file is read: its own is never imported,
    let alone called.
    """
    unread: list[str] = []
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait without end
            raise OSError("it is no regular file")
        if path.suffix.lower() == ".safetensors":
            return cache.read_tensors(path), []
        with warnings.catch_warnings(), _READING:
            warnings.simplefilter("ignore")
            unread = _unknown(path)
            try:
                return _unpickled(path, unread, _Unread), unread
            except Exception:
                if not unread:
                    raise
                return _unpickled(path, unread, _Blank), unread
    except Exception as error:  # damaged files raise whatever their reader meets first
        cause = f"{path.name:.{SHOWN}} cannot be read ({failure(error).split('. ')[0]})"
        expected = f"expected tensors in dictionaries. {_remedy(path, unread, error)}"
        raise CheckpointError(f"checkpoints.load: {cause}, {expected}") from error


def _remedy(path: Path, unread: Sequence[str], error: Exception) -> str:
    """What to do about a file that cannot be read."""
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        return "Fix: see the path, and whether you may read the file"
    if "torchscript" in str(error):
        return "Fix: save torch.jit.load(…).state_dict()"
    with path.open("rb") as file:
        pickled = file.read(4).startswith((b"PK\3\4", b"\x80"))
    if pickled and isinstance(error, UnpicklingError):
        return _refusal(unread)
    return "Fix: see that torch.save or safetensors wrote the file, and that all of it was copied"


def _unknown(path: Path) -> list[str]:
    """The classes and functions that a file names and that PyTorch itself would not read."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # before PyTorch 1.6 files were no archives
            return [*COMMON]
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _unpickled(path: Path, names: Sequence[str], stand_in: type) -> Any:
    known: list[Any] = [(_Blank if n.startswith("numpy.") else stand_in, n) for n in names]
    with torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(unread: Sequence[str]) -> str:
    """Why objects of these classes are not read, and what to do."""
    what = "anything else"
    if unread:
        what = f"{', '.join(unread):.{2 * SHOWN}} ({len(unread)} names in the file)"
    fix = "if you trust it, torch.load(…, weights_only=False), and save the state_dict()"
    return f"Unpickling {what} can run any code. Fix: {fix}"


def _tensors(held: Any, who: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by the names of what is around them, as "state_dict/fc.weight"; extra states.

    Raises CheckpointError for two tensors of one name, and for dictionaries and lists without end,
    such as one that holds itself.
    """
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Any] = {}
    waiting, characters = [("", held)], 0
    while waiting:
        name, value = waiting.pop()
        characters += len(name)
        if characters > MOST_CHARACTERS:
            cause = f"{who} holds dictionaries that are nested without end, expected a network's"
            raise CheckpointError(f"{cause}. Fix: save the state_dict() alone")
        if isinstance(value, Tensor):
            name = name.removesuffix("/").replace("_orig_mod.", "")
            if name in tensors:
                cause = f"{who} holds two tensors of the name {name!r:.{SHOWN}}, expected one"
                raise CheckpointError(f"{cause}. Fix: save the state_dict() alone")
            tensors[name] = value
        elif name.endswith(f"{EXTRA}/"):
            extras[name.removesuffix("/").replace("_orig_mod.", "")] = value
        else:
            inner = [(f"{name}{key}/", x) for key, x in _items(value)]
            waiting.extend(reversed(inner))
    return tensors, extras


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and values, or places and values of a sequence, that may hold tensors."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = dict.items(value)  # `value.items` may be what a file has put there
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    for key, x in pairs:
        if isinstance(x, Tensor | dict | list | tuple) or str(key).endswith(EXTRA):
            yield key, x


def _refuse_quantised(tensors: Theta, who: str) -> None:
    for name, x in tensors.items():
        if x.is_quantized or name.endswith("zero_point"):
            cause = f"{who}: {name!r:.{SHOWN}} is quantised, which loses precision permanently"
            raise CheckpointError(f"{cause}. Fix: take the float32 file")


def _refuse_values(found: Theta, state: Mapping[str, Any], start: str, who: str) -> None:
    """Raise CheckpointError unless values are sound, and those of tied tensors equal."""
    tied: dict[int, str] = {}
    for name, x in found.items():
        if fault := _fault(x, state[name].dtype):
            raise CheckpointError(f"{who}: {start + name!r:.{SHOWN}} {fault}")
        if name.endswith("running_var") and bool((x < 0).any()):
            cause = f"{who}: {start + name!r:.{SHOWN}} holds variances below 0"
            raise CheckpointError(f"{cause}. Fix: take an earlier checkpoint")
        one = tied.setdefault(id(state[name]), name)
        if not torch.equal(x, found[one]):
            cause = f"{who}: {one!r} and {name!r} are one tensor of the network, but differ"
            raise CheckpointError(f"{cause}. Fix: build the architecture it was trained as")


def _refuse_extras(
    extras: Mapping[str, Any], state: Mapping[str, Any], start: str, who: str
) -> None:
    """Raise CheckpointError unless what modules keep beside tensors is the network's own."""
    theirs = {n.removeprefix(start): x for n, x in extras.items() if n.startswith(start)}
    for name, value in theirs.items():
        try:
            same = name in state and bool(state[name] == value)
        except (RuntimeError, TypeError, ValueError):  # of values that hold tensors or arrays
            same = False
        if not same:
            cause = f"{who}: {name!r:.{SHOWN}}, which is no tensor, differs from the network's"
            raise CheckpointError(f"{cause}. Fix: build it with the arguments it was trained with")


def _spellings(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """By each name that a file may use, the network's tensors that it may mean."""
    names: dict[int, list[str]] = {}
    for name, x in state.items():
        if isinstance(x, Tensor):
            names.setdefault(id(x), []).append(name)
    meant: dict[str, list[str]] = {}
    for tied in names.values():
        for spelling in dict.fromkeys(other for name in tied for other in _others(name)):
            meant.setdefault(spelling, []).extend(tied)
    return meant


def _others(name: str) -> Iterator[str]:
    """The name itself, and how other versions of PyTorch spell it."""
    name = name.replace("_orig_mod.", "")
    yield name
    place, parametrized, last = name.rpartition("parametrizations.")
    tensor, _, part = last.partition(".")
    if parametrized and part in OLDER:
        yield f"{place}{tensor}{OLDER[part]}"
    place, dot, last = name.rpartition(".")
    for part, ending in OLDER.items():
        if last.endswith(ending):
            yield f"{place}{dot}parametrizations.{last.removesuffix(ending)}.{part}"


def _places(tensors: Theta, meant: Mapping[str, Sequence[str]]) -> Places:
    """The network's tensors behind each prefix, which is "" or ends a word.

    Only ends of names that are as long as one of the network's are looked at: a name of any length
    costs no more.
    """
    lengths = sorted({len(name) for name in meant}, reverse=True)
    places: Places = {}
    for name in tensors:
        for cut in (len(name) - length for length in lengths if length <= len(name)):
            if (cut == 0 or name[cut - 1] in "./") and name[cut:] in meant:
                there = places.setdefault(name[:cut], {})
                for own in meant[name[cut:]]:
                    if own not in there or name[cut:] == own.replace("_orig_mod.", ""):
                        there[own] = name
    return places


def _prefix(tensors: Theta, shapes: Shapes, places: Places, wanted: str | None, who: str) -> str:
    """What stands before the network's names in the file: the nearest miss, where nothing fits.

    shapes: of the network's tensors. wanted: which, if several fit; dots and slashes at its ends do
    not matter. Raises CheckpointError if several fit that hold different networks.
    """
    fitting = [
        start
        for start, there in places.items()
        if all(n in there and tensors[there[n]].shape == x for n, x in shapes.items())
    ]
    chosen = [s for s in fitting if wanted is None or s.strip("./") == wanted.strip("./")]
    if (fitting and not chosen) or not _same_network(tensors, [places[s] for s in chosen], shapes):
        raise CheckpointError(
            f"{who} holds networks that fit at {fitting}. Fix: name one of them as `prefix`"
        )
    count = {start: len(shapes.keys() & there.keys()) for start, there in places.items()}
    nearest = min(places, key=lambda s: (-count[s], len(s)), default="")
    return chosen[0] if chosen else nearest


def _same_network(tensors: Theta, places: Sequence[dict[str, str]], shapes: Shapes) -> bool:
    """Do the same values stand in all these places?"""
    return all(
        torch.equal(tensors[there[name]], tensors[places[0][name]])
        for there in places[1:]
        for name in shapes
    )


def _as_the_class_loads(net: nn.Module, theirs: Theta) -> Theta:
    """What the class's own load_state_dict makes of the tensors; {} if it does not take them.

    Or does not fill all of the network, or would convert what it takes.
    """
    made = duplicate(net)
    state = {n: x for n, x in made.state_dict().items() if isinstance(x, Tensor)}
    floats = {n: x for n, x in state.items() if x.is_floating_point()}
    kinds = {x.dtype for x in floats.values()}
    if any(_fault(x, x.dtype) or x.dtype not in {*kinds, torch.int64} for x in theirs.values()):
        return {}
    for x in floats.values():
        x.fill_(torch.nan)
    try:
        made.load_state_dict(dict(theirs))
    except (Exception, SystemExit):  # of the user's class
        return {}
    state = {n: made.state_dict()[n] for n in state}
    return {} if any(_fault(x, x.dtype) for x in state.values()) else state


def _misfit(theirs: Theta, named: Mapping[str, str], expected: Shapes) -> str:
    """How the tensors in a file differ from the network's, and what to do; "" if they do not.

    named: what the network's tensors are called in the file. expected: their shapes.
    """
    besides = theirs.keys() - {*named.values()}
    faults = []
    for verb, names in (
        ("lacks", expected.keys() - named.keys()),
        ("has besides", {n for n in besides if not n.endswith(COUNTER)}),
    ):
        if names:
            first = f"{min(names)!r:.{SHOWN}}"
            several = f"{len(names)} tensors, such as " if len(names) > 1 else ""
            faults.append(f"it {verb} {several}{first}")
    own = {n: theirs[named[n]].shape for n in expected if n in named}
    wrong = [n for n in own if own[n] != expected[n]]
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
    if x.numel() * x.itemsize > x.untyped_storage().nbytes() + ROOM:  # as `expand` makes
        return "repeats its numbers in a large tensor. Fix: save a contiguous copy"
    return "" if x.isfinite().all() else "holds NaN or infinity. Fix: take an earlier checkpoint"
