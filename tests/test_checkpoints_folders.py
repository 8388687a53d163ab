"""Folders as `save_pretrained` of `transformers` writes them: read whole, or refused in words."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mcnotes import checkpoints, data
from mcnotes.checkpoints import CheckpointError
from mcnotes.data import DataError

IDS = torch.arange(10).view(2, 5)
WORDS = ["the", "line", "from", "one", "network", "to", "another", "rises", "and", "falls"]


def llama() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12}
    config = transformers.LlamaConfig(bos_token_id=0, eos_token_id=1, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def gpt() -> nn.Module:
    """Whose embeddings are tied."""
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=8, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def clip() -> nn.Module:
    """Whose configuration holds two others."""
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 2, "vocab_size": 12, "image_size": 4, "patch_size": 2}
    own = {"text_config": part, "vision_config": part, "projection_dim": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(**own)).eval()


def words_of(folder: Path) -> None:
    """Write a tokenizer of a few words into a folder."""
    known = {word: k for k, word in enumerate([*WORDS, "?"])}
    model = {"type": "WordLevel", "vocab": known, "unk_token": "?"}
    file = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json")
    ).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("size", ["5GB", "2KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt])
def test_a_model_comes_back_from_its_folder(
    make: Callable[[], nn.Module], dtype: torch.dtype, size: str, tmp_path: Path
) -> None:
    net = make().to(dtype)
    net.save_pretrained(tmp_path / "run", max_shard_size=size)
    assert (size == "2KB") is (tmp_path / "run" / "model.safetensors.index.json").exists()
    found = checkpoints.from_folder(tmp_path / "run")
    assert type(found) is type(net)
    assert not found.training
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert torch.equal(found(IDS).logits, net(IDS).logits)
    checkpoints.to_folder(tmp_path / "again", found, tmp_path / "run")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, net(IDS).logits)
    words_of(tmp_path / "again")
    checkpoints.to_folder(tmp_path / "again", found, tmp_path / "again")
    assert checkpoints.tokenizer(tmp_path / "again") is not None, "it stays where it is"


@pytest.mark.parametrize("said", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_that_of_the_files_whatever_the_configuration_says(
    dtype: torch.dtype, said: str, folder: Path
) -> None:
    net = llama().to(dtype)
    net.save_pretrained(folder)
    edited(dtype=said)(folder)
    found = checkpoints.from_folder(folder)
    assert torch.equal(found.lm_head.weight, net.lm_head.weight)
    assert found.lm_head.weight.dtype == dtype


def test_files_of_several_precisions_lose_none(folder: Path) -> None:
    net = llama()
    net.model.norm.half()
    net.lm_head.bfloat16()
    net.save_pretrained(folder)
    found = checkpoints.from_folder(folder)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert all(
        torch.equal(p, q.float()) for p, q in zip(found.parameters(), net.parameters(), strict=True)
    )


def test_it_says_nothing_and_leaves_the_level_of_messages(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    checkpoints.from_folder(str(folder))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("make", [llama, clip])
def test_attention_is_of_transformers_whatever_the_folder_asks_for(
    make: Callable[[], nn.Module], key: str, tmp_path: Path
) -> None:
    """Kernels of others, which are fetched, have names such as this."""
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, *(x for x in config.values() if isinstance(x, dict))):
        part[key] = "someone/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = checkpoints.from_folder(tmp_path)
    kinds = {
        getattr(m.config, "_attn_implementation", "sdpa")
        for m in net.modules()
        if hasattr(m, "config")
    }
    assert kinds <= {"sdpa", "eager"}


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def written(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)

    return edit


def weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return edit


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


def indexed(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "evil.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(llama().state_dict(), "evil.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def to_8(dtype: torch.dtype) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda x: {n: t.to(dtype) if t.dim() > 1 else t for n, t in x.items()}


CODE = "open(r'{}', 'w').close()"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "code of its own": (edited(auto_map={"AutoModelForCausalLM": "own.Net"}), "never run"),
    "code, further in": (edited(more=[{"auto_map": {}}]), "never run"),
    "quantised": (edited(quantization_config={"bits": 4}), "lost precision"),
    "other weights": (edited(transformers_weights="adapter_model.bin"), "weights of another name"),
    "an adapter": (written("adapter_config.json", "{}"), "merge_and_unload"),
    "a class of another model": (
        edited(architectures=["GemmaForCausalLM"]),
        "model_type is 'gemma'",
    ),
    "another class": (edited(architectures=["Net"]), "of class 'Net', which is no model"),
    "no model": (edited(architectures=["LlamaConfig"]), "which is no model"),
    "no class": (edited(architectures=None), "of class 'nothing'"),
    "no list of classes": (edited(architectures={"a": 1}), "of class 'nothing'"),
    "wider": (edited(hidden_size=32), "does not fit its config.json: misfits"),
    "deeper": (edited(num_hidden_layers=3), r"lacks model.layers.2"),
    "shallower": (edited(num_hidden_layers=1), r"has besides model.layers.1"),
    "a wrong value": (edited(hidden_size="wide"), "cannot be loaded"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a damaged one": (written("config.json", "{"), "has no config.json that can be read"),
    "a list": (written("config.json", "[1]"), "it holds a list"),
    "a number": (written("config.json", "1"), "it holds a int"),
    "damaged weights": (written("model.safetensors", "{}"), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "pickled weights": (pickled, "pytorch_model.bin and no safetensors, and unpickling"),
    "floats of 8 bits": (weights(to_8(torch.float8_e4m3fn)), "is F8_E4M3, and has lost precision"),
    "integers": (weights(to_8(torch.int8)), "is I8, and has lost precision"),
    "an index of other files": (indexed, r"evil\.bin is no \.safetensors"),
    "NaN": (weights(lambda x: {n: t / 0 for n, t in x.items()}), "NaN or infinity"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_used_is_refused(name: str, folder: Path) -> None:
    """And no code in the folder is run."""
    marker = folder.parent / "ran"
    for file in ("own.py", "modeling_llama.py", "custom_generate/generate.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(CODE.format(marker))
    change, words = CASES[name]
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.from_folder(folder)
    assert not marker.exists()


def test_code_beside_a_model_is_left_alone(folder: Path) -> None:
    marker = folder.parent / "ran"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker))
    checkpoints.from_folder(folder)
    assert not marker.exists()


@pytest.mark.parametrize("path", [3, None, "none", "config.json"])
def test_what_is_no_folder_is_refused(path: Any, folder: Path) -> None:
    given = folder / path if isinstance(path, str) else path
    with pytest.raises(CheckpointError, match="the path of a folder"):
        checkpoints.from_folder(given)


def test_only_models_of_transformers_are_written(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="got a Linear, expected a model of transformers"):
        checkpoints.to_folder(folder / "new", nn.Linear(2, 2), folder)


def test_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mcnotes\[transformers\]'"):
        checkpoints.from_folder(folder)


def test_a_text_in_passages_as_the_folder_reads_it(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert checkpoints.tokenizer(folder) is None
    words_of(folder)
    encode = checkpoints.tokenizer(folder)
    assert encode is not None
    assert encode("the line unknown") == [0, 1, 10]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 10), "utf-8-sig")  # as some editors do
    sets = data.passages(text, encode, 5, batch_size=2)
    batches = [*sets.train, *sets.val, *sets.test]
    assert len(batches) == 10
    for batch in batches:
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    taken = data.take(sets.train, 3)
    assert len(taken) == 2
    assert torch.equal(taken[0][0]["labels"], taken[0][1]), "labels stay, for the model's own loss"


def test_a_tokenizer_that_asks_for_code_is_refused(folder: Path) -> None:
    words_of(folder)
    shutil.copy(folder / "tokenizer_config.json", folder / "kept.json")
    config = json.loads((folder / "kept.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.Words", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has 'auto_map'"):
        checkpoints.tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"\xff\xfe\x00", {}, "expected a text in UTF-8"),
        (b"the line", {}, "has 2 tokens, expected at least 24"),
        (b"the line", {"length": 1}, "length: got 1"),
        (b"the line", {"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_texts_that_do_not_fit(
    content: bytes, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    given: dict[str, Any] = {"length": 4, "batch_size": 2} | options
    with pytest.raises(DataError, match=words):
        data.passages(path, lambda text: [*range(len(text.split()))], **given)
