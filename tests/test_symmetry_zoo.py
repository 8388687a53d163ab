"""A member of each family of torchvision's classification networks, on small images.

The whole list at full size is the work of `benchmarks/symmetry_zoo.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from mcnotes import symmetry


def narrow(net: nn.Module) -> nn.Module:
    """Classifiers of hundreds of megabytes are cut to 64 hidden units."""
    last = 10
    for k, layer in reversed(list(enumerate(net.classifier))):
        if isinstance(layer, nn.Linear):
            first = not any(isinstance(m, nn.Linear) for m in list(net.classifier)[:k])
            net.classifier[k] = nn.Linear(layer.in_features if first else 64, last)
            last = 64
    return net


swin = partial(
    SwinTransformer, [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.1, num_classes=10
)

convnext_blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)]


def regnet(se_ratio: float | None = None) -> nn.Module:
    shape = BlockParams.from_init_params(6, 16, 16.0, 2.5, 8, se_ratio=se_ratio)
    return models.RegNet(shape, num_classes=10)


# Model, the image's side, the number of groups.
ZOO: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "alexnet": (lambda: narrow(models.alexnet()), 64, 7),
    "convnext": (partial(models.ConvNeXt, convnext_blocks, num_classes=10), 32, 5),
    "densenet": (partial(models.DenseNet, 8, (3, 2, 2), 16, num_classes=10), 32, 17),
    "efficientnet": (models.efficientnet_b0, 32, 40),
    "googlenet": (partial(models.googlenet, init_weights=False), 64, 57),
    "inception": (partial(models.inception_v3, init_weights=False), 96, 94),
    "maxvit": (partial(MaxVit, (64, 64), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=10), 64, 41),
    "mnasnet": (models.mnasnet0_5, 32, 25),
    "mobilenet_v2": (models.mobilenet_v2, 32, 25),
    "mobilenet_v3": (models.mobilenet_v3_small, 32, 27),
    "regnet_x": (regnet, 32, 106),
    "regnet_y": (partial(regnet, se_ratio=0.25), 32, 112),
    "resnet": (models.resnet18, 32, 12),
    "resnext": (
        partial(models.ResNet, Bottleneck, [2, 1, 1, 1], groups=8, width_per_group=4),
        32,
        90,
    ),
    "shufflenet": (models.shufflenet_v2_x0_5, 32, 80),
    "squeezenet": (models.squeezenet1_1, 32, 25),
    "swin": (swin, 32, 34),
    "swin_v2": (
        partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        32,
        42,
    ),
    "vgg": (lambda: narrow(models.vgg11_bn()), 32, 10),
    "vit": (partial(models.VisionTransformer, 32, 8, 2, 4, 32, 64, num_classes=10), 32, 21),
}


def uncovered(net: nn.Module, sym: symmetry.Symmetry) -> dict[str, int]:
    """The units of convolutions and linear layers that no group moves, by layer."""
    moved: dict[str, set[int]] = {}
    for group in sym.groups.values():
        for at in group.places:
            if at.axes == (0,):
                moved.setdefault(at.name, set()).update(at.index.ravel().tolist())
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    still = {n: len(m.weight) - len(moved.get(f"{n}.weight", ())) for n, m in layers.items()}
    return {n: k for n, k in still.items() if k}


@pytest.mark.parametrize("family", ZOO)
def test_family(family: str) -> None:
    torch.manual_seed(0)
    build, side, groups = ZOO[family]
    net, example = build(), torch.rand(2, 3, side, side)
    sym = symmetry.find(net, example)
    assert len(sym.groups) == groups
    assert sym.verify(net, example) < 1e-9
    still = uncovered(net, sym)
    if family in ("googlenet", "inception"):  # of which only training mode uses a part
        still = {n: k for n, k in still.items() if "aux" not in n.lower()}
    if family == "shufflenet":  # a few channels whose way through the shuffles no other takes
        for layer in [n for n in still if n != "fc"]:
            assert still.pop(layer) <= 3
            assert "no other unit acts at the same places" in sym.explain(f"{layer}.weight")
    (head,) = still
    reason = f"{head}.weight, axis 0: {still[head]} stay: reaches the output"
    assert reason in sym.explain(f"{head}.weight")
