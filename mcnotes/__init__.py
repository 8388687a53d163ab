"""Mode connectivity via neuron alignment: the package under the book.

Importing it does no work. `tests/test_project.py` lists its layers, from the ground up.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, that of the installed package; looked up when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mcnotes")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
