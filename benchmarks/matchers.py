"""Every way to match, on the same pairs of networks.

Compares `mcnotes.align.match` by its methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcnotes import models
from mcnotes.zoo import Experiment


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
        return models.build(self.network, num_classes=classes, in_channels=channels,
                            width=self.width, image_size=size)  # fmt: skip
