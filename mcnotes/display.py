"""How values show themselves in a notebook: small tables and small pictures, as HTML."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of rows that all have the same columns; numbers with three digits."""
    rows = list(rows)
    head = "".join(f"<th>{escape(str(name))}</th>" for name in (rows[0] if rows else ()))
    lines = ("".join(f"<td>{escape(_text(v))}</td>" for v in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def line(x: Sequence[float], y: Sequence[float], label: str) -> str:
    """A small drawing of y over x where both are finite; label: what they are."""
    finite = [(u, v) for u, v in zip(x, y, strict=True) if math.isfinite(u) and math.isfinite(v)]
    if not finite:
        return ""
    x, y = zip(*finite, strict=True)
    width, height, edge = 240, 60, 3
    left, low = min(x), min(y)
    wide, high = (max(x) - left) or 1, (max(y) - low) or 1
    points = " ".join(
        f"{edge + (u - left) / wide * (width - 2 * edge):.1f},"
        f"{height - edge - (v - low) / high * (height - 2 * edge):.1f}"
        for u, v in zip(x, y, strict=True)
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{escape(label)}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def strip(images: Tensor, label: str) -> str:
    """Pictures side by side. images: uint8 [N, C, H, W]; the first 1 or 3 channels show."""
    if not len(images):
        return ""
    channels = 3 if images.shape[1] >= 3 else 1
    pixels = images[:, :channels].permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()  # [H, N W, C]
    file = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(label)}" src="data:image/png;base64,{data}"/>'


def described(value: object, *parts: str) -> str:
    """What it is, escaped, and below it what shows more of it."""
    return "".join([f"<div>{escape(repr(value))}</div>", *parts])
