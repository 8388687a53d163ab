"""Files as strangers write them: what a class itself would load is loaded, and no code runs."""

import argparse
import collections
import datetime
import enum
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import small
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mcnotes import checkpoints
from mcnotes.checkpoints import CheckpointError


class Tied(nn.Module):
    """A language model, whose words are its classes; and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.again, self.head.weight = self.inner, self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.inner(self.words(x)).relu()))


def normed_layers(
    weight: Callable[..., nn.Module], spectral: Callable[..., nn.Module]
) -> nn.Module:
    return nn.Sequential(
        weight(nn.Conv2d(1, 4, 3)),
        nn.ReLU(),
        spectral(nn.Conv2d(4, 5, 3)),
        nn.Flatten(),
        weight(nn.Linear(320, 6), dim=None),
        nn.ReLU(),
        spectral(weight(nn.LSTM(6, 3), "weight_hh_l0"), "weight_ih_l0"),
    )


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*non-contiguous:UserWarning")
class TestForms:
    """One network in the forms that its class's own load_state_dict takes."""

    def test_shared_tensors_once(self, tmp_path: Path) -> None:
        one, two = Tied(), Tied()
        for net, name in ((one, "a"), (two, "b")):
            save_model(net, str(tmp_path / f"{name}.safetensors"))
            torch.save(net.state_dict(), tmp_path / f"{name}.pt")
        first, second = checkpoints.load_pair(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", Tied()
        )
        x = torch.arange(9)[None]
        for net, found, name in ((one, first, "a.pt"), (two, second, "b.pt")):
            fresh = Tied()
            fresh.load_state_dict(found.theta)
            assert torch.equal(fresh(x), net(x))
            whole = checkpoints.load(tmp_path / name, Tied()).theta
            assert whole.keys() == found.theta.keys()
            assert all(torch.equal(whole[n], y) for n, y in found.theta.items())

    def test_tied_tensors_that_differ(self, tmp_path: Path) -> None:
        """PyTorch would take the last of them."""
        state = Tied().state_dict()
        torch.save(state | {"head.weight": state["head.weight"] + 1}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"'words.weight' and 'head.weight' are one tens"):
            checkpoints.load(tmp_path / "a.pt", Tied())
        lacking = {n: x for n, x in state.items() if not n.startswith(("inner", "again"))}
        save_file({n: x.clone() for n, x in lacking.items()}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"lacks 4 tensors, such as 'again.bias'"):
            checkpoints.load(tmp_path / "a.safetensors", Tied())

    @pytest.mark.parametrize("newer", [True, False])
    @pytest.mark.parametrize("wrap", ["", "module.", "net._orig_mod."])
    def test_weights_that_are_normed(self, newer: bool, wrap: str, tmp_path: Path) -> None:
        """A file of the older functions in a network of the newer, and the other way."""
        torch.manual_seed(0)
        old = normed_layers(nn.utils.weight_norm, nn.utils.spectral_norm)
        new = normed_layers(parametrizations.weight_norm, parametrizations.spectral_norm)
        source, net = (old, new) if newer else (new, old)
        x = torch.rand(3, 1, 12, 12)
        for _ in range(3):  # the singular vectors move
            source(x)
        torch.save({wrap + n: y for n, y in source.state_dict().items()}, tmp_path / "a.pt")
        found = checkpoints.load(tmp_path / "a.pt", net)
        assert found.theta.keys() == net.state_dict().keys()
        net.load_state_dict(found.theta)
        small.agree(net.eval()(x)[0], source.eval()(x)[0], small.terms(source))

    def test_what_is_normed_in_one_alone(self, tmp_path: Path) -> None:
        torch.save(nn.Sequential(nn.Linear(3, 2)).state_dict(), tmp_path / "a.pt")
        net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
        with pytest.raises(CheckpointError, match=r"lacks 2 .*besides '0.weight'"):
            checkpoints.load(tmp_path / "a.pt", net)

    def test_what_a_class_renames_itself(self, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()

        class Renamed(nn.Linear):
            def _load_from_state_dict(
                self, state: dict[str, Tensor], prefix: str, *rest: Any
            ) -> None:
                for old, new in {"kernel": "weight", "offset": "bias"}.items():
                    if prefix + old in state:
                        state[prefix + new] = state.pop(prefix + old)
                super()._load_from_state_dict(state, prefix, *rest)

        net = nn.Sequential(Renamed(4, 3), nn.ReLU(), nn.Linear(3, 2))
        state = net.state_dict()
        names = {"0.weight": "0.kernel", "0.bias": "0.offset"}
        held = {names.get(n, n): x for n, x in state.items()}
        torch.save({"model": held, "epoch": 3}, tmp_path / "a.pt")
        found = checkpoints.load(tmp_path / "a.pt", net)
        assert found.prefix == "model/"
        assert all(torch.equal(found.theta[n], x) for n, x in state.items())
        for change, text in (
            ({"0.kernel": held["0.kernel"].half()}, "does not fit"),
            ({"0.kernel": held["0.kernel"] * torch.nan}, "does not fit"),
            ({"0.kernel": held["0.kernel"][:1]}, "does not fit"),
            ({"more": held["0.offset"]}, "does not fit"),
        ):
            torch.save({"model": held | change}, tmp_path / "b.pt")
            with pytest.raises(CheckpointError, match=text):
                checkpoints.load(tmp_path / "b.pt", net)

    def test_a_class_that_takes_anything_is_not_believed(self, tmp_path: Path) -> None:
        """What a file does not fill would be random numbers."""

        class Lenient(nn.Linear):
            def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
                return super().load_state_dict(state, strict=False, assign=assign)

        torch.save({"bias": torch.ones(2), "kernel": torch.ones(2, 3)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="lacks 'weight'"):
            checkpoints.load(tmp_path / "a.pt", Lenient(3, 2))

    def test_state_beside_tensors(self, tmp_path: Path) -> None:
        class Scaled(nn.Linear):
            scale = 2.0

            def get_extra_state(self) -> Any:
                return {"scale": self.scale}

            def set_extra_state(self, state: Any) -> None:
                self.scale = state["scale"]

        net = nn.Sequential(Scaled(3, 2))
        torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
        found = checkpoints.load(tmp_path / "a.pt", net)
        assert {*found.theta} == {"0.weight", "0.bias"}
        checkpoints.save(tmp_path / "b.safetensors", found.theta, net)
        assert {*checkpoints.load(tmp_path / "b.safetensors", net).theta} == {*found.theta}
        net[0].scale = 3.0
        with pytest.raises(CheckpointError, match=r"'0._extra_state', which is no tensor"):
            checkpoints.load(tmp_path / "a.pt", net)

    def test_names_with_slashes_and_tensors_of_the_same_names_elsewhere(
        self, tmp_path: Path
    ) -> None:
        net = nn.ModuleDict({"a/b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
        other = {"c.weight": torch.ones(2, 2)}
        torch.save({"model": net.state_dict(), **other}, tmp_path / "a.pt")
        found = checkpoints.load(tmp_path / "a.pt", net)
        assert all(torch.equal(found.theta[n], x) for n, x in net.state_dict().items())
        assert found.outside == ["c.weight"]

    def test_lists_of_networks(self, tmp_path: Path) -> None:
        """And a network beside its optimizer's state."""
        one, two = (small.normed().state_dict() for _ in range(2))
        torch.save([one, two], tmp_path / "a.pt")
        found = checkpoints.load(tmp_path / "a.pt", small.normed(), "1")
        assert torch.equal(found.theta["0.weight"], two["0.weight"])
        with pytest.raises(CheckpointError, match=r"fit at \['0/', '1/'\]"):
            checkpoints.load(tmp_path / "a.pt", small.normed())
        torch.save((one, {"state": {0: torch.ones(3)}}), tmp_path / "a.pt")
        assert checkpoints.load(tmp_path / "a.pt", small.normed()).outside == ["1/state/0"]


class Colour(enum.Enum):
    RED = 1


class Config(dict[str, Any]):
    """As many libraries have one."""

    __getattr__ = dict.__getitem__


class Slotted:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = np.ones(2)


class Marks:
    """Writes down that it was made, or called, or filled."""

    made: ClassVar[list[str]] = []

    def __new__(cls) -> "Marks":
        cls.made.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.made.append("state")

    def __getstate__(self) -> Any:
        return {"a": 1}


BESIDE: dict[str, Any] = {
    "numpy scalars": {"best": np.float64(0.5), "epoch": np.int64(3), "done": np.bool_(True)},
    "numpy arrays": {"losses": np.linspace(0, 1, 9), "names": np.array(["a"]), "rng": b"123"},
    "numpy's generator": np.random.default_rng(0).bit_generator.state,
    "Namespace": argparse.Namespace(lr=0.1, momentum=np.float32(0.9), path=Path("here")),
    "nested": [{"args": argparse.Namespace(inner=argparse.Namespace(a=1))}],
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, loss=[np.float64(1.0), 0.5]),
    "a dictionary's subclass": Config(lr=0.1, inner=Config(a=np.int32(3))),
    "paths": {"root": Path("/data"), "there": [Path("a") / "b"]},
    "dates": {"at": datetime.datetime(2020, 1, 2), "took": datetime.timedelta(seconds=3)},
    "enumerations": {"colour": Colour.RED},
    "slots": Slotted(),
    "sets of objects": {Path("a"), Path("b")},
    "an object": Marks(),
    "a module": nn.Linear(2, 2),
    "a function": len,
    "a type": dict,
    "complex": 3 + 2j,
}


UNLISTED = {
    "Namespace",
    "defaultdict",
    "a dictionary's subclass",
    "paths",
    "dates",
    "enumerations",
    "slots",
    "sets of objects",
    "an object",
    "a module",
    "a function",
    "a type",
}
"""Refused in files of before PyTorch 1.6, which do not list the classes that they name."""


class TestBeside:
    """What stands beside the weights is passed over, and never made."""

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("what", BESIDE)
    def test_weights_are_found(self, what: str, old: bool, tmp_path: Path) -> None:
        state = small.normed().state_dict()
        held = {"model": state, "other": BESIDE[what]}
        torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        Marks.made.clear()
        known = {*torch.serialization.get_safe_globals()}
        if old and what in UNLISTED:
            with pytest.raises(CheckpointError, match="Fix: if you trust it"):
                checkpoints.load(tmp_path / "a.pt", small.normed())
        else:
            found = checkpoints.load(tmp_path / "a.pt", small.normed())
            assert all(torch.equal(found.theta[n], x) for n, x in state.items())
        assert Marks.made == []
        assert {*torch.serialization.get_safe_globals()} == known

    def test_weights_in_a_dictionary_of_a_class_of_its_own(self, tmp_path: Path) -> None:
        state = small.normed().state_dict()
        torch.save(Config(model=Config(state)), tmp_path / "a.pt")
        found = checkpoints.load(tmp_path / "a.pt", small.normed())
        assert found.prefix == "model/"
        assert all(torch.equal(found.theta[n], x) for n, x in state.items())

    def test_no_code_runs(self, tmp_path: Path) -> None:
        """Whatever is called for, by whatever name."""
        target = tmp_path / "ran"
        for k, (function, args) in enumerate(
            [
                (os.system, (f"touch {target}",)),
                (exec, (f"open({str(target)!r}, 'w')",)),
                (eval, (f"open({str(target)!r}, 'w')",)),
                (open, (str(target), "w")),
                (os.mkdir, (str(target),)),
                (Path.touch, (target,)),
                (getattr, (Path(target), "touch")),
                (sys.exit, (3,)),
                (np.save, (str(target), np.ones(2))),
                (torch.save, ({}, str(target))),
                (__import__, ("antigravity",)),
                (collections.namedtuple, ("a", "b")),
            ]
        ):

            class Trap:
                def __reduce__(self, does: Any = (function, args)) -> Any:
                    return does

            for old in (False, True):
                path = tmp_path / f"{k}.pt"
                held = {"model": small.normed().state_dict(), "other": [Trap(), {"a": Trap()}]}
                torch.save(held, path, _use_new_zipfile_serialization=not old)
                try:
                    found = checkpoints.load(path, small.normed())
                except CheckpointError as error:
                    assert "can run any code" in str(error)  # noqa: PT017
                else:
                    assert len(found.theta) == 8
        assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".pt")] == []

    def test_a_network_as_an_object_is_named(self, tmp_path: Path) -> None:
        torch.save({"model": small.normed(), "epoch": 3}, tmp_path / "a.pt")
        text = r"lacks 7 tensors.*torch.nn.modules.activation.ReLU.*names in the file.*save the st"
        with pytest.raises(CheckpointError, match=text) as caught:
            checkpoints.load(tmp_path / "a.pt", small.normed())
        assert len(str(caught.value)) < 800

    def test_threads_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        state = small.normed().state_dict()
        torch.save({"model": state, "args": argparse.Namespace(a=Config())}, tmp_path / "a.pt")
        found: list[Any] = []

        def work() -> None:
            found.extend(checkpoints.load(tmp_path / "a.pt", small.normed()) for _ in range(9))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 36

    def test_what_the_user_has_allowed_stays_allowed(self, tmp_path: Path) -> None:
        state = small.normed().state_dict()
        torch.save({"model": state, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoints.load(tmp_path / "a.pt", small.normed())
            assert argparse.Namespace in torch.serialization.get_safe_globals()


class TestNoFile:
    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_a_pipe_is_not_waited_for(self, name: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read .*no regular file"):
            checkpoints.load(tmp_path / name, small.normed())

    def test_lists_without_end(self, tmp_path: Path) -> None:
        held: list[Any] = [torch.ones(1)]
        held.append({"again": held})
        torch.save(held, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="nested without end"):
            checkpoints.load(tmp_path / "a.pt", small.normed())

    def test_a_method_that_a_file_replaces(self, tmp_path: Path) -> None:
        """PyTorch sets attributes of dictionaries as a file says."""
        state = collections.OrderedDict(small.normed().state_dict())
        state.metadata = 3  # type: ignore[attr-defined]
        torch.save(state, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt") as file:
            content = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
            for name, data in content.items():
                file.writestr(
                    name, data.replace(b"\x08\x00\x00\x00metadata", b"\x05\x00\x00\x00items")
                )
        assert torch.load(tmp_path / "a.pt").items == 3
        assert len(checkpoints.load(tmp_path / "a.pt", small.normed()).theta) == 8
