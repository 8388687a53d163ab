"""Presets: the parameters of the chapters at one scale, one flat YAML file each."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mcnotes.names import suggest

if TYPE_CHECKING:
    from mcnotes.lab import Experiment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "presets"


def names(pattern: str = "*.yaml") -> list[str]:
    """The presets of all chapters, or those whose files match: "*/*.yaml" are of one chapter."""
    found = FOLDER.glob(pattern)
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in found)


def load(name: str) -> dict[str, Any]:
    """The parameters of preset `name`. Raises ValueError, with suggestions, if there is none."""
    known = names() + names("*/*.yaml")
    if name not in known:  # which also excludes files of other folders
        raise ValueError(f"no preset {name!r} in {FOLDER}{suggest(name, known)}")
    return read(FOLDER / f"{name}.yaml")


def read(path: Path) -> dict[str, Any]:
    """The names and values in a YAML file. Raises ValueError for any fault of the file."""
    try:
        text = path.read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    values = parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, expected `name: value` lines")
    return values


def parse(text: str, where: str) -> Any:
    """Parse a YAML text. Raises ValueError, with a one-line message, unless it is plain YAML."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # a YAMLError, or what a conversion such as `!!int x` ran into
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: not plain YAML: {reason}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """The loader of `yaml.safe_load`, except that duplicate names are errors."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for i, name in enumerate(seen) if name in seen[:i]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]!r} appears twice", node.start_mark
            )
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


def check(preset: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """List what is wrong with `preset` for a notebook with these `parameters`.

    papermill only warns about a name that the notebook does not have, and runs with the default.
    """
    faults = [
        f"it has no parameter {name!r}{suggest(name, parameters)}"
        for name in preset
        if name not in parameters
    ]
    for name, value in preset.items():
        default = parameters.get(name)
        if default is not None and value is not None and not _alike(value, default):
            kinds = type(value).__name__, type(default).__name__
            faults.append(f"{name} = {value!r} is of type {kinds[0]}, the notebook has {kinds[1]}")
    return faults


def impossible(parameters: dict[str, Any]) -> list[str]:
    """Reasons why no experiment can have these parameters. Others are left to the notebooks."""
    try:
        experiment(parameters)
    except ValueError as error:
        return [str(error)]
    return []


def experiment(parameters: dict[str, Any]) -> Experiment:
    """The experiment of a notebook with these parameters. Raises ValueError as `Experiment.of`."""
    from mcnotes.lab import Experiment  # imports PyTorch, which a step leaves to its notebook

    fields = Experiment.__dataclass_fields__
    return Experiment.of(parameters, also=[name for name in parameters if name not in fields])


def _alike(value: object, default: object) -> bool:
    """Are they of the same type, or both numbers? True and False are not numbers here."""
    numbers = (int, float)
    return type(value) is type(default) or (type(value) in numbers and type(default) in numbers)
