"""Names that users give: what they mean, and what they may have meant."""

import difflib
from collections.abc import Collection
from importlib import import_module
from typing import Any


def resolve(path: str) -> Any:
    """What "package.module:name" names. Raises ValueError if it cannot be imported.

    Also if the module itself raises something, or ends the process.
    """
    if not isinstance(path, str):
        raise ValueError(f"got a {type(path).__name__}, expected module:name on PYTHONPATH")
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (Exception, SystemExit) as error:
        cause = f"cannot import {path!r:.200} ({type(error).__name__}: {error!s:.200})"
        raise ValueError(f"{cause}, expected module:name on PYTHONPATH") from error


def suggest(name: object, known: Collection[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", or "; there are: x, y".

    Capitals do not matter.
    """
    spelt = {each.lower(): each for each in known}
    close = difflib.get_close_matches(str(name).lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean {spelt[close[0]]!r}?" if close else f"; there are: {', '.join(known)}"
