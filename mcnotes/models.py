"""The networks of the paper: plain modules that know nothing about curves or permutations.

Every network maps images [N, C, H, W] in [0, 1] to logits [N, num_classes] and normalises its input
itself, by a fixed `(x - 0.5) / 0.25`. The convolutional ones take both 28 x 28 and 32 x 32 images.
No operation is in place and no control flow depends on values, so `torch.export` can trace them.
Weights are drawn from torch's global generator, with the distributions of the authors' code
(IBM/NeuronAlignment), from which the shortcuts of ResNet and the size of GoogLeNet are also taken.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcnotes.checks import Rule, number, one_of, optional, require, whole
from mcnotes.names import suggest


def normalise(images: Tensor) -> Tensor:
    """Shift and scale images of any shape from [0, 1] to [-2, 2]."""
    return (images - 0.5) / 0.25


class MLP(nn.Module):
    """Fully connected, with C * H * W = `in_features` and one ReLU layer per entry of `hidden`."""

    def __init__(
        self, num_classes: int = 10, in_features: int = 784, hidden: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden]
        self.hidden = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(x).flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits


class ConvBlock(nn.Module):
    """Convolution without bias, BatchNorm, and ReLU unless `relu=False`."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        padding: int | None = None,
        relu: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(before, after, kernel, stride, pad, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=eps)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class Network(nn.Module):
    """A network that initialises the weights of its layers of the classes `drawn` with `draw`."""

    draw: Callable[[Tensor], Tensor] = staticmethod(nn.init.xavier_normal_)
    drawn: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)

    def reset_parameters(self) -> None:
        """Redraw these weights. Call it after the layers' own `reset_parameters`."""
        for layer in self.modules():
            if isinstance(layer, self.drawn):
                self.draw(layer.weight)  # type: ignore[arg-type]  # `drawn` may hold any class


class TinyTen(Network):
    """Eight conv-BN-ReLU blocks w, w, 2w/2, 2w, 2w, 4w/2, 4w, 4w, for images from 9 x 9.

    It has 86,458 parameters (the paper's 0.09 M) for width 16, 10 classes and 3 channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        w = width
        self.blocks = nn.Sequential(
            ConvBlock(in_channels, w),
            ConvBlock(w, w),
            ConvBlock(w, 2 * w, stride=2),
            ConvBlock(2 * w, 2 * w),
            ConvBlock(2 * w, 2 * w),
            ConvBlock(2 * w, 4 * w, stride=2),
            ConvBlock(4 * w, 4 * w, padding=0),
            ConvBlock(4 * w, 4 * w, kernel=1),
        )
        self.head = nn.Linear(4 * w, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(normalise(x)).mean(dim=(2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, added before the last ReLU (He et al. 2016).

    Where the width grows, the shortcut is a 1 x 1 convolution with BatchNorm. With "pad", it takes
    every second pixel and appends channels of zeros.
    """

    def __init__(self, before: int, after: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.first = ConvBlock(before, after, stride=stride)
        self.second = ConvBlock(after, after, relu=False)
        self.new = after - before
        if self.new and shortcut == "conv":
            self.shortcut = ConvBlock(before, after, kernel=1, stride=stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(x)
        elif self.new:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(y + x)


class ResNet(Network):
    """ResNet for small images: three stages of (depth - 2) / 6 blocks of width w, 2w, 4w.

    ResNet32 has 466,906 parameters for 10 classes and 3 channels (the paper's 0.47 M) with
    `shortcut="conv"`, the 1 x 1 convolution and BatchNorm of the authors' code, and 464,154 with
    `shortcut="pad"`, the original. Raises ValueError for other shortcuts and depths not 6n + 2.
    """

    draw = staticmethod(partial(nn.init.kaiming_normal_, mode="fan_out"))
    drawn = (nn.Conv2d,)

    def __init__(
        self,
        depth: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        *,
        shortcut: str = "conv",
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"ResNet: got depth={depth}, expected 6n + 2, such as 20, 32 or 56")
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"ResNet: got shortcut={shortcut!r}, expected 'conv' or 'pad'")
        self.stem = ConvBlock(in_channels, width)
        self.stages = nn.Sequential()
        before = width
        for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            first = ResidualBlock(before, after, stride, shortcut)
            rest = [ResidualBlock(after, after, 1, shortcut) for _ in range(depth // 6 - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            before = after
        self.head = nn.Linear(4 * width, num_classes)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(self.stem(normalise(x))).mean(dim=(2, 3)))
        return logits


class Inception(nn.Module):
    """Four branches: 1 x 1; 1 x 1, 3 x 3; 1 x 1, 3 x 3; max-pooling, 1 x 1 (`sizes` in this order).

    The third branch has 3 x 3 kernels, as in torchvision; in Szegedy et al. (2015) they are 5 x 5.
    """

    def __init__(self, before: int, sizes: Sequence[int]) -> None:
        super().__init__()
        one, reduce2, two, reduce3, three, pool = sizes
        block = partial(ConvBlock, eps=1e-3)
        self.branch1 = block(before, one, 1)
        self.branch2 = nn.Sequential(block(before, reduce2, 1), block(reduce2, two))
        self.branch3 = nn.Sequential(block(before, reduce3, 1), block(reduce3, three))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), block(before, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


INCEPTIONS = {  # Szegedy et al. (2015), table 1
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(Network):
    """Inception v1 with BatchNorm, for small images as in the authors' code.

    The 7 x 7 stem has stride 1, and only the pooling layers before 3a and 4a remain. `auxiliary`
    adds two heads, after 4a and 4d; the output in training mode is then the tuple (logits, early,
    late). For 100 classes and 3 channels there are 5,702,404 parameters, and 10,237,388 with the
    auxiliary heads (the paper's 10.24 M). `width` scales the number of channels. Dropout draws from
    torch's global generator.
    """

    draw = staticmethod(partial(nn.init.trunc_normal_, std=0.01, a=-0.02, b=0.02))

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        *,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()

        def scaled(*sizes: int) -> list[int]:
            return [max(1, round(size * width)) for size in sizes]

        a, before = scaled(64, 192)
        block = partial(ConvBlock, eps=1e-3)
        self.stem = nn.Sequential(block(in_channels, a, 7), block(a, a, 1), block(a, before))
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inceptions, self.auxiliary = nn.ModuleDict(), nn.ModuleDict()
        for name, table in INCEPTIONS.items():
            one, _, two, _, three, pool = sizes = scaled(*table)
            self.inceptions[name] = Inception(before, sizes)
            before = one + two + three + pool
            if auxiliary and name in ("4a", "4d"):
                c, hidden = scaled(128, 1024)
                first = [nn.AdaptiveAvgPool2d(4), block(before, c, 1), nn.Flatten()]
                last = [nn.ReLU(), nn.Dropout(0.7), nn.Linear(hidden, num_classes)]
                self.auxiliary[name] = nn.Sequential(*first, nn.Linear(16 * c, hidden), *last)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(before, num_classes)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.stem(normalise(x))
        extra = []
        for name, inception in self.inceptions.items():
            x = inception(self.pool(x) if name in ("3a", "4a") else x)
            if self.training and name in self.auxiliary:
                extra.append(self.auxiliary[name](x))
        logits: Tensor = self.head(self.dropout(x.mean(dim=(2, 3))))
        return (logits, *extra) if extra else logits


class Attention(nn.Module):
    """Self-attention of several heads (Vaswani et al. 2017), without biases; causal or not."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, T, width]
            for project in (self.query, self.key, self.value)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        read: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return read


HEADS = 4  # of a transformer, unless it is told
NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class TransformerBlock(nn.Module):
    """Attention, then one hidden layer of ReLU for each token; both read the stream normalised.

    What they find they add to the stream (Xiong et al. 2020). norm: a name in `NORMS`.
    """

    def __init__(self, width: int, heads: int, *, norm: str, causal: bool) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = NORMS[norm](width), NORMS[norm](width)
        self.attention = Attention(width, heads, causal=causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        out: Tensor = x + self.down(F.relu(self.up(self.before_mlp(x))))
        return out


class Transformer(Network):
    """Blocks on a stream [N, T, width] of tokens with learned positions, and a norm at the end.

    Positions are drawn with standard deviation 0.02, biases are 0.
    """

    drawn = (nn.Conv2d, nn.Linear, nn.Embedding)

    def __init__(
        self, tokens: int, width: int, heads: int, depth: int, *, norm: str, causal: bool
    ) -> None:
        super().__init__()
        sizes = {"width": width, "heads": heads, "depth": depth, "norm": norm}
        require("transformer", sizes, TRANSFORMERS)
        if width % heads:
            raise ValueError(f"transformer: width {width} cannot be shared by {heads} heads")
        self.positions = nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, norm=norm, causal=causal) for _ in range(depth))
        )
        self.norm = NORMS[norm](width)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.positions, std=0.02)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def stream(self, x: Tensor) -> Tensor:
        """Tokens [N, T, width] as the head reads them; there are at most `len(positions)`."""
        read: Tensor = self.norm(self.blocks(x + self.positions[: x.shape[1]]))
        return read


class ViT(Transformer):
    """Patches as tokens (Dosovitskiy et al. 2021); the head reads their mean."""

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 32,
        *,
        image_size: int = 28,
        patch: int = 7,
        heads: int = HEADS,
        depth: int = 2,
        norm: str = "rms",
    ) -> None:
        require("ViT", {"image_size": image_size, "patch": patch}, PATCHES)
        if not (tokens := (image_size // patch) ** 2):
            raise ValueError(f"ViT: images of {image_size} pixels have no patch of {patch}")
        super().__init__(tokens, width, heads, depth, norm=norm, causal=False)
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.head = nn.Linear(width, num_classes)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(normalise(x)).flatten(2).mT
        logits: Tensor = self.head(self.stream(tokens).mean(1))
        return logits


class Decoder(Transformer):
    """A language model: tokens int64 [N, T] below `vocabulary` → logits [N, T, vocabulary] of the
    next one, T at most `context`."""

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 48,
        *,
        heads: int = HEADS,
        depth: int = 2,
        norm: str = "rms",
    ) -> None:
        super().__init__(context, width, heads, depth, norm=norm, causal=True)
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stream(self.embedding(tokens)))
        return logits


RESNETS = {f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 56)}
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "tinyten": TinyTen,
    **RESNETS,
    "googlenet": GoogLeNet,
    "vit": ViT,
    "vit-layernorm": partial(ViT, norm="layer"),
}


SIZED = ("mlp", "vit", "vit-layernorm")
"""Networks for images of one size."""
WIDEST = 2**16  # a matrix of so many rows and columns alone takes 16 GiB
SIZES: dict[str, Rule] = {
    "num_classes": whole(1),
    "in_channels": whole(1),
    "width": optional(number(0, WIDEST, above=True)),
    "image_size": optional(whole(1)),
}
"""The allowed sizes of a network."""
TRANSFORMERS: dict[str, Rule] = {
    "width": whole(1, WIDEST),
    "heads": whole(1),
    "depth": whole(1),
    "norm": one_of(NORMS),
}
"""The allowed sizes of a transformer."""
PATCHES: dict[str, Rule] = {"image_size": whole(1), "patch": whole(1)}
"""Those of its patches."""


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    width: float | None = None,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build the network called `name` in `BUILDERS`; `options` go to its constructor.

    `width` is the number of channels in the first stage (TinyTen, ResNet), a factor (GoogLeNet), or
    the number of units in each of two hidden layers (MLP); with None, the network's default is
    used. Only the MLP and ViT need `image_size`. Raises ValueError for an unknown name, and if it
    is missing there.
    """
    if not isinstance(name, str) or name not in BUILDERS:
        raise ValueError(f"build: got {name!r}, expected a network{suggest(name, BUILDERS)}")
    given = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    require("build", given | {"image_size": image_size}, SIZES)
    if name in SIZED:
        if image_size is None:
            raise ValueError(
                f"build: {name!r} needs the size of its images. Fix: pass image_size, such as 28"
            )
        if name == "mlp":
            if width is not None:
                options["hidden"] = (int(width), int(width))
            return MLP(num_classes, in_channels * image_size**2, **options)
        options["image_size"] = image_size
    if width is not None:
        options["width"] = width if name == "googlenet" else int(width)
    return BUILDERS[name](num_classes=num_classes, in_channels=in_channels, **options)
