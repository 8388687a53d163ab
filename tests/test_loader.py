"""Batches of a user's own: by name, from whatever can be read, or refused before any work."""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from mcnotes import data, prepare
from mcnotes.calls import InputError
from mcnotes.checkpoints import CheckpointError
from mcnotes.data import Loader
from mcnotes.data.sources import DataError

CPU = torch.device("cpu")
X, Y = torch.arange(60.0)[:, None], torch.arange(60) % 3


def taken(monkeypatch: pytest.MonkeyPatch, made: Any, **options: Any) -> data.Sets:
    monkeypatch.setitem(sys.modules, "their", SimpleNamespace(data=lambda: made))
    return data.sets("their:data", **options)


def inputs(source: Any) -> list[float]:
    """All of a source, each input one number."""
    return [float(v) for x, _ in Loader(source, CPU).batches(0) for v in x.flatten()]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y, strict=True)


class Broken(Dataset[Any]):
    """Its pictures cannot be put into a batch, or are not there."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 60

    def __getitem__(self, k: int) -> Any:
        if self.error:
            raise self.error
        return object(), 1


class TestDatasets:
    def test_three(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each is cut into batches; the images to train on come in another order."""
        parts = [TensorDataset(X[i:j], Y[i:j]) for i, j in ((0, 40), (40, 50), (50, 60))]
        found = taken(monkeypatch, parts, batch_size=16)
        assert [len(s) for s in (found.train, found.val, found.test)] == [3, 1, 1]
        assert sorted(inputs(found.train)) == X[:40, 0].tolist()
        assert inputs(found.train) != X[:40, 0].tolist()
        assert inputs(found.val) == X[40:50, 0].tolist()

    @pytest.mark.parametrize("make", [lambda: TensorDataset(X, Y), Stream])
    def test_one(self, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """It is shuffled, but the same each time; a stream comes as it is."""
        found, again = (taken(monkeypatch, make(), batch_size=5) for _ in range(2))
        parts = [inputs(s) for s in (found.train, found.val, found.test)]
        assert sorted([*parts[0], *parts[1], *parts[2]]) == X[:, 0].tolist()
        assert all(map(len, parts))
        assert parts == [inputs(s) for s in (again.train, again.val, again.test)]
        assert (parts[1] == sorted(parts[1])) == (make is Stream)

    def test_three_batches_in_a_list_are_batches_and_three_sets_a_tuple(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
        batches = [(images[i : i + 10], labels[i : i + 10]) for i in (0, 10, 20)]
        found = taken(monkeypatch, batches, batch_size=10)
        assert isinstance(found.train, list)
        with_sets = taken(monkeypatch, tuple(batches), batch_size=5)
        assert [len(s) for s in (with_sets.train, with_sets.val)] == [2, 1], (
            "batches of 5, of 10 images"
        )

    def test_two_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = TensorDataset(X, Y)
        found = taken(monkeypatch, {"train": whole, "val": DataLoader(whole, 6)}, batch_size=10)
        assert len(found.train) == 6
        assert inputs(found.val) + inputs(found.test) != []

    @pytest.mark.parametrize(
        ("made", "text"),
        [
            (Broken(), "cannot be read .TypeError: default_collate"),
            (Broken(OSError("no disk")), "cannot be read .OSError: no disk"),
            (Broken(SystemExit(3)), "cannot be read .SystemExit: 3"),
        ],
    )
    def test_what_cannot_be_read(self, made: Any, text: str) -> None:
        with pytest.raises(InputError, match=rf"^batches: they {text}"):
            Loader(DataLoader(made, 4), CPU)

    def test_pictures_that_are_no_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As of a data set of torchvision without ToTensor."""
        with pytest.raises(DataError, match=r"their:data cannot be read .TypeError: default_coll"):
            taken(monkeypatch, Broken())

    def test_functions_that_end_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "their", SimpleNamespace(data=lambda: sys.exit(3)))
        with pytest.raises(DataError, match=r"their:data fails .SystemExit: 3"):
            data.sets("their:data")


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reversed": lambda x: x[::-1].copy()[::-1],
    "of the other byte order": lambda x: x.astype(">f4"),
    "not to be written to": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "the last axis first": np.asfortranarray,
}


@pytest.mark.parametrize("how", LAYOUTS)
def test_arrays_of_any_layout_are_the_same(how: str) -> None:
    assert inputs([LAYOUTS[how](X.numpy())]) == X.flatten().tolist()


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (np.ma.masked_array(X.numpy(), X.numpy() > 9), "are masked"),
        (X.numpy().astype(np.longdouble), "longdouble|float128"),
        (X.to("meta"), "meta"),
    ],
)
def test_batches_that_hold_no_plain_numbers(batch: Any, text: str) -> None:
    with pytest.raises(InputError, match=f"^batches: .*({text})"):
        Loader([batch], CPU)


@pytest.mark.parametrize("samples", [0, -5, 2.5, "3", None])
def test_numbers_of_samples_that_are_none(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"data.take: samples: got .*, expected a whole number"):
        data.take([(X, Y)], samples)


@pytest.mark.parametrize("once", [True, False])
def test_an_iterator_loses_no_batch(once: bool) -> None:
    """Where it is read once, its second batch once went missing."""
    source = iter([(X[i : i + 10], Y[i : i + 10]) for i in range(0, 60, 10)])
    loader = Loader(source, CPU, once=once)
    found = [float(v) for x, _ in loader.batches(0) for v in x.flatten()]
    assert found == X[:, 0].tolist()


class TestForInputs:
    def sets(self, channels: int = 1) -> data.Sets:
        task = small.task(6)
        train = data.Split(task.train.images.expand(-1, channels, -1, -1), task.train.labels)
        one = data.Task("a", train, train, train, task.class_names)
        return data.Sets(train, train, train, one)

    def seen(self, channels: int, mean: Any, std: Any) -> Tensor:
        sets = self.sets(channels)
        assert sets.task is not None
        found: Tensor = prepare.for_inputs(nn.Flatten(2), sets, mean, std)(sets.task.example)
        return found

    @pytest.mark.parametrize(
        ("mean", "std", "alike"),
        [
            (0.5, None, ([0.5], [1.0])),
            (None, 0.25, ([0.0], [0.25])),
            (0, 1, (None, None)),
            (0.5, [0.2, 0.3, 0.4], ([0.5] * 3, [0.2, 0.3, 0.4])),
            ([0.5], [0.2, 0.2, 0.2], ([0.5] * 3, [0.2] * 3)),
            ((0.5, 0.5, 0.5), 0.2, ([0.5] * 3, [0.2] * 3)),
        ],
    )
    def test_one_number_is_for_all_channels(self, mean: Any, std: Any, alike: Any) -> None:
        for channels in (1, 3):
            assert torch.equal(self.seen(channels, mean, std), self.seen(channels, *alike))

    @pytest.mark.parametrize(
        ("channels", "mean", "std", "text"),
        [
            (3, [0.5] * 5, None, "mean and std of 5 channels for pictures of 3"),
            (1, [0.5] * 3, [0.1] * 4, "'mean': 3, 'std': 4.* expected as many"),
            (3, "[0.5]", None, r"mean: got '\[0.5\]', expected a number"),
            (3, None, 0, "std: got 0, expected a number above 0"),
            (3, [0.5, 0.5, float("nan")], None, "mean: got nan"),
        ],
    )
    def test_what_does_not_fit(self, channels: int, mean: Any, std: Any, text: str) -> None:
        with pytest.raises((InputError, CheckpointError), match=text):
            prepare.for_inputs(nn.Flatten(2), self.sets(channels), mean, std)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_models_come_out_of_their_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    net = small.plain()
    assert prepare.module("align", "model_a", wrap(net)) is net


class TestDevices:
    @pytest.mark.parametrize("device", ["gpu", "GPU:0", "cuda:99", "", 1.5, None])
    def test_those_that_are_not_there(
        self, device: Any, user: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = r"device: got .*, expected a device of this computer: auto, cpu"
        with pytest.raises(ValueError, match=f"^data.load: {text}"):
            data.load("fashion-mnist-small", device=device)
        for source in ("fashion-mnist-small", "users_net:task"):
            with pytest.raises(DataError, match=f"^data.dataset: {text}"):
                data.dataset(source, device=device)
            with pytest.raises(DataError, match=f"^data.(sets|dataset): {text}"):
                data.sets(source, device=device)


def test_sets_and_what_is_prepared_say_in_one_line_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tuple's own line shows every number of every batch."""
    batches = list(zip(X.split(12), Y.split(12), strict=True))
    found = taken(monkeypatch, (DataLoader(TensorDataset(X, Y), 12), batches, batches))
    assert repr(found) == "Sets(train: a DataLoader, val: a list of 5, test: a list of 5)"
    task = small.task()
    assert repr(data.Sets(task.train, task.val, task.test, task)) == f"Sets({task!r})"
    ready = prepare.prepare("align", [nn.Linear(1, 3), nn.Linear(1, 3)], batches)
    start = "Prepared(2 models of Linear for align, Loader(5 batches of 12 samples"
    assert repr(ready).startswith(start)
