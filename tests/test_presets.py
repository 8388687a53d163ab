"""The paper's presets: each trains, is aligned and joined; the chapters run through at them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mcnotes.lab import Experiment
from mcnotes.matching import pam
from tools import notebooks, presets

SLOW = {"paper-googlenet-cifar100", "paper-googlenet-tiny-imagenet"}  # by hand: half a minute each
PAPER = [name for name in presets.names() if name.startswith("paper-") and name not in SLOW]
CLASSES = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny-imagenet": (200, 64)}


def noise(folder: Path, dataset: str, train: int, test: int) -> None:
    """Random pictures of the data set's form, where `data.load` finds them."""
    classes, size = CLASSES[dataset]
    draw = np.random.default_rng(0)
    arrays = {"class_names": np.array([f"class {i}" for i in range(classes)])}
    for split, n in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = draw.integers(0, classes, n)
    np.savez(folder / f"{dataset}.npz", **arrays)


@pytest.fixture
def lab(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Experiment:
    """The preset's experiment on eight random pictures of the data set's form, one epoch."""
    given = Experiment.of(presets.load(request.param), also=["pairs"])
    noise(tmp_path, given.dataset, 8, 8)
    monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    return replace(
        given,
        epochs=1,
        curve_epochs=1,
        batch_size=4,
        points=2,
        statistics=8,
        match_images=8,
        device="cpu",
        pam_options=given.pam_options | {"p_epochs": 1, "images": 8, "probe": 8},
    )


@pytest.mark.parametrize("lab", PAPER, indirect=True)
def test_trains_aligns_and_joins(lab: Experiment) -> None:
    assert lab.schedule == "paper"
    assert lab.augment
    assert len(lab.task.train) == 8, "the paper trains on all images"
    path = lab.path(1, 2, "aligned")
    assert np.isfinite(path.loss).all()


@pytest.mark.parametrize("name", [*PAPER, *sorted(SLOW), "cpu-tinyten-cifar10"])
def test_pam_is_the_papers(name: str) -> None:
    """Whatever the schedule is called: 20 epochs on 50,000 images, its leashes, 32 samples."""
    lab = Experiment.of(presets.load(name), also=["pairs"])
    settings = pam.Settings(epochs=(lab.curve_epochs,))
    assert lab.pam_settings() == settings
    assert (settings.p_epochs, settings.p_lr) == (20, 0.05)
    assert (settings.nu, settings.nu_phi * (1 - 0.9)) == (1000, pytest.approx(1000))
    assert (settings.samples, settings.images, settings.follow) == (32, 50_000, True)


@pytest.mark.parametrize("lab", ["paper-tinyten-cifar10", "paper-resnet32-cifar10"], indirect=True)
def test_runs_through_pam(lab: Experiment) -> None:
    assert lab.pam_settings() == pam.Settings(epochs=(1,), p_epochs=1, images=8, probe=8)
    (step,) = lab.proximal(1, 2, "pam-aligned").history
    assert step.before >= step.rounded >= step.after


# What is made smaller, so that a chapter takes seconds; the width too, as 16 takes far longer. The
# data set, its hundred classes and coloured pictures, the schedule, the augmentation and that no
# image is held out (but in chapter 8) stay the preset's. A chapter takes what it has.
BRIEF = {
    "width": 4,
    "epochs": 1,
    "curve_epochs": 1,
    "batch_size": 32,
    "points": 3,
    "statistics": 64,
    "match_images": 64,
    "device": "cpu",
    "pairs": [[1, 2]],
    "budgets": [1],
    "plane_points": 2,
    "plane_images": 16,
    "candidates": 3,
    "pam_options": {"p_epochs": 1, "p_lr": 0.05, "images": 64, "probe": 64},
}


def run_through(chapter: Path, values: dict[str, Any]) -> None:
    """A chapter's cells, with these parameters; here, since a kernel takes ten seconds to start."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebooks.own_cells(notebooks.read(chapter)), 1):
        exec(compile(cell.source, f"{chapter.name}, code cell {number}", "exec"), names)
        if "parameters" in notebooks.tags(cell):
            names |= values


@pytest.mark.filterwarnings("ignore:invalid value encountered in (scalar )?divide")  # 0 by 0
@pytest.mark.parametrize(
    ("chapter", "preset", "further"),
    [
        ("04_neuron_alignment", "paper-tinyten-cifar100", {}),
        ("06_aligned_curves", "paper-tinyten-cifar100", {}),
        ("07_pam", "paper-tinyten-cifar100", {}),
        ("08_robust_barrier", "robust/paper-tinyten-cifar100", {"validation": 32}),
    ],
)
def test_a_chapter_runs_through(
    chapter: str,
    preset: str,
    further: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a hundred classes, all images trained on, dead units, the data in the user's folder."""
    noise(tmp_path, "cifar100", train=128, test=32)
    monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
    monkeypatch.setenv("MCNOTES_STORE", str(tmp_path / "store"))
    path = presets.ROOT / "book" / f"{chapter}.ipynb"
    known, given = notebooks.parameters(notebooks.read(path)), presets.load(preset)
    assert given["schedule"] in ("paper", "robust")
    small = {name: value for name, value in BRIEF.items() if name in known}
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with plt.rc_context():
        run_through(path, given | small | further)
