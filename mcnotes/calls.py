"""How a network is called, and on what: one way from anybody's batches to a network's outputs.

*Inputs* are what a network takes at once: a tensor is its one argument, a tuple are several, a
mapping are keywords; tensors have their batch in front. `Batches` are inputs with their targets.
`data.Split` is the book's own, `data.Loader` makes them of whatever a user iterates over.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.curves import Theta
from mcnotes.names import suggest

T = TypeVar("T")
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Batch = tuple[Any, Any]  # inputs, targets


class InputError(ValueError):
    """Networks, or what they are to be shown, do not fit; the text says why and what to do."""


class Batches(Protocol):
    """Inputs with their targets on one device, as often as wanted."""

    @property
    def device(self) -> torch.device:
        """Where the batches lie."""

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Any = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass. Those who cannot cut as they like give batches of a size of their own.

        generator: in random order; it also drives `augment`. drop_last: all are of one size.
        """

    def count(self, size: int) -> int:
        """How many batches a pass has; 0 where that is not known beforehand."""

    def shares(self, size: int, cores: int) -> Sequence[Iterable[Batch]]:
        """One pass in parts: the first batch, then up to `cores` that may run side by side."""


class Training(Protocol):
    """What the loop of `train` needs; a `data.Task` is one."""

    @property
    def train(self) -> Batches:
        """What to train on."""

    @property
    def augment(self) -> Any:
        """What `train.batches` takes as `augment`."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""


def call(net: nn.Module, theta: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """The network's outputs with the parameters and buffers `theta`.

    The network and the inputs are left as they were. What `theta` leaves out is the network's own,
    but tied tensors are one: one name is enough.
    """
    return within(net, theta, lambda: applied(net, arranged(net, inputs)))


def within(net: nn.Module, theta: Mapping[str, Tensor], work: Callable[[], T]) -> T:
    """What `work` gives while the network has the parameters and buffers `theta`; see `call`.

    Who takes a gradient must do so within: a network with activation checkpointing runs again
    during the backward pass, with the parameters that it finds then.
    """
    given = named_once(net, theta)
    inside = {f"net.{name}": x for name, x in given.items()}
    done: T = functional_call(_Holder(net, work), inside, (), tie_weights=False)
    _take_back(given, inside)
    return done


def _take_back(given: Theta, inside: Theta) -> None:
    """Buffers to which a network has assigned other tensors get their values.

    inside: what PyTorch found in the places of `given` in the end, in the same order.
    """
    for old, new in zip(given.values(), inside.values(), strict=True):
        if new is not old and not old.requires_grad and new.shape == old.shape:
            old.copy_(new.detach())


class _Holder(nn.Module):
    """A network, and what is to be done with it."""

    def __init__(self, net: nn.Module, work: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.work = net, work

    def forward(self) -> Any:
        return self.work()


def swapped(net: nn.Module, theta: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """As `call`, of the inputs as they are: what `torch.compile` can follow."""
    args, keywords = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    return functional_call(net, named_once(net, theta), args, keywords, tie_weights=False)


def applied(net: nn.Module, inputs: Inputs) -> Any:
    """The outputs of a network as it is."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


LAYOUTS: WeakKeyDictionary[nn.Module, dict[bool, torch.memory_format]] = WeakKeyDictionary()
"""By network and by training mode, how images must lie in memory; see `arranged`."""


def arranged(net: nn.Module, inputs: Inputs) -> Inputs:
    """A copy of the inputs, which a network may write over, as it wants them to lie in memory.

    Networks with `x.view(n, -1)` behind a convolution refuse images that lie channels last. Whether
    this one does is found out by two images when it first gets some in its mode, and kept.
    """
    layout = torch.preserve_format
    if any(map(_channels_last, tree_leaves(inputs))):
        known, few = LAYOUTS.setdefault(net, {}), first(inputs, 2)
        if net.training not in known:
            for way in (torch.contiguous_format, torch.preserve_format):
                if _runs(net, _copied(few, way)):
                    known[net.training] = way
        layout = known.get(net.training, layout)  # if all fail, the call will say why
    return _copied(inputs, layout)


def _runs(net: nn.Module, inputs: Inputs) -> bool:
    """Does a copy of the network run on these inputs? Nothing of it stays."""
    state = {n: x.detach().clone() for n, x in (*net.named_parameters(), *net.named_buffers())}
    device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
    try:
        other = duplicate(net, shared=True)
        with torch.no_grad(), seeded(0, device):
            within(other, state, lambda: applied(other, inputs))
    except Exception:  # of the user's network
        return False
    return True


def _channels_last(x: Any) -> bool:
    """Do the channels of these images lie beside each other in memory?"""
    return _plain(x) and x.dim() > 3 and x.stride(1) == 1 and x.shape[2:].numel() > 1


def _copied(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    """Tensors that only follow operators (of `symmetry`) are never written over: they stay."""
    copied: Inputs = tree_map_only(
        Tensor, lambda x: x.clone(memory_format=layout) if _plain(x) else x, inputs
    )
    return copied


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter)


_DRAWING = RLock()  # held by the one thread that has seeded the generators


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` for a while, on the CPU and on this device; then all as before.

    Another thread waits: PyTorch's generators are those of all threads.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        k = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[k])
    with _DRAWING:
        before = [g.get_state() for g in generators]
        try:
            for g in generators:
                g.manual_seed(seed)
            yield
        finally:
            for g, state in zip(generators, before, strict=True):
                g.set_state(state)


def duplicate(net: nn.Module, *, shared: bool = False) -> nn.Module:
    """A deep copy, also of networks that keep tensors with a history, which deepcopy refuses.

    Old-style `weight_norm`, `spectral_norm` and pruning keep some; the copy has their values.
    shared: all tensors are those of the network itself. Raises InputError for a network that keeps
    what cannot be copied, such as a lock or an open file.
    """
    held = [x for m in net.modules() for x in tree_leaves([m._parameters, m._buffers, vars(m)])]
    tensors = [x for x in held if isinstance(x, Tensor) and (shared or not x.is_leaf)]
    memo = {id(x): x if shared else x.detach().clone() for x in tensors}
    try:
        made = copy.deepcopy(net, memo)
    except Exception as error:  # of whatever the network keeps
        kept = _not_copied(net, memo) or "what it keeps"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the network cannot be copied, for {kept} cannot ({reason:.200}); set that to None, "
            "or give its class a __deepcopy__"
        ) from error
    LAYOUTS[made] = LAYOUTS.setdefault(net, {})
    return made


def _not_copied(net: nn.Module, memo: Mapping[int, Tensor]) -> str:
    """The first attribute of a module that deepcopy does not take, in words; "" if none."""
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            try:
                if name not in ("_modules", "_parameters", "_buffers"):
                    copy.deepcopy(value, dict(memo))
            except Exception:  # of whatever it is
                return f"the attribute {f'{path}.{name}'.lstrip('.')!r}"
    return ""


def named_once(net: nn.Module, theta: Mapping[str, Tensor]) -> Theta:
    """`theta` by every name that `call` must set: all names of tied tensors, one of each module.

    `functional_call` would not take out what it put in twice, and refuses tied tensors that differ.
    """
    own = {
        f"{path}.{name}".removeprefix("."): id(x)
        for path, module in net.named_modules()
        for name, x in (*module._parameters.items(), *module._buffers.items())
        if x is not None
    }
    tied = {at: theta[name] for name, at in own.items() if name in theta}
    return {n: theta.get(n, tied[at]) for n, at in own.items() if at in tied}


def stated(
    who: str, net: nn.Module, theta: Mapping[str, Tensor], device: torch.device | None = None
) -> Theta:
    """`theta`, if it is a state of `net`, with the network's own buffers that no state_dict holds.

    All are copies: a network may write over its buffers, and over parameters, as an embedding with
    `max_norm` does. device: where it must lie, if that matters.
    Raises ValueError, which begins with `who`, for names that are missing or unknown, for other
    shapes or kinds of numbers, for tied tensors that differ, and for tensors without values or on
    several devices.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"{who}: got a {type(net).__name__} as network, expected an nn.Module")
    if not isinstance(theta, Mapping) or not all(isinstance(x, Tensor) for x in theta.values()):
        raise ValueError(f"{who}: got a {type(theta).__name__} as state, expected tensors by name")
    own: Theta = dict(net.named_parameters(remove_duplicate=False))
    own |= dict(net.named_buffers(remove_duplicate=False))
    if lazy := [name for name, x in own.items() if nn.parameter.is_lazy(x)]:
        raise ValueError(f"{who}: {lazy[0]!r} has no shape. Fix: run the network once")
    one = {id(own[name]): name for name in reversed([*own]) if name in theta}  # of its names
    lacking = [name for name, x in own.items() if id(x) not in one]
    kept = net.state_dict(keep_vars=True)
    if missing := [name for name in lacking if name in kept]:
        raise ValueError(f"{who}: the state lacks {missing[0]!r} ({len(missing)} such names)")
    for name, x in theta.items():
        if name not in own:
            if name.endswith("_extra_state"):
                continue
            raise ValueError(f"{who}: the network has no {name!r}{suggest(name, own)}")
        device = x.device if device is None else device
        _check_like(f"{who}: {name!r}", x, own[name], device)
        first = one[id(own[name])]
        if theta[first] is not x and not torch.equal(x, theta[first]):
            raise ValueError(
                f"{who}: {first!r} and {name!r} are one tensor of the network, but differ"
            )
    state = {name: theta[one[id(own[name])]] if name in own else x for name, x in theta.items()}
    state |= {name: own[name].detach() for name in lacking}
    copies = {id(x): x.detach().clone() for x in state.values()}
    return {name: copies[id(x)] for name, x in state.items()}


def _check_like(who: str, x: Tensor, own: Tensor, device: torch.device) -> None:
    """Raise ValueError unless x can take the place of the network's own tensor, on `device`."""
    if x.shape != own.shape or x.is_floating_point() != own.is_floating_point():
        raise ValueError(f"{who} is {[*x.shape]} {x.dtype}, expected {[*own.shape]} {own.dtype}")
    if x.is_meta or not same_device(x.device, device):
        raise ValueError(f"{who} lies on {x.device}, expected {device}")


def same_device(a: torch.device, b: torch.device) -> bool:
    """Are they one? "cuda" is taken for "cuda:0"."""
    return a.type == b.type and (a.index or 0) == (b.index or 0)


@contextmanager
def sound_gradients(net: nn.Module) -> Iterator[None]:
    """Without oneDNN, where its gradients of `net` would be wrong or end the process; else nothing.

    With AVX2 and no AVX-512, the gradient of a strided 1 x 1 convolution of fewer than 8 input
    channels writes beyond its memory (oneDNN's issue 6035). Other kernels are slower and right.
    """
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2"
    limited |= os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2")
    if not (limited and any(map(_too_narrow, net.modules()))):
        yield
        return
    before = torch._C._get_mkldnn_enabled()
    # `mkldnn.enabled` may be frozen, as PyTorch's own test tools do, and `mkldnn.flags` sets more.
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _too_narrow(module: nn.Module) -> bool:
    """Is this a strided convolution of single pixels that reads fewer than 8 channels?"""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    single, strided = set(module.kernel_size) == {1}, max(module.stride) > 1
    return single and strided and module.in_channels // module.groups < 8


def logits(outputs: Any) -> Tensor:
    """The tensor of logits: outputs themselves, their field or key "logits", or the first of many.

    Raises TypeError for outputs of another form.
    """
    return heads(outputs)[0]


def heads(outputs: Any) -> list[Tensor]:
    """The logits, and after them those of auxiliary heads: further tensors of the same shape.

    Raises TypeError for outputs of another form.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    found = field(outputs, "logits")
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        first = outputs[0] if found is None else found
        alike = [x for x in outputs[1:] if isinstance(x, Tensor) and x.shape == first.shape]
        return [first, *alike] if len(alike) == len(outputs) - 1 else [first]
    if isinstance(found, Tensor):
        return [found]
    raise TypeError(f"found no logits in outputs of type {type(outputs).__name__}")


def field(outputs: Any, name: str) -> Any:
    """The value under this key, or else of this attribute; None if there is neither."""
    if isinstance(outputs, Mapping) and name in outputs:
        return outputs[name]
    return getattr(outputs, name, None)


def plain(inputs: Any) -> Inputs:
    """The same inputs, with any mapping as a dictionary.

    Raises TypeError for what else than tensors, numbers and text they hold: who looks for tensors
    would not find those within.
    """
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    for x in tree_leaves(inputs):
        if not isinstance(x, Tensor | bool | int | float | str | None):
            raise TypeError(
                f"got a {type(x).__name__} among the inputs of a network, expected "
                "tensors, alone or in tuples, lists and dictionaries"
            )
    return inputs  # type: ignore[no-any-return]


def count(inputs: Inputs) -> int:
    """How many samples there are: the length of the first tensor. ValueError if there is none."""
    sizes = (len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim())
    if (size := next(sizes, None)) is None:
        raise ValueError("found no tensor with a batch in front among the inputs")
    return size


def first(inputs: Inputs, n: int) -> Any:
    """The first `n` samples; a vector alone is one sample, or all of them, and stays."""
    wide = [len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 1]

    def cut(x: Tensor) -> Tensor:
        return x[:n] if x.dim() > 1 or (x.dim() and wide and len(x) == wide[0]) else x

    return tree_map_only(Tensor, cut, inputs)
