"""Why did my alignment fail? Two networks are measured, and what is wrong is named (chapter 9).

All on training and validation images. The limits lie between what healthy pairs and what planted
faults gave in chapter 9: rules of thumb for classifiers of images, no laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mcnotes import evaluate, train
from mcnotes.attacks import Model, Perturb
from mcnotes.checks import a, flag, require, whole
from mcnotes.curves import Theta, combine
from mcnotes.data import Split, Task
from mcnotes.matching import activations, assignment
from mcnotes.matching.methods import Matching, match
from mcnotes.matching.pair import PAIRED, Pair
from mcnotes.symmetry import Perm


@dataclass(frozen=True)
class Fault:
    """One thing that can be wrong: from where on a measured number says so, and what to do."""

    side: Literal["above", "below"]  # of the limit, where the fault lies
    limit: float
    says: str  # what was measured, with a place for each number
    fix: str

    def holds(self, number: float) -> bool:
        """Is it a fault to measure this number? No number at all (NaN) always is one."""
        healthy = number <= self.limit if self.side == "above" else number >= self.limit
        return not healthy


FAULTS = {
    "inputs": Fault(
        "above",
        0.1,
        "{} is right on {:.0%} of the images, on {:.0%} if they are {}",
        "show the images to each network as it was trained on them",
    ),
    "labels": Fault(
        "above",
        0.1,
        "{} is right on {:.0%} of the images, on {:.0%} if its classes are renamed",
        "put the head's outputs into the data set's order of classes",
    ),
    "statistics": Fault(
        "above",
        0.15,
        "{}'s loss is {:.2f}, with fresh BatchNorm statistics {:.2f}",
        "recompute the statistics with evaluate.batchnorm",
    ),
    "broken": Fault(
        "below",
        0.2,
        "{} is right on {:.0%} of the images, a constant answer on {:.0%}",
        "load this network again, or train it again",
    ),
    "under-trained": Fault(
        "above",
        0.005,
        "{}'s loss is {:.2f}, after a little more training {:.2f}",
        "train it to the end before you align",
    ),
    "same": Fault(
        "below",
        1e-3,
        "the two networks' probabilities differ by {:.4f} on average",
        "take two networks of different seeds",
    ),
    "copy": Fault(
        "above",
        0.5,
        "before any matching, units correlate by {:.2f}: one network stems from the other",
        "permute nothing, average them as they are",
    ),
    "dead": Fault(
        "above",
        0.2,
        "{} of the two networks' {} units never change",
        "train with a smaller rate or another start, or remove these units",
    ),
    "weak": Fault(
        "below",
        0.2,
        "matched units correlate by {:.2f} on average, least in {}",
        "try other layers, another method, or networks that are wider or trained for longer",
    ),
    "narrow": Fault(
        "above",
        0.12,
        "among twice as many units the best partner correlates by {:.2f} more",
        "use wider layers, in which each unit finds a better partner",
    ),
    "collapse": Fault(
        "below",
        0.6,
        "half-way, the units of {} vary {:.2f} times as much as A's",
        "use matching.repair, or networks with BatchNorm",
    ),
    "direction": Fault(
        "above",
        0.1,
        "matched units correlate by {:.2f}, under the inverse by {:.2f}",
        "apply the inverse: new[i] = old[p[i]], and to network B",
    ),
    "permutation": Fault(
        "above",
        0.1,
        "matched units correlate by {:.2f}, by a fresh matching by {:.2f}",
        "apply to B what matching.match returns, once and whole",
    ),
}
"""All that is looked for, by name."""
ENDS = {"inputs", "labels", "broken"}  # with one of these the rest means nothing

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
CHANGES: dict[str, Change] = {  # of images, by their mean and deviation
    "inverted": lambda x, m, s: 1 - x,
    "standardised": lambda x, m, s: (x - m) / s,
    "from 0 to 255": lambda x, m, s: 255 * x,
    "in reversed channels": lambda x, m, s: x.flip(1),
}
"""Ways in which a network may have seen its images."""


class Finding(NamedTuple):
    """One measured number, and what it says."""

    fault: str  # a name in `FAULTS`
    number: float
    text: str

    @property
    def serious(self) -> bool:
        """Is it beyond the limit, or no number at all?"""
        return FAULTS[self.fault].holds(self.number)

    @property
    def fix(self) -> str:
        """What to do about it."""
        return FAULTS[self.fault].fix

    def __str__(self) -> str:
        return f"{self.fault}: {self.text}. Fix: {self.fix}." if self.serious else self.text


Found = Iterator[Finding]


def diagnose(
    pair: Pair,
    task: Task,
    *,
    perm: Perm | None = None,
    images: int = 2_000,
    every: bool = False,
) -> list[Finding]:
    """What is wrong with these two networks, or with their alignment; empty where nothing is.

    perm: the permutation of B in question (the identity, if B comes permuted); without it only the
    pair is judged. images: how many of train, and of those held out. every: harmless ones, too.
    Where a network itself is at fault (one of `ENDS`) nothing is said about the pair. Raises
    AlignmentError when the networks differ in shape.
    """
    given = {"pair": pair, "task": task, "images": images, "every": every}
    rules = {"task": a(Task, "a data.Task"), "images": whole(1), "every": flag}
    require("diagnose", given, PAIRED | rules)
    perm = None if perm is None else pair.sym.complete(perm)
    few = replace(task, train=task.train.first(images), val=task.held_out.first(images))
    found = [
        *_network(pair.net, "A", pair.theta_a, few),
        *_network(pair.net, "B", pair.theta_b, few),
    ]
    if not any(f.serious and f.fault in ENDS for f in found):
        found += _pair(pair, few)
        if perm is not None:
            found += _permutation(pair, perm, few.train)
    return [f for f in found if every or f.serious]


def _measured(fault: str, number: float, *words: object) -> Finding:
    return Finding(fault, number, FAULTS[fault].says.format(*words))


def _network(net: nn.Module, name: str, theta: Theta, task: Task) -> Found:
    """What may be wrong with one network alone."""
    now = evaluate.score(net, theta, task.val)
    best, how = _best_change(net, theta, task)
    yield _measured("inputs", best - now.accuracy, name, now.accuracy, best, how)
    renamed = _accuracy_renamed(net, theta, task)
    yield _measured("labels", renamed - now.accuracy, name, now.accuracy, renamed)
    fresh = evaluate.batchnorm(net, theta, task.train)
    reset = evaluate.score(net, fresh, task.val)
    yield _measured("statistics", now.loss - reset.loss, name, now.loss, reset.loss)
    constant = float(task.val.labels.bincount().max()) / len(task.val)
    skill = (reset.accuracy - constant) / (1 - constant)
    yield _measured("broken", skill, name, reset.accuracy, constant)
    if skill > 0.2:
        recipe = train.Recipe(3, lr=0.05, schedule="linear", augment=False)
        more = train.fit(net, task, recipe, seed=0, init=fresh).theta
        loss = evaluate.score(net, more, task.val).loss
        yield _measured("under-trained", 1 - loss / reset.loss, name, reset.loss, loss)


def _best_change(net: nn.Module, theta: Theta, task: Task) -> tuple[float, str]:
    """The highest accuracy on changed images, and the name of the change."""
    pixels = task.train.images.float() / 255
    mean, deviation = (f((0, 2, 3), keepdim=True) for f in (pixels.mean, pixels.std))

    def shown(change: Change) -> Perturb:
        def perturb(model: Model, x: Tensor, y: Tensor) -> Tensor:
            return change(x, mean, deviation)

        return perturb

    return max(
        (evaluate.score(net, theta, task.val, perturb=shown(change)).accuracy, name)
        for name, change in CHANGES.items()
    )


def _accuracy_renamed(net: nn.Module, theta: Theta, task: Task) -> float:
    """The accuracy if the network's classes are renamed so that as many images as can be fit."""
    k, labels = task.num_classes, task.val.labels
    guess = evaluate.probabilities(net, theta, task.val).argmax(1)
    counts = (guess * k + labels).bincount(minlength=k * k).view(k, k).double().cpu()
    return float(counts.gather(1, assignment.assign(counts)[:, None]).sum()) / len(labels)


def _pair(pair: Pair, task: Task) -> Found:
    """What may be wrong with both together."""
    found = _match(pair, pair.theta_b, task.train)
    one, two = (
        evaluate.probabilities(pair.net, theta, task.val) for theta in (pair.theta_a, pair.theta_b)
    )
    apart = float((one - two).abs().mean())
    same = _measured("same", apart, apart)
    yield same
    before = _mean(found.before)
    copy = _measured("copy", before, before)
    yield copy
    if same.serious or copy.serious:
        return
    moments = activations.stream(pair, task.train)
    still = torch.cat([taps[0].variances().flatten() == 0 for taps in moments.values()])
    yield _measured("dead", float(still.double().mean()), int(still.sum()), len(still))
    after, least = _mean(found.after), min(found.after, key=lambda n: float(found.after[n].mean()))
    yield _measured("weak", after, after, least)
    gains = [_gain(m.correlation()) for taps in moments.values() for m in taps]
    gain = sum(gains) / len(gains)
    yield _measured("narrow", gain, gain)
    ratio, name = _least_spread(pair, found.perm, task.train)
    yield _measured("collapse", ratio, name, ratio)


def _gain(correlation: Tensor) -> float:
    """How much better the best of all units of B is than the best of every second, on average."""
    halves = [correlation[:, k::2].max(1).values for k in (0, 1) if k < len(correlation)]
    return float((correlation.max(1).values - torch.stack(halves).mean(0)).mean())


def _least_spread(pair: Pair, perm: Perm, images: Split) -> tuple[float, str]:
    """How much units vary half-way, as a multiple of A's, in the group where it is least."""
    ends = [pair.theta_a, pair.permuted(perm)]
    evaluate.check_mixable("diagnose", pair.net, ends)
    half = combine(ends, [0.5, 0.5])
    middle = evaluate.batchnorm(pair.net, half, images)
    seen = activations.stream(replace(pair, theta_a=middle, theta_b=pair.theta_a), images)
    ratios = []
    for name, taps in seen.items():
        here, there = torch.stack([m.variances() for m in taps]).sum(0).sqrt()
        ratios.append((float(here.mean() / there.mean()), name))
    return min(ratios)


def _permutation(pair: Pair, perm: Perm, images: Split) -> Found:
    """What may be wrong with the permutation that was used: its inverse, or a fresh one, is better.

    How well units agree, each time, is their mean correlation in the order in which they stand.
    """
    used = _match(pair, pair.permuted(perm), images)
    inverse = _match(pair, pair.permuted(pair.sym.inverse(perm)), images)
    mine, other, best = _mean(used.before), _mean(inverse.before), _mean(used.after)
    yield _measured("direction", other - mine, mine, other)
    yield _measured("permutation", best - mine, mine, best)


def _match(pair: Pair, theta_b: Theta, images: Split) -> Matching:
    return match(replace(pair, theta_b=theta_b), images)


def _mean(correlations: dict[str, Tensor]) -> float:
    """Over all units, whatever their group."""
    return float(torch.cat([*correlations.values()]).mean())
