"""Bringing in one's own networks: what fits is found, the rest is refused, nothing changes."""

import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mcnotes import checkpoints, curves, symmetry, train
from mcnotes.checkpoints import CheckpointError
from mcnotes.data import Split
from mcnotes.lab import parameters

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
            ("torch.nn:LazyLinear", {"out_features": 3}, "has no values in 'weight'. Fix"),
            (
                "torch.nn:Linear",
                {"in_features": 3, "out_features": 3, "device": "meta"},
                "has no values in 'weight'. Fix",
            ),
            ("users_net:raises", {}, "raises with {} fails .RuntimeError: no weights.. Fix"),
            ("users_net:leaves", {}, "leaves with {} fails .SystemExit: 3.. Fix"),
            ("left:Net", {}, "cannot import 'left:Net' .SystemExit: 4"),
            ("raised:Net", {}, "cannot import 'raised:Net' .ZeroDivisionError"),
        ],
    )
    def test_what_is_no_network_is_refused(
        self, user: Path, factory: str, arguments: dict[str, Any], text: str
    ) -> None:
        (user / "left.py").write_text("import sys\nsys.exit(4)")
        (user / "raised.py").write_text("1 / 0")
        with (user / "users_net.py").open("a") as file:
            file.write("def raises():\n    raise RuntimeError('no weights')\n")
            file.write("def leaves():\n    raise SystemExit(3)\n")
        with pytest.raises(ValueError, match=text):
            checkpoints.build(factory, arguments)

    @pytest.mark.parametrize(
        "wrap",
        [
            torch.compile,
            nn.DataParallel,
            lambda net: nn.DataParallel(torch.compile(net)),
            lambda net: torch.compile(nn.DataParallel(net)),
        ],
    )
    def test_wrappers_are_taken_off(
        self, wrap: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        plain = small.normed()
        monkeypatch.setitem(sys.modules, "theirs", SimpleNamespace(make=lambda: wrap(plain)))
        net = checkpoints.build("theirs:make")
        assert net is plain
        torch.save(wrap(plain).state_dict(), tmp_path / "a.pt")
        assert equal(checkpoints.load(tmp_path / "a.pt", net).theta, plain.state_dict())


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

    def test_repeated_channels_may_change_places(self) -> None:
        """What reads them may: each computes the same with any of them."""
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
        net = checkpoints.normalised(plain, (0.5,), (0.25,), channels=3)
        sym = symmetry.find(net, torch.rand(2, 1, 12, 12))
        assert [g.size for g in sym.groups.values()] == [4, 3]
        sym.verify(net, torch.rand(2, 1, 12, 12))

    @pytest.mark.parametrize(
        ("mean", "std", "text"),
        [
            (0.5, 0, "std: got 0, expected a number above 0"),
            ([0.5], [0.2, 0.0], "std: got 0.0, expected a number above 0"),
            (float("nan"), 1, "mean: got nan, expected a number of at least 0 and at most 1"),
            ([0.5, float("nan")], 1, "mean: got nan"),
            (0.5, float("inf"), "std: got inf"),
            (123.7, 1, "mean: got 123.7, expected .* at most 1"),
            ("[0.5]", 1, r"mean: got '\[0.5\]', expected a number.*papermill reads lists after -y"),
            ("0.5", 1, "mean: got '0.5', expected a number"),
            ([], 1, r"mean: got \[\], expected a list"),
        ],
    )
    def test_what_is_no_mean_or_deviation(self, mean: Any, std: Any, text: str) -> None:
        with pytest.raises(CheckpointError, match=f"^checkpoints.normalised: {text}"):
            checkpoints.normalised(small.plain(), mean, std)
        for name, value in {"mean": mean, "std": std}.items():
            if text.startswith(name):
                assert parameters.ALLOWED[name](value)

    def test_one_number_is_for_all_channels(self) -> None:
        net, x = convolutions(3), torch.rand(2, 3, 12, 12)
        one, three = (checkpoints.normalised(net, *v) for v in ((0.5, 0.2), ([0.5] * 3, [0.2] * 3)))
        assert torch.equal(one(x), three(x))
        assert not parameters.ALLOWED["mean"](0.5)
        assert not parameters.ALLOWED["std"]([0.2, 0.2])

    def test_by_itself_it_changes_nothing(self) -> None:
        net, x = small.plain(), torch.rand(5, 1, 12, 12)
        assert torch.equal(checkpoints.normalised(net)(x), net(x))


class Reads(nn.Module):
    """A network that makes of images whatever it is asked for."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(x)


class Siamese(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


def convolutions(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def fails(_: Tensor) -> Tensor:
    raise RuntimeError("no\n" * 9999)


def leaves(_: Tensor) -> Tensor:
    raise SystemExit(3)


MISFITS: dict[str, tuple[nn.Module, str]] = {
    "a size": (nn.Linear(3, 3), r"\[2, 1, 12, 12\] the network fails .*Fix: see image_size"),
    "a second input": (Siamese(), "fails .*Fix: images are its one input.*mcnotes.align"),
    "networks in colour": (convolutions(3), "fails .*Fix: 3 numbers in mean and std.*repeat grey"),
    "three means on grey": (
        checkpoints.normalised(convolutions(1), [0.4] * 3, channels=3),
        "Fix: 3 numbers in mean or std repeat grey images; give one number",
    ),
    "satellites": (convolutions(12), "Fix: 12 numbers in mean and std"),
    "a long reason": (Reads(fails), r"\(RuntimeError: no\). Fix"),
    "an end": (Reads(leaves), r"\(SystemExit: 3\). Fix"),
    "classes": (
        nn.Sequential(nn.Flatten(), nn.Linear(144, 1000)),
        r"makes \[2, 1000\], expected \[2, 3\] for 3 classes \(top, middle, below\)"
        ". Fix: build it with as many classes",
    ),
    "pictures": (Reads(lambda x: (x, x)), r"makes \[2, 1, 12, 12\].*Fix: let it make one row"),
    "words": (Reads(lambda x: "top"), "makes a str, expected logits"),
    "nothing": (Reads(lambda x: None), "makes a NoneType, expected logits"),
}


class TestCheck:
    @pytest.mark.parametrize("what", MISFITS)
    def test_each_failure_has_a_fix_of_its_own(self, what: str) -> None:
        net, text = MISFITS[what]
        with pytest.raises(CheckpointError, match=f"^checkpoints.check: .*{text}") as caught:
            checkpoints.check(net, small.task(6))
        assert len(str(caught.value)) < 400

    def test_colours_in_a_network_of_grey(self) -> None:
        task, colours = small.task(6), {}
        for name in ("train", "val", "test"):
            split = getattr(task, name)
            colours[name] = Split(split.images.expand(-1, 3, -1, -1), split.labels)
        with pytest.raises(CheckpointError, match="Fix: build it for 3 channels"):
            checkpoints.check(convolutions(1), replace(task, **colours))

    def test_a_thousand_classes_make_no_long_message(self) -> None:
        """It once had 13,000 characters."""
        names = tuple(f"a class with a long name, {k}" for k in range(1000))
        task = replace(small.task(6), class_names=names)
        with pytest.raises(CheckpointError, match=r"expected \[2, 1000\] for 1000") as caught:
            checkpoints.check(small.normed(), task)
        assert len(str(caught.value)) < 400

    def test_what_is_taken_everywhere_else(self) -> None:
        """Logits alone, in a tuple, under their name."""
        net = small.normed()
        checkpoints.check(net, small.task(6))
        for made in (lambda x: (net(x), None), lambda x: {"logits": net(x), "features": x}):
            checkpoints.check(Reads(made), small.task(6))


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
        outside = {"Lightning": 2, "all at once": 1}.get(wrap, 0)
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
        assert found.prefix.endswith(before.replace("_orig_mod.", ""))

    def test_two_networks_in_a_file(self, tmp_path: Path) -> None:
        one, two = states()
        path = tmp_path / "a.pt"
        torch.save({"model": one, "ema": {f"module.{n}": x for n, x in two.items()}}, path)
        with pytest.raises(CheckpointError, match=r"\['model/', 'ema/module.'\]. Fix: name one"):
            checkpoints.load(path, small.normed())
        assert equal(checkpoints.load(path, small.normed(), "model").theta, one)
        assert equal(checkpoints.load(path, small.normed(), "ema/module").theta, two)
        with pytest.raises(CheckpointError, match="name one of them as `prefix`"):
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
    "nothing there": (lambda p: None, "cannot be read .*No such file.*Fix: see the path"),
    "a folder": (lambda p: p.mkdir(), "cannot be read .*Fix: see the path"),
    "no checkpoint": (
        lambda p: p.write_text("words") and None,
        "cannot be read .*expected tensors in dictionaries. Fix: see that torch.save",
    ),
    "empty": (lambda p: p.touch(), "cannot be read .*Fix: see that torch.save"),
    "a page of an error": (
        lambda p: p.write_text("<!doctype html><title>Not found</title>") and None,
        "cannot be read .*Fix: see that torch.save",
    ),
    "a part of a file": (
        lambda p: (torch.save(states(1)[0], p), p.write_bytes(p.read_bytes()[:-99]))[0],
        "cannot be read .*Fix: see that .* all of it was copied",
    ),
    "negative variances": (
        broken(lambda s: s | {"1.running_var": s["1.running_var"] - 99}),
        "'1.running_var' holds variances below 0. Fix",
    ),
    "a whole module": (lambda p: torch.save(small.normed(), p), "weights_only=False.*state_dict"),
    "other names": (
        broken(lambda s: {f"conv{n}": x for n, x in s.items()}),
        r"lacks 7 tensors, such as '0.weight'; it has besides 7 .*build the architecture",
    ),
    "no tensors": (broken(lambda s: {"epoch": 3}), "lacks 7 tensors.*architecture"),
    "one missing": (broken(lambda s: {n: s[n] for n in s if n != "6.bias"}), "lacks '6.bias'"),
    "one too many": (broken(lambda s: s | {"7.weight": s["6.bias"]}), "has besides '7.weight'"),
    "another head": (
        broken(other_head(5)),
        r"'6.weight' is \[5, 54\], expected \[3, 54\].*the head differs, .*number of classes",
    ),
    "other channels": (
        broken(lambda s: s | {"0.weight": torch.zeros(6, 3, 3, 3)}),
        r"'0.weight' is \[6, 3, 3, 3\], expected \[6, 1, 3, 3\]. Fix: build the architecture",
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
        "'6.bias' is torch.float64, expected torch.float32. Fix: save it converted",
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
    def test_says_what_was_found_and_expected_and_how_to_fix_it(
        self, what: str, tmp_path: Path
    ) -> None:
        write, text = REFUSED[what]
        path = tmp_path / "theirs.pt"
        write(path)
        with pytest.raises(CheckpointError, match=f"(?s)^checkpoints.load: .*theirs.pt.*{text}"):
            checkpoints.load(path, small.normed())

    @pytest.mark.parametrize("letter", ["a", ".", "module."])
    def test_long_names_cost_no_more_than_short_ones(self, letter: str, tmp_path: Path) -> None:
        """Of 200,000 characters, before the network's names and elsewhere: linear, not squared."""
        (state,) = states(1)
        before = letter * (200_000 // len(letter)) + "."
        torch.save({before + n: x for n, x in state.items()}, tmp_path / "a.pt")
        start = time.process_time()
        found = checkpoints.load(tmp_path / "a.pt", small.normed())
        assert equal(found.theta, state)
        assert found.prefix == before
        torch.save(state | {before: torch.ones(1)}, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match="has besides '") as caught:
            checkpoints.load(tmp_path / "b.pt", small.normed())
        assert time.process_time() - start < 5, "squared, it takes minutes"
        assert len(str(caught.value)) < 1000

    def test_dictionaries_without_end(self, tmp_path: Path) -> None:
        """One that holds itself, and a few that hold each other in 2^60 ways."""
        around: dict[str, Any] = {"weight": torch.ones(1)}
        around["again"] = around
        twins: dict[str, Any] = {}
        for _ in range(60):
            twins = {"one": twins, "two": twins}
        for held in (around, twins):
            torch.save(held, tmp_path / "a.pt")
            with pytest.raises(CheckpointError, match="nested without end"):
                checkpoints.load(tmp_path / "a.pt", small.normed())

    def test_a_tensor_that_claims_more_than_the_file_holds(self, tmp_path: Path) -> None:
        """One number, repeated 10^11 times: to look at them all takes 400 GB."""
        many = torch.zeros(1).expand(10**11)
        for held in (states(1)[0] | {"more": many}, {"weight": many}, {"6.weight": many[None]}):
            torch.save(held, tmp_path / "a.pt")
            with pytest.raises(CheckpointError, match="does not fit the network"):
                checkpoints.load(tmp_path / "a.pt", small.normed())
        theta = states(1)[0] | {"6.bias": torch.ones(1).expand(3)}  # which is the network's own
        torch.save(theta, tmp_path / "a.pt")
        assert equal(checkpoints.load(tmp_path / "a.pt", small.normed()).theta, theta)

    def test_a_compiled_network(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
            for name in ("constants.pkl", "version", "data.pkl"):
                file.writestr(f"a/{name}", "3\n")
        with pytest.raises(CheckpointError, match=r"torchscript.*Fix: save torch.jit.load"):
            checkpoints.load(tmp_path / "a.pt", small.normed())

    @pytest.mark.parametrize(
        "change", [{}, {"6.bias": torch.zeros(4)}, {"6.bias": torch.zeros(3, dtype=torch.int64)}]
    )
    def test_what_the_class_would_not_load_is_not_saved(
        self, change: State, tmp_path: Path
    ) -> None:
        theta = states(1)[0] | change if change else {}
        with pytest.raises(ValueError, match=r"^checkpoints.save: .*(lacks|expected)"):
            checkpoints.save(tmp_path / "a.safetensors", theta, small.normed())
        assert not (tmp_path / "a.safetensors").exists()

    @pytest.mark.parametrize(
        "twice",
        [
            {"6": {"bias": torch.zeros(3)}, "6/bias": torch.ones(3)},
            {"6.bias": torch.zeros(3), "_orig_mod.6.bias": torch.ones(3)},
            {1: torch.zeros(3), "1": torch.ones(3)},
        ],
    )
    def test_two_tensors_of_one_name(self, twice: dict[Any, Any], tmp_path: Path) -> None:
        """Which of them is the network's, nobody can tell."""
        torch.save(states(1)[0] | twice, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"two tensors of the name '(6.bias|1)'"):
            checkpoints.load(tmp_path / "a.pt", small.normed())

    def test_no_code_runs(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "ran",)

        torch.save({"state_dict": states(1)[0], "extra": Trap()}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"Unpickling .*pathlib.Path.* can run any code"):
            checkpoints.load(tmp_path / "a.pt", small.normed())
        assert not (tmp_path / "ran").exists()

    def test_a_damaged_safetensors_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file(states(1)[0], path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match=r"cannot be read .*all of it was copied"):
            checkpoints.load(path, small.normed())

    def test_what_is_no_path(self) -> None:
        with pytest.raises(CheckpointError, match="got a NoneType, expected the path of a file"):
            checkpoints.load(None, small.normed())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="got a int, expected module:name"):
            checkpoints.build(3)  # type: ignore[arg-type]

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
