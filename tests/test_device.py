"""A GPU's work without a GPU: fake tensors have a device and shapes, and no values.

Work that mixes devices raises, and so does work that looks at a value: on a GPU that would empty
its queue in every step. Transfers as such are not seen. Backward passes are left out, since PyTorch
asks a real GPU for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mcnotes import attacks, curves, evaluate, models, symmetry, train
from mcnotes.curves import Theta
from mcnotes.data import Split, Task, augment
from mcnotes.matching import pam
from mcnotes.matching.activations import Moments

GPU = torch.device("cuda", 0)
NET = models.build("tinyten", num_classes=10, in_channels=3, width=4)
CPU = train.initialise(NET, 1)
RECIPE = train.Recipe(1)


@cache
def sym() -> symmetry.Symmetry:
    return symmetry.find(NET, torch.zeros(2, 3, 32, 32))


class Still(curves.Curve):
    """A curve whose middle is its first point: no value is looked at."""

    def __call__(self, t: float) -> Theta:
        return self.points[0]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def slopes(_: Tensor, inputs: Tensor | list[Tensor], *__: Any, **___: Any) -> list[Tensor]:
        return [torch.empty_like(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs)]

    sym()  # with real tensors
    monkeypatch.setattr(torch.autograd, "grad", slopes)
    with FakeTensorMode(allow_non_fake_inputs=True), evaluate.mode(NET, training=True):
        yield


def there(points: int) -> Still:
    return Still(tuple({n: x.to(GPU) for n, x in CPU.items()} for _ in range(points)))


def run(step: train.Step, points: int) -> Tensor:
    x, y = torch.rand(8, 3, 32, 32, device=GPU), torch.randint(0, 10, (8,), device=GPU)
    moved = augment.Augment(padding=4, flip=True, rotation=15, contrast=0.1, saturation=0.1)(x)
    return step(moved, y, torch.rand(points, device=GPU), 0.1)


def single(perturb: attacks.Perturb | None = None) -> Tensor:
    return run(train.Step(NET, there(1), slice(0, 1), RECIPE, GPU, perturb), 1)


def on_a_curve(pull: float = 0.0) -> Tensor:
    pgd = attacks.PGD(0.03, 2, best=False)
    return run(train.Step(NET, there(3), slice(1, -1), RECIPE, GPU, pgd, pull), 3)


def of_permutations() -> Tensor:
    curve, settings = there(3), pam.Settings(relaxation="sinkhorn")
    old = {n: torch.arange(g.size) for n, g in sym().groups.items()}
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=GPU)
    split = Split(images, torch.zeros(1, dtype=torch.int64, device=GPU))
    nothing = Task("nothing", split, split, split, ())
    problem = pam.Problem(NET, sym(), nothing, RECIPE, settings)
    # The identity moves nothing; which unit goes where is read on the CPU, once.
    with mock.patch.object(pam.Problem, "end", lambda _, curve, perm: curve.points[-1]):
        step = pam.PermutationStep(problem, curve, old)
    return run(step, 3)


def of_moments() -> Tensor:
    a, b = torch.rand(5000, 16, device=GPU), torch.rand(5000, 16, device=GPU)
    sums = [torch.zeros(n, 16, dtype=torch.float64, device=GPU) for n in (2, 2, 2, 16)]
    one, two = (Moments(sums[0], True, 0, *(s.clone() for s in sums[1:])) for _ in range(2))
    one.add(a, b)
    two.add(a, b)
    one.merge(two)
    return one.similarity("l2") + one.similarity("correlation")


def of_evaluation() -> Tensor:
    """BatchNorm recomputed, then predictions."""
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, device=GPU)
    split = Split(images, torch.randint(0, 10, (20,), device=GPU))
    theta = evaluate.batchnorm(NET, there(1).points[0], split, batch_size=8)
    return evaluate.probabilities(NET, theta, split, batch_size=8)


@pytest.mark.parametrize(
    "work",
    [single, on_a_curve, lambda: on_a_curve(0.1), of_permutations, of_moments, of_evaluation],
)
def test_work_stays_on_the_device_and_waits_for_nothing(work: Callable[[], Tensor]) -> None:
    assert work().device == GPU


def test_mixing_and_waiting_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="devices"):
        single(lambda model, x, y: x + torch.rand(8, 3, 32, 32))
    with pytest.raises(DataDependentOutputException):
        single(lambda model, x, y: x * float(x.sum()))
