"""What networks of others bring: which cannot be followed at all, and what their errors mean."""

import traceback
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from mcnotes.symmetry.units import ExampleError, Labelled, SymmetryError

Frames = Iterable[tuple[FrameType, int]]  # the innermost first


def check(net: nn.Module) -> None:
    """Raise SymmetryError for a network whose parameters cannot be replaced."""
    if isinstance(net, torch.jit.ScriptModule):
        raise SymmetryError(
            "find: the network is compiled by torch.jit, and its parameters cannot be replaced. "
            "Fix: give the module that it was made of."
        )
    if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise SymmetryError(
            f"find: the network is wrapped in {type(net).__name__}. Fix: give its `.module`."
        )
    for name, m in net.named_modules():
        what = f"{name or 'the network'} ({type(m).__name__})"
        if "quantized" in type(m).__module__.split("."):
            raise SymmetryError(
                f"find: {what} holds quantised weights, which are no tensors of the state dict. "
                "Fix: give the network as it was before quantisation."
            )
        held = (*m._parameters.values(), *m._buffers.values())
        if any(x is not None and nn.parameter.is_lazy(x) for x in held):
            raise SymmetryError(
                f"find: {what} has parameters without shapes. Fix: call the network once first."
            )


def place(frames: Frames, modules: Mapping[int, str]) -> str:
    """The module at work, and the line of the network's own code; modules: their names by id."""
    at = line = ""
    for frame, number in frames:
        if name := modules.get(id(frame.f_locals.get("self"))):
            at, file = at or f" at {name}", frame.f_code.co_filename
            if not line and "/torch/" not in file:
                line = f", {file.rsplit('/', 1)[-1]}:{number}"
    return at + line


def first_line(error: BaseException) -> str:
    """An error in one line of moderate length."""
    lines = str(error).strip().splitlines() or ["?"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def explained(
    error: Exception, modules: Mapping[int, str], run: Callable[[], object]
) -> SymmetryError:
    """An error of others, met while units were followed, in our words.

    run: runs the network on the example as it is, to tell whether it fails by itself.
    """
    where = place(reversed([*traceback.walk_tb(error.__traceback__)]), modules)
    try:
        run()
    except Exception as own:
        return ExampleError(
            f"find: the network itself fails on this example{where}: {first_line(own)}. "
            "Fix: give inputs as it takes them: a tensor, a tuple of arguments, or a dictionary "
            "of keywords."
        )
    return SymmetryError(
        f"find: the network cannot be followed{where}; PyTorch says {first_line(error)}. "
        "Fix: write this place in plain operators of PyTorch, on tensors; or take the part of the "
        "network without it."
    )


class Escapes(TorchFunctionMode):
    """See to it that no values leave the tensors that are followed, where nobody follows them."""

    WAYS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__deepcopy__})

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAYS and isinstance(args[0], FunctionalTensor):
            with _disable_current_modes():
                return func(self.plain(args[0], func.__name__), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def plain(self, x: FunctionalTensor, way: str) -> Tensor:
        """The known values of a tensor. Raises SymmetryError if there are none."""
        torch._sync(x.elem)  # type: ignore[attr-defined, no-untyped-call]
        inner = torch._from_functional_tensor(x.elem)
        if isinstance(inner, Labelled):
            if not inner.known or inner.value is None:
                raise SymmetryError(
                    f"find: .{way}() takes values out of the network's tensors{self.where()}, "
                    "where they cannot be followed. Fix: compute with tensors."
                )
            inner.constant = False  # for an array may be written to
            inner = inner.value
        return inner.clone()
