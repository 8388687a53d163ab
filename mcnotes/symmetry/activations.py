"""Read activations out of a running network (chapter 4)."""

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mcnotes.calls import Inputs, applied, arranged, within
from mcnotes.symmetry.execute import inference_copy, unfused_attention
from mcnotes.symmetry.units import SymmetryError, Tape

Theta = dict[str, Tensor]
Spot = tuple[str, Literal["in", "out"]]  # a module's name, and a side of it


def listen(
    net: nn.Module, spots: Iterable[Spot], take: Callable[[Spot, Any], None]
) -> dict[Spot, RemovableHandle]:
    """From now on, `take(spot, x)` gets what enters or leaves a module at each of these spots.

    Of several values x is the first. Returns the hooks, which whoever listens removes in the end.
    """

    def hook(spot: Spot, _: nn.Module, *values: Any) -> None:
        for x in tree_leaves(values[-1])[:1]:
            take(spot, x)

    hooks = {}
    for name, side in spots:
        m = net.get_submodule(name)
        add = m.register_forward_pre_hook if side == "in" else m.register_forward_hook
        hooks[name, side] = add(partial(hook, (name, side)))
    return hooks


class Recorder(Tape):
    """Keep the results of these names, as they are before anything is written over them."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(self.keep)
        self.names = {name.split("/")[0]: name for name in names}
        self.kept: dict[str, Tensor] = {}

    def keep(self, name: str, x: Any) -> None:
        if name in self.names:
            self.kept[self.names[name]] = x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name[-1] == "_":
            at = args[0].untyped_storage().data_ptr()
            same = {n: x for n, x in self.kept.items() if x.untyped_storage().data_ptr() == at}
            self.kept |= {n: x.clone() for n, x in same.items()}
        return super().__torch_dispatch__(func, types, args, kwargs)

    def check(self) -> None:
        """Raise SymmetryError if PyTorch ran other operators than when units were followed."""
        for name in self.names.values():
            kind, _, total = re.split("[:/]", name)
            if self.count[kind] != int(total):
                raise SymmetryError(
                    f"tapper: {kind} ran {self.count[kind]} times, expected {total}: on this "
                    "device, PyTorch runs the network by other operators. Fix: align on the CPU."
                )


class Reader:
    """A copy of a network, of the same tensors, that keeps the results of these names in each run.

    Results that enter or leave modules are caught by hooks, at no cost; if there are others, all
    operators are shown to a Recorder. theta, inputs: for a first run, which finds this out.
    """

    def __init__(
        self, net: nn.Module, train: bool, names: Collection[str], theta: Theta, inputs: Inputs
    ) -> None:
        self.net = inference_copy(net, train)
        self.flags = {m: m.training for m in self.net.modules()}
        self.names, self.seen = names, dict[Any, list[Any]]()
        self.spots: dict[str, tuple[Any, int]] = {}  # for each name a hook, and its k-th call
        sides: tuple[Literal["in", "out"], ...] = ("in", "out")
        every = [(name, side) for name, _ in self.net.named_modules() for side in sides]
        hooks = listen(self.net, every, self.see)
        kept = self(theta, inputs)
        where = {id(x): (spot, k) for spot, xs in self.seen.items() for k, x in enumerate(xs)}
        if all(id(x) in where for x in kept.values()):
            self.spots = {name: where[id(x)] for name, x in kept.items()}
        self.calls = {spot: len(self.seen[spot]) for spot, _ in self.spots.values()}
        for spot in hooks.keys() - self.calls.keys():
            hooks[spot].remove()
        self.seen = {}

    def see(self, spot: Spot, x: Any) -> None:
        """Keep what enters or leaves."""
        self.seen.setdefault(spot, []).append(x)

    def __call__(self, theta: Theta, inputs: Inputs) -> Theta:
        """The results by name. Raises SymmetryError if the network ran in another way."""
        self.seen, tape = {}, None if self.spots else Recorder(self.names)
        given = arranged(self.net, inputs)
        self.net.train()  # to make it forget what it keeps for evaluation
        for m, flag in self.flags.items():
            m.training = flag
        with unfused_attention, torch.no_grad(), tape or nullcontext():
            within(self.net, theta, partial(applied, self.net, given))
        if tape:
            tape.check()
            return tape.kept
        seen, self.seen = self.seen, {}
        for spot, n in self.calls.items():
            if len(seen.get(spot, ())) != n:
                raise SymmetryError(f"tapper: for this input, {spot[0]!r} does not run {n} times")
        return {name: seen[spot][k] for name, (spot, k) in self.spots.items()}
