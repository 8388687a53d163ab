"""Notebooks run by papermill in this process, where PyTorch is imported, not in a kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import pytest
from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import CapturedIO, capture_output
from matplotlib_inline.config import InlineBackend
from nbformat import NotebookNode
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines
from traitlets.config import Config


class Here(Engine):  # type: ignore[misc]
    """As a kernel would, as far as a page shows it: text, results, figures, errors."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: object) -> None:
        with shell() as here:
            for cell in nb_man.nb.cells:
                if cell.cell_type == "code":
                    with capture_output() as said:
                        result = here.run_cell(cell.source)
                    cell.outputs = [*outputs(here, said, result)]
                    if not result.success:
                        return


class Result(DisplayHook):
    def __call__(self, result: object = None) -> None:
        """Keep the value of a cell's last line, and print nothing."""
        self.fill_exec_result(result)  # type: ignore[no-untyped-call]


class Shell(InteractiveShell):
    displayhook_class = Result

    def enable_gui(self, gui: object = None) -> None:
        """There is none."""


@contextmanager
def shell() -> Iterator[Shell]:
    """An IPython shell that shows figures as a kernel does, and leaves no trace."""
    before, backend = sys.modules["__main__"], plt.get_backend()
    silent = Config({"HistoryManager": {"enabled": False}})
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.setattr(sys, "path", [*sys.path])
        here = Shell.instance(config=silent)
        try:
            here.enable_matplotlib("inline")
            select_figure_formats(here, {"png"})  # which happens by itself for the first shell only
            yield here
        finally:
            plt.close("all")
            Shell.clear_instance()
            InlineBackend.clear_instance()
            sys.modules["__main__"] = before
            plt.switch_backend(backend)


def outputs(here: Shell, said: CapturedIO, result: ExecutionResult) -> Iterator[NotebookNode]:
    if said.stdout:
        yield new_output("stream", name="stdout", text=said.stdout)
    for shown in said.outputs:
        yield new_output("display_data", data=shown.data, metadata=shown.metadata or {})
    if result.result is not None:
        data, metadata = here.display_formatter.format(result.result)
        yield new_output("execute_result", data=data, metadata=metadata)
    if error := result.error_before_exec or result.error_in_exec:
        yield new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[])


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Papermill runs notebooks here."""
    monkeypatch.setitem(papermill_engines._engines, None, Here)
