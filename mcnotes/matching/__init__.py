"""Every way to find the order of one network's units that fits another's (chapters 4, 7 and 9).

`match` gives a `Matching` by the method of your choice. Read `activations` first, which is neuron
alignment; `assignment` solves what all methods come down to; `weights` and `loss` are other ways to
match, `doubly_stochastic` and `pam` the paper's verification, `many` brings more than two networks
into one order, `repair` and `diagnose` are for what can go wrong.
"""

from mcnotes.matching.activations import AlignmentError, At, Cost, Moments, stream
from mcnotes.matching.assignment import assign, bundles, solve
from mcnotes.matching.diagnose import ENDS, FAULTS, Finding, diagnose
from mcnotes.matching.loss import ACTIONS, RATES, loss_matching, soft
from mcnotes.matching.many import match_many
from mcnotes.matching.methods import METHODS, Matching, match
from mcnotes.matching.repair import channel_statistics, repair
from mcnotes.matching.weights import weight_matching

__all__ = [
    "ACTIONS",
    "ENDS",
    "FAULTS",
    "METHODS",
    "RATES",
    "AlignmentError",
    "At",
    "Cost",
    "Finding",
    "Matching",
    "Moments",
    "assign",
    "bundles",
    "channel_statistics",
    "diagnose",
    "loss_matching",
    "match",
    "match_many",
    "repair",
    "soft",
    "solve",
    "stream",
    "weight_matching",
]
