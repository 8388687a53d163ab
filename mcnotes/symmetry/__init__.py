"""Which units of a network may change places: discovered, proved, applied (chapter 3).

`find` gives a `Symmetry`, a value that permutes parameters and verifies itself. Read `permutations`
first, then `find`; behind them `units` labels the entries of tensors, `trace` follows the labels
through one run of the network by the `rules` of its operators, `copies` knows where tensors repeat
themselves, and `groups` sorts what was seen. `foreign` says what cannot be followed. `activations`
reads the units' activations out of a running network; `execute` is how both run it.
"""

from mcnotes.symmetry.bases import KINDS, Bases, Element, Factor, Site, find
from mcnotes.symmetry.find import Perm, Symmetry
from mcnotes.symmetry.groups import Group, Pinned, Place
from mcnotes.symmetry.rules import RULES
from mcnotes.symmetry.units import ExampleError, SymmetryError

__all__ = [
    "KINDS",
    "RULES",
    "Bases",
    "Element",
    "ExampleError",
    "Factor",
    "Group",
    "Perm",
    "Pinned",
    "Place",
    "Site",
    "Symmetry",
    "SymmetryError",
    "find",
]
