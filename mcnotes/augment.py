"""Random image augmentation of whole batches on their device, reproducible from a generator.

Every sample draws its own parameters; there is no loop over samples and no transfer to the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augment:
    """Per-sample random flip, crop, rotation, scale and colour of a batch of images.

    padding    pixels of zeros round the image before a window of the old size is cut out of it
    flip       mirror left to right, with probability 1/2
    rotation   degrees; the angle is uniform in [-rotation, rotation], about the centre
    scale      (low, high); the factor is uniform between them
    contrast   c; blend with the image's mean grey, factor uniform in [1 - c, 1 + c]
    saturation s; blend with each pixel's grey, factor uniform in [1 - s, 1 + s]; RGB only

    Flip and crop move pixels exactly. With rotation or scale, all four are one bilinear resampling
    with zeros outside.
    """

    padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    contrast: float = 0.0
    saturation: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augmented copy of float images [N, C, H, W] in [0, 1], same shape and range."""
        if self.rotation or self.scale != (1.0, 1.0):
            images = self._resample(images, generator)
        elif self.flip or self.padding:
            images = self._shift(images, generator)
        return images

    def _uniform(
        self, images: Tensor, generator: torch.Generator | None, low: float, high: float
    ) -> Tensor:
        """Uniform numbers [N] in [low, high) on the images' device."""
        device = images.device if generator is None else generator.device
        u = torch.rand(len(images), generator=generator, device=device)
        return u.to(images.device, non_blocking=True) * (high - low) + low

    def _offsets(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Whole-pixel shifts [N], each of -padding..padding with the same probability."""
        width = 2 * self.padding + 1
        return self._uniform(images, generator, 0, width).floor() - self.padding

    def _shift(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        n, channels, height, width = images.shape
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(n, width)
        if self.flip:
            mirrored = self._uniform(images, generator, 0, 1) < 0.5
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        p = self.padding
        padded = F.pad(images, (p, p, p, p))
        dy, dx = (self._offsets(images, generator).long() + p for _ in range(2))
        y = (rows + dy[:, None])[:, None, :, None]
        x = (columns + dx[:, None])[:, None, None, :]
        sample = torch.arange(n, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        return padded[sample, channel, y, x]

    def _resample(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = images.shape[-2:]
        angle = self._uniform(images, generator, -self.rotation, self.rotation) * (math.pi / 180)
        factor = self._uniform(images, generator, *self.scale)
        mirror = torch.ones_like(angle)
        if self.flip:
            mirror = torch.where(self._uniform(images, generator, 0, 1) < 0.5, -1.0, 1.0)
        dy, dx = (self._offsets(images, generator) * 2 / size for size in (height, width))
        cos, sin = angle.cos() / factor, angle.sin() / factor
        rows = (
            torch.stack((cos * mirror, -sin, dx), 1),
            torch.stack((sin * mirror, cos, dy), 1),
        )
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
