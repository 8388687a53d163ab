"""How a network is called, and on what: one way from anybody's batches to a network's outputs.

*Inputs* are what a network takes at once: a tensor is its one argument, a tuple are several, a
mapping are keywords; tensors have their batch in front. `Batches` are inputs with their targets.
`data.Split` is the book's own, `data.Loader` makes them of whatever a user iterates over.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from mcnotes.curves import Theta

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
    """The network's outputs with the parameters and buffers `theta`; it is left as it was.

    What `theta` leaves out is the network's own, but tied tensors are one: one name is enough.
    """
    positional = inputs if isinstance(inputs, tuple) else (inputs,)
    args, keywords = ((), dict(inputs)) if isinstance(inputs, Mapping) else (positional, {})
    return functional_call(net, named_once(net, theta), args, keywords, tie_weights=False)


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


@contextmanager
def sound_gradients(net: nn.Module) -> Iterator[None]:
    """Without oneDNN, where its gradients of `net` would be wrong or end the process; else nothing.

    With AVX2 and no AVX-512, the gradient of a strided 1 x 1 convolution of fewer than 8 input
    channels writes beyond its memory (oneDNN's issue 6035). Other kernels are slower and right.
    """
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2"
    limited |= os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2")
    before: Any = mkldnn.enabled
    if limited and any(map(_too_narrow, net.modules())):
        mkldnn.enabled = False  # type: ignore[assignment]  # `mkldnn.flags` sets more than this
    try:
        yield
    finally:
        mkldnn.enabled = before


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
