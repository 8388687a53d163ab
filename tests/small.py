"""Data and networks so small that a test trains in a second, and what else tests share."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcnotes import models, symmetry, train
from mcnotes.cache import Checkpoint
from mcnotes.curves import Theta
from mcnotes.data import Split, Task
from mcnotes.data.augment import Augment
from mcnotes.matching import Moments
from mcnotes.symmetry import Perm, Symmetry

SHORT = train.Recipe(6, batch_size=16, lr=0.1, schedule="linear")


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


class Checkpointed(nn.Module):
    """Another network, which is run again for its gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return z


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


def terms(net: nn.Module) -> int:
    """How many numbers one output of `net` adds, all layers together."""
    return sum(p[0].numel() for p in net.parameters() if p.dim() > 1)


def agree(
    found: Any,
    expected: Any,
    terms: int,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Assert that two computations give the same numbers, up to `rounding`.

    scale: as in `rounding`; the largest of the expected numbers, if nothing cancels.
    """
    one, two = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    margin = rounding(terms, float(two.abs().max()) if scale is None else scale, dtype)
    torch.testing.assert_close(one, two, rtol=0, atol=margin)


def noisy(theta: Theta, seed: int, level: float = 1e-3) -> Theta:
    """A network of slightly other weights; biases and buffers stay."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: x + level * x.std() * torch.randn(x.shape, generator=g) if x.dim() > 1 else x
        for n, x in theta.items()
    }


def pictures(n: int, channels: int = 1, size: int = 28) -> Split:
    """Noise without labels."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)
    return Split(images, torch.zeros(n, dtype=torch.long))


class Patches(nn.Module):
    """A vision transformer: 16 patches, heads of 6 units."""

    def __init__(self, width: int = 24, heads: int = 4, norm_first: bool = True) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=norm_first)
        self.patch = nn.Conv2d(1, width, 7, 7)
        self.place = nn.Parameter(torch.randn(16, width))
        blocks = [layer(width, heads, 2 * width, dropout=0.0) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.place)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(x).mean(1))


class Rows(nn.Module):
    """Linear layers on [N, H, W, C], as in Swin: PyTorch has several ways to run them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(1, 16, 4, 4), nn.LayerNorm(16)
        self.wide, self.narrow, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


class Placed(nn.Module):
    """What is added to each pixel comes from its place; of its two coordinates nothing is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Conv2d(1, 8, 3), nn.Linear(2, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 10)
        side = torch.linspace(-1, 1, 26)
        self.register_buffer("places", torch.cartesian_prod(side, side))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.down(nn.functional.relu(self.up(self.places)))
        x = nn.functional.leaky_relu(self.first(x) + bias.T.view(8, 26, 26))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def separable(groups: int) -> nn.Module:
    """A convolution of so many groups (24: depthwise) between others; no unit is ever silent."""
    layers = [nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.LeakyReLU()]
    layers += [nn.Conv2d(24, 24, 3, groups=groups), nn.BatchNorm2d(24), nn.LeakyReLU()]
    layers += [nn.Conv2d(24, 16, 1), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.build("mlp", num_classes=10, in_channels=1, image_size=28, width=32),
    "tinyten": lambda: models.build("tinyten", num_classes=10, in_channels=1, width=8),
    "resnet20": lambda: models.build("resnet20", num_classes=10, in_channels=1, width=8),
    "googlenet": lambda: models.build("googlenet", num_classes=10, in_channels=1, width=0.125),
    "depthwise": lambda: separable(24),
    "grouped": lambda: separable(4),
    "attention": Patches,
    "attention, post-norm": lambda: Patches(norm_first=False),
    "tokens in rows": Rows,
    "units of places": Placed,
}


def same(p: Perm, q: Perm) -> bool:
    """Do they agree in every group of q?"""
    return all(torch.equal(p[n], q[n]) for n in q)


def trained() -> tuple[nn.Module, Task, list[Theta], Symmetry]:
    """Three trained networks without BatchNorm, their data and their symmetry."""
    net, data = plain(), task()
    ends = [train.fit(net, data, SHORT, seed=seed).theta for seed in (1, 2, 3)]
    return net, data, ends, symmetry.find(net, data.example)


def lost(moments: Moments) -> float:
    """How many times larger a unit's mean square is than its variance, which is what is left."""
    shares = moments.squares / moments.samples / moments.variances()
    return float(shares[shares.isfinite()].max())


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


def picture_folder(
    root: Path, counts: dict[str, int], *, size: tuple[int, int] = (12, 12), mode: str = "L"
) -> None:
    """PNGs of noise, folder by folder: `counts` of each of three classes."""
    generator = np.random.default_rng(len(str(counts)))
    for split, count in counts.items():
        for label, name in enumerate(("bottom", "middle", "top")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
                pixels[4 * label : 4 * label + 4] += 100
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{i}.png")


USERS_NET = """\
import numpy as np, torch
from torch import nn
from mcnotes.data import Split, Task
class Net(nn.Module):
    def __init__(self, classes, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.LazyLinear(classes) if width is None else nn.Linear(100 * width, classes)
    def forward(self, x):
        return self.head(self.body(x))
LIMIT = 3
def half():
    return Net(3).half()
def words():
    return 'no network'
def images(n, seed):
    g = np.random.default_rng(seed)
    return g.integers(0, 256, (n, 12, 12), dtype=np.uint8), np.arange(n) % 3
def arrays():
    return [images(n, n) for n in (30, 12, 15)]
def task():
    parts = [Split(torch.tensor(x)[:, None], torch.tensor(y)) for x, y in arrays()]
    return Task('mine', *parts, ('a', 'b', 'c'))
def loaders(shift=0.0):
    for x, y in arrays():
        x = torch.tensor(x)[:, None] / 255 - shift
        data = torch.utils.data.TensorDataset(x, torch.tensor(y))
        yield torch.utils.data.DataLoader(data, 7, shuffle=True)
def normalised():
    return loaders(0.5)
"""
"""A module of a user's own: a network, and images in every form that is taken."""
