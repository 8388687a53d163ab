"""Two networks that are to be matched, as one value (chapter 4)."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from mcnotes.calls import stated
from mcnotes.checks import Rule, a, require, whole
from mcnotes.curves import Theta, check_same_space
from mcnotes.symmetry import Perm, Symmetry


class AlignmentError(ValueError):
    """The two networks cannot be matched; the text says why and what to do."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Networks A and B of one architecture, and the permutation symmetry of that architecture.

    Raises AlignmentError unless both states are the network's, of the same shapes and dtypes.
    """

    net: nn.Module
    sym: Symmetry
    theta_a: Theta
    theta_b: Theta

    def __post_init__(self) -> None:
        try:
            require("match", {"sym": self.sym}, {"sym": a(Symmetry, "a Symmetry")})
            stated("match: theta_a", self.net, self.theta_a)
            check_same_space(self.theta_a, self.theta_b, "match")
            stated("match: theta_b", self.net, self.theta_b)
        except ValueError as error:
            raise AlignmentError(str(error)) from error

    def __repr__(self) -> str:
        numbers = sum(x.numel() for x in self.theta_a.values())
        kind, groups = type(self.net).__name__, len(self.sym.groups)
        return f"Pair(two {kind} networks of {numbers:,} numbers, {groups} groups of units)"

    @property
    def names(self) -> list[str]:
        """The names of the parameters; tied ones are named once."""
        return [name for name, _ in self.net.named_parameters()]

    def permuted(self, perm: Perm) -> Theta:
        """B with its units permuted: the same function, in another order."""
        return self.sym.permute(self.theta_b, perm)

    def check_finite(self, who: str, ends: tuple[str, str] = ("A", "B")) -> None:
        """Raise AlignmentError where a parameter of either network, called `ends`, is not finite.

        Buffers may be: a mask of attention holds -inf.
        """
        for end, theta in zip(ends, (self.theta_a, self.theta_b), strict=True):
            for name in self.names:
                if not bool(theta[name].isfinite().all()):
                    raise AlignmentError(
                        f"{who}: {name!r} of network {end} has entries that are not finite. Fix: "
                        "look for NaN and infinity in it, or train the network again"
                    )

    def check_real(self, who: str) -> None:
        """Raise AlignmentError where a parameter is complex: weights are compared as reals."""
        for name in self.names:
            if self.theta_a[name].is_complex():
                raise AlignmentError(
                    f"{who}: {name!r} is complex, and only real weights are compared. Fix: match "
                    "by activations"
                )


def in_float64(theta: Theta) -> Theta:
    """The same numbers, without gradients, those of floating point in float64."""
    return {n: x.detach().double() if x.is_floating_point() else x for n, x in theta.items()}


def magnitude(names: Collection[str], *thetas: Theta) -> int:
    """The least e such that no entry of the parameters `names` reaches 2^e; 0 if all are 0."""
    every = (x[n].detach() for x in thetas for n in names if x[n].numel())
    largest = (float(x.to(torch.promote_types(x.dtype, torch.float64)).abs().max()) for x in every)
    return math.frexp(max(largest, default=0.0))[1]


def scaled(names: Collection[str], theta: Theta, exponent: int) -> Theta:
    """A network in float64, its parameters `names` divided by 2^exponent.

    By its own `magnitude` their products neither vanish nor overflow; nothing is rounded that
    counts beside the largest. What stays the same under a positive factor stays so to the bit.
    """
    half = -exponent // 2  # the whole factor might be no number of float64 itself
    one, two = 2.0**half, 2.0 ** (-exponent - half)
    wide = {n: theta[n].detach() for n in names}
    wide = {n: x.to(torch.promote_types(x.dtype, torch.float64)) for n, x in wide.items()}
    return in_float64(theta) | {n: x * one * two for n, x in wide.items()}


PAIRED: dict[str, Rule] = {"pair": a(Pair, "a Pair"), "seed": whole(-(2**63), 2**64 - 1)}
"""What the arguments of functions of a pair may be."""
