"""`align` and `merge` by larger groups than permutations, on small language models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small import SHORT, Fixed, agree, plain, rounding, task, terms
from torch import Tensor, nn

import mcnotes
from mcnotes import cache, matching, symmetry, train
from mcnotes.calls import InputError
from mcnotes.matching import AlignmentError, BasesMatching, Learn
from mcnotes.matching.bases import GroupStep

TOKENS = torch.randint(12, (24, 6), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": x, "labels": x} for x in TOKENS.split(8)]
PRECISIONS = (torch.float32, torch.bfloat16)


def llama(seed: int) -> nn.Module:
    """Grouped queries, RMSNorm, rotary positions, a gate."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12}
    config = transformers.LlamaConfig(bos_token_id=0, eos_token_id=1, **sizes)
    return stirred(transformers.LlamaForCausalLM(config))


def gpt(seed: int) -> nn.Module:
    """LayerNorm, places in a table, tied embeddings."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 12, "n_positions": 8, "n_embd": 12, "n_inner": 10}
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, loss_type="ForCausalLM", **sizes
    )
    return stirred(transformers.GPT2LMHeadModel(config))


def phi(seed: int) -> nn.Module:
    """Rotary positions for half of the slots of a head, and the other half free."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "vocab_size": 12}
    config = transformers.PhiConfig(bos_token_id=0, eos_token_id=1, **sizes)
    return stirred(transformers.PhiForCausalLM(config))


def stirred(net: nn.Module) -> nn.Module:
    """The network with gains and biases that are no longer fresh, in evaluation mode."""
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return net.eval()


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(net).float().eval()(TOKENS).logits
    return found


def planted(net: nn.Module, seed: int) -> nn.Module:
    """A copy on which a random element of all groups has acted, in float64."""
    wide = copy.deepcopy(net).double()
    wide.config.use_cache = False
    known = symmetry.find(wide, TOKENS, kinds=symmetry.KINDS)
    element = known.random(torch.Generator().manual_seed(seed))
    wide.load_state_dict(known.transform(wide.state_dict(), element))
    wide.config.use_cache = True
    return wide.to(next(net.parameters()).dtype)


def half_way(one: nn.Module, two: nn.Module) -> Tensor:
    """The outputs in the middle of the line."""
    return outputs(mcnotes.connect(one, two, BATCHES, kind="line").model(0.5))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("make", [llama, gpt])
def test_two_networks_come_closer_and_keep_their_functions(make: Any, dtype: torch.dtype) -> None:
    a, b = (make(seed).to(dtype) for seed in (1, 2))
    before = [copy.deepcopy(net.state_dict()) for net in (a, b)]
    found = mcnotes.align(a, b, BATCHES, kinds="all")
    assert isinstance(found.matching, BasesMatching)
    assert found.matching.after < 0.95 * found.matching.gauged
    margin = rounding(terms(a), dtype=dtype)
    for net, given, off in (
        (found.reference, a, found.reference_difference),
        (found.model, b, found.difference),
    ):
        assert {p.dtype for p in net.parameters()} == {dtype}
        expected = outputs(given)
        agree(outputs(net), expected, terms(a), dtype=dtype)
        assert 0 < off < margin, "rounding is reported"
    for net, state in zip((a, b), before, strict=True):
        assert all(torch.equal(x, state[n]) for n, x in net.state_dict().items())
    text = repr(found)
    assert f"outputs off by {found.reference_difference:.0e} (A)" in text
    assert "in one gauge" in text
    kinds = {*found.table()["group"]}
    assert {"permutations", "bases", "scales"} <= kinds
    refused = found.symmetry.refusals()
    assert refused["not offered"].str.contains("rotations").any()
    assert not refused["space"].str.contains(r"\.\d+\.").any(), "layers alike are one row"
    assert "because of" in found._repr_html_()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("make", [llama, gpt, phi])
def test_what_was_planted_is_found_and_the_line_is_flat(make: Any, dtype: torch.dtype) -> None:
    a = make(1).to(dtype)
    b = planted(a, 3)
    found = mcnotes.align(a, b, BATCHES, kinds="all")
    margin = rounding(terms(a), dtype=dtype)
    assert found.matching.before > 0.3
    assert found.matching.after < margin
    expected = outputs(a)
    assert float((half_way(a, b) - expected).abs().max()) > 0.1 * float(expected.abs().max())
    middle = half_way(found.reference, found.model)
    agree(middle, expected, terms(a), dtype=dtype)


def test_the_average_of_planted_copies_is_the_network() -> None:
    a = llama(1)
    merged = mcnotes.merge([a, planted(a, 3), planted(a, 4)], BATCHES, kinds="all")
    agree(outputs(merged), outputs(a), terms(a))


def test_learning_lowers_the_loss_half_way() -> None:
    a, b = llama(1), llama(2)
    by_weights = mcnotes.align(a, b, BATCHES, kinds=symmetry.KINDS)
    learned = mcnotes.align(a, b, BATCHES, kinds="all", learn=Learn(6, 0.03))
    assert len(learned.matching.losses) == 6

    middle = [
        mcnotes.profile(
            mcnotes.connect(found.reference, found.model, BATCHES, kind="line"), BATCHES, points=3
        ).loss[1]
        for found in (by_weights, learned)
    ]
    assert middle[1] < middle[0]
    agree(outputs(learned.model), outputs(b), terms(b))
    agree(outputs(learned.reference), outputs(a), terms(a))


def test_a_stopped_descent_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, path = llama(1), llama(2), tmp_path / "learn.checkpoint"

    def learned(**options: Any) -> mcnotes.Aligned:
        return mcnotes.align(a, b, BATCHES, kinds="all", learn=Learn(4, 0.03), **options)

    def stop(step: GroupStep, *args: Any) -> Tensor:
        if path.exists() and len(cache.read_tensors(path)["losses"]) == 2:
            raise KeyboardInterrupt
        return run(step, *args)

    whole, run = learned(), GroupStep.__call__
    with monkeypatch.context() as patch:
        patch.setattr(GroupStep, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            learned(checkpoint=path)
    steps = []

    def counted(step: GroupStep, *args: Any) -> Tensor:
        steps.append(args)
        return run(step, *args)

    monkeypatch.setattr(GroupStep, "__call__", counted)
    resumed = learned(checkpoint=path)
    assert 0 < len(steps) < len(whole.matching.losses) * len(BATCHES), "not all over again"
    assert resumed.matching.losses == whole.matching.losses
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    with pytest.raises(InputError, match="belongs to another run"):
        learned(checkpoint=path, seed=1)
    with pytest.raises(InputError, match="got a checkpoint, which `learn` alone uses"):
        mcnotes.align(a, b, BATCHES, kinds="all", checkpoint=path)


def test_permutations_leave_the_reference_as_it_is() -> None:
    net, data = plain(), task()
    a, b = (copy.deepcopy(net) for _ in range(2))
    for seed, one in enumerate((a, b)):
        one.load_state_dict(train.fit(net, data, SHORT, seed=seed).theta)
    batches = [*data.train.batches(32)]
    assert mcnotes.align(a, b, batches).reference is a
    learned = mcnotes.align(a, b, batches, learn=2)
    assert isinstance(learned.matching, BasesMatching)
    state = learned.reference.state_dict()
    assert all(torch.equal(x, state[n]) for n, x in a.state_dict().items())
    assert {*learned.table()["group"]} == {"permutations"}
    scaled = mcnotes.align(a, b, batches, kinds=("scales",))
    assert [*scaled.table()["group"]] == ["scales"]


def test_a_network_without_symmetry_stays() -> None:
    a, b = (nn.Linear(3, 2) for _ in range(2))
    found = mcnotes.align(a, b, [torch.rand(4, 3)], kinds="all")
    assert not found.moves
    assert "model B unchanged" in repr(found)
    assert torch.equal(found.model.weight, b.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": "all", "method": "activations"}, "leave method out"),
        ({"kinds": ("permutations", "scales"), "method": "activations"}, "leave method out"),
        ({"learn": 3, "method": "activations"}, "leave method out"),
        ({"loss": nn.functional.mse_loss}, "`learn` alone uses"),
        ({"kinds": ("scale",)}, "did you mean"),
        ({"kinds": "scales"}, "or 'all'"),
        ({"kinds": ()}, "or 'all'"),
        ({"learn": True}, "a whole number"),
        ({"kinds": "all", "learn": 3}, "hold no targets"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        mcnotes.align(plain(), plain(), [torch.rand(4, 1, 12, 12)], **options)
    if "learn" not in options and "loss" not in options:
        with pytest.raises(InputError, match=words):
            mcnotes.merge([plain(), plain()], [torch.rand(4, 1, 12, 12)], **options)


def test_what_is_in_buffers_is_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching.bases, "balanced", None)  # no work before it
    batches = [*task().train.batches(32)]
    with pytest.raises(AlignmentError, match=r"act on the buffer 'first'.*leave out `learn`"):
        mcnotes.align(Fixed(), Fixed(), batches, kinds="all", learn=1)


class Cancelling(nn.Module):
    """The small difference of two large units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.up.weight, 1.0)
        nn.init.constant_(self.up.weight[1], 1.0 + 2**-7)
        self.down.weight.data = torch.tensor([[1000.0, -1000.0]])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


def test_rounding_that_changes_the_function_is_refused() -> None:
    a, b = (Cancelling().bfloat16() for _ in range(2))
    with torch.no_grad():
        b.up.weight += 0.25
    inputs = [torch.rand(8, 3) + 1]
    with pytest.raises(InputError, match=r"rounding to torch.bfloat16.*model.float\(\)"):
        mcnotes.align(a, b, inputs, kinds=("permutations", "scales"))
    mcnotes.align(a.float(), b.float(), inputs, kinds=("permutations", "scales"))


def test_a_gain_of_zero_beside_a_bias_is_refused() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(self.first(x)))
            return y

    a, b = Norm(), Norm()
    nn.init.zeros_(b.norm.weight)
    nn.init.ones_(b.norm.bias)
    with pytest.raises(AlignmentError, match=r"a gain in 'norm\.weight' is 0"):
        mcnotes.align(a, b, [torch.rand(4, 5)], kinds="all")


def bert(seed: int) -> nn.Module:
    """A model that does not shift its labels."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1}
    config = transformers.BertConfig(num_attention_heads=4, vocab_size=12, **sizes)
    return stirred(transformers.BertForMaskedLM(config))


@pytest.mark.parametrize("make", [llama, gpt, bert])
def test_the_loss_of_a_model_s_own_does_not_depend_on_how_batches_are_cut(make: Any) -> None:
    """Texts of several lengths: a batch counts by its labels, and one without any by nothing."""
    model = make(1)
    ids = torch.randint(12, (9, 6), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[3:6, 2:] = -100
    labels[6:] = -100
    whole = [{"input_ids": ids, "labels": labels}]
    cut = [{n: x[k : k + 3] for n, x in whole[0].items()} for k in (0, 3, 6)]
    with torch.no_grad():
        expected = float(model(**whole[0]).loss)
    for batches in (whole, cut):
        found = mcnotes.compare({"it": model}, batches).frame()["loss"].item()
        assert abs(found - expected) < 1e-5 * expected


def test_parameters_that_training_would_leave_alone_are_learned_with_all_the_same() -> None:
    """Symmetries move them, and their slopes count."""
    free, frozen = ([llama(1), llama(2)] for _ in range(2))
    for net in frozen:
        net.requires_grad_(False)
    one, two = (mcnotes.align(a, b, BATCHES, kinds="all", learn=2) for a, b in (free, frozen))
    for found in (one, two):
        assert isinstance(found.matching, BasesMatching)
    assert one.matching.losses == two.matching.losses
    assert not any(p.requires_grad for p in two.model.parameters()), "as they were given"
