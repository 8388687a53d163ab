"""Full-scale results: the numbers of a run with their provenance, in one JSON file (chapter 11)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from mcnotes import cache, evaluate
from mcnotes.lab import frames
from mcnotes.lab.experiment import Experiment
from mcnotes.lab.parameters import ALIGNMENTS, SHAPES, a_pair

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = 1
ORIGIN = ("hardware", "torch", "seconds")  # what the provenance of every part says
Record = dict[str, Any]


class ResultsError(ValueError):
    """A results file does not say what such a file must say; the text names file and place."""


def collect(
    lab: Experiment,
    preset: str,
    pairs: Sequence[Sequence[int]],
    methods: Collection[str],
    shapes: Collection[str],
) -> Record:
    """All paths of an experiment, loaded or computed, each with where its parts were computed.

    The record has JSON values only; `check` describes its form.
    """
    chosen = [(pair, m, s) for pair in pairs for m in methods for s in shapes]
    curves = []
    for (a, b), method, shape in tqdm(chosen, desc="paths", leave=False):
        path = lab.path(a, b, method, shape)
        parts = {"path": lab.path_config(a, b, method, shape)}
        if shape != "line":
            parts["curve"] = lab.curve_config(a, b, method, shape)
        origins = {what: cache.origin(config) for what, config in parts.items()}
        curve = {"pair": [a, b], "method": method, "shape": shape}
        curve |= {name: array.tolist() for name, array in path._asdict().items()}
        curves.append(curve | {"versions": _versions(curve), "provenance": origins})
    seeds = sorted({seed for pair in pairs for seed in pair})
    nets = [{"seed": s, "provenance": cache.origin(lab.endpoint_config(s))} for s in seeds]
    return {
        "format": FORMAT,
        "preset": preset,
        "experiment": asdict(lab),
        "endpoints": nets,
        "curves": curves,
        "collected": datetime.now(timezone.utc).date().isoformat(),
        "provenance": cache.provenance(0.0),
    }


def save(record: Record, path: Path) -> None:
    """Check the record and write it, whole or not at all; a file that is there grows (`merged`).

    A file of another form is set aside, with a StoreWarning.
    """
    check(record, str(path))
    try:
        if earlier := read(path) if path.exists() else None:
            record = merged(record, earlier)
    except ResultsError as error:
        cache.set_aside(path, error)
    cache.write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def merged(record: Record, earlier: Record) -> Record:
    """The record, and those curves of an earlier one that are new to it and hold for it, too.

    A curve holds if everything that its path depends on is the same in both experiments, its code
    has today's versions, and no end has another loss here: one seed gives other networks on another
    machine.
    """
    now, then = _experiment(record), _experiment(earlier)
    there, ends = set(map(_named, record["curves"])), dict[int, float]()
    for curve in record["curves"]:
        ends |= _losses(curve)
    old = [
        curve
        for curve in earlier["curves"]
        if _named(curve) not in there
        and _is_current(curve)
        and now.path_config(*_named(curve)) == then.path_config(*_named(curve))
        and all(math.isclose(x, ends.get(n, x), rel_tol=1e-4) for n, x in _losses(curve).items())
    ]
    seeds = {seed for c in old for seed in c["pair"]} - {net["seed"] for net in record["endpoints"]}
    nets = record["endpoints"] + [net for net in earlier["endpoints"] if net["seed"] in seeds]

    def order(curve: Record) -> tuple[list[int], int]:
        return curve["pair"], ALIGNMENTS.index(curve["method"])

    return record | {
        "endpoints": sorted(nets, key=lambda net: net["seed"]),
        "curves": sorted(record["curves"] + old, key=order),
    }


def _named(curve: Record) -> tuple[int, int, str, str]:
    a, b = curve["pair"]
    return a, b, curve["method"], curve["shape"]


def _versions(curve: Record) -> dict[str, int]:
    """Today's version (`cache.VERSIONS`) of each kind of entry that a curve's path rests on."""
    kinds = {"endpoint", "path", *Experiment.rests_on(curve["method"], curve["shape"])}
    return {kind: cache.VERSIONS[kind] for kind in sorted(kinds)}


def _is_current(curve: Record) -> bool:
    """Whether a curve was measured by today's versions; files that name none are of the first."""
    then = curve.get("versions", {})
    return all(then.get(kind, 1) == now for kind, now in _versions(curve).items())


def _losses(curve: Record) -> dict[int, float]:
    """The losses of a curve's two ends, by seed: no order of units changes them."""
    return dict(zip(curve["pair"], (curve["loss"][0], curve["loss"][-1]), strict=True))


def _experiment(record: Mapping[str, Any]) -> Experiment:
    """The experiment of a record. Raises ValueError if there is none of these parameters."""
    given = dict(record["experiment"])
    if given.get("between"):
        given["between"] = tuple(Experiment(**each) for each in given["between"])
    return Experiment(**given)


def load(folder: Path) -> list[Record]:
    """All records of a folder, by preset. Raises ResultsError for a file of another form."""
    return [record for path in sorted(folder.glob("*.json")) if (record := read(path))]


def read(path: Path) -> Record | None:
    """The record in a file; None if it holds other measurements. Raises ResultsError as `load`."""
    try:
        record: Record = json.loads(path.read_text("utf8"))
        if "preset" not in record:
            return None
        check(record, str(path))
        _experiment(record)
    except ResultsError:
        raise
    except cache.WRONG as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{path}: {reason}. Fix: collect it again or remove it") from error
    return record


def holds(
    record: Mapping[str, Any],
    lab: Experiment,
    pairs: Sequence[Sequence[int]],
    methods: Collection[str],
    shapes: Collection[str],
) -> bool:
    """Whether the record is of this experiment, and has all of these curves, by today's code."""
    there = {_named(curve) for curve in record["curves"] if _is_current(curve)}
    asked = {(a, b, method, shape) for a, b in pairs for method in methods for shape in shapes}
    same = _experiment(record).config() == lab.config()
    return same and asked <= there


def check(record: Mapping[str, Any], where: str) -> None:
    """Raise ResultsError unless the record is complete and its paths are possible."""

    def must(true: bool, what: str) -> None:
        if not true:
            raise ResultsError(f"{where}: {what}. Fix: collect it again with results.collect")

    must(record.get("format") == FORMAT, f"format {record.get('format')!r}, expected {FORMAT}")
    for name in ("preset", "experiment", "endpoints", "curves", "collected", "provenance"):
        must(name in record, f"no {name!r}")
    names = {f.name for f in fields(Experiment)}
    must(names >= record["experiment"].keys(), "unknown parameters of the experiment")
    for net in record["endpoints"]:
        must("seed" in net, "a network without a seed")
        must(_known(net.get("provenance")), f"network {net['seed']} has no full provenance")
    for curve in record["curves"]:
        label = f"curve {curve.get('pair')} {curve.get('method')} {curve.get('shape')}"
        known = curve.get("method") in ALIGNMENTS and curve.get("shape") in SHAPES
        must(known, f"unknown: {label}")
        must(not (fault := a_pair(curve.get("pair"))), f"{label}: {fault}")
        numbers = curve.get("versions", {}).values()
        must(all(isinstance(n, int) for n in numbers), f"{label}: versions")
        origins = curve.get("provenance", {})
        must("path" in origins, f"{label} has no provenance")
        must(all(map(_known, origins.values())), f"{label} has no full provenance")
        t, arc, loss, accuracy = (np.array(curve.get(n, [])) for n in evaluate.Profile._fields)
        must(len({len(v) for v in (t, arc, loss, accuracy)}) == 1 and len(t) > 1, f"{label}: sizes")
        must(bool(t[0] == 0 and t[-1] == 1 and (np.diff(t) > 0).all()), f"{label}: t")
        must(bool((np.diff(arc) >= 0).all() and np.isfinite(loss).all()), f"{label}: arc or loss")
        must(bool((accuracy >= 0).all() and (accuracy <= 1).all()), f"{label}: accuracy")


def _known(origin: object) -> bool:
    """Whether it says on what, with what and how long a part was computed."""
    return isinstance(origin, dict) and origin.keys() >= {*ORIGIN}


def paths(record: Record, method: str, shape: str) -> list[evaluate.Profile]:
    """The measured paths of one method and shape, one for each pair."""
    return [
        evaluate.Profile(*(np.array(curve[name]) for name in evaluate.Profile._fields))
        for curve in record["curves"]
        if (curve["method"], curve["shape"]) == (method, shape)
    ]


def frame(record: Record) -> DataFrame:
    """All measured points, tidy (`frames.points`): pair, method, shape, t, arc, loss, accuracy."""
    return frames.points(
        (
            {"pair": "{}–{}".format(*curve["pair"])}
            | {name: curve[name] for name in ("method", "shape")},
            evaluate.Profile(*(np.array(curve[name]) for name in evaluate.Profile._fields)),
        )
        for curve in record["curves"]
    )


def seconds(record: Record) -> float:
    """Computing time of all that the record rests on; entries that were shared count once."""
    parts = [net["provenance"] for net in record["endpoints"]]
    parts += [p for curve in record["curves"] for p in curve["provenance"].values()]
    return float(sum(p.get("seconds", 0.0) for p in parts))
