"""The command, from a folder of a user's: its help, its errors, its files, its report."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from here import in_this_process  # noqa: F401
from safetensors import SafetensorError
from safetensors.torch import load_file
from small import agree, picture_folder, terms
from torch import Tensor, nn

import mcnotes.data.sources
import mcnotes.matching
import mcnotes.symmetry
import mcnotes.train
from mcnotes import __main__ as command
from mcnotes import calls, checkpoints, data
from mcnotes.data.sources import DataError
from mcnotes.matching.bases import GroupStep
from tools import notebooks

ROOT = Path(__file__).resolve().parents[1]
MYNETS = """\
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):  # a regression
    def __init__(self, width=12):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, width), nn.Linear(width, 2)
    def forward(self, x):
        return self.outer(self.inner(x).tanh())

class Rows(nn.Module):  # whose units may not be moved
    def __init__(self):
        super().__init__()
        self.first, self.outer = nn.Linear(8, 6), nn.Linear(6, 2)
    def forward(self, x):
        return self.outer(self.first(x).tanh().cumsum(-1))

class Text(nn.Module):  # a classifier of token ids
    def __init__(self, words=40):
        super().__init__()
        self.words, self.hidden = nn.Embedding(words, 10), nn.Linear(10, 14)
        self.head = nn.Linear(14, 3)
    def forward(self, input_ids, attention_mask):
        x = self.hidden(self.words(input_ids)).relu() * attention_mask[..., None]
        return {"logits": self.head(x.sum(1))}

def loader():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(420, 8, generator=g)
    y = torch.stack([x[:, :4].sum(1).tanh(), x[:, 4:].sin().sum(1)], 1)
    return DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)

def texts():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (360, 7), generator=g)
    labels = torch.arange(360) % 3
    ids[:, 2] = labels
    samples = [{"input_ids": i, "attention_mask": torch.ones(7), "labels": y}
               for i, y in zip(ids, labels)]
    return {"train": DataLoader(samples[:240], 20, shuffle=True),
            "val": DataLoader(samples[240:300], 20), "test": DataLoader(samples[300:], 20)}

def fails():
    raise RuntimeError("no disk")

LIMIT = 3
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the user works: mynets.py, two checkpoints of its Net, pictures."""
    (tmp_path / "mynets.py").write_text(MYNETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(checkpoints.build("mynets:Net").state_dict(), tmp_path / name)
    return tmp_path


def ran(capsys: pytest.CaptureFixture[str], text: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, without the first word."""
    try:
        code = command.main(shlex.split(text))
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capsys.readouterr()
    return code, out, err


PAIR = "--model mynets:Net a.pt b.pt --data mynets:loader"


class TestHelp:
    def test_it_is_quick_and_names_the_commands(self) -> None:
        code = (
            "import sys, mcnotes.__main__ as c\ntry:\n    c.main(['--help'])\nfinally:\n"
            "    assert 'torch' not in sys.modules"
        )
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in ("report", "align", "symmetry", "data"):
            assert f"mcnotes {name} " in said

    @pytest.mark.parametrize("name", ["report", "align", "symmetry", "data"])
    def test_its_examples_can_be_typed(
        self, name: str, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({}, home / "a.ckpt")
        torch.save({}, home / "b.ckpt")
        for run in ("1", "2"):
            (home / "runs" / run).mkdir(parents=True)
        code, out, _ = ran(capsys, f"{name} --help")
        assert code == 0
        lines = out.replace("\\\n", " ").splitlines()
        examples = [line.split("  #")[0] for line in lines if line.startswith("  ")]
        words = [shlex.split(x) for x in examples if x.strip().startswith(f"mcnotes {name}")]
        assert words
        for _, *rest in words:
            assert command.parser().parse_args(rest).command == name

    def test_the_refusals_are_of_the_package(self) -> None:
        known = {
            kind.__name__
            for kind in (
                calls.InputError,
                mcnotes.symmetry.SymmetryError,
                mcnotes.symmetry.ExampleError,
                checkpoints.CheckpointError,
                DataError,
                mcnotes.matching.AlignmentError,
                mcnotes.train.TrainingError,
            )
        }
        assert known == {*command.REFUSALS}


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", 2, "required: COMMAND"),
        ("raport", 2, "invalid choice: 'raport'"),
        ("report a.pt b.pt --data mynets:loader", 2, "required: --model"),
        ("align --model mynets:Net a.pt none.pt --data mynets:loader", 2, "no file none.pt"),
        ("align --model mynets:Nett a.pt b.pt --data mynets:loader", 2, "no attribute 'Nett'"),
        ("align --model mynets:LIMIT a.pt b.pt --data mynets:loader", 2, "cannot be called"),
        (f"report {PAIR} --epochs 0", 2, "whole number of at least 1"),
        (f"report {PAIR} --loss torch.nn:mse", 2, "no attribute 'mse'"),
        (f"align {PAIR} --arguments '[1]'", 2, "not a JSON object"),
        (f"align {PAIR} --arguments '{{\"wdth\": 2}}'", 1, "unexpected keyword argument 'wdth'"),
        (f"align {PAIR} --arguments '{{\"width\": -2}}'", 1, "Fix: see its arguments"),
        (f"align {PAIR} --arguments '{{\"width\": 9}}'", 1, "a.pt"),
        ("align --model mynets:Net a.pt a.pt --data mynets:loader", 1, "hold the same weights"),
        ("align --model mynets:Net mynets.py b.pt --data mynets:loader", 1, "mynets.py"),
        ("align --model mynets:Net a.pt b.pt --data none", 1, "expected a folder"),
        ("align --model mynets:Net a.pt b.pt --data mynets:fails", 1, "RuntimeError: no disk"),
        ("align --model mynets:Net a.pt b.pt --data mynets:texts", 1, "fails on the first batch"),
        (f"align {PAIR} --mean 0.5", 1, "mean and std are for pictures"),
        (f"align {PAIR} --image-size 8", 1, "expected pictures for image_size"),
        (f"align {PAIR} --out mynets.py/x.safetensors", 1, "Fix: see --out"),
        (f"report {PAIR} --out mynets.py/x.html", 1, "Fix: see --out"),
        (f"report {PAIR} --out x.pdf", 1, "a name that ends in .html"),
        ("align a.pt b.pt --data mynets:loader", 1, "got files without --model"),
        ("align --model mynets:Net a.pt b.pt --data mynets:loader --out ./b.pt", 1, "overwritten"),
        ("align a.pt . --data mynets:loader", 1, "a folder and a file"),
        (f"align {PAIR} --kinds scale", 1, "did you mean 'scales'"),
        (f"align {PAIR} --learn 0", 2, "whole number of at least 1"),
        (f"align {PAIR} --loss torch.nn:MSELoss", 1, "--learn alone uses"),
        ("report --model mynets:Net . b.pt --data mynets:loader", 2, ". is a folder"),
        (f"align {PAIR} --out .", 1, "expected the name of a file"),
        (f"align {PAIR} --out /", 1, "expected the name of a file"),
        (f"report {PAIR} --points 1", 2, "whole number of at least 2"),
        (f"report {PAIR} --lr nan", 2, "got nan, expected a number above 0"),
        (f"report {PAIR} --lr -1", 2, "got -1, expected a number above 0"),
        ("symmetry mynets:Net --shape 7", 1, "Fix: see --shape"),
        ("symmetry mynets:Net --shape 99999999999999", 1, "can't allocate memory"),
        ("symmetry mynets:Net --shape 7 --tokens 99999999999999999999", 1, "see --shape and --tok"),
        ("data fashion-mnist-small --image-size 5000", 1, "from 1 to 4096"),
        ("data ''", 1, "expected the name of a data set"),
        ("data none", 1, "expected a folder"),
        ("data mynets:fails", 1, "RuntimeError: no disk"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    text: str, code: int, words: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = ran(capsys, text)
    assert found == code, err
    assert words in err
    assert err.startswith("mcnotes")
    assert err.count("\n") == 1
    assert not (home / "aligned.safetensors").exists()


class TestAlign:
    def test_the_file_holds_the_same_function(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = ran(capsys, f"align {PAIR}")
        assert code == 0
        assert re.search(r"inner +12 ", out), out
        net = checkpoints.build("mynets:Net")
        x = torch.randn(9, 8)
        net.load_state_dict(torch.load(home / "b.pt"))
        expected = net(x)
        aligned = load_file(home / "aligned.safetensors")
        assert not torch.equal(aligned["inner.weight"], net.get_submodule("inner").weight)
        net.load_state_dict(aligned)
        agree(net(x), expected, terms(net))

    @pytest.mark.parametrize("kinds", ["", "--kinds all"])
    def test_a_network_without_symmetry_passes_with_the_reason(
        self, kinds: str, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_pair("mynets:Rows", {}, home)
        line = f"align --model mynets:Rows a.pt b.pt --data mynets:loader {kinds}"
        code, out, err = ran(capsys, line)
        assert code == 0, err
        assert "No unit of this network may change places" in out
        assert "first" in out
        kept, before = load_file(home / "aligned.safetensors"), torch.load(home / "b.pt")
        assert all(torch.equal(x, before[name]) for name, x in kept.items())

    def test_larger_groups_move_both(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Signs of tanh units, then the loss that the user names."""
        line = f"align {PAIR} --kinds all --learn 1 --loss torch.nn.functional:mse_loss"
        code, out, err = ran(capsys, line)
        assert code == 0, err
        assert re.search(r"inner +signs +1 +12 ", out), out
        assert re.search(r"inner +1 +bases, .* tanh", out), out
        net, x = checkpoints.build("mynets:Net"), torch.randn(9, 8)
        for given, name in (("a.pt", "aligned_reference"), ("b.pt", "aligned")):
            net.load_state_dict(torch.load(home / given))
            expected = net(x)
            net.load_state_dict(load_file(home / f"{name}.safetensors"))
            agree(net(x), expected, terms(net))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small language models, runs/1 and runs/2, and a text."""
    home = tmp_path_factory.mktemp("models")
    known = {word: k for k, word in enumerate(["one", "line", "to", "another", "?"])}
    model = {"type": "WordLevel", "vocab": known, "unk_token": "?"}
    words = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "vocab_size": 5}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(bos_token_id=0, eos_token_id=1, **sizes)
        net = transformers.LlamaForCausalLM(config)
        for p in net.parameters():
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
        net.save_pretrained(home / "runs" / str(seed))
        (home / "runs" / str(seed) / "tokenizer.json").write_text(json.dumps(words))
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(home / "runs" / str(seed) / "tokenizer.json")
        ).save_pretrained(home / "runs" / str(seed))
    (home / "text.txt").write_text("one line to another " * 100)
    return home


@pytest.fixture
def runs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the user works."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestAlignFolders:
    def test_from_folders_to_an_aligned_model_and_a_report(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = "align runs/1 runs/2 --data text.txt --context 100 --kinds all --learn 1"
        code, out, err = ran(capsys, line)
        assert code == 0, err
        assert re.search(r"o_proj +rotations +1 +8 +28", out), out
        assert re.search(r"barrier on the line: .* as given, .* aligned", out), out
        ids = torch.arange(5)[None]
        for name, given in (("a", "1"), ("b", "2")):
            net = checkpoints.from_folder(runs / "aligned" / name)
            before = checkpoints.from_folder(runs / "runs" / given)
            moved = zip(net.parameters(), before.parameters(), strict=True)
            assert not all(torch.equal(x, y) for x, y in moved)
            agree(net(ids).logits, before(ids).logits, terms(net))
            encode = checkpoints.tokenizer(runs / "aligned" / name)
            assert encode is not None, "the tokenizer comes along"
        page = read_page(runs / "aligned" / "report.html")
        assert page.count("data:image/png;base64") == 1
        assert "rotations" in page
        assert "not offered" in page
        assert "outputs off by" in page

    def test_stopped_it_goes_on_and_says_so(
        self, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = "align runs/1 runs/2 --data text.txt --kinds all --learn 3"
        kept, run = runs / "aligned.checkpoint", GroupStep.__call__

        def stop(step: GroupStep, *args: Any) -> Tensor:
            if kept.exists():
                signal.raise_signal(signal.SIGTERM)
            return run(step, *args)

        monkeypatch.setattr(GroupStep, "__call__", stop)
        code, _, err = ran(capsys, line)
        assert (code, err.splitlines()[-1]) == (
            143,
            "mcnotes align: stopped. Run the same command again to resume from "
            "'aligned.checkpoint'",
        )
        monkeypatch.undo()
        monkeypatch.chdir(runs)
        code, out, err = ran(capsys, line)
        assert code == 0, err
        assert "resumes from 'aligned.checkpoint'" in out
        assert (runs / "aligned" / "report.html").exists()
        assert not kept.exists(), "of what is done nothing is kept"

    def test_units_alone_leave_a_as_it_is(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt --out units")
        assert code == 0, err
        kept, given = (load_file(runs / x / "model.safetensors") for x in ("units/a", "runs/1"))
        assert all(torch.equal(x, given[n]) for n, x in kept.items())
        read_page(runs / "units" / "report.html")

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ("--data text.txt --model torch.nn:Linear", "are for files"),
            ("--data text.txt --prefix net", "are for files"),
            ("--data text.txt --out overwrite", "would be overwritten"),
            ("--data text.txt --out same", "hold the same weights"),
            ("--data none.txt", "found no 'none.txt'"),
            ("--data short.txt", "has 4 tokens, expected at least"),
            ("--data text.txt --mean 0.5", "mean and std are for pictures"),
            ("--data text.txt --kinds scale", "did you mean 'scales'"),
            ("--data text.txt --kinds all scale", "got 'all', expected one of"),
            ("--data none.txt --kinds ALL", "got 'ALL'"),  # before anything is read
            ("--data text.txt --out text.txt", "cannot make the folder"),
        ],
    )
    def test_what_does_not_fit_is_one_line(
        self,
        more: str,
        words: str,
        runs: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (runs / "short.txt").write_text("one line to another")
        (runs / "overwrite").symlink_to("pair")
        shutil.copytree("runs/1", "pair/a")
        a = "pair/a" if "overwrite" in more else "runs/1"
        b = "runs/1" if "same" in more else "runs/2"
        code, _, err = ran(capsys, f"align {a} {b} {more}")
        assert (code, err.count("\n")) == (1, 1), err
        assert words in err
        assert not (runs / "aligned" / "a").exists()

    def test_nothing_in_the_folder_is_overwritten(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`save_pretrained` would also remove what it takes for shards of an older model."""
        shard = runs / "mine" / "a" / "model-00001-of-00009.safetensors"
        shard.parent.mkdir(parents=True)
        shard.write_text("of the user")
        code, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt --out mine")
        assert (code, err.count("\n")) == (1, 1), err
        assert "which holds files" in err
        assert [*runs.glob("mine/**/*")] == [shard.parent, shard]

    def test_a_full_disk_is_one_line_and_leaves_no_half(
        self, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: Any, path: Path) -> None:
            path.mkdir()
            (path / "config.json").write_text("{}")
            raise SafetensorError("No space left on device (os error 28)")

        monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
        code, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt --out full")
        assert code == 1
        assert "cannot write full (SafetensorError: No space left on device" in err
        assert not [*(runs / "full").iterdir()]

    def test_a_text_is_for_models_that_do_not_see_what_they_predict(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = transformers.BertConfig(
            vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        for seed in "12":
            torch.manual_seed(int(seed))
            transformers.BertForMaskedLM(config).save_pretrained(runs / "bert" / seed)
            shutil.copy(runs / "runs" / "1" / "tokenizer.json", runs / "bert" / seed)
        code, _, err = ran(capsys, "align bert/1 bert/2 --data text.txt --context 8")
        assert code == 1
        assert "BertForMaskedLM sees the tokens that it is to predict" in err

    def test_tokens_that_the_network_does_not_know(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for seed in "12":
            path = runs / "runs" / seed / "tokenizer.json"
            path.write_text(path.read_text().replace('"another": 3', '"another": 7'))
        code, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt")
        assert (code, err.count("\n")) == (1, 1), err
        assert "has the token 7" in err

    def test_other_rotary_positions_are_another_architecture(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = runs / "runs" / "2" / "config.json"
        config = json.loads(path.read_text())
        config["rope_parameters"]["rope_theta"] = 100.0
        path.write_text(json.dumps(config))
        code, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt --context 4")
        assert code == 1
        assert "inv_freq' (of a LlamaRotaryEmbedding) differs" in err

    def test_a_text_needs_one_tokenizer(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = runs / "runs" / "2" / "tokenizer.json"
        words = json.loads(path.read_text())
        words["model"]["vocab"] |= {"one": 1, "line": 0}
        path.write_text(json.dumps(words))
        _, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt")
        assert "the tokenizers of A and B read the text differently" in err
        for place in runs.glob("runs/*/tokenizer*"):
            place.unlink()
        _, _, err = ran(capsys, "align runs/1 runs/2 --data text.txt")
        assert "neither A nor B has a tokenizer to read text.txt with" in err


class TestSymmetry:
    def test_shows_the_groups_proved(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = ran(capsys, "symmetry mynets:Net --shape 8")
        assert code == 0
        assert re.search(r"^inner +1 +12$", out, re.M), out
        assert "Proved: with every unit moved" in out

    def test_takes_inputs_from_batches(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = ran(capsys, "symmetry mynets:Text --data mynets:texts")
        assert code == 0
        assert re.search(r"^hidden +1 +14$", out, re.M), out

    def test_says_why_there_is_none(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = ran(capsys, "symmetry mynets:Rows --shape 8")
        assert code == 0
        assert "Why its axes stay" in out


class TestData:
    def test_lists_the_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert ran(capsys, "data") == (0, "\n".join(data.SOURCES) + "\n", "")

    def test_looks_at_a_folder(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        picture_folder(home / "photos", {"train": 4, "val": 2, "test": 2})
        code, out, _ = ran(capsys, "data photos")
        assert code == 0
        assert "classes: bottom, middle, top" in out

    def test_looks_at_batches(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = ran(capsys, "data mynets:texts")
        assert code == 0
        assert "test: Loader(3 batches of 20 samples on cpu), inputs {input_ids: 2-D" in out


def save_pair(factory: str, arguments: dict[str, object], home: Path) -> None:
    """Two networks that were not trained, as files."""
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(checkpoints.build(factory, arguments).state_dict(), home / name)


class Addresses(HTMLParser):
    """What a page loads or links to, but for what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value or ""
            for name, value in attrs
            if name in ("src", "srcset", "href", "data", "poster")
            and not re.match("data:|#", value or "")
        ]


def read_report(home: Path) -> str:
    """The page of a report."""
    return read_page(home / "report.html")


def read_page(path: Path) -> str:
    """A page, which loads nothing."""
    page = path.read_text("utf8")
    parser = Addresses()
    parser.feed(page)
    assert parser.found == []
    assert not re.search(r"@import|url\(", page)
    assert "<script" not in page
    assert "{func}" not in page
    assert ".ipynb" not in page
    return page


def check_networks(home: Path, net: nn.Module, inputs: tuple[object, ...]) -> None:
    """The three files load into the user's class, and the aligned one computes what B does."""
    names = {"aligned_b.safetensors", "average.safetensors", "best_point.safetensors"}
    assert {path.name for path in (home / "report").iterdir()} == names
    net.load_state_dict(torch.load(home / "b.pt"))
    expected = calls.logits(net.eval()(*inputs))
    for name in sorted(names, reverse=True):
        net.load_state_dict(load_file(home / "report" / name))
    agree(calls.logits(net(*inputs)), expected, terms(net))


class TestReport:
    def test_says_what_to_install(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "papermill", None)
        code, _, err = ran(capsys, f"report {PAIR}")
        assert code == 1
        assert err.count("\n") == 1
        assert "pip install 'mcnotes[report]'" in err
        assert not (home / "report").exists()

    def test_the_chapter_has_cells_for_it_and_for_the_book(self) -> None:
        cells = notebooks.read(command.chapter()).cells
        tags = [{*notebooks.tags(cell)} for cell in cells]
        assert {"parameters"} < set.union(*tags)
        of_report = [t for t in tags if not t & command.BOOK_ONLY]
        assert "summary" in set.union(*of_report)
        assert not any("summary" in t and t & command.BOOK_ONLY for t in tags)
        first = min(k for k, t in enumerate(tags) if "summary" in t)
        assert len([t for t in tags[first + 8 :] if not t & command.BOOK_ONLY]) < 12, "comes first"

    @pytest.mark.usefixtures("in_this_process")
    def test_on_pictures(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Two checkpoints of a network of torchvision, and a folder."""
        arguments = {"growth_rate": 4, "block_config": [1, 1], "num_init_features": 6}
        arguments |= {"num_classes": 3}
        save_pair("torchvision.models:DenseNet", arguments, home)
        picture_folder(
            home / "photos", {"train": 12, "val": 6, "test": 6}, size=(32, 32), mode="RGB"
        )
        line = "report --model torchvision.models:DenseNet a.pt b.pt --data photos"
        line += ' --arguments \'{"growth_rate": 4, "block_config": [1, 1], '
        line += '"num_init_features": 6, "num_classes": 3}\' --mean 0.3 0.3 0.3'
        code, _, err = ran(capsys, line + " --std 0.2 0.2 0.2 --epochs 1 --points 3")
        assert code == 0, err
        page = read_report(home)
        assert page.count("data:image/png;base64") == 3, "units, paths, gains"
        assert "outputs differ by less than 1e-09" in page
        assert page.index("The verdict") < page.index("What may be permuted"), "comes first"
        assert "Lowest validation loss of a single network" in page
        assert "3 classes" in page
        net = checkpoints.build("torchvision.models:DenseNet", arguments)
        check_networks(home, net, (torch.randn(2, 3, 32, 32),))

    @pytest.mark.usefixtures("in_this_process")
    def test_on_a_class_and_a_loader(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A regression, with a loss and a metric of its own."""
        line = f"report {PAIR} --loss torch.nn.functional:mse_loss --epochs 1 --points 3"
        code, _, err = ran(capsys, line + " --metric torch.nn.functional:l1_loss")
        assert code == 0, err
        page = read_report(home)
        assert "in l1_loss against" in page
        assert "<td>ensemble of A and B</td>" not in page
        check_networks(home, checkpoints.build("mynets:Net"), (torch.randn(5, 8),))

    @pytest.mark.usefixtures("in_this_process")
    def test_on_texts(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Dictionaries of token ids, labels among them."""
        save_pair("mynets:Text", {}, home)
        line = "report --model mynets:Text a.pt b.pt --data mynets:texts --epochs 1 --points 3"
        code, _, err = ran(capsys, line)
        assert code == 0, err
        page = read_report(home)
        assert "<td>ensemble of A and B</td>" in page
        assert page.count("data:image/png;base64") == 3, "units, paths, gains"
        words = torch.randint(40, (5, 7))
        check_networks(home, checkpoints.build("mynets:Text"), (words, torch.ones(5, 7)))

    @pytest.mark.usefixtures("in_this_process")
    def test_a_network_without_symmetry_passes_to_the_end(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_pair("mynets:Rows", {}, home)
        line = "report --model mynets:Rows a.pt b.pt --data mynets:loader --epochs 1 --points 3"
        code, _, err = ran(capsys, line + " --loss torch.nn.functional:mse_loss")
        assert code == 0, err
        page = read_report(home)
        assert "No unit of this network may change places, so none is matched." in page
        assert "first" in page
        check_networks(home, checkpoints.build("mynets:Rows"), (torch.randn(5, 8),))

    def test_before_a_curve_is_trained_a_stop_says_that_nothing_is_kept(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "run", stopped)
        code, _, err = ran(capsys, f"report {PAIR}")
        assert (code, err.count("\n")) == (130, 1)
        assert "stopped before a curve was trained" in err

    def test_sigterm_stops_as_ctrl_c_does(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(command, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
        code, _, err = ran(capsys, f"report {PAIR}")
        assert (code, err.count("\n")) == (143, 1)
        assert signal.getsignal(signal.SIGTERM) == before

    @pytest.mark.slow
    @pytest.mark.usefixtures("in_this_process")  # but for what is stopped
    def test_stopped_it_goes_on_and_says_so(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """SIGTERM once the first curve is in training. (Its numbers: tests of `connect`.)"""
        line = f"report {PAIR} --loss torch.nn.functional:mse_loss --epochs 60 --points 3"
        words = [sys.executable, "-m", "mcnotes", *shlex.split(line)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        kept = home / "report" / "as it is.checkpoint"
        with subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as running:
            while not kept.exists():
                assert running.poll() is None, running.communicate()
                time.sleep(0.02)
            running.terminate()
            out, err = running.communicate(timeout=120)
        assert (running.returncode, out, err.count("\n")) == (143, "", 1), err
        assert "mcnotes report: stopped. Run the same command again" in err
        assert str(kept.relative_to(home)) in err
        assert not (home / "report.html").exists()
        code, out, err = ran(capsys, line)
        assert (code, err) == (0, "")
        assert f"resumes from '{kept.relative_to(home)}'" in out
        read_report(home)
        assert not kept.exists(), "of a report that is done nothing is kept"

    @pytest.mark.slow
    def test_what_does_not_fit_is_one_line(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = ran(capsys, f"report {PAIR} --arguments '{{\"width\": 9}}'")
        assert code == 1
        assert err.count("\n") == 1
        assert "a.pt" in err
        assert not (home / "report.html").exists()
