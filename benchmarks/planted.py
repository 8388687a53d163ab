"""Planted permutations: does a method find again what was shuffled? (chapter 9)

Networks as they are before training, every one-dimensional parameter jittered so that no two units
have equal scales: ResNet20 and ResNet32 of width 16, GoogLeNet, a small vision transformer. Units
of a copy are shuffled in every group; without and with noise (a hundredth of each weight tensor's
deviation). Methods: activations, weights, frank-wolfe. Each trial has a network and a permutation
of its own.

A trial counts as recovered if every unit is home again, up to two kinds of units, which are named:
*twins*, whose exchange leaves the network's parameters as they are; and, for activations, units
that are *dead*: constant on all images, so that nothing can be known of them.

One line of JSON for each trial; data/results/planted.json is written every few trials, and
`--resume` goes on from it. It ends after `--minutes` of processor time, with as many trials of each
kind as there were; their number is in the file. The last line is JSON: recovered, of how many.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from matchers import Transformer
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
    theta = {
        n: x * (0.75 + 0.5 * torch.rand(x.shape, generator=g))
        + 0.1 * torch.randn(x.shape, generator=g)
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
    copy = sym.permute(noisy(theta, noise, 2000 + seed), planted)
    pair, begun = Pair(net, sym, theta, copy), time.process_time()
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


def take(tally: dict[str, Any], row: dict[str, Any]) -> None:
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


def loaded(resume: bool) -> list[dict[str, Any]]:
    """A tally for each network, noise and method: from the file, or empty."""
    stored = json.loads(FILE.read_text("utf8"))["rows"] if resume and FILE.exists() else []
    known = {(row["network"], row["noise"], row["method"]): row for row in stored}
    tallies = []
    for network, noise, method in product(KINDS, NOISE, METHODS):
        empty: dict[str, Any] = {"network": network, "noise": noise, "method": method}
        empty |= {"trials": 0, "recovered": 0, "seconds": 0.0}
        empty |= {"failed": {}, "twins": {}, "dead": {}}
        tallies.append(known.get((network, noise, method), empty))
    return tallies


def save(tallies: list[dict[str, Any]]) -> None:
    """Write the record, a line for each tally, and where it was computed."""
    spent = sum(tally["seconds"] * tally["trials"] for tally in tallies)  # by the matching alone
    record = {"noise": NOISE, "images": IMAGES, "provenance": cache.provenance(spent)}
    lines = ",\n".join(json.dumps(tally) for tally in tallies)
    text = json.dumps(record, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    cache.write_atomic(FILE, text.encode())


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--trials", type=int, default=100, help="of each kind")
    parser.add_argument("--minutes", type=float, default=30, help="of processor time, at most")
    parser.add_argument("--resume", action="store_true", help="go on from the results file")
    args = parser.parse_args()
    tallies = loaded(args.resume)
    built = {name: build() for name, (build, _) in KINDS.items()}
    some = Experiment().task.train.first(IMAGES)
    seen = {
        n: dataclasses.replace(some, images=some.images[..., ::k, ::k].contiguous())
        for n, (_, k) in KINDS.items()
    }
    syms = {n: symmetry.find(net, next(seen[n].batches(2))[0]) for n, net in built.items()}
    for seed in range(args.trials):
        for tally in (t for t in tallies if t["trials"] == seed):
            if time.process_time() > 60 * args.minutes:
                break
            name = tally["network"]
            row = trial(
                name, built[name], syms[name], seen[name], tally["noise"], seed, tally["method"]
            )
            take(tally, row)
            print(json.dumps({n: x for n, x in row.items() if n != "dead"}), flush=True)
        else:
            save(tallies)
            continue
        break
    save(tallies)
    summary = {}
    for t in tallies:
        kind = f"{t['network']}, noise {t['noise']}, {t['method']}"
        summary[kind] = f"{t['recovered']} of {t['trials']}"
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
