"""Bringing in one's own images: folders, arrays and loaders become tensors, or are refused."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import small
import torch
from PIL import EpsImagePlugin, Image
from small import picture_folder
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mcnotes import data
from mcnotes.data import DataError, Task, folders


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
        with pytest.raises(DataError, match=r"other classes in val than in train, such as 'other'"):
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


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 9), dtype=np.uint8)
LABELS = np.arange(12) % 3
FLOATS = torch.from_numpy(PIXELS).float()[:, None] / 255


def taken(monkeypatch: pytest.MonkeyPatch, made: Any, size: int | None = None) -> Task:
    """What `dataset` makes of what a user's function gives."""
    monkeypatch.setattr(folders, "resolve", lambda _: made if callable(made) else lambda: made)
    return data.dataset("their:data", size, "cpu")


class Items(Dataset):
    """A data set of pairs, of dictionaries, or of three values."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int) -> Any:
        x, y = FLOATS[i], int(LABELS[i])
        return {"pairs": (x, y), "dictionaries": {"image": x, "target": y}, "threes": (x, y, i)}[
            self.kind
        ]


ACCEPTED: dict[str, Callable[[], Any]] = {
    "labels [N, 1]": lambda: (PIXELS, LABELS[:, None]),
    "labels of bytes": lambda: (PIXELS, LABELS.astype(np.uint8)),
    "labels of the other byte order": lambda: (PIXELS, LABELS.astype(">i4")),
    "labels in a list": lambda: (PIXELS, LABELS.tolist()),
    "channels last": lambda: (PIXELS[..., None], LABELS),
    "floats": lambda: (FLOATS, LABELS),
    "float64 of the other byte order": lambda: ((PIXELS / 255).astype(">f8"), LABELS),
    "negative strides": lambda: (PIXELS[:, ::-1].copy()[:, ::-1], LABELS),
    "with a gradient": lambda: (FLOATS.clone().requires_grad_(), LABELS),
    "a column of pandas": lambda: (PIXELS, pandas.Series(LABELS, index=range(100, 112))),
    "a table of pandas": lambda: (
        PIXELS,
        pandas.DataFrame({"class": LABELS}, index=[*"fedcba"] * 2),
    ),
    "nothing masked": lambda: (np.ma.masked_array(PIXELS, False), LABELS),
    "a Dataset": lambda: Items("pairs"),
    "a TensorDataset": lambda: TensorDataset(FLOATS, torch.from_numpy(LABELS)),
    "a loader": lambda: DataLoader(Items("pairs"), 5),
    "a list of batches": lambda: [(FLOATS[:7], LABELS[:7]), (FLOATS[7:], LABELS[7:])],
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "targets of a regression": (lambda: (PIXELS, LABELS + 0.7), "labels of torch.float64.*regress"),
    "labels NaN": (lambda: (PIXELS, LABELS * np.nan), "labels of torch.float64"),
    "labels half": (lambda: (PIXELS, torch.zeros(12).half()), "labels of torch.float16"),
    "label -1": (lambda: (PIXELS, LABELS - 1), "the label -1, expected 0 to at most 99999"),
    "label 10^9": (lambda: (PIXELS, LABELS + 10**9), "the label 1000000000, expected"),
    "label 2^64 - 1": (lambda: (PIXELS, LABELS.astype("u8") - np.uint64(1)), "the label -1"),
    "one-hot": (lambda: (PIXELS, np.eye(3)[LABELS]), r"labels \[12, 3\], .*one-hot.*argmax"),
    "several labels": (lambda: (PIXELS, np.ones((12, 3), bool)), "multi-label"),
    "other labels": (
        lambda: (PIXELS, np.full((12, 3), 7)),
        r"labels \[12, 3\], expected the number",
    ),
    "words": (lambda: (PIXELS, LABELS.astype(str)), "labels that are no tensor of numbers"),
    "objects": (lambda: (PIXELS, LABELS.astype(object)), "labels that are no tensor of numbers"),
    "too few labels": (lambda: (PIXELS, LABELS[:9]), "12 images and 9 labels"),
    "a series": (lambda: (np.zeros((12, 2, 64, 1)), LABELS), r"\[12, 2, 64, 1\].*first or last"),
    "thin pictures": (lambda: (np.zeros((12, 3, 9, 3)), LABELS), "first or last"),
    "a table": (lambda: (np.zeros((12, 64)), LABELS), r"\[12, 64\], expected some of shape \[N, H"),
    "volumes": (lambda: (np.zeros((12, 1, 4, 9, 9)), LABELS), "expected some of shape"),
    "no images": (lambda: (PIXELS[:0], LABELS[:0]), r"images \[0, 8, 9\], expected some"),
    "no pixels": (lambda: (PIXELS[:, :0], LABELS), r"images \[12, 0, 9\], expected some"),
    "NaN": (lambda: (FLOATS.index_fill(0, torch.tensor(2), torch.nan), LABELS), "NaN or infinite"),
    "infinity": (lambda: (FLOATS / 0, LABELS), "NaN or infinite"),
    "floats to 255": (lambda: (FLOATS * 255, LABELS), "to 255.00, expected .*Fix: divide"),
    "divided twice": (
        lambda: (FLOATS / 255, LABELS),
        "from 0 to 0.0039, expected up to 1.*once only",
    ),
    "bytes of 0 and 1": (
        lambda: ((PIXELS > 99).astype(np.uint8), LABELS),
        "uint8 from 0 to 1, expected up to 255. Fix: convert them to floats",
    ),
    "masked": (lambda: (np.ma.masked_array(PIXELS, PIXELS > 9), LABELS), "some are masked"),
    "int64": (lambda: (PIXELS.astype(int), LABELS), "pixels of torch.int64, expected torch.uint8"),
    "bool": (lambda: (PIXELS > 9, LABELS), "pixels of torch.bool"),
    "uint16": (lambda: (PIXELS.astype("u2"), LABELS), "pixels of torch.uint16"),
    "complex": (lambda: (PIXELS.astype("c8"), LABELS), "pixels of torch.complex64"),
    "sparse": (lambda: (FLOATS.to_sparse(), LABELS), "images that are no tensor.*sparse"),
    "meta": (lambda: (FLOATS.to("meta"), LABELS), "images that are no tensor.*meta"),
    "dictionaries": (
        lambda: DataLoader(Items("dictionaries"), 5),
        r"a dict with image, target, expected pairs \(images, labels\). Fix: return the two alone",
    ),
    "three values": (lambda: Items("threes"), "a list of 3 values, expected pairs"),
    "bare batches": (lambda: [FLOATS], "a list of 1 values, expected pairs"),
    "no batches": (lambda: [], "no batch"),
    "batches that differ": (
        lambda: [(FLOATS, LABELS), (FLOATS[:, :, 1:], LABELS)],
        "cannot be read .*Sizes of tensors must match",
    ),
    "nothing": (lambda: None, "is a NoneType, expected"),
    "a name": (lambda: "mnist", "is a str, expected"),
    "an array alone": (lambda: PIXELS, "is a ndarray, expected"),
}


class TestEntrance:
    """What a user's function gives is right, or refused in one sentence."""

    @pytest.mark.parametrize("what", ACCEPTED)
    def test_what_means_the_same_is_the_same(
        self, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = taken(monkeypatch, [(PIXELS, LABELS)] * 3)
        found = taken(monkeypatch, [ACCEPTED[what]()] * 3)
        assert torch.equal(found.train.images, plain.train.images)
        assert torch.equal(found.train.labels, plain.train.labels)
        assert found.class_names == plain.class_names == ("0", "1", "2")

    @pytest.mark.parametrize("what", REFUSED)
    def test_what_is_not_understood_is_refused(
        self, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make, text = REFUSED[what]
        with pytest.raises(DataError, match=rf"^data.dataset: their:data: val .*{text}") as caught:
            taken(monkeypatch, [(PIXELS, LABELS), make(), (PIXELS, LABELS)])
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize(
        ("made", "text"),
        [
            (None, "gives a NoneType, expected a Task, .train, val, test"),
            ((PIXELS, LABELS), "gives a tuple of 2"),
            ([(PIXELS, LABELS)] * 4, "gives a list of 4"),
            ({"training": (PIXELS, LABELS)}, "gives a dict of training, expected"),
            (DataLoader(Items("pairs"), 4), "gives a DataLoader"),
            (Items("pairs"), "gives a Items"),
            (
                [(PIXELS, LABELS), (PIXELS[:, 1:], LABELS), (PIXELS, LABELS)],
                "one .channels, height",
            ),
            ([(PIXELS, LABELS * 0)] * 3, "has 1 class, expected two"),
            (replace(small.task(9), class_names=("a", "b")), "labels from 0 to 2, and 2 names"),
        ],
    )
    def test_three_sets_that_belong_together(
        self, made: Any, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A loader of three batches is no train, val and test."""
        with pytest.raises(DataError, match=text):
            taken(monkeypatch, made)

    def test_classes_are_numbered_from_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From 1, a network of three classes was asked to be built with four."""
        with pytest.raises(DataError, match=r"labels from 1 to 3, .* Fix: subtract 1"):
            taken(monkeypatch, [(PIXELS, LABELS + 1)] * 3)
        later = [(PIXELS, LABELS), (PIXELS, LABELS * 0 + 2), (PIXELS, LABELS)]
        assert taken(monkeypatch, later).num_classes == 3

    def test_a_source_may_be_a_path(self, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"": 8})
        expected = data.dataset(str(tmp_path), device="cpu").train.images
        for load in (data.dataset, lambda p, device: data.sets(p, device=device).task):
            assert torch.equal(load(tmp_path, device="cpu").train.images, expected)  # type: ignore[operator]

    @pytest.mark.parametrize("source", [None, 3, "", b"photos", ["photos"], "x" * 5000, "a\0b"])
    def test_sources_that_are_none(self, source: Any) -> None:
        for load in (data.dataset, data.sets):
            with pytest.raises(DataError, match=r"^data.(dataset|sets): .*expected .*a folder"):
                load(source)

    def test_splits_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task = taken(monkeypatch, {"test": (PIXELS[:3], LABELS[:3]), "train": (PIXELS, LABELS)})
        assert [len(s) for s in (task.train, task.val, task.test)] == [10, 2, 3]

    def test_functions_that_fail(self, user: Path) -> None:
        """Also those that end the process, and modules that do."""
        (user / "bad.py").write_text(
            "import sys\ndef raises(): raise RuntimeError('no disk')\ndef leaves(): sys.exit(3)\n"
            "def later():\n    yield 1\n    raise KeyError('x')\nlimit = 3\n"
        )
        for name, text in (
            ("raises", "RuntimeError: no disk"),
            ("leaves", "SystemExit: 3"),
            ("later", "KeyError: 'x'"),
            ("limit", "TypeError: 'int' object is not callable"),
        ):
            with pytest.raises(
                DataError, match=rf"bad:{name} fails \({text}\), expected a function"
            ):
                data.dataset(f"bad:{name}")
        for name, content in {"raised": "1 / 0", "left": "exit(0)", "broken": "def ("}.items():
            (user / f"{name}.py").write_text(f"import sys\n{content.replace('exit', 'sys.exit')}")
            with pytest.raises(ValueError, match=f"cannot import '{name}:data' "):
                data.dataset(f"{name}:data")
            sys.modules.pop(name, None)

    @pytest.mark.parametrize("size", [-3, 0, 2.5, True, "12", [12], 10**6])
    def test_sizes_that_are_none(
        self, size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        picture_folder(tmp_path, {"": 8})
        for source in (str(tmp_path), "fashion-mnist-small"):
            with pytest.raises(DataError, match=r"image_size: got .*, expected a whole number"):
                data.dataset(source, size, "cpu")
        with pytest.raises(DataError, match=r"image_size: got .*, expected a whole number"):
            taken(monkeypatch, [(PIXELS, LABELS)] * 3, size)
        with pytest.raises(ValueError, match=r"image_size: got .*, expected a whole number"):
            data.load("fashion-mnist-small", image_size=size, device="cpu")

    def test_a_size_cuts_out_the_middle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of arrays as of pictures: nothing is squeezed."""
        wide = np.pad(np.full((12, 8, 8), 200, np.uint8), [(0, 0), (0, 0), (6, 6)])
        assert (taken(monkeypatch, [(wide, LABELS)] * 3, 4).train.images == 200).all()
        with pytest.raises(DataError, match=r"images \[1, 12, 12\], expected image_size 8"):
            taken(monkeypatch, small.task(9), 8)


def damaged(name: str, content: bytes) -> Callable[[Path], str]:
    """Add a file of this content."""

    def change(root: Path) -> str:
        (root / "train/top" / name).write_bytes(content)
        return rf"cannot read .*{name} \(.*Fix: remove it"

    return change


def saved(name: str, cut: int) -> Callable[[Path], str]:
    """Add a picture of which so many bytes are overwritten from there on."""

    def change(root: Path) -> str:
        path = root / "train/top" / name
        Image.new("RGB", (12, 12)).save(path)
        content = path.read_bytes()
        path.write_bytes(content[:cut] + b"\xff" * 8 + content[cut + 8 :])
        return rf"cannot read .*{name} \(.*Fix: remove it"

    return change


def linked(place: str, target: str, text: str) -> Callable[[Path], str]:
    """Add a link."""

    def change(root: Path) -> str:
        (root / place).symlink_to(target)
        return text

    return change


def pipe(root: Path) -> str:
    os.mkfifo(root / "val/top/pipe.png")
    return "cannot read .*pipe.png .it is no regular file"


def hard_link(root: Path) -> str:
    os.link(root / "train/top/0.png", root / "test/top/again.png")
    return "0.png .it is the same file as .*again.png|again.png .it is the same file as .*0.png"


def second(name: str, like: str) -> Callable[[Path], str]:
    """Add a copy of a folder."""

    def change(root: Path) -> str:
        shutil.copytree(root / like, root / name)
        return rf"(has .*{name.split('/')[-1]}|{name} is a split inside)"

    return change


def bomb(side: int) -> Callable[[Path], str]:
    """Add a small file of very many pixels."""

    def change(root: Path) -> str:
        Image.new("1", (side, side)).save(root / "train/top/bomb.png")
        return "cannot read .*bomb.png .DecompressionBomb"

    return change


def unread(name: str) -> Callable[[Path], str]:
    """Add a picture of a kind that is not read."""

    def change(root: Path) -> str:
        (root / "train/top" / name).write_bytes(b"x")
        return f"cannot read .*{name}, expected .jpg.*Fix: convert it"

    return change


FOLDERS: dict[str, Callable[[Path], str]] = {
    "a GIF": unread("q.gif"),
    "a photograph of a telephone": unread("Q.HEIC"),
    "a JPEG of another name": unread("q.jfif"),
    "an array": unread("q.npy"),
    "a PPM of letters": damaged("q.ppm", b"P6 3 a 255 xx"),
    "a PGM of 10^16 pixels": damaged("q.pgm", b"P5\n99999999 99999999\n255\n"),
    "an empty TIFF": damaged("q.tiff", b"II*\x00\x08\x00\x00\x00"),
    "no bytes": damaged("q.jpg", b""),
    "a BMP of no size": saved("q.bmp", 18),
    "a TIFF of no table": saved("q.tif", 4),
    "a PNG of no head": saved("q.png", 12),
    "a PNG of 121 million pixels": bomb(11_000),
    "a PNG of 400 million pixels": bomb(20_000),
    "a link to the folder above": linked("train/top/loop", "..", "loop .it is a link to a folder"),
    "a class that links back": linked("train/loop", "..", "loop .it is a link back"),
    "a class twice": linked("train/other", "top", "other classes|the same file"),
    "a picture in two splits": linked("test/top/x.png", "../../train/top/0.png", "the same file"),
    "a picture by two names": hard_link,
    "a link to nothing": linked("train/top/x.png", "nothing", "x.png .*No such file"),
    "a link to itself": linked("train/top/x.png", "x.png", "x.png .*symbolic links"),
    "a pipe": pipe,
    "valid/ beside val/": second("valid", "val"),
    "Test/ beside test/": second("TEST", "test"),
    "pictures beside the splits": second("extra", "val"),
    "splits inside of a class": second("train/top/test", "val"),
}


class TestFolders:
    @pytest.mark.parametrize("what", FOLDERS)
    def test_what_does_not_belong_is_named(self, what: str, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"train": 4, "val": 3, "test": 3})
        text = FOLDERS[what](tmp_path)
        with pytest.raises(DataError, match=f"^data.dataset: .*({text})") as caught:
            data.dataset(str(tmp_path), 8, "cpu")
        assert len(str(caught.value)) < 600

    def test_a_link_that_leads_nowhere_new_adds_no_pictures(self, tmp_path: Path) -> None:
        """Twenty pictures once became 420, spread over train, val and test."""
        picture_folder(tmp_path, {"": 20})
        (tmp_path / "top/loop").symlink_to("..")
        with pytest.raises(DataError, match=r"loop .it is a link"):
            data.dataset(str(tmp_path), device="cpu")

    def test_what_programs_leave_behind_is_no_class(self, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"": 8})
        expected = data.dataset(str(tmp_path), device="cpu")
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "top/.ipynb_checkpoints"):
            shutil.copytree(tmp_path / "middle", tmp_path / name)
        (tmp_path / "top/._0.png").write_bytes(b"not a picture")
        found = data.dataset(str(tmp_path), device="cpu")
        assert found.class_names == ("bottom", "middle", "top")
        assert torch.equal(found.train.images, expected.train.images)

    @pytest.mark.parametrize("name", ["valid", "validation", "Val"])
    def test_other_names_of_val(self, name: str, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"train": 8, name: 6, "test": 2})
        task = data.dataset(str(tmp_path), device="cpu")
        assert [len(s) for s in (task.train, task.val, task.test)] == [24, 18, 6]

    def test_nothing_to_train_on(self, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"test": 8})
        with pytest.raises(DataError, match="has test/ and no train/"):
            data.dataset(str(tmp_path), device="cpu")

    @pytest.mark.parametrize(
        "places",
        [
            ("seg_train/seg_train/top", "seg_test/seg_test/top", "seg_pred/seg_pred"),
            ("training_set/cats", "test_set/cats"),
            ("train", "test"),
            ("Train-Images", "Validation-Images"),
        ],
    )
    def test_parts_are_no_classes(self, places: tuple[str, ...], tmp_path: Path) -> None:
        """As data sets of competitions are packed: two classes were "train" and "test"."""
        for place in places:
            (tmp_path / place).mkdir(parents=True)
            for k in range(8):
                Image.new("L", (8, 8), k).save(tmp_path / place / f"{k}.png")
        with pytest.raises(DataError, match="where classes would be, expected train/CLASS/PICTURE"):
            data.dataset(str(tmp_path), device="cpu")

    @pytest.mark.parametrize("name", ["__background__", "@home", "_noise_"])
    def test_no_class_goes_missing(self, name: str, tmp_path: Path) -> None:
        picture_folder(tmp_path, {"": 8})
        (tmp_path / "top").rename(tmp_path / name)
        assert name in data.dataset(str(tmp_path), device="cpu").class_names

    def test_no_picture_is_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """PostScript is a program, which Pillow gives to Ghostscript whatever the file's name."""
        picture_folder(tmp_path, {"": 8})
        Image.new("RGB", (8, 8)).save(tmp_path / "top/x.eps")
        (tmp_path / "top/x.eps").rename(tmp_path / "top/x.png")
        ran: list[Any] = []
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: ran.append(args))
        with pytest.raises(DataError, match=r"cannot read .*x.png .*cannot identify"):
            data.dataset(str(tmp_path), device="cpu")
        assert not ran

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        """Of pictures of vehicles."""
        picture_folder(tmp_path, {"": 8})
        (tmp_path / "top").rename(tmp_path / "train")
        task = data.dataset(str(tmp_path), device="cpu")
        assert task.class_names == ("bottom", "middle", "train")

    def test_classes_may_lie_elsewhere(self, tmp_path: Path) -> None:
        picture_folder(tmp_path / "all", {"": 8})
        (tmp_path / "few").mkdir()
        for name in ("top", "bottom"):
            (tmp_path / "few" / name).symlink_to(tmp_path / "all" / name)
        assert data.dataset(str(tmp_path / "few"), device="cpu").class_names == ("bottom", "top")
