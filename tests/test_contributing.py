"""The recipes of CONTRIBUTING.md, followed to the letter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import normed, task

from mcnotes import matching, models, symmetry, train
from mcnotes.lab import Experiment
from tools import chapters, presets

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text("utf8")


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of one recipe."""
    section = re.split(r"^## ", TEXT, flags=re.M)
    (text,) = [part for part in section if part.startswith(f"{title}\n")]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_a_model() -> None:
    (code,) = blocks("Add a model", "python")
    try:
        exec(code, {"__name__": "recipe"})
        lab = Experiment(network="shallow", width=4, epochs=1)
        sym = symmetry.find(lab.net, lab.task.example)
    finally:
        models.BUILDERS.pop("shallow", None)
    sym.verify(lab.net, lab.task.example)
    assert [group.size for group in sym.groups.values()] == [4]


def test_a_rule() -> None:
    (code,) = blocks("Add a rule for an operator", "python")
    try:
        exec(code, {})
        assert "mylib::gate" in symmetry.RULES
    finally:
        symmetry.RULES.pop("mylib::gate", None)


def test_a_way_to_match() -> None:
    (code,) = blocks("Add a way to match", "python")
    net, data = normed(), task()
    a, b = (train.initialise(net, seed) for seed in (1, 2))
    sym = symmetry.find(net, data.example)
    try:
        exec(code, {})
        found = matching.match(matching.Pair(net, sym, a, b), data.train, method="reversed")
    finally:
        matching.METHODS.pop("reversed", None)
    for name, p in found.perm.items():
        assert torch.equal(p, torch.arange(sym.groups[name].size).flip(0))


def test_a_chapter() -> None:
    parameters, setup = blocks("Add a chapter", "python")
    names: dict[str, Any] = {}
    exec(parameters, names)
    names.pop("__builtins__")
    exec(setup, names)
    assert isinstance(names["lab"], Experiment)


def test_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("Add a preset", "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    assert presets.load("mine") == yaml.safe_load(text)
    assert chapters.check_all(chapters.chapters(), "mine") == []


def test_every_place_that_is_named_exists() -> None:
    root = Path(__file__).resolve().parents[1]
    named = re.findall(r"`((?:mcnotes|tests|tools|book|experiments|data)/[\w./]*)`", TEXT)
    assert len(named) > 10
    assert [name for name in named if "NN" not in name and not (root / name).exists()] == []
