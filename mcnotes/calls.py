"""How a network is called, and on what: one way from any user's batches to a network's outputs.

*Inputs* are what a network takes in one call: a tensor is its only argument, a tuple holds several
arguments, and a mapping holds keyword arguments. The first axis of tensors is the batch. `Batches`
are inputs with their targets: `data.Split` holds those of the book, and `data.Loader` makes them
from whatever a user iterates over.
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
    """Networks, or their inputs, do not fit; the message says why and what to do."""


class Batches(Protocol):
    """Inputs with their targets on one device, for any number of passes."""

    @property
    def device(self) -> torch.device:
        """The device of the batches."""

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Any = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass over all batches. A source with a fixed batch size ignores `size`.

        generator: for a random order; it also draws the augmentations. drop_last: leave out a last
        batch that is smaller than the others.
        """

    def count(self, size: int) -> int:
        """The number of batches in a pass; 0 if it is not known in advance."""

    def shares(self, size: int, cores: int) -> Sequence[Iterable[Batch]]:
        """One pass in parts: the first batch, then up to `cores` that may run in parallel."""


class Training(Protocol):
    """What the training loop needs; a `data.Task` is an example."""

    @property
    def train(self) -> Batches:
        """The training data."""

    @property
    def augment(self) -> Any:
        """The argument `augment` of `train.batches`."""

    @property
    def device(self) -> torch.device:
        """The device of the training data."""


def call(net: nn.Module, theta: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """The network's outputs with the parameters and buffers `theta`.

    The network and the inputs are left unchanged. Tensors that `theta` leaves out are taken from
    the network. For tied tensors one of their names is enough.
    """
    return within(net, theta, lambda: applied(net, arranged(net, inputs)))


def within(net: nn.Module, theta: Mapping[str, Tensor], work: Callable[[], T]) -> T:
    """The result of `work()`, run while the network has the parameters and buffers `theta`.

    Gradients must be taken inside `work`: a network with activation checkpointing runs again during
    the backward pass, with the parameters that it has at that time. See also `call`.
    """
    given = named_once(net, theta)
    inside = {f"net.{name}": x for name, x in given.items()}
    done: T = functional_call(_Holder(net, work), inside, (), tie_weights=False)
    _take_back(given, inside)
    return done


def _take_back(given: Theta, inside: Theta) -> None:
    """Copy the values of buffers to which a network has assigned new tensors.

    inside: the tensors that PyTorch found in place of `given` at the end, in the same order.
    """
    for old, new in zip(given.values(), inside.values(), strict=True):
        if new is not old and not old.requires_grad and new.shape == old.shape:
            old.copy_(new.detach())


class _Holder(nn.Module):
    """A module whose forward pass is `work` on a network."""

    def __init__(self, net: nn.Module, work: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.work = net, work

    def forward(self) -> Any:
        return self.work()


def swapped(net: nn.Module, theta: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """As `call`, without copying the inputs, so that `torch.compile` can trace it."""
    args, keywords = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    return functional_call(net, named_once(net, theta), args, keywords, tie_weights=False)


def applied(net: nn.Module, inputs: Inputs) -> Any:
    """The outputs of a network with its own parameters and buffers."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


LAYOUTS: WeakKeyDictionary[nn.Module, dict[bool, torch.memory_format]] = WeakKeyDictionary()
"""The memory format of images, by network and by training mode; see `arranged`."""


def arranged(net: nn.Module, inputs: Inputs) -> Inputs:
    """A copy of the inputs, which the network may overwrite, in the memory format that it takes.

    Networks with `x.view(n, -1)` after a convolution fail on images in channels-last format.
    Whether this network does is tried with two images, once for each mode, and remembered.
    """
    layout = torch.preserve_format
    if any(map(_channels_last, tree_leaves(inputs))):
        known, few = LAYOUTS.setdefault(net, {}), first(inputs, 2)
        if net.training not in known:
            for way in (torch.contiguous_format, torch.preserve_format):
                if _runs(net, _copied(few, way)):
                    known[net.training] = way
        layout = known.get(net.training, layout)  # if both fail, the call itself raises the error
    return _copied(inputs, layout)


def _runs(net: nn.Module, inputs: Inputs) -> bool:
    """Whether a copy of the network runs on these inputs. The network is not changed."""
    state = {n: x.detach().clone() for n, x in (*net.named_parameters(), *net.named_buffers())}
    device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
    try:
        other = duplicate(net, shared=True)
        with torch.no_grad(), seeded(0, device):
            within(other, state, lambda: applied(other, inputs))
    except Exception:  # whatever the user's network raises
        return False
    return True


def _channels_last(x: Any) -> bool:
    """Whether these are images in channels-last memory format."""
    return _plain(x) and x.dim() > 3 and x.stride(1) == 1 and x.shape[2:].numel() > 1


def _copied(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    """Copy plain tensors; those with which `symmetry` traces are never overwritten."""
    copied: Inputs = tree_map_only(
        Tensor, lambda x: x.clone(memory_format=layout) if _plain(x) else x, inputs
    )
    return copied


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter)


_DRAWING = RLock()  # held by the one thread that has seeded the generators


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators of the CPU and of this device, and restore them at the end.

    Other threads wait, because all threads share PyTorch's generators.
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
    """A deep copy, also of networks that hold non-leaf tensors, which `copy.deepcopy` refuses.

    Old-style `weight_norm`, `spectral_norm` and pruning keep such tensors; the copy has their
    values. shared: the copy shares all tensors with the network. Raises InputError for a network
    that holds what cannot be copied, such as a lock or an open file.
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
            f"the network cannot be copied, for {kept} cannot ({reason:.200}). Fix: set that to "
            "None, or give its class a __deepcopy__."
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
    """`theta` under every name that `call` must set: all names of tied tensors, one of each module.

    `functional_call` does not restore a tensor that it has set twice, and refuses tied tensors that
    differ.
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
    """Check that `theta` is a state of `net`, and add the buffers that no state_dict holds.

    All tensors are copied: a network may overwrite its buffers, and even parameters, as an
    embedding with `max_norm` does. device: where the tensors must be, if not None. Raises
    ValueError, with a message that begins with `who`, for missing and unknown names, for wrong
    shapes and dtypes, for tied tensors that differ, and for tensors without values or on several
    devices.
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
                f"{who}: {first!r} and {name!r} are one tensor in the network, but differ"
            )
    state = {name: theta[one[id(own[name])]] if name in own else x for name, x in theta.items()}
    state |= {name: own[name].detach() for name in lacking}
    copies = {id(x): x.detach().clone() for x in state.values()}
    return {name: copies[id(x)] for name, x in state.items()}


def _check_like(who: str, x: Tensor, own: Tensor, device: torch.device) -> None:
    """Raise ValueError unless x can replace the network's own tensor, on `device`."""
    if x.shape != own.shape or x.is_floating_point() != own.is_floating_point():
        raise ValueError(f"{who} is {[*x.shape]} {x.dtype}, expected {[*own.shape]} {own.dtype}")
    if x.is_meta or not same_device(x.device, device):
        raise ValueError(f"{who} lies on {x.device}, expected {device}")


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are the same; "cuda" counts as "cuda:0"."""
    return a.type == b.type and (a.index or 0) == (b.index or 0)


@contextmanager
def sound_gradients(net: nn.Module) -> Iterator[None]:
    """Switch oneDNN off where its gradients of `net` would be wrong or crash the process.

    On processors with AVX2 but without AVX-512, the gradient of a strided 1 x 1 convolution of
    fewer than 8 input channels writes out of bounds (oneDNN's issue 6035). Other kernels are slower
    and correct.
    """
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2"
    limited |= os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2")
    if not (limited and any(map(_too_narrow, net.modules()))):
        yield
        return
    before = torch._C._get_mkldnn_enabled()
    # PyTorch's test tools freeze `mkldnn.enabled`, and `mkldnn.flags` sets more than this flag.
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _too_narrow(module: nn.Module) -> bool:
    """Whether this is a strided 1 x 1 convolution of fewer than 8 input channels."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    single, strided = set(module.kernel_size) == {1}, max(module.stride) > 1
    return single and strided and module.in_channels // module.groups < 8


def logits(outputs: Any) -> Tensor:
    """The logits: the outputs themselves, their field or key "logits", or the first of several.

    Raises TypeError for outputs of any other form.
    """
    return heads(outputs)[0]


def heads(outputs: Any) -> list[Tensor]:
    """The logits, followed by those of auxiliary heads: further tensors of the same shape.

    Raises TypeError for outputs of any other form.
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
    """The value of this key, or else of this attribute; None if there is neither."""
    if isinstance(outputs, Mapping) and name in outputs:
        return outputs[name]
    return getattr(outputs, name, None)


def plain(inputs: Any) -> Inputs:
    """The same inputs, with a mapping of any type as a dictionary.

    Raises TypeError for objects other than tensors, numbers and text, because tensors inside them
    would not be found.
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
    """The number of samples, which is the length of the first tensor.

    Raises ValueError if there is no tensor with an axis.
    """
    sizes = (len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim())
    if (size := next(sizes, None)) is None:
        raise ValueError("found no tensor with a batch axis among the inputs")
    return size


def doubled(inputs: Any) -> Any:
    """An example of one sample, twice, so that what runs along the batch is seen.

    Others are returned as they are: beside several samples, a tensor of one is for all of them.
    """
    try:
        alone = count(inputs) == 1
    except ValueError:  # no tensor has a batch
        return inputs

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if alone and x.dim() and len(x) == 1 else x

    return tree_map_only(Tensor, twice, inputs)


def first(inputs: Inputs, n: int) -> Any:
    """The first `n` samples. A single vector, which may be one sample or many, is not cut."""
    wide = [len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 1]

    def cut(x: Tensor) -> Tensor:
        return x[:n] if x.dim() > 1 or (x.dim() and wide and len(x) == wide[0]) else x

    return tree_map_only(Tensor, cut, inputs)
