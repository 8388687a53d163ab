"""Notebooks as values: read, normalise, stamp, and move outputs from one to another."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image, ImageOps

Notebook = Any  # nbformat.NotebookNode: attribute access to JSON, which types cannot follow

SETUP = Path(__file__).with_name("colab_setup.py")
KEEP = {"tags", "mystnb"}  # cell metadata that the book reads; editors and papermill add more
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> Notebook:
    """The notebook at `path`, in the current notebook format. Raises OSError, or ValueError."""
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, TypeError, LookupError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no notebook: {type(error).__name__}: {reason}") from error


def write(path: Path, notebook: Notebook) -> bool:
    """Write `notebook` unless the file has the same content. Returns whether it was written."""
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    if path.exists() and path.read_text("utf8") == text:
        return False
    path.write_text(text, "utf8")
    return True


def tags(cell: Notebook) -> list[str]:
    return list(cell.metadata.get("tags", []))


def is_setup(cell: Notebook) -> bool:
    return cell.cell_type == "code" and "google.colab" in cell.source


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def own_cells(notebook: Notebook) -> list[Notebook]:
    """The chapter's own code, without Colab's set-up and papermill's injected parameters."""
    cells = code_cells(notebook)
    return [c for c in cells if not is_setup(c) and "injected-parameters" not in tags(c)]


def figure(notebook: Notebook, name: str) -> bytes | None:
    """The stored PNG of the figure called `name` in its cell's metadata; None if there is none."""
    for cell in code_cells(notebook):
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            pictures = [
                o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})
            ]
            return base64.b64decode(pictures[0]) if pictures else None
    return None


def lighten_pictures(notebook: Notebook) -> None:
    """Store figures with 256 colours: they look the same at a half to a third of the size."""
    for cell in code_cells(notebook):
        for data in (output.get("data", {}) for output in cell.outputs):
            if "image/png" in data:
                whole = base64.b64decode(data["image/png"])
                light = of_few_colours(whole)
                if len(light) < 0.9 * len(whole):  # else it was small already
                    data["image/png"] = base64.b64encode(light).decode()


def of_few_colours(picture: bytes) -> bytes:
    """The PNG with a palette of its 256 most useful colours, without dithering."""
    with Image.open(io.BytesIO(picture)) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    buffer = io.BytesIO()
    flat.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def thumbnail(picture: bytes, size: tuple[int, int] = (360, 216)) -> bytes:
    """A small PNG on white, of at most 64 colours."""
    with Image.open(io.BytesIO(picture)) as image:
        small = ImageOps.pad(image.convert("RGB"), size, color="white")
    buffer = io.BytesIO()
    small.quantize(64).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def living_figure(notebook: Notebook) -> str | None:
    """The HTML of the first `mcnotes.lab.permuter.Permuter` in the outputs, or None."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text = str(output.get("data", {}).get("text/html", ""))
            if 'class="permuter"' in text:
                return text
    return None


def digest(notebook: Notebook) -> str:
    """Hash of the code alone, so that prose can change without running a chapter again."""
    return hashlib.sha256("\n\0".join(c.source for c in own_cells(notebook)).encode()).hexdigest()


def parameters(notebook: Notebook) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`.

    Raises ValueError if the cell is missing, or holds anything but `name = literal`: papermill
    replaces the values, and would not recompute what is derived from them in the same cell.
    """
    cells = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    if len(cells) != 1:
        raise ValueError(f"expected one cell tagged `parameters`, found {len(cells)}")
    found = {}
    for statement in ast.parse(cells[0].source).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = ast.literal_eval(value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                found[name] = ast.literal_eval(value)
            case _:
                line = ast.unparse(statement)
                raise ValueError(f"the parameters cell may only hold `name = literal`, not: {line}")
    return found


def setup_source(url: str) -> str:
    """The first cell of every notebook, for a repository at `url` ("" if there is none)."""
    text = SETUP.read_text("utf8").rstrip("\n")
    return text.replace('set_up_colab("")', f'set_up_colab("{url}")')


def stamp(notebook: Notebook, url: str) -> None:
    """Insert the Colab set-up as the first cell, or update it."""
    cell = notebook.cells[0] if notebook.cells else None
    if cell is None or not is_setup(cell):
        cell = nbformat.v4.new_code_cell(id="colab-setup")
        notebook.cells.insert(0, cell)
    cell.source = setup_source(url)
    cell.metadata["tags"] = ["remove-cell"]


def normalise(notebook: Notebook) -> None:
    """Keep what the book reads, and drop times and the state of machines and editors. Idempotent.

    nbstripout drops only the metadata that it is told to, and numbers neither cells nor outputs.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    seen: set[str] = set()
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEEP})
        if not cell.get("id") or cell.id in seen:
            cell.id = hashlib.sha256(f"{number}\0{cell.source}".encode()).hexdigest()[:8]
        seen.add(cell.id)
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
        cell.outputs = tidy(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def tidy(outputs: list[Notebook]) -> list[Notebook]:
    """Drop progress bars, and join printed text, which arrives in pieces that depend on timing.

    nbclient's `coalesce_streams` would also join text that was printed before and after a figure.
    """
    merged: list[Notebook] = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue  # lives in a running kernel only, and its page would fetch a foreign script
        last = merged[-1] if merged else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def take_outputs(notebook: Notebook, executed: Notebook) -> None:
    """Copy the outputs of `executed`, whose code must be the same, to `notebook`."""
    if digest(notebook) != digest(executed):
        raise ValueError(
            "the executed notebook and the one that gets its outputs differ in their code"
        )
    for cell, source in zip(own_cells(notebook), own_cells(executed), strict=True):
        cell.outputs = tidy(source.outputs)
