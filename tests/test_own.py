"""Bringing in one's own models: what fits is found, what does not is refused, nothing changes."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mcnotes import checkpoints, curves, data, symmetry, train
from mcnotes.checkpoints import CheckpointError
from mcnotes.data import DataError, folders
from tests import small
from tools import chapters, notebooks, presets

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, Tensor]


def states(count: int = 2, make: Callable[[], nn.Module] = small.normed) -> list[State]:
    """Networks of different weights, with BatchNorm statistics that are no longer fresh."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        net = make().train()
        for _ in range(2):
            net(torch.rand(8, 1, 12, 12))
        found.append({n: x.detach().clone() for n, x in net.state_dict().items()})
    return found


def equal(theta: State, state: State) -> bool:
    """The same names, and the same bits."""
    return theta.keys() == state.keys() and all(
        torch.equal(theta[n], x) and theta[n].dtype == x.dtype for n, x in state.items()
    )


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, with a module of the user's."""
    (tmp_path / "users_net.py").write_text(
        "import numpy as np, torch\n"
        "from torch import nn\n"
        "from mcnotes.data import Split, Task\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes, width=6):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten())\n"
        "        self.head = nn.LazyLinear(classes) if width is None else "
        "nn.Linear(100 * width, classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x))\n"
        "LIMIT = 3\n"
        "def half():\n"
        "    return Net(3).half()\n"
        "def words():\n"
        "    return 'no network'\n"
        "def images(n, seed):\n"
        "    g = np.random.default_rng(seed)\n"
        "    return g.integers(0, 256, (n, 12, 12), dtype=np.uint8), np.arange(n) % 3\n"
        "def arrays():\n"
        "    return [images(n, n) for n in (30, 12, 15)]\n"
        "def task():\n"
        "    parts = [Split(torch.tensor(x)[:, None], torch.tensor(y)) for x, y in arrays()]\n"
        "    return Task('mine', *parts, ('a', 'b', 'c'))\n"
        "def loaders(shift=0.0):\n"
        "    for x, y in arrays():\n"
        "        x = torch.tensor(x)[:, None] / 255 - shift\n"
        "        data = torch.utils.data.TensorDataset(x, torch.tensor(y))\n"
        "        yield torch.utils.data.DataLoader(data, 7, shuffle=True)\n"
        "def normalised():\n"
        "    return loaders(0.5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_net", raising=False)
    return tmp_path


class TestBuild:
    def test_by_path_and_arguments(self, user: Path) -> None:
        net = checkpoints.build("users_net:Net", {"classes": 4})
        assert type(net).__name__ == "Net"
        assert net.head.out_features == 4
        assert not net.training

    @pytest.mark.parametrize(
        ("factory", "arguments", "text"),
        [
            ("users_net", {}, "cannot import 'users_net'"),
            ("no_such_module:Net", {}, r"No module named 'no_such_module'.*PYTHONPATH"),
            ("users_net:Nut", {}, "has no attribute 'Nut'"),
            ("users_net:LIMIT", {}, "cannot be called .*'int' object is not callable"),
            (
                "users_net:Net",
                {"class": 3},
                "unexpected keyword argument 'class'.*see its signature",
            ),
            ("users_net:words", {}, "gave a str, expected an nn.Module"),
            ("users_net:half", {}, "torch.float16.*expected float32"),
            ("torch.nn:Flatten", {}, "parameters of no kind"),
        ],
    )
    def test_what_is_no_network_is_refused(
        self, user: Path, factory: str, arguments: dict[str, Any], text: str
    ) -> None:
        with pytest.raises(ValueError, match=text):
            checkpoints.build(factory, arguments)


class TestNormalised:
    def test_shifts_scales_and_repeats_without_a_name_of_its_own(self) -> None:
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
        net = checkpoints.normalised(plain, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), channels=3)
        x = torch.rand(5, 1, 12, 12)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        expected = plain((x.expand(-1, 3, -1, -1) - mean) / std)
        small.agree(net(x), expected, small.terms(plain), scale=float(1 / std.min()))
        assert net.state_dict().keys() == plain.state_dict().keys()
        assert not plain._forward_pre_hooks, "the network that came in is left alone"

    def test_repeated_channels_are_no_units(self) -> None:
        """They are exchangeable, but there is nothing in it to align."""
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
        net = checkpoints.normalised(plain, (0.5,), (0.25,), channels=3)
        sym = symmetry.find(net, torch.rand(2, 1, 12, 12))
        assert [g.size for g in sym.groups.values()] == [4]
        sym.verify(net, torch.rand(2, 1, 12, 12))

    def test_by_itself_it_changes_nothing(self) -> None:
        net, x = small.plain(), torch.rand(5, 1, 12, 12)
        assert torch.equal(checkpoints.normalised(net)(x), net(x))


class TestCheck:
    def test_the_network_must_fit_the_images(self) -> None:
        task = small.task(6)
        checkpoints.check(small.normed(), task)
        with pytest.raises(
            CheckpointError, match=r"\[2, 1, 12, 12\].*mind channels and image_size"
        ):
            checkpoints.check(nn.Linear(3, 3), task)

    def test_the_head_must_fit_the_classes(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(144, 1000))
        with pytest.raises(CheckpointError, match=r"1000.*expected \(2, 3\), for .'top'"):
            checkpoints.check(net, small.task(6))

    def test_what_gives_no_tensor_is_refused(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        with pytest.raises(CheckpointError, match="makes tuple, expected"):
            checkpoints.check(Two(), small.task(6))


WRAPS: dict[str, Callable[[State], Any]] = {
    "as it is": lambda s: s,
    "OrderedDict": OrderedDict,
    "DataParallel": lambda s: {f"module.{n}": x for n, x in s.items()},
    "torch.compile": lambda s: {f"_orig_mod.{n}": x for n, x in s.items()},
    "a compiled layer": lambda s: {n.replace("0.", "0._orig_mod.", 1): x for n, x in s.items()},
    "a trainer's": lambda s: {"model": s, "epoch": 3, "lr": 0.1, "args": {"seed": 1}},
    "named otherwise": lambda s: {"ckpt": {"net_weights": {"state": s}}},
    "Lightning": lambda s: {
        "state_dict": {f"model.{n}": x for n, x in s.items()} | {"criterion.weight": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "pytorch-lightning_version": "2.5",
    },
    "all at once": lambda s: {
        "model_state_dict": {f"net._orig_mod.module.{n}": x for n, x in s.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    },
    "without counters": lambda s: {n: x for n, x in s.items() if "num_batches" not in n},
}

NESTED = {"a trainer's", "named otherwise", "Lightning", "all at once"}


class TestLoad:
    @pytest.mark.parametrize(
        ("wrap", "suffix"),
        [(wrap, suffix) for wrap in WRAPS for suffix in (".pt", ".ckpt")]
        + [(wrap, ".safetensors") for wrap in WRAPS if wrap not in NESTED],
    )
    def test_finds_the_network_in_the_file(self, wrap: str, suffix: str, tmp_path: Path) -> None:
        (state,) = states(1)
        held, path = WRAPS[wrap](state), tmp_path / f"a{suffix}"
        if suffix == ".safetensors":
            save_file(dict(held), path)
        else:
            torch.save(held, path)
        found = checkpoints.load(path, small.normed())
        expected = dict(state)
        if wrap == "without counters":
            expected["1.num_batches_tracked"] = torch.tensor(0)
        assert equal(found.theta, expected)
        outside = {"Lightning": 1, "all at once": 1}.get(wrap, 0)
        assert len(found.outside) == outside

    @given(seed=st.integers(0, 10**6), depth=st.integers(0, 3), data=st.data())
    def test_whatever_stands_before_the_names(
        self, seed: int, depth: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Any nesting and any prefix; and no bit of any value changes."""
        generator = torch.Generator().manual_seed(seed)
        state = {n: x.clone() for n, x in small.plain().state_dict().items()}
        for x in state.values():
            x.copy_(torch.randn(x.shape, generator=generator) * 10.0 ** (seed % 60 - 30))
        words = st.sampled_from(["module", "model", "_orig_mod", "net", "backbone", "1", "weight"])
        before = "".join(f"{word}." for word in data.draw(st.lists(words, max_size=3)))
        held: Any = {before + n: x for n, x in state.items()}
        for _ in range(depth):
            held = {data.draw(words): held, "step": 7}
        path = tmp_path_factory.mktemp("any") / "a.pt"
        torch.save(held, path)
        found = checkpoints.load(path, small.plain())
        assert equal(found.theta, state)
        assert found.part.endswith(before.replace("_orig_mod.", ""))

    def test_two_networks_in_a_file(self, tmp_path: Path) -> None:
        one, two = states()
        path = tmp_path / "a.pt"
        torch.save({"model": one, "ema": {f"module.{n}": x for n, x in two.items()}}, path)
        with pytest.raises(CheckpointError, match=r"\['model/', 'ema/module.'\]: name one"):
            checkpoints.load(path, small.normed())
        assert equal(checkpoints.load(path, small.normed(), "model").theta, one)
        assert equal(checkpoints.load(path, small.normed(), "ema/module").theta, two)
        with pytest.raises(CheckpointError, match="name one as `part`"):
            checkpoints.load(path, small.normed(), "swa")
        torch.save({"model": one, "best": one}, path)
        assert equal(checkpoints.load(path, small.normed()).theta, one), (
            "the same twice is no question"
        )

    def test_buffers_that_no_file_holds_come_along(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = small.plain()
                self.register_buffer("scale", torch.tensor(2.0), persistent=False)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * self.scale

        net, path = Net(), tmp_path / "a.pt"
        torch.save(net.state_dict(), path)
        theta = checkpoints.load(path, net).theta
        curve = curves.bezier(theta, {n: x + 0 for n, x in theta.items()})
        train.fit_curve(net, curve, small.task(12), train.Recipe(1), seed=0)
        checkpoints.save(path.with_suffix(".safetensors"), theta, net)
        assert load_file(path.with_suffix(".safetensors")).keys() == net.state_dict().keys()

    def test_nothing_that_comes_in_is_changed_by_what_is_done(self, tmp_path: Path) -> None:
        (state,) = states(1)
        path, net = tmp_path / "a.pt", small.normed()
        torch.save(state, path)
        before = {n: x.clone() for n, x in net.state_dict().items()}
        checkpoints.load(path, net).theta["0.weight"].zero_()
        assert equal(net.state_dict(), before)
        assert equal(checkpoints.load(path, net).theta, state)


def broken(change: Callable[[State], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(change(states(1)[0]), path)

    return write


def quantised(state: State) -> Any:
    return state | {"6.weight": torch.quantize_per_tensor(state["6.weight"], 0.1, 0, torch.qint8)}


def other_head(classes: int) -> Callable[[State], Any]:
    return lambda s: s | {"6.weight": torch.zeros(classes, 54), "6.bias": torch.zeros(classes)}


def with_value(value: float) -> Callable[[State], Any]:
    return lambda s: s | {"0.weight": s["0.weight"].index_fill(0, torch.tensor(1), value)}


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing there": (lambda p: None, "cannot be read .*No such file"),
    "a folder": (lambda p: p.mkdir(), "cannot be read"),
    "no checkpoint": (
        lambda p: p.write_text("words") and None,
        "cannot be read .*expected tensors",
    ),
    "a whole module": (lambda p: torch.save(small.normed(), p), "weights_only=False.*state_dict"),
    "other names": (
        broken(lambda s: {f"conv{n}": x for n, x in s.items()}),
        r"lacks 7 tensors, as '0.weight'; it has besides 7 .*build the architecture",
    ),
    "no tensors": (broken(lambda s: {"epoch": 3}), "lacks 7 tensors.*architecture"),
    "one missing": (broken(lambda s: {n: s[n] for n in s if n != "6.bias"}), "lacks 1 .*'6.bias'"),
    "one too many": (broken(lambda s: s | {"7.weight": s["6.bias"]}), "besides 1 .*'7.weight'"),
    "another head": (
        broken(other_head(5)),
        r"'6.weight' is \[5, 54\], expected \[3, 54\].*the head differs: .*number of classes",
    ),
    "other channels": (
        broken(lambda s: s | {"0.weight": torch.zeros(6, 3, 3, 3)}),
        r"'0.weight' is \[6, 3, 3, 3\], expected \[6, 1, 3, 3\]; build the architecture",
    ),
    "another width": (
        broken(lambda s: {n: x.repeat_interleave(2, 0) for n, x in s.items() if x.ndim}),
        r"'0.weight' is \[12, 1, 3, 3\], expected \[6, 1, 3, 3\].*factory_arguments",
    ),
    "float16": (
        broken(lambda s: {n: x.half() if x.ndim else x for n, x in s.items()}),
        r"'0.weight' is torch.float16, expected torch.float32: half precision.*converted",
    ),
    "bfloat16": (
        broken(lambda s: {f"module.{n}": x.bfloat16() for n, x in s.items()}),
        "'module.0.weight' is torch.bfloat16, .*: half",
    ),
    "float64": (
        broken(lambda s: s | {"6.bias": s["6.bias"].double()}),
        "'6.bias' is torch.float64, expected torch.float32; save it converted",
    ),
    "quantised": (broken(quantised), "'6.weight' is quantised.*float32 file"),
    "quantised names": (
        broken(lambda s: s | {"6.zero_point": torch.tensor(0)}),
        "'6.zero_point' is quantised",
    ),
    "NaN": (broken(with_value(torch.nan)), "'0.weight' holds NaN or infinity.*earlier"),
    "infinity": (broken(with_value(torch.inf)), "'0.weight' holds NaN or infinity"),
    "meta": (
        broken(lambda s: {n: x.to("meta") for n, x in s.items()}),
        r"'0.weight' holds no plain values \(meta",
    ),
    "sparse": (
        broken(lambda s: s | {"6.weight": s["6.weight"].to_sparse()}),
        "holds no plain values .*sparse",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("what", REFUSED)
    @pytest.mark.filterwarnings("ignore::UserWarning")  # of quantised tensors, while writing
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_says_what_was_found_expected_and_the_cure(self, what: str, tmp_path: Path) -> None:
        write, text = REFUSED[what]
        path = tmp_path / "theirs.pt"
        write(path)
        with pytest.raises(CheckpointError, match=f"(?s)^checkpoints.load: .*theirs.pt.*{text}"):
            checkpoints.load(path, small.normed())

    def test_no_code_runs(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "ran",)

        torch.save({"state_dict": states(1)[0], "extra": Trap()}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="to unpickle more can run any code"):
            checkpoints.load(tmp_path / "a.pt", small.normed())
        assert not (tmp_path / "ran").exists()

    def test_a_damaged_safetensors_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file(states(1)[0], path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoints.load(path, small.normed())

    def test_one_network_twice(self, tmp_path: Path) -> None:
        one, two = states()
        same = {f"module.{n}": x for n, x in one.items()}
        for name, state in {"a": one, "b": two, "c": same}.items():
            torch.save(state, tmp_path / name)
        found = checkpoints.load_pair(tmp_path / "a", tmp_path / "b", small.normed())
        assert [equal(x.theta, s) for x, s in zip(found, (one, two), strict=True)] == [True, True]
        assert found[0].sha256 != found[1].sha256
        with pytest.raises(CheckpointError, match=r"both files hold the same weights"):
            checkpoints.load_pair(tmp_path / "a", tmp_path / "c", small.normed())


def pictures(
    root: Path, counts: dict[str, int], *, size: tuple[int, int] = (12, 12), mode: str = "L"
) -> None:
    """PNGs of noise, folder by folder: `counts` of each of three classes."""
    generator = np.random.default_rng(len(str(counts)))
    for split, count in counts.items():
        for label, name in enumerate(("bottom", "middle", "top")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
                pixels[4 * label : 4 * label + 4] += 100
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{i}.png")


class TestDataset:
    def test_by_name(self) -> None:
        task = data.dataset("fashion-mnist-small", image_size=14, device="cpu")
        assert task.example.shape == (2, 1, 14, 14)

    def test_folders_of_three_splits_are_taken_as_they_are(self, tmp_path: Path) -> None:
        pictures(tmp_path, {"train": 8, "val": 3, "test": 4})
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
        pictures(tmp_path, counts)
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
        pictures(tmp_path, {"train": 4, "val": 4, "test": 2}, size=(14, 12), mode="RGB")
        Image.new("L", (30, 20)).save(tmp_path / "train" / "top" / "odd.png")
        with pytest.raises(DataError, match=r"differ in size.*odd.png.*pass an image_size"):
            data.dataset(str(tmp_path), device="cpu")
        task = data.dataset(str(tmp_path), image_size=10, device="cpu")
        assert task.example.shape == (2, 3, 10, 10)

    def test_files_at_fault_are_named(self, tmp_path: Path) -> None:
        pictures(tmp_path, {"train": 2, "val": 2})
        bad = tmp_path / "val" / "top" / "bad.png"
        bad.write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"cannot read .*bad.png.*mend or remove"):
            data.dataset(str(tmp_path))
        Image.fromarray(np.zeros((12, 12), np.uint16)).save(bad)
        with pytest.raises(DataError, match=r"bad.png \(more than 8 bits"):
            data.dataset(str(tmp_path))
        bad.unlink()
        (tmp_path / "val" / "top").rename(tmp_path / "val" / "other")
        with pytest.raises(DataError, match=r"the same classes.*'top'.*'other'"):
            data.dataset(str(tmp_path))

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ("no/such/folder", "'no/such/folder' is not here.*fashion-mnist-small"),
            ("no_such_module:task", "No module named 'no_such_module'"),
            ("users_net:normalised", r"pixels from -0.50 to 0.50, not in .*normalised"),
        ],
    )
    def test_what_is_no_data_set_is_refused(self, user: Path, source: str, text: str) -> None:
        with pytest.raises((DataError, ValueError), match=text):
            data.dataset(source)

    def test_too_few_pictures(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="CLASS/PICTURE"):
            data.dataset(str(tmp_path))
        pictures(tmp_path, {"": 1})
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


def readme_command() -> list[str]:
    """The words of the command by which the README runs chapter 10."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf8"), re.DOTALL)
    (block,) = (block for block in blocks if "book/10_" in block)
    return shlex.split(block.replace("\\\n", " "))


class TestChapter:
    """Chapter 10, on a network, files and pictures that it has never seen."""

    def test_runs_on_a_pair_of_the_users(self, user: Path) -> None:
        """By the README's command, from the user's folder; only the training is made shorter."""
        pictures(user / "photos", {"train": 30, "val": 10, "test": 10})
        task = data.dataset(str(user / "photos"), device="cpu")
        net = checkpoints.normalised(
            checkpoints.build("users_net:Net", {"classes": 3}), [0.4], [0.2]
        )
        recipe = train.Recipe(4, 16, lr=0.02, schedule="linear", augment=False)
        one, two = (train.fit(net, task, recipe, seed=seed).theta for seed in (1, 2))
        lightning = {f"net.{n}": x for n, x in one.items()} | {"loss.weight": torch.ones(3)}
        torch.save({"state_dict": lightning, "epoch": 4}, user / "a.ckpt")
        save_file(two, user / "b.safetensors")

        (user / "mynets.py").write_text("from users_net import Net\n")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # as if installed
        environment = {"PYTHONPATH": os.pathsep.join(paths), "MCNOTES_STORE": str(user / "store")}
        values = presets.load("smoke") | {
            "factory_arguments": {"classes": 3},
            "mean": [0.4],
            "std": [0.2],
            "lr": 0.02,
            "batch_size": 16,
        }
        environment |= chapters.ENVIRONMENT
        tool, chapter, *arguments = readme_command()
        assert tool == "papermill"
        command = [sys.executable, "-m", tool, str(ROOT / chapter), *arguments]
        command += ["-y", json.dumps(values), "--no-progress-bar"]
        run = subprocess.run(command, cwd=user, env=os.environ | environment, capture_output=True)
        assert run.returncode == 0, run.stderr.decode()[-2000:]

        names = {"aligned_b.safetensors", "average.safetensors", "best_point.safetensors"}
        assert {path.name for path in (user / "results").iterdir()} == names
        fresh = checkpoints.build("users_net:Net", {"classes": 3})  # the class itself, no hook
        x = (task.test.images / 255 - 0.4) / 0.2
        outputs = {}
        for name in ("aligned_b", "average", "best_point"):
            path = user / "results" / f"{name}.safetensors"
            fresh.load_state_dict(load_file(path))
            outputs[name] = fresh(x)
            with safe_open(path, framework="pt") as file:
                made_from = json.loads(file.metadata()["made_from"])
            assert made_from["a"] == checkpoints.load(user / "a.ckpt", net).sha256
        fresh.load_state_dict(two)
        small.agree(outputs["aligned_b"], fresh(x), small.terms(fresh))
        assert not torch.allclose(outputs["average"], fresh(x), atol=1e-2)
        ran = notebooks.read(user / "run.ipynb")
        shown = str([cell.outputs for cell in notebooks.code_cells(ran)])
        assert "`state_dict/net.` | 4 | 1" in shown, "where it stood, and what was left outside"
