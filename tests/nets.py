"""Small networks for the tests of symmetry: each function gives a network and its inputs.

`Keeps`, in the end, is for all tests of networks that keep what they computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Case = tuple[nn.Module, tuple[Tensor, ...]]


class Toy(nn.Module):
    """Eight hidden units and what a subclass does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def hidden(self, h: Tensor, x: Tensor) -> Tensor:
        return F.relu(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x), x))


def toy(hidden: Callable[[Tensor, Tensor], Tensor], name: str = "Toy") -> Case:
    kind = type(name, (Toy,), {"hidden": lambda self, h, x: hidden(h, x)})
    return kind(), (torch.rand(2, 4),)


# Plain, convolutional, recurrent


def mlp() -> Case:
    layers = [nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(7, 3)), (torch.rand(2, 3, 2, 2),)


def convnet() -> Case:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10), nn.ReLU()),
        nn.Linear(10, 4),
    )
    return net, (torch.rand(2, 3, 10, 10),)


class ZeroPadding(nn.Module):
    """A shortcut that gets its new channels from zero padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.last(F.relu(self.b(x) + short).mean((2, 3)))


def zero_padding() -> Case:
    return ZeroPadding(), (torch.rand(2, 3, 8, 8),)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.last((x * gate[:, :, None, None] * self.scale).amax((2, 3)))


def squeeze_excite() -> Case:
    return SqueezeExcite(), (torch.rand(2, 3, 8, 8),)


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(10), nn.Linear(10 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.last(self.norm(x).flatten(1))


def concatenation() -> Case:
    return Concatenation(), (torch.rand(2, 3, 4, 4),)


class Recurrent(nn.Module):
    """A recurrent network by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.back, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(x[:, t]) + self.back(h))
        return self.last(h)


def recurrent() -> Case:
    return Recurrent(), (torch.rand(2, 5, 4),)


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + F.relu(self.again(x))
        return self.last(x)


def two_names() -> Case:
    """A module that stands in two places, under two names."""
    block = nn.Linear(8, 8)
    layers = [nn.Linear(4, 8), nn.ReLU(), block, nn.ReLU(), block, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3)), (torch.rand(2, 4),)


def shared_block() -> Case:
    return SharedBlock(), (torch.rand(2, 5),)


class Mixer(nn.Module):
    """MLP-Mixer: tokens are mixed by one layer, channels by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 3)
        self.norm_t, self.norm_c = nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16))
        self.channels = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norm_t(x).mT).mT
        return self.last((x + self.channels(self.norm_c(x))).mean(1))


def mixer() -> Case:
    return Mixer(), (torch.rand(2, 3, 16, 16),)


def norms() -> Case:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU()),
        *(
            nn.Conv2d(8, 12, 3, groups=4, bias=False),
            nn.InstanceNorm2d(12, affine=True),
            nn.PReLU(12),
        ),
        *(nn.Conv2d(12, 24, 3, groups=12), nn.LayerNorm([24, 4, 4]), nn.ELU()),
        *(nn.Conv2d(24, 6, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(96, 10)),
        *(nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)),
    )
    return net, (torch.rand(2, 3, 8, 8),)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(2, o), nn.ReLU(True))

        self.a, self.b, self.c = block(3, 8), block(8, 12), block(12, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.wide = nn.Upsample(scale_factor=2, mode="bilinear")
        self.d, self.e, self.last = block(24, 12), block(20, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.avg_pool2d(b, 2))
        d = self.d(torch.cat([self.up(c), b], 1))
        return self.last(self.e(torch.cat([self.wide(d), a], 1)))


def unet() -> Case:
    return UNet(), (torch.rand(2, 3, 16, 16),)


def volumes() -> Case:
    layers = [nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)), (torch.rand(2, 2, 6, 6, 6),)


def sequences() -> Case:
    net = nn.Sequential(
        *(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 2)),
        *(nn.GLU(1), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)),
    )
    return net, (torch.rand(2, 3, 9),)


def weight_norm() -> Case:
    a, b = (parametrizations.weight_norm(nn.Linear(i, o)) for i, o in ((6, 8), (8, 7)))
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(7, 2)), (torch.rand(2, 6),)


def spectral_norm() -> Case:
    a, b = (parametrizations.spectral_norm(nn.Linear(i, o)) for i, o in ((6, 8), (8, 7)))
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(7, 2)), (torch.rand(2, 6),)


def no_batch() -> Case:
    return toy(lambda h, x: F.relu(h))[0], (torch.rand(4),)


# Attention


class Attention(nn.Module):
    """Three heads of four units, split off in several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.first, self.last = form, nn.Linear(5, 12), nn.Linear(12, 3)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def heads(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.form == "units first":
            q, k, v = self.qkv(x).view(n, t, 3, 4, 3).permute(4, 0, 2, 1, 3).unbind(0)
        elif self.form == "einsum":
            q, k, v = (p.view(n, t, 3, 4) for p in self.qkv(x).chunk(3, -1))
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
            return torch.einsum("bhnm,bmhd->bnhd", scores, v).reshape(n, t, 12)
        elif self.form == "by head":
            parts = self.qkv(x).split(4, -1)
            scores = [(parts[h] @ parts[h + 3].mT).softmax(-1) for h in range(3)]
            return torch.cat([scores[h] @ parts[h + 6] for h in range(3)], -1)
        else:
            q, k, v = self.qkv(x).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        if self.form == "ramp":
            v = v * torch.linspace(1, 2, 4, dtype=v.dtype)
        return (scores @ v).transpose(1, 2).reshape(n, t, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.proj(self.heads(x)))


def attention() -> Case:
    return Attention("plain"), (torch.rand(2, 7, 5),)


def attention_units_first() -> Case:
    return Attention("units first"), (torch.rand(2, 7, 5),)


def attention_einsum() -> Case:
    return Attention("einsum"), (torch.rand(2, 7, 5),)


def attention_by_head() -> Case:
    return Attention("by head"), (torch.rand(2, 7, 5),)


class AttentionTensors(nn.Module):
    """Weights of three axes: units, heads, units within a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(12, 3, 4) / 3) for _ in range(3))
        self.out = nn.Parameter(torch.randn(3, 4, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return self.last(x + torch.einsum("bhnm,bmhd,hdc->bnc", scores, v, self.out))


def attention_tensors() -> Case:
    return AttentionTensors(), (torch.rand(2, 7, 5),)


class SharedKeys(nn.Module):
    """Four heads of queries, two of keys and values; causal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.q, self.kv, self.proj = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 4).transpose(1, 2)
        kv = self.kv(x).view(n, t, 2, 2, 4).permute(2, 0, 3, 1, 4).repeat_interleave(2, 2)
        out = F.scaled_dot_product_attention(q, kv[0], kv[1], is_causal=True)
        return self.last(x + self.proj(out.transpose(1, 2).reshape(n, t, 16)))


def shared_keys() -> Case:
    return SharedKeys(), (torch.rand(2, 6, 5),)


class NormOfKeys(nn.Module):
    """Queries and keys are normalised with the same scales in both heads; or are rotated."""

    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.first, self.qkv, self.last = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 3)
        self.norm_q, self.norm_k = nn.LayerNorm(8), nn.RMSNorm(8)

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * 0.1 ** torch.arange(4)
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * angle.cos().repeat(1, 2) + turned * angle.sin().repeat(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k = (self.turn(q), self.turn(k)) if self.rotary else (self.norm_q(q), self.norm_k(k))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.last(out.transpose(1, 2).reshape(n, t, 16))


def norm_of_keys() -> Case:
    return NormOfKeys(False), (torch.rand(2, 6, 5),)


def rotary() -> Case:
    return NormOfKeys(True), (torch.rand(2, 6, 5),)


def encoder(prenorm: bool = False) -> Case:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=prenorm)
    net: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return net, (torch.rand(2, 5, 16),)


def encoder_prenorm() -> Case:
    parts = nn.Linear(7, 16), encoder(True)[0], nn.Linear(16, 3)
    return nn.Sequential(*parts), (torch.rand(2, 5, 7),)


class Decoder(nn.Module):
    def __init__(self, prenorm: bool) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=prenorm)
        self.layers, self.first, self.last = nn.TransformerDecoder(layer, 1), *self.ends()

    def ends(self) -> tuple[nn.Module, nn.Module]:
        return nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        out = self.layers(self.first(x), self.first(y), tgt_mask=mask, tgt_is_causal=True)
        return self.last(out)


def decoder(prenorm: bool = False) -> Case:
    return Decoder(prenorm), (torch.rand(2, 4, 6), torch.rand(2, 7, 6))


def decoder_prenorm() -> Case:
    return decoder(True)


class LanguageModel(nn.Module):
    """The embedding of words serves again as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 16), nn.Embedding(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.layer(self.embed(x) + self.place(places))))


def language_model() -> Case:
    return LanguageModel(), (torch.randint(11, (2, 6)),)


class ClassToken(nn.Module):
    """A small vision transformer: a token in front of the patches, a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 3)
        self.token = nn.Parameter(torch.rand(1, 1, 16))
        self.table = nn.Parameter(torch.rand(1, 5, 16))
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.table
        return self.last(self.layer(x)[:, 0])


def class_token() -> Case:
    return ClassToken(), (torch.rand(2, 3, 8, 8),)


class Experts(nn.Module):
    """A soft mixture of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.rand(3, 6, 8)), nn.Parameter(torch.rand(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        hidden = F.relu(torch.einsum("bc,ech->beh", x, self.up))
        out = torch.einsum("beh,ehc->bec", hidden, self.down)
        return self.last((out * self.gate(x).softmax(-1)[..., None]).sum(1))


def experts() -> Case:
    return Experts(), (torch.rand(2, 4),)


class Dictionary(Toy):
    """Several outputs, one of them a sum over units."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        h = F.relu(self.first(x))
        return {"y": self.last(h), "size": h.norm(dim=1)}


def dictionary() -> Case:
    return Dictionary(), (torch.rand(2, 4),)


# Traps: units that look alike and are not


def half_relu() -> Case:
    return toy(lambda h, x: torch.cat([h[:, :4], F.relu(h[:, 4:])], 1))


class HalfReversed(nn.Module):
    """Positions run backwards in one half of the channels, which only the last layer can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(2, 4, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.cat([x[:, :2], x[:, 2:].flip(-1)], 1)
        return self.last(F.relu(x).flatten(1))


def half_reversed() -> Case:
    return HalfReversed(), (torch.rand(2, 2, 3),)


class HalfShifted(nn.Module):
    """Half of the channels are shifted by a row, written in place into a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        y = torch.zeros_like(x)
        y[:, :4, 1:] = x[:, :4, :-1]
        y[:, 4:] = x[:, 4:]
        return self.last(F.relu(self.again(y) + x).mean((2, 3)))


def half_shifted() -> Case:
    return HalfShifted(), (torch.rand(2, 3, 5, 5),)


def flipped() -> Case:
    return toy(lambda h, x: F.relu(h + h.flip(-1)))


def ramp() -> Case:
    return toy(lambda h, x: h * torch.linspace(1, 2, 8, dtype=h.dtype), "Ramp")


def cumulative() -> Case:
    return toy(lambda h, x: h.cumsum(-1))


def sorted_units() -> Case:
    return toy(lambda h, x: h.sort(-1).values)


def data_index() -> Case:
    return toy(lambda h, x: F.relu(h).scatter(1, x.argmax(-1, keepdim=True), 0.0))


class WrittenThroughView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 8)
        view = y.view(-1, 4, 2)
        y.add_(self.first(x))
        return self.last(F.relu(view).flatten(1))


def written_through_view() -> Case:
    return WrittenThroughView(), (torch.rand(2, 3),)


class Fused(nn.Module):
    """A recurrent layer of PyTorch's own between others."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(4, 6), kind(6, 8, batch_first=True)
        self.middle, self.last = nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(F.relu(self.first(x)))
        return self.last(F.relu(self.middle(out[:, -1])))


def lstm() -> Case:
    return Fused(nn.LSTM), (torch.rand(2, 5, 4),)


def gru() -> Case:
    return Fused(nn.GRU), (torch.rand(2, 5, 4),)


class WithoutGradient(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = F.relu(self.first(x))
        return self.last(h)


def without_gradient() -> Case:
    return WithoutGradient(), (torch.rand(2, 4),)


# Not in the table of found groups


class WithAuxiliary(nn.Module):
    """A side head that exists in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.side = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = F.relu(self.first(x))
        return (self.last(h), self.side(h)) if self.training else self.last(h)


class Gated(nn.Module):
    """Two layers whose outputs meet in an operator of one's own."""

    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.last = gate, nn.Linear(8, 3)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x), self.second(x)))


class Graph(nn.Module):
    """A function of an input and of what is given by name: parameters, layers."""

    def __init__(self, run: Callable[..., object], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Keeps(nn.Module):
    """Remembers, in evaluation mode, what it computed from its parameters, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias, self.last = (
            nn.Linear(144, 6),
            nn.Parameter(torch.ones(6)),
            nn.Linear(6, 3),
        )
        self.kept: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bias)

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.exp()
        if not self.training:
            bias = self.kept.setdefault("bias", bias)
        z: Tensor = self.last((self.first(x.flatten(1)) + bias).relu())
        return z
