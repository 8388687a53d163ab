"""Language models of `transformers` from small configurations, as their classes come.

Heads under rotary positions move as blocks: within them, only values may change places. Where
several query heads share keys and values, all of them move with these.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mcnotes import symmetry

HIDDEN, INNER = 24, 20
SIZES = {
    "vocab_size": 20,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "head_dim": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

# Family, heads of keys and values, what moves with the blocks beside projections.
FAMILIES = [
    ("Llama", 6, set()),
    ("Llama", 2, set()),
    ("Mistral", 3, set()),
    ("Qwen2", 2, {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
    ("Qwen3", 2, set()),
    ("Gemma", 2, set()),
    ("Gemma2", 2, set()),
]


def made(family: str, heads: int) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_key_value_heads=heads, **SIZES)
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(("family", "heads", "more"), FAMILIES)
def test_heads_under_rotary_positions(family: str, heads: int, more: set[str]) -> None:
    net, ids = made(family, heads), torch.randint(20, (2, 5))
    sym = symmetry.find(net, ids)
    sizes = [4] * heads + [heads, INNER, HIDDEN] + [6 // heads] * (heads if heads < 6 else 0)
    assert sorted(g.size for g in sym.groups.values()) == sorted(sizes)
    (blocks,) = [g for g in sym.groups.values() if g.inner and g.inner[0]]
    names = {p.name.removeprefix("model.layers.0.self_attn.") for p in blocks.places}
    assert names == {f"{k}_proj.weight" for k in "qkvo"} | more
    assert sym.verify(net, ids, others=[torch.randint(20, (3, 9))]) < 1e-9


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_masks_in_any_precision(family: str, dtype: torch.dtype) -> None:
    net, ids = made(family, 2).to(dtype), torch.randint(2, 20, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    sym = symmetry.find(net, example)
    assert {*sym.groups} == {*symmetry.find(net, ids).groups}
    longer = {"input_ids": torch.randint(2, 20, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    assert sym.verify(net, example, others=[longer]) < 1e-9


def test_a_cache_is_no_output() -> None:
    net, ids = made("Llama", 2), torch.randint(20, (2, 5))
    assert net(ids).past_key_values is not None
    with_cache = symmetry.find(net, ids)
    net.config.use_cache = False
    assert {*with_cache.groups} == {*symmetry.find(net, ids).groups}
    net.config.use_cache = True
    theta = with_cache.permute(dict(net.state_dict()), with_cache.random())
    before = net(ids).logits
    net.load_state_dict(theta)
    torch.testing.assert_close(net(ids).logits, before)
