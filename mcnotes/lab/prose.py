"""Small language models of this book's prose, letter by letter, loaded or trained (chapter 13)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcnotes import cache, checks, data, models, symmetry, train
from mcnotes.curves import Theta
from mcnotes.lab.parameters import ALLOWED

# Tokens are places in this line. It stays as it is: keys name the text alone.
LETTERS = " !%'(),-.0123456789:;?abcdefghijklmnopqrstuvwxyz"
STRIDE = 32  # letters from one passage to the next
TEST = 10  # one of so many passages, at the end of the text, is for the test


class Passages(NamedTuple):
    """Passages of the text: batches to train and to test with, and an example, int64 [2, T]."""

    train: data.Loader
    test: data.Loader
    example: Tensor


@dataclass(frozen=True)
class Prose:
    """Decoders that foretell the next letter of `data/prose.txt`, by seed."""

    width: int = 48
    context: int = 64  # letters
    norm: str = "rms"  # a name in `models.NORMS`
    recipe: train.Recipe = field(
        default_factory=lambda: train.Recipe(
            epochs=12, batch_size=32, lr=0.2, schedule="linear", augment=False
        )
    )
    points: int = 25  # where a path is measured
    device: str = "auto"

    @cached_property
    def text(self) -> str:
        """Sentences of this book, in lower case, without those that have formulas."""
        return (data.HOME / "prose.txt").read_text("utf8").strip()

    @cached_property
    def passages(self) -> Tensor:
        """Passages of context + 1 letters as numbers [passages, context + 1], in their order."""
        letters = torch.tensor([LETTERS.index(x) for x in self.text])
        return letters.unfold(0, self.context + 1, STRIDE)

    @cached_property
    def task(self) -> Passages:
        """Batches of (letters, next letters), both [N, context]; the test has the text's end."""
        cut = len(self.passages) - len(self.passages) // TEST
        overlap = -(-(self.context + 1) // STRIDE) - 1  # passages that share letters with training
        order = torch.randperm(cut, generator=torch.Generator().manual_seed(0))
        return Passages(
            self._loader(self.passages[order]),
            self._loader(self.passages[cut + overlap :]),
            self.passages[:2, :-1],
        )

    def _loader(self, passages: Tensor) -> data.Loader:
        batches = passages.split(self.recipe.batch_size)
        device = data.tasks.resolved(self.device)
        return data.Loader([(x[:, :-1], x[:, 1:]) for x in batches], device)

    @cached_property
    def net(self) -> models.Decoder:
        """The network, for its structure."""
        return models.Decoder(len(LETTERS), self.context, self.width, norm=self.norm)

    @cached_property
    def sym(self) -> symmetry.Symmetry:
        """The network's permutation symmetries."""
        return symmetry.find(self.net, self.task.example)

    def endpoint_config(self, seed: int) -> dict[str, Any]:
        """What a network depends on: its entry's configuration in the store."""
        own = {"network": "decoder", "width": self.width, "context": self.context}
        own |= {"norm": self.norm, "recipe": self.recipe.config(), "stride": STRIDE, "test": TEST}
        text = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return own | {"what": "endpoint", "seed": seed, "text": text}

    def config(self) -> dict[str, Any]:
        """All on which values depend that a chapter keeps."""
        own = self.endpoint_config(0)
        return {n: x for n, x in own.items() if n not in ("what", "seed")} | {"points": self.points}

    def endpoint(self, seed: int) -> Theta:
        """The network trained from `seed`."""

        def compute(checkpoint: cache.Checkpoint) -> Theta:
            fitted = train.fit(
                self.net, self.task.train, self.recipe, seed=seed, checkpoint=checkpoint
            )
            return fitted.theta

        found = cache.tensors(self.endpoint_config(seed), compute)
        return {name: x.to(data.tasks.resolved(self.device)) for name, x in found.items()}

    def ends(self, a: int, b: int) -> tuple[Theta, Theta]:
        """The networks of seeds a and b."""
        return self.endpoint(a), self.endpoint(b)

    def keep(self, compute: Callable[..., Any], *of: Any, **choices: Any) -> Any:
        """As `Experiment.keep`."""
        checks.require("keep", {"compute": compute}, ALLOWED)
        config = {"what": compute.__name__, "of": [*of], "choices": choices} | self.config()
        return cache.values(config, lambda: compute(self, *of, **choices))
