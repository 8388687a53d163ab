"""Run a network on other tensors, and leave it as it was."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from enum import Enum
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mcnotes.calls import InputError, Inputs, call, duplicate
from mcnotes.symmetry.units import SymmetryError

SCALARS = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
"""What may stand in an output beside tensors and holds none."""


def outputs(net: nn.Module, theta: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """All tensors that a network returns (see `calls.call`), in a fixed order.

    They may stand in containers, dataclasses or plain objects. Raises SymmetryError if there are
    none, or if something is returned that may hide one.
    """
    out = call(net, theta, inputs)
    found = [*tensors_in(out)]
    if not found:
        raise SymmetryError(
            f"the network returns no tensor, but {type(out).__name__}: nothing tells what it "
            "computes. Fix: wrap it in a module that returns its tensors."
        )
    return found


def tensors_in(value: Any, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """The tensors in nested containers, dataclasses and objects; seen: ids of those around it.

    Not those of a cache of `transformers`: it is a network's own, for the tokens to come, and units
    may stand in it in any order.
    """
    if isinstance(value, Tensor):
        yield value
    elif value is None or isinstance(value, SCALARS) or id(value) in seen or is_cache(value):
        return
    else:
        for part in parts(value):
            yield from tensors_in(part, seen | {id(value)})


def is_cache(value: Any) -> bool:
    """Whether it holds keys and values of earlier tokens, as `transformers` keep them."""
    kinds = ((kind.__module__, kind.__name__) for kind in type(value).__mro__)
    return ("transformers.cache_utils", "Cache") in kinds


def parts(value: Any) -> Iterable[Any]:
    """What a container, or an object such as a dataclass, holds.

    Raises SymmetryError for anything else, such as a generator or a function.
    """
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, Collection):
        return value
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    held = {n: getattr(value, n) for n in slots if hasattr(value, n)}
    held |= getattr(value, "__dict__", {})
    if not held or callable(value) or isinstance(value, Iterator | type):
        raise SymmetryError(
            f"the network returns a value of type {type(value).__name__}, in which tensors cannot "
            "be looked for. Fix: wrap it in a module that returns its tensors."
        )
    return held.values()


def inference_copy(net: nn.Module, train: bool) -> nn.Module:
    """A copy of the same tensors, so that nothing that a network remembers of a run stays in it.

    Its layers act as in evaluation; if `train`, auxiliary heads run.
    """
    try:
        net = duplicate(net, shared=True)
    except InputError as error:
        raise SymmetryError(str(error)) from error
    net.train()  # it forgets what it computed from others
    for m in net.modules():
        own = any(m.children()) and not type(m).__module__.startswith("torch.nn.")
        m.training = train and own
    return net


class Shared(AbstractContextManager[None]):
    """A setting of the process that threads share.

    The first thread to enter makes it, and the last one to leave undoes it.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        self.setting, self.lock, self.users = setting, Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                # PyTorch wants its managers left in the context in which they were entered, and
                # another thread may do that.
                self.context, self.made = copy_context(), self.setting()
                self.context.run(self.made.__enter__)
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.context.run(self.made.__exit__, None, None, None)


@Shared
@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention by its operators, one by one: `with unfused_attention:`.

    Networks are told that they are compiled: those of `transformers` then leave out what they
    choose by the values of a mask.
    """
    fastpath, flag = torch.backends.mha.get_fastpath_enabled(), torch.compiler._is_compiling_flag
    torch.backends.mha.set_fastpath_enabled(False)
    torch.compiler._is_compiling_flag = True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.compiler._is_compiling_flag = flag
