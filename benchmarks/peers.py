"""Packages of others on the pairs of `matchers.py` (chapter 9).

`rebasin` matches weights (after Git Re-Basin), `sinkhorn-rebasin` descends through Sinkhorn
matrices (its authors' own code). Both come from PyPI. They share a name, so each has an environment
of its own beneath `_build/peers`, which also sees what is installed here. Each is given the second
network of a pair (`pair`), and a permuted copy of the first (`planted`); our methods by weights and
by Sinkhorn matrices stand beside them. `sinkhorn-rebasin` has the losses, rates and lengths of its
authors' examples, which differ by the kind of network: for a pair the loss on the line, for a copy
the distance of the weights (`EXAMPLES`).

For every row: whether what comes back still computes what it did (`change`: the largest difference
of probabilities on test images; with BatchNorm a second time, its statistics recomputed), the
barrier on the straight line (so, too), the cosine of all parameters, for planted copies how many
tensors are home again, and CPU seconds. What fails, or needs more than `--limit` seconds, has a row
that says so.

One line of JSON for each row, loaded from the store if it is there; `--save` puts them into
data/results/peers.json, in place of those of the same network, pair, task and method. The last line
is JSON: in how many rows the function was kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import site
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matchers import (
    CASES,
    KNOWN,
    PAIRS,
    WHOLE,
    contents,
    cosine,
    digest,
    merged,
    pairs_of,
    settings,
    walk,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mcnotes import cache, curves, evaluate, matching
from mcnotes.curves import Theta
from mcnotes.data import Split
from mcnotes.lab.experiment import curve_seed
from mcnotes.matching import Pair

FILE = cache.ROOT / "data" / "results" / "peers.json"
PLACES = cache.ROOT / "_build" / "peers"
PACKAGES = {  # what is installed, all without what it asks for, which is here
    "rebasin": ["rebasin==0.0.47", "torchview==0.2.7", "graphviz==0.21"],
    "sinkhorn-rebasin": ["sinkhorn-rebasin==0.0.2", "torchviz==0.0.3", "graphviz==0.21"],
}
OURS = {"rebasin": "weights", "sinkhorn-rebasin": "sinkhorn"}  # what does the same here
BATCH = 100  # images of a step of sinkhorn-rebasin


class Example(NamedTuple):
    """How an example of sinkhorn-rebasin descends: by which of its losses."""

    loss: str
    rate: float
    length: int  # epochs; for a distance, which needs no images, steps at most


# github.com/fagp/sinkhorn-rebasin, examples/main_lmc_*.py and main_alignment_*.py: of the MLP, the
# VGG without BatchNorm, and the ResNet with it. Their batches have 1,000 images (ResNet: 128) of
# 9,000 (8,469). By a distance they take 50 steps at most (VGG: at a rate of 10.1).
EXAMPLES = {
    "pair": {
        "perceptron": Example("MidLoss", 0.1, 20),
        "convolutional": Example("RndLoss", 0.1, 20),
        "BatchNorm": Example("RndLoss", 0.1, 50),
    },
    "planted": {
        "perceptron": Example("DistL2Loss", 0.1, 200),
        "convolutional": Example("DistL1Loss", 10.0, 200),
        "BatchNorm": Example("DistL1Loss", 10.0, 200),
    },
}
IMAGES = 500  # on which functions are compared
TASKS = ("pair", "planted")


def by_weights(net_a: nn.Module, net_b: nn.Module, images: Split, _: Example) -> nn.Module:
    """`rebasin`, which changes the second network."""
    from rebasin import PermutationCoordinateDescent  # type: ignore[import-not-found]

    x, _labels = next(images.batches(BATCH))
    PermutationCoordinateDescent(net_a, net_b, x).rebasin()
    return net_b


def by_descent(net_a: nn.Module, net_b: nn.Module, images: Split, how: Example) -> nn.Module:
    """`sinkhorn-rebasin`, as in one of its examples."""
    from rebasin import RebasinNet, loss

    x, _labels = next(images.batches(1))
    moved = RebasinNet(net_b, input_shape=tuple(x.shape), permutation_type="broadcast")
    optimiser = torch.optim.AdamW(moved.p.parameters(), lr=how.rate)

    def step(value: Tensor) -> None:
        optimiser.zero_grad()
        value.backward()
        optimiser.step()

    moved.train()
    if how.loss.startswith("Dist"):
        moved.identity_init()
        distance = getattr(loss, how.loss)(net_a)
        for _ in range(how.length):
            step(distance(moved()))
            moved.eval()
            if distance(moved()) == 0:
                break
            moved.train()
    else:
        on_line = getattr(loss, how.loss)(net_a, criterion=F.cross_entropy)
        for _ in range(how.length):
            for x, labels in images.batches(BATCH):
                step(on_line(moved(), x, labels))
    moved.update_batchnorm(net_b)
    moved.eval()
    found: nn.Module = moved()
    return found


Run = Callable[[nn.Module, nn.Module, Split, Example], nn.Module]
RUNS: dict[str, Run] = {"rebasin": by_weights, "sinkhorn-rebasin": by_descent}


def inside(peer: str, network: str, task: str, folder: Path) -> None:
    """In the peer's environment: read both networks, move the second, write it."""
    torch.set_num_threads(1)
    lab = CASES[network][0]
    images = lab.task.train.first(lab.match_images)
    nets = []
    for name in ("a", "b"):
        net = copy.deepcopy(lab.net)
        net.load_state_dict(load_file(folder / f"{name}.safetensors"))
        nets.append(net.eval())
    run, how = RUNS[peer], example(network, task)
    with torch.enable_grad():
        one, two = copy.deepcopy(nets)
        run(one, two, images.first(BATCH), how._replace(length=1))  # so that all is imported
        torch.manual_seed(0)
        start = time.process_time()
        moved = run(nets[0], nets[1], images, how)
    seconds = round(time.process_time() - start, 3)
    found = {n: x.detach().clone().contiguous() for n, x in moved.state_dict().items()}
    save_file(found, folder / "moved.safetensors", metadata={"seconds": str(seconds)})


def example(network: str, task: str) -> Example:
    """Of sinkhorn-rebasin, for this kind of network."""
    normalisation = CASES[network][1]
    plain = "convolutional" if network == "CNN" else "perceptron"
    return EXAMPLES[task]["BatchNorm" if normalisation == "BatchNorm" else plain]


def environment(peer: str) -> Path:
    """The peer's Python; its environment is made if there is none."""
    place = PLACES / peer
    python = place / "bin" / "python"
    ready = place / "ready.json"
    if ready.exists() and json.loads(ready.read_text()) == PACKAGES[peer]:
        return python
    venv.create(place, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "-qq", "install", "--no-deps", *PACKAGES[peer]]
    subprocess.run(install, check=True)
    (lib,) = place.glob("lib/python*/site-packages")
    here = "; ".join(f"site.addsitedir({p!r})" for p in site.getsitepackages())
    (lib / "here.pth").write_text(f"import site; {here}\n")
    ready.write_text(json.dumps(PACKAGES[peer]))
    return python


def last_line(text: str) -> str:
    """What an error says in the end."""
    return (text.strip().splitlines() or ["no message"])[-1][:200]


class Failure(Exception):
    """What went wrong with a package."""


def ask(
    peer: str, network: str, task: str, a: Theta, b: Theta, limit: float
) -> tuple[Theta, float]:
    """The second network as a peer moves it, and the CPU seconds. Raises Failure."""
    python = environment(peer)
    with tempfile.TemporaryDirectory() as folder:
        for name, theta in (("a", a), ("b", b)):
            whole = {n: x.contiguous() for n, x in theta.items()}
            save_file(whole, Path(folder) / f"{name}.safetensors")
        call = [str(python), __file__, "--inside", peer, network, task, folder]
        path = os.pathsep.join([str(cache.ROOT), os.environ.get("PYTHONPATH", "")])
        around = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(call, capture_output=True, text=True, timeout=limit, env=around)
        except subprocess.TimeoutExpired as error:
            raise Failure(f"not done after {limit:g} s") from error
        if run.returncode:
            raise Failure(last_line(run.stderr))
        file = Path(folder) / "moved.safetensors"
        with safe_open(file, "pt") as opened:
            seconds = float(opened.metadata()["seconds"])
        return load_file(file), seconds


def ours(method: str, pair: Pair, images: Split, seed: int) -> tuple[Theta, float]:
    """The second network as a method of this package moves it, and the CPU seconds."""
    start = time.process_time()
    perm = matching.METHODS[method](pair, images, seed)
    return pair.permuted(perm), round(time.process_time() - start, 3)


def change(network: str, one: Theta, two: Theta) -> float:
    """The largest difference of probabilities on test images."""
    net, test = CASES[network][0].net, CASES[network][0].task.test.first(IMAGES)
    before, after = (evaluate.probabilities(net, x, test) for x in (one, two))
    return float((before - after).abs().max())


def compare(network: str, pair: Pair, moved: Theta) -> dict[str, Any]:
    """What has become of the second network."""
    lab, normalisation = CASES[network]
    found = {"change": change(network, pair.theta_b, moved)}
    if normalisation == "BatchNorm":
        known = lab.task.train.first(KNOWN)
        fresh = (evaluate.batchnorm(lab.net, x, known) for x in (pair.theta_b, moved))
        found["change, recomputed"] = change(network, *fresh)
    return found | {
        "cosine": cosine(pair.names, pair.theta_a, moved),
        "home": sum(torch.equal(pair.theta_a[n], moved[n]) for n in pair.names),
        "tensors": len(pair.names),
        "barrier": walk(network, curves.line(pair.theta_a, moved))["barrier"],
    }


def measure(network: str, seeds: tuple[int, int], task: str, who: str, limit: float) -> Any:
    """One row: loaded, or computed and kept; a failure is not kept. who: a peer, or our method."""
    lab, (a, b) = CASES[network][0], seeds
    peer = who in PACKAGES
    followed = example(network, task) if who == "sinkhorn-rebasin" else ()
    how = [PACKAGES[who], BATCH, *followed] if peer else [who, settings(who)]
    config: dict[str, Any] = {"what": "peers", "ends": [lab.endpoint_config(s) for s in seeds]}
    config |= {"task": task, "who": how, "match_images": lab.match_images}
    config |= {"clock": "warm"} if peer else {}
    config |= {"recomputed": KNOWN} if CASES[network][1] == "BatchNorm" else {}
    row = {"network": network, "pair": [a, b], "task": task, "who": who}

    def compute() -> dict[str, Any]:
        one, two = lab.endpoint(a), lab.endpoint(b)
        if task == "planted":
            two = lab.sym.permute(one, lab.sym.random(torch.Generator().manual_seed(1000 + a)))
        pair, images = Pair(lab.net, lab.sym, one, two), lab.task.train.first(lab.match_images)
        if peer:
            moved, seconds = ask(who, network, task, one, two, limit)
        else:
            moved, seconds = ours(who, pair, images, curve_seed(a, b))
        hashes = [digest(one), digest(two)]
        return row | {"hashes": hashes} | compare(network, pair, moved) | {"seconds": seconds}

    row |= {"example": followed} if followed else {}
    try:
        return cache.values(config, compute) | row | {"commit": cache.origin(config)["commit"]}
    except Failure as failure:
        return row | {"error": str(failure)}


def of_row(row: dict[str, Any]) -> tuple[Any, ...]:
    """What is measured but once."""
    return row["network"], *row["pair"], row["task"], row["who"]


def save(rows: list[dict[str, Any]]) -> None:
    """Put the rows into the file; those that were not measured now, or failed now, stay."""
    old = contents(FILE)["rows"]
    known = {of_row(row) for row in old if "error" not in row}
    fresh = [row for row in rows if "error" not in row or of_row(row) not in known]
    every = merged(old, fresh, of_row)
    ordered = sorted(every, key=lambda row: WHOLE.index(row["network"]))
    write(FILE, {"packages": PACKAGES}, ordered)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--networks", nargs="+", default=[*WHOLE], choices=WHOLE, metavar="NAME")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), choices=[1, 2, 3], help="of seeds")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one row of a peer")
    parser.add_argument("--save", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        peer, network, task, folder = args.inside
        return inside(peer, network, task, Path(folder))
    torch.set_num_threads(1)
    rows = []
    for network in args.networks:
        for seeds in pairs_of(network)[: args.pairs]:
            for task in TASKS:
                for peer, method in OURS.items():
                    for who in (peer, method):
                        rows.append(measure(network, seeds, task, who, args.limit))
                        print(json.dumps(rows[-1]), flush=True)
    if args.save:
        save(rows)
    kept = {who: 0 for pair in OURS.items() for who in pair}
    for row in rows:
        kept[row["who"]] += row.get("change", 1) < 1e-4
    print(json.dumps({"function kept": kept, "of": len(rows) // len(kept)}))
    return None


if __name__ == "__main__":
    main()
