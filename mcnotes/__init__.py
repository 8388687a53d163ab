"""Mode connectivity via neuron alignment: the package under the book.

    aligned = mcnotes.align(model_a, model_b, batches)

`align`, `connect`, `profile`, `compare` and `merge` are the front door (`mcnotes.api`), and
`python -m mcnotes --help` is the command. Importing the package does no work: they are loaded when
they are asked for. `tests/test_project.py` lists its layers, from the ground up.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcnotes.api import align, compare, connect, merge, profile

__all__ = ["align", "compare", "connect", "merge", "profile"]


def __getattr__(name: str) -> Any:
    """The front door, and `__version__`, that of the installed package."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mcnotes")
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("mcnotes.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
