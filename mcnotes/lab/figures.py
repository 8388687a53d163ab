"""The book's figures: seaborn in one theme, one colour per method, and what no library has.

A function draws on the axes it is given: tidy frames (`lab.frames`) where numbers are compared,
arrays where a plane or a picture is shown. Captions and alternative texts are the chapter's.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from mcnotes.evaluate import Plane

if TYPE_CHECKING:
    from pandas import DataFrame

Array = NDArray[np.float64]

# Okabe and Ito's palette: distinct under the common forms of colour blindness.
COLORS = {
    "endpoints": "#000000",
    "random": "#7F7F7F",
    "other": "#009E73",
    "robust": "#CC79A7",
    "unaligned": "#D55E00",
    "PAM unaligned": "#E69F00",
    "aligned": "#0072B2",
    "PAM aligned": "#56B4E9",
    # Chapter 9's names of the same, and what else it compares.
    "identity": "#D55E00",
    "activations": "#0072B2",
    "weights": "#009E73",
    "straight-through": "#CC79A7",
    "sinkhorn": "#E69F00",
}
RANGE = ("pi", 100)  # seaborn's name for a band or a bar from the smallest value to the largest
# Letters of 11 points on 6 inches are nine pixels high on a telephone of 390 pixels.
STYLE: dict[str, Any] = {
    "figure.figsize": (6.0, 3.5),
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.title_fontsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "image.cmap": "viridis",
    "svg.hashsalt": "mcnotes",
}


def set_style() -> None:
    """Set the book's theme for every figure that follows, seaborn's and matplotlib's alike."""
    sns.set_theme(style="ticks", palette=[*dict.fromkeys(COLORS.values())], rc=STYLE)


def color(method: str) -> str:
    """The method's colour in the whole book. Raises KeyError naming the known methods."""
    if method not in COLORS:
        raise KeyError(f"figures: no colour for {method!r}; the methods are {sorted(COLORS)}")
    return COLORS[method]


def band(
    ax: Axes, x: Array, ys: Sequence[Array], method: str, label: str = "", style: str = "-"
) -> None:
    """The mean of several curves ys [runs][n] over x [n], between their smallest and largest."""
    stack = np.stack(list(ys))
    ax.fill_between(x, stack.min(0), stack.max(0), color=color(method), alpha=0.18, linewidth=0)
    ax.plot(x, stack.mean(0), style, color=color(method), label=label or method)


def lines(
    ax: Axes,
    frame: DataFrame,
    y: str,
    *,
    x: str = "t",
    hue: str = "method",
    style: str | None = None,
) -> None:
    """For each `hue` the mean of `y` over the rows of equal `x`, in a band from least to largest.

    frame: tidy, as of `frames.points`; hue, style: columns, hue one of those that `color` knows.
    """
    sns.lineplot(
        frame, x=x, y=y, hue=hue, style=style, palette=_palette(frame[hue]), errorbar=RANGE, ax=ax
    )
    sns.move_legend(ax, "best", title=None)


def dots(ax: Axes, frame: DataFrame, y: str, *, x: str = "method", units: str = "pair") -> None:
    """The value of each unit (each pair of networks) in each category, a unit's joined by a line.

    frame: tidy, a row for each unit and category, as of `frames.summary`. y is the value and x the
    category, or the other way round for categories that run down.
    """
    down = frame[x].dtype.kind == "f"
    category, along = (y, "y") if down else (x, "x")
    sns.lineplot(
        frame, x=x, y=y, units=units, estimator=None, orient=along, color="#AAAAAA", lw=1, ax=ax
    )
    known = _palette(frame[category]) if set(frame[category]) <= COLORS.keys() else None
    hue = category if known else None
    sns.stripplot(
        frame, x=x, y=y, hue=hue, palette=known, jitter=False, size=7, legend=False, ax=ax
    )
    ax.set(ylabel="") if down else ax.set(xlabel="")


def _palette(methods: Iterable[str]) -> dict[str, str]:
    return {method: color(method) for method in dict.fromkeys(methods)}


def chord(ax: Axes, y: Array) -> None:
    """The straight chord between the first and last value of y, against t in [0, 1]."""
    ax.plot([0, 1], [y[0], y[-1]], ":", color=color("endpoints"), lw=1.2, label="chord")


def surface(
    ax: Axes,
    x: Array,
    y: Array,
    z: Array,
    *,
    label: str,
    levels: int = 18,
    top: float | None = None,
) -> None:
    """Contours of z [rows, columns] over x, y, cut above `top`, and their colour bar, `label`."""
    shown = np.minimum(z, top if top is not None else z.max())
    filled = ax.contourf(x, y, shown, levels=levels, cmap="viridis_r")
    ax.set_aspect("equal")
    ax.grid(visible=False)
    ax.figure.colorbar(filled, ax=ax, label=label, shrink=0.85)


def corners(ax: Axes, at: Array, names: Sequence[str], colors: Sequence[str]) -> None:
    """Mark and name points at [n, 2] of a plane."""
    for (x, y), name, shade in zip(at, names, colors, strict=True):
        ax.plot(x, y, "o", color=shade, mec="white", ms=8, zorder=5)
        box = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1}
        beside: dict[str, Any] = {"xytext": (6, 6), "textcoords": "offset points"}
        ax.annotate(name, (x, y), **beside, color="black", bbox=box)


def correlation(ax: Axes, matrix: Array, *, top: float = 1.0) -> None:
    """A correlation matrix [units of A, units of B] in colours from −top to top."""
    sns.heatmap(
        matrix,
        cmap="RdBu_r",
        vmin=-top,
        vmax=top,
        square=True,
        cbar=False,
        xticklabels=False,
        yticklabels=False,
        rasterized=True,
        ax=ax,
    )
    ax.set(xlabel="unit of network B", ylabel="unit of network A")


def images(ax: Axes, pictures: Array, columns: int, gap: int = 1) -> None:
    """Pictures [n, H, W] (grey) or [n, H, W, 3] in [0, 1], as one contact sheet."""
    n, h, w = pictures.shape[:3]
    rows = -(-n // columns)
    sheet = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, *pictures.shape[3:]))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = picture
    ax.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()


class Slider:
    """A picture with a point that a slider moves along a curve, offline and from the keyboard.

    figure, ax: a drawn plane. at [n, 2]: the curve in the axes' coordinates. t [n]; readings: name
    → values [n] shown as text. alt: what the picture shows, for those who do not see it.
    """

    def __init__(
        self, figure: Figure, ax: Axes, at: Array, t: Array, readings: Mapping[str, Array], alt: str
    ) -> None:
        figure.canvas.draw()
        figure.canvas.draw()  # with equal axes the layout settles in the second pass only
        figure.set_layout_engine("none")  # and now stays: saving must not move the axes
        width, height = figure.get_size_inches() * figure.dpi
        self.size = (round(width), round(height))
        places = ax.transData.transform(at).tolist()
        self.points = [[round(x, 1), round(height - y, 1)] for x, y in places]
        self.t = [round(v, 4) for v in np.asarray(t).tolist()]
        self.readings = {k: [float(f"{v:.4g}") for v in vs] for k, vs in readings.items()}
        self.alt = html.escape(alt, quote=True)
        buffer = io.BytesIO()
        # The same figure box in pixels: no tight cropping, else the point would be off.
        with plt.rc_context({"savefig.bbox": None}):
            figure.savefig(buffer, format="png", dpi=figure.dpi * 1.5, metadata={"Software": None})
        self.picture = base64.b64encode(buffer.getvalue()).decode()
        plt.close(figure)

    def __repr__(self) -> str:
        return f"Slider({len(self.t)} positions)"

    def _repr_html_(self) -> str:
        width, height = self.size
        path = " ".join(f"{x},{y}" for x, y in self.points)
        data = json.dumps({"p": self.points, "t": self.t, "r": self.readings})
        x, y = self.points[0]
        shown = {"width": width, "height": height, "path": path, "data": data, "x": x, "y": y}
        template = Path(__file__).with_name("slider.html").read_text("utf8")
        return Template(template).substitute(vars(self), **shown, last=len(self.t) - 1)


class Surface:
    """The loss over a plane as a surface that mouse, finger and keys turn, offline.

    The loss is cut above `top`. lines: colour → points [n, 2] of the plane, joined on the surface;
    names: name → colour of each of its corners. alt: as of `Slider`.
    """

    def __init__(
        self,
        plane: Plane,
        lines: Mapping[str, Array],
        names: Mapping[str, str],
        alt: str,
        *,
        label: str,
        top: float,
    ) -> None:
        middle = np.array([v[[0, -1]].mean() for v in (plane.x, plane.y)])
        half = max(np.ptp(plane.x), np.ptp(plane.y)) / 2
        z = np.minimum(plane.loss, top) / top
        height = RegularGridInterpolator((plane.y, plane.x), z)

        def lifted(points: Array) -> list[Any]:
            flat = (points - middle) / half
            return _short(np.column_stack([flat, height(points[:, ::-1])]))

        x, y = (plane.x - middle[0]) / half, (plane.y - middle[1]) / half
        spots = zip(names.items(), lifted(plane.corners), strict=True)
        self.alt = html.escape(alt, quote=True)
        self.data = {
            "x": _short(x),
            "y": _short(y),
            "z": _short(z),
            "ticks": {
                "x": _ticks(plane.x, middle[0], half),
                "y": _ticks(plane.y, middle[1], half),
                "z": _ticks(np.array([0, top]), 0, top),
            },
            "label": label,
            "shades": [to_hex(c) for c in plt.get_cmap("viridis_r")(np.linspace(0, 1, 24))],
            "lines": [[colour, lifted(points)] for colour, points in lines.items()],
            "names": [[word, colour, at] for (word, colour), at in spots],
        }

    def __repr__(self) -> str:
        return f"Surface({len(self.data['x'])} × {len(self.data['y'])})"

    def _repr_html_(self) -> str:
        template = Path(__file__).with_name("surface.html").read_text("utf8")
        data = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return Template(template).substitute(alt=self.alt, data=data)


def _short(values: Array) -> list[Any]:
    rounded: list[Any] = np.round(values, 3).tolist()
    return rounded


def _ticks(values: Array, middle: float, half: float) -> list[tuple[float, str]]:
    """Round numbers within `values`: where they stand in units of `half`, and as text."""
    low, high = values.min(), values.max()
    found = [v for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]
    return [(round((v - middle) / half, 3), f"{v:g}") for v in found]
