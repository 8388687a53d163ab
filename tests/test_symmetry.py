"""Symmetries: found where they are, nowhere else, and they act as a group."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import agree, terms
from torch import Tensor, nn

from mcnotes import models, symmetry
from mcnotes.symmetry import groups
from mcnotes.symmetry.activations import Reader

Theta = dict[str, Tensor]


def weights(net: nn.Module) -> Theta:
    return {n: t.detach().clone() for n, t in net.state_dict().items()}


def shuffle(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal(a: Theta, b: Theta) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def same(a: symmetry.Symmetry, b: symmetry.Symmetry) -> bool:
    """Whether both move the same places, and pin the same entries."""

    def places(sym: symmetry.Symmetry) -> dict[str, list[Any]]:
        return {
            name: [(p.name, p.axes, p.index.tolist()) for p in g.places]
            for name, g in sym.groups.items()
        }

    return places(a) == places(b) and a.pinned == b.pinned


def sizes(sym: symmetry.Symmetry) -> dict[str, int]:
    return {name: g.size for name, g in sym.groups.items()}


# What is found: for each network the sizes of its groups, sorted.

FOUND: dict[str, list[int]] = {
    "mlp": [7, 8],
    "convnet": [6, 8, 10],
    "zero_padding": [4, 4],
    "squeeze_excite": [4, 8],
    "concatenation": [4, 6],
    "recurrent": [8],
    "shared_block": [8],
    "two_names": [8],
    "mixer": [9, 12, 20],
    "norms": [2, 2, 2, 2, 3, 3, 3, 3, 4, 6, 10],
    "unet": [2, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 8, 8, 12],
    "volumes": [4],
    "sequences": [4, 5, 8],
    "weight_norm": [7, 8],
    "spectral_norm": [7, 8],
    "no_batch": [8],
    "attention": [3, 4, 4, 4, 4, 4, 4, 12],
    "attention_units_first": [3, 4, 4, 4, 4, 4, 4, 12],
    "attention_einsum": [3, 4, 4, 4, 4, 4, 4, 12],
    "attention_by_head": [4, 4, 4, 4, 4, 4, 12],
    "attention_tensors": [3, 4, 4, 12],
    "shared_keys": [2, 4, 4, 4, 4, 12],
    "norm_of_keys": [8, 8, 8, 16],
    "encoder": [2, 2, 8, 8, 8, 8, 8, 8, 8, 8, 24, 24],
    "encoder_prenorm": [2, 2, 8, 8, 8, 8, 8, 8, 8, 8, 16, 24, 24],
    "decoder": [2, 2, 8, 8, 8, 8, 8, 8, 8, 8, 16, 24],
    "decoder_prenorm": [2, 2, 8, 8, 8, 8, 8, 8, 8, 8, 16, 24],
    "language_model": [2, 8, 8, 8, 8, 16, 24],
    "class_token": [4, 4, 4, 4, 4, 4, 4, 4, 4, 16, 24],
    "experts": [3, 6, 6, 8],
    "dictionary": [8],
    # Halves that are treated differently keep apart.
    "half_relu": [4, 4],
    "half_reversed": [2, 2],
    "half_shifted": [4, 4],
    # What depends on the order of the units has no symmetry, or less.
    "flipped": [4],
    "ramp": [],
    "cumulative": [],
    "sorted_units": [],
    "rotary": [2, 8, 8, 16],
    "data_index": [],
    "written_through_view": [8],
    "lstm": [6, 7, 8],
    "gru": [6, 7, 8],
    "without_gradient": [8],
}


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return getattr(nets, name)()


@pytest.mark.parametrize("name", FOUND)
def test_groups_are_found_and_hold(name: str) -> None:
    net, example = built(name)
    flags = [m.training for m in net.modules()]
    before = weights(net)
    sym = symmetry.find(net, example)
    assert sorted(g.size for g in sym.groups.values()) == FOUND[name]
    assert sym.verify(net, example) < 1e-9
    assert equal(before, weights(net)), "the network must stay as it is"
    assert flags == [m.training for m in net.modules()]


@pytest.mark.parametrize("name", FOUND)
def test_it_is_a_group_acting(name: str) -> None:
    net, example = built(name)
    sym, theta = symmetry.find(net, example), weights(net)
    p, q = sym.random(shuffle(1)), sym.random(shuffle(2))
    moved = sym.permute(theta, p)
    assert equal(sym.permute(moved, sym.inverse(p)), theta)
    assert equal(sym.permute(moved, q), sym.permute(theta, sym.compose(p, q)))


@pytest.mark.parametrize("name", FOUND)
def test_places_of_an_axis_are_disjoint(name: str) -> None:
    net, example = built(name)
    sym, state = symmetry.find(net, example), net.state_dict()
    for nested in (False, True):
        taken: dict[tuple[str, int, int], list[int]] = {}
        for group in sym.groups.values():
            for at in group.places if bool(group.inner) == nested else ():
                assert at.index.shape[0] == group.size
                taken.setdefault((at.name, at.axis, len(at.axes)), []).extend(
                    at.index.ravel().tolist()
                )
        for (parameter, axis, span), positions in taken.items():
            assert len(positions) == len(set(positions))
            assert max(positions) < math.prod(state[parameter].shape[axis : axis + span])


@cache
def found(k: int) -> tuple[symmetry.Symmetry, Theta]:
    net, example = (
        (models.TinyTen(10, 3, width=4), (torch.rand(2, 3, 32, 32),)),
        (models.ResNet(20, width=4), (torch.rand(2, 3, 32, 32),)),
        built("encoder_prenorm"),
    )[k]
    return symmetry.find(net, example), weights(net)


@settings(max_examples=20)
@given(st.integers(0, 2), st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 2**31))
def test_laws_of_composition(k: int, a: int, b: int, c: int) -> None:
    sym, theta = found(k)
    p, q, r = (sym.random(shuffle(s)) for s in (a, b, c))
    left, right = sym.compose(sym.compose(p, q), r), sym.compose(p, sym.compose(q, r))
    assert equal(left, right)
    assert equal(sym.compose(p, sym.inverse(p)), sym.identity())
    assert equal(sym.compose(sym.inverse(p), p), sym.identity())
    in_turn = sym.permute(sym.permute(theta, p), q)
    assert equal(in_turn, sym.permute(theta, sym.compose(p, q)))
    assert equal(sym.permute(sym.permute(theta, p), sym.inverse(p)), theta)


@settings(max_examples=10)
@given(st.integers(0, 2), st.integers(0, 2**31))
def test_matrices_act_as_permutations_do(k: int, seed: int) -> None:
    sym, theta = found(k)
    p = sym.random(shuffle(seed))
    matrices = {n: torch.eye(len(v))[v] for n, v in p.items()}
    a, b = sym.permute(theta, p), sym.apply_matrices(theta, matrices)
    assert all(torch.allclose(a[n], b[n]) for n in a)


def test_matrices_are_differentiable() -> None:
    sym, theta = found(0)
    name, group = next(iter(sym.groups.items()))
    matrix = torch.full((group.size, group.size), 1 / group.size, requires_grad=True)
    moved = sym.apply_matrices(theta, {name: matrix})
    moved[group.places[0].name].square().sum().backward()
    assert matrix.grad is not None
    assert float(matrix.grad.abs().sum()) > 0


def test_a_partial_permutation_leaves_the_rest() -> None:
    sym, theta = found(0)
    name, group = next(iter(sym.groups.items()))
    moved = sym.permute(theta, {name: torch.arange(group.size).roll(1)})
    changed = {n for n in theta if not torch.equal(theta[n], moved[n])}
    assert changed
    assert changed <= {p.name for p in group.places}
    assert all(moved[n] is theta[n] for n in theta if n not in {p.name for p in group.places})


# The check can fail


@pytest.mark.parametrize("name", ["convnet", "attention", "norms", "zero_padding", "mixer"])
def test_leaving_out_a_place_changes_the_function(name: str) -> None:
    net, example = built(name)
    sym = symmetry.find(net, example)
    for key, group in sym.groups.items():
        for k in range(len(group.places)):
            rest = replace(group, places=group.places[:k] + group.places[k + 1 :])
            wrong = replace(sym, groups={**sym.groups, key: rest})
            assert wrong.verify(net, example, tolerance=math.inf) > 1e-6


def test_verify_names_the_wrong_group() -> None:
    net, example = built("mlp")
    sym = symmetry.find(net, example)
    group = sym.groups["3"]
    assert [p.name for p in group.places] == ["3.weight", "3.bias", "5.weight"]
    wrong = replace(sym, groups={**sym.groups, "3": replace(group, places=group.places[1:])})
    with pytest.raises(symmetry.SymmetryError, match=r"group '3' alone"):
        wrong.verify(net, example)


def test_verify_of_another_function_fails() -> None:
    net, example = built("attention")
    sym = symmetry.find(net, example)
    other = type(net)("ramp")
    with pytest.raises(symmetry.SymmetryError, match=r"allowed 1e-06"):
        sym.verify(other, example)


def test_verify_takes_parameters() -> None:
    net, example = built("convnet")
    sym, theta = symmetry.find(net, example), weights(net)
    assert sym.verify(net, example, theta) < 1e-12
    theta["0.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(symmetry.SymmetryError, match="differs by inf"):
        sym.verify(net, example, theta)


def test_verify_leaves_randomness_alone() -> None:
    net, example = built("convnet")
    sym = symmetry.find(net, example)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sym.verify(net, example)
    assert torch.equal(torch.rand(3), expected)


# Names, reasons, errors


def test_names_say_where_units_come_from() -> None:
    net = models.ResNet(20, width=4)
    names = list(symmetry.find(net, torch.rand(2, 3, 32, 32)).groups)
    assert names[:2] == ["stem.conv", "stages.0.0.first.conv"]
    assert names == list(symmetry.find(net, torch.rand(2, 3, 32, 32)).groups)


def test_heads_come_after_what_is_in_them() -> None:
    net, example = built("attention")
    sym = symmetry.find(net, example)
    names = list(sym.groups)
    assert names[-1] == "qkv[*]"
    assert sym.groups["qkv[*]"].inner == tuple((f"qkv[{h}]", f"qkv[{h + 3}]") for h in range(3))
    assert [p.index.shape for p in sym.groups["qkv[*]"].places] == [(3, 12), (3, 12), (3, 4)]


def test_channels_of_grouped_convolutions_move_alone_and_in_blocks() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    sym = symmetry.find(net, torch.rand(2, 3, 5, 5))
    assert sizes(sym) == {
        **{f"0[{k}]": 2 for k in range(4)},
        **{f"1[{k}]": 3 for k in range(4)},
        "0[*]": 4,
    }
    within = next(p for p in sym.groups["0[2]"].places if p.name == "1.weight")
    assert (within.axis, len(within.axes), within.index.shape) == (0, 2, (2, 3))
    assert sym.verify(net, torch.rand(2, 3, 5, 5)) < 1e-12


def test_tied_weights_move_together() -> None:
    net, example = built("language_model")
    sym = symmetry.find(net, example)
    (stream,) = (g for g in sym.groups.values() if g.size == 16)
    assert {"embed.weight", "head.weight"} <= {p.name for p in stream.places}


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("mlp", "1.weight", "axis 1: 12 stay: meets something fixed at 1 (Linear)"),
        ("mlp", "5.bias", "axis 0: 3 stay: reaches the output"),
        ("mlp", "3.weight", "axis 1: 8 positions of group '1' (8 units)"),
        ("convnet", "0.weight", "axis 2: 3 stay: kernel position at 0 (Conv2d)"),
        ("cumulative", "first.weight", "order along an axis matters at the network (Toy), nets.py"),
        ("data_index", "first.weight", "order along an axis matters at the network (Toy), nets.py"),
        ("flipped", "last.weight", "axis 1: 8 positions of group 'first' (4 units)"),
        ("ramp", "first.weight", "meets something fixed at the network (Ramp), nets.py:"),
        ("language_model", "place.weight", "meets something fixed at place (Embedding)"),
        ("mlp", "nonsense", "no floating-point entry of the state dict"),
    ],
)
def test_explain_says_why(name: str, parameter: str, reason: str) -> None:
    net, example = built(name)
    assert reason in symmetry.find(net, example).explain(parameter)


def test_what_is_not_used_is_pinned() -> None:
    net, x = nets.WithAuxiliary(), torch.rand(2, 4)
    assert "is not used in this mode" in symmetry.find(net, x).explain("side.0.weight")
    sym = symmetry.find(net, x, train=True)
    assert sorted(sizes(sym).values()) == [5, 6]
    assert sym.verify(net, x) < 1e-12
    assert sym.train


def test_control_flow_on_data_is_an_error() -> None:
    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(symmetry.SymmetryError) as caught:
        symmetry.find(Branch(3, 3), torch.rand(2, 3))
    text = str(caught.value)
    assert "_local_scalar_dense needs values at the network (Branch), test_symmetry.py:" in text
    assert "Fix: control flow must not depend on the data (torch.where instead of if)" in text


@pytest.mark.parametrize(
    ("perm", "text"),
    [
        ({"4": torch.arange(8)}, r"no group '4' in this symmetry; there are \['1', '3'\]"),
        ({"1": torch.arange(7)}, "group '1': expected 8 indices, got 7"),
        ({"1": torch.zeros(8, dtype=torch.long)}, "group '1': each of 0 … 7 must occur"),
        ({"1": torch.eye(8)}, "group '1': expected a 1-D integer index vector"),
    ],
)
def test_wrong_permutations_are_errors(perm: dict[str, Tensor], text: str) -> None:
    net, example = built("mlp")
    with pytest.raises(ValueError, match=text):
        symmetry.find(net, example).permute(weights(net), perm)


def test_wrong_parameters_are_errors() -> None:
    net, example = built("mlp")
    sym, theta = symmetry.find(net, example), weights(net)
    lacking = {n: t for n, t in theta.items() if n != "1.bias"}
    with pytest.raises(ValueError, match=r"the parameters lack '1\.bias'"):
        sym.permute(lacking, sym.random(shuffle(0)))
    with pytest.raises(ValueError, match=r"'1.bias' has shape \[5\], expected \[8\]"):
        sym.permute({**theta, "1.bias": torch.zeros(5)}, sym.random(shuffle(0)))


def test_rules_can_be_added() -> None:
    torch.library.define("mcnotes_tests::gate", "(Tensor x, Tensor y) -> Tensor")
    torch.library.impl("mcnotes_tests::gate", "CPU", lambda x, y: x * y.sigmoid())
    torch.library.register_fake("mcnotes_tests::gate", lambda x, y: torch.empty_like(x))
    net, x = nets.Gated(torch.ops.mcnotes_tests.gate), torch.rand(2, 4)
    before = symmetry.find(net, x)
    assert sizes(before) == {}
    reason = "mcnotes_tests::gate has no rule (use others, or see symmetry.RULES) at the network"
    assert reason in before.explain("first.weight")

    symmetry.RULES["mcnotes_tests::gate"] = lambda trace, x, y: x * y.sigmoid()
    after = symmetry.find(net, x)
    assert sizes(after) == {"first": 8}
    assert after.verify(net, x) < 1e-12


def test_the_number_of_copies() -> None:
    net, example = built("mlp")
    sym = symmetry.find(net, example)
    copies = math.factorial(8) * math.factorial(7)
    assert sym.log10_orbit() == pytest.approx(math.log10(copies), rel=1e-12)


def test_table() -> None:
    net, example = built("attention")
    sym = symmetry.find(net, example)
    rows = sym.table()
    assert [(r["group"], r["groups"], r["units"]) for r in rows] == [
        ("first", 1, 12),
        ("qkv", 6, 4),
        ("qkv[*]", 1, 3),
    ]
    lines = sym._repr_markdown_().split("\n")
    assert lines[0] == "| group | groups | units | acts on [axis] |"
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1


# Activations


TAPPED = [
    "mlp",
    "convnet",
    "zero_padding",
    "concatenation",
    "encoder",
    "norms",
    "attention_by_head",
]


@pytest.mark.parametrize("name", TAPPED)
@pytest.mark.parametrize("at", ["post", "pre"])
def test_taps_follow_permutations(name: str, at: Any) -> None:
    """Units of the permuted network are the units of the first one, in the new order."""
    net, example = built(name)
    sym, theta = symmetry.find(net, example), weights(net)
    p = {n: v for n, v in sym.random(shuffle(3)).items() if not sym.groups[n].inner}
    tap = sym.tapper(net, at)
    for batch in (2, 5):
        x = torch.rand(batch, *example[0].shape[1:])
        with torch.no_grad():
            first, second = tap(theta, x), tap(sym.permute(theta, p), x)
        assert first.keys() == sym.groups.keys()
        for group, acts in first.items():
            assert acts, f"{group} is seen nowhere"
            for a, b in zip(acts, second[group], strict=True):
                assert a.dim() == 2
                assert a.shape[1] == sym.groups[group].size
                if group in p:
                    agree(a[:, p[group]], b, terms(net), scale=10 * float(a.abs().max()))


def test_taps_are_what_the_layers_compute() -> None:
    net, example = built("convnet")
    sym, theta, x = symmetry.find(net, example), weights(net), torch.rand(3, 3, 10, 10)
    net.eval()
    with torch.no_grad():
        post, pre = (sym.tapper(net, at)(theta, x) for at in ("post", "pre"))  # type: ignore[arg-type]
        pooled, normed = net[:4](x), net[:2](x)
        hidden = net[:8](x)
    agree(post["0"][0], pooled.movedim(1, -1).reshape(-1, 8), terms(net))
    agree(pre["0"][0], normed.movedim(1, -1).reshape(-1, 8), terms(net))
    agree(pre["7"][0], hidden, terms(net))
    agree(post["7"][0], F.relu(hidden), terms(net), scale=float(hidden.abs().max()))


@pytest.mark.parametrize(
    ("name", "at", "hooks"),
    [
        ("mlp", "post", True),
        ("mlp", "pre", True),
        ("convnet", "post", True),
        ("convnet", "pre", False),  # written over in place
        ("shared_block", "post", True),
        ("encoder", "post", False),  # attention is one module
    ],
)
def test_hooks_keep_what_a_recorder_keeps(
    name: str, at: Literal["post", "pre"], hooks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, example = built(name)
    sym, theta = symmetry.find(net, example), weights(net)
    hooked = sym.tapper(net, at)(theta, *example)
    places = [p for g in sym.groups.values() for p in getattr(g, at)]
    reader = Reader(net, False, {p.name for p in places}, theta, example)
    assert bool(reader.spots) == hooks
    monkeypatch.setattr(Reader, "see", lambda *_: None)
    recorded = sym.tapper(net, at)(theta, *example)
    for group, acts in hooked.items():
        assert all(torch.equal(a, b) for a, b in zip(acts, recorded[group], strict=True))


def test_an_example_that_repeats_a_channel_says_nothing_of_other_inputs() -> None:
    net, grey = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)),
        torch.rand(2, 1, 9, 9),
    )
    sym = symmetry.find(net, grey.expand(-1, 3, -1, -1))
    assert same(sym, symmetry.find(net, torch.rand(2, 3, 9, 9)))
    assert sym.tapper(net)(weights(net), grey.expand(-1, 3, -1, -1)).keys() == sym.groups.keys()


def test_residual_streams_are_tapped_after_every_block() -> None:
    net = models.ResNet(20, width=4)
    sym = symmetry.find(net, torch.rand(2, 3, 32, 32))
    taps = {n: len(g.post) for n, g in sym.groups.items()}
    assert taps["stem.conv"] == 4
    assert taps["stages.1.0.second.conv"] == 3
    assert taps["stages.0.0.first.conv"] == 1


def test_taps_of_the_training_mode_are_those_of_evaluation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)
    )
    theta, x = weights(net), torch.rand(7, 4)
    taps = [symmetry.find(net, x, train=t).tapper(net)(theta, x)["0"][0] for t in (False, True)]
    agree(*taps, terms(net))


def test_channels_last_is_tapped_without_a_copy() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    sym, theta = symmetry.find(net, torch.rand(2, 3, 6, 6)), weights(net)
    x = torch.rand(5, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (act,) = sym.tapper(net)(theta, x)["0"]
    assert act.is_contiguous()
    assert act.untyped_storage().nbytes() == act.numel() * 4


def test_a_network_that_fixes_the_batch_size_is_tapped_all_the_same() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)) + torch.zeros(len(x), 1))

    net = Fixed()
    sym, theta = symmetry.find(net, torch.rand(2, 4)), weights(net)
    tap = sym.tapper(net)
    assert [tap(theta, torch.rand(n, 4))["a"][0].shape[0] for n in (2, 5, 3)] == [2, 5, 3]


def test_a_network_is_traced_once_for_each_form_of_its_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = []

    def discover(net: nn.Module, *rest: Any) -> Any:
        traced.append(net)
        return groups.discover(net, *rest)

    monkeypatch.setattr(sys.modules["mcnotes.symmetry.find"], "discover", discover)
    net, example = built("convnet")
    sym, theta = symmetry.find(net, example), weights(net)
    for x in (example[0], torch.rand(5, 3, 10, 10)):
        sym.tapper(net)(theta, x)
    assert len(traced) == 1
    for x in (
        torch.rand(n, 3, 10, 10).contiguous(memory_format=torch.channels_last) for n in (3, 4, 5)
    ):
        sym.tapper(net)(theta, x)
    assert len(traced) == 2
    other, _ = built("convnet")
    sym.tapper(other)(theta, example[0])
    assert traced == [net, net, other]


def test_a_network_rebuilt_in_place_is_found_again() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    old, x = symmetry.find(net, torch.rand(2, 4)), torch.rand(2, 4)
    net[0], net[2] = nn.Linear(4, 5), nn.Linear(5, 2)
    new = symmetry.find(net, x)
    assert new.tapper(net)(weights(net), x)["0"][0].shape == (2, 5)
    with pytest.raises(symmetry.SymmetryError, match="tapper: other groups"):
        old.tapper(net)(weights(net), x)


def test_another_network_cannot_be_tapped() -> None:
    net, example = built("convnet")
    sym = symmetry.find(net, example)
    with pytest.raises(symmetry.SymmetryError, match="tapper: other groups"):
        sym.tapper(nn.Sequential(nn.Conv2d(3, 3, 1)))(weights(net), *example)


# Networks and inputs


def test_nothing_stays_in_a_network_that_remembers() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.memory: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            scale = self.memory.setdefault("scale", self.a.bias.exp())
            return self.b(F.relu(self.a(x)) * scale)

    net = Remembers()
    sym = symmetry.find(net, torch.rand(2, 4))
    assert sizes(sym) == {"a": 6}
    assert sym.verify(net, torch.rand(2, 4)) < 1e-12
    assert net.memory == {}


def test_any_number_of_inputs_and_a_batch_of_one() -> None:
    net, (x, y) = built("decoder")
    sym = symmetry.find(net, (x[:1], y[:1]))
    assert sizes(sym) == sizes(symmetry.find(net, (x, y)))
    assert sym.verify(net, (x[:1], y[:1])) < 1e-12


@pytest.mark.parametrize("train", [False, True])
def test_googlenet_with_auxiliary_heads(train: bool) -> None:
    torch.manual_seed(0)
    net, x = models.GoogLeNet(10, 1, width=0.125), torch.rand(4, 1, 28, 28)
    sym = symmetry.find(net, x, train=train)
    assert sym.verify(net, x) < 1e-9
    covered = {p.name for g in sym.groups.values() for p in g.places}
    hidden = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    seen = {n.removesuffix(".weight") for n in covered}
    assert (hidden <= seen) or not train


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    net, example = built("convnet")
    sym = symmetry.find(net, example)
    theta = {n: t.cuda() for n, t in weights(net).items()}
    moved = sym.permute(theta, sym.random(shuffle(0)))
    assert all(t.is_cuda for t in moved.values())
    with torch.no_grad():
        acts = sym.tapper(net)(theta, example[0].cuda())
    assert all(a.is_cuda for v in acts.values() for a in v)


def test_positions_are_plain_integers() -> None:
    net, example = built("norms")
    for group in symmetry.find(net, example).groups.values():
        for at in group.places:
            assert isinstance(at.index, np.ndarray)
            assert at.index.dtype == np.int64
