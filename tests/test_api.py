"""The front door: models of every kind are aligned, connected, measured and merged; refusals."""

from __future__ import annotations

import copy
import io
import random
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small import normed, rounding, task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mcnotes
from mcnotes import cache, calls, checkpoints, curves, evaluate, prepare, symmetry, train
from mcnotes.api import Profile
from mcnotes.calls import InputError
from mcnotes.checkpoints import Loaded
from mcnotes.data import Loader
from mcnotes.lab.experiment import Record
from mcnotes.matching import Moments, Pair, pam, stream
from mcnotes.symmetry import SymmetryError
from mcnotes.symmetry.execute import tensors_in
from mcnotes.train import TrainingError

ROOT = Path(__file__).resolve().parents[1]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=seeded(seed))


def planted(model: nn.Module, example: Any, seed: int = 1) -> nn.Module:
    """The same function in another, random order of units."""
    wide = prepare.working_copy("test", "the model", model, torch.device("cpu"))
    sym = symmetry.find(wide, example)
    assert sym.groups
    moved = sym.permute(prepare.state(model), sym.random(seeded(seed)))
    return prepare.filled("test", model, moved)


def disturbed(model: nn.Module, level: float = 0.05) -> nn.Module:
    """Weights a little apart, so that no two units are the same."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p += level * randn(*p.shape, seed=i).to(p.dtype)
    return made


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad(), evaluate.mode(model, training=False):
        return [*tensors_in(calls.call(model, prepare.state(model), inputs))]


def same_state(one: nn.Module, two: nn.Module) -> bool:
    a, b = prepare.state(one), prepare.state(two)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# Models of every kind, with batches for them.


def table() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1)
    )


def series() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Conv1d(8, 6, 3),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Tokens(nn.Module):
    """Token ids and a mask, as keywords; the first and last weights are tied; a dataclass out."""

    @dataclass
    class Output:
        logits: Tensor
        hidden: tuple[Tensor, ...] = ()

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.mix = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.Output(self.head(x + self.back(self.mix(x).relu())))


class TwoInputs(nn.Module):
    """A picture and a number; a dictionary out; an attribute that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.note = "mine"
        self.first, self.second, self.last = nn.Linear(9, 8), nn.Linear(1, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(8), persistent=False)
        self.second.weight.requires_grad_(False)

    def forward(self, picture: Tensor, number: Tensor) -> dict[str, Tensor]:
        x = self.first(picture.flatten(1)) + self.second(number[:, None])
        return {"logits": self.last(x.tanh() * self.scale)}


def tiny(kind: str) -> nn.Module:
    """A transformer of the library, of random weights."""
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_labels=3, max_position_embeddings=16, **size
        )
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        own = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        config = transformers.GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **own)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.ViTConfig(
        hidden_size=16, image_size=16, patch_size=4, num_labels=3, **size
    )
    return transformers.ViTForImageClassification(config)


def text(count: int, labels: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    """Batches of token ids with a mask, part of which is padding, and labels."""
    made = []
    for seed in range(count):
        ids, mask = randint(50, 16, 10, seed=seed), torch.ones(16, 10, dtype=torch.long)
        mask[::3, 7:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels(ids)})
    return made


def images(count: int, *shape: int) -> list[Tensor]:
    return [randn(32, *shape, seed=seed) for seed in range(count)]


def cnn() -> nn.Module:
    net = normed()
    net.load_state_dict(train.initialise(net, 1))
    return net


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "a table": (table, lambda: [(randn(64, 5, seed=s), randn(64, 1, seed=s)) for s in range(4)]),
    "normalised images": (
        cnn,
        lambda: DataLoader(TensorDataset(randn(200, 1, 12, 12), randint(3, 200)), batch_size=64),
    ),
    "series without targets": (series, lambda: images(4, 3, 20)),
    "dictionaries, tied weights": (
        Tokens,
        lambda: [
            {"input_ids": x["input_ids"] % 20, "attention_mask": x["attention_mask"]}
            for x in text(4, lambda ids: ids)
        ],
    ),
    "two inputs": (
        TwoInputs,
        lambda: [((randn(32, 3, 3, seed=s), randn(32, seed=s)), randint(3, 32)) for s in range(4)],
    ),
    "keywords and targets": (
        TwoInputs,
        lambda: [
            ({"number": randn(32, seed=s), "picture": randn(32, 3, 3, seed=s)}, randint(3, 32))
            for s in range(4)
        ],
    ),
    "arrays": (table, lambda: [x.numpy() for x in images(4, 5)]),
    "bert": (lambda: tiny("bert"), lambda: text(4, lambda ids: ids[:, 0] % 3)),
    "gpt2": (lambda: tiny("gpt2"), lambda: text(4, lambda ids: ids)),
    "vit": (
        lambda: tiny("vit"),
        lambda: [{"pixel_values": x, "labels": randint(3, 32)} for x in images(4, 3, 16, 16)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_permutation_is_undone(kind: str) -> None:
    build, make = KINDS[kind]
    torch.manual_seed(3)
    model, batches = disturbed(build()), make()
    example = calls.first(Loader(batches, torch.device("cpu")).head[0], 4)
    other = planted(model, example)
    assert not same_state(other, model)
    kept = copy.deepcopy(other)
    aligned = mcnotes.align(model, other, batches)
    assert same_state(kept, other)
    cpu = torch.device("cpu")
    nets = [prepare.working_copy("test", "the model", m, cpu) for m in (aligned.model, other)]
    for mine, right in zip(*(outputs(net, example) for net in nets), strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(mine, right, rtol=0, atol=rounding(1000, scale))
    state, right = prepare.state(aligned.model), prepare.state(model)
    apart = [n for n in state if not torch.equal(state[n], right[n])]
    assert not apart
    table = aligned.table()
    assert list(table.columns) == ["group", "units", "before", "after", "dead", "ambiguous"]
    assert set(table["group"]) == aligned.symmetry.groups.keys()
    assert table["after"].min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_come_back_in_a_type_of_their_own(dtype: torch.dtype) -> None:
    model = disturbed(cnn().to(dtype))
    batches = [x.to(dtype) for x in images(3, 1, 12, 12)]
    other = planted(model, batches[0].float())
    aligned = mcnotes.align(model, other, batches)
    assert {p.dtype for p in aligned.model.parameters()} == {dtype}
    assert same_state(aligned.model, model)
    curve = mcnotes.connect(model, other, [(x, randint(3, 32)) for x in batches], epochs=1)
    made = curve.model(0.25)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert outputs(made, batches[0])[0].dtype == dtype


def test_modules_keep_all_that_no_state_holds() -> None:
    model = TwoInputs()
    other = planted(model, (randn(4, 3, 3), randn(4)))
    other.note = "theirs"
    other.last.bias.grad = torch.ones(3)
    other.train()
    other.first.eval()
    batches = [((randn(32, 3, 3, seed=s), randn(32, seed=s)), randint(3, 32)) for s in range(3)]
    made = mcnotes.align(model, other, batches).model
    assert isinstance(made, TwoInputs)
    assert made.note == "theirs"
    assert [m.training for m in made.modules()] == [m.training for m in other.modules()]
    assert [p.requires_grad for p in made.parameters()] == [
        p.requires_grad for p in other.parameters()
    ]
    assert all(p.grad is None for p in made.parameters())
    assert other.last.bias.grad is not None
    assert not {id(p) for p in made.parameters()} & {id(p) for p in other.parameters()}
    assert list(made.state_dict()) == list(other.state_dict())


def test_what_is_given_is_left_as_it_was() -> None:
    data = TensorDataset(randn(96, 1, 12, 12), randint(3, 96))
    loader = DataLoader(data, batch_size=32, shuffle=True, generator=seeded(5))
    plain = DataLoader(data, batch_size=32, shuffle=True)
    model, other = cnn(), planted(cnn(), randn(4, 1, 12, 12))
    other[3].eval()
    flags = [m.training for m in (*model.modules(), *other.modules())]
    kept = [copy.deepcopy(m) for m in (model, other)]

    def randomness() -> list[Any]:
        assert loader.generator is not None
        states = [torch.get_rng_state(), loader.generator.get_state()]
        return [*(s.tolist() for s in states), random.getstate(), str(np.random.get_state())]  # noqa: NPY002

    before = randomness()
    for batches in (loader, plain):
        aligned = mcnotes.align(model, other, batches)
        curve = mcnotes.connect(model, aligned.model, batches, epochs=1)
        mcnotes.profile(curve, batches, points=3)
        curve.model(0.5)
        mcnotes.merge([model, other], batches)
    assert randomness() == before
    assert flags == [m.training for m in (*model.modules(), *other.modules())]
    assert all(same_state(a, b) for a, b in zip(kept, (model, other), strict=True))


def test_the_same_call_gives_the_same_numbers_whatever_came_before() -> None:
    data = TensorDataset(randn(96, 1, 12, 12), randint(3, 96))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, other = cnn(), disturbed(cnn())
    first, again = (mcnotes.connect(model, other, loader, epochs=2), torch.rand(3))[0], None
    again = mcnotes.connect(model, other, loader, epochs=2)
    assert first.losses == again.losses
    assert same_state(first.model(0.5), again.model(0.5))


def test_iterators_are_read_once_where_one_pass_is_enough() -> None:
    model, given = table(), []

    def stream() -> Iterator[Tensor]:
        for k, x in enumerate(images(3, 5)):
            given.append(k)
            yield x

    aligned = mcnotes.align(model, planted(model, randn(4, 5)), stream())
    assert given == [0, 1, 2]
    assert same_state(aligned.model, model)
    once = ((randn(32, 5, seed=s), randn(32, 1, seed=s)) for s in range(3))
    curve = mcnotes.connect(model, disturbed(model), once, loss=F.mse_loss, epochs=2)
    assert len(curve.losses) == 2


def test_what_a_language_model_keeps_for_its_next_call_holds_no_units() -> None:
    model, batches = tiny("gpt2"), text(2, lambda ids: ids)
    aligned = mcnotes.align(model, disturbed(model), batches)
    attention = [name for name in aligned.symmetry.groups if "attn" in name]
    assert len(attention) == 2 * (2 * 2 + 1)  # layers: heads' queries and values; the heads
    assert aligned.model.config.use_cache
    assert model.config.use_cache


def test_batches_may_differ_in_length() -> None:
    model = Tokens()
    batches = [{"input_ids": randint(20, 16, n, seed=n)} for n in (7, 5, 7, 4)]
    other = planted(model, batches[0])
    assert same_state(mcnotes.align(model, other, batches).model, model)


def test_blocks_of_units_and_matching_by_weights() -> None:
    model = tiny("bert")
    batches = text(3, lambda ids: ids[:, 0] % 3)
    example = {n: x for n, x in batches[0].items() if n != "labels"}
    other = planted(model, example)
    aligned = mcnotes.align(model, other, batches, method="weights")
    for mine, right in zip(outputs(aligned.model, example), outputs(other, example), strict=True):
        torch.testing.assert_close(
            mine, right, rtol=0, atol=rounding(1000, float(right.abs().max()))
        )


def test_a_network_without_symmetry_passes_through_with_a_note() -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    aligned = mcnotes.align(model, other, images(2, 5))
    assert same_state(aligned.model, other)
    assert aligned.model is not other
    assert (
        repr(aligned) == "Aligned(Linear: no units may change places, so this is model B unchanged)"
    )
    assert len(aligned.table()) == 0
    mean = prepare.state(mcnotes.merge([model, other], images(2, 5)))
    torch.testing.assert_close(mean["weight"], (model.weight + other.weight).detach() / 2)


def test_a_recurrent_layer_stays_and_the_rest_is_aligned() -> None:
    model = Recurrent()
    batches = [randn(32, 7, 5, seed=s) for s in range(3)]
    other = planted(model, batches[0])
    aligned = mcnotes.align(model, other, batches)
    assert same_state(aligned.model, model)
    assert aligned.symmetry.groups["middle"].size == 6
    curve = mcnotes.connect(model, Recurrent(), [(x, randint(3, 32)) for x in batches], epochs=1)
    line = curves.line(*curve.curve.points[::2])(0.5)
    assert not any(torch.equal(x, line[n]) for n, x in curve.curve.points[1].items())


def test_a_compiled_model_is_taken_out_of_its_wrapper() -> None:
    model = table()
    other = planted(model, randn(4, 5))
    aligned = mcnotes.align(torch.compile(model), torch.compile(other), images(3, 5))
    assert type(aligned.model) is nn.Sequential
    assert same_state(aligned.model, model)


# Curves, profiles, merging.


def trained(build: Callable[[], nn.Module], batches: Any, loss: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        for x, y in batches:
            optimiser.zero_grad()
            loss(model(x), y).backward()
            optimiser.step()
    return model


def regression() -> list[tuple[Tensor, Tensor]]:
    xs = [randn(64, 5, seed=s) for s in range(4)]
    return [(x, (x[:, :1] * x[:, 1:2]).tanh()) for x in xs]


def test_a_regression_is_aligned_connected_and_profiled() -> None:
    batches = regression()
    a, b = (trained(table, batches, F.mse_loss, seed) for seed in (1, 2))
    aligned = mcnotes.align(a, b, batches)
    line = mcnotes.connect(a, aligned.model, batches, loss=F.mse_loss, kind="line")
    curve = mcnotes.connect(a, aligned.model, batches, loss=F.mse_loss, epochs=20, lr=0.05)
    assert line.losses == []
    assert len(curve.losses) == 20
    metrics = {"worst": lambda z, y: (z - y).abs().max(), "rows": lambda z, y: float(len(z))}
    straight = mcnotes.profile(line, batches, points=5)
    bent = mcnotes.profile(curve, batches, points=5, metrics=metrics)
    assert straight.metrics == {}
    assert bent.barrier < straight.barrier
    frame = bent.frame()
    assert list(frame.columns) == ["t", "arc", "loss", "worst", "rows"]
    assert frame["rows"].tolist() == [64] * 5
    assert frame["arc"].is_monotonic_increasing
    for t, loss, worst in zip(frame["t"], frame["loss"], frame["worst"], strict=True):
        model = curve.model(t)
        found = [(model(x), y) for x, y in batches]
        assert loss == pytest.approx(np.mean([F.mse_loss(z, y).item() for z, y in found]), rel=1e-5)
        assert worst == pytest.approx(
            np.mean([(z - y).abs().max().item() for z, y in found]), rel=1e-5
        )
    assert bent.best == frame["t"][frame["loss"].idxmin()]


def test_losses_are_means_over_samples_not_over_batches() -> None:
    batches = [(randn(n, 5, seed=n), randn(n, 1, seed=n)) for n in (40, 8)]
    model = table()
    curve = mcnotes.connect(model, model, batches, loss=F.mse_loss, kind="line")
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert mcnotes.profile(curve, batches, points=2).loss[0] == pytest.approx(
        F.mse_loss(model(x), y).item(), rel=1e-5
    )


def test_batchnorm_statistics_are_those_of_the_batches() -> None:
    batches = [(randn(64, 1, 12, 12, seed=s), randint(3, 64, seed=s)) for s in range(3)]
    a, b = (trained(normed, batches, F.cross_entropy, seed) for seed in (1, 2))
    curve = mcnotes.connect(a, b, batches, kind="line")
    middle = prepare.state(curve.model(0.5))
    x = torch.cat([F.conv2d(x, middle["0.weight"], padding=1) for x, _ in batches])
    torch.testing.assert_close(middle["1.running_mean"], x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    half = (a[0].weight + b[0].weight).detach() / 2
    torch.testing.assert_close(middle["0.weight"], half)
    few = prepare.state(curve.model(0.5, batches[:1]))
    assert not torch.equal(few["1.running_mean"], middle["1.running_mean"])
    profile = mcnotes.profile(curve, batches, points=3)
    model = curve.model(0.5).eval()
    loss = np.mean([F.cross_entropy(model(x), y).item() for x, y in batches])
    assert profile.loss[1] == pytest.approx(loss, rel=1e-5)
    hits = np.mean([(model(x).argmax(1) == y).float().mean().item() for x, y in batches])
    assert profile.metrics["accuracy"][1] == pytest.approx(hits)
    other = mcnotes.profile(curve, batches, points=3, statistics=batches[:1])
    assert other.loss[1] != profile.loss[1]


def test_a_last_small_batch_does_not_count_for_batchnorm() -> None:
    batches = [randn(n, 1, 12, 12, seed=n) for n in (32, 32, 1)]
    model = cnn()
    got, whole = (prepare.state(mcnotes.merge([model, model], b)) for b in (batches, batches[:2]))
    assert torch.equal(got["1.running_var"], whole["1.running_var"])


class Everywhere(nn.Module):
    """Classes for each place: as they lie in pictures, or last as in text."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1))
        self.last = last

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        return (z.movedim(1, -1), x) if self.last else z


@pytest.mark.parametrize("last", [False, True])
def test_one_class_for_each_place(last: bool) -> None:
    model = Everywhere(last)
    batches = [(randn(16, 1, 6, 5, seed=s), randint(3, 16, 6, 5, seed=s)) for s in range(2)]
    batches[0][1][:, :2] = -100
    curve = mcnotes.connect(model, disturbed(model), batches, epochs=1)
    found = mcnotes.profile(curve, batches, points=2)
    z, y = model.net(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])
    assert found.loss[0] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    hits = (z.argmax(1) == y)[y != -100].float().mean().item()
    assert found.metrics["accuracy"][0] == pytest.approx(hits)


def test_several_labels_for_each_sample() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(randn(16, 5, seed=s), randint(2, 16, 4, seed=s).float()) for s in range(3)]
    loss = F.binary_cross_entropy_with_logits
    curve = mcnotes.connect(model, disturbed(model), batches, loss=loss, epochs=2)
    assert mcnotes.profile(curve, batches, points=3).loss.shape == (3,)
    with pytest.raises(
        InputError, match=r"cross-entropy fails.*expected class numbers.*pass a loss"
    ):
        mcnotes.connect(model, model, batches)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_transformers_are_measured_by_their_own_loss(kind: str) -> None:
    build, make = KINDS[kind]
    model, batches = build(), make()
    curve = mcnotes.connect(model, disturbed(model), batches, epochs=1)
    found = mcnotes.profile(curve, batches, points=2)
    with torch.no_grad():
        own = [model.eval()(**batch) for batch in batches]
    assert found.loss[0] == pytest.approx(np.mean([z.loss.item() for z in own]), rel=1e-5)
    if kind == "gpt2":  # which shifts its labels
        assert found.metrics == {}
        return
    pairs = zip(own, batches, strict=True)
    hits = [(z.logits.argmax(1) == b["labels"]).float().mean().item() for z, b in pairs]
    assert found.metrics["accuracy"][0] == pytest.approx(np.mean(hits))
    given = mcnotes.profile(
        curve, batches, points=2, loss=lambda z, y: F.cross_entropy(z.logits, y)
    )
    assert given.loss[0] == pytest.approx(found.loss[0], rel=1e-5)
    assert given.metrics == {}


def test_frozen_parameters_stay_on_the_line() -> None:
    a, b = TwoInputs(), disturbed(TwoInputs())
    batches = [((randn(32, 3, 3, seed=s), randn(32, seed=s)), randint(3, 32)) for s in range(3)]
    curve = mcnotes.connect(a, b, batches, epochs=2)
    middle, line = curve.curve.points[1], curves.line(*curve.curve.points[::2])(0.5)
    assert torch.equal(middle["second.weight"], line["second.weight"])
    assert not torch.equal(middle["first.weight"], line["first.weight"])
    made = curve.model(0.5)
    assert not made.get_parameter("second.weight").requires_grad
    assert made.get_parameter("first.weight").requires_grad


def test_tied_weights_stay_tied() -> None:
    a, b = Tokens(), Tokens()
    batches = [
        ({"input_ids": x["input_ids"] % 20}, x["input_ids"].roll(-1, 1) % 20)
        for x in text(3, lambda ids: ids)
    ]
    curve = mcnotes.connect(a, b, batches, epochs=2)
    made = curve.model(0.5)
    assert made.head.weight is made.embed.weight
    assert torch.equal(made.head.weight, curve.curve(0.5)["embed.weight"])


def test_three_models_become_one() -> None:
    model = disturbed(cnn())
    batches = images(3, 1, 12, 12)
    others = [planted(model, batches[0], seed=s) for s in (1, 2)]
    merged = mcnotes.merge([model, *others], batches)
    for name, x in merged.named_parameters():
        torch.testing.assert_close(x, model.get_parameter(name))
    assert merged is not model


# Checkpoints.


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, path = regression(), tmp_path / "run.safetensors"
    a, b = table(), disturbed(table())

    def connect(**more: Any) -> Any:
        return mcnotes.connect(a, b, batches, loss=F.mse_loss, epochs=3, **more)

    whole = connect()
    with monkeypatch.context() as patch:
        original = cache.Checkpoint.save

        def save(self: cache.Checkpoint, state: Any) -> None:
            original(self, state)
            if len(state["losses"]) == 2:
                raise KeyboardInterrupt

        patch.setattr(cache.Checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            connect(checkpoint=path)
    resumed = connect(checkpoint=str(path))
    assert resumed.losses == whole.losses
    assert same_state(resumed.model(0.5), whole.model(0.5))
    with pytest.raises(InputError, match=r"belongs to another run\. Fix: name another"):
        connect(checkpoint=path, seed=1)


def test_a_file_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model_a.pt"
    torch.save({"weight": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="expected a checkpoint of this run"):
        mcnotes.connect(table(), table(), regression(), loss=F.mse_loss, checkpoint=path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model_a.pt"]


# What does not fit is refused in one sentence.


class Wrapped(nn.Module):
    """A layer in another architecture of the same parameters."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(5, 8), nn.Linear(8, 3), act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class Branches(nn.Module):
    """Control flow on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else -self.net(x)


class Hidden(nn.Module):
    """Weights that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(5, 3), [torch.rand(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale[0]


class Recurrent(nn.Module):
    """A recurrent layer, whose units stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net = nn.Linear(5, 4), nn.LSTM(4, 8, batch_first=True)
        self.middle, self.last = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.net(self.first(x))[0][:, -1]).tanh())


def mixed() -> nn.Module:
    net = mlp()
    net[2].double()
    return net


def untied() -> nn.Module:
    net = Tokens()
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    return net


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


ROWS = [randn(16, 5, seed=s) for s in range(2)]
IDS = [{"input_ids": randint(20, 4, 6, seed=s)} for s in range(2)]

REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "other widths": (table(), nn.Sequential(nn.Linear(5, 9)), ROWS, r"model_b: '.*' is"),
    "other names": (table(), series(), ROWS, r"is in one network only"),
    "other functions": (Wrapped(F.relu), Wrapped(F.gelu), ROWS, r"gives different outputs"),
    "hidden weights": (Hidden(), Hidden(), ROWS, r"neither a parameter nor a buffer"),
    "two types": (mlp(), mixed(), ROWS, r"parameters of .*float32.*float64.*, expected one"),
    "other ties": (Tokens(), untied(), IDS, r"model_b ties different parameters than model_a"),
    "no module": (table(), "model.pt", ROWS, r"model_b is a str, expected an nn.Module"),
    "no parameters": (nn.ReLU(), nn.ReLU(), ROWS, r"model_a has no parameters"),
    "no values": (table(), table().to("meta"), ROWS, r"model_b's '0.weight' has no values"),
    "8 bits": (mlp().to(torch.float8_e5m2), mlp(), ROWS, r"is torch.float8_e5m2, expected"),
    "NaN": (mlp(), mlp(), [torch.full((4, 5), torch.nan)], r"gives NaN for the first batch"),
    "a tensor": (mlp(), mlp(), ROWS[0], r"got a Tensor \[16, 5\], expected an iterable"),
    "an array": (mlp(), mlp(), ROWS[0].numpy(), r"got a ndarray \[16, 5\], expected an iterable"),
    "a dictionary": (mlp(), mlp(), {"x": ROWS[0]}, r"got a dict, expected an iterable"),
    "a data set": (mlp(), mlp(), TensorDataset(ROWS[0]), r"such as torch.utils.data.DataLoader\("),
    "a task": (mlp(), mlp(), task(), r"got a Task.*task.train.batches"),
    "no iterable": (mlp(), mlp(), 3, r"got a int, expected an iterable"),
    "nothing": (mlp(), mlp(), [], r"batches: got none, expected at least one"),
    "an empty iterator": (mlp(), mlp(), iter([]), r"batches: got none, expected at least one"),
    "other inputs": (mlp(), mlp(), images(2, 7), r"model_a fails on the first batch \(Runt"),
    "two inputs apart": (
        TwoInputs(),
        TwoInputs(),
        [(randn(8, 3, 3), randn(8))],
        r"missing 1 required positional",
    ),
    "other targets": (mlp(), mlp(), [(ROWS[0], torch.ones(3))], r"targets \[3\] stand beside 16"),
    "samples": (mlp(), mlp(), [(ROWS[0], torch.tensor(1))], r"targets \[\] stand beside 16"),
    "things": (mlp(), mlp(), [object()], r"got a object among the inputs"),
    "inputs and targets as batches": (
        mlp(),
        mlp(),
        [ROWS[0], torch.ones(16)],
        r"batch 2 has 1-D torch.float32, the first 2-D",
    ),
    "control flow": (Branches(), Branches(), ROWS, r"control flow must not depend on the data"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused(why: str) -> None:
    a, b, batches, words = REFUSED[why]
    with pytest.raises((InputError, SymmetryError), match=words) as error:
        mcnotes.align(a, b, batches)
    assert "\n" not in str(error.value)


CONNECTS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no targets": ({}, ROWS, r"the batches hold no targets, expected \(inputs, targets\)"),
    "targets for another loss": ({}, regression(), r"cross-entropy fails.*pass a loss"),
    "inputs as targets": ({}, [(x["input_ids"],) * 2 for x in IDS], r"targets are the inputs"),
    "a loss for each sample": (
        {"loss": lambda z, y: ((z - y) ** 2).mean(1)},
        regression(),
        r"numbers of shape \[64\]",
    ),
    "a loss that fails": (
        {"loss": lambda z, y: F.mse_loss(z["x"], y)},
        regression(),
        r"the loss fails on the first",
    ),
    "no slope": ({"loss": lambda z, y: (z > y).float().mean()}, regression(), r"has no gradient"),
    "a kind": ({"kind": "spline"}, regression(), r"kind: got 'spline', expected one of"),
    "epochs": ({"epochs": 0}, regression(), r"epochs: got 0, expected a whole number"),
}


@pytest.mark.parametrize("why", CONNECTS)
def test_what_cannot_be_learned_is_refused(why: str) -> None:
    options, batches, words = CONNECTS[why]
    model = Tokens() if why == "inputs as targets" else table()
    with pytest.raises(ValueError, match=words):
        mcnotes.connect(model, model, batches, **options)


def test_a_loss_that_grows_without_end_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="lower lr"):
        mcnotes.connect(table(), table(), regression(), loss=lambda z, y: (z * 1e30).exp().mean())


def test_metrics_are_checked_before_work() -> None:
    curve = mcnotes.connect(table(), table(), regression(), loss=F.mse_loss, kind="line")
    for name, metric, words in (
        ("arc", F.l1_loss, "the name 'arc' of a metric is reserved"),
        ("gap", lambda z, y: z - y, r"metric 'gap' returns numbers of shape \[64, 1\]"),
    ):
        with pytest.raises(InputError, match=words):
            mcnotes.profile(curve, regression(), metrics={name: metric})


def test_merging_one_or_by_other_means_is_refused() -> None:
    with pytest.raises(InputError, match="got 1 models, expected two or more"):
        mcnotes.merge([table()], ROWS)
    with pytest.raises(InputError, match="method: got 'loss', expected one of"):
        mcnotes.align(table(), table(), ROWS, method="loss")


def test_passes_of_different_lengths_are_refused() -> None:
    class Shrinks:
        left = 5

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.left -= 1
            return iter(regression()[: self.left])

    with pytest.raises(InputError, match=r"batches: 3 at first, 2 in a later pass"):
        mcnotes.connect(table(), table(), Shrinks(), loss=F.mse_loss, epochs=2)


# The package as it is met.


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, mcnotes; print('torch' in sys.modules, 'align' in dir(mcnotes)); "
        "mcnotes.align; print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert shown.stdout.split() == [b"False", b"True", b"True", b"False"]
    with pytest.raises(AttributeError, match="has no attribute 'aline'"):
        _ = mcnotes.aline


def test_the_lines_of_the_readme_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text("utf8")
    (lines,) = re.findall(r"## The package in five lines\n.*?```python\n(.*?)```", readme, re.S)
    batches = [(randn(64, 1, 12, 12, seed=s), randint(3, 64, seed=s)) for s in range(3)]
    models = (trained(normed, batches, F.cross_entropy, seed) for seed in range(3))
    names = dict(zip(("model_a", "model_b", "model_c"), models, strict=True))
    names |= {"batches": batches, "test_batches": batches[:1]}  # type: ignore[dict-item]
    exec(lines, names)
    assert isinstance(names["best"], nn.Module)
    assert isinstance(names["merged"], nn.Module)


def inner_values() -> dict[str, object]:
    """What lies below the front door, by how its line begins."""
    net, data = normed(), task()
    thetas = [train.initialise(net, seed) for seed in (1, 2, 3)]
    sym, recipe = symmetry.find(net, data.example), train.Recipe(1, 32, augment=False)
    pair, images = Pair(net, sym, *thetas[:2]), data.train
    settings = pam.Settings((1,), 1, samples=1, images=32, probe=32, nodes=1)
    problem = pam.Problem(net, sym, data, recipe, settings)
    result = pam.fit(problem, curves.bezier(*thetas[:2]), seed=1)
    axis, corners = np.arange(2.0), np.zeros((3, 2))
    high = evaluate.Plane(axis, axis, np.array([[1, np.inf], [2, 3]]), np.ones((2, 2)), corners)
    return {
        "Pair(two Sequential networks of ": pair,
        "Moments(6 units, ": stream(pair, images)["0"][0],
        "Problem(Sequential, Task(stripes": problem,
        "Result(1 iterations, Q ": result,
        "Record(1 groups, 1 iterations)": Record(result.perm, result.history),
        "Plane(2 x 2 cells, loss 1 to inf)": high,
    }


def test_values_say_in_one_line_what_they_are() -> None:
    batches = [(randn(64, 1, 12, 12, seed=s), randint(3, 64, seed=s)) for s in range(3)]
    a, b = (trained(normed, batches, F.cross_entropy, seed) for seed in (1, 2))
    aligned = mcnotes.align(a, b, batches)
    curve = mcnotes.connect(a, aligned.model, batches, epochs=2)
    data = task()
    fit = train.fit(normed(), data, train.Recipe(2, 32), seed=1)
    values = {
        "Aligned(Sequential: Matching(": aligned,
        "Matching(1 groups, correlation ": aligned.matching,
        "Group(6 units at 0.weight[0], 1.": aligned.symmetry.groups["0"],
        "Connection(Sequential, Curve(bezier, 3 control points of ": curve,
        "Curve(bezier, 3 control points of ": curve.curve,
        "Profile(3 points: barrier ": mcnotes.profile(curve, batches, points=3),
        "Scores(2 models: loss, accuracy)": mcnotes.compare({"A": a, "B": b}, batches),
        "Profile(2 points: barrier ": evaluate.profile(
            normed(), curves.line(fit.theta, fit.theta), data.test, statistics=None, points=2
        ),
        "Split(96 images [1, 12, 12] on cpu)": data.train,
        "Task(stripes: 96 train, 48 val, 60 test images [1, 12, 12] of 3 classes)": data,
        "Fit(2 epochs, loss ": fit,
        "Loader(3 batches of 64 samples on cpu)": curve.batches,
        "Loaded(": Loaded(fit.theta, "net.", ["optimizer"], ""),
    }
    values |= inner_values()
    for start, value in values.items():
        assert repr(value).startswith(start), repr(value)
        assert "\n" not in repr(value)
        assert len(repr(value)) < 400
        if not isinstance(value, Loader | Pair | pam.Problem | Moments):
            page = value._repr_html_()  # type: ignore[attr-defined]
            assert all(f"<{tag}" in page for tag in ("div",))
            assert all("aria-label" in svg for svg in re.findall(r"<svg[^>]*>", page))


# What strangers bring


class Masked(nn.Module):
    """A network whose second input may be left out, as those of texts do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.hidden = nn.Embedding(9, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.hidden(self.words(ids)).relu()
        z: Tensor = self.head(x if mask is None else x * mask[..., None])
        return z


def table_net(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs)
    ).eval()


def table_batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(randn(20, 6, seed=k), randint(3, 20, seed=k)) for k in range(n)]


def test_three_values_of_which_the_second_may_be_an_input() -> None:
    """(ids, mask, labels): the mask was learned in place of the labels."""
    ids, mask = randint(9, 20, 5), torch.ones(20, 5, dtype=torch.long)
    a, b, labels = Masked(1), Masked(2), ids % 3
    for work in (mcnotes.align, mcnotes.connect):
        with pytest.raises(InputError, match=r"the batches hold 3 values, .* network's 'mask'"):
            work(a, b, [(ids, mask, labels)])
    curve = mcnotes.connect(a, b, [((ids, mask), labels)], epochs=1)
    mcnotes.profile(curve, [((ids, mask), labels)], points=2)
    nets, rows = (table_net(1), table_net(2)), torch.arange(20)
    mcnotes.connect(*nets, [(x, y, rows) for x, y in table_batches()], kind="line")


@pytest.mark.filterwarnings("ignore:Using a target size")  # a session warns, and goes on
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, nn.HuberLoss()])
def test_targets_that_would_be_repeated(loss: Callable[..., Tensor]) -> None:
    """Targets [N] beside outputs [N, 1] were compared with each other, N x N."""
    a, b = table_net(1, 1), table_net(2, 1)
    batches = [(x, y.float()) for x, y in table_batches()]
    for work in (
        lambda data: mcnotes.connect(a, b, data, loss=loss, epochs=1),
        lambda data: mcnotes.compare({"A": a}, data, loss=loss),
    ):
        with pytest.raises(InputError, match=r"the loss fails .*Using a target size"):
            work(batches)
        work([(x, y[:, None]) for x, y in batches])


@pytest.mark.parametrize("target", [-1, 3, 7])
def test_later_targets_that_are_no_class(target: int) -> None:
    a, b = table_net(1), table_net(2)
    batches = [*table_batches(), (randn(20, 6), torch.full((20,), target))]
    with pytest.raises(TrainingError, match=rf"batch \d cannot be used .*Target {target} .*Fix"):
        mcnotes.connect(a, b, batches, epochs=1)
    line = mcnotes.connect(a, b, table_batches(), kind="line")
    for work in (
        lambda: mcnotes.profile(line, batches, points=2),
        lambda: mcnotes.compare({"A": a}, batches),
    ):
        with pytest.raises(ValueError, match=f"Target {target} is out of .* expected 0 to 2"):
            work()


def test_one_model_of_several_that_does_not_fit_the_batches() -> None:
    a = table_net(1)
    narrow = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(InputError, match="compare: other fails on the first batch"):
        mcnotes.compare({"A": a, "other": narrow}, table_batches())
    with pytest.raises(ValueError, match="network of 2 classes, expected 0 to 1"):
        mcnotes.compare({"A": a, "other": table_net(2, 2)}, table_batches())
    line = mcnotes.connect(a, table_net(2), table_batches(), kind="line")
    with pytest.raises(InputError, match=r"Connection.model: the model fails on the first batch"):
        line.model(0.5, [randn(20, 5)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_later_inputs_that_are_not_finite(value: float) -> None:
    a, b = table_net(1), table_net(2)
    batches = [*table_batches(), (torch.full((20, 6), value), randint(3, 20))]
    line = mcnotes.connect(a, b, table_batches(), kind="line")
    for work in (
        lambda: mcnotes.merge([a, b], batches, method="weights"),
        lambda: line.model(0.5, batches),
    ):
        with pytest.raises(InputError, match="running_mean' of the result is NaN"):
            work()
    with pytest.raises(ValueError, match=r"Profile.best: the loss is NaN everywhere"):
        _ = mcnotes.profile(line, batches, points=2).best


def test_the_best_of_a_curve_is_a_number() -> None:
    t = np.array([0, 0.5, 1])
    assert Profile(t, t, np.array([np.nan, 2.0, 1.0]), {}).best == 1


def test_gains_of_what_was_not_measured() -> None:
    scores = mcnotes.compare({"A": table_net(1), "B": table_net(2)}, table_batches())
    for given in (("f1", "A", "B"), ("loss", "C", "B"), ("loss", "A", "C")):
        with pytest.raises(ValueError, match=r"Scores.gain: \w+: got '(f1|C)', expected one of"):
            scores.gain(*given)


@pytest.mark.parametrize("answer", ["complex", "exits"])
def test_losses_that_are_none(answer: str) -> None:
    def loss(z: Tensor, _: Tensor) -> Tensor:
        return z.sum() * 1j if answer == "complex" else sys.exit(3)

    text = "complex64, expected a single real one" if answer == "complex" else "SystemExit: 3"
    with pytest.raises(InputError, match=f"connect: the loss .*{text}"):
        mcnotes.connect(table_net(1), table_net(2), table_batches(), loss=loss)


class Keeper(nn.Linear):
    """Holds something beside its weights."""

    def __init__(self, kept: Any) -> None:
        super().__init__(6, 3)
        self.kept = kept


@pytest.mark.parametrize(
    "kept", [threading.Lock(), (k for k in "ab"), io.TextIOWrapper(io.BytesIO())]
)
def test_networks_that_cannot_be_copied(kept: Any) -> None:
    """Raw errors of deepcopy, in all of these."""
    net = nn.Sequential(Keeper(kept), nn.Linear(3, 3))
    text = (
        "the network cannot be copied, for the attribute '0.kept' cannot .* Fix: set that to None"
    )
    with pytest.raises(InputError, match=f"align: model_a: {text}"):
        mcnotes.align(net, net, table_batches())
    for work in (
        lambda: train.initialise(net, 1),
        lambda: checkpoints.normalised(net),
    ):
        with pytest.raises(InputError, match=text):
            work()


def test_networks_of_torchscript() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = [torch.jit.script(table_net(k)) for k in (1, 2)]
        for work in (mcnotes.align, mcnotes.connect):
            with pytest.raises(InputError, match=r"model_a is compiled by torch.jit"):
                work(*nets, table_batches())


class LeNet(nn.Module):
    """As the first tutorial of PyTorch writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 4 * 4, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).view(-1, 16 * 4 * 4)
        z: Tensor = self.fc2(F.relu(self.fc1(x)))
        return z


def test_a_network_that_counts_its_samples_anew() -> None:
    """Of images of another height `view(-1, n)` makes other samples: they prove nothing."""
    net = LeNet()
    x = randn(6, 1, 28, 28)
    moved = planted(net, x[:4])
    aligned = mcnotes.align(net, moved, [x])
    assert [g.size for g in aligned.symmetry.groups.values()] == [6, 16, 12]
    expected = net(x)
    margin = rounding(576, float(expected.detach().abs().max()))
    torch.testing.assert_close(aligned.model(x), expected, rtol=0, atol=margin)
