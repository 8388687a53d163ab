"""The paper's presets: each one trains, is aligned and joined, at its full width."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcnotes import pam
from mcnotes.zoo import Experiment
from tools import presets

SLOW = {"paper-googlenet-cifar100", "paper-googlenet-tiny-imagenet"}  # by hand: half a minute each
PAPER = [name for name in presets.names() if name.startswith("paper-") and name not in SLOW]
CLASSES = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny-imagenet": (200, 64)}


@pytest.fixture
def lab(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Experiment:
    """The preset's experiment on eight random pictures of the data set's form, one epoch."""
    given = Experiment.of(presets.load(request.param), also=["pairs"])
    classes, size = CLASSES[given.dataset]
    draw = np.random.default_rng(0)
    arrays = {"class_names": np.array([f"class {i}" for i in range(classes)])}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = draw.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = draw.integers(0, classes, 8)
    np.savez(tmp_path / f"{given.dataset}.npz", **arrays)
    monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    brief = {"epochs": 1, "curve_epochs": 1, "batch_size": 4, "points": 2, "device": "cpu"}
    return replace(given, **brief)


@pytest.mark.parametrize("lab", PAPER, indirect=True)
def test_trains_aligns_and_joins(lab: Experiment) -> None:
    assert lab.schedule == "paper"
    assert lab.augment
    assert len(lab.task.train) == 8, "the paper trains on all images"
    path = lab.path(1, 2, "aligned")
    assert np.isfinite(path.loss).all()


@pytest.mark.parametrize("lab", ["paper-tinyten-cifar10", "paper-resnet32-cifar10"], indirect=True)
def test_runs_through_pam(lab: Experiment) -> None:
    assert lab.pam_settings() == pam.Settings(epochs=(1,), p_epochs=1)
    (step,) = lab.proximal(1, 2, "pam-aligned").history
    assert step.before >= step.rounded >= step.after
