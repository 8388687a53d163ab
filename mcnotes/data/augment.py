"""Random image augmentation of whole batches on their device, reproducible from a generator.

Every sample draws its own parameters; there is no loop over samples and no transfer to the host, so
that a CUDA graph can hold the whole of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mcnotes.checks import Rule, flag, got, number, one_of, require, whole


def magnifications(value: Any) -> str:
    """Two positive numbers, the smaller first."""
    positive = number(0, above=True)
    two = isinstance(value, tuple) and len(value) == 2
    fits = two and not any(map(positive, value)) and value[0] <= value[1]
    return "" if fits else got(value, "a tuple of two positive numbers, the smaller first")


OPTIONS: dict[str, Rule] = {
    "padding": whole(0),
    "flip": flag,
    "rotation": number(0, 180),
    "scale": magnifications,
    "contrast": number(0),
    "saturation": number(0),
    "interpolation": one_of(("bilinear", "nearest")),
}
"""What the fields of an augmentation may be."""


@dataclass(frozen=True)
class Augment:
    """Per-sample random flip, crop, rotation, scale and colour of a batch of images, in this order:

    flip        mirror left to right, with probability 1/2
    padding     pixels of zeros on each side; a window of the old size is cut out at random
    rotation    degrees; the angle is uniform in [-rotation, rotation], about the centre
    scale       (low, high); the magnification is uniform between them
    contrast    c; blend with the image's mean grey, weight uniform in [1 - c, 1 + c]
    saturation  s; blend with each pixel's grey, weight uniform in [1 - s, 1 + s]

    The first four are one resampling with zeros outside, "bilinear" or "nearest" as
    `interpolation` says; flip and crop alone move pixels exactly. Colour is clipped to [0, 1].
    Raises ValueError for a value that its rule in `OPTIONS` refuses.
    """

    padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    contrast: float = 0.0
    saturation: float = 0.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        require("Augment", vars(self), OPTIONS)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augmented float images [N, C, H, W] in [0, 1] from such; nothing is changed in place.

        Each call draws 7 N numbers from `generator` (torch's global one if None), used or not.
        """
        source = generator.device if generator else images.device
        draws = torch.rand(7, len(images), generator=generator, device=source)
        draws = draws.to(images.device, non_blocking=True)
        if self.flip or self.padding or self.rotation or self.scale != (1.0, 1.0):
            images = self._move(images, draws[:5])
        for share, draw, grey in (
            (self.contrast, draws[5], lambda x: _grey(x).mean((1, 2, 3), keepdim=True)),
            (self.saturation, draws[6], _grey),
        ):
            if share:
                weight = 1 + (2 * draw - 1) * share
                images = torch.lerp(grey(images), images, weight[:, None, None, None]).clamp(0, 1)
        return images

    def _move(self, images: Tensor, draws: Tensor) -> Tensor:
        """Fetch output pixel p, counted from the centre, from mirror * (R p / scale) + offset."""
        height, width = images.shape[-2:]
        angle = (draws[0] - 0.5) * math.radians(2 * self.rotation)
        low, high = self.scale
        magnification = draws[1] * (high - low) + low
        cos, sin = angle.cos() / magnification, angle.sin() / magnification
        mirror = 1 - 2 * draws[2].round() if self.flip else 1
        dx, dy = (draws[3:5] * (2 * self.padding + 1)).floor() - self.padding
        y, x = (torch.arange(n, device=images.device) - (n - 1) / 2 for n in (height, width))
        x, y = x.repeat(height), y.repeat_interleave(width)
        affine = torch.stack((mirror * cos, mirror * sin, dx, -sin, cos, dy), 1).view(-1, 2, 3)
        affine[:, 0] *= 2 / width  # grid_sample counts from -1 to 1, edge to edge
        affine[:, 1] *= 2 / height
        grid = affine.view(-1, 3) @ torch.stack((x, y, torch.ones_like(x)))
        grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)
        mode = self.interpolation if self.rotation or self.scale != (1.0, 1.0) else "nearest"
        return F.grid_sample(images, grid, mode, align_corners=False)


def _grey(images: Tensor) -> Tensor:
    """Brightness [N, 1, H, W] of RGB images by ITU-R BT.601; one channel is its own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
