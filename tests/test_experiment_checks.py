"""An experiment that cannot be is refused before anything is loaded or trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcnotes import attacks, cache, checks, data, train
from mcnotes.lab import Experiment, parameters, prose
from tools import chapters, notebooks, presets

NAN, INF = float("nan"), float("inf")
NO_TEXT = [None, 3, True, [], ["cpu"], {}]
NO_WHOLE = [None, "3", "1e3", 2.5, 2.0, NAN, INF, -1, True, False, [3], {}]
NO_NUMBER = [None, "0.1", "1e-3", NAN, INF, -INF, -1, -0.5, True, False, [0.1], {}, 10**400]
TOO_MANY = [2**31, 10**30, 10**400, 10**5000]  # of the last Python prints no digits
MANY = "expected a whole number (of at least {0}|from {0} to 2147483647)"
EPOCHS = "expected a whole number (of at least 1|from 1 to 1000000)"
NO_FLAG = [None, 0, 1, "true", "no", NAN, []]

# Of every field: what it cannot be, and words of the text that says so.
WRONG: dict[str, tuple[list[Any], str]] = {
    "dataset": ([*NO_TEXT, "cifar", "CIFAR10", "../cifar10"], "expected one of fashion-mnist"),
    "network": ([*NO_TEXT, "tiny", "resnet21", "", "TinyTen"], "expected one of mlp, tinyten"),
    "width": ([*NO_NUMBER, 0, 8.5, 65_537, 1e30, 1e300], "expected a (whole )?number"),
    "epochs": ([*NO_WHOLE, 0, 1_000_001, *TOO_MANY], EPOCHS),
    "curve_epochs": ([*NO_WHOLE, 0, 1_000_001, *TOO_MANY], EPOCHS),
    "batch_size": ([*NO_WHOLE, 0, *TOO_MANY], MANY.format(1)),
    "lr": ([*NO_NUMBER, 0, 0.0, 1e39, 1e308, 10**5000], "expected a number above 0"),
    "schedule": ([*NO_TEXT, "Paper", "cosine", ""], "expected one of paper, linear, robust"),
    "augment": (NO_FLAG, "expected True or False"),
    "precision": ([*NO_TEXT, "float64", "bf16"], "expected one of float32, bfloat16, auto"),
    "compile": (NO_FLAG, "expected True or False"),
    "validation": ([*NO_WHOLE[1:], *TOO_MANY], MANY.format(0) + ".*, or None"),
    "points": (
        [*NO_WHOLE, 0, 1, 1_000_001, 10**10, *TOO_MANY],
        "expected a whole number (of at least 2|from 2 to 1000000)",
    ),
    "statistics": ([*NO_WHOLE, 0, 1, *TOO_MANY], MANY.format(2)),
    "match_images": ([*NO_WHOLE, 0, 1, *TOO_MANY], MANY.format(2)),
    "device": ([*NO_TEXT, "tpu", "gpu", "CUDA", ""], "expected one of auto, cpu, cuda"),
    "epsilon": ([*NO_NUMBER, 8, 1.01], "expected a number of at least 0 and at most 1"),
    "attack_steps": ([*NO_WHOLE, 0, 10**4000, *TOO_MANY], MANY.format(1)),
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
            {"nu_phi": 1e-300},
            {"nu": 1e300},
            {"p_lr": 1e308},
            {"p_epochs": 10**400},
            {"probe": 10**5000},
            {"nodes": 2**31},
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
    one = Experiment(device="cpu")
    replace(one, between=(one, replace(one, epsilon=0.1)))
    replace(one, between=(one, replace(one, dataset="fashion-mnist")))  # the same form of images
    for change in (
        {"width": 4},
        {"network": "resnet20"},
        {"dataset": "cifar10"},
        {"dataset": "tiny-imagenet"},
        {"device": "cuda"},
    ):
        other, says = replace(one, **change), "between: got .* expected tinyten of width 8 for 1 x"
        for ends in ((one, other), (other, one), (other, other)):
            with pytest.raises(ValueError, match=says):
                replace(one, between=ends)
    grey = replace(one, dataset="cifar10")
    with pytest.raises(ValueError, match=r"100 classes on cpu, expected .* 10 classes on cpu"):
        replace(grey, between=(grey, replace(one, dataset="cifar100")))


def test_the_forms_of_the_data_sets_are_what_their_files_hold() -> None:
    task = Experiment(device="cpu").task
    _, *shape = task.example.shape
    assert data.SOURCES[task.name].form == (task.num_classes, *shape[:2])
    assert shape[1] == shape[2]


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
        ("seed", -1, "a whole number of at least 0"),
        ("seed", 1.5, "a whole number of at least 0"),
        ("seed", 2**60, "a whole number from 0 to 4294967295"),
        ("a", 2**32, "a whole number from 0 to 4294967295"),
        ("method", "alined", "did you mean 'aligned'"),
        ("methods", ["aligned", "aligned"], "'aligned' only once"),
        ("shapes", ["spline"], "expected one of line, bezier, chain"),
        ("budgets", [1, 0], "got 0, expected a whole number of at least 1"),
        ("deep", [], "a list of one value or more"),
        ("forks", [1, 2.5], "got 2.5"),
        ("draws", "1000", "got '1000'"),
        ("draws", 10**30, "a whole number from 1 to 2147483647"),
        ("plane_points", 10**5, "a whole number from 2 to 1000"),
        ("budgets", [1, 10**9], "a whole number from 1 to 1000000"),
        ("widths", [10**9], "a whole number from 1 to 65536"),
        ("deep", [64, 10**9], "a whole number from 1 to 65536"),
        ("forks", [0, 10**9], "a whole number from 0 to 1000000"),
        ("robust_epochs", 10**9, "a whole number from 1 to 1000000"),
        ("learn_lr", 1e300, "a number above 0 and at most 1.7"),
        ("image_size", 10**9, "a whole number from 1 to 4096"),
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


TINY: dict[str, Any] = {
    "width": 2,
    "epochs": 1,
    "curve_epochs": 1,
    "batch_size": 16,
    "points": 3,
    "statistics": 16,
    "match_images": 16,
    "validation": 10,
    "device": "cpu",
}
PGD = attacks.PGD(0.1, 1)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    """Makes experiments on 40 images that cannot train: whoever begins to fails."""
    few(tmp_path, 40)
    monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("something was trained"))
    return lambda **changes: Experiment(**TINY | changes)


def test_the_trap_of_these_tests_works(tiny: Callable[..., Experiment]) -> None:
    lab, says = tiny(), "something was trained"
    for work, asked in {lab.endpoint: (1,), lab.ends: (1, 2), lab.path: (1, 2, "aligned")}.items():
        with pytest.raises(pytest.fail.Exception, match=says):
            work(*asked)


ROBUST = {"epsilon": 0.1, "attack_steps": 1}
PAM = r"got 'pam-.*' of a robust experiment; PAM trains standard curves only"


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        ("pair", (1, 2, "pam-aligned"), PAM),
        ("pair", (1, 2, "pam-unaligned"), PAM),
        ("curve", (1, 2, "pam-aligned", "line"), PAM),
        ("proximal", (1, 2, "pam-aligned"), PAM),
        ("path", (1, 2, "pam-aligned"), PAM),
        ("path", (1, 2, "pam-unaligned", "line"), PAM),
        ("paths", ([[1, 2]], ["unaligned", "pam-aligned"]), PAM),
        ("curve_config", (1, 2, "pam-aligned", "chain"), PAM),
    ],
)
def test_pam_of_a_robust_experiment_is_refused_before_training(
    method: str, arguments: tuple[Any, ...], says: str, tiny: Callable[..., Experiment]
) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(tiny(**ROBUST), method)(*arguments)


@pytest.mark.parametrize("seed", [-1, -3.5, 1.5, True, "1", "x", None, NAN, [1], 2**32, 2**60])
def test_what_is_no_seed_is_refused_before_training(
    seed: Any, tiny: Callable[..., Experiment]
) -> None:
    lab, says = tiny(), ".*expected a whole number (of at least 0|from 0 to 4294967295)"
    for call in (lab.endpoint, lab.endpoint_config):
        with pytest.raises(ValueError, match=f"^endpoint: seed: {says}"):
            call(seed)
    two = (lab.ends, lab.matching, lab.aligned)
    more = (lab.pair, lab.curve, lab.proximal, lab.path)
    calls = [partial(call, method="pam-aligned") for call in more]
    configs = (lab.curve_config, lab.path_config)
    calls += [partial(call, method="aligned", shape="bezier") for call in configs]
    for call in (*two, *calls):
        for name, pair in {"a": (seed, 2), "b": (1, seed)}.items():
            with pytest.raises(ValueError, match=f"^curve: {name}: {says}"):
                call(*pair)
    for pairs in ([[seed, 2]], [[1, 2], [3, seed]]):
        with pytest.raises(ValueError, match=r"^paths: pairs: .* expected a pair of seeds"):
            lab.paths(pairs)


@pytest.mark.parametrize(
    ("method", "arguments", "choices", "says"),
    [
        ("pair", (1, 2, "foo"), {}, "method: got 'foo', expected one of unaligned"),
        ("pair", (1, 2, 3), {}, "method: got 3"),
        ("proximal", (1, 2, 3), {}, "got 3, 'bezier'; PAM trains"),
        ("proximal", (1, 2, "pam-aligned", 3), {}, "shape: got 3"),
        ("curve", (1, 2, ["aligned"]), {}, "method: got .*'aligned'"),
        ("curve", (1, 2, "aligned", "spline"), {}, "shape: got 'spline'"),
        ("path", (1, 2, "alined"), {}, "did you mean 'aligned'"),
        ("path", (1, 2, "aligned", None), {}, "shape: got None"),
        ("path", (1, 2, "aligned"), {"split": "foo"}, "split: got 'foo', expected one of train"),
        ("path", (1, 2, "aligned"), {"split": "device"}, "split: got 'device'"),
        ("path", (1, 2, "aligned"), {"split": "name"}, "split: got 'name'"),
        ("path", (1, 2, "aligned"), {"split": None}, "split: got None"),
        ("path", (1, 2, "aligned"), {"images": 0}, "images: got 0, expected .*at least 1, or None"),
        ("path", (1, 2, "aligned"), {"images": 10**30}, "images: .* from 1 to 2147483647"),
        ("path", (1, 2, "aligned"), {"images": "10"}, "images: got '10'"),
        ("path", (1, 2, "aligned"), {"attack": 3}, "attack: got a int, expected a PGD, Square"),
        ("path", (1, 2, "aligned"), {"attack": "pgd"}, "attack: got a str, expected a PGD"),
        ("path", (1, 2, "aligned"), {"attack": attacks.PGD}, "attack: got a type"),
        ("path", (1, 2, "aligned"), {"statistics_attack": [PGD]}, "statistics_attack: got a list"),
        ("paths", ([[1, 2], [3]],), {}, r"pairs: got \[3\], expected a pair of seeds"),
        ("paths", ([[1, 2], [1, 2, 3]],), {}, "expected a pair of seeds"),
        ("paths", (3,), {}, "pairs: got 3, expected a list"),
        ("paths", ([1, 2],), {}, "pairs: got 1, expected a pair of seeds"),
        ("paths", ([[1, 2]], "aligned"), {}, "methods: got 'aligned', expected a list"),
        ("paths", ([[1, 2]], ["aligned", "best"]), {}, "methods: got 'best'"),
        ("paths", ([[1, 2]], ["aligned"], ["line", "spline"]), {}, "shapes: got 'spline'"),
        ("paths", ([[1, 2]],), {"split": "tset"}, "split: got 'tset'.*did you mean 'test'"),
        ("check_size", ("many",), {}, "images: got 'many'"),
        ("check_size", (None,), {}, "images: got None"),
        ("recipe", (10**400,), {}, "epochs: got 1000"),
        ("shown", (2.5,), {}, "n: got 2.5"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_training(
    method: str,
    arguments: tuple[Any, ...],
    choices: dict[str, Any],
    says: str,
    tiny: Callable[..., Experiment],
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        getattr(tiny(), method)(*arguments, **choices)
    assert "\n" not in str(caught.value)


def test_a_path_over_images_that_nobody_held_out_is_refused_before_training(
    tiny: Callable[..., Experiment],
) -> None:
    lab = tiny(validation=0)
    for call in (lab.path, partial(lab.paths, [[1, 2]])):
        asked = (1, 2, "unaligned") if call == lab.path else ()
        with pytest.raises(ValueError, match=r"'val' of an experiment with validation=0.*held_out"):
            call(*asked, split="val")
        with pytest.raises(pytest.fail.Exception):
            call(*asked, split="held_out")


@pytest.mark.parametrize("split", ["val", "held_out"])
def test_images_that_an_end_was_trained_on_are_not_held_out(
    split: str, tiny: Callable[..., Experiment]
) -> None:
    ends = tiny(validation=8), tiny(validation=3)
    with pytest.raises(ValueError, match=r"4 images an end was trained on 1\. Fix: give"):
        tiny(validation=4, between=ends).path(1, 2, "unaligned", split=split)
    with pytest.raises(pytest.fail.Exception):
        tiny(validation=3, between=ends).path(1, 2, "unaligned", split=split)
    others = (ends[0], replace(ends[0], dataset="fashion-mnist"))
    with pytest.raises(ValueError, match="trained on fashion-mnist, which may have these images"):
        tiny(validation=3, between=others).path(1, 2, "unaligned", split=split)


@pytest.mark.parametrize("place", ["itself", "first", "second"])
@pytest.mark.parametrize(
    ("change", "says"),
    [({"statistics": 31}, "statistics: got 31"), ({"match_images": 31}, "match_images: got 31")],
)
def test_too_few_images_for_any_of_three_experiments_are_refused_before_training(
    place: str, change: dict[str, Any], says: str, tiny: Callable[..., Experiment]
) -> None:
    one, two = (tiny(**change) if place == at else tiny() for at in ("first", "second"))
    lab = tiny(**change if place == "itself" else {}, between=(one, two))
    for call in (lab.ends, lab.matching, lab.aligned, partial(lab.pair, method="unaligned")):
        with pytest.raises(ValueError, match=says):
            call(1, 2)


class Nameless:
    """Something to call that has no name of its own."""

    def __call__(self, _: Experiment) -> int:
        return 1


def path(_: Experiment) -> int:
    """It has the name of one of the store's own kinds."""
    return 1


def curve(_: Experiment) -> int:
    """As `path`."""
    return 1


@pytest.mark.parametrize(
    ("compute", "says"),
    [
        (lambda _: 1, "got <function <lambda> .*, expected a function with a name"),
        (partial(int), "got functools.partial.*, expected a function with a name"),
        (Nameless(), "got <.*Nameless object .*, expected a function with a name"),
        (3, "got 3, expected a function with a name"),
        ("sums", "got 'sums', expected a function with a name"),
        (path, "got 'path', expected another name than curve, endpoint, matching, pam, path"),
        (curve, "got 'curve', expected another name"),
    ],
)
def test_values_are_kept_by_the_names_of_functions(
    compute: Any, says: str, tiny: Callable[..., Experiment]
) -> None:
    for lab in (tiny(), prose.Prose()):
        with pytest.raises(ValueError, match=f"^keep: compute: {says}"):
            lab.keep(compute)


@pytest.mark.parametrize(
    "found",
    [{1, 2}, object(), b"text", 1j, range(3), {"a": [1, {2}]}, {1: 2, "1": 3}, 10**5000],
    ids=["set", "object", "bytes", "complex", "range", "inner set", "names", "digits"],
)
def test_what_cannot_be_kept_is_named(found: Any, tiny: Callable[..., Experiment]) -> None:
    def result(_: Experiment) -> Any:
        return found

    with pytest.raises(ValueError, match=r"^(store: result: .* cannot be kept: .*return|keep: )"):
        tiny().keep(result)


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
