"""The front door: it takes your own models and batches, and returns models (chapter 10)::

    aligned = mcnotes.align(model_a, model_b, batches)
    curve = mcnotes.connect(aligned.reference, aligned.model, batches)
    profile = mcnotes.profile(curve, batches)
    scores = mcnotes.compare({"A": model_a, "best": curve.model(profile.best)}, batches)

Models are any modules of one architecture, batches any iterable that `data.Loader` accepts. The
arguments are left unchanged: weights, buffers, modes, and the state of random generators. Inputs
that do not fit raise an InputError, a SymmetryError or an AlignmentError before any long work
starts. Networks of 16-bit floats are computed in float32 and returned in their own type.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mcnotes import cache, curves, display, evaluate, matching, prepare, symmetry, train
from mcnotes.calls import Batch, InputError
from mcnotes.checks import (
    Rule,
    a,
    function,
    got,
    listed,
    mapping_of,
    one_of,
    optional,
    require,
    whole,
)
from mcnotes.checks import device as placed
from mcnotes.curves import Theta, combine
from mcnotes.data import Loader
from mcnotes.evaluate import Array, Quantity
from mcnotes.prepare import Metric, Prepared
from mcnotes.symmetry import Bases, Symmetry
from mcnotes.train import Loss

if TYPE_CHECKING:
    from pandas import DataFrame

CRITERIA = ("activations", "weights")  # by which units are matched: `method` of `align` and `merge`
ALL, PERMUTATIONS = "all", ("permutations",)  # kinds of symmetry
KINDS = {"bezier": curves.bezier, "chain": curves.chain, "line": curves.line}


@dataclass(frozen=True, eq=False)
class Aligned:
    """Two models made comparable: model B moved close to model A, each with its own function.

    model: B with its units in A's order. reference: what to compare it with. If units alone change
    places, this is model A as given; if scales, signs or bases do, it is A in one gauge with
    `model`. The matching and the symmetry are then a `BasesMatching` and a `Bases`.
    """

    model: nn.Module
    matching: matching.Matching | matching.BasesMatching
    symmetry: Symmetry | Bases
    error: float  # of the outputs in float64, relative, with all moved that may move
    difference: float  # of the outputs from those of model B on the first batch, relative
    reference: nn.Module
    reference_difference: float = 0.0  # from those of model A; both hold rounding to 16 bits

    @property
    def moves(self) -> bool:
        """Whether anything may move; if not, both models are as given."""
        if isinstance(self.symmetry, Symmetry):
            return bool(self.symmetry.groups)
        return bool(self.symmetry.permutations.groups or self.symmetry.factors)

    def table(self) -> DataFrame:
        """One row for each group of units, as in `Matching.table`; empty if no unit may move.

        With larger groups, one for each space and group, as in `Bases.table`, permutations first.
        """
        if isinstance(self.matching, matching.Matching):
            return self.matching.table()
        import pandas  # takes half a second

        assert isinstance(self.symmetry, Bases)
        factors = self.symmetry.table().drop(columns=["acts on [axis]", "folded"])
        perms = [
            {
                "space": row["group"],
                "group": "permutations",
                "spaces": row["groups"],
                "size": row["units"],
                "dimension": 0,
            }
            for row in self.symmetry.permutations.table()
        ]
        return pandas.DataFrame([*perms, *factors.to_dict("records")], columns=factors.columns)

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        if not self.moves:
            return f"Aligned({kind}: no units may change places, so this is model B unchanged)"
        if isinstance(self.symmetry, Symmetry):
            return f"Aligned({kind}: {self.matching!r})"
        off = f"outputs off by {self.reference_difference:.0e} (A) and {self.difference:.0e} (B)"
        more = "; what is not offered, and why: symmetry.refusals()" * bool(self.symmetry.refused)
        return f"Aligned({kind}: {self.matching!r}, {off}{more})"

    def _repr_html_(self) -> str:
        frames = [self.table()] if self.moves else []
        if isinstance(self.symmetry, Bases):
            frames.append(self.symmetry.refusals())
        tables = [x.to_html(index=False, float_format="%.2f") for x in frames if len(x)]
        return display.described(self, *tables)


@dataclass(frozen=True, eq=False)
class Connection:
    """A curve from one model to another, whose end points are the two models as given."""

    curve: curves.Curve
    losses: list[float]  # mean training loss of each epoch
    loss: Loss | None
    batches: Loader  # on which the curve was trained
    net: nn.Module  # computes the outputs at any point
    template: nn.Module  # `model` returns copies of it

    def model(self, t: float, batches: Any = None) -> nn.Module:
        """The model at t in [0, 1]: a copy of the first model with other parameters and buffers.

        BatchNorm's statistics are recomputed on `batches` (default: those on which the curve was
        trained), at the ends, too. They are averages over batches, which should not be small.
        """
        with prepare.untouched(self.batches.source if batches is None else batches, 0):
            data = self.batches if batches is None else Loader(batches, self.batches.device)
            prepare.first_outputs("Connection.model", "the model", self.net, data)
            theta = evaluate.batchnorm(self.net, self.curve(t), data)
        return prepare.filled("Connection.model", self.template, theta)

    def __repr__(self) -> str:
        kind = f"{type(self.template).__name__}, {self.curve!r}"
        course = f", loss {self.losses[0]:.3g} → {self.losses[-1]:.3g}" if self.losses else ""
        return f"Connection({kind}{course})"

    def _repr_html_(self) -> str:
        epochs = [float(k) for k in range(1, len(self.losses) + 1)]
        return display.described(self, display.line(epochs, self.losses, "loss of each epoch"))


@dataclass(frozen=True, eq=False)
class Profile:
    """Loss and metrics along a curve. All arrays have the shape [points]."""

    t: Array
    arc: Array  # arc length from t = 0, over the parameters
    loss: Array
    metrics: dict[str, Array]

    @property
    def barrier(self) -> float:
        """The largest rise of the loss above the straight line between its ends; at least 0."""
        return evaluate.barrier(self.t, self.loss)

    @property
    def best(self) -> float:
        """The t of the smallest loss."""
        if np.isnan(self.loss).all():
            raise ValueError("Profile.best: the loss is NaN everywhere; look for NaN in the inputs")
        return float(self.t[np.nanargmin(self.loss)])

    def frame(self) -> DataFrame:
        """One row for each point: t, arc, loss, and the metrics under their names."""
        import pandas  # takes half a second

        return pandas.DataFrame({"t": self.t, "arc": self.arc, "loss": self.loss, **self.metrics})

    def __repr__(self) -> str:
        words = [
            f"barrier {self.barrier:.3g}",
            f"least loss {self.loss.min():.3g} at t = {self.best:.2f}",
        ]
        words += [f"{n} {v.min():.3g} to {v.max():.3g}" for n, v in self.metrics.items()]
        return f"Profile({len(self.t)} points: {', '.join(words)})"

    def _repr_html_(self) -> str:
        named = {"loss": self.loss} | self.metrics
        drawn = [
            f"<div>{name}: {display.line(self.t.tolist(), y.tolist(), f'{name} along the curve')}"
            "</div>"
            for name, y in named.items()
        ]
        return display.described(self, *drawn)


@dataclass(frozen=True, eq=False)
class Scores:
    """Loss and metrics of several models, measured on the same batches."""

    models: list[str]
    sums: dict[str, Array]  # of each quantity over each batch: [models, batches]
    counts: dict[str, Array]  # how many samples, or places in a text, were summed: [batches]

    def frame(self) -> DataFrame:
        """One row for each model, with the means of loss and metrics."""
        import pandas  # takes half a second

        means = {name: x.sum(1) / self.counts[name].sum() for name, x in self.sums.items()}
        return pandas.DataFrame(means, index=self.models)

    def gain(self, quantity: str, model: str, other: str) -> tuple[float, float]:
        """How much larger the mean of a quantity is for `model` than for `other`.

        Returns the difference and its standard error, which is estimated from the batches and is
        NaN if there is only one. Raises ValueError for a quantity or a model that was not measured.
        """
        rules = {"quantity": one_of(self.sums), "model": one_of(self.models)}
        given = {"quantity": quantity, "model": model, "other": other}
        require("Scores.gain", given, rules | {"other": rules["model"]})
        one, two = (self.sums[quantity][self.models.index(name)] for name in (model, other))
        count = self.counts[quantity]
        mean = (one - two).sum() / count.sum()
        spread = (one - two) - mean * count
        n = len(count)
        square = np.square(spread).sum() * n / (n - 1) if n > 1 else np.nan
        return float(mean), float(np.sqrt(square) / count.sum())

    def __repr__(self) -> str:
        return f"Scores({len(self.models)} models: {', '.join(self.sums)})"

    def _repr_html_(self) -> str:
        return display.described(self, self.frame().to_html(float_format="%.3g"))


def _file(value: object) -> str:
    """The path of a file, or of one that may be made."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        return got(value, "a path")
    return got(str(value), "the path of a file") if os.path.isdir(value) else ""


def _learn(value: object) -> str:
    """A number of epochs, or how else to descend."""
    return "" if isinstance(value, matching.Learn) else whole(1)(value)


def _kinds(value: object) -> str:
    """Kinds of symmetry, by their names in a list, or all of them."""
    fault = "" if value == ALL else listed(one_of(symmetry.KINDS))(value)
    return f"{fault}, or {ALL!r}" if fault else ""


ARGUMENTS: dict[str, Rule] = {
    "models": a(Sequence, "a list of models"),
    "named": mapping_of(a(nn.Module, "a model"), least=1),
    "curve": a(Connection, "the result of connect"),
    "loss": optional(function),
    "metrics": optional(mapping_of(function)),
    "points": evaluate.ARGUMENTS["points"],
    "device": placed,
    "seed": whole(-(2**63), 2**64 - 1),
    "checkpoint": optional(_file),
    "kinds": _kinds,
    "learn": optional(_learn),
}
"""What the arguments of the functions below may be."""


def align(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Any,
    *,
    method: str | None = None,
    kinds: Sequence[str] | str = PERMUTATIONS,
    learn: matching.Learn | int | None = None,
    loss: Loss | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Aligned:
    """Move model B close to model A by symmetries; the result computes the same function as B.

    (The cache that a language model returns for its next call is not part of the function.)

    batches: a few thousand inputs like those of training; targets are read by `learn` alone.
    Sequences should be padded to few different lengths, because the network is traced again for
    each. method: how units are ordered, by their "activations" (chapter 4; the default for
    permutations alone), or by the "weights" alone (chapter 9; the default for all else). kinds:
    some of `symmetry.KINDS`, or "all" (chapter 13). With larger groups than permutations both ends
    move into one gauge, so connect `aligned.reference` with `aligned.model`. learn: then descend
    from there on the loss half-way, for so many epochs or as a `matching.Learn` says; loss,
    checkpoint: of this descent, as in `connect`. device: where to compute; "auto" is CUDA if
    available, else the device of model A.
    """
    given = {"kinds": kinds, "learn": learn, "loss": loss, "device": device, "seed": seed}
    require("align", given | {"checkpoint": checkpoint}, ARGUMENTS, InputError)
    wanted = _wanted("align", kinds, method, learn)
    for name, value in {"loss": loss, "checkpoint": checkpoint}.items():
        if learn is None and value is not None:
            cause = f"align: got a {name}, which `learn` alone uses"
            raise InputError(f"{cause}. Fix: add learn, or drop it")
    with prepare.untouched(batches, seed):
        labels = learn is not None and loss is None
        ready = prepare.prepare(
            "align", (model_a, model_b), batches, device, once=learn is None, labels=labels
        )
        if wanted != PERMUTATIONS or learn is not None:
            how = matching.Learn(learn) if isinstance(learn, int) else learn
            models = model_a, model_b
            return _in_one_gauge(ready, models, wanted, how, loss, seed, checkpoint)
        sym, error = ready.symmetry()
        found = matching.Matching({}, {}, {}, {}, {}, 0.0)
        if sym.groups:
            pair = matching.Pair(ready.net, sym, *ready.thetas)
            found = matching.match(pair, ready.data, method=method or "activations", seed=seed)
        model, difference = ready.moved(1, model_b, sym.permute(ready.thetas[1], found.perm))
    return Aligned(model, found, sym, error, difference, model_a)


def _wanted(
    who: str, kinds: Sequence[str] | str, method: str | None, learn: object = None
) -> tuple[str, ...]:
    """The kinds of symmetry. Raises InputError for a method that does not go with them."""
    if method is not None:
        _known(who, "method", method, CRITERIA)
    wanted = symmetry.KINDS if kinds == ALL else tuple(kinds)
    if method == "activations" and (wanted != PERMUTATIONS or learn is not None):
        raise InputError(
            f"{who}: got method 'activations', which orders units and does nothing else, expected "
            "'weights' for kinds beyond permutations and for learn. Fix: leave method out"
        )
    return wanted


def _in_one_gauge(
    ready: Prepared,
    models: tuple[nn.Module, nn.Module],
    kinds: Sequence[str],
    learn: matching.Learn | None,
    loss: Loss | None,
    seed: int,
    checkpoint: str | Path | None,
) -> Aligned:
    """`align` by larger groups than permutations, or by descent."""
    used: Loss = train.cost
    kept = None
    if learn is not None and checkpoint is not None:
        what = {"learn": asdict(learn), "kinds": [*kinds], "seed": seed}
        what |= {"batches": ready.data.number}
        kept = _resumable("align", Path(checkpoint), ready.thetas, what)
    if learn is not None:
        used = prepare.choose_loss(ready, loss)
        prepare.check_slope(ready, used, frozen=True)
    bases, error = ready.bases(kinds)
    pair = matching.Pair(ready.net, bases.permutations, *ready.thetas)
    images = None if learn is None else ready.data
    found = matching.match_bases(pair, bases, images, learn, loss=used, seed=seed, checkpoint=kept)
    reference, off = ready.moved(0, models[0], found.theta_a)
    model, difference = ready.moved(1, models[1], found.theta_b)
    return Aligned(model, found, bases, error, difference, reference, off)


def merge(
    models: Sequence[nn.Module],
    batches: Any,
    *,
    method: str | None = None,
    kinds: Sequence[str] | str = PERMUTATIONS,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> nn.Module:
    """The average of two or more models, all brought close to the first one.

    Permutations are matched for all models jointly (chapter 9); with larger groups, the first is
    brought into a gauge of its own, and each of the others is matched to it (chapter 13).
    BatchNorm's statistics are recomputed on `batches`. The other arguments are those of `align`.
    """
    given = {"models": models, "kinds": kinds, "device": device, "seed": seed}
    require("merge", given, ARGUMENTS, InputError)
    wanted = _wanted("merge", kinds, method)
    if len(models := list(models)) < 2:
        raise InputError(f"merge: got {len(models)} models, expected two or more")
    with prepare.untouched(batches, seed):
        ready = prepare.prepare("merge", models, batches, device)
        if wanted == PERMUTATIONS:
            thetas = _in_one_order(ready, method or "activations")
        else:
            thetas = _close_to_first(ready, wanted)
        evaluate.check_mixable("merge", ready.net, thetas)
        mean = combine(thetas, [1 / len(thetas)] * len(thetas))
        theta = evaluate.batchnorm(ready.net, mean, ready.data)
    return prepare.filled("merge", models[0], theta)


def _in_one_order(ready: Prepared, method: str) -> list[Theta]:
    """All models with their units in the first one's order."""
    sym, _ = ready.symmetry()
    if not sym.groups:
        return ready.thetas
    perms = matching.match_many(ready.net, ready.thetas, ready.data, sym, method=method)
    return [sym.permute(x, p) for x, p in zip(ready.thetas, perms, strict=True)]


def _close_to_first(ready: Prepared, kinds: Sequence[str]) -> list[Theta]:
    """All models in the first one's gauge, each with its function."""
    bases, _ = ready.bases(kinds)
    first, *others = ready.thetas
    pairs = [matching.Pair(ready.net, bases.permutations, first, x) for x in others]
    found = [matching.match_bases(pair, bases) for pair in pairs]
    thetas = [found[0].theta_a, *(m.theta_b for m in found)]
    for k, theta in enumerate(thetas):
        ready.check_unchanged(k, theta)
    return thetas


def connect(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Any,
    *,
    loss: Loss | None = None,
    epochs: int = 10,
    lr: float = 0.02,
    kind: str = "bezier",
    device: str | torch.device = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Connection:
    """Train a curve of low loss between two models on `batches` of (inputs, targets).

    loss: (outputs, targets) → the mean over a batch. The default is the loss that the model itself
    returns for a dictionary with "labels", as models of `transformers` do, and the cross-entropy of
    its logits otherwise. kind: "bezier" (of degree 2), "chain" (with one bend), or "line", which
    needs no training. lr: the largest learning rate of SGD with Nesterov momentum, which is reached
    after one epoch of warm-up and then decays linearly to 0 (chapter 2). Parameters with
    requires_grad=False stay on the line. checkpoint: a file from which an interrupted run resumes;
    the checkpoint of another run is refused.
    """
    given = {"device": device, "seed": seed, "checkpoint": checkpoint, "loss": loss}
    require("connect", given, ARGUMENTS, InputError)
    _known("connect", "kind", kind, KINDS)
    recipe = train.Recipe(epochs, lr=lr, weight_decay=0.0, schedule="linear", augment=False)
    with prepare.untouched(batches, seed):
        ready = prepare.prepare("connect", (model_a, model_b), batches, device, labels=loss is None)
        net, data = ready.net, ready.data
        template = prepare.copied("connect", "model_a", model_a)
        fit = train.Fit(KINDS[kind](*ready.thetas), [])
        if kind != "line":
            used = prepare.choose_loss(ready, loss)
            prepare.check_slope(ready, used)
            what = {"recipe": recipe.config(), "kind": kind, "seed": seed, "batches": data.number}
            kept = None
            if checkpoint is not None:
                kept = _resumable("connect", Path(checkpoint), ready.thetas, what)
            fit = train.fit_curve(
                net, fit.curve, data, recipe, seed=seed, loss=used, checkpoint=kept
            )
    return Connection(fit.curve, fit.losses, loss, data, net, template)


def profile(
    curve: Connection,
    batches: Any,
    *,
    loss: Loss | None = None,
    metrics: Mapping[str, Metric] | None = None,
    points: int = 25,
    statistics: Any = None,
) -> Profile:
    """Measure loss and metrics at `points` equidistant t in [0, 1], including both ends.

    batches: the data to measure on, such as a test set. loss: the default is the curve's own, see
    `connect`. metrics: functions (outputs, targets) → the mean over a batch, by name. The default
    is the accuracy, where the loss is the cross-entropy of one class for each input or place.
    BatchNorm's statistics are recomputed at each point on `statistics` (default: the batches on
    which the curve was trained).
    """
    given = {"curve": curve, "loss": loss, "metrics": metrics, "points": points}
    require("profile", given, ARGUMENTS, InputError)
    net, loss, device = curve.net, loss or curve.loss, curve.batches.device
    with prepare.untouched(batches, 0):
        labels = loss is None and prepare.takes_labels(net)
        data = Loader(batches, device, labels=labels)
        ready = prepare.Prepared("profile", net, [curve.curve.points[0]], data, [])
        wanted = prepare.quantities(ready, loss, metrics)
        again = curve.batches if statistics is None else Loader(statistics, device)
        found = evaluate.along(net, curve.curve, data, wanted, statistics=again, points=points)
    t, arc, *values = found.T
    measured = dict(zip(wanted, values, strict=True))
    return Profile(t, arc, measured.pop("loss"), measured)


def compare(
    models: Mapping[str, nn.Module],
    batches: Any,
    *,
    loss: Loss | None = None,
    metrics: Mapping[str, Metric] | None = None,
    device: str | torch.device = "auto",
) -> Scores:
    """Measure loss and metrics of several models, given by name, on the same batches.

    loss, metrics: as in `connect` and `profile`. The models may differ in architecture, but their
    outputs must have the same form. device: as in `align`.
    """
    given = {"named": models, "loss": loss, "metrics": metrics, "device": device}
    require("compare", given, ARGUMENTS, InputError)
    with prepare.untouched(batches, 0):
        first = prepare.prepare(
            "compare", [*models.values()][:1], batches, device, labels=loss is None
        )
        data, wanted = first.data, prepare.quantities(first, loss, metrics)
        nets = [
            prepare.working_copy("compare", name, model, data.device)
            for name, model in models.items()
        ]
        for name, net in zip(models, nets, strict=True):
            prepare.first_outputs("compare", str(name), net, data)
        found = [[_sums(net, batch, wanted) for net in nets] for batch in data.batches(0)]
    table = np.array(found)  # [batches, models, quantities, 2]: sums and counts
    by_name = [*enumerate(wanted)]
    sums = {name: table[:, :, k, 0].T for k, name in by_name}
    counts = {name: table[:, 0, k, 1] for k, name in by_name}
    evaluate.check_counted({name: n.sum() for name, n in counts.items()})
    return Scores([*models], sums, counts)


def _sums(net: nn.Module, batch: Batch, wanted: Mapping[str, Quantity]) -> Array:
    """`evaluate.sums` of a model with its own parameters and buffers."""
    with evaluate.mode(net, training=False), torch.no_grad():
        return evaluate.sums(net, {}, batch, wanted, torch.device("cpu")).numpy()


def _resumable(
    who: str, path: Path, thetas: list[Theta], what: Mapping[str, Any]
) -> cache.Checkpoint:
    """A checkpoint of this run. Raises InputError if the file is anything else."""
    digest = hashlib.sha256()
    for name, x in (item for theta in thetas for item in theta.items()):
        numbers = x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(name.encode() + numbers.tobytes())
    checkpoint = cache.Checkpoint(path, {**what, "models": digest.hexdigest()})
    if not path.exists():
        return checkpoint
    try:
        found = cache.read_config(path)
    except cache.BrokenFile as error:
        raise InputError(
            f"{who}: the file {error}, expected a checkpoint of this run. Fix: name another file"
        ) from error
    if found != checkpoint.config:
        raise InputError(
            f"{who}: the checkpoint {path} belongs to another run. Fix: name another file, or "
            "remove this one"
        )
    return checkpoint


def _known(who: str, parameter: str, name: object, known: Collection[str]) -> None:
    require(who, {parameter: name}, {parameter: one_of(known)}, InputError)
