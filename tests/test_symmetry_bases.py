"""Scales, signs, rotations, changes of basis: found as by hand, and not where there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from nets import Graph, normal
from torch import Tensor, nn

from mcnotes import models, symmetry
from mcnotes.symmetry import KINDS, Bases

Table = dict[tuple[str, str, int], str]


def table(found: Bases) -> Table:
    """For each factor where it acts, and what is folded, as one would write it by hand."""
    rows = {}
    for name, f in found.factors.items():
        tail = "'" * name.count("'")
        sites = [
            f"{s.place.name}[{s.place.axis}]" + (f"^{s.power}" if s.power != 1 else "")
            for s in f.sites
        ]
        folded = [fold[0].place.name for fold in f.folds]
        line = " ".join(sorted(sites)) + (f" | {' '.join(sorted(folded))}" if folded else "")
        rows[f.space + tail, f.kind, f.size] = line
    return rows


def check(net: nn.Module, x: Any, expected: Table, *others: Any) -> Bases:
    """Exactly these factors are found, and hold for other inputs, too."""
    found = symmetry.find(net, x, kinds=KINDS)
    assert table(found) == expected
    assert found.verify(net, x, others=others) < 1e-9
    return found


def line(words: str, prefix: str = "") -> str:
    """A row of a table; "+" stands before names that begin with `prefix`."""
    return " ".join(sorted(w.replace("+", prefix) for w in words.split()))


# Networks of units


def test_multilayer_perceptron() -> None:
    net = nn.Sequential(
        *(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6)),
        *(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)),
    )
    check(
        net,
        torch.rand(3, 4),
        {
            ("0", "scales", 8): "0.bias[0] 0.weight[0] 2.weight[1]^-1",
            ("2", "signs", 7): "2.bias[0] 2.weight[0] 4.weight[1]",
            ("4", "bases", 6): "4.bias[0] 4.weight[0] 5.weight[1]^-1",
        },
    )


def test_convolutions_and_batchnorm() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(24, 4)),
    )
    check(
        net,
        torch.rand(2, 3, 10, 10),
        {
            ("0", "scales", 8): "1.bias[0] 1.weight[0] 4.weight[1]^-1",
            ("4", "scales", 6): "4.bias[0] 4.weight[0] 7.weight[1]^-1",
        },
    )


def test_residual_network() -> None:
    """The units within each block; on the stream, those of all layers at once."""
    net = models.build("resnet20", num_classes=10, in_channels=1, width=4)
    found = symmetry.find(net, torch.rand(2, 1, 16, 16), kinds=KINDS)
    assert {f.kind for f in found.factors.values()} == {"scales"}
    assert len(found.factors) == len(found.permutations.groups)
    inner = [f for f in found.factors.values() if len(f.sites) == 3]
    assert len(inner) == 9  # weight and bias of a BatchNorm, and the convolution that reads it
    for f in inner:
        assert [s.power for s in f.sites] in ([1, 1, -1], [-1, 1, 1])
    assert found.verify(net, torch.rand(2, 1, 16, 16)) < 1e-9


# Transformers, as their classes come

SIZES = {
    "vocab_size": 20,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
}
ATTENTION = "+.q_proj.weight[1] +.k_proj.weight[1] +.v_proj.weight[1] +.o_proj.weight[0] "
LLAMA = "model.layers.0"


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | options)
    return transformers.LlamaForCausalLM(config)


def llama_table() -> Table:
    """By hand. A head's queries and keys: a scale and a phase for each rotary frequency."""
    stream = line(
        "model.embed_tokens.weight[1] +.self_attn.q_proj.weight[1] +.self_attn.k_proj.weight[1] "
        "+.self_attn.v_proj.weight[1] +.self_attn.o_proj.weight[0] +.mlp.gate_proj.weight[1] "
        "+.mlp.up_proj.weight[1] +.mlp.down_proj.weight[0] lm_head.weight[1]",
        LLAMA,
    )
    gains = line(
        "+.input_layernorm.weight +.post_attention_layernorm.weight model.norm.weight", LLAMA
    )
    up = line("+.mlp.up_proj.weight[0] +.mlp.down_proj.weight[1]", LLAMA)
    rows = {
        (f"{LLAMA}.self_attn.o_proj", "rotations", 24): f"{stream} | {gains}",
        (f"{LLAMA}.mlp.gate_proj", "scales", 20): line(
            "+.mlp.up_proj.weight[0] +.mlp.down_proj.weight[1]^-1", LLAMA
        ),
        (f"{LLAMA}.mlp.gate_proj", "signs", 20): up,
    }
    for h in range(2):
        attention = f"{LLAMA}.self_attn"
        rows |= {
            (f"{attention}.v_proj[{h}]", "bases", 4): line(
                "+.v_proj.weight[0] +.o_proj.weight[1]^-1", attention
            ),
            (f"{attention}.q_proj[{h}]", "scales", 2): line(
                "+.q_proj.weight[0] +.k_proj.weight[0]^-1", attention
            ),
            (f"{attention}.q_proj[{h}]", "phases", 2): line(
                "+.q_proj.weight[0] +.k_proj.weight[0]", attention
            ),
        }
    return rows


def test_llama() -> None:
    net, ids = llama(), torch.randint(20, (2, 5))
    found = check(net, ids, llama_table(), torch.randint(20, (3, 9)))
    total = 24 * 23 // 2 + 20 + 2 * (16 + 2 + 2)
    assert sum(f.dimension for f in found.factors.values()) == total
    layers = found.dimensions().set_index("layer")
    assert layers.loc["model.layers.0", "rotations"] == 276
    assert layers.loc[["model.layers.0", "model.norm"], "folded"].tolist() == [48, 24]
    assert f"{total} dimensions" in repr(found)
    assert "embed_tokens" in found._repr_html_()


def test_tied_embeddings_take_the_rotations() -> None:
    """The last gain stands before a matrix that also writes: the stream keeps its signs alone."""
    net, ids = llama(tie_word_embeddings=True), torch.randint(20, (2, 5))
    found = symmetry.find(net, ids, kinds=KINDS)
    stream = {f.kind for f in found.factors.values() if f.size == 24}
    assert stream == {"scales", "signs"}  # scales: of the gains before q, k, v and the MLP
    assert found.verify(net, ids) < 1e-9


def test_gpt2() -> None:
    """One matrix makes queries, keys and values; embeddings are tied, so the stream stays."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=24,
        n_layer=1,
        n_head=3,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    net, ids = transformers.GPT2LMHeadModel(config), torch.randint(20, (2, 5))
    h = "transformer.h.0"
    rows: Table = {}
    for k, (ln, reader) in enumerate((("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc"))):
        gains = f"+.{ln}.bias[0] +.{ln}.weight[0] +.{reader}.weight[0]"
        rows[f"{h}.ln_1" + "'" * k, "scales", 24] = line(f"{gains}^-1", h)
        rows[f"{h}.ln_1" + "'" * k, "signs", 24] = line(gains, h)
    for head in range(3):
        key = "+.weight[1]^-1 +.bias[0]^-1 +.weight[1] +.bias[0]"
        value = "+.weight[1] +.bias[0] transformer.h.0.attn.c_proj.weight[0]^-1"
        rows[f"{h}.attn.c_attn.bias[{head}]", "bases", 8] = line(key, f"{h}.attn.c_attn")
        rows[f"{h}.attn.c_attn.bias[{head + 3}]", "bases", 8] = line(value, f"{h}.attn.c_attn")
    found = symmetry.find(net, ids, kinds=KINDS)
    assert sorted(table(found).values()) == sorted(rows.values())
    assert found.verify(net, ids, others=[torch.randint(20, (3, 9))]) < 1e-9


def test_bert() -> None:
    """A norm after each sum reads the stream and is what is added to: nothing but heads is free."""
    torch.manual_seed(0)
    net = transformers.BertModel(transformers.BertConfig(**SIZES))
    ids, own = torch.randint(20, (2, 5)), "encoder.layer.0.attention"
    rows: Table = {}
    for h in range(6):
        rows[f"{own}.self.query[{h}]", "bases", 4] = line(
            "+.query.weight[0] +.query.bias[0] +.key.weight[0]^-1 +.key.bias[0]^-1", f"{own}.self"
        )
        rows[f"{own}.self.value[{h}]", "bases", 4] = line(
            "+.self.value.weight[0] +.self.value.bias[0] +.output.dense.weight[1]^-1", own
        )
    check(net, ids, rows, torch.randint(20, (3, 9)))


def test_vit() -> None:
    """LayerNorm centres its input, so that rotations must keep the vector of ones."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
    )
    net, x = transformers.ViTForImageClassification(config), torch.rand(2, 3, 8, 8)
    at = "vit.layers.0"
    stream = line(
        "vit.embeddings.cls_token[2] vit.embeddings.position_embeddings[2] "
        "vit.embeddings.patch_embeddings.projection.weight[0] "
        "vit.embeddings.patch_embeddings.projection.bias[0] "
        "+.attention.q_proj.weight[1] +.attention.k_proj.weight[1] +.attention.v_proj.weight[1] "
        "+.attention.o_proj.weight[0] +.attention.o_proj.bias[0] +.layernorm_before.bias[0] "
        "+.layernorm_after.bias[0] +.mlp.fc1.weight[1] +.mlp.fc2.weight[0] +.mlp.fc2.bias[0] "
        "vit.layernorm.bias[0] classifier.weight[1]",
        at,
    )
    gains = line("+.layernorm_before.weight +.layernorm_after.weight vit.layernorm.weight", at)
    space = "vit.embeddings.patch_embeddings.projection"
    rows: Table = {(space, "rotations about 1", 24): f"{stream} | {gains}"}
    for h in range(3):
        rows[f"{at}.attention.q_proj[{h}]", "bases", 8] = line(
            "+.q_proj.weight[0] +.q_proj.bias[0] +.k_proj.weight[0]^-1 +.k_proj.bias[0]^-1",
            f"{at}.attention",
        )
        rows[f"{at}.attention.v_proj[{h}]", "bases", 8] = line(
            "+.v_proj.weight[0] +.v_proj.bias[0] +.o_proj.weight[1]^-1", f"{at}.attention"
        )
    check(net, x, rows)


FAMILIES = {
    "Gemma": ({"head_dim": 4, "num_key_value_heads": 2}, {"bases", "scales", "signs", "phases"}),
    "Qwen2": ({"num_key_value_heads": 2}, {"bases", "rotations", "scales", "signs", "phases"}),
    "Qwen3": ({"head_dim": 4, "num_key_value_heads": 2}, {"bases", "rotations", "scales", "signs"}),
    "Mistral": (
        {"num_key_value_heads": 3},
        {"bases", "rotations", "scales", "signs", "phases"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_language_models(family: str) -> None:
    torch.manual_seed(0)
    options, kinds = FAMILIES[family]
    more = {"pad_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**SIZES | options | more)
    net, ids = getattr(transformers, f"{family}ForCausalLM")(config), torch.randint(20, (2, 5))
    found = symmetry.find(net, ids, kinds=KINDS)
    assert {f.kind for f in found.factors.values()} == kinds
    assert found.verify(net, ids, others=[torch.randint(20, (3, 9))]) < 1e-9


# Graphs in which a group looks free and is not. Each case: what runs, its parts, what is offered.


class Case:
    """A graph, and the kinds that are offered for the spaces of each size."""

    def __init__(
        self, run: Callable[..., Any], offered: dict[int, set[str]], /, *shape: int, **parts: Any
    ) -> None:
        self.run, self.offered, self.shape, self.parts = run, offered, shape or (3, 4), parts

    def __call__(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return Graph(self.run, **{n: make() for n, make in self.parts.items()}), torch.rand(
            self.shape
        )


def lin(i: int, o: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o, bias=bias)


def par(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: normal(*shape)


def rms(n: int) -> Callable[[], nn.Module]:
    return lambda: nn.RMSNorm(n)


def layernorm(n: int) -> Callable[[], nn.Module]:
    return lambda: nn.LayerNorm(n)


def unit(x: Tensor) -> Tensor:
    """RMSNorm without a gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


AB = {"a": lin(4, 8), "b": lin(8, 3)}
NORMED = AB | {"n": rms(8)}
ROTATED = {8: {"rotations"}}
NOTHING: dict[int, set[str]] = {}
SCALED, FLIPPED, FREE = {8: {"scales"}}, {8: {"signs"}}, {8: {"bases"}}
GAINS = {8: {"scales", "signs"}}
ABOUT_1 = {8: {"rotations about 1"}}
HALVES = {4: {"bases"}}

HOSTILE: dict[str, Case] = {
    "linear": Case(lambda s, x: s.b(s.a(x)), FREE, **AB),
    "a far threshold": Case(lambda s, x: s.b(F.hardtanh(s.a(x), -100, 90)), NOTHING, **AB),
    "a far threshold, odd": Case(lambda s, x: s.b(F.hardtanh(s.a(x), -99, 99)), FLIPPED, **AB),
    "relu6": Case(lambda s, x: s.b(F.relu6(s.a(x))), NOTHING, **AB),
    "relu squared": Case(lambda s, x: s.b(F.relu(s.a(x)) ** 2), SCALED, **AB),
    "clamp below": Case(lambda s, x: s.b(s.a(x).clamp(min=0)), SCALED, **AB),
    "clamp below, not at 0": Case(lambda s, x: s.b(s.a(x).clamp(min=-9)), NOTHING, **AB),
    "relu plus a number": Case(lambda s, x: s.b(F.relu(s.a(x)) + 1), NOTHING, **AB),
    "bias after relu": Case(lambda s, x: s.b(F.relu(s.a(x)) + s.c), SCALED, c=par(8), **AB),
    "an even function": Case(lambda s, x: s.b(s.a(x).cos()), FLIPPED, **AB),
    "odd, then even": Case(lambda s, x: s.b(s.a(x).tanh().abs()), {8: {"signs"}}, **AB),
    "softsign": Case(lambda s, x: s.b(F.softsign(s.a(x))), FLIPPED, **AB),
    "a stream with a relu": Case(lambda s, x: s.b(unit(F.relu(s.a(x)))), NOTHING, **AB),
    "rms norm": Case(lambda s, x: s.b(s.n(s.a(x))), ROTATED, **NORMED),
    "rms norm without a gain": Case(lambda s, x: s.b(unit(s.a(x))), ROTATED, **AB),
    "the gain is read twice": Case(
        lambda s, x: s.b(s.n(s.a(x))) + s.n.weight.exp().sum(), FLIPPED, **NORMED
    ),
    "the gain is shared by a nonlinear reader": Case(
        lambda s, x: s.b(s.n(s.a(x)).sin()), FLIPPED, **NORMED
    ),
    "a bias after the norm": Case(lambda s, x: s.b(s.n(s.a(x)) + s.c), ROTATED, c=par(8), **NORMED),
    "a number after the norm": Case(lambda s, x: s.b(s.n(s.a(x)) + 1), FLIPPED, **NORMED),
    "the norm returns to the stream": Case(
        lambda s, x: s.b(unit(s.a(x) + s.n(s.a(x)))), FLIPPED, **NORMED
    ),
    "mean and square": Case(
        lambda s, x: s.b(unit(s.a(x))) * s.a(x).mean(-1, keepdim=True), ABOUT_1, **AB
    ),
    "another power": Case(
        lambda s, x: s.b(s.a(x) / (s.a(x) ** 4).mean(-1, keepdim=True)), FLIPPED, **AB
    ),
    "the largest entry": Case(
        lambda s, x: s.b(s.a(x) / s.a(x).abs().amax(-1, keepdim=True)), FLIPPED, **AB
    ),
    "a norm over half": Case(
        lambda s, x: s.b(s.a(x) * s.a(x)[:, :4].pow(2).sum(-1, keepdim=True)),
        {4: {"rotations", "bases"}},
        **AB,
    ),
    "halves": Case(lambda s, x: s.b(torch.cat(s.a(x).chunk(2, -1)[::-1], -1)), HALVES, **AB),
    "half a relu": Case(
        lambda s, x: s.b(torch.cat([s.a(x)[:, :4].relu(), s.a(x)[:, 4:]], -1)),
        {4: {"scales", "bases"}},
        **AB,
    ),
    "dropout": Case(lambda s, x: s.b(F.dropout(s.a(x), 0.5, s.training)), FREE, **AB),
    "a mask of the input": Case(
        lambda s, x: s.b(s.a(x).masked_fill(x.sum(1, keepdim=True) > 1, 0.0)), NOTHING, **AB
    ),
    "a mask of the units": Case(
        lambda s, x: s.b(torch.where(s.a(x) > 0, s.a(x), 0.1 * s.a(x))), SCALED, **AB
    ),
    "a mask of the units, not at 0": Case(
        lambda s, x: s.b(torch.where(s.a(x) > 1, s.a(x), 0.1 * s.a(x))), NOTHING, **AB
    ),
    "gated": Case(lambda s, x: s.b(s.a(x).sigmoid() * s.c(x)), GAINS, c=lin(4, 8), **AB),
    "gated by relu": Case(lambda s, x: s.b(s.a(x).relu() * s.c(x)), GAINS, c=lin(4, 8), **AB),
    "read twice, alike": Case(
        lambda s, x: s.b(s.a(x).relu()) + s.c(s.a(x).relu()), SCALED, c=lin(8, 3), **AB
    ),
    "read twice, differently": Case(
        lambda s, x: s.b(s.a(x).relu()) + s.c(s.a(x).sigmoid()), NOTHING, c=lin(8, 3), **AB
    ),
    "a layer used twice": Case(
        lambda s, x: s.b(s.m(s.m(s.a(x)).relu()).relu()), SCALED, m=lin(8, 8), **AB
    ),
    "one layer in two roles": Case(
        lambda s, x: s.b(s.a(x)) + F.linear(s.a(x).tanh(), s.b.weight), FLIPPED, **AB
    ),
    "tied, transposed": Case(
        lambda s, x: F.linear(unit(s.a(x)), s.a.weight.T), ROTATED, a=lin(4, 8)
    ),
    "tied, transposed, free": Case(
        lambda s, x: F.linear(s.a(x), s.a.weight.T), ROTATED, a=lin(4, 8)
    ),
    "tied, behind a gain": Case(
        lambda s, x: F.linear(s.n(s.a(x)), s.a.weight.T), FLIPPED, a=lin(4, 8), n=rms(8)
    ),
    "a table of positions": Case(
        lambda s, x: s.b(unit(s.a(x) + s.p[: x.shape[1]])), ROTATED, 2, 5, 4, p=par(16, 8), **AB
    ),
    "a ramp": Case(lambda s, x: s.b(unit(s.a(x) * torch.arange(1.0, 9.0))), NOTHING, **AB),
    "an epsilon for each unit": Case(
        lambda s, x: s.b(s.a(x) / (s.a(x).pow(2) + s.c)), {8: {"scales", "signs"}}, c=par(8), **AB
    ),
    "bilinear": Case(lambda s, x: s.a(x).mul(s.c(x)).sum(1), FREE, c=lin(4, 8), a=lin(4, 8)),
    "bilinear with itself": Case(lambda s, x: s.a(x).mul(s.a(x)).sum(1), ROTATED, a=lin(4, 8)),
    "cosine": Case(
        lambda s, x: F.cosine_similarity(s.a(x), s.c(x)), ROTATED, a=lin(4, 8), c=lin(4, 8)
    ),
    "layer norm": Case(lambda s, x: s.b(s.n(s.a(x))), ABOUT_1, **AB | {"n": layernorm(8)}),
    "statistics of a norm along another axis": Case(
        lambda s, x: s.b(torch.native_layer_norm(s.a(x).mT, (5,), None, None, 0.1)[1][..., 0]),
        NOTHING,
        2,
        5,
        4,
        **AB,
    ),
    "a circle of units": Case(lambda s, x: s.b(s.a(x).roll(1, -1).tanh()), NOTHING, **AB),
    "group norm": Case(lambda s, x: s.b(F.group_norm(s.a(x), 2)), NOTHING, **AB),
    "norm over the batch": Case(
        lambda s, x: s.b(s.a(x) / (s.a(x).norm(dim=0, keepdim=True) + 1e-3)), FLIPPED, **AB
    ),
    "the units' sum": Case(lambda s, x: s.b(s.a(x)) + s.a(x).sum(1, keepdim=True), ABOUT_1, **AB),
    "an output too": Case(lambda s, x: (s.b(s.a(x)), s.a(x)), NOTHING, **AB),
    "sorted": Case(lambda s, x: s.b(s.a(x).sort(-1).values), NOTHING, **AB),
    "softmax": Case(lambda s, x: s.b(s.a(x).softmax(-1)), NOTHING, **AB),
    "in place": Case(lambda s, x: s.b(s.a(x).relu_().mul_(2).add_(s.c)), SCALED, c=par(8), **AB),
    "a matrix between": Case(
        lambda s, x: s.b(torch.linalg.solve(s.w @ s.w.T + torch.eye(8), s.a(x).T).T),
        ROTATED,
        w=par(8, 8),
        **AB,  # the columns of w
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_offered_holds(name: str) -> None:
    net, x = HOSTILE[name]()
    found = symmetry.find(net, x, kinds=KINDS)
    offered: dict[int, set[str]] = {}
    for f in found.factors.values():
        offered.setdefault(f.size, set()).add(f.kind)
    assert offered == HOSTILE[name].offered
    if found.factors:
        assert found.verify(net, x, others=[torch.rand(5, *x.shape[1:])]) < 1e-9


# Rotary positions by hand: two heads of eight coordinates, the scores as the output


def scores(s: Any, x: Tensor, angles: Tensor, sign: float = 1.0, turn_keys: bool = True) -> Tensor:
    def turned(u: Tensor) -> Tensor:
        half = torch.cat([-u[..., 4:], u[..., :4]], -1)
        return u * angles.cos() + half * (sign * angles.sin())

    q, k = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (s.q, s.k))
    return (turned(q) @ (turned(k) if turn_keys else k).mT).exp().sum(1)


def angles(x: Tensor, *shares: float) -> Tensor:
    """[positions, 8]; shares: of each half."""
    one = torch.arange(float(x.shape[1]))[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    return torch.cat([one * share for share in shares], -1)


def doubled(x: Tensor) -> Tensor:
    one = angles(x, 1.0)
    return torch.cat([one, one], -1)


def by_parameter(s: Any, x: Tensor) -> Tensor:
    one = torch.arange(float(x.shape[1]))[:, None] * s.f
    return torch.cat([one, one], -1)


QK = {"q": lin(4, 16), "k": lin(4, 16)}
TURNED, UNTURNED = {4: {"scales", "phases"}}, {4: {"scales", "signs"}}
ROTARY = {
    "as it should be": Case(lambda s, x: scores(s, x, doubled(x)), TURNED, 2, 5, 4, **QK),
    "queries alone": Case(
        lambda s, x: scores(s, x, doubled(x), turn_keys=False), TURNED, 2, 5, 4, **QK
    ),
    "halves that differ": Case(
        lambda s, x: scores(s, x, angles(x, 1.0, 2.0)), UNTURNED, 2, 5, 4, **QK
    ),
    "halves that are equal by their numbers": Case(
        lambda s, x: scores(s, x, angles(x, 1.0, 1.0)), TURNED, 2, 5, 4, **QK
    ),
    "a gain for each coordinate": Case(
        lambda s, x: scores(s, x, doubled(x)) + scores(s, x * s.g, doubled(x)),
        TURNED,
        2,
        5,
        4,
        g=par(4),
        **QK,
    ),
    "a gain for each coordinate of heads": Case(
        lambda s, x: (
            (
                (s.q(x).unflatten(-1, (2, 8)).transpose(1, 2) * s.g)
                @ s.k(x).unflatten(-1, (2, 8)).transpose(1, 2).mT
            ).sum(1)
            + scores(s, x, doubled(x))
        ),
        UNTURNED,
        2,
        5,
        4,
        g=par(8),
        **QK,
    ),
    "learned frequencies": Case(
        lambda s, x: scores(s, x, by_parameter(s, x)), UNTURNED, 2, 5, 4, f=par(4), **QK
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_what_commutes_with_rotary_positions(name: str) -> None:
    net, x = ROTARY[name]()
    found = symmetry.find(net, x, kinds=KINDS)
    offered: dict[int, set[str]] = {}
    for f in found.factors.values():
        offered.setdefault(f.size, set()).add(f.kind)
    assert offered == ROTARY[name].offered
    assert found.verify(net, x, others=[torch.rand(3, 7, 4)]) < 1e-9


# The value


def small() -> tuple[nn.Module, Tensor, Bases]:
    net, x = HOSTILE["a bias after the norm"]()
    return net, x, symmetry.find(net, x, kinds=KINDS)


def test_transforming_leaves_the_parameters_as_they_are() -> None:
    net, _, found = small()
    theta = {n: t.double() for n, t in net.state_dict().items()}
    kept = {n: t.clone() for n, t in theta.items()}
    element = found.random(torch.Generator().manual_seed(0))
    moved = found.transform(theta, element)
    assert all(torch.equal(theta[n], kept[n]) for n in kept)
    assert all(not torch.equal(moved[n], kept[n]) for n in ("a.weight", "a.bias", "c", "b.weight"))
    assert moved.keys() == theta.keys()


def test_what_an_element_leaves_out_stays() -> None:
    net, _, found = small()
    theta = dict(net.state_dict())
    assert all(torch.equal(t, theta[n]) for n, t in found.transform(theta, {}).items())


def test_folding_alone() -> None:
    net, x, found = small()
    nn.init.normal_(net.n.weight)
    before = net(x)
    assert found.folded == ["n.weight"]
    theta = found.fold(dict(net.state_dict()))
    assert torch.equal(theta["n.weight"], torch.ones(8))
    net.load_state_dict(theta)
    torch.testing.assert_close(net(x), before)


def test_a_gain_of_zero_beside_a_bias_is_refused() -> None:
    net, _ = HOSTILE["layer norm"]()
    found = symmetry.find(net, torch.rand(3, 4), kinds=KINDS)
    theta = dict(net.state_dict()) | {"n.weight": torch.tensor([0.0, *[1.0] * 7])}
    with pytest.raises(ValueError, match=r"n\.weight"):
        found.fold(theta)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("rotations", torch.ones(8, 8)),
        ("rotations", torch.eye(7)),
        ("rotations", "M"),
        ("rotations", torch.full((8, 8), float("nan"))),
        ("scales", -torch.ones(8)),
        ("signs", torch.full((8,), 0.5)),
        ("bases", torch.zeros(8, 8)),
        ("rotations about 1", -torch.eye(8)),
    ],
)
def test_elements_of_another_group_are_refused(kind: str, wrong: Any) -> None:
    names = {
        "rotations": "rms norm",
        "scales": "relu squared",
        "signs": "softsign",
        "bases": "linear",
        "rotations about 1": "layer norm",
    }
    net, x = HOSTILE[names[kind]]()
    found = symmetry.find(net, x, kinds=KINDS)
    (name,) = (n for n, f in found.factors.items() if f.kind == kind)
    with pytest.raises(ValueError, match=r"expected|got|is not|moves"):
        found.transform(dict(net.state_dict()), {name: wrong})


def test_kinds_are_asked_for() -> None:
    net, x = HOSTILE["linear"]()
    assert isinstance(symmetry.find(net, x), symmetry.Symmetry)
    offered = {
        kinds: {f.kind for f in symmetry.find(net, x, kinds=kinds).factors.values()}
        for kinds in [("rotations",), ("scales", "signs"), ("permutations",), KINDS]
    }
    assert [*offered.values()] == [{"rotations"}, {"scales", "signs"}, set(), {"bases"}]
    assert not symmetry.find(net, x, kinds=("rotations",)).permutations.groups
    for wrong in ("scales", ("scale",), [3]):
        with pytest.raises(ValueError, match="expected some of"):
            symmetry.find(net, x, kinds=wrong)


def test_a_wrong_factor_does_not_verify() -> None:
    """The verification itself: with a site left out, or another power, outputs change."""
    net, x, found = small()
    ((name, factor),) = found.factors.items()
    for sites in (factor.sites[1:], factor.sites[:-1]):
        broken = replace(found, factors={name: replace(factor, sites=sites)})
        with pytest.raises(symmetry.SymmetryError, match="rotations"):
            broken.verify(net, x)
    broken = replace(found, factors={name: replace(factor, folds=())})
    with pytest.raises(symmetry.SymmetryError, match="rotations"):
        broken.verify(net, x)


def test_what_is_refused_is_explained() -> None:
    net, x = HOSTILE["gated"]()
    (reasons,) = symmetry.find(net, x, kinds=KINDS).refused.values()
    assert "sigmoid" in reasons["bases"]


@pytest.mark.parametrize("example", [torch.randn(2, 4), torch.randn(2, 4).half()])
def test_an_example_of_another_type_is_refused(example: Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with pytest.raises(symmetry.SymmetryError, match=r"does not run on the example.*Fix:"):
        symmetry.find(net, example, kinds=KINDS)
