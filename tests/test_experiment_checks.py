"""An experiment that cannot be is refused before anything is loaded or trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcnotes import cache, checks, train
from mcnotes.lab import Experiment, parameters
from tools import chapters, notebooks, presets

NAN, INF = float("nan"), float("inf")
NO_TEXT = [None, 3, True, [], ["cpu"], {}]
NO_WHOLE = [None, "3", "1e3", 2.5, 2.0, NAN, INF, -1, True, False, [3], {}]
NO_NUMBER = [None, "0.1", "1e-3", NAN, INF, -INF, -1, -0.5, True, False, [0.1], {}, 10**400]
NO_FLAG = [None, 0, 1, "true", "no", NAN, []]

# Of every field: what it cannot be, and words of the text that says so.
WRONG: dict[str, tuple[list[Any], str]] = {
    "dataset": ([*NO_TEXT, "cifar", "CIFAR10", "../cifar10"], "expected one of fashion-mnist"),
    "network": ([*NO_TEXT, "tiny", "resnet21", "", "TinyTen"], "expected one of mlp, tinyten"),
    "width": ([*NO_NUMBER, 0, 8.5], "expected a (whole )?number"),
    "epochs": ([*NO_WHOLE, 0], "expected a whole number of at least 1"),
    "curve_epochs": ([*NO_WHOLE, 0], "expected a whole number of at least 1"),
    "batch_size": ([*NO_WHOLE, 0], "expected a whole number of at least 1"),
    "lr": ([*NO_NUMBER, 0, 0.0], "expected a number above 0"),
    "schedule": ([*NO_TEXT, "Paper", "cosine", ""], "expected one of paper, linear, robust"),
    "augment": (NO_FLAG, "expected True or False"),
    "precision": ([*NO_TEXT, "float64", "bf16"], "expected one of float32, bfloat16, auto"),
    "compile": (NO_FLAG, "expected True or False"),
    "validation": (NO_WHOLE[1:], "expected a whole number of at least 0.*, or None"),
    "points": ([*NO_WHOLE, 0, 1], "expected a whole number of at least 2"),
    "statistics": ([*NO_WHOLE, 0, 1], "expected a whole number of at least 2"),
    "match_images": ([*NO_WHOLE, 0, 1], "expected a whole number of at least 2"),
    "device": ([*NO_TEXT, "tpu", "gpu", "CUDA", ""], "expected one of auto, cpu, cuda"),
    "epsilon": ([*NO_NUMBER, 8, 1.01], "expected a number of at least 0 and at most 1"),
    "attack_steps": ([*NO_WHOLE, 0], "expected a whole number of at least 1"),
    "attack_step": ([*NO_NUMBER, 2], "expected a number of at least 0 and at most 1"),
    "between": (
        [3, "robust", [], (), (Experiment(),), (Experiment(), 1), [Experiment(), Experiment()]],
        "expected a tuple of two experiments",
    ),
    "pam_options": (
        [
            None,
            3,
            "paper",
            [],
            {"epochs": 3},
            {"p_epoch": 3},
            {"p_epochs": 0},
            {"p_lr": NAN},
            {"nu": "1e3"},
            {"nu": 0},
            {"nu_phi": -1.0},
            {"samples": -1},
            {"images": 2.5},
            {"probe": 0},
            {"nodes": True},
            {"follow": 1},
            {"relaxation": "exakt"},
            {3: 3},
        ],
        "expected|did you mean|there are",
    ),
}


def test_the_table_knows_every_field() -> None:
    names = {f.name for f in fields(Experiment)}
    assert names == WRONG.keys()
    assert names - parameters.ALLOWED.keys() == {"between"}, "which only an experiment can check"


@pytest.mark.parametrize("name", WRONG)
def test_what_a_field_cannot_be_is_named(name: str) -> None:
    values, says = WRONG[name]
    for value in values:
        with pytest.raises(ValueError, match=rf"^parameters: {name}: .*({says})") as caught:
            replace(Experiment(), **{name: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        with pytest.raises(ValueError, match=name):
            Experiment.of({name: value})


def test_the_text_says_what_was_got_and_what_is_near() -> None:
    cases = {
        ("network", "tiny"): "got 'tiny'.*did you mean 'tinyten'",
        ("device", "tpu"): "got 'tpu'.*did you mean 'cpu'",
        ("lr", NAN): "got nan, expected a number above 0",
        ("lr", "1e-3"): "got '1e-3'.*it is text: YAML reads .* 1.0e-3, not 1e-3",
        ("epochs", 2.5): "got 2.5, expected a whole number of at least 1$",
        ("pam_options", '{"sample": 3}'): "got name 'sample'; did you mean 'samples'",
    }
    for (name, value), says in cases.items():
        given = json.loads(value) if name == "pam_options" else value
        with pytest.raises(ValueError, match=f"{name}: {says}"):
            Experiment(**{name: given})
    with pytest.raises(ValueError, match=r"width: got 0, .*; points: got 1, "):
        Experiment(width=0, points=1)  # all that is wrong, at once


def test_what_is_possible_is_taken() -> None:
    for name, values in {
        "width": [1, 8.0, 64],
        "lr": [1e-6, 1, 3],
        "validation": [None, 0, 7],
        "points": [2],
        "statistics": [2],
        "match_images": [2],
        "epsilon": [0, 8 / 255, 1],
        "attack_step": [0.01],
        "pam_options": [{}, {"p_lr": 1, "samples": 0}, {"relaxation": "straight-through"}],
    }.items():
        for value in values:
            replace(Experiment(), **{name: value})
    assert Experiment(network="googlenet", width=0.25).width == 0.25
    with pytest.raises(ValueError, match=r"width: got 0.25, expected a whole number for resnet20"):
        Experiment(network="resnet20", width=0.25)


def test_ends_of_another_form_are_refused() -> None:
    Experiment(between=(Experiment(), Experiment(epsilon=0.1)))
    for other in (Experiment(width=4), Experiment(network="resnet20")):
        with pytest.raises(ValueError, match=r"between: got .* expected tinyten of width 8"):
            Experiment(between=(Experiment(), other))


def test_a_class_that_knows_more_networks_has_rules_of_its_own() -> None:
    @dataclass(frozen=True)
    class Lab(Experiment):
        rules = Experiment.rules | {"network": checks.one_of(["transformer"])}

    assert Lab(network="transformer", between=(Lab(network="transformer"),) * 2).width == 8
    with pytest.raises(ValueError, match="network: got 'tinyten', expected one of transformer"):
        Lab()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("pairs", [], "a list of one value or more"),
        ("pairs", None, "a list of one value or more"),
        ("pairs", 3, "a list of one value or more"),
        ("pairs", [1, 2], r"got 1, expected a pair of seeds"),
        ("pairs", [[1]], r"got \[1\], expected a pair of seeds"),
        ("pairs", [[1, 2, 3]], r"got \[1, 2, 3\], expected a pair of seeds"),
        ("pairs", [[1, 2], [3, 3]], r"got \[3, 3\], expected two different seeds"),
        ("pairs", [[1, 2], [1, 2]], r"expected \[1, 2\] only once"),
        ("pairs", [[1, 2], [3, 4], [2, 1]], "every two networks once"),
        ("pairs", [[1, -2]], "expected a pair of seeds"),
        ("pairs", [[1, 2.0]], "expected a pair of seeds"),
        ("pairs", [[True, 2]], "expected a pair of seeds"),
        ("pairs", [["1", "2"]], "expected a pair of seeds"),
        ("seed", -1, "a whole number from 0 to 4294967295"),
        ("seed", 1.5, "a whole number from 0 to 4294967295"),
        ("a", 2**32, "a whole number from 0 to 4294967295"),
        ("method", "alined", "did you mean 'aligned'"),
        ("methods", ["aligned", "aligned"], "'aligned' only once"),
        ("shapes", ["spline"], "expected one of line, bezier, chain"),
        ("budgets", [1, 0], "got 0, expected a whole number of at least 1"),
        ("deep", [], "a list of one value or more"),
        ("forks", [1, 2.5], "got 2.5"),
        ("draws", "1000", "got '1000'"),
        ("test_images", 0, "at least 1"),
        ("std", [0.3, 0.0], "above 0"),
    ],
)
def test_a_chapters_further_parameters_are_checked_too(name: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"parameters: {name}: .*{says}"):
        Experiment.of({name: value}, also=[name])


def test_a_field_may_be_the_chapters_own() -> None:
    """Chapter 10 takes a folder of the user's for a data set."""
    names = {"dataset": "some/folder", "epochs": 3}
    assert Experiment.of(names, also=["dataset"]) == Experiment(epochs=3)


def test_every_parameter_of_the_book_has_a_rule() -> None:
    """But for names and files, and what chapter 10 checks itself."""
    free = {"folder", "factory", "factory_arguments", "checkpoint_a", "checkpoint_b", "prefix"}
    free |= {"loss", "metrics"}
    for path in [*chapters.chapters(), *presets.ROOT.glob("experiments/*.ipynb")]:
        known = notebooks.parameters(notebooks.read(path))
        assert known.keys() - parameters.ALLOWED.keys() <= free | {"output", "preset", "out"}
        faults = checks.faults(known, parameters.ALLOWED)
        assert not faults, f"{path.name}: {faults}"


def few(folder: Path, images: int) -> None:
    """A data set of so many training images, in the form of fashion-mnist-small."""
    draw = np.random.default_rng(0)
    arrays = {"class_names": np.array([f"class {i}" for i in range(10)])}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = draw.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(images) % 10
    np.savez(folder / "fashion-mnist-small.npz", **arrays)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"statistics": 31}, "statistics: got 31, expected at most 30"),
        ({"match_images": 40}, "match_images: got 40, expected at most 30"),
        ({"validation": 40}, "validation"),
        ({"validation": 41}, "validation"),
        ({"pam_options": {"images": 31}}, "pam_options: images: got 31, expected at most 30"),
        ({"pam_options": {"probe": 99}}, "pam_options: probe: got 99"),
    ],
)
def test_more_images_than_there_are_is_refused_before_training(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(tmp_path, 40)
    monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(train, "fit", None)
    given: dict[str, Any] = {"validation": 10, "statistics": 30, "match_images": 30}
    assert len(Experiment(**given).task.train) == 30
    with pytest.raises(ValueError, match=says):
        Experiment(**given | changes).path(1, 2, "aligned")
    with pytest.raises(ValueError, match=says):
        Experiment(**given | changes).check_size(40)


# SHA-256 of all keys of the presets' entries, as they were when PAM went by the schedule's name.
# Those with augmentation changed: BatchNorm's statistics and PAM's objective became those of
# augmented images.
KEYS = {
    "laptop": "5b2926e9201fc59b",
    "laptop-cifar10": "cf1d9a0fdbb5c955",
    "laptop-resnet20": "76241a7442f77b04",
    "paper-googlenet-cifar10": "2b69f1e8fb03c16c",
    "paper-googlenet-cifar100": "057af028e59b0ad1",
    "paper-googlenet-tiny-imagenet": "ddef78d26487af49",
    "paper-resnet32-cifar10": "9c787d85a804b40c",
    "paper-resnet32-cifar100": "8b352d0376e57301",
    "paper-resnet32-tiny-imagenet": "c5ae0fb5b3f1e300",
    "paper-tinyten-cifar10": "f6018efeb8feb434",
    "paper-tinyten-cifar100": "dd67283760233625",
    "paper-tinyten-tiny-imagenet": "efa9d254b1cb19c9",
    "smoke": "bfbb5de7898def85",
}


@pytest.mark.parametrize("preset", KEYS)
def test_entries_keep_their_keys(preset: str) -> None:
    lab = Experiment.of(presets.load(preset), also=["pairs"])
    configs = [lab.config(), lab.endpoint_config(1)]
    for method in ("unaligned", "aligned", "pam-unaligned", "pam-aligned"):
        for shape in ("line", "bezier", "chain"):
            configs.append(lab.curve_config(1, 2, method, shape))
            configs.append(lab.path_config(1, 2, method, shape))
    keys = json.dumps([cache.key(config) for config in configs])
    assert hashlib.sha256(keys.encode()).hexdigest()[:16] == KEYS[preset]


def test_pam_does_not_go_by_the_name_of_the_schedule() -> None:
    linear = Experiment(schedule="linear", pam_options={"p_lr": 0.05, "follow": False})
    other = replace(linear, schedule="paper")
    assert linear.pam_settings() == other.pam_settings()
    assert (linear.pam_settings().p_lr, linear.pam_settings().samples) == (0.05, 12)
    names = {cache.key(lab.config()) for lab in (linear, other, Experiment(), replace(other, lr=1))}
    assert len(names) == 4
    one, two = (Experiment(schedule="paper", pam_options=o) for o in ({}, {"samples": 32}))
    assert one.config() != two.config()
    same = Experiment(pam_options={"samples": 12})
    assert same.config() == Experiment().config(), "what changes nothing names nothing else"


@pytest.mark.parametrize("network", ["vit", "vit-layernorm"])
def test_heads_share_the_width(network: str) -> None:
    with pytest.raises(ValueError, match="width: got 30, expected a multiple of 4, its heads"):
        Experiment(network=network, width=30)
    assert Experiment(network=network, width=32).width == 32
