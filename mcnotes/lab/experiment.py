"""One experiment, by name: its networks, matchings, curves and paths, loaded or computed.

The chapters and the full-scale runs get their numbers through `Experiment`, so that what two of
them need is computed once. `make zoo` fills data/zoo by running the chapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from mcnotes import (
    attacks,
    cache,
    checks,
    curves,
    data,
    display,
    evaluate,
    matching,
    models,
    symmetry,
    train,
)
from mcnotes.curves import Curve, Theta
from mcnotes.lab import frames
from mcnotes.lab.parameters import ALIGNMENTS, ALLOWED, two_seeds
from mcnotes.matching import pam
from mcnotes.names import suggest
from mcnotes.symmetry import Perm

if TYPE_CHECKING:
    from pandas import DataFrame

E = TypeVar("E", bound="Experiment")

# What a configuration names in ways of its own, or not at all: `Experiment.config`.
SPECIAL = frozenset(
    {
        "device",
        "compile",
        "validation",
        "epsilon",
        "attack_steps",
        "attack_step",
        "between",
        "pam_options",
    }
)
PROXIMAL = tuple(method for method in ALIGNMENTS if method.startswith("pam-"))
AnyAttack = attacks.PGD | attacks.Square | attacks.Ensemble


def curve_seed(a: int, b: int) -> int:
    """The seed of the curves from network a to network b: apart from that of any other pair."""
    if 0 < a < 1000 and 0 < b < 1000:
        return a * 1000 + b
    return 1_000_000 + int(np.random.SeedSequence([a % 2**64, b % 2**64]).generate_state(1)[0])


def _may_be_parameter(name: str, value: object) -> bool:
    """Whether a notebook's global may be a parameter: a plain value that is not IPython's own."""
    plain = isinstance(value, bool | int | float | str | list | tuple | dict | None)
    return plain and not name.startswith("_") and name not in ("In", "Out")


def _listed(values: Any) -> Any:
    """A list, to go through more than once; what gives none stays, for its rule to refuse."""
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else values


def _plain(value: Any) -> Any:
    """As JSON: what has a `config` by that, arrays and tuples as lists, named tuples by names."""
    if hasattr(value, "config"):
        return value.config()
    if isinstance(value, Mapping):
        named = {str(name): _plain(x) for name, x in value.items()}
        if len(named) < len(value):
            raise ValueError(f"keep: {checks.got([*value], 'names that differ as text')}")
        return named
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value.tolist() if hasattr(value, "tolist") else value


class Record(NamedTuple):
    """What PAM did: its permutation, after that of the start, and its outer iterations."""

    perm: Perm
    history: list[pam.Iteration]

    def __repr__(self) -> str:
        return f"Record({len(self.perm)} groups, {len(self.history)} iterations)"

    def _repr_html_(self) -> str:
        rows = [iteration._asdict() for iteration in self.history]
        return display.described(self, display.table(rows) if rows else "")


@dataclass(frozen=True)
class Experiment:
    """The parameters that every chapter and preset shares, and what follows from them.

    Raises ValueError naming every one that is not what `rules` says: `lab.parameters.ALLOWED`, but
    a class that knows more networks has rules of its own.
    """

    rules: ClassVar[dict[str, checks.Rule]] = ALLOWED
    dataset: str = "fashion-mnist-small"
    network: str = "tinyten"
    width: float = 8
    epochs: int = 12  # of single networks
    curve_epochs: int = 12
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "linear"
    augment: bool = False
    precision: str = "float32"  # or "bfloat16"; "auto" becomes the one that is native to the device
    compile: bool = False  # torch.compile: fewer launches, for small networks on a GPU
    validation: int | None = None  # training images held out; None: the data set's own number
    points: int = 25  # where a path is measured
    statistics: int = 2000  # training images on which BatchNorm is recomputed
    match_images: int = 2000  # training images on which activations are correlated
    device: str = "auto"  # or "cpu", "cuda"
    epsilon: float = 0.0  # ℓ∞ radius of adversarial training (chapter 8); 0: standard training
    attack_steps: int = 5  # of PGD, while training
    attack_step: float = 0.0  # their size; 0: 2.5 · epsilon / attack_steps
    between: tuple[Experiment, Experiment] | None = None  # where the ends of pairs come from
    pam_options: Mapping[str, Any] = field(default_factory=dict)  # changes to `pam_settings`

    def __post_init__(self) -> None:
        faults = checks.faults({f.name: getattr(self, f.name) for f in fields(self)}, self.rules)
        if not faults and self.network != "googlenet" and self.width != int(self.width):
            expected = f"a whole number for {self.network}: only googlenet's is a factor"
            faults.append(f"width: {checks.got(self.width, expected)}")
        if not faults and self.network.startswith("vit") and self.width % models.HEADS:
            expected = f"a multiple of {models.HEADS}, its heads"
            faults.append(f"width: {checks.got(self.width, expected)}")
        if not faults and self.between is not None:
            faults += self._check_between(self.between)
        if faults:
            raise ValueError(f"parameters: {'; '.join(faults)}")
        if self.precision == "auto":  # settled here, so that keys and provenance name what was used
            native = train.native_precision(data.tasks.resolved(self.device))
            object.__setattr__(self, "precision", native)

    def _check_between(self, ends: Any) -> Iterator[str]:
        two = isinstance(ends, tuple) and len(ends) == 2
        if not (two and all(isinstance(end, Experiment) for end in ends)):
            yield f"between: {checks.got(ends, 'a tuple of two experiments, or None')}"
            return
        for end in ends:
            if end._form() != self._form():
                expected = f"{self._form()}, as the experiment itself"
                yield f"between: got {end._form()}, expected {expected}"

    def _form(self) -> str:
        """What the two networks of a pair, and the curve between them, must have in common."""
        classes, channels, size = data.SOURCES[self.dataset].form
        images = f"{channels} x {size} x {size} images of {classes} classes"
        place = data.tasks.resolved(self.device).type
        return f"{self.network} of width {self.width:g} for {images} on {place}"

    @classmethod
    def of(cls: type[E], names: Mapping[str, Any], *, also: Collection[str] = ()) -> E:
        """From a notebook's globals() after its parameters cell.

        also: the names of the chapter's further parameters, or of fields that it takes for itself
        and leaves at their defaults here. A plain value under any other name (a misspelt papermill
        parameter) raises ValueError with the closest known name; so does a value that its rule in
        `rules` refuses.
        """
        own = {f.name for f in fields(cls)}
        known = own - set(also)
        plain = {name for name, value in names.items() if _may_be_parameter(name, value)}
        for name in sorted(plain - known - set(also)):
            close = suggest(name, sorted([*known, *also]))
            raise ValueError(f"parameters: {name!r} is not a parameter of this notebook{close}")
        further = {n: names[n] for n in also if n in names and n not in own}
        if faults := checks.faults(further, cls.rules):
            raise ValueError(f"parameters: {'; '.join(faults)}")
        return cls(**{n: names[n] for n in known if n in names})

    def check_size(self, images: int) -> None:
        """Raise ValueError unless so many training images are enough for what is asked of them."""
        checks.require("check_size", {"images": images}, {"images": checks.whole(0)})
        usual = data.SOURCES[self.dataset].validation
        held_out = usual if self.validation is None else self.validation
        asked = {"statistics": self.statistics, "match_images": self.match_images}
        for name in {"images", "probe"} & self.pam_options.keys():
            asked[f"pam_options: {name}"] = self.pam_options[name]
        left = images - held_out
        if left < 1:
            faults = [f"validation: {checks.got(held_out, f'fewer than {images}')}"]
        else:
            few = {name: n for name, n in asked.items() if n > left}
            faults = [f"{name}: {checks.got(n, f'at most {left}')}" for name, n in few.items()]
        if faults:
            has = f"{self.dataset} has {images} training images, {held_out} of them for validation"
            raise ValueError(f"parameters: {'; '.join(faults)}; {has}")

    @cached_property
    def task(self) -> data.Task:
        """The data, on the device."""
        found = data.load(self.dataset, device=self.device, validation=self.validation)
        self.check_size(len(found.train) + len(found.val))
        return found

    @cached_property
    def known(self) -> data.Split:
        """The training images on which BatchNorm is recomputed."""
        return self.shown(self.statistics)

    def shown(self, count: int) -> data.Split:
        """The first training images, as training shows them: augmented if it augments."""
        few: data.Split = train.as_shown(self.task.train.first(count), self.task, self.recipe(1))
        return few

    @cached_property
    def net(self) -> nn.Module:
        """The network, for its structure; its own weights are never used."""
        _, channels, _, size = self.task.example.shape
        return models.build(
            self.network,
            num_classes=self.task.num_classes,
            in_channels=channels,
            width=self.width,
            image_size=size,
        )

    @cached_property
    def sym(self) -> symmetry.Symmetry:
        """The network's permutation symmetries."""
        return symmetry.find(self.net, self.task.example.cpu())

    def recipe(self, epochs: int) -> train.Recipe:
        """How this experiment trains, for `epochs` epochs."""
        names = ("batch_size", "lr", "schedule", "augment", "precision", "compile")
        return train.Recipe(epochs, **{name: getattr(self, name) for name in names})

    @property
    def perturb(self) -> attacks.PGD | None:
        """The attack on every training batch, if training is adversarial."""
        step = self.attack_step or 2.5 * self.epsilon / self.attack_steps
        attack = attacks.PGD(self.epsilon, self.attack_steps, step=step, best=False)
        return attack if self.epsilon else None

    def ends(self, a: int, b: int) -> tuple[Theta, Theta]:
        """The networks of seeds a and b, as they were trained: by this experiment or `between`."""
        self._check(a, b)
        one, two = self.between or (self, self)
        for lab in (self, one, two):
            lab.task  # noqa: B018  # there, and large enough for all, before any training
        return one.endpoint(a), two.endpoint(b)

    def endpoint(self, seed: int) -> Theta:
        """The network trained from `seed`."""

        def compute(checkpoint: cache.Checkpoint) -> Theta:
            recipe, attack = self.recipe(self.epochs), self.perturb
            fitted = train.fit(
                self.net, self.task, recipe, seed=seed, perturb=attack, checkpoint=checkpoint
            )
            return fitted.theta

        return self._tensors(self.endpoint_config(seed), compute)

    def matching(self, a: int, b: int) -> matching.Matching:
        """Neuron alignment of network b to network a. Cheap: computed each time."""
        pair = matching.Pair(self.net, self.sym, *self.ends(a, b))
        return matching.match(pair, self.task.train.first(self.match_images))

    def aligned(self, a: int, b: int) -> Perm:
        """What `matching` found first: so a curve fits its end on every machine, in every step."""

        def compute() -> dict[str, Any]:
            return {name: p.tolist() for name, p in self.matching(a, b).perm.items()}

        config = self.curve_config(a, b, "aligned", "line") | {"what": "matching"}
        return {name: torch.tensor(p) for name, p in cache.values(config, compute).items()}

    def pair(self, a: int, b: int, method: str) -> tuple[Theta, Theta]:
        """Both ends: network a, and network b in the order of units that `method` gives.

        "pam-…": the order to which PAM leads with a Bézier curve, from the order of "…".
        """
        self._check(a, b, method)
        start = method.removeprefix("pam-")
        theta_a, theta_b = self.ends(a, b)
        if start == "aligned":
            theta_b = self.sym.permute(theta_b, self.aligned(a, b))
        if start != method:
            theta_b = self.sym.permute(theta_b, self.proximal(a, b, method).perm)
        return theta_a, theta_b

    def curve(self, a: int, b: int, method: str, shape: str = "bezier") -> Curve:
        """The trained curve between two networks ("line": nothing to train)."""
        self._check(a, b, method, shape)
        if shape == "line":
            return curves.line(*self.pair(a, b, method))
        fresh, found = self._trained(a, b, method, shape)
        theta_a, theta_b = fresh.points[0], fresh.points[-1]
        if method.startswith("pam-"):
            perm = {n: found.pop(f"perm {n}").cpu() for n in self.sym.groups}
            theta_b = self.sym.permute(theta_b, perm)
        found.pop("history", None)
        return fresh.with_points([theta_a, found, theta_b])

    def _trained(self, a: int, b: int, method: str, shape: str) -> tuple[Curve, Theta]:
        """The curve before training, and the entry: the inner point, and what PAM found besides."""
        start = method.removeprefix("pam-")
        fresh: Curve = getattr(curves, shape)(*self.pair(a, b, start))
        recipe, seed = self.recipe(self.curve_epochs), curve_seed(a, b)

        def by_descent(checkpoint: cache.Checkpoint) -> Theta:
            fitted = train.fit_curve(
                self.net,
                fresh,
                self.task,
                recipe,
                seed=seed,
                perturb=self.perturb,
                checkpoint=checkpoint,
            )
            return fitted.curve.points[1]

        def by_pam(checkpoint: cache.Checkpoint) -> Theta:
            problem = pam.Problem(self.net, self.sym, self.task, recipe, self.pam_settings())
            found = pam.fit(problem, fresh, seed=seed, checkpoint=checkpoint)
            perm = {f"perm {n}": p for n, p in found.perm.items()}
            return found.curve.points[1] | perm | {"history": torch.tensor(found.history).double()}

        compute = by_descent if start == method else by_pam
        return fresh, self._tensors(self.curve_config(a, b, method, shape), compute)

    def _check(self, a: int, b: int, method: str = "unaligned", shape: str = "line") -> None:
        """Raise ValueError unless there are such networks, and such a curve between them."""
        given = {"a": a, "b": b, "method": method, "shape": shape}
        checks.require("curve", given, self.rules)
        if self.perturb and method.startswith("pam-"):
            raise ValueError(
                f"curve: got {method!r} of a robust experiment; PAM trains standard curves only. "
                "Fix: set epsilon=0, or take another method"
            )

    def pam_settings(self) -> pam.Settings:
        """How PAM runs: shorter than in the paper, unless `pam_options` says otherwise.

        One outer iteration, like the paper's; its curve step is as long as a plain curve's.
        """
        short = {
            "p_epochs": min(4, self.curve_epochs),
            "p_lr": 1.0,
            "samples": 12,
            "images": 2_000,
            "probe": 500,
            "nu_phi": 1_000.0,  # the leash of the paper's formulas, on which the zoo was trained
        }
        return pam.Settings((self.curve_epochs,), **short | dict(self.pam_options))

    def proximal(self, a: int, b: int, method: str, shape: str = "bezier") -> Record:
        """What PAM did on its way to `curve(a, b, "pam-…", shape)`, which is trained if need be."""
        if method not in PROXIMAL or shape == "line":
            raise ValueError(
                f"proximal: got {method!r}, {shape!r}; PAM trains a 'bezier' or a 'chain' by "
                "'pam-unaligned' or 'pam-aligned'"
            )
        self._check(a, b, method, shape)

        def compute() -> dict[str, Any]:
            _, found = self._trained(a, b, method, shape)
            perm = {n: found[f"perm {n}"].tolist() for n in self.sym.groups}
            return {"perm": perm, "history": found["history"].tolist()}

        config = self.curve_config(a, b, method, shape)
        found = cache.values(config | {"what": "pam"}, compute)
        perm = {n: torch.tensor(p) for n, p in found["perm"].items()}
        return Record(perm, [pam.Iteration(*row) for row in found["history"]])

    def path(
        self,
        a: int,
        b: int,
        method: str,
        shape: str = "bezier",
        *,
        split: str = "test",
        images: int | None = None,
        attack: AnyAttack | None = None,
        statistics_attack: AnyAttack | None = None,
    ) -> evaluate.Profile:
        """Loss and accuracy along the curve, robust ones if there is an `attack`.

        split: "train", "val", "held_out" or "test"; of it the first `images` (default all).
        statistics_attack: that on the images for BatchNorm.
        """
        unusual: dict[str, Any] = {"split": split, "images": images}
        unusual |= {"attack": attack, "statistics_attack": statistics_attack}
        self._check_measured(unusual)
        unusual["split"] = split if split != "test" else None
        config = self.path_config(a, b, method, shape)
        config |= {name: _plain(x) for name, x in unusual.items() if x is not None}

        def compute() -> Any:
            whole: data.Split = getattr(self.task, split)
            path = evaluate.profile(
                self.net,
                self.curve(a, b, method, shape),
                whole.first(len(whole) if images is None else images),
                statistics=self.known,
                points=self.points,
                perturb=attack,
                perturb_statistics=statistics_attack,
            )
            return _plain(path)

        found = cache.values(config, compute)
        return evaluate.Profile(*(np.array(found[name]) for name in evaluate.Profile._fields))

    def _check_measured(self, choices: Mapping[str, Any]) -> None:
        """Raise ValueError unless a path can be measured so."""
        checks.require("path", choices, self.rules)
        if choices.get("split") == "val" and self.validation == 0:
            raise ValueError(
                "path: split: got 'val' of an experiment with validation=0, which holds out no "
                "images. Fix: take 'held_out', or set validation"
            )
        if choices.get("split") in ("val", "held_out"):
            self._check_held_out(str(choices["split"]))

    def _check_held_out(self, split: str) -> None:
        """Raise ValueError if an end may have been trained on what this experiment holds out."""
        count = len(self.task.held_out)
        for end in self.between or ():
            if end.dataset != self.dataset:
                raise ValueError(
                    f"path: split: got {split!r} of {self.dataset}, and an end was trained on "
                    f"{end.dataset}, which may have these images, too. Fix: take 'test'"
                )
            known = min(len(end.task.val), count)
            if known < len(self.task.val):
                raise ValueError(
                    f"path: split: got {split!r}, of whose {count} images an end was trained on "
                    f"{count - known}. Fix: give the experiment and both ends one validation"
                )

    def paths(
        self,
        pairs: Iterable[Sequence[int]],
        methods: Iterable[str] = ("unaligned", "aligned"),
        shapes: Iterable[str] = ("line", "bezier"),
        **choices: Any,
    ) -> DataFrame:
        """`path` for all of these, as a tidy frame (`frames.points`): pair, method, shape, t, …

        choices: as of `path`. What cannot be is refused before the first is trained.
        """
        asked = {"pairs": _listed(pairs), "methods": _listed(methods), "shapes": _listed(shapes)}
        checks.require("paths", asked, self.rules | {"pairs": checks.listed(two_seeds)})
        chosen = [
            (a, b, method, shape)
            for shape in asked["shapes"]
            for method in asked["methods"]
            for a, b in asked["pairs"]
        ]
        for one in chosen:
            self._check(*one)
        return frames.points(
            (
                {"pair": f"{a}–{b}", "method": method, "shape": shape},
                self.path(a, b, method, shape, **choices),
            )
            for a, b, method, shape in chosen
        )

    def keep(self, compute: Callable[..., Any], *of: Any, **choices: Any) -> Any:
        """`compute(self, *of, **choices)`, a JSON value: loaded if it is kept, else computed.

        compute: a chapter's function of this experiment, by whose name the value is kept (give a
        function that computes something else another name). of, choices: JSON values, and what has
        a `config`, such as attacks, recipes and experiments: all that the value depends on besides
        this experiment. Arrays come back as lists. Raises ValueError for a function without a name
        of its own, such as a lambda, and for a result that is no JSON value.
        """
        checks.require("keep", {"compute": compute}, self.rules)
        config = self.config() | {"what": compute.__name__, "of": _plain(of)}
        config |= {"choices": _plain(choices)} if choices else {}
        return cache.values(config, lambda: _plain(compute(self, *of, **choices)))

    def config(self) -> dict[str, Any]:
        """All on which values depend: for what a chapter keeps in the store by a name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SPECIAL}
        plain |= {"between": [e.config() for e in self.between]} if self.between else {}
        # Entries keep their keys: once the schedule said whether PAM ran as in the paper.
        usual = replace(self, pam_options={}).pam_settings()
        if self.schedule == "paper":
            usual = pam.Settings((self.curve_epochs,), nu_phi=1_000.0, follow=False)
        if (used := self.pam_settings()) != usual:
            plain["pam"] = asdict(used)
        return plain | self._special()

    def endpoint_config(self, seed: int) -> dict[str, Any]:
        """What a network depends on: its entry's configuration in the store."""
        checks.require("endpoint", {"seed": seed}, self.rules)
        usual = {
            "what": "endpoint",
            "dataset": self.dataset,
            "network": self.network,
            "width": self.width,
            "recipe": self.recipe(self.epochs).config(),
            "seed": seed,
        }
        return usual | self._special()

    def curve_config(self, a: int, b: int, method: str, shape: str) -> dict[str, Any]:
        """What a curve depends on: its entry's configuration in the store."""
        self._check(a, b, method, shape)
        one, two = self.between or (self, self)
        ends = [cache.key(one.endpoint_config(a)), cache.key(two.endpoint_config(b))]
        words = f"{self.network} {self.width:g}, {self.dataset}, seeds {a} and {b}"
        config: dict[str, Any] = {
            "what": "curve",
            "ends": ends,
            "network": words,
            "method": method,
            "shape": shape,
        }
        if not method.endswith("unaligned"):
            config["match_images"] = self.match_images
        if shape != "line" or method.startswith("pam-"):
            config |= {"recipe": self.recipe(self.curve_epochs).config()} | self._adversary()
            config |= {"attack_statistics": "batch"} if self.perturb else {}
        if method.startswith("pam-"):
            config["pam"] = asdict(self.pam_settings())
            config |= {"objective": "augmented images"} if self.augment else {}
        return config | cache.versions(*self.rests_on(method, shape))

    @staticmethod
    def rests_on(method: str, shape: str) -> list[str]:
        """The kinds of entries that a curve rests on besides its ends, itself included."""
        used = {"matching": not method.endswith("unaligned"), "pam": method.startswith("pam-")}
        used["curve"] = used["pam"] or shape != "line"
        return [kind for kind, is_used in used.items() if is_used]

    def path_config(self, a: int, b: int, method: str, shape: str) -> dict[str, Any]:
        """What a measured path depends on: its entry's configuration in the store."""
        measured = {"what": "path", "points": self.points, "statistics": self.statistics}
        return self.curve_config(a, b, method, shape) | measured | self._shown()

    def _special(self) -> dict[str, Any]:
        """What is not as usual; usually nothing, so that the entries keep their keys."""
        held_out = {} if (n := self.validation) is None else {"validation": n}
        return held_out | self._adversary() | self._shown()

    def _shown(self) -> dict[str, Any]:
        """On which images BatchNorm is recomputed, if not on plain ones."""
        return {"batchnorm": "augmented images"} if self.augment else {}

    def _adversary(self) -> dict[str, Any]:
        """What adversarial training adds to a configuration: nothing to that of the standard."""
        used = self.perturb
        return {"adversary": [used.eps, used.steps, used.step]} if used else {}

    def _tensors(self, config: cache.Config, compute: Callable[[cache.Checkpoint], Theta]) -> Theta:
        found = cache.tensors(config, compute)
        return {name: x.to(self.task.device) for name, x in found.items()}
