"""Bringing in one's own images: folders, arrays and loaders become tensors, or are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import picture_folder
from torch.utils.data import DataLoader, TensorDataset

from mcnotes import data
from mcnotes.data import DataError, folders


class TestDataset:
    def test_by_name(self) -> None:
        task = data.dataset("fashion-mnist-small", image_size=14, device="cpu")
        assert task.example.shape == (2, 1, 14, 14)

    def test_folders_of_three_splits_are_taken_as_they_are(self, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"train": 8, "val": 3, "test": 4})
        task = data.dataset(str(tmp_path), device="cpu")
        assert [len(s) for s in (task.train, task.val, task.test)] == [24, 9, 12]
        assert task.class_names == ("bottom", "middle", "top")
        assert task.example.shape == (2, 1, 12, 12), "grey pictures have one channel"
        for split in (task.train, task.val, task.test):
            assert split.labels.bincount().tolist() == [len(split) // 3] * 3
            for image, label in zip(split.images, split.labels, strict=True):
                stripes = image.float().view(3, -1).mean(1)
                assert stripes.argmax() == label, "pictures and labels belong together"

    @pytest.mark.parametrize(
        ("counts", "sizes"),
        [
            ({"": 20}, [42, 9, 9]),
            ({"train": 20}, [42, 9, 9]),
            ({"train": 8, "val": 6}, [24, 9, 9]),
            ({"train": 20, "test": 4}, [51, 9, 12]),
        ],
    )
    def test_what_is_not_split_is_split_the_same_each_time(
        self, counts: dict[str, int], sizes: list[int], tmp_path: Path
    ) -> None:
        picture_folder(tmp_path, counts)
        one, two = (data.dataset(str(tmp_path), device="cpu") for _ in range(2))
        splits = [one.train, one.val, one.test]
        assert [len(s) for s in splits] == sizes
        assert all(
            torch.equal(a.images, b.images)
            for a, b in zip(splits, (two.train, two.val, two.test), strict=True)
        )
        keys = [{image.numpy().tobytes() for image in s.images} for s in splits]
        assert len(set.union(*keys)) == sum(sizes), "no picture is in two of them"
        assert all(len(s.labels.unique()) == 3 for s in splits)

    def test_pictures_of_all_sizes(self, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"train": 4, "val": 4, "test": 2}, size=(14, 12), mode="RGB")
        Image.new("L", (30, 20)).save(tmp_path / "train" / "top" / "odd.png")
        with pytest.raises(DataError, match=r"differ in size.*odd.png.*pass an image_size"):
            data.dataset(str(tmp_path), device="cpu")
        task = data.dataset(str(tmp_path), image_size=10, device="cpu")
        assert task.example.shape == (2, 3, 10, 10)

    def test_files_at_fault_are_named(self, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"train": 2, "val": 2})
        bad = tmp_path / "val" / "top" / "bad.png"
        bad.write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"cannot read .*bad.png.*Fix: remove it"):
            data.dataset(str(tmp_path))
        Image.fromarray(np.zeros((12, 12), np.uint16)).save(bad)
        with pytest.raises(DataError, match=r"bad.png \(more than 8 bits"):
            data.dataset(str(tmp_path))
        bad.unlink()
        (tmp_path / "val" / "top").rename(tmp_path / "val" / "other")
        with pytest.raises(DataError, match=r"other classes in val than in train, as 'other'"):
            data.dataset(str(tmp_path))

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("no/such/folder", "found no 'no/such/folder'.*fashion-mnist-small"),
            ("no_such_module:task", "No module named 'no_such_module'"),
            ("users_net:normalised", r"pixels from -0.50 to 0.50, expected .*normalised"),
        ],
    )
    def test_what_is_no_data_set_is_refused(self, user: Path, source: str, text: str) -> None:
        with pytest.raises((DataError, ValueError), match=text):
            data.dataset(source)

    def test_too_few_pictures(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="CLASS/PICTURE"):
            data.dataset(str(tmp_path))
        picture_folder(tmp_path, {"": 1})
        with pytest.raises(DataError, match="too few images"):
            data.dataset(str(tmp_path))

    def test_by_python_path(self, user: Path) -> None:
        ready = data.dataset("users_net:task", device="cpu")
        assert ready.name == "mine"
        arrays, loaders = (
            data.dataset(f"users_net:{n}", device="cpu") for n in ("arrays", "loaders")
        )
        for name in ("train", "val", "test"):
            one, two = vars(arrays)[name], vars(loaders)[name]
            assert torch.equal(one.images, two.images), "a shuffled loader gives the same split"
            assert torch.equal(one.labels, two.labels)
            assert len(one) == len(vars(ready)[name])
        assert arrays.class_names == ("0", "1", "2")

    def test_channels_may_stand_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randint(0, 256, (6, 9, 9, 3), dtype=torch.uint8)
        y = torch.arange(6) % 3
        monkeypatch.setattr(folders, "resolve", lambda _: lambda: [(x, y)] * 3)
        last = data.dataset("a:b", device="cpu")
        loader = DataLoader(TensorDataset(x.movedim(3, 1), y), 2)
        monkeypatch.setattr(folders, "resolve", lambda _: lambda: [loader] * 3)
        assert torch.equal(data.dataset("a:b", device="cpu").train.images, last.train.images)
        assert last.example.shape == (2, 3, 9, 9)
