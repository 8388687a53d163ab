"""Find and verify the permutation symmetries of every torchvision classification model.

For each model, freshly initialised: the groups of interchangeable units and their number, the
share of all parameters that some permutation moves, the relative difference of the outputs after
a random cycle of every group (float64), the number of equivalent copies (power of ten), and the
seconds of processor time that discovery takes, the export of the graph included; a first small
network, not in the table, pays for PyTorch's warming up. GoogLeNet and Inception are taken in
training mode, with their auxiliary heads. The last line is JSON.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchvision

from mcnotes import symmetry

IMAGE = {"inception_v3": 299}
AUXILIARY = {"googlenet", "inception_v3"}


def touched(sym: symmetry.Symmetry, net: torch.nn.Module) -> float:
    """The share of the entries of all parameters that lie at a place of some group."""
    places = defaultdict(list)
    for group in sym.groups.values():
        for place in group.places:
            places[place.name].append(place)
    total = moved = 0
    for name, parameter in net.named_parameters():
        still = torch.ones(parameter.shape, dtype=torch.bool)
        for place in places[name]:
            flat = still.flatten(place.axis, place.axes[-1])
            flat.index_fill_(place.axis, torch.from_numpy(place.index.ravel()), False)
            still = flat.view(parameter.shape)
        total += parameter.numel()
        moved += parameter.numel() - int(still.sum())
    return moved / total


def examine(name: str, size: int | None) -> dict[str, object]:
    """One row of the table; `error` is None, and `failure` says why, when there is no proof."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in AUXILIARY else {}
    net = torchvision.models.get_model(name, weights=None, **options)
    pixels = IMAGE.get(name, size or 224)
    example = torch.rand(2 if name in AUXILIARY else 1, 3, pixels, pixels)
    row: dict[str, object] = {"model": name}
    start = time.process_time()
    try:
        sym = symmetry.find(net, example, train=name in AUXILIARY)
        row["seconds"] = round(time.process_time() - start, 2)
        row["groups"] = len(sym.groups)
        row["units"] = sum(g.size for g in sym.groups.values())
        row["touched"] = round(touched(sym, net), 4)
        row["log10_copies"] = round(sym.log10_orbit())
        row["error"] = sym.verify(net, example)
    except symmetry.SymmetryError as error:
        row |= {"error": None, "failure": str(error)}
    return row


def line(row: dict[str, object]) -> str:
    """A row as it is printed."""
    if row["error"] is None:
        return f"{row['model']:20} {row['failure']}"
    return (
        f"{row['model']:20} {row['groups']:6} {row['units']:7} {row['touched']:8.1%} "
        f"{row['error']:10.1e} {row['log10_copies']:10,} {row['seconds']:8.2f}"
    )


def provenance() -> dict[str, object]:
    """What was run, where and when."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "seconds": "processor time",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, object]:
    """The last line."""
    good = [r for r in rows if r["error"] is not None]
    return {
        "models": len(rows),
        "verified": len(good),
        "median_seconds": round(statistics.median([r["seconds"] for r in good] or [0]), 2),
        "worst_error": max((r["error"] for r in good), default=0),
    }


def main() -> int:
    """Run the table; exit status 1 when a model fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names; default: all classification models")
    parser.add_argument("--size", type=int, help="image side, default 224 (Inception: 299)")
    parser.add_argument("--out", type=Path, help="also write a JSON file with provenance")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds")
    args = parser.parse_args()
    names = args.models or torchvision.models.list_models(module=torchvision.models)
    print(f"{'model':20} {'groups':>6} {'units':>7} {'touched':>8} {'error':>10}"
          f" {'log10 copies':>10} {'seconds':>8}")  # fmt: skip
    symmetry.find(torch.nn.Linear(2, 2), torch.rand(2, 2))
    kept = args.resume and args.out and args.out.exists()
    rows = json.loads(args.out.read_text())["rows"] if kept else []
    done = {row["model"] for row in rows}
    for name in (name for name in names if name not in done):
        rows.append(examine(name, args.size))
        print(line(rows[-1]), flush=True)
        if args.out:  # after each model: a run may be cut short, and go on later
            args.out.parent.mkdir(parents=True, exist_ok=True)
            configuration = {"models": names, "size": args.size or 224, "mode": "float64"}
            record = {"configuration": configuration, **provenance(), "summary": summary(rows)}
            args.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    good = [r for r in rows if r["error"] is not None]
    print(json.dumps(summary(rows)))
    return 0 if len(good) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
