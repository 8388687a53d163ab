"""Find and verify the permutation symmetries of other people's networks.

These are all classification models of torchvision, and of timm a small member of each of many
families (the list was made before the run; names "timm:...").

For each model, freshly initialised: the groups of interchangeable units and their number, the
share of all parameters that some permutation moves, the relative difference of the outputs after
a random cycle of every group (float64), the number of equivalent copies (power of ten), how many
hidden units of convolution and linear layers no group moves, and the seconds of processor time
that discovery takes; a first small network, not in the table, pays for PyTorch's warming up.
Freshly initialised, a deep network may be so ill-conditioned that rounding alone changes outputs;
where the difference is above 1e-9 it is kept as "fresh_error", and taken again with BatchNorm's
statistics of the images. GoogLeNet and Inception are taken in training mode, with their auxiliary
heads. What stays, and why, is in the JSON file. The last line is JSON.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision

from mcnotes import symmetry

IMAGE = {"inception_v3": 299}
AUXILIARY = {"googlenet", "inception_v3"}
TIMM = """
beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coatnet_0_rw_224
convit_tiny convmixer_1024_20_ks9_p14 convnextv2_atto crossvit_tiny_240 cspdarknet53 cspresnet50
csatv2 davit_tiny deit3_small_patch16_224 dla34 dpn48b ecaresnet26t edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvit_b0 efficientvit_m0
ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 gmixer_12_224 gmlp_ti16_224 halonet26t hardcorenas_a hiera_tiny_224 hrnet_w18_small
inception_next_atto inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_050 legacy_xception
levit_128s mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mixnet_s mobilenetv4_conv_small
mobileone_s0 mobilevit_xxs mobilevitv2_050 nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
poolformer_s12 pvt_v2_b0 rdnet_tiny regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9
res2net50_26w_4s resmlp_12_224 resnest14d resnetv2_50 resnetv2_50x1_bit rexnet_100 selecsls42b
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swinv2_cr_tiny_ns_224 tiny_vit_5m_224
tinynet_e tnt_s_patch16_224 twins_pcpvt_small twins_svt_small visformer_tiny vit_tiny_patch16_224
vitamin_small_224 volo_d1_224 xception41 xcit_nano_12_p16_224
"""


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


def hidden(sym: symmetry.Symmetry, net: torch.nn.Module) -> tuple[int, int, list[str]]:
    """Hidden units of convolution and linear layers: all; those that no group moves; and why."""
    total, still, why = 0, 0, []
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear):
            total += len(module.weight)
            for p in (p for p in sym.pinned if (p.name, p.axis) == (f"{name}.weight", 0)):
                total -= p.count * (p.why == "reaches the output")
                if p.why != "reaches the output":
                    still += p.count
                    why.append(f"{name}: {p.count}: {p.why}")
    return total, still, why


def build(name: str, size: int | None) -> tuple[torch.nn.Module, int]:
    """A model and the side of its images."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        name = name.removeprefix("timm:")
        config = timm.get_pretrained_cfg(name)
        assert config is not None  # timm has one for each of its models
        return timm.create_model(name), config.input_size[-1]
    options = {"init_weights": False} if name in AUXILIARY else {}
    net = torchvision.models.get_model(name, weights=None, **options)
    return net, IMAGE.get(name, size or 224)


def settle(net: torch.nn.Module, example: torch.Tensor) -> None:
    """Give BatchNorm the statistics of the example, as if the network had been trained."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    net.eval()
    for m in norms:
        m.momentum = 1.0
        m.train()
    with torch.no_grad():
        net(torch.cat([example, torch.rand_like(example)]))


def examine(name: str, size: int | None, code: str) -> dict[str, Any]:
    """One row of the table; `error` is None, and `failure` says why, when there is no proof."""
    net, pixels = build(name, size)
    example = torch.rand(2 if name in AUXILIARY else 1, 3, pixels, pixels)
    row: dict[str, Any] = {"model": name, "commit": code}
    start = time.process_time()
    try:
        sym = symmetry.find(net, example, train=name in AUXILIARY)
        row["seconds"] = round(time.process_time() - start, 2)
        row["groups"] = len(sym.groups)
        row["units"] = sum(g.size for g in sym.groups.values())
        row["touched"] = round(touched(sym, net), 4)
        row["hidden"], row["still"], row["why"] = hidden(sym, net)
        row["log10_copies"] = round(sym.log10_orbit())
        row["error"] = sym.verify(net, example, tolerance=math.inf)
        if row["error"] > 1e-9:  # is it merely ill-conditioned?
            row["fresh_error"] = row["error"]
            settle(net, example)
            row["error"] = sym.verify(net, example)
    except Exception as error:  # the others go on
        row |= {"error": None, "failure": f"{type(error).__name__}: {error}"}
    return row


def line(row: dict[str, object]) -> str:
    """A row as it is printed."""
    if row["error"] is None:
        return f"{row['model']:30} {row['failure']}"
    return (
        f"{row['model']:30} {row['groups']:6} {row['units']:7} {row['touched']:8.1%} "
        f"{row['error']:10.1e} {row['log10_copies']:12,} {row['still']:6} {row['seconds']:8.2f}"
    )


def commit() -> str:
    """The commit of the code; "+" when the package differs from it."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "mcnotes"))


def provenance() -> dict[str, object]:
    """What was run, where and when."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": metadata.version("timm"),
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
    parser.add_argument("models", nargs="*", help="names; default: the whole list")
    parser.add_argument("--size", type=int, help="image side, default 224 (Inception: 299)")
    parser.add_argument("--out", type=Path, help="also write a JSON file with provenance")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds")
    args = parser.parse_args()
    every = torchvision.models.list_models(module=torchvision.models)
    every += [f"timm:{name}" for name in TIMM.split()]
    names, place = args.models or every, {name: k for k, name in enumerate(every)}
    print(
        f"{'model':30} {'groups':>6} {'units':>7} {'touched':>8} {'error':>10}"
        f" {'log10 copies':>12} {'still':>6} {'seconds':>8}"
    )
    symmetry.find(torch.nn.Linear(2, 2), torch.rand(2, 2))
    kept = args.resume and args.out and args.out.exists()
    rows = json.loads(args.out.read_text())["rows"] if kept else []
    done, code = {row["model"] for row in rows}, commit()
    for name in (name for name in names if name not in done):
        rows.append(examine(name, args.size, code))
        print(line(rows[-1]), flush=True)
        rows.sort(key=lambda row: place.get(row["model"], len(place)))
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
