"""Matching by all symmetries: what was planted is found again, and barriers do not rise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from small import SHORT, agree, task, terms, trained
from torch import Tensor, nn

from mcnotes import curves, evaluate, matching, symmetry, train
from mcnotes.curves import Theta
from mcnotes.matching import Learn, Pair
from mcnotes.matching import bases as module
from mcnotes.symmetry import KINDS, Bases

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}


def llama() -> tuple[nn.Module, Tensor]:
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **SIZES)
    return transformers.LlamaForCausalLM(config), torch.randint(20, (2, 5))


def vit() -> tuple[nn.Module, Tensor]:
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
    return transformers.ViTForImageClassification(config), torch.rand(2, 3, 8, 8)


def tanh() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers), torch.rand(4, 6)


def relu() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.LeakyReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers), torch.rand(4, 6)


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3)), torch.rand(4, 6)


def planted(make: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[Pair, Bases, Tensor]:
    """A network whose gains and biases are no longer fresh, and a transformed copy."""
    torch.manual_seed(0)
    net, x = make()
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    found = symmetry.find(net, x, kinds=KINDS)
    theta = {n: t.double() for n, t in net.state_dict().items()}
    copy = found.transform(theta, found.random(torch.Generator().manual_seed(1)))
    return Pair(net.double(), found.permutations, theta, copy), found, x


def outputs(net: nn.Module, theta: Theta, x: Tensor) -> Tensor:
    own = next(t for t in theta.values() if t.is_floating_point())
    x = x.to(own.dtype) if x.is_floating_point() else x
    found = torch.func.functional_call(net, theta, (x,))
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("make", [llama, vit, tanh, relu, linear])
def test_what_was_planted_is_found_again(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """Not the element itself, for there may be others, but the parameters."""
    pair, found, x = planted(make)
    result = matching.match_bases(pair, found)
    assert result.before > 0.5
    assert result.after < 1e-6
    expected = outputs(pair.net, pair.theta_a, x)
    for theta in (result.theta_a, result.theta_b):
        # Models of `transformers` compute norms and positions in float32, whatever they are given.
        agree(outputs(pair.net, theta, x), expected, terms(pair.net))


@pytest.mark.parametrize("make", [llama, vit, tanh, relu, linear])
def test_networks_of_their_own_keep_their_functions(make: Any) -> None:
    """Two networks that have nothing in common come closer, and neither changes its function."""
    pair, found, x = planted(make)
    generator = torch.Generator().manual_seed(3)
    theta_b = {
        n: t * (0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64))
        if t.is_floating_point()
        else t
        for n, t in pair.theta_b.items()
    }
    result = matching.match_bases(Pair(pair.net, pair.sym, pair.theta_a, theta_b), found, rounds=3)
    assert result.after < result.before
    for theta, given in ((result.theta_a, pair.theta_a), (result.theta_b, theta_b)):
        agree(outputs(pair.net, theta, x), outputs(pair.net, given, x), terms(pair.net))


# Networks that were trained apart


class Stream(nn.Module):
    """A residual stream that is read through RMSNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(144, 12), nn.Linear(12, 3)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.norms = nn.ModuleList([nn.RMSNorm(12), nn.RMSNorm(12)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = x + self.down(self.up(self.norms[0](x)).relu())
        logits: Tensor = self.last(self.norms[1](x))
        return logits


def middle(net: nn.Module, a: Theta, b: Theta, data: Any) -> float:
    return evaluate.score(net, curves.line(a, b)(0.5), data).loss


def test_the_line_after_matching_and_after_learning() -> None:
    net, data = Stream(), task()
    a, b = (train.fit(net, data, SHORT, seed=seed).theta for seed in (1, 2))
    found = symmetry.find(net, data.example, kinds=KINDS)
    assert {f.kind for f in found.factors.values()} == {"rotations", "scales"}
    pair = Pair(net, found.permutations, a, b)
    by_weights = matching.match_bases(pair, found)
    how = Learn(epochs=15, lr=0.02, batch_size=16)
    learned = matching.match_bases(pair, found, data.train, how)
    before, after, best = (
        middle(net, one, two, data.train)
        for one, two in [
            (a, b),
            (by_weights.theta_a, by_weights.theta_b),
            (learned.theta_a, learned.theta_b),
        ]
    )
    assert after < before
    assert best < after
    for theta, given in ((learned.theta_a, a), (learned.theta_b, b)):
        images = data.test.batches(60)
        x, _ = next(iter(images))
        agree(outputs(net, theta, x), outputs(net, given, x), terms(net))
    assert len(learned.losses) == 15
    assert "loss" in repr(learned)


@pytest.mark.parametrize(("along", "moves"), [(False, True), (True, False)])
def test_learning_looks_where_it_is_told(along: bool, moves: bool) -> None:
    """At t = 0 there is nothing of B, so that a step there moves nothing."""
    net, data = Stream(), task()
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    found = symmetry.find(net, data.example, kinds=KINDS)
    pair, how = Pair(net, found.permutations, a, b), Learn(along=along)
    step = module.GroupStep(pair, found, curves.line(a, b), how, data.device, train.cost)
    x, y = next(iter(data.train.batches(60)))
    step(x, y, torch.tensor([1.0, 0.0]), how.lr)
    assert any(bool(log.any()) for log in step.logs.values()) is moves


def test_learning_along_the_line_lowers_all_of_it() -> None:
    net, data = Stream(), task()
    a, b = (train.fit(net, data, SHORT, seed=seed).theta for seed in (1, 2))
    found = symmetry.find(net, data.example, kinds=KINDS)
    pair, how = Pair(net, found.permutations, a, b), Learn(15, 0.02, 16, along=True)
    results = matching.match_bases(pair, found), matching.match_bases(pair, found, data.train, how)
    lines = [
        evaluate.profile(
            net, curves.line(m.theta_a, m.theta_b), data.train, statistics=None, points=5
        )
        for m in results
    ]
    assert lines[1].loss[1:-1].mean() < lines[0].loss[1:-1].mean()
    agree(lines[1].loss[[0, -1]], lines[0].loss[[0, -1]], terms(net))


def test_permutations_alone_are_learned_too() -> None:
    """A copy in another order: what acts in the end is a permutation."""
    net, data, (theta, *_), _ = trained()
    found = symmetry.find(net, data.example, kinds=("permutations",))
    copy = found.transform(theta, found.random(torch.Generator().manual_seed(5)))
    pair = Pair(net, found.permutations, theta, copy)
    result = matching.match_bases(pair, found, data.train, Learn(epochs=1, batch_size=16))
    assert result.after < 1e-6  # weights have found it, and learning has kept it


def test_what_cannot_be_matched_is_refused() -> None:
    pair, found, _ = planted(tanh)
    broken = pair.theta_b | {"0.weight": pair.theta_b["0.weight"] * float("nan")}
    with pytest.raises(matching.AlignmentError, match="NaN"):
        matching.match_bases(Pair(pair.net, pair.sym, pair.theta_a, broken), found)
    for images in (None, task().train.first(0)):
        with pytest.raises(ValueError, match="images"):
            matching.match_bases(pair, found, images, Learn())


def test_balancing_gives_one_gauge() -> None:
    """Whatever acted: scales and bases leave no trace but rotations."""
    pair, found, _ = planted(linear)
    one, two = (module.balanced(found, x) for x in (pair.theta_a, pair.theta_b))
    for name in ("0.weight", "1.weight", "2.weight"):
        agree(
            torch.linalg.svdvals(two[name]),
            torch.linalg.svdvals(one[name]),
            100,
            dtype=torch.float32,
        )
