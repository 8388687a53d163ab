"""Why did my alignment fail? Two networks are measured, and what is wrong said (chapter 9).

All on training and validation images. The limits lie between what healthy pairs and what planted
faults gave in chapter 9: rules of thumb for classifiers of images, no laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mcnotes import evaluate, train
from mcnotes.curves import Theta, combine
from mcnotes.data import Task
from mcnotes.matching import activations, assignment
from mcnotes.matching.methods import match
from mcnotes.symmetry import Perm, Symmetry

FAULTS = {  # fault: from where on it is one (-x: below x); what was measured; what to do
    "inputs": (0.1, "{} is right on {:.0%} of the images, on {:.0%} if they are {}",
        "show the images to each network as it was trained on them"),
    "labels": (0.1, "{} is right on {:.0%} of the images, on {:.0%} if its classes are renamed",
        "put the head's outputs into the data set's order of classes"),
    "statistics": (0.15, "{}'s loss is {:.2f}, with fresh BatchNorm statistics {:.2f}",
        "recompute the statistics: evaluate.batchnorm"),
    "broken": (-0.2, "{} is right on {:.0%} of the images, a constant answer on {:.0%}",
        "load this network again, or train it again"),
    "under-trained": (0.005, "{}'s loss is {:.2f}, after a little more training {:.2f}",
        "train it to the end before you align"),
    "same": (-1e-3, "the two networks' probabilities differ by {:.4f} on average",
        "take two networks of different seeds"),
    "copy": (0.5, "as they come, units correlate by {:.2f}: one network stems from the other",
        "permute nothing, average them as they are"),
    "dead": (0.2, "{} of the two networks' {} units never change",
        "train with a smaller rate or another start, or remove these units"),
    "weak": (-0.2, "matched units correlate by {:.2f} on average, least in {}",
        "other layers, another method, wider or longer trained networks"),
    "narrow": (0.12, "among twice as many units the best partner correlates by {:.2f} more",
        "wider layers: each unit then finds a better partner"),
    "collapse": (-0.6, "half-way, the units of {} vary {:.2f} times as much as A's",
        "matching.repair, or networks with BatchNorm"),
    "direction": (0.1, "matched units correlate by {:.2f}, under the inverse by {:.2f}",
        "apply the inverse: new[i] = old[p[i]], and to network B"),
    "permutation": (0.1, "matched units correlate by {:.2f}, by a fresh matching by {:.2f}",
        "apply to B what matching.match returns, once and whole"),
}  # fmt: skip
ENDS = {"inputs", "labels", "broken"}  # with one of these the rest means nothing
INPUTS: dict[str, Callable[..., Tensor]] = {  # of images, their mean and deviation
    "inverted": lambda x, m, s: 1 - x,
    "standardised": lambda x, m, s: (x - m) / s,
    "from 0 to 255": lambda x, m, s: 255 * x,
    "in reversed channels": lambda x, m, s: x.flip(1),
}


class Finding(NamedTuple):
    """One measured number, and what it says."""

    fault: str  # a name in `FAULTS`
    number: float
    text: str

    @property
    def serious(self) -> bool:
        """Is it beyond the limit, or no number at all?"""
        limit = FAULTS[self.fault][0]
        return not (self.number <= limit if limit > 0 else self.number >= -limit)


Found = Iterator[Finding]


def diagnose(
    net: nn.Module, theta_a: Theta, theta_b: Theta, task: Task, sym: Symmetry, *,
    perm: Perm | None = None, images: int = 2_000, every: bool = False
) -> list[Finding]:  # fmt: skip
    """What is wrong with these two networks, or with their alignment; empty where nothing is.

    perm: the permutation of B in question (the identity, if B comes permuted); without it only the
    pair is judged. images: how many of train, and of those held out. every: harmless ones, too.
    Where a network itself is at fault (one of `ENDS`) nothing is said about the pair.
    """
    few = replace(task, train=task.train.first(images), val=task.held_out.first(images))
    found = [f for end in (("A", theta_a), ("B", theta_b)) for f in _end(net, *end, few)]
    if not any(f.serious and f.fault in ENDS for f in found):
        found += _pair(net, theta_a, theta_b, few, sym)
        found += _order(net, theta_a, theta_b, few, sym, perm) if perm else ()
    return [f for f in found if every or f.serious]


def _say(fault: str, number: float, *words: object) -> Finding:
    return Finding(fault, number, FAULTS[fault][1].format(*words))


def _end(net: nn.Module, name: str, theta: Theta, task: Task) -> Found:
    """Of one network alone."""
    val, k, pixels = task.val, task.num_classes, task.train.images.float() / 255
    scale = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    now = evaluate.score(net, theta, val)
    shown = ((how, lambda _, x, y, f=f: f(x, *scale)) for how, f in INPUTS.items())
    best, how = max((evaluate.score(net, theta, val, perturb=f).accuracy, how) for how, f in shown)
    yield _say("inputs", best - now.accuracy, name, now.accuracy, best, how)
    guess = evaluate.probabilities(net, theta, val).argmax(1)
    counts = (guess * k + val.labels).bincount(minlength=k * k).view(k, k).double().cpu()
    renamed = float(counts.gather(1, assignment.assign(counts)[:, None]).sum()) / len(val)
    yield _say("labels", renamed - now.accuracy, name, now.accuracy, renamed)
    fresh = evaluate.batchnorm(net, theta, task.train)
    reset, constant = evaluate.score(net, fresh, val), float(val.labels.bincount().max()) / len(val)
    yield _say("statistics", now.loss - reset.loss, name, now.loss, reset.loss)
    skill = (reset.accuracy - constant) / (1 - constant)
    yield _say("broken", skill, name, reset.accuracy, constant)
    if skill > 0.2:
        more = train.Recipe(3, lr=0.05, schedule="linear", augment=False)
        after = evaluate.score(net, train.fit(net, task, more, seed=0, init=fresh).theta, val).loss
        yield _say("under-trained", 1 - after / reset.loss, name, reset.loss, after)


def _pair(net: nn.Module, a: Theta, b: Theta, task: Task, sym: Symmetry) -> Found:
    """Of both together."""
    found = match(net, a, b, task.train, sym)
    one, two = (evaluate.probabilities(net, theta, task.val) for theta in (a, b))
    apart = float((one - two).abs().mean())
    before, after = (float(torch.cat([*c.values()]).mean()) for c in (found.before, found.after))
    pair = [_say("same", apart, apart), _say("copy", before, before)]
    yield from pair
    if any(f.serious for f in pair):
        return
    moments = activations.stream(net, a, b, task.train, sym)
    still = torch.cat([taps[0].variances().flatten() == 0 for taps in moments.values()])
    yield _say("dead", float(still.double().mean()), int(still.sum()), len(still))
    least = min(found.after, key=lambda n: float(found.after[n].mean()))
    yield _say("weak", after, after, least)
    gains = [_gain(m.correlation()) for taps in moments.values() for m in taps]
    yield _say("narrow", sum(gains) / len(gains), sum(gains) / len(gains))
    half = combine([a, sym.permute(b, found.perm)], [0.5, 0.5])
    middle = evaluate.batchnorm(net, half, task.train)
    seen = activations.stream(net, middle, a, task.train, sym)
    spread = {n: torch.stack([m.variances() for m in ms]).sum(0).sqrt() for n, ms in seen.items()}
    ratio, name = min((float(here.mean() / there.mean()), n) for n, (here, there) in spread.items())
    yield _say("collapse", ratio, name, ratio)


def _order(net: nn.Module, a: Theta, b: Theta, task: Task, sym: Symmetry, perm: Perm) -> Found:
    """Of the permutation that was used, its inverse, and a fresh one."""
    moved = (sym.permute(b, p) for p in (perm, sym.inverse(perm)))
    one, two = (match(net, a, theta, task.train, sym) for theta in moved)
    every = (one.before, two.before, one.after)
    mine, other, best = (float(torch.cat([*found.values()]).mean()) for found in every)
    yield _say("direction", other - mine, mine, other)
    yield _say("permutation", best - mine, mine, best)


def _gain(correlation: Tensor) -> float:
    """How much better the best of all units of B is than the best of every second, on average."""
    halves = [correlation[:, k::2].max(1).values for k in (0, 1) if k < len(correlation)]
    return float((correlation.max(1).values - torch.stack(halves).mean(0)).mean())
