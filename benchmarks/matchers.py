"""Every way to match, on the same pairs of networks (chapter 9).

Compares the methods of `mcnotes.matching.match`: the identity, a random order, activations,
weights, the loss at the middle (straight through, and by Sinkhorn's scaling). Networks: TinyTen,
ResNet20 and GoogLeNet with BatchNorm, a transformer with LayerNorm, multilayer perceptrons of seven
widths and a deep one without normalisation, three pairs of seeds each, on the embedded data set.

For every cell: the barrier and the lowest accuracy on the straight line (test images, BatchNorm
recomputed on training images at every point), the mean correlation of matched units (training
images), the CPU seconds of the matching alone, the loss at the middle with the normalisation's
statistics as they are mixed and mended (BatchNorm recomputed; REPAIR where there is none), and for
TinyTen a short trained curve. No choice is made on test images: `--choose` tries settings of the
two methods that descend by the validation loss at the middle, and ends.

One line of JSON for each cell, loaded from the store if it is there (so a run that was stopped goes
on); the last line is JSON: the mean barriers. `--save` computes nothing: it writes the cells that
the store has to data/results/matchers.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcnotes import cache, checks, curves, evaluate, matching, models, train
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.lab import Experiment
from mcnotes.lab.experiment import curve_seed
from mcnotes.matching import Descent, Pair

COMPARED = ("identity", "random", "activations", "weights", "straight-through", "sinkhorn")
WIDTHS = (8, 16, 32, 64, 128, 256, 512)  # of two hidden layers
PAIRS = ((1, 2), (3, 4), (5, 6))
FEW = ((1, 2), (3, 4), (1, 4))  # of GoogLeNet, of which there are four
Cell = tuple[str, tuple[int, int], str, int]
POINTS, TESTED, KNOWN = 9, 2_000, 1_000  # of a path; test images; those for statistics
LARGE = {"ResNet20", "GoogLeNet"}  # measured on half as many images of either kind


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
        return x + self.down(F.gelu(self.up(self.norm2(x))))


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


@dataclass(frozen=True)
class Lab(Experiment):
    """An experiment that knows a transformer, and multilayer perceptrons of any depth."""

    rules = Experiment.rules | {
        "network": checks.one_of([*models.BUILDERS, "transformer", "mlp-2", "mlp-5"])
    }

    @cached_property
    def net(self) -> nn.Module:
        """As `Experiment.net`; "transformer"; "mlp-5" has five hidden layers."""
        _, channels, _, size = self.task.example.shape
        classes, width = self.task.num_classes, int(self.width)
        if self.network == "transformer":
            return Transformer(classes, channels, size, width)
        if self.network.startswith("mlp-"):
            depth = int(self.network.removeprefix("mlp-"))
            return models.MLP(classes, channels * size**2, [width] * depth)
        return super().net


MLP = Lab(network="mlp-2", epochs=12, lr=0.05)
CASES: dict[str, tuple[Lab, str]] = {  # an experiment, and how it normalises
    "TinyTen": (Lab(), "BatchNorm"),
    "ResNet20": (Lab(network="resnet20"), "BatchNorm"),
    "GoogLeNet": (Lab(network="googlenet", width=0.125, epochs=6), "BatchNorm"),
    "transformer": (Lab(network="transformer", width=32, epochs=20), "LayerNorm"),
    **{f"MLP {w}": (dataclasses.replace(MLP, width=w), "none") for w in WIDTHS},
    "deep MLP": (dataclasses.replace(MLP, network="mlp-5", width=64), "none"),
}


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
    return {"barrier": path.barrier, "min_accuracy": path.min_accuracy,
            "loss": path.loss.tolist(), "accuracy": path.accuracy.tolist()}  # fmt: skip


def match(lab: Lab, a: Theta, b: Theta, method: str, seed: int) -> tuple[matching.Matching, float]:
    """As `matching.match`; and the CPU seconds of the matching alone."""
    pair, images = Pair(lab.net, lab.sym, a, b), lab.task.train.first(lab.match_images)
    start = time.process_time()  # what runs beside it does not count
    if method == "activations":
        found = matching.match(pair, images)
        return found, time.process_time() - start
    perm = matching.METHODS[method](pair, images, seed)
    seconds = time.process_time() - start
    placed = dataclasses.replace(pair, theta_b=pair.permuted(perm))
    found = matching.match(placed, images, method="identity")
    return dataclasses.replace(found, perm=perm), seconds


def cells(networks: list[str], pairs: int, methods: list[str], epochs: int) -> list[Cell]:
    """What is to be measured: network, pair of seeds, method, epochs of the curve."""
    return [
        (name, pair, method, epochs if name == "TinyTen" else 0)
        for name in networks
        for pair in (FEW if name == "GoogLeNet" else PAIRS)[:pairs]
        for method in methods
    ]


def configuration(cell: Cell) -> dict[str, Any]:
    """All that a cell depends on."""
    name, pair, method, curve_epochs = cell
    lab = CASES[name][0]
    config: dict[str, Any] = {"what": "bench", "ends": [lab.endpoint_config(s) for s in pair],
                              "method": method, "match_images": lab.match_images, "clock": "CPU",
                              "statistics": KNOWN, "points": POINTS, "tested": TESTED}  # fmt: skip
    config |= {"curve_epochs": curve_epochs} if curve_epochs else {}
    config |= {"lr": matching.RATES[method]} if method in matching.RATES else {}
    return config | ({"half": True} if name in LARGE else {})


def measure(cell: Cell) -> dict[str, Any]:
    """One cell: loaded, or computed and kept."""
    (name, (a, b), method, curve_epochs), config = cell, configuration(cell)
    lab, normalisation = CASES[name]

    def compute() -> dict[str, Any]:
        one, two = lab.endpoint(a), lab.endpoint(b)
        found, seconds = match(lab, one, two, method, seed=curve_seed(a, b))
        ends = one, lab.sym.permute(two, found.perm)
        row: dict[str, Any] = {"network": name, "normalisation": normalisation, "pair": [a, b]}
        row |= {"method": method, "seconds": round(seconds, 3)}
        row["correlation"] = float(torch.cat([*found.after.values()]).mean())
        row |= {"line": walk(name, curves.line(*ends)), "middle": middle(name, ends)}
        if curve_epochs:
            recipe, start = lab.recipe(curve_epochs), curves.bezier(*ends)
            curve = train.fit_curve(lab.net, start, lab.task, recipe, seed=curve_seed(a, b)).curve
            row["curve"] = {"epochs": curve_epochs} | walk(name, curve)
        return row

    row: dict[str, Any] = cache.values(config, compute)
    return row | {"width": lab.width, "provenance": cache.origin(config)}


def choose(name: str, rates: list[float], pairs: tuple[tuple[int, int], ...]) -> None:
    """Step sizes of the methods that descend, by the validation loss at the middle."""
    lab = CASES[name][0]
    known, matched = lab.task.train.first(KNOWN), lab.task.train.first(lab.match_images)
    for action in matching.ACTIONS:
        for lr in rates:
            losses = []
            for a, b in pairs:
                one, two = lab.endpoint(a), lab.endpoint(b)
                pair = Pair(lab.net, lab.sym, one, two)
                perm = matching.loss_matching(pair, matched, Descent(action, lr=lr))
                half = curves.line(one, pair.permuted(perm))(0.5)
                fresh = evaluate.batchnorm(lab.net, half, known)
                losses.append(round(evaluate.score(lab.net, fresh, lab.task.val).loss, 4))
            found = {"network": name, "method": action, "lr": lr, "losses": losses}
            print(json.dumps(found), flush=True)


def save(rows: list[dict[str, Any]]) -> None:
    """Write the record that chapter 9 reads: one line for each cell, and where it was computed."""
    origins = [row.pop("provenance") for row in rows]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = {"methods": COMPARED, "tested": TESTED, "points": POINTS, "statistics": KNOWN,
              "rates": matching.RATES, "collected": today}  # fmt: skip
    for name in ("hardware", "torch", "commit"):
        record[name] = sorted({origin[name] for origin in origins})
    head = json.dumps(record | {"provenance": cache.provenance(0.0)}, indent=1)
    text = ",\n".join(json.dumps(row) for row in rows)
    lines = re.sub(r"\d+\.\d{6,}", lambda number: f"{float(number[0]):.5f}", text)
    text = head.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    cache.write_atomic(cache.ROOT / "data" / "results" / "matchers.json", text.encode())


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--networks", nargs="+", default=[*CASES], choices=[*CASES], metavar="NAME")
    parser.add_argument(
        "--methods", nargs="+", default=COMPARED, choices=COMPARED, metavar="METHOD"
    )
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="of seeds, at most three")
    parser.add_argument("--curve-epochs", type=int, default=3, help="of TinyTen's curves; 0: none")
    parser.add_argument("--choose", nargs="+", type=float, metavar="LR", help="only try step sizes")
    parser.add_argument("--save", action="store_true", help="write what the store has")
    args = parser.parse_args()
    if args.choose:
        for name in args.networks:
            choose(name, args.choose, PAIRS[: args.pairs])
        return
    rows = []
    for cell in cells(args.networks, args.pairs, args.methods, args.curve_epochs):
        if args.save and not cache.origin(configuration(cell)):
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
            found = [r["line"]["barrier"] for r in rows
                     if (r["network"], r["method"]) == (name, method)]  # fmt: skip
            if found:
                means.setdefault(name, {})[method] = round(statistics.mean(found), 4)
    print(json.dumps({"mean_barrier": means, "pairs": args.pairs}))


if __name__ == "__main__":
    main()
