"""Every way to match, on the same pairs of networks (chapter 9).

Compares what `mcnotes.matching` has (`CALLS`): orders that look at nothing, at activations, at
weights and at the loss at the middle. Networks: perceptrons without normalisation, narrow, wide and
deep, a convolutional network without BatchNorm, TinyTen, ResNet20 and GoogLeNet with BatchNorm, and
a transformer with LayerNorm; three pairs of seeds each, on the embedded data set. Perceptrons of
further widths have six of the methods. Two more are measured only where `--networks` names them,
since they take hours: a wider ResNet20, and chapter 11's TinyTen on CIFAR-10. Each row names its
two networks by the hash of their parameters.

For every row: the barrier and the lowest accuracy on the straight line (test images, BatchNorm
recomputed on training images at every point), the mean correlation of matched units (training
images), the cosine of the weights and a bound that no order exceeds (`certify`), the CPU seconds of
the matching alone and the megabytes by which the process had to grow for it, the loss at the middle
with the normalisation's statistics as they are mixed and mended (BatchNorm recomputed; REPAIR where
there is none), and with `--curves` what a trained Bézier curve reaches, after a quarter of the
epochs that its ends had, rounded up (where there are all methods, but for the two that take hours).
No choice is made on test images: `--choose` tries settings of the methods that descend by the
validation loss at the middle, and ends; with `--save` it puts them into data/results/descents.json.

One line of JSON for each row, loaded from the store if it is there (so a run that was stopped goes
on); the last line is JSON: the mean barriers. `--save` computes nothing: it writes the rows that
the store has to data/results/matchers.json, and keeps those there that the store lacks. Rows that
were measured before a column was added have none of it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import gc
import hashlib
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from mcnotes import cache, checks, curves, evaluate, matching, models, train
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.lab import Experiment
from mcnotes.lab.experiment import curve_seed
from mcnotes.matching import Descent, Pair
from mcnotes.matching.methods import search
from mcnotes.symmetry import Perm

FIRST = ("identity", "random", "activations", "weights", "straight-through", "sinkhorn")
CALLS: dict[str, dict[str, Any]] = {  # by name, how `match` is asked
    **{method: {"method": method} for method in FIRST[:3]},
    "cca": {"method": "cca"},
    "weights": {"method": "weights"},
    "weights, 10 starts": {"method": "weights", "restarts": 10},
    "weights, polished": {"method": "weights", "polished": True},
    "frank-wolfe": {"method": "frank-wolfe"},
    "frank-wolfe, polished": {"method": "frank-wolfe", "polished": True},
    **{method: {"method": method} for method in FIRST[4:]},
    "straight-through-both": {"method": "straight-through-both"},
    "sinkhorn-both": {"method": "sinkhorn-both"},
}
WIDTHS = (8, 16, 32, 64, 128, 256, 512)  # of two hidden layers
PAIRS = ((1, 2), (3, 4), (5, 6))
FEW = ((1, 2), (3, 4), (1, 4))  # where there are four networks
Cell = tuple[str, tuple[int, int], str, int]
FILE = cache.ROOT / "data" / "results" / "matchers.json"
CHOICE = FILE.with_name("descents.json")
STEPS = 3  # of the bound
POINTS, TESTED, KNOWN = 9, 2_000, 1_000  # of a path; test images; those for statistics
WHOLE = (  # with every method
    "TinyTen",
    "ResNet20",
    "GoogLeNet",
    "CNN",
    "transformer",
    "MLP 8",
    "MLP 64",
    "MLP 256",
    "deep MLP",
)
ASKED = ("TinyTen, CIFAR-10", "ResNet20, 4 times as wide")  # hours of training
FOUR = {*ASKED, "GoogLeNet"}  # there are four networks
LARGE = {"ResNet20", "GoogLeNet"} | FOUR  # measured on half as many images of either kind


class Block(nn.Module):
    """Attention by heads and two linear layers, each after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (f(y).unflatten(2, (self.heads, -1)) for f in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)  # [images, heads, places, units]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        beside: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + beside


class Transformer(nn.Module):
    """A small vision transformer on patches of 7 x 7 pixels: LayerNorm, no BatchNorm."""

    def __init__(
        self, num_classes: int, channels: int, size: int, width: int, depth: int = 2
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 7, stride=7)
        self.place = nn.Parameter(torch.empty(1, (size // 7) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table of places; the layers draw their own weights."""
        nn.init.normal_(self.place, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(models.normalise(x)).flatten(2).transpose(1, 2) + self.place
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class Plain(nn.Module):
    """Three convolutions of stride 2 with biases, and no normalisation."""

    def __init__(self, num_classes: int, channels: int, width: int) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        convs = [nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in itertools.pairwise(sizes)]
        self.convs, self.head = nn.ModuleList(convs), nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = models.normalise(x)
        for conv in self.convs:
            x = conv(x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Lab(Experiment):
    """An experiment that knows a transformer, and multilayer perceptrons of any depth."""

    rules = Experiment.rules | {
        "network": checks.one_of([*models.BUILDERS, "transformer", "cnn", "mlp-2", "mlp-5"])
    }

    @cached_property
    def net(self) -> nn.Module:
        """As `Experiment.net`; "transformer"; "mlp-5" has five hidden layers."""
        _, channels, _, size = self.task.example.shape
        classes, width = self.task.num_classes, int(self.width)
        if self.network == "transformer":
            return Transformer(classes, channels, size, width)
        if self.network == "cnn":
            return Plain(classes, channels, width)
        if self.network.startswith("mlp-"):
            depth = int(self.network.removeprefix("mlp-"))
            return models.MLP(classes, channels * size**2, [width] * depth)
        return super().net


MLP = Lab(network="mlp-2", epochs=12, lr=0.05)
PRESET = cache.ROOT / "experiments/presets/cpu-tinyten-cifar10.yaml"
CIFAR = Lab.of(yaml.safe_load(PRESET.read_text("utf8")), also=["pairs"])  # as in chapter 11
CASES: dict[str, tuple[Lab, str]] = {  # an experiment, and how it normalises
    "TinyTen": (Lab(), "BatchNorm"),
    "TinyTen, CIFAR-10": (dataclasses.replace(CIFAR, match_images=2_000), "BatchNorm"),
    "ResNet20": (Lab(network="resnet20"), "BatchNorm"),
    "ResNet20, 4 times as wide": (Lab(network="resnet20", width=32, epochs=6), "BatchNorm"),
    "GoogLeNet": (Lab(network="googlenet", width=0.125, epochs=6), "BatchNorm"),
    "CNN": (Lab(network="cnn", width=16, epochs=12, lr=0.05), "none"),
    "transformer": (Lab(network="transformer", width=32, epochs=20), "LayerNorm"),
    **{f"MLP {w}": (dataclasses.replace(MLP, width=w), "none") for w in WIDTHS},
    "deep MLP": (dataclasses.replace(MLP, network="mlp-5", width=64), "none"),
}


def pairs_of(name: str) -> tuple[tuple[int, int], ...]:
    """Seeds of the three pairs."""
    return FEW if name in FOUR else PAIRS


def splits(name: str) -> tuple[Split, Split]:
    """Training images for statistics, and test images."""
    task, part = CASES[name][0].task, 2 if name in LARGE else 1
    return task.train.first(KNOWN // part), task.test.first(TESTED // part)


def middle(name: str, ends: tuple[Theta, Theta]) -> dict[str, float]:
    """Test loss: the mean of the ends; half-way as it comes; half-way with statistics mended."""
    (lab, normalisation), (known, test) = CASES[name], splits(name)
    net = lab.net
    half = curves.line(*ends)(0.5)
    found = {"ends": statistics.mean(evaluate.score(net, x, test).loss for x in ends)}
    found["as it comes"] = evaluate.score(net, half, test).loss
    if normalisation == "BatchNorm":
        mended = evaluate.batchnorm(net, half, known)
    elif normalisation == "none":
        mended = matching.repair(net, half, ends, known)
    else:
        return found
    return found | {"mended": evaluate.score(net, mended, test).loss}


def walk(name: str, curve: curves.Curve) -> dict[str, Any]:
    """Along a path."""
    known, test = splits(name)
    path = evaluate.profile(CASES[name][0].net, curve, test, statistics=known, points=POINTS)
    return {
        "barrier": path.barrier,
        "min_accuracy": path.min_accuracy,
        "loss": path.loss.tolist(),
        "accuracy": path.accuracy.tolist(),
    }


def order(pair: Pair, images: Split, method: str, seed: int) -> Perm:
    """The permutation that `match` would find, without its report."""
    call = CALLS[method]
    if call["method"] in matching.EXACT:
        return matching.match(pair, images, **call).perm
    perm = search(pair, images, call["method"], seed, call.get("restarts", 1))
    return matching.polish(pair, perm) if call.get("polished") else perm


def memory(reset: bool = False) -> int | None:
    """Bytes of memory of this process, at most since the last reset; None but for Linux."""
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0])


def cosine(names: list[str], a: Theta, b: Theta) -> float:
    """Of the angle between two networks: of these parameters, all as one vector."""
    u, v = (torch.cat([theta[n].double().flatten() for n in names]) for theta in (a, b))
    return float(torch.cosine_similarity(u, v, dim=0))


def match(lab: Lab, a: Theta, b: Theta, method: str, seed: int) -> dict[str, Any]:
    """The permutation; the CPU seconds and megabytes of the matching alone; how well it agrees."""
    pair, images = Pair(lab.net, lab.sym, a, b), lab.task.train.first(lab.match_images)
    before, start = memory(reset=True), time.process_time()  # what runs beside it does not count
    perm = order(pair, images, method, seed)
    found: dict[str, Any] = {"seconds": round(time.process_time() - start, 3)}
    after = memory()
    found["megabytes"] = round((after - before) / 2**20, 1) if before and after else None
    placed = dataclasses.replace(pair, theta_b=pair.permuted(perm))
    alike = matching.match(placed, images, method="identity").after
    found["correlation"] = float(torch.cat([*alike.values()]).mean())
    found["cosine"] = cosine(pair.names, a, placed.theta_b)
    return {"perm": perm} | found


def of_bound(name: str, pair: tuple[int, int]) -> dict[str, Any]:
    """All that the bound of a pair depends on."""
    ends = [CASES[name][0].endpoint_config(seed) for seed in pair]
    return {"what": "bench bound", "ends": ends, "steps": STEPS}


def bound(name: str, pair: tuple[int, int]) -> float:
    """A number that the cosine of the weights exceeds in no order: of a pair of networks."""
    lab, (a, b) = CASES[name][0], pair

    def compute() -> float:
        both = Pair(lab.net, lab.sym, lab.endpoint(a), lab.endpoint(b))
        return matching.certify(both, matching.frank_wolfe(both), steps=STEPS).bound

    return float(cache.values(of_bound(name, pair), compute))


def digest(theta: Theta) -> str:
    """A hash of all numbers of a network."""
    found = hashlib.sha256()
    for name in sorted(theta):
        found.update(name.encode() + theta[name].contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def epochs_of_curve(name: str) -> int:
    """A quarter of its ends', rounded up; none where it takes hours, or has only some methods."""
    return math.ceil(CASES[name][0].epochs / 4) if name in WHOLE else 0


def cells(networks: list[str], pairs: int, methods: list[str], curved: bool) -> list[Cell]:
    """What is to be measured: network, pair of seeds, method, epochs of the curve."""
    return [
        (name, pair, method, epochs_of_curve(name) if curved else 0)
        for method in methods
        for name in networks
        if method in FIRST or name in WHOLE + ASKED
        for pair in pairs_of(name)[:pairs]
    ]


def numbers(action: matching.Action) -> dict[str, float]:
    """The settings of an action: what is a number in it."""
    return {name: x for name, x in action._asdict().items() if name != "of"}


def settings(method: str) -> dict[str, float]:
    """The numbers of a method that descends; none of others."""
    action = matching.ACTIONS.get(method.removesuffix("-both"))
    return numbers(action) if action else {}


def configuration(cell: Cell) -> dict[str, Any]:
    """All that a cell depends on."""
    name, pair, method, curve_epochs = cell
    lab = CASES[name][0]
    config: dict[str, Any] = {
        "what": "bench",
        "ends": [lab.endpoint_config(s) for s in pair],
        "method": method,
        "match_images": lab.match_images,
        "clock": "CPU",
        "statistics": KNOWN,
        "points": POINTS,
        "tested": TESTED,
        "columns": ["cosine", "megabytes"],
    }
    config |= {"curve_epochs": curve_epochs} if curve_epochs else {}
    config |= settings(method)
    return config | ({"half": True} if name in LARGE else {})


def measured(cell: Cell) -> bool:
    """Whether the store has all of the row."""
    name, pair, *_ = cell
    return bool(cache.origin(configuration(cell)) and cache.origin(of_bound(name, pair)))


def measure(cell: Cell) -> dict[str, Any]:
    """One cell: loaded, or computed and kept."""
    (name, (a, b), method, curve_epochs), config = cell, configuration(cell)
    lab, normalisation = CASES[name]

    def compute() -> dict[str, Any]:
        one, two = lab.endpoint(a), lab.endpoint(b)
        found = match(lab, one, two, method, seed=curve_seed(a, b))
        ends = one, lab.sym.permute(two, found.pop("perm"))
        row: dict[str, Any] = {"network": name, "normalisation": normalisation, "pair": [a, b]}
        row |= {"hashes": [digest(one), digest(two)], "method": method} | found
        row |= {"line": walk(name, curves.line(*ends)), "middle": middle(name, ends)}
        if curve_epochs:
            recipe, start = lab.recipe(curve_epochs), curves.bezier(*ends)
            curve = train.fit_curve(lab.net, start, lab.task, recipe, seed=curve_seed(a, b)).curve
            row["curve"] = {"epochs": curve_epochs} | walk(name, curve)
        return row

    row: dict[str, Any] = cache.values(config, compute)
    by = [*settings(method).values()]
    row |= {"descent": by} if by else {}
    row |= {"bound": bound(name, (a, b)), "width": lab.width}
    return row | {"provenance": cache.origin(config)}


def choose(name: str, how: Descent, seeds: tuple[int, int]) -> dict[str, Any]:
    """The validation loss half-way that settings of a method that descends reach: for one pair."""
    lab, (a, b) = CASES[name][0], seeds
    row = {"network": name, "pair": [a, b], "method": how.action} | numbers(how.settings)

    def compute() -> float:
        known, matched = lab.task.train.first(KNOWN), lab.task.train.first(lab.match_images)
        pair = Pair(lab.net, lab.sym, lab.endpoint(a), lab.endpoint(b))
        perm = matching.loss_matching(pair, matched, how, seed=curve_seed(a, b))
        half = curves.line(pair.theta_a, pair.permuted(perm))(0.5)
        fresh = evaluate.batchnorm(lab.net, half, known)
        return evaluate.score(lab.net, fresh, lab.task.val).loss

    config: dict[str, Any] = {
        "what": "bench choice",
        "ends": [lab.endpoint_config(s) for s in seeds],
    }
    config |= {"descent": dataclasses.asdict(how), "match_images": lab.match_images}
    return row | {"loss": cache.values(config | {"statistics": KNOWN}, compute)}


def chosen(networks: list[str], tried: list[Descent], pairs: int, keep: bool) -> None:
    """Measure and print what settings reach; keep: and write them to `CHOICE`."""
    rows = []
    for name, how in itertools.product(networks, tried):
        for seeds in pairs_of(name)[:pairs]:
            rows.append(choose(name, how, seeds))
            print(json.dumps(rows[-1]), flush=True)
    if keep:
        write(CHOICE, {"statistics": KNOWN}, merged(contents(CHOICE)["rows"], rows, of_choice))


def of_choice(row: dict[str, Any]) -> tuple[str, ...]:
    """All of a row of `CHOICE` but what was reached."""
    return tuple(str(value) for name, value in row.items() if name != "loss")


def descent(text: str) -> Descent:
    """Of "ACTION,SCALE,LR,SOFT"."""
    action, *numbers = text.split(",")
    scale, lr, soft = map(float, numbers)
    return Descent(action, scale=scale, lr=lr, soft=soft)


def of_pair(row: dict[str, Any]) -> tuple[str, int, int]:
    """The network, and the seeds of the pair."""
    one, two = row["pair"]
    return row["network"], one, two


def same_line(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two rows are of the same line: by the loss along it."""
    return np.allclose(one["line"]["loss"], two["line"]["loss"], rtol=0, atol=2e-5)


def joined(kept: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the kept one has besides (a curve), if that is of the same permutation.

    If not, the curve is gone, and what the same descent reached before stays in `elsewhere`:
    rounding, which differs between processors, can lead a descent to another permutation.
    """
    if kept is None or same_line(kept, row):
        return (kept or {}) | row
    if "curve" in kept and "curve" not in row:
        print(json.dumps({"its curve is of another permutation": [*of_pair(row), row["method"]]}))
    if not row.get("descent"):
        return row
    before = {"barrier": kept["line"]["barrier"]}
    before |= {name: kept.get(name) for name in ("commit", "hardware")}
    seen = {end["barrier"]: end for end in [*kept.get("elsewhere", []), before]}
    seen.pop(row["line"]["barrier"], None)  # where it is again
    return row | {"elsewhere": [*seen.values()]}


def same_networks(fresh: dict[str, dict[str, Any]], kept: dict[str, dict[str, Any]]) -> bool:
    """Whether rows by method are of the same two networks: by their hashes.

    Training the same seeds on another processor may give others. Rows that were measured before
    hashes were kept are known by the line between the networks as they are.
    """
    if "identity" not in fresh or "identity" not in kept:
        return False
    one, two = fresh["identity"], kept["identity"]
    if "hashes" in one and "hashes" in two:
        return bool(one["hashes"] == two["hashes"])
    return same_line(one, two)


def contents(file: Path) -> dict[str, Any]:
    """What a results file holds; nothing if there is none. Ends the program if it is broken."""
    if not file.exists():
        return {"rows": []}
    try:
        record: dict[str, Any] = json.loads(file.read_text("utf8"))
        record["rows"] = [*record["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(file, error) from None
    return record


def broken(file: Path, error: Exception) -> SystemExit:
    """What ends the program at a results file that is not one."""
    why = f"it lacks {error}" if isinstance(error, KeyError) else error
    return SystemExit(f"{file} cannot be read: {why}. Fix: restore the file, or move it away")


def merged(
    old: list[dict[str, Any]], new: list[dict[str, Any]], what: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """All rows; the new ones come in place of those of the same `what`."""
    return [*{what(row): row for row in [*old, *new]}.values()]


def write(file: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A results file: the record, when and where it was collected, and a line for each row."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = record | {"collected": today, "provenance": cache.provenance(0.0)}
    head = json.dumps(record, indent=1)
    text = ",\n".join(json.dumps(row) for row in rows)
    lines = re.sub(r"\d+\.\d{6,}", lambda number: f"{float(number[0]):.5f}", text)
    text = head.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    cache.write_atomic(file, text.encode())


def save(rows: list[dict[str, Any]]) -> None:
    """Write the record that chapter 9 reads: one line for each row, and where it was computed.

    Rows of the file that are not among them stay, if they are of the same two networks and, where
    a method descends, by today's settings.
    """
    old = contents(FILE)
    known: dict[Any, dict[str, Any]] = {}
    for row in old["rows"]:
        if row.get("descent", []) != [*settings(row["method"]).values()]:
            continue
        known.setdefault((row["network"], *row["pair"]), {})[row["method"]] = row
    origins = []
    for place, some in itertools.groupby(sorted(rows, key=of_pair), of_pair):
        fresh, kept = {row["method"]: row for row in some}, known.get(place, {})
        if not same_networks(fresh, kept):
            if not {*FIRST} <= {*fresh}:
                print(json.dumps({"left out until it is whole": place}))
                continue
            kept = {}
        for row in fresh.values():
            origins.append(row.pop("provenance"))
            for name in ("commit", "hardware"):  # of the code and processor that did it
                row[name] = origins[-1][name]
        every = kept | {m: joined(kept.get(m), row) for m, row in fresh.items()}
        known[place] = {m: every[m] for m in CALLS if m in every}
    record = {
        "methods": [*CALLS],
        "first": FIRST,
        "whole": WHOLE,
        "tested": TESTED,
        "points": POINTS,
        "statistics": KNOWN,
        "steps": STEPS,
    }
    for name in ("hardware", "torch", "commit"):
        record[name] = sorted({*old.get(name, []), *(origin[name] for origin in origins)})
    write(FILE, record, [row for some in known.values() for row in some.values()])


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    usual = [name for name in CASES if name not in ASKED]
    parser.add_argument("--networks", nargs="+", default=usual, choices=[*CASES], metavar="NAME")
    parser.add_argument(
        "--methods", nargs="+", default=[*CALLS], choices=[*CALLS], metavar="METHOD"
    )
    parser.add_argument("--pairs", type=int, default=len(PAIRS), choices=[1, 2, 3], help="of seeds")
    parser.add_argument("--curves", action="store_true", help="train a curve for each row, too")
    parser.add_argument(
        "--choose",
        nargs="+",
        type=descent,
        metavar="ACTION,SCALE,LR,SOFT",
        help="only try settings of the methods that descend",
    )
    parser.add_argument("--save", action="store_true", help="write what the store has")
    args = parser.parse_args()
    if args.choose:
        chosen(args.networks, args.choose, args.pairs, args.save)
        return
    rows = []
    for cell in cells(args.networks, args.pairs, args.methods, args.curves):
        if args.save and not measured(cell):
            continue
        rows.append(measure(cell))
        shown = {n: rows[-1][n] for n in ("network", "pair", "method", "seconds")}
        barrier = round(rows[-1]["line"]["barrier"], 4)
        print(json.dumps(shown | {"barrier": barrier}), flush=True)
    if args.save:
        save(rows)
    means: dict[str, dict[str, float]] = {}
    for name in args.networks:
        for method in args.methods:
            found = [
                r["line"]["barrier"] for r in rows if (r["network"], r["method"]) == (name, method)
            ]
            if found:
                means.setdefault(name, {})[method] = round(statistics.mean(found), 4)
    print(json.dumps({"mean_barrier": means, "pairs": args.pairs}))


if __name__ == "__main__":
    main()
