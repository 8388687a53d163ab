"""One experiment, by name: its networks, matchings, curves and paths, loaded or computed.

The chapters and the full-scale runs get their numbers through `Experiment`, so that what two of
them need is computed once. `make zoo` fills data/zoo by running the chapters.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from mcnotes import align, attacks, curves, data, evaluate, models, store, symmetry, train
from mcnotes.curves import Curve, Theta

AnyAttack = attacks.PGD | attacks.Square | attacks.Ensemble
METHODS = ("unaligned", "aligned")
SHAPES = ("line", "bezier", "chain")


@dataclass(frozen=True)
class Experiment:
    """The parameters that every chapter and preset shares, and what follows from them."""

    dataset: str = "fashion-mnist-small"
    network: str = "tinyten"
    width: float = 8
    epochs: int = 12  # of single networks
    curve_epochs: int = 12
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "linear"
    augment: bool = False
    precision: str = "float32"
    points: int = 25  # where a path is measured
    statistics: int = 2000  # training images on which BatchNorm is recomputed
    match_images: int = 2000  # training images on which activations are correlated
    device: str = "auto"  # or "cpu", "cuda"
    epsilon: float = 0.0  # ℓ∞ radius of adversarial training (chapter 8); 0: standard training
    attack_steps: int = 5  # of PGD, while training
    attack_step: float = 0.0  # their size; 0: 2.5 · epsilon / attack_steps
    between: tuple[Experiment, Experiment] | None = None  # where the ends of pairs come from

    @classmethod
    def of(cls, names: Mapping[str, Any], *, also: Collection[str] = ()) -> Experiment:
        """From a notebook's globals() after its parameters cell.

        also: the names of the chapter's further parameters. A plain value under any other name (a
        misspelt papermill parameter) raises ValueError with the closest known name.
        """
        known = {f.name for f in fields(cls)}
        plain = {
            n for n, v in names.items()
            if not n.startswith("_") and n not in ("In", "Out")
            and isinstance(v, bool | int | float | str | list | tuple | dict | None)
        }  # fmt: skip
        for name in sorted(plain - known - set(also)):
            close = difflib.get_close_matches(name, [*known, *also], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {sorted([*known, *also])}"
            raise ValueError(f"parameters: {name!r} is not a parameter of this notebook; {hint}")
        return cls(**{n: names[n] for n in known if n in names})

    @cached_property
    def task(self) -> data.Task:
        """The data, on the device."""
        return data.load(self.dataset, device=self.device)

    @cached_property
    def net(self) -> nn.Module:
        """The network, for its structure; its own weights are never used."""
        _, channels, _, size = self.task.example.shape
        return models.build(self.network, num_classes=self.task.num_classes, in_channels=channels,
                            width=self.width, image_size=size)  # fmt: skip

    @cached_property
    def sym(self) -> symmetry.Symmetry:
        """The network's permutation symmetries."""
        return symmetry.find(self.net, self.task.example.cpu())

    def recipe(self, epochs: int) -> train.Recipe:
        """How this experiment trains, for `epochs` epochs."""
        names = ("batch_size", "lr", "schedule", "augment", "precision")
        return train.Recipe(epochs, **{name: getattr(self, name) for name in names})

    @property
    def perturb(self) -> attacks.PGD | None:
        """The attack on every training batch, if training is adversarial."""
        step = self.attack_step or 2.5 * self.epsilon / self.attack_steps
        attack = attacks.PGD(self.epsilon, self.attack_steps, step=step, best=False)
        return attack if self.epsilon else None

    def ends(self, a: int, b: int) -> tuple[Theta, Theta]:
        """The networks of seeds a and b, as they were trained: by this experiment or `between`."""
        one, two = self.between or (self, self)
        return one.endpoint(a), two.endpoint(b)

    def endpoint(self, seed: int) -> Theta:
        """The network trained from `seed`."""

        def compute(checkpoint: store.Checkpoint) -> Theta:
            recipe = self.recipe(self.epochs)
            return train.fit(self.net, self.task, recipe, seed=seed, perturb=self.perturb,
                             checkpoint=checkpoint).theta  # fmt: skip

        return self._tensors(self.endpoint_config(seed), compute)

    def matching(self, a: int, b: int) -> align.Matching:
        """Neuron alignment of network b to network a. Cheap: computed each time."""
        images = self.task.train.first(self.match_images)
        return align.match(self.net, *self.ends(a, b), images, self.sym)

    def pair(self, a: int, b: int, method: str) -> tuple[Theta, Theta]:
        """Both ends: network a, and network b in the order of units that `method` gives."""
        if method not in METHODS:
            raise ValueError(f"pair: got method {method!r}, expected one of {METHODS}")
        theta_a, theta_b = self.ends(a, b)
        if method == "aligned":
            theta_b = self.sym.permute(theta_b, self.matching(a, b).perm)
        return theta_a, theta_b

    def curve(self, a: int, b: int, method: str, shape: str = "bezier") -> Curve:
        """The trained curve between two networks ("line": nothing to train)."""
        if shape not in SHAPES:
            raise ValueError(f"curve: got shape {shape!r}, expected one of {SHAPES}")
        ends = self.pair(a, b, method)
        fresh: Curve = getattr(curves, shape)(*ends)
        if shape == "line":
            return fresh

        def compute(checkpoint: store.Checkpoint) -> Theta:
            recipe = self.recipe(self.curve_epochs)
            fitted = train.fit_curve(self.net, fresh, self.task, recipe, seed=a * 1000 + b,
                                     perturb=self.perturb, checkpoint=checkpoint)  # fmt: skip
            return fitted.curve.points[1]

        middle = self._tensors(self.curve_config(a, b, method, shape), compute)
        return fresh.with_points([ends[0], middle, ends[1]])

    def path(
        self, a: int, b: int, method: str, shape: str = "bezier", *, split: str = "test",
        images: int | None = None, attack: AnyAttack | None = None,
        statistics_attack: AnyAttack | None = None
    ) -> evaluate.Path:  # fmt: skip
        """Loss and accuracy along the curve, robust ones if there is an `attack`.

        split: "train", "val" or "test", of which the first `images` (default all).
        statistics_attack: that on the images for BatchNorm.
        """
        measured = {"what": "path", "points": self.points, "statistics": self.statistics}
        measured |= {"split": split} if split != "test" else {}
        measured |= {"images": images} if images else {}
        for name, one in (("attack", attack), ("statistics_attack", statistics_attack)):
            measured |= {name: one.config()} if one else {}

        def compute() -> dict[str, list[float]]:
            whole: data.Split = getattr(self.task, split)
            path = evaluate.along(
                self.net, self.curve(a, b, method, shape), whole.first(images or len(whole)),
                statistics=self.task.train.first(self.statistics), points=self.points,
                perturb=attack, perturb_statistics=statistics_attack
            )  # fmt: skip
            return {name: array.tolist() for name, array in path._asdict().items()}

        found = store.values(self.curve_config(a, b, method, shape) | measured, compute)
        return evaluate.Path(**{name: np.array(found[name]) for name in evaluate.Path._fields})

    def endpoint_config(self, seed: int) -> dict[str, Any]:
        """What a network depends on: its entry's configuration in the store."""
        return {"what": "endpoint", "dataset": self.dataset, "network": self.network,
                "width": self.width, "recipe": self.recipe(self.epochs).config(),
                "seed": seed} | self._adversary()  # fmt: skip

    def curve_config(self, a: int, b: int, method: str, shape: str) -> dict[str, Any]:
        """What a curve depends on: its entry's configuration in the store."""
        one, two = self.between or (self, self)
        ends = [store.key(one.endpoint_config(a)), store.key(two.endpoint_config(b))]
        words = f"{self.network} {self.width:g}, {self.dataset}, seeds {a} and {b}"
        config: dict[str, Any] = {"what": "curve", "ends": ends, "network": words,
                                  "method": method, "shape": shape}  # fmt: skip
        if method != "unaligned":
            config["match_images"] = self.match_images
        if shape != "line":
            config |= {"recipe": self.recipe(self.curve_epochs).config()} | self._adversary()
        return config

    def _adversary(self) -> dict[str, Any]:
        """What adversarial training adds to a configuration: nothing to that of the standard."""
        used = self.perturb
        return {"adversary": [used.eps, used.steps, used.step]} if used else {}

    def _tensors(self, config: store.Config, compute: Callable[[store.Checkpoint], Theta]) -> Theta:
        found = store.tensors(config, compute)
        return {name: x.to(self.task.device) for name, x in found.items()}
