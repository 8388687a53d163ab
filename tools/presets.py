"""Presets: the parameters of the chapters at one scale, one flat YAML file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mcnotes.names import suggest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "presets"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """The parameters of preset `name`; an unknown name says which ones there are."""
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"no preset {name!r} in {FOLDER}{suggest(name, names())}")
    values = yaml.safe_load(path.read_text("utf8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `name: value` lines, got a {type(values).__name__}")
    return values


def check(preset: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """What is wrong with `preset` for a notebook with these `parameters`; empty where nothing is.

    papermill only warns about a name that the notebook does not have, and runs with the default.
    """
    faults = [
        f"it has no parameter {name!r}{suggest(name, list(parameters))}"
        for name in preset
        if name not in parameters
    ]
    for name, value in preset.items():
        default = parameters.get(name)
        if default is not None and value is not None and not _alike(value, default):
            kinds = type(value).__name__, type(default).__name__
            faults.append(f"{name} = {value!r} is of type {kinds[0]}, the notebook has {kinds[1]}")
    return faults


def _alike(value: object, default: object) -> bool:
    """Same type, or both a number (True and False are none)."""
    numbers = (int, float)
    return type(value) is type(default) or (type(value) in numbers and type(default) in numbers)
