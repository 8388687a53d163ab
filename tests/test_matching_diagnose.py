"""Diagnosis: healthy pairs give nothing, and every planted fault is found by its name."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch
from torch import nn

from mcnotes import data, matching, models, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Split, Task
from mcnotes.lab import Experiment, frames
from mcnotes.matching import Finding, Pair
from mcnotes.symmetry import Perm

IMAGES = 1_000


@cache
def lab(width: int = 48, network: str = "mlp") -> Experiment:
    """Multilayer perceptrons are trained here, in a second; TinyTen lies in the zoo."""
    plain = network == "mlp"
    return Experiment(network=network, width=width, epochs=12, lr=0.05 if plain else 0.1)


@cache
def end(seed: int, width: int = 48, network: str = "mlp", epochs: int = 12) -> Theta:
    one = lab(width, network)
    if network == "tinyten":
        return one.endpoint(seed)
    return train.fit(one.net, one.task, one.recipe(epochs), seed=seed).theta


def diagnosed(
    a: Theta, b: Theta, width: int = 48, network: str = "mlp", perm: Perm | None = None
) -> dict[str, Finding]:
    one = lab(width, network)
    images = IMAGES if network == "mlp" else IMAGES // 2
    found = matching.diagnose(Pair(one.net, one.sym, a, b), one.task, perm=perm, images=images)
    return {finding.fault: finding for finding in found}


def matched(a: Theta, b: Theta) -> Perm:
    one = lab()
    return matching.match(Pair(one.net, one.sym, a, b), one.task.train.first(IMAGES)).perm


# --- Nothing where nothing is wrong ------------------------------------------------------------


@pytest.mark.parametrize(("network", "width"), [("mlp", 48), ("tinyten", 8)])
def test_a_healthy_pair_gives_no_finding(network: str, width: int) -> None:
    a, b = (end(seed, width, network) for seed in (1, 2))
    assert diagnosed(a, b, width, network) == {}


def test_the_right_permutation_gives_no_finding() -> None:
    a, b = end(1), end(2)
    assert diagnosed(a, b, perm=matched(a, b)) == {}


def test_every_rule_is_measured_and_harmless_findings_are_shown_on_request() -> None:
    one, a, b = lab(), end(1), end(2)
    pair, perm = Pair(one.net, one.sym, a, b), matched(a, b)
    found = matching.diagnose(pair, one.task, perm=perm, images=IMAGES, every=True)
    assert {f.fault for f in found} == matching.FAULTS.keys()
    assert not any(f.serious for f in found)
    assert all("{" not in f.text for f in found)


# --- Faults of one network ---------------------------------------------------------------------


def relearnt(change: Callable[[Split], Split]) -> Theta:
    """A network trained on changed images or labels."""
    one = lab()
    task = replace(one.task, train=change(one.task.train))
    return train.fit(one.net, task, one.recipe(12), seed=2).theta


def test_inverted_images_are_named() -> None:
    theta = relearnt(lambda s: Split(255 - s.images, s.labels))
    found = diagnosed(end(1), theta)
    assert {"inputs"} <= found.keys() <= matching.ENDS, "and nothing about the pair"
    assert "B is" in found["inputs"].text
    assert "inverted" in found["inputs"].text


def test_images_from_0_to_255_are_named() -> None:
    theta = dict(end(2))
    # The same function of images from 0 to 255: normalise(x) = (x - 0.5)/0.25 comes first.
    w = theta["hidden.0.weight"]
    theta["hidden.0.bias"] = theta["hidden.0.bias"] + (2 / 255 - 2) * w.sum(1)
    theta["hidden.0.weight"] = w / 255
    found = diagnosed(end(1), theta)
    assert "from 0 to 255" in found["inputs"].text


@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [0, 3, 2, 1, 4, 5, 6, 7, 8, 9]])
def test_classes_in_another_order_are_named(order: list[int]) -> None:
    theta = dict(end(2))
    theta |= {n: theta[n][order] for n in ("head.weight", "head.bias")}
    found = diagnosed(theta, end(1))
    assert "labels" in found
    assert found["labels"].text.startswith("A is")


def test_stale_statistics_are_named() -> None:
    theta = dict(end(2, 8, "tinyten"))
    fresh = lab(8, "tinyten").net.state_dict()
    theta |= {n: fresh[n] for n in theta if "running" in n}
    assert diagnosed(end(1, 8, "tinyten"), theta, 8, "tinyten").keys() == {"statistics"}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_broken_network_is_named(value: float) -> None:
    theta = end(2) | {"head.weight": torch.full_like(end(2)["head.weight"], value)}
    found = diagnosed(end(1), theta)
    assert {"broken"} <= found.keys() <= {*matching.ENDS, "statistics"}
    assert found["broken"].text.startswith("B is")


def test_a_network_that_still_learns_is_named() -> None:
    found = diagnosed(end(1), end(2, epochs=1))
    assert "under-trained" in found
    assert found["under-trained"].text.startswith("B's")


# --- Faults of the pair ------------------------------------------------------------------------


def test_one_network_twice_is_named() -> None:
    shuffle = lab().sym.random(torch.Generator().manual_seed(0))
    assert diagnosed(end(1), lab().sym.permute(end(1), shuffle)).keys() == {"same"}


def test_a_fine_tuned_copy_is_named() -> None:
    one = lab()
    theta = train.fit(one.net, one.task, one.recipe(2), seed=7, init=end(1)).theta
    assert diagnosed(end(1), theta).keys() == {"copy"}


def test_dead_units_are_named() -> None:
    one = lab()
    start = {n: x.clone() for n, x in train.initialise(one.net, 3).items()}
    for name in ("hidden.0.bias", "hidden.1.bias"):
        start[name][:30] = -50.0  # they never speak, and never learn
    theta = train.fit(one.net, one.task, one.recipe(12), seed=3, init=start).theta
    found = diagnosed(end(1), theta)
    assert "dead" in found
    assert found["dead"].number >= 60 / 192


def apart() -> tuple[nn.Module, Task, Theta, Theta]:
    """A looks at the upper half of noisy images, B at the lower; each half shows the class."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(1_000) % 2
    noise = torch.randint(20, 200, (1_000, 1, 12, 12), generator=g)
    split = Split((noise + 14 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, 2))
    ends = []
    for half in (0, 72):
        theta = {n: torch.zeros_like(x) for n, x in net.state_dict().items()}
        for unit in range(24):  # three pixels each; the class is in the sum of all
            theta["1.weight"][unit, half + 3 * unit : half + 3 * unit + 3] = 1 / 3
        theta["3.weight"][1], theta["3.bias"][1] = 3.0, -3 * 24 * 117 / 255
        ends.append(theta)
    return net, Task("halves", split, split, split, ("dark", "light")), *ends


def test_networks_that_look_at_different_things_are_named_weak() -> None:
    net, task, a, b = apart()
    pair = Pair(net, symmetry.find(net, task.example), a, b)
    found = matching.diagnose(pair, task)
    assert "weak" in {f.fault for f in found} <= {"weak", "under-trained"}


def test_narrow_layers_are_named() -> None:
    a, b = (end(seed, 2, "tinyten") for seed in (1, 2))
    assert {"narrow"} <= diagnosed(a, b, 2, "tinyten").keys() <= {"narrow", "weak"}


def deep() -> tuple[nn.Module, Task, Theta, Theta]:
    task, net = data.load("fashion-mnist-small"), models.MLP(10, 784, hidden=(64,) * 6)
    recipe = train.Recipe(10, lr=0.05, schedule="linear", augment=False)
    a, b = (train.fit(net, task, recipe, seed=s).theta for s in (1, 2))
    return net, task, a, b


def test_units_that_hardly_vary_half_way_are_named() -> None:
    net, task, a, b = deep()
    sym = symmetry.find(net, task.example)
    found = matching.diagnose(Pair(net, sym, a, b), task, images=IMAGES)
    assert {f.fault for f in found} == {"collapse"}


# --- Faults of the permutation -----------------------------------------------------------------


def test_the_inverse_permutation_is_named() -> None:
    perm = matched(end(1), end(2))
    found = diagnosed(end(1), end(2), perm=lab().sym.inverse(perm))
    assert found.keys() == {"direction", "permutation"}


def test_a_permutation_that_was_not_applied_is_named() -> None:
    assert diagnosed(end(1), end(2), perm=lab().sym.identity()).keys() == {"permutation"}


# --- The report --------------------------------------------------------------------------------


def test_the_report_is_a_table_of_the_findings() -> None:
    found = Finding("weak", 0.1, "matched units correlate by 0.10")
    text = frames.findings([found]).data
    assert f"| weak | 0.1 | matched units correlate by 0.10 | {found.fix} |" in text
    assert str(found) == f"weak: matched units correlate by 0.10. Fix: {found.fix}."
    assert "nothing" in frames.findings([]).data


@pytest.mark.parametrize(("side", "worse"), [("above", 0.3), ("below", 0.1)])
def test_a_fault_lies_on_its_side_of_the_limit(
    side: Literal["above", "below"], worse: float
) -> None:
    rule = matching.Fault(side, 0.2, "", "")
    assert rule.holds(worse)
    assert not rule.holds(0.2)
    assert not rule.holds(0.4 - worse)
    assert rule.holds(float("nan")), "what cannot be measured is not healthy"
