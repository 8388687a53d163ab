"""The book's results as tidy frames, one row for each measured thing, and frames as tables.

Columns carry their units in their names, so that axes of figures and heads of tables do, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from IPython.display import Markdown
from numpy.typing import ArrayLike

from mcnotes import evaluate
from mcnotes.matching import Finding

if TYPE_CHECKING:
    from pandas import DataFrame  # takes half a second to import

LOSS, ACCURACY, BARRIER, MIN, AVG = (
    "loss (nats)",
    "accuracy (%)",
    "barrier (nats)",
    "Min (%)",
    "Avg (%)",
)
NAMES = {
    "pam-unaligned": "PAM unaligned",
    "pam-aligned": "PAM aligned",
    "bezier": "Bézier curve",
    "chain": "chain with one bend",
}
MEASURED = ["t", "arc", LOSS, ACCURACY]
Labels = Mapping[str, object]


def points(found: Iterable[tuple[Labels, evaluate.Profile]]) -> DataFrame:
    """A row for each point of each path: its labels, then t, arc, loss (nats), accuracy (%).

    found: labels (such as pair, method, shape) beside a profile, which must have the same names.
    """
    import pandas

    parts = []
    for labels, path in found:
        part = path.frame().rename(columns={"loss": LOSS, "accuracy": ACCURACY})
        part[ACCURACY] *= 100
        for place, (name, value) in enumerate(labels.items()):
            part.insert(place, name, [NAMES.get(str(value), value)] * len(part))
        parts.append(part)
    return pandas.concat(parts, ignore_index=True)


def summary(frame: DataFrame) -> DataFrame:
    """A row for each path of `points`: its labels, then barrier (nats), Min (%) and Avg (%).

    Min and Avg are the smallest accuracy and its mean over the arc length, as in the paper's table.
    """
    import pandas

    rows = []
    labels = [name for name in frame.columns if name not in MEASURED]
    for values, part in frame.groupby(labels, sort=False):
        t, arc, loss, accuracy = part[MEASURED].to_numpy().T
        path = evaluate.Profile(t, arc, loss, accuracy)
        numbers = {BARRIER: path.barrier, MIN: path.min_accuracy, AVG: path.mean_accuracy}
        rows.append(dict(zip(labels, values, strict=True)) | numbers)
    return pandas.DataFrame(rows)


def mean_std(values: ArrayLike, digits: int = 1, scale: float = 1.0) -> str:
    """ "mean ± sample standard deviation" of scale·values, as the paper's table writes it."""
    v = np.asarray(values) * scale
    deviation = f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else ""
    return f"{fixed(v.mean(), digits)}{deviation}"


def fixed(value: float | np.floating[Any], digits: int) -> str:
    """A number with so many digits after the point; what rounds to zero has no sign."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def over(frame: DataFrame, by: Sequence[str], digits: int | Mapping[str, int] = 2) -> DataFrame:
    """Mean ± sample standard deviation of each column of numbers, over the rows equal in `by`.

    digits: after the point, for all columns or by their names.
    """
    import pandas

    numbers = [
        name
        for name in frame.columns
        if name not in by and pandas.api.types.is_numeric_dtype(frame[name])
    ]
    rows = []
    for values, part in frame.groupby(list(by), sort=False):
        texts = {name: mean_std(part[name], _digits(name, digits)) for name in numbers}
        rows.append(dict(zip(by, values, strict=True)) | texts)
    return pandas.DataFrame(rows)


def table(
    rows: DataFrame | Sequence[str],
    cells: Sequence[Sequence[object]] = (),
    *,
    digits: int | Mapping[str, int] = 2,
) -> Markdown:
    """A frame as a table for notebooks and pages; or names of columns, and the cells of each row.

    Columns of numbers (also with ±, %, – for none) stand to the right. digits: after the point, of
    floating-point numbers, for all columns or by their names.
    """
    import pandas

    frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(cells, columns=rows)
    columns = [
        [_text(x, _digits(name, digits)) for x in frame.iloc[:, i]]  # two names may be equal
        for i, name in enumerate(frame.columns)
    ]
    align = ["---:" if all(map(_is_number, column)) else "---" for column in columns]
    lines = [[str(name) for name in frame.columns], align, *zip(*columns, strict=True)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Markdown(text)  # type: ignore[no-untyped-call]


def findings(found: Sequence[Finding]) -> Markdown:
    """What `matching.diagnose` found, as a table."""
    cells = [[f.fault, f"{f.number:.3g}", f.text, f.fix] for f in found]
    nothing = ["nothing", "", "none of the faults that were looked for", ""]
    return table(["fault", "measured", "what it means", "what to do"], cells or [nothing])


def _digits(name: str, digits: int | Mapping[str, int]) -> int:
    return digits if isinstance(digits, int) else digits.get(name, 2)


def _text(value: object, digits: int) -> str:
    return fixed(value, digits) if isinstance(value, float | np.floating) else str(value)


def _is_number(text: str) -> bool:
    """Is it a number to a reader, with a sign, a deviation or a unit?"""
    digits = sum(x.isdigit() for x in text)
    others = sum(x.isalpha() for x in text)
    return text in ("", "–", "-") or digits > others
