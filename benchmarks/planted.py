"""Planted permutations: does a method find again what was shuffled? (chapter 9)

Networks as they are before training, every one-dimensional parameter jittered so that no two units
have equal scales: ResNet20 and ResNet32 of width 16, GoogLeNet, a small vision transformer. Units
of a copy are shuffled in every group; without and with noise (a hundredth of each weight tensor's
deviation). Methods: activations, weights, frank-wolfe. Each trial has a network and a permutation
of its own.

A trial counts as recovered if every unit is home again, up to two kinds of units, which are named:
*twins*, whose exchange leaves the network's parameters as they are; and, for activations, units
that are *dead*: constant on all images, so that nothing can be known of them.

One line of JSON for each trial; the last line is JSON: recovered, of how many. A run ends with
`--trials` of each kind (network, noise and method), or after `--minutes` of processor time.

What is in data/results/planted.json is not lost. A run starts anew, and takes the file's place once
it has no fewer trials of any kind; if the file is of another configuration (networks, jitter,
noise, methods, images), also not before it is whole. Else the file stays, and the run says so.
`--resume` goes on from the file and writes it whenever each kind has one more trial. It refuses a
file of another configuration; a file that is broken is refused always.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from matchers import Transformer, broken, contents, write
from torch import nn

from mcnotes import cache, evaluate, matching, models, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.lab import Experiment
from mcnotes.matching import Pair
from mcnotes.symmetry import Perm, Symmetry

FILE = cache.ROOT / "data" / "results" / "planted.json"
METHODS = ("activations", "weights", "frank-wolfe")
NOISE = (0.0, 0.01)  # of each weight tensor's deviation
IMAGES = 64
SCALES, SHIFT = (0.75, 1.25), 0.1  # of the jitter: uniform factors, a normal deviation
ORIGIN = ("hardware", "torch", "commit")  # where trials were computed
Tally = dict[str, Any]
KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and each how-manieth pixel it sees
    "ResNet20": (lambda: models.build("resnet20", num_classes=10, in_channels=1, width=16), 2),
    "ResNet32": (lambda: models.build("resnet32", num_classes=10, in_channels=1, width=16), 2),
    "GoogLeNet": (lambda: models.build("googlenet", num_classes=10, in_channels=1, width=0.125), 2),
    "transformer": (lambda: Transformer(10, 1, 28, 32), 1),
}


def start(net: nn.Module, images: Split, seed: int) -> Theta:
    """A fresh network, its one-dimensional parameters jittered, its BatchNorm seen `images`."""
    g = torch.Generator().manual_seed(seed)
    names = {name for name, x in net.named_parameters() if x.dim() == 1}
    low, high = SCALES
    theta = {
        n: x * (low + (high - low) * torch.rand(x.shape, generator=g))
        + SHIFT * torch.randn(x.shape, generator=g)
        if n in names
        else x
        for n, x in train.initialise(net, seed).items()
    }
    return evaluate.batchnorm(net, theta, images)


def noisy(theta: Theta, level: float, seed: int) -> Theta:
    """With Gaussian noise on every weight tensor."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: x + level * x.std() * torch.randn(x.shape, generator=g) if x.dim() > 1 else x
        for n, x in theta.items()
    }


def astray(home: Perm) -> dict[str, list[int]]:
    """By group, the units that are not home."""
    moved = {n: (p != torch.arange(len(p))).nonzero().flatten().tolist() for n, p in home.items()}
    return {n: units for n, units in moved.items() if units}


def match(pair: Pair, images: Split, method: str) -> tuple[Perm, dict[str, list[int]]]:
    """The permutation that a method finds; by group, the dead units that it cannot tell apart."""
    if method != "activations":
        return matching.METHODS[method](pair, images, 0), {}
    found = matching.match(pair, images)
    return found.perm, {name: units.tolist() for name, units in found.dead.items()}


def trial(
    name: str, net: nn.Module, sym: Symmetry, images: Split, noise: float, seed: int, method: str
) -> dict[str, Any]:
    """Plant, match, compare: whether all units are home, and the names of those that cannot be."""
    theta = start(net, images, seed)
    planted = sym.random(torch.Generator().manual_seed(1000 + seed))
    shuffled = sym.permute(noisy(theta, noise, 2000 + seed), planted)
    pair, begun = Pair(net, sym, theta, shuffled), time.process_time()
    perm, dead = match(pair, images, method)
    seconds = time.process_time() - begun
    home = sym.compose(planted, perm)
    away, same = astray(home), sym.permute(theta, home)
    twins = bool(away) and all(torch.equal(x, same[n]) for n, x in theta.items())
    lost = {n: [u for u in units if u not in dead.get(n, ())] for n, units in away.items()}
    whole = twins or not any(lost.values())
    named = away if whole else {}
    return {
        "network": name,
        "noise": noise,
        "method": method,
        "seed": seed,
        "whole": whole,
        "astray": sum(map(len, lost.values())) if not whole else 0,
        "twins": named if twins else {},
        "dead": {} if twins else named,
        "seconds": round(seconds, 2),
    }


def take(tally: Tally, row: dict[str, Any]) -> None:
    """Add a trial to the tally of its network, noise and method."""
    seed = str(row["seed"])
    tally["seconds"] = (tally["seconds"] * tally["trials"] + row["seconds"]) / (tally["trials"] + 1)
    tally["seconds"] = round(tally["seconds"], 3)
    tally["trials"] += 1
    tally["recovered"] += row["whole"]
    if not row["whole"]:
        tally["failed"][seed] = row["astray"]
    for kind in ("twins", "dead"):
        if row[kind]:
            tally[kind][seed] = row[kind]


def configuration() -> dict[str, Any]:
    """All that trials depend on besides their seeds and the code, as the file has it."""
    networks = {
        name: {"parameters": sum(x.numel() for x in build().parameters()), "stride": k}
        for name, (build, k) in KINDS.items()
    }
    found = {"networks": networks, "noise": NOISE, "methods": METHODS, "images": IMAGES}
    found |= {"scales": SCALES, "shift": SHIFT}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def kind(tally: Tally) -> tuple[str, float, str]:
    """The network, noise and method."""
    return tally["network"], tally["noise"], tally["method"]


def blank() -> list[Tally]:
    """A tally without trials for each network, noise and method."""
    tallies = []
    for network, noise, method in product(KINDS, NOISE, METHODS):
        empty: Tally = {"network": network, "noise": noise, "method": method}
        empty |= {"trials": 0, "recovered": 0, "seconds": 0.0}
        tallies.append(empty | {"failed": {}, "twins": {}, "dead": {}})
    return tallies


def stored() -> dict[str, Any] | None:
    """The results file; None if there is none. One that is broken ends the program."""
    if not FILE.exists():
        return None
    record = contents(FILE)
    try:
        kinds = [*product(record["networks"], record["noise"], record["methods"])]
        if [kind(row) for row in record["rows"]] != kinds:
            raise ValueError("its rows are not those of its networks, noise and methods")
        for row in record["rows"]:
            if row.keys() != blank()[0].keys():
                raise ValueError(f"the columns of {kind(row)} are not those of today")
            if row["recovered"] + len(row["failed"]) != row["trials"]:
                raise ValueError(f"the trials of {kind(row)} do not add up")
        if missing := [name for name in ORIGIN if not isinstance(record[name], list)]:
            raise ValueError(f"{missing[0]} is no list")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(FILE, error) from None
    return record


def changed(old: dict[str, Any]) -> list[str]:
    """Where the file's configuration is not today's."""
    return [name for name, value in configuration().items() if old.get(name) != value]


def resumed(old: dict[str, Any]) -> list[Tally]:
    """The file's tallies, to go on from; a file of another configuration ends the program."""
    if names := changed(old):
        raise SystemExit(
            f"planted: the trials in {FILE} are of other {', '.join(names)} than today's. "
            "Fix: go back to those, or start anew, without --resume"
        )
    tallies: list[Tally] = copy.deepcopy(old["rows"])
    return tallies


def replaces(tallies: list[Tally], old: dict[str, Any] | None, trials: int) -> bool:
    """Whether these tallies may take the place of the file: nothing must be lost."""
    if old is None:
        return True
    counts: dict[Any, int] = {kind(tally): tally["trials"] for tally in tallies}
    before: dict[Any, int] = {kind(row): row["trials"] for row in old["rows"]}
    if not changed(old):
        return all(counts[name] >= count for name, count in before.items())
    return min(counts.values()) >= max(trials, *before.values())


def save(tallies: list[Tally], before: dict[str, Any] | None) -> None:
    """Write the record, a line for each tally. before: the file that the trials go on from."""
    here = cache.provenance(0.0)
    origin = {n: sorted({here[n], *(before[n] if before else ())}) for n in ORIGIN}
    write(FILE, configuration() | origin, tallies)


def run(tallies: list[Tally], trials: int, minutes: float) -> Iterator[bool]:
    """Add trials to tallies; after each seed, and at the end, whether there are more of them."""
    built = {name: build() for name, (build, _) in KINDS.items()}
    some = Experiment().task.train.first(IMAGES)
    seen = {
        n: dataclasses.replace(some, images=some.images[..., ::k, ::k].contiguous())
        for n, (_, k) in KINDS.items()
    }
    syms = {n: symmetry.find(net, next(seen[n].batches(2))[0]) for n, net in built.items()}
    for seed in range(min(tally["trials"] for tally in tallies), trials):
        more = False
        for tally in (t for t in tallies if t["trials"] == seed):
            if time.process_time() > 60 * minutes:
                yield more
                return
            name, noise, method = kind(tally)
            row = trial(name, built[name], syms[name], seen[name], noise, seed, method)
            take(tally, row)
            more = True
            print(json.dumps({n: x for n, x in row.items() if n != "dead"}), flush=True)
        yield more


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--trials", type=int, default=100, help="of each kind; default 100")
    parser.add_argument(
        "--minutes", type=float, default=30, help="of processor time, at most; default 30"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the results file, if there is one"
    )
    args = parser.parse_args()
    old = stored()
    before = old if args.resume else None
    tallies = resumed(before) if before else blank()
    saved = False
    for more in run(tallies, args.trials, args.minutes):
        if more and replaces(tallies, old, args.trials):
            save(tallies, before)
            saved = True
    if not saved:
        here = min(tally["trials"] for tally in tallies)
        there = max(row["trials"] for row in old["rows"]) if old else 0
        print(
            f"planted: {FILE} stays as it is: it has {there} trials of each kind, this run {here}, "
            f"and {args.trials} were asked for",
            file=sys.stderr,
        )
    summary = {}
    for t in tallies:
        name = f"{t['network']}, noise {t['noise']}, {t['method']}"
        summary[name] = f"{t['recovered']} of {t['trials']}"
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
