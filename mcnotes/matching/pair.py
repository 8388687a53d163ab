"""Two networks that are to be matched, as one value (chapter 4)."""

from dataclasses import dataclass

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


PAIRED: dict[str, Rule] = {"pair": a(Pair, "a Pair"), "seed": whole(-(2**63), 2**64 - 1)}
"""What the arguments of functions of a pair may be."""
