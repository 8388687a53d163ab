"""Every way to find the order of one network's units that fits another's (chapters 4, 7 and 9).

Two networks and their symmetry are one value, a `Pair`, which all functions take: `match` gives a
`Matching` by the method of your choice, `diagnose` says what is wrong where it fails. Read `pair`
and `activations` first, which is neuron alignment; `assignment` solves what all methods come
down to; `cca`, `weights`, `frank_wolfe` and `loss` are other ways to match, `polish` betters what
they find by weights, `methods` puts them behind one call;
`doubly_stochastic` and `pam` are the paper's verification, `many` brings more than two networks
into one order, `repair` and `diagnose` are for what can go wrong, and `certificate` says how good
an order of weights could be at best. `bases` matches by rotations, scales and signs, too.
"""

from mcnotes.matching.activations import At, Cost, Moments, stream
from mcnotes.matching.assignment import Bundle, assign, bundles, solve
from mcnotes.matching.bases import BasesMatching, Learn, match_bases
from mcnotes.matching.certificate import Certificate, certify, duals
from mcnotes.matching.diagnose import ENDS, FAULTS, Fault, Finding, diagnose
from mcnotes.matching.frank_wolfe import frank_wolfe
from mcnotes.matching.loss import ACTIONS, Action, Descent, loss_matching, soft
from mcnotes.matching.many import match_many
from mcnotes.matching.methods import EXACT, METHODS, SEARCHES, Matching, match
from mcnotes.matching.pair import AlignmentError, Pair
from mcnotes.matching.polish import polish
from mcnotes.matching.repair import channel_moments, repair
from mcnotes.matching.weights import weight_matching

__all__ = [
    "ACTIONS",
    "ENDS",
    "EXACT",
    "FAULTS",
    "METHODS",
    "SEARCHES",
    "Action",
    "AlignmentError",
    "At",
    "BasesMatching",
    "Bundle",
    "Certificate",
    "Cost",
    "Descent",
    "Fault",
    "Finding",
    "Learn",
    "Matching",
    "Moments",
    "Pair",
    "assign",
    "bundles",
    "certify",
    "channel_moments",
    "diagnose",
    "duals",
    "frank_wolfe",
    "loss_matching",
    "match",
    "match_bases",
    "match_many",
    "polish",
    "repair",
    "soft",
    "solve",
    "stream",
    "weight_matching",
]
