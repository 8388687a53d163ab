"""A data set and networks so small that a test trains in a second; how exact numbers can be."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mcnotes.cache import Checkpoint
from mcnotes.data import Split, Task
from mcnotes.data.augment import Augment


def task(n: int = 96, seed: int = 0, augment: Augment | None = None) -> Task:
    """Three classes of 12 x 12 pictures: a bright stripe at the top, in the middle or below."""

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 120, (count, 1, 12, 12), generator=g, dtype=torch.uint8)
        for i, label in enumerate(labels.tolist()):
            images[i, :, 4 * label : 4 * label + 4] += 100
        return Split(images, labels)

    g = torch.Generator().manual_seed(seed)
    return Task("stripes", split(n), split(48), split(60), ("top", "middle", "below"), augment)


def plain() -> nn.Module:
    """No BatchNorm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3))


def normed(dropout: float = 0.0) -> nn.Module:
    """Convolution, BatchNorm, dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


class Fixed(nn.Module):
    """Two layers of features that are not trained: units that stand in buffers, the first alone."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(8, 144, generator=g))
        self.register_buffer("second", torch.randn(5, 8, generator=g))
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = (x.flatten(1) @ self.first.T).relu() @ self.second.T
        z: Tensor = self.last(h.relu())
        return z


def rounding(terms: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """How far apart rounding alone may bring two computations of one sum, on any processor.

    terms: how many numbers are added; for the output of a network, those of all layers together.
    scale: the sum of their magnitudes, so that sums that cancel are given more. dtype: what is
    computed in. Each sum of n terms, in whatever order, is off by no more than λ √n u Σ|xᵢ|, where
    u = eps / 2 and λ = 4 leaves out next to nothing (Higham and Mary, A new approach to
    probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019).
    """
    return 4 * math.sqrt(terms) * torch.finfo(dtype).eps * scale


class Stopped(Checkpoint):
    """A checkpoint after whose `last` save the run is interrupted."""

    def __init__(self, path: Path, last: int) -> None:
        super().__init__(path)
        self.left = last

    def save(self, state: Mapping[str, Tensor]) -> None:
        super().save(state)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
