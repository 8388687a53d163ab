"""Names that users give: what they mean, and what they may have meant."""

from importlib import import_module
from typing import Any


def resolve(path: str) -> Any:
    """What "package.module:name" names. Raises ValueError if it cannot be imported."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        cause = f"cannot import {path!r} ({error})"
        raise ValueError(f"{cause}, expected module:name on PYTHONPATH") from error
