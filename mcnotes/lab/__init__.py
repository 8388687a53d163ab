"""The book's own laboratory: one experiment by name, its kept results, its figures.

Nothing in the package outside of this folder imports it. Read `experiment` first: the chapters and
the batch get all their numbers through `Experiment`. `frames` makes tidy tables of them, `results`
is what a full-scale run writes, `figures` is the book's style.
"""

from mcnotes.lab.experiment import Experiment
from mcnotes.lab.parameters import ALIGNMENTS, SHAPES

__all__ = ["ALIGNMENTS", "SHAPES", "Experiment"]
