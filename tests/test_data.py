"""Data sets and augmentation: no leaks between splits, one seed, files that lie."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small import agree
from torch import Tensor

from mcnotes import cache, data
from mcnotes.data import DataError, Split, Task, sources
from mcnotes.data.augment import Augment

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "data" / "fashion-mnist-small.npz"
MAKE = ROOT / "data" / "make_fashion_mnist_small.py"


@pytest.fixture(scope="module")
def small() -> Task:
    return data.load("fashion-mnist-small", device="cpu", folder=SMALL.parent)


def noise(n: int = 8, channels: int = 3, size: int = 12, seed: int = 0) -> Tensor:
    """Float images whose pixels are all different."""
    order = torch.randperm(n * channels * size * size, generator=seeded(seed))
    return (order.float() / len(order)).view(n, channels, size, size)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_arrays(train: int = 60, test: int = 20, classes: int = 4, size: int = 8) -> sources.Arrays:
    rng = np.random.default_rng(0)
    arrays: sources.Arrays = {"class_names": np.array([f"class {i}" for i in range(classes)])}
    for split, n in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.sort(np.arange(n) % classes)
    return arrays


def pixels(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


class TestEmbedded:
    def test_sizes_types_and_layout(self, small: Task) -> None:
        assert [len(s) for s in (small.train, small.val, small.test)] == [10_000, 2_000, 3_000]
        assert small.num_classes == len(small.class_names) == 10
        assert small.device == torch.device("cpu")
        assert small.example.shape == (2, 1, 28, 28)
        assert small.example.dtype == torch.float32
        for split in (small.train, small.val, small.test):
            assert split.images.shape[1:] == (1, 28, 28)
            assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
            assert split.images.permute(0, 2, 3, 1).is_contiguous()

    def test_no_image_stands_in_two_places(self, small: Task) -> None:
        everything = [p for s in (small.train, small.val, small.test) for p in pixels(s)]
        assert len(set(everything)) == len(everything) == 15_000

    def test_classes_are_balanced(self, small: Task) -> None:
        for split in (small.train, small.val, small.test):
            assert split.labels.bincount().tolist() == [len(split) // 10] * 10

    def test_any_prefix_is_a_fair_sample(self, small: Task) -> None:
        whole = small.train.images.float().mean((0, 2, 3)) / 255
        spread = small.train.images.float().mean((1, 2, 3)).std() / 255
        for n in (10, 137, 1_000, 5_000):
            first = small.train.first(n)
            counts = first.labels.bincount(minlength=10)
            assert counts.max() - counts.min() <= 1
            mean = first.images.float().mean((0, 2, 3)) / 255
            assert (mean - whole).abs() < 4 * spread / n**0.5

    def test_the_file_is_the_one_its_readme_describes(self) -> None:
        content = SMALL.read_bytes()
        assert len(content) < 8_000_000
        digest = hashlib.sha256(content).hexdigest()
        assert digest in (ROOT / "data" / "README.md").read_text("utf8")

    def test_a_network_can_learn_it(self, small: Task) -> None:
        # Nearest class mean: labels belong to their images.
        x, y = small.train.images.flatten(1).float(), small.train.labels
        means = torch.stack([x[y == label].mean(0) for label in range(10)])
        nearest = torch.cdist(small.test.images.flatten(1).float(), means).argmin(1)
        assert (nearest == small.test.labels).float().mean() > 0.6


class TestSplit:
    def test_without_generator_batches_come_in_order(self) -> None:
        split = toy_split(10)
        batches = list(split.batches(4))
        assert [len(y) for _, y in batches] == [4, 4, 2]
        images = torch.cat([x for x, _ in batches])
        torch.testing.assert_close(images, split.images.float() / 255)
        assert torch.equal(torch.cat([y for _, y in batches]), split.labels)

    def test_with_generator_every_image_comes_once_with_its_label(self) -> None:
        split = toy_split(11)
        batches = list(split.batches(4, generator=seeded()))
        labels = torch.cat([y for _, y in batches])
        images = torch.cat([x for x, _ in batches])
        assert sorted(labels.tolist()) == split.labels.tolist()
        assert labels.tolist() != split.labels.tolist()
        torch.testing.assert_close(images, split.images[labels].float() / 255)  # label = place

    def test_drop_last(self) -> None:
        split = toy_split(10)
        assert [len(y) for _, y in split.batches(4, drop_last=True)] == [4, 4]
        assert [len(y) for _, y in split.batches(5, drop_last=True)] == [5, 5]
        assert list(split.batches(11, drop_last=True)) == []

    def test_the_generator_decides_everything(self) -> None:
        split, augment = toy_split(20), Augment(padding=2, flip=True, rotation=20)

        def epoch(seed: int) -> Tensor:
            return torch.cat(
                [x for x, _ in split.batches(6, generator=seeded(seed), augment=augment)]
            )

        assert torch.equal(epoch(1), epoch(1))
        assert not torch.equal(epoch(1), epoch(2))

    def test_the_next_epoch_differs(self) -> None:
        split, g = toy_split(20), seeded()
        first, second = (torch.cat([y for _, y in split.batches(6, generator=g)]) for _ in range(2))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("augment", [None, Augment(padding=1, rotation=9)])
    def test_batches_lie_channels_last(self, channels: int, augment: Augment | None) -> None:
        for x, _ in toy_split(9, channels).batches(4, generator=seeded(), augment=augment):
            _, c, h, w = x.shape
            assert x.stride() == (h * w * c, 1, w * c, c)

    def test_the_data_stay_as_they_are(self) -> None:
        split = toy_split(9)
        before = split.images.clone()
        for x, y in split.batches(4, generator=seeded(), augment=Augment(padding=2)):
            x.zero_()
            y.zero_()
        for x, _ in split.batches(9):
            x.zero_()
        assert torch.equal(split.images, before)

    def test_first(self) -> None:
        split = toy_split(9)
        assert torch.equal(split.first(4).images, split.images[:4])
        assert len(split.first(100)) == 9

    def test_errors(self) -> None:
        images, labels = (
            torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
        )
        with pytest.raises(ValueError, match=r"size: got 0, expected a whole number of at least 1"):
            next(Split(images, labels).batches(0))
        with pytest.raises(ValueError, match=r"got images torch.float32 .*expected torch.uint8"):
            Split(images.float(), labels)
        with pytest.raises(ValueError, match=r"got labels torch.int64 \(2,\), expected .* \[3\]"):
            Split(images, labels[:2])


def toy_split(n: int, channels: int = 3) -> Split:
    """Random images; the label of each is its place."""
    images = torch.randint(0, 256, (n, 8, 8, channels), generator=seeded(n), dtype=torch.uint8)
    return Split(images.permute(0, 3, 1, 2), torch.arange(n))


class TestAugment:
    everything = Augment(2, True, 30, (0.8, 1.2), 0.25, 0.25)

    def test_nothing_asked_nothing_done(self) -> None:
        x = noise()
        assert torch.equal(Augment()(x, seeded()), x)

    @pytest.mark.parametrize(
        ("field", "values"),
        {
            "padding": [-1, 1.5, None, True, "4"],
            "flip": [1, None, "yes"],
            "rotation": [-15, 181, float("nan"), None],
            "scale": [1.0, (0, 1), (1.2, 0.8), (1,), [0.8, 1.2], (0.5, float("inf"))],
            "contrast": [-0.1, float("nan"), None],
            "saturation": [-0.1, float("inf"), "0.2"],
            "interpolation": ["bicubic", None],
        }.items(),
    )
    def test_impossible_values_are_refused(self, field: str, values: list[object]) -> None:
        for value in values:
            with pytest.raises(ValueError, match=f"Augment: {field}: got"):
                Augment(**{field: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("augment", [Augment(2, True), Augment(rotation=9), everything])
    def test_reproducible_and_pure(self, augment: Augment) -> None:
        x = noise()
        before = x.clone()
        first = augment(x, seeded(3))
        assert torch.equal(first, augment(x, seeded(3)))
        assert not torch.equal(first, augment(x, seeded(4)))
        assert torch.equal(x, before)
        assert first.shape == x.shape
        assert first.min() >= 0
        assert first.max() <= 1

    def test_every_sample_draws_for_itself(self) -> None:
        x = noise(1).expand(16, -1, -1, -1)
        assert len(torch.unique(self.everything(x, seeded()), dim=0)) == 16

    @pytest.mark.parametrize("size", [7, 28, 32, 64])
    def test_a_flip_mirrors_half_of_the_images_exactly(self, size: int) -> None:
        x = noise(400, 1, size)
        y = Augment(flip=True)(x, seeded())
        mirrored = (y == x.flip(-1)).flatten(1).all(1)
        kept = (y == x).flatten(1).all(1)
        assert (mirrored ^ kept).all()
        assert 150 < mirrored.sum() < 250

    @pytest.mark.parametrize("size", [7, 28, 32, 64])
    def test_a_crop_shifts_whole_pixels_and_fills_with_zeros(self, size: int) -> None:
        padding = 3
        x = noise(300, 2, size)
        y = Augment(padding=padding)(x, seeded())
        padded = torch.nn.functional.pad(x, [padding] * 4)
        places = range(2 * padding + 1)
        found = torch.zeros(len(places), len(places))
        matches = torch.zeros(len(x))
        for i in places:
            for j in places:
                window = padded[:, :, i : i + size, j : j + size]
                same = (window == y).flatten(1).all(1)
                found[i, j] = same.sum()
                matches += same
        assert (matches == 1).all()
        assert found.sum(0).min() > 20  # each of the 7 shifts, about 43 times
        assert found.sum(1).min() > 20

    def test_flip_and_crop_keep_the_channels_together(self) -> None:
        x = noise(50, 1).expand(-1, 3, -1, -1)
        y = Augment(padding=3, flip=True)(x, seeded())
        assert torch.equal(y[:, 0], y[:, 1])
        assert torch.equal(y[:, 0], y[:, 2])

    def test_a_rotation_is_about_the_centre_and_up_to_its_bound(self) -> None:
        # The angle of a thin bar, from its second moments.
        size = 33
        x = torch.zeros(500, 1, size, size)
        x[:, :, size // 2, 4:-4] = 1
        y = Augment(rotation=15)(x, seeded())[:, 0]
        axis = torch.arange(size) - size // 2
        mass = y.sum((1, 2))
        assert ((y * axis).sum((1, 2)) / mass).abs().max() < 0.1
        assert ((y * axis[:, None]).sum((1, 2)) / mass).abs().max() < 0.1
        xx = (y * axis**2).sum((1, 2))
        yy = (y * axis[:, None] ** 2).sum((1, 2))
        xy = (y * axis * axis[:, None]).sum((1, 2))
        angle = torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2)
        assert angle.abs().max() < 15.2
        assert angle.max() > 13
        assert angle.min() < -13
        assert angle.mean().abs() < 2

    def test_the_scale_is_a_magnification_between_its_bounds(self) -> None:
        x = torch.zeros(300, 1, 40, 40)
        x[:, :, 10:30, 10:30] = 1
        y = Augment(scale=(0.8, 1.2))(x, seeded())
        factor = (y.sum((1, 2, 3)) / 400).sqrt()
        assert 0.79 < factor.min() < 0.83
        assert 1.17 < factor.max() < 1.21

    def test_the_nearest_pixel_makes_no_new_values(self) -> None:
        x = noise(1, 1, 32).expand(20, -1, -1, -1)
        everything = Augment(2, True, 30, (0.8, 1.2), interpolation="nearest")
        assert torch.isin(
            everything(x, seeded()), torch.cat((x[0].flatten(), torch.zeros(1)))
        ).all()
        smooth = Augment(2, True, 30, (0.8, 1.2))
        assert not torch.isin(smooth(x, seeded()), x[0]).all()
        # Both look at the same places: within the picture a ramp differs by less than a pixel.
        ramp = torch.linspace(0, 1, 32).expand(20, 1, 32, 32)
        inside = smooth(torch.ones_like(ramp), seeded()) > 0.9999
        difference = everything(ramp, seeded()) - smooth(ramp, seeded())
        assert inside.float().mean() > 0.6
        assert difference[inside].abs().max() < 0.51 / 31

    def test_no_rotation_by_a_tiny_angle_range_is_the_identity(self) -> None:
        x = noise()
        torch.testing.assert_close(Augment(rotation=1e-6)(x, seeded()), x, atol=1e-4, rtol=0)

    def test_contrast_keeps_the_mean_grey_and_saturation_keeps_the_grey(self) -> None:
        x = 0.3 + 0.4 * noise(50)  # far enough from 0 and 1 that nothing is clipped
        grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]

        def brightness(images: Tensor) -> Tensor:
            return (images * grey).sum(1)

        y = Augment(contrast=0.25)(x, seeded())
        agree(brightness(y).mean((1, 2)), brightness(x).mean((1, 2)), 3 * 12 * 12)
        ratio = y.std((1, 2, 3)) / x.std((1, 2, 3))
        assert 0.74 < ratio.min() < 0.85
        assert 1.15 < ratio.max() < 1.26
        z = Augment(saturation=0.25)(x, seeded())
        torch.testing.assert_close(brightness(z), brightness(x))
        assert (z - x).abs().max() > 0.01
        one = noise(4, 1)
        torch.testing.assert_close(Augment(saturation=0.25)(one, seeded()), one)

    def test_a_longer_batch_starts_no_other_stream(self) -> None:
        # Whatever is on, a call draws 7 numbers a sample: the generator ends in the same state.
        ends = []
        for augment in (Augment(), Augment(padding=1), self.everything):
            g = seeded()
            augment(noise(), g)
            ends.append(g.get_state())
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], ends[2])

    def test_the_papers_augmentations(self) -> None:
        cifar, tiny = (data.SOURCES[name].augment for name in ("cifar10", "tiny-imagenet"))
        assert (
            cifar
            == data.SOURCES["cifar100"].augment
            == Augment(4, True, 15, interpolation="nearest")
        )
        assert tiny == Augment(8, True, 30, (0.8, 1.2), 0.25, 0.25, "nearest")


class TestLoad:
    def write(self, folder: Path, arrays: sources.Arrays, name: str = "cifar10") -> Path:
        path = folder / f"{name}.npz"
        np.savez(path, **arrays)
        return path

    def test_held_out_images_are_balanced_and_in_neither_other_split(self, tmp_path: Path) -> None:
        self.write(tmp_path, toy_arrays())
        task = data.load("cifar10", device="cpu", folder=tmp_path, validation=20)
        assert [len(s) for s in (task.train, task.val, task.test)] == [40, 20, 20]
        assert task.val.labels.bincount().tolist() == [5] * 4
        assert not set(pixels(task.train)) & set(pixels(task.val))
        assert len(set(pixels(task.train)) | set(pixels(task.val))) == 60
        assert task.class_names == ("class 0", "class 1", "class 2", "class 3")

    def test_all_images_may_train(self, tmp_path: Path) -> None:
        self.write(tmp_path, toy_arrays())
        task = data.load("cifar10", device="cpu", folder=tmp_path, validation=0)
        assert (len(task.train), len(task.val)) == (60, 0)
        assert list(task.val.batches(8)) == []

    @pytest.mark.parametrize("validation", [20, 0])
    def test_there_are_always_images_to_choose_by(self, tmp_path: Path, validation: int) -> None:
        """Where all images train: the last of them, balanced, and none of the test set."""
        self.write(tmp_path, toy_arrays())
        task = data.load("cifar10", device="cpu", folder=tmp_path, validation=validation)
        if validation:
            assert task.held_out is task.val
        else:
            assert pixels(task.held_out) == pixels(task.train)[-6:]
            assert task.held_out.labels.tolist() == task.train.labels.tolist()[-6:]
            assert len(task.held_out.labels.unique()) == 4
        assert not set(pixels(task.held_out)) & set(pixels(task.test))
        one = replace(task, train=task.train.first(1))
        assert len(one.held_out) == (20 if validation else 1)

    def test_the_order_in_the_file_does_not_matter(self, tmp_path: Path) -> None:
        arrays = toy_arrays()
        shuffled = dict(arrays)
        for split in ("train", "test"):
            order = np.random.default_rng(1).permutation(len(arrays[f"{split}_labels"]))
            for what in ("images", "labels"):
                shuffled[f"{split}_{what}"] = arrays[f"{split}_{what}"][order]
        tasks = []
        for name, version in (("cifar10", arrays), ("cifar100", shuffled)):
            self.write(tmp_path, version, name)
            tasks.append(data.load(name, device="cpu", folder=tmp_path, validation=20))
        for which in ("train", "val", "test"):
            a, b = (getattr(task, which) for task in tasks)
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)

    def test_images_keep_their_pixels_and_labels(self, tmp_path: Path) -> None:
        arrays = toy_arrays()
        self.write(tmp_path, arrays)
        task = data.load("cifar10", device="cpu", folder=tmp_path, validation=0)
        label_of = {
            image.tobytes(): label
            for image, label in zip(arrays["train_images"], arrays["train_labels"], strict=True)
        }
        for image, label in zip(task.train.images, task.train.labels, strict=True):
            assert label_of[image.permute(1, 2, 0).numpy().tobytes()] == label

    def test_resizing_keeps_proportions(self, tmp_path: Path) -> None:
        arrays = toy_arrays(size=16)
        arrays["train_images"][:] = 77
        self.write(tmp_path, arrays)
        task = data.load("cifar10", device="cpu", folder=tmp_path, validation=0, image_size=8)
        assert task.train.images.shape == (60, 3, 8, 8)
        assert (task.train.images == 77).all()
        assert task.augment == Augment(2, True, 15, interpolation="nearest")

    def test_the_downloads_folder_is_looked_in_too(self, tmp_path: Path) -> None:
        (tmp_path / "downloads").mkdir()
        self.write(tmp_path / "downloads", toy_arrays())
        assert len(data.load("cifar10", device="cpu", folder=tmp_path, validation=0).train) == 60

    def test_the_data_folder_comes_from_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MCNOTES_DATA", raising=False)
        assert data.default_folder() == ROOT / "data"
        monkeypatch.setenv("MCNOTES_DATA", str(tmp_path))
        assert data.default_folder() == tmp_path
        monkeypatch.setenv("MCNOTES_DATA", str(tmp_path / "none"))
        with pytest.raises(DataError, match=r"MCNOTES_DATA is .*none, expected a folder"):
            data.default_folder()

    def test_an_installed_package_looks_in_the_users_cache_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MCNOTES_DATA", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(cache, "ROOT", tmp_path / "site-packages")
        assert tmp_path / "site-packages" not in data.default_folder().parents
        with pytest.raises(DataError, match=r"found no fashion-mnist-small.npz.*MCNOTES_DATA"):
            data.load("fashion-mnist-small", device="cpu")


class TestLoadErrors:
    def load(self, folder: Path, name: str = "cifar10", **options: object) -> Task:
        return data.load(name, device="cpu", folder=folder, **options)

    def test_an_unknown_name(self) -> None:
        with pytest.raises(
            ValueError, match="got 'cifar-10', expected a data set; did you mean 'cifar10'"
        ):
            data.load("cifar-10")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("validation", 2.5), ("validation", "5"), ("folder", 3), ("device", "meta")],
    )
    def test_arguments_that_are_none(self, tmp_path: Path, name: str, value: Any) -> None:
        np.savez(tmp_path / "cifar10.npz", **toy_arrays())
        with pytest.raises(ValueError, match=f"^data.load: {name}: got .*, expected"):
            data.load("cifar10", **{"folder": tmp_path, "device": "cpu"} | {name: value})
        with pytest.raises(ValueError, match=r"^data.load: got .* expected a data set"):
            data.load(["cifar10"])  # type: ignore[arg-type]

    def test_arrays_of_any_layout_are_the_same(self, tmp_path: Path) -> None:
        """As NumPy stores them where axes were moved, or on another computer."""
        arrays = toy_arrays()
        np.savez(tmp_path / "cifar10.npz", **arrays)
        expected = self.load(tmp_path, validation=10)
        arrays["train_images"] = np.asfortranarray(arrays["train_images"])
        arrays["train_labels"] = arrays["train_labels"].astype(">i8")
        np.savez(tmp_path / "cifar10.npz", **arrays)
        found = self.load(tmp_path, validation=10)
        assert torch.equal(found.train.images, expected.train.images)
        assert torch.equal(found.train.labels, expected.train.labels)

    def test_a_file_that_claims_more_than_there_is_memory(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "cifar10.npz", **toy_arrays())
        head = io.BytesIO()
        claim = {"descr": "|u1", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(head, claim)
        with zipfile.ZipFile(tmp_path / "cifar10.npz", "a") as file:
            file.writestr("more.npy", head.getvalue())
        with pytest.raises(DataError, match=r"too little memory .*Unable to allocate"):
            self.load(tmp_path)

    @pytest.mark.parametrize("validation", [-1, 60, 61])
    def test_an_impossible_validation_set(self, tmp_path: Path, validation: int) -> None:
        np.savez(tmp_path / "cifar10.npz", **toy_arrays())
        with pytest.raises(ValueError, match=rf"validation={validation}, .* the 60 training"):
            self.load(tmp_path, validation=validation)

    @pytest.mark.parametrize(
        ("name", "fix"),
        [
            ("fashion-mnist-small", "restore it from the repository"),
            ("fashion-mnist", "pass download=True"),
            ("cifar10", "pass download=True"),
            ("tiny-imagenet", r"unpack .*tiny-imagenet-200\.zip to .*downloads"),
        ],
    )
    def test_a_missing_file(self, tmp_path: Path, name: str, fix: str) -> None:
        with pytest.raises(DataError, match=rf"found no {name}.npz in .*\. Fix: {fix}"):
            self.load(tmp_path, name)

    @pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
    def test_a_truncated_file(self, tmp_path: Path, kept: float) -> None:
        content = SMALL.read_bytes()
        path = tmp_path / SMALL.name
        path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
        with pytest.raises(DataError, match=rf"{re.escape(str(path))} is damaged .*delete it"):
            self.load(tmp_path, "fashion-mnist-small")

    @pytest.mark.parametrize("compressed", [False, True])
    def test_a_flipped_bit(self, tmp_path: Path, compressed: bool) -> None:
        path = tmp_path / "cifar10.npz"
        (np.savez_compressed if compressed else np.savez)(path, **toy_arrays())
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cifar10.npz is damaged"):
            self.load(tmp_path)

    def test_another_file_by_that_name(self, tmp_path: Path) -> None:
        path = tmp_path / "cifar10.npz"
        np.save(path.with_suffix(".npy"), np.zeros(3))
        path.with_suffix(".npy").rename(path)
        with pytest.raises(DataError, match=r"cifar10.npz is damaged or no .npz file"):
            self.load(tmp_path)

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "cifar10.npz")
        with pytest.raises(DataError, match=r"cifar10.npz is .* \(it is no regular file\)"):
            self.load(tmp_path)

    def test_a_pickle_is_not_opened(self, tmp_path: Path) -> None:
        arrays = toy_arrays() | {"class_names": np.array([object()] * 4)}
        np.savez(tmp_path / "cifar10.npz", **arrays)
        with pytest.raises(DataError, match=r"cifar10.npz is damaged"):
            self.load(tmp_path)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"test_labels": None}, "lacks test_labels"),
            ({"train_images": np.zeros((60, 8, 8, 3))}, "has train_images of float64"),
            (
                {"train_images": np.zeros((60, 3, 8, 8), np.uint8)},
                "has train_images .* not uint8 .N, H, W",
            ),
            (
                {"train_images": np.zeros((60, 64), np.uint8)},
                "has train_images .* not uint8 .N, H, W",
            ),
            ({"train_labels": np.zeros(59, np.int64)}, r"has train_labels .* not .60."),
            ({"test_labels": np.zeros(20)}, "has test_labels of float64"),
            ({"test_labels": np.full(20, 4)}, r"has test_labels outside of 0\.\.3"),
            ({"test_labels": np.full(20, -1)}, r"has test_labels outside of 0\.\.3"),
            (
                {"test_images": np.zeros((0, 8, 8, 3), np.uint8), "test_labels": np.zeros(0, int)},
                r"has test_images \(0, 8, 8, 3\), of which none has a pixel",
            ),
            (
                {
                    "train_images": np.zeros((0, 8, 8, 3), np.uint8),
                    "train_labels": np.zeros(0, int),
                },
                r"has train_images \(0, 8, 8, 3\), of which none has a pixel",
            ),
            (
                {"train_images": np.zeros((60, 8, 0, 3), np.uint8)},
                "has train_images .* of which none",
            ),
            (
                {"test_images": np.zeros((20, 8, 8), np.uint8)},
                r"has images of shape \(8, 8, 3\) in",
            ),
            ({"test_images": np.zeros((20, 7, 8, 3), np.uint8)}, "has images of shape .* but"),
            ({"class_names": np.array("one")}, r"has class_names \(\), not .classes."),
        ],
    )
    def test_a_file_of_another_form(
        self, tmp_path: Path, change: dict[str, NDArray | None], fault: str
    ) -> None:
        arrays = {k: v for k, v in (toy_arrays() | change).items() if v is not None}
        np.savez(tmp_path / "cifar10.npz", **arrays)
        with pytest.raises(DataError, match=rf"cifar10.npz {fault}.*. Fix: delete it"):
            self.load(tmp_path)


class TestTorchvision:
    """Through torchvision's own readers, on small files in its own format."""

    def idx(self, array: NDArray) -> bytes:
        return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()

    def fashion(self, folder: Path, zipped: bool = False) -> sources.Arrays:
        """The four IDX files of a tiny Fashion-MNIST."""
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: sources.Arrays = {}
        for split, prefix, n in (("train", "train", 400), ("test", "t10k", 60)):
            arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            arrays[f"{split}_labels"] = (np.arange(n) % 10).astype(np.uint8)
            for what, stem in (("images", "images-idx3-ubyte"), ("labels", "labels-idx1-ubyte")):
                content = self.idx(arrays[f"{split}_{what}"])
                path = folder / f"{prefix}-{stem}{'.gz' if zipped else ''}"
                path.write_bytes(gzip.compress(content) if zipped else content)
        return arrays

    def test_full_fashion_mnist(self, tmp_path: Path) -> None:
        arrays = self.fashion(tmp_path / "downloads/FashionMNIST/raw")
        task = data.load("fashion-mnist", device="cpu", folder=tmp_path, validation=100)
        assert [len(s) for s in (task.train, task.val, task.test)] == [300, 100, 60]
        assert task.class_names[9] == "Ankle boot"
        held = {image.tobytes() for image in arrays["train_images"]}
        assert set(pixels(task.train)) | set(pixels(task.val)) == held

    def test_a_truncated_download(self, tmp_path: Path) -> None:
        raw = tmp_path / "downloads/FashionMNIST/raw"
        self.fashion(raw)
        path = raw / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"no intact FashionMNIST in .*pass download=True"):
            data.load("fashion-mnist", device="cpu", folder=tmp_path)

    def test_a_download_that_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "downloads").mkdir()
        with pytest.raises(DataError, match=r"no intact CIFAR10 in .*pass download=True"):
            data.load("cifar10", device="cpu", folder=tmp_path)

    def test_the_embedded_set_is_made_the_same_way_each_time(self, tmp_path: Path) -> None:
        digests = []
        for zipped in (False, True):
            idx, out = tmp_path / f"idx{zipped}", tmp_path / f"{zipped}.npz"
            self.fashion(idx, zipped)
            counts = ["--train", "12", "--test", "3"]
            command = [sys.executable, MAKE, idx, "--out", out, *counts]
            report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            digests.append(report.split()[-1])
            assert digests[-1] == hashlib.sha256(out.read_bytes()).hexdigest()
        assert digests[0] == digests[1]
        arrays = sources.check(sources.read_npz(out), out)
        assert np.bincount(arrays["train_labels"]).tolist() == [12] * 10
        assert np.bincount(arrays["test_labels"]).tolist() == [3] * 10


class TestTinyImageNet:
    def folder(self, root: Path) -> Path:
        """Two classes, three training pictures each, one of them grey, and two validation ones."""
        top = root / sources.TINY
        (top / "val/images").mkdir(parents=True)
        (top / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tbullfrog\nn03\tother\n")
        for wnid, shade in (("n01", 40), ("n02", 200)):
            (top / "train" / wnid / "images").mkdir(parents=True)
            for i, mode in enumerate(("RGB", "RGB", "L")):
                path = top / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
                Image.new(mode, (64, 64), (shade + i,) * 3 if mode == "RGB" else shade).save(path)
            Image.new("RGB", (64, 64), (shade,) * 3).save(top / f"val/images/{wnid}.JPEG")
        table = "n02.JPEG\tn02\t0\t0\t9\t9\nn01.JPEG\tn01\t0\t0\t9\t9\n"
        (top / "val/val_annotations.txt").write_text(table)
        return top

    def test_folders_become_arrays_once(self, tmp_path: Path) -> None:
        top = self.folder(tmp_path)
        for _ in range(2):
            task = data.load("tiny-imagenet", device="cpu", folder=tmp_path, validation=2)
            assert [len(s) for s in (task.train, task.val, task.test)] == [4, 2, 2]
            assert task.class_names == ("goldfish", "bullfrog")
            for split in (task.train, task.test):
                bright = split.images.float().mean((1, 2, 3)) > 120
                assert torch.equal(bright.long(), split.labels)
            if top.exists():  # the second time only the cache is left
                (tmp_path / sources.TINY).rename(tmp_path / "elsewhere")
        assert [path.name for path in tmp_path.glob("*.part")] == []

    @pytest.mark.parametrize(
        "name", ["words.txt", "val/val_annotations.txt", "train/n01/images/n01_1.JPEG"]
    )
    def test_a_damaged_folder(self, tmp_path: Path, name: str) -> None:
        path = self.folder(tmp_path) / name
        if path.suffix == ".JPEG":
            path.write_bytes(path.read_bytes()[:100])
        else:
            path.unlink()
        with pytest.raises(DataError, match=rf"{re.escape(str(path))}.*unpack .* again"):
            data.load("tiny-imagenet", device="cpu", folder=tmp_path)
        assert not (tmp_path / "tiny-imagenet.npz").exists()

    def test_a_folder_that_lacks_pictures(self, tmp_path: Path) -> None:
        (self.folder(tmp_path) / "train/n02/images/n02_2.JPEG").unlink()
        with pytest.raises(DataError, match=r"n02 has 2 pictures, others 3. Fix: unpack .* again"):
            data.load("tiny-imagenet", device="cpu", folder=tmp_path)


def test_the_input_pipeline_benchmark_runs() -> None:
    command = [sys.executable, ROOT / "benchmarks/input_pipeline.py", "--images", "256"]
    run = subprocess.run([*command, "--rounds", "1"], check=True, capture_output=True, text=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["images"], result["rounds"]) == (256, 1)  # how fast it is, no test can say
    assert result["ratio"] > 0


def test_images_augmented_once() -> None:
    images = torch.randint(0, 256, (1500, 1, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(1500) % 3)
    shown = split.augmented(Augment(padding=2, flip=True))
    assert shown.images.shape == images.shape
    assert torch.equal(shown.labels, split.labels)
    assert torch.equal(shown.images, split.augmented(Augment(padding=2, flip=True)).images)
    assert not torch.equal(shown.images, images)
    values = {*images[7].flatten().tolist(), 0}
    assert {*shown.images[7].flatten().tolist()} <= values, "pixels move, and keep their values"
    assert split.augmented(None) is split
