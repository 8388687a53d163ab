"""Every parameter of every public function: a wrong type, shape, range, device or name is refused.

One table of wrong values, by the names of parameters, which mean the same everywhere. A function or
a parameter that is not in the tables fails the first test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from small import plain, task
from torch import nn

import mcnotes
from mcnotes import api, attacks, checkpoints, curves, evaluate, matching, models, symmetry, train
from mcnotes.curves import Curve, Theta
from mcnotes.data import Split
from mcnotes.matching import Descent, Learn, Pair, pam

NET, DATA = plain(), task()
A, B, C = (train.initialise(NET, seed) for seed in (1, 2, 3))
SYM = symmetry.find(NET, DATA.example)
LINE, BENT = curves.line(A, B), curves.bezier(A, B)
BASES = symmetry.find(NET, DATA.example, kinds=symmetry.KINDS)
PERM = SYM.random(torch.Generator().manual_seed(0))
PAIR = Pair(NET, SYM, A, B)
RECIPE = train.Recipe(1, batch_size=32)
SHORT = pam.Settings((1,), 1, images=48, probe=24, samples=1)
PROBLEM = pam.Problem(NET, SYM, DATA, RECIPE, SHORT)
BATCHES = [(x, y) for x, y in DATA.test.batches(20)]
WIDER = train.initialise(
    nn.Sequential(nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 3)), 1
)
CONNECTION = mcnotes.connect(NET, plain(), BATCHES, kind="line")

right: dict[str, Any] = {
    "net": NET,
    "theta": A,
    "theta_a": A,
    "theta_b": B,
    "thetas": [A, B],
    "a": A,
    "b": B,
    "split": DATA.test,
    "data": DATA.test,
    "images": DATA.test,
    "statistics": DATA.train,
    "task": DATA,
    "recipe": RECIPE,
    "curve": BENT,
    "sym": SYM,
    "perm": PERM,
    "seed": 1,
    "pair": PAIR,
    "problem": PROBLEM,
    "bases": BASES,
    "element": BASES.random(torch.Generator().manual_seed(0)),
    "corners": (A, B, C),
    "wanted": evaluate.CLASSIFICATION,
    "ends": (A, B),
    "example": DATA.example,
    "model_a": NET,
    "model_b": NET,
    "models": [NET, NET],
    "batches": BATCHES,
    "how": Descent(epochs=1),
    "settings": SHORT,
    "training": False,
    "points": [A, B],
}
"""What the parameters of most functions may be; those that are left out have a default."""


def without(theta: Theta, name: str) -> Theta:
    return {n: x for n, x in theta.items() if n != name}


STATES: dict[str, Any] = {
    "nothing": {},
    "a name lacks": without(A, "1.bias"),
    "another name": without(A, "1.bias") | {"1.bais": A["1.bias"]},
    "transposed": A | {"1.weight": A["1.weight"].T.contiguous()},
    "of a wider network": WIDER,
    "without values": {n: x.to("meta") for n, x in A.items()},
    "whole numbers": {n: x.long() for n, x in A.items()},
    "lists": {n: x.tolist() for n, x in A.items()},
    "a number": 3,
    "none": None,
}
WHOLE = {"a half": 2.5, "below": -1, "text": "3", "none": None}
COUNT = WHOLE | {"zero": 0, "true": True}
NUMBER = {"text": "1", "nan": float("nan"), "infinite": float("inf"), "below": -0.5, "none": None}
POSITIVE = NUMBER | {"zero": 0.0}
FLAG = {"text": "yes", "one": 1, "none": None}
NAMED = {"another": "corelation", "a number": 3, "none": None, "a list": ["l2"], "a mapping": {}}
NETS = {"text": "resnet20", "a class": nn.Linear, "none": None}
SETS = {"a list": BATCHES, "text": "test", "a number": 3, "none": None}
FILLED = SETS | {"empty": DATA.test.first(0)}
FUNCTION = {"text": "pgd", "a number": 3}
CURVES = {"a state": A, "a list": [A, B], "none": None}
PERMS = {
    "another group": {"5": PERM["1"]},
    "too short": {"1": PERM["1"][:5]},
    "twice": {"1": torch.zeros(16, dtype=torch.int64)},
    "not whole": {"1": PERM["1"].double()},
    "a list": {"1": PERM["1"].tolist()},
    "a tensor": PERM["1"],
}
wrong: dict[str, Mapping[str, Any]] = {
    "net": NETS,
    "theta": STATES,
    "theta_a": STATES,
    "theta_b": STATES,
    "a": STATES,
    "b": STATES,
    "thetas": {"one": [A], "one wrong": [A, WIDER], "a state": A, "none": None},
    "points": {"none at all": [], "one wrong": [A, WIDER], "none": None},
    "corners": {"two": (A, B), "one wrong": (A, B, WIDER), "on a line": (A, A, B), "none": None},
    "ends": {"one": (A,), "one wrong": (A, WIDER), "none": None},
    "split": FILLED,
    "data": FILLED,
    "images": FILLED,
    "statistics": {n: x for n, x in SETS.items() if n != "none"},
    "task": SETS | {"a split": DATA.test},
    "curve": CURVES,
    "recipe": {"a dictionary": {"epochs": 3}, "a number": 3, "none": None},
    "sym": {"a dictionary": {}, "none": None},
    "perm": PERMS,
    "p": PERMS,
    "q": PERMS,
    "pair": {"two states": (A, B), "none": None},
    "problem": {"settings alone": SHORT, "none": None},
    "wanted": {"nothing": {}, "no functions": {"loss": 3}, "a list": ["loss"], "none": None},
    "seed": {"a half": 1.5, "text": "1", "none": None},
    "generator": {"a seed": 1, "text": "1"},
    "batch_size": COUNT,
    "points ": COUNT,
    "resolution": COUNT | {"one": 1},
    "margin": NUMBER,
    "top": COUNT | {"too many": 10**6},
    "tolerance": POSITIVE,
    "perturb": FUNCTION,
    "perturb_statistics": FUNCTION,
    "training": FLAG,
    "pull": NUMBER,
    "checkpoint": {"text": "file", "a number": 3},
    "loss": FUNCTION,
    "init": {n: x for n, x in STATES.items() if n != "none"},
    "at": NAMED,
    "cost": NAMED,
    "method": NAMED,
    "t": NUMBER | {"beyond": 1.5},
    "example": {"text": "image", "a number": 3, "none": None},
    "train": FLAG,
    "layers": {"another": ["7"], "not at work": ["2"]},
    "kinds": {"text": "scales", "another": ("scale",), "a number": [3]},
    "bases": {"a symmetry": SYM, "none": None},
    "rounds": COUNT,
    "permute": FLAG,
    "learn": {"a dictionary": {}, "text": "yes"},
    "element": {
        "of ones": {"1:scales": torch.ones(3)},
        "negative": {"1:scales": -torch.ones(16)},
        "another": {"5": torch.ones(3)},
        "a list": [1],
        "none": None,
    },
    "names": {"another": ["7"]},
    "every": FLAG,
    "how": {"text": "sinkhorn", "none": None},
    "start": PERMS,
    "settings": {"a dictionary": {}, "none": None},
    "sweeps": COUNT,
    "degree": COUNT,
    "bends": WHOLE,
    "path": {"a number": 3, "nothing there": "none", "none": None},
    "kind": NAMED,
    "epochs": COUNT,
    "lr": POSITIVE,
    "momentum": NUMBER | {"beyond": 1.5},
    "weight_decay": NUMBER,
    "schedule": NAMED,
    "augment": FLAG,
    "precision": NAMED,
    "compile": FLAG,
    "action": NAMED,
    "samples": WHOLE,
    "p_epochs": COUNT,
    "p_lr": POSITIVE,
    "nu": POSITIVE,
    "nu_phi": POSITIVE,
    "relaxation": NAMED,
    "probe": COUNT,
    "nodes": COUNT,
    "follow": FLAG,
    "eps": NUMBER,
    "steps": COUNT,
    "norm": NAMED,
    "restarts": COUNT,
    "targeted": FLAG,
    "step": {n: x for n, x in NUMBER.items() if n != "none"},
    "best": FLAG,
    "squares": COUNT,
    "both": FLAG,
    "along": FLAG,
    "polished": FLAG,
    "tries": WHOLE,
    "labels": {"floats": DATA.test.labels.float(), "fewer": DATA.test.labels[:3], "none": None},
    "name": NAMED,
    "num_classes": COUNT,
    "in_channels": COUNT,
    "width": {n: x for n, x in POSITIVE.items() if n != "none"},
    "image_size": COUNT,
    "options": {},
    "model_a": NETS,
    "model_b": NETS,
    "models": {"one": [NET], "no networks": ["a", "b"], "none": None},
    "batches": {"one tensor": BATCHES[0][0], "empty": [], "none": None, "a number": 3},
    "device": {"another": "gpu", "a number": 1.5, "without values": "meta"},
    "metrics": {"no functions": {"accuracy": 3}, "a list": ["accuracy"]},
    "matrices": {
        "another group": {"5": torch.eye(16)},
        "not square": {"1": torch.ones(16, 3)},
        "too small": {"1": torch.eye(5)},
        "no tensor": {"1": 3},
        "none": None,
    },
}
"""What they may not be."""


def cases_of(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f"{f.__module__.removeprefix('mcnotes.')}.{f.__qualname__}": f for f in functions}


FUNCTIONS = cases_of(
    evaluate.score,
    evaluate.means,
    evaluate.probabilities,
    evaluate.batchnorm,
    evaluate.profile,
    evaluate.along,
    evaluate.plane,
    evaluate.coordinates,
    evaluate.curvature,
    evaluate.mode,
    train.initialise,
    train.fit,
    train.fit_curve,
    curves.line,
    curves.bezier,
    curves.chain,
    symmetry.find,
    matching.match,
    matching.match_many,
    matching.diagnose,
    matching.repair,
    matching.channel_moments,
    matching.stream,
    matching.weight_matching,
    matching.loss_matching,
    matching.certify,
    matching.frank_wolfe,
    matching.polish,
    matching.match_bases,
    Learn,
    BASES.random,
    BASES.transform,
    BASES.fold,
    BASES.verify,
    Pair,
    pam.Problem,
    pam.fit,
    SYM.permute,
    SYM.apply_matrices,
    SYM.verify,
    SYM.tapper,
    SYM.complete,
    SYM.compose,
    SYM.random,
    SYM.inverse,
    train.Recipe,
    Descent,
    pam.Settings,
    attacks.PGD,
    attacks.Square,
    attacks.fgsm,
    attacks.strong,
    Curve,
    Split,
    models.build,
    api.align,
    api.merge,
    api.connect,
    api.profile,
    api.compare,
    checkpoints.from_folder,
    checkpoints.to_folder,
    checkpoints.tokenizer,
)
MISFITS = ("transposed", "of a wider network", "none")
OTHERS = {"another": WIDER, "nothing": {}, "none": None, "elsewhere": STATES["without values"]}
SIZE = {"batch_size": {n: x for n, x in COUNT.items() if n != "none"}}
METHOD = {"method": {n: x for n, x in NAMED.items() if n != "none"}}
own: dict[str, Mapping[str, Any]] = {  # what a function takes that others do not, or alone
    "matching.loss.Descent": SIZE
    | {name: {n: x for n, x in POSITIVE.items() if n != "none"} for name in ("lr", "scale")}
    | {"soft": {"text": "1", "nan": float("nan"), "below": -0.5, "above": 1.5}},
    "matching.pam.Settings": {
        "epochs": {"a number": 3, "nothing": (), "zero": (0,), "none": None},
        "images": COUNT,
    },
    "attacks.PGD": {"loss": NAMED, "start": FLAG},
    "attacks.Square": {"loss": NAMED, "start": FLAG},
    "curves.Curve": {"points": {"none at all": (), "one wrong": (A, WIDER), "none": None}},
    "data.tasks.Split": {"images": {"floats": DATA.test.images.float(), "none": None}},
    "api.align": {"seed": wrong["seed"]} | METHOD,
    "api.merge": METHOD,
    "api.compare": {"models": {"nothing": {}, "a list": [NET], "no networks": {"A": 3}}},
    "api.profile": {
        "curve": CURVES,
        "points": COUNT | {"one": 1},
        "loss": FUNCTION,
        "statistics": {"empty": [], "a number": 3},
    },
    "api.connect": {"checkpoint": {"a number": 3, "a folder": "/", "nothing": "", "null": "\0"}},
    "checkpoints.to_folder": {"path": {}, "model": {"of PyTorch": NET, "none": None}, "like": {}},
    "evaluate.batchnorm": {"split": SETS},  # none is needed where there are no statistics
    "matching.methods.match": SIZE,
    "matching.many.match_many": SIZE,
    "matching.activations.stream": SIZE,
    "evaluate.profile": {"points": COUNT | {"one": 1}},
    "evaluate.along": {"points": COUNT | {"one": 1}},
    "symmetry.find.Symmetry.permute": {"theta": {n: STATES[n] for n in MISFITS}},
    "symmetry.find.Symmetry.apply_matrices": {"theta": {n: STATES[n] for n in MISFITS}},
    "symmetry.find.Symmetry.verify": {
        "theta": {n: x for n, x in STATES.items() if n != "none"},
        "others": {"a number": 3, "none": None, "numbers": [3], "a tensor": torch.rand(2, 6)},
        "tolerance": {n: x for n, x in POSITIVE.items() if n != "infinite"},
    },
    "symmetry.bases.Bases.transform": {"theta": {n: STATES[n] for n in MISFITS}},
    "symmetry.bases.Bases.fold": {"theta": {}},
    "symmetry.bases.Bases.verify": {
        "theta": {n: x for n, x in STATES.items() if n != "none"},
        "others": {"a number": 3, "none": None, "numbers": [3], "a tensor": torch.rand(2, 6)},
        "tolerance": {n: x for n, x in POSITIVE.items() if n != "infinite"},
    },
    "matching.bases.match_bases": {"images": {n: x for n, x in SETS.items() if n != "none"}},
    "matching.diagnose.diagnose": {"images": COUNT},
    "matching.certificate.certify": {"steps": WHOLE},
    "matching.weights.weight_matching": {"only": {"another": ["7"], "text": "x"}},
    "curves.line": {"a": {}, "b": OTHERS},
    "curves.bezier": {"a": {}, "b": OTHERS},
    "curves.chain": {"a": {}, "b": OTHERS},
}
given: dict[str, Mapping[str, Any]] = {
    "evaluate.profile": {"points": 2},
    "evaluate.along": {"points": 2},
    "symmetry.find.Symmetry.compose": {"p": PERM, "q": PERM},
    "symmetry.find.Symmetry.inverse": {"p": PERM},
    "symmetry.find.Symmetry.apply_matrices": {"matrices": {"1": torch.eye(16)}},
    "matching.diagnose.diagnose": {"images": 20},
    "data.tasks.Split": {"images": DATA.test.images, "labels": DATA.test.labels},
    "attacks.PGD": {"eps": 0.1},
    "attacks.Square": {"eps": 0.1},
    "attacks.fgsm": {"eps": 0.1},
    "attacks.strong": {"eps": 0.1},
    "train.Recipe": {"epochs": 1},
    "models.build": {"name": "mlp", "num_classes": 3, "in_channels": 1, "image_size": 12},
    "api.profile": {"curve": CONNECTION, "points": 2, "batches": BATCHES, "statistics": BATCHES},
    "api.connect": {"epochs": 1},
    "api.compare": {"models": {"A": NET}},
    "checkpoints.to_folder": {"path": "none", "like": "none"},
}


def table() -> list[Any]:
    rows = []
    for name, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters:
            for label, value in own.get(name, {}).get(parameter, wrong.get(parameter, {})).items():
                rows.append(pytest.param(name, parameter, value, id=f"{name}-{parameter}-{label}"))
    return rows


def arguments(name: str) -> dict[str, Any]:
    takes = inspect.signature(FUNCTIONS[name]).parameters
    known = right | dict(given.get(name, {}))
    return {
        n: known[n]
        for n, p in takes.items()
        if n in given.get(name, {}) or (n in known and p.default in (p.empty, None))
    }


MODULES = (evaluate, train, curves, attacks, api, matching.methods, matching.many, matching.repair)
PARTS = {
    "evaluate.batched",
    "evaluate.entropy",
    "evaluate.hits",
    "evaluate.averaged",
    "evaluate.classes_first",
    "evaluate.attacked",
    "evaluate.barrier",
    "evaluate.check_mixable",
    "evaluate.sums",
    "evaluate.check_counted",
    "evaluate.understood",
    "evaluate.total_entropy",
    "evaluate.with_singular_vectors",
    "train.trainable",
    "train.run",
    "train.cost",
    "train.native_precision",
    "train.as_shown",
    "curves.combine",
    "curves.check_same_space",
    "curves.views",
    "attacks.margin",
    "attacks.dlr",
    "attacks.length",
    "matching.methods.search",
}
"""Functions of tensors of which others are made."""


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_function_is_in_the_table(module: Any) -> None:
    public = [f for name, f in vars(module).items() if inspect.isfunction(f) and name[0] != "_"]
    own = cases_of(*(f for f in public if f.__module__ == module.__name__))
    assert own.keys() <= FUNCTIONS.keys() | PARTS


def test_the_tables_are_complete() -> None:
    for name, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters:
            assert parameter in wrong or parameter in own.get(name, {}), (name, parameter)


@pytest.mark.parametrize(("name", "parameter", "value"), table())
def test_what_is_wrong_is_refused_in_words(name: str, parameter: str, value: Any) -> None:
    with pytest.raises((ValueError, train.TrainingError)) as found:
        done(FUNCTIONS[name](**arguments(name) | {parameter: value}))
    words = str(found.value)
    assert any(mark in words for mark in (":", "expected", "there are")), words


def done(result: Any) -> None:
    """What works only once it is entered, enters."""
    if hasattr(result, "__enter__"):
        with result:
            pass
