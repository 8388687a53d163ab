"""Find and verify the permutation symmetries of the architectures of `transformers`.

Each is built from a small random configuration: a residual stream of 24 units, MLPs of 20, 6 heads
of 4, and 2 heads of keys and values where these are shared. Of its outputs the logits count. Beside
the groups found stand those that a practitioner would write by hand: the stream where the norm
allows it, the units of MLPs, heads, and what may move within a head. Errors are the largest on the
example, and on another input of another length. In training mode (without dropout, which treats
units differently) and in float16 groups must be the same, or the reason is kept. A network of which
no group is found, or whose output is constant, fails.

Larger groups (`symmetry.find` with `kinds`) follow: scales, signs, rotations and changes of basis,
beside those written by hand, of which `why` tells what is missing; verified as the permutations.

Random programs (see `tools.programs`) are tried for --minutes, and counted; with --operators also
networks around each operator of PyTorch's list. With --resume the rows of --out stay, and what was
tried; only what is missing is computed, so that an hour of programs can be added later.

    python benchmarks/symmetry_transformers.py --minutes 60 --out data/results/FILE.json
"""

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from symmetry_zoo import commit, provenance
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mcnotes import symmetry
from tools import programs

STREAM, INNER, HEADS, SHARED, DIM = 24, 20, 6, 2, 4
SIZES = {
    "vocab_size": 40,
    "hidden_size": STREAM,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "head_dim": DIM,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
SEQ2SEQ = {
    "num_key_value_heads": None,
    "d_model": STREAM,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}
NO_DROPOUT = dict.fromkeys(
    (
        *("dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "dropout_rate", "layerdrop"),
        *("hidden_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"),
        *("encoder_layerdrop", "decoder_layerdrop", "mask_time_prob"),
    ),
    0.0,
)
IMAGES = {"image_size": 16, "patch_size": 4, "num_labels": 3}
SPEECH = {
    "conv_dim": [8, 8],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}

SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "mlp_ratio": 2.0}
SWIN |= {"drop_path_rate": 0.0, "hidden_size": None, "head_dim": None}
SWIN |= {"num_hidden_layers": None, "num_attention_heads": None}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "num_hidden_layers": None,
}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3}
CONVNEXT |= {"patch_size": 2, "image_size": 16, "num_hidden_layers": None}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": DIM,
    "v_head_dim": DIM,
    "num_key_value_heads": HEADS,
    "head_dim": None,
}
DEEPSEEK = {"n_routed_experts": 4, "moe_intermediate_size": INNER, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
XLNET: dict[str, int | None] = {"n_layer": 1, "n_head": HEADS, "d_inner": INNER, "d_head": DIM}
XLNET |= {"d_model": STREAM, "max_position_embeddings": None}
RECURRENT = {"lru_width": STREAM, "num_hidden_layers": 3, "attention_window_size": 32}

Groups = Counter[str]  # how many there are of each size; of blocks: "6 blocks"
Inputs = Callable[[int, int], Any]  # of a batch size and a length


def groups(*sizes: int, blocks: Mapping[int, int] | None = None) -> Groups:
    """Groups of these sizes, and of blocks: size → how many groups."""
    made = Counter(map(str, sizes))
    return made + Counter({f"{size} blocks": n for size, n in (blocks or {}).items()})


def times(n: int, of: Groups) -> Groups:
    """n times these groups."""
    return Counter({size: n * count for size, count in of.items()})


def kinds(**sizes: int | list[int]) -> Groups:
    """Larger groups, of one size or several of each kind."""
    listed = {k.replace("_", " "): [n] if isinstance(n, int) else n for k, n in sizes.items()}
    return Counter(f"{kind} {size}" for kind, of in listed.items() for size in of)


STREAM_AND_MLP = groups(STREAM, INNER)
ATTENTION = groups(*[DIM] * 2 * HEADS, blocks={HEADS: 1})  # queries with keys; values
ROTARY = groups(*[DIM] * HEADS, blocks={HEADS: 1})  # values alone
QUERY_GROUPS = groups(blocks={HEADS // SHARED: SHARED})  # query heads of one key
GROUPED = groups(*[DIM] * SHARED, blocks={SHARED: 1}) + QUERY_GROUPS
LLAMA = STREAM_AND_MLP + GROUPED
BERT = STREAM_AND_MLP + ATTENTION
STAGES = groups(8, 16, 16, 32, *[DIM] * 12, blocks={2: 1, 4: 1})  # 2 and 4 heads
DINO = groups(STREAM, 2 * STREAM) + ATTENTION

# Larger groups. A gain may go over into what reads it, unless rotations have it folded; by hand,
# where a LayerNorm or an RMSNorm stands before matrices that nothing else reads.
GAIN = kinds(scales=STREAM, signs=STREAM)
GATED = kinds(scales=INNER, signs=INNER)  # one factor of a gated MLP
RELU = kinds(scales=INNER)
SPUN, ABOUT_1 = kinds(rotations=STREAM), kinds(rotations_about_1=STREAM)
FLIPS = kinds(signs=STREAM)
BASES = kinds(bases=[DIM] * 2 * HEADS)  # queries with keys; values
VALUES = kinds(bases=[DIM] * SHARED)
TURNS = kinds(scales=DIM // 2, phases=DIM // 2)  # of queries and keys, one for each frequency
TURNED = VALUES + times(SHARED, TURNS)
ALL_TURNED = kinds(bases=[DIM] * HEADS) + times(HEADS, TURNS)
# Norms of queries and keys with gains: a frequency's two units and their gains share a sign.
NORMED = VALUES + kinds(signs=[DIM // 2] * SHARED)
GAINS_OF_HEADS = kinds(signs=[DIM, DIM], scales=DIM // 2)
SPUN_LLAMA = SPUN + GATED + TURNED

LIKE_LLAMA = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Cohere", "Olmo"]
LIKE_LLAMA += ["Olmo2", "Starcoder2", "Granite", "SmolLM3", "Ernie4_5", "Exaone4", "Mixtral"]


class Family(NamedTuple):
    """What is built, its inputs, and the groups that would be written by hand."""

    model: str
    by_hand: Groups
    options: Mapping[str, Any] = {}
    inputs: str = "tokens"


class Larger(NamedTuple):
    """The larger groups that would be written by hand, and why some of them are not found."""

    by_hand: Groups
    why: str = ""


def tokens(n: int, length: int) -> Tensor:
    """Tokens that are not special."""
    return torch.randint(2, SIZES["vocab_size"], (n, length))


INPUTS: dict[str, Inputs] = {
    "tokens": tokens,
    "pairs": lambda n, t: {"input_ids": tokens(n, t), "decoder_input_ids": tokens(n, t - 1)},
    "images": lambda n, t: torch.rand(n, 3, 16, 16),
    "sound": lambda n, t: torch.rand(n, 40 * t),
    "spectra": lambda n, t: {
        "input_features": torch.rand(n, 8, 20),
        "decoder_input_ids": tokens(n, t),
    },
    "images and texts": lambda n, t: {
        "input_ids": tokens(n, t),
        "pixel_values": torch.rand(n, 3, 16, 16),
    },
}

FAMILIES: dict[str, Family] = {
    **{family: Family("ForCausalLM", LLAMA) for family in LIKE_LLAMA},
    "Phi": Family("ForCausalLM", LLAMA, {"partial_rotary_factor": 1.0}),
    "StableLm": Family("ForCausalLM", LLAMA, {"partial_rotary_factor": 1.0}),
    "Qwen3Moe": Family(
        "ForCausalLM",
        LLAMA,
        {"moe_intermediate_size": INNER, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "GPTNeoX": Family("ForCausalLM", STREAM_AND_MLP + ROTARY, {"rotary_pct": 1.0}),
    "GPTJ": Family("ForCausalLM", STREAM_AND_MLP + ROTARY, {"rotary_dim": DIM, "n_inner": INNER}),
    "Falcon": Family(
        "ForCausalLM",
        STREAM_AND_MLP + groups(DIM, blocks={HEADS: 1}),
        {"ffn_hidden_size": INNER, "head_dim": None},
    ),
    "GPT2": Family("LMHeadModel", BERT, {"n_inner": INNER}),
    "GPTNeo": Family("ForCausalLM", BERT, {"num_layers": 1, "attention_types": [[["global"], 1]]}),
    "OPT": Family("ForCausalLM", BERT, {"ffn_dim": INNER, "word_embed_proj_dim": STREAM}),
    # Linear biases of attention differ from head to head.
    "Bloom": Family("ForCausalLM", groups(STREAM, 4 * STREAM, *[DIM] * 2 * HEADS)),
    "Mpt": Family(
        "ForCausalLM", groups(STREAM, 4 * STREAM, *[DIM] * 2 * HEADS), {"d_model": STREAM}
    ),
    "Bert": Family("ForMaskedLM", BERT),
    "Roberta": Family("ForMaskedLM", BERT),
    "DistilBert": Family(
        "ForMaskedLM",
        BERT,
        {"dim": STREAM, "hidden_dim": INNER, "n_layers": 1, "n_heads": HEADS},
    ),
    "Electra": Family("ForMaskedLM", BERT + groups(12), {"embedding_size": 12}),
    "Albert": Family("ForMaskedLM", BERT + groups(12), {"embedding_size": 12}),
    "Deberta": Family("ForMaskedLM", BERT),
    "MPNet": Family("ForMaskedLM", BERT),
    "ModernBert": Family("ForMaskedLM", STREAM_AND_MLP + ROTARY),
    "FNet": Family("ForMaskedLM", groups(INNER, STREAM)),  # a Fourier transform of the stream
    "T5": Family(
        "ForConditionalGeneration",
        groups(STREAM) + times(2, groups(INNER)) + times(3, ATTENTION),
        {"d_model": STREAM, "d_kv": DIM, "d_ff": INNER, "num_layers": 1, "num_heads": HEADS},
        "pairs",
    ),
    "Bart": Family(
        "ForConditionalGeneration",
        groups(STREAM) + times(2, groups(INNER)) + times(3, ATTENTION),
        SEQ2SEQ,
        "pairs",
    ),
    "Whisper": Family(
        "ForConditionalGeneration",
        groups(STREAM) + times(2, STREAM_AND_MLP) + times(3, ATTENTION),
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32},
        "spectra",
    ),
    "ViT": Family("ForImageClassification", BERT, IMAGES, "images"),
    "DeiT": Family("ForImageClassification", BERT, IMAGES, "images"),
    "Beit": Family("ForImageClassification", BERT, IMAGES, "images"),
    "CLIP": Family(
        "Model",
        times(2, BERT) + groups(10),
        {"text_config": SIZES, "vision_config": {**SIZES, **IMAGES}, "projection_dim": 10},
        "images and texts",
    ),
    # Two convolutions before the stream, whose positions come from a grouped convolution.
    "Wav2Vec2": Family("ForCTC", BERT + groups(8, 8), SPEECH, "sound"),
    "Hubert": Family("ForCTC", BERT + groups(8, 8), SPEECH, "sound"),
    "Dinov2": Family("ForImageClassification", DINO, {**IMAGES, "mlp_ratio": 2}, "images"),
    "Swin": Family("ForImageClassification", STAGES, {**IMAGES, **SWIN}, "images"),
    "Swinv2": Family("ForImageClassification", STAGES, {**IMAGES, **SWIN}, "images"),
    "Segformer": Family(  # keys and values of the first stage have a stream of their own
        "ForImageClassification", STAGES + groups(8), {**IMAGES, **SEGFORMER}, "images"
    ),
    "ConvNext": Family("ForImageClassification", groups(8, 32, 16, 64), CONVNEXT, "images"),
    "ConvNextV2": Family("ForImageClassification", groups(8, 32, 16, 64), CONVNEXT, "images"),
    "DeepseekV2": Family("ForCausalLM", BERT + groups(8, 12), {**LATENT, **DEEPSEEK}),
    "DeepseekV3": Family("ForCausalLM", BERT + groups(8, 12), {**LATENT, **DEEPSEEK}),
    "RecurrentGemma": Family(  # positions turn one half of the units of a head
        "ForCausalLM",
        groups(STREAM, *[INNER // 2] * 3, 2, 2) + GROUPED + times(2, groups(HEADS, *[DIM] * HEADS)),
        RECURRENT,
    ),
    "Cohere2": Family("ForCausalLM", LLAMA),
    "Glm4": Family("ForCausalLM", LLAMA, {"partial_rotary_factor": 1.0}),
    "GptOss": Family("ForCausalLM", LLAMA, {"num_local_experts": 4}),
    "Marian": Family(
        "MTModel", groups(STREAM) + times(2, groups(INNER)) + times(3, ATTENTION), SEQ2SEQ, "pairs"
    ),
    "XLNet": Family("LMHeadModel", groups(STREAM, INNER, HEADS, *[DIM] * 2 * HEADS), XLNET),
    "BigBird": Family("ForMaskedLM", BERT, {"attention_type": "original_full"}),
    "Mamba": Family("ForCausalLM", groups(STREAM, INNER, 16, 2)),
    "Mamba2": Family(
        "ForCausalLM",
        groups(STREAM, *[8] * 6, 4, 4, blocks={3: 2, 2: 1}),
        {"num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 4, "chunk_size": 8},
    ),
    "Rwkv": Family(
        "ForCausalLM",
        groups(STREAM, *[INNER, STREAM] * 2),
        {"attention_hidden_size": STREAM, "num_hidden_layers": 2, "use_cache": False},
    ),
}


UNSEATED = "gains of the norms of heads stand in no space"
ROUTED = "grouped products of experts, an operator of transformers, have no rule"
LARGER: dict[str, Larger] = {
    **dict.fromkeys(["Llama", "Mistral", "Qwen2", "Phi3", "Granite"], Larger(SPUN_LLAMA)),
    "Qwen3": Larger(SPUN + GATED + NORMED + GAINS_OF_HEADS, UNSEATED),
    # Embeddings that are tied to the logits stand behind the last gain: the stream keeps signs.
    **dict.fromkeys(
        ["Gemma", "SmolLM3", "Ernie4_5"], Larger(FLIPS + times(2, GAIN) + GATED + TURNED)
    ),
    # Gains that write to the stream share its signs, and those of what they norm.
    "Gemma2": Larger(times(3, FLIPS) + times(2, GAIN) + GATED + TURNED),
    "Glm4": Larger(times(3, FLIPS) + times(3, GAIN) + GATED + TURNED),
    **dict.fromkeys(["Cohere", "Cohere2"], Larger(GAIN + GATED + TURNED)),
    "Olmo": Larger(ABOUT_1 + GATED + TURNED),
    "Olmo2": Larger(
        times(3, FLIPS)
        + GAIN
        + GATED
        + VALUES
        + kinds(scales=[DIM // 2] * SHARED, signs=[DIM // 2] * SHARED + [STREAM, SHARED * DIM]),
        "of the signs of heads and their gains one solution is taken",
    ),
    "Exaone4": Larger(times(3, FLIPS) + GAIN + GATED + NORMED + GAINS_OF_HEADS, UNSEATED),
    "Starcoder2": Larger(times(2, GAIN) + TURNED),
    **dict.fromkeys(["Mixtral", "GptOss"], Larger(SPUN_LLAMA, ROUTED)),
    "Qwen3Moe": Larger(SPUN + GATED + NORMED + GAINS_OF_HEADS, f"{ROUTED}; {UNSEATED}"),
    "Phi": Larger(ABOUT_1 + TURNED),
    "StableLm": Larger(ABOUT_1 + GATED + TURNED),
    **dict.fromkeys(["GPTNeoX", "GPTJ"], Larger(ABOUT_1 + ALL_TURNED)),
    "Falcon": Larger(GAIN + kinds(bases=DIM) + TURNS),  # one head of keys and values
    **dict.fromkeys(["GPT2", "GPTNeo", "Bloom", "Mpt"], Larger(times(2, GAIN) + BASES)),
    "OPT": Larger(times(2, GAIN) + RELU + BASES),
    # The norm after a sum is what is added to next; that of the head is free.
    **dict.fromkeys(
        ["Bert", "Roberta", "DistilBert", "Deberta", "MPNet", "BigBird"], Larger(GAIN + BASES)
    ),
    **dict.fromkeys(["Electra", "Albert"], Larger(GAIN + kinds(scales=12, signs=12) + BASES)),
    "ModernBert": Larger(times(2, GAIN) + GATED + ALL_TURNED),
    "FNet": Larger(GAIN),
    "T5": Larger(FLIPS + times(6, GAIN) + times(2, RELU) + times(3, BASES)),
    # The encoder's last norm is read by the decoder's keys and values alone.
    "Bart": Larger(
        GAIN + times(3, BASES), "one unit of the stream is looked at alone: 23 of 24 move"
    ),
    "Marian": Larger(GAIN + times(3, BASES)),
    "Whisper": Larger(times(6, GAIN) + times(3, BASES)),
    **dict.fromkeys(["ViT", "DeiT", "Beit", "Dinov2"], Larger(ABOUT_1 + BASES)),
    "CLIP": Larger(ABOUT_1 + times(3, GAIN) + kinds(rotations=10) + times(2, BASES)),
    **dict.fromkeys(
        ["Wav2Vec2", "Hubert"],
        Larger(GAIN + kinds(scales=8, signs=8) + BASES, "the stream stays, as among permutations"),
    ),
    "ConvNext": Larger(kinds(scales=[8, 16] * 3, signs=[8, 16] * 3)),
    "ConvNextV2": Larger(kinds(scales=[8, 16] * 2, signs=[8, 16] * 2)),  # no gains of layers
    **dict.fromkeys(
        ["DeepseekV2", "DeepseekV3"],
        Larger(
            SPUN + GATED + kinds(rotations=[8, 12], scales=1, phases=1) + BASES,
            "parts of queries and keys are copied into an empty tensor",
        ),
    ),
    "Mamba": Larger(
        FLIPS + GAIN + kinds(scales=[INNER, 16], signs=[INNER, 16], bases=2),
        "the recurrence over positions (exp, pad, stack) is not followed",
    ),
}


class Logits(nn.Module):
    """A network, of whose outputs the logits count."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.net(*args, **kwargs)
        logits: Tensor = out.logits_per_image if "logits_per_image" in out else out.logits
        return logits


def found_in(sym: symmetry.Symmetry) -> Groups:
    """The groups of a symmetry by size."""
    return Counter(f"{g.size} blocks" if g.inner else f"{g.size}" for g in sym.groups.values())


def build(name: str) -> nn.Module:
    """A network of a family, with random weights."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    options = {**SIZES, **NO_DROPOUT, **copy.deepcopy(family.options)}
    given = {k: v for k, v in options.items() if v is not None}
    config = getattr(transformers, f"{name}Config")(**given)
    return Logits(getattr(transformers, name + family.model)(config))


def examine(name: str, code: str) -> dict[str, Any]:
    """One row of the table; `error` is None, and `failure` says why, when there is no proof."""
    row: dict[str, Any] = {"family": name, "commit": code}
    family = FAMILIES[name]
    try:
        net, inputs = build(name), INPUTS[family.inputs]
        example, other = inputs(2, 6), inputs(3, 9)
        start = time.process_time()
        sym = symmetry.find(net, example)
        row["seconds"] = round(time.process_time() - start, 2)
        found = found_in(sym)
        row["found"], row["by hand"] = dict(found), dict(family.by_hand)
        row["missing"] = dict(family.by_hand - found)
        row["error"] = sym.verify(net, example, others=[other])
        half = tree_map_only(Tensor, lambda x: x.half() if x.is_floating_point() else x, example)
        row["train"] = compared(found, net, example, train=True)
        row["float16"] = compared(found, copy.deepcopy(net).half(), half)
        if not found or "other groups" in (row["train"], row["float16"]):
            raise ValueError("no groups, or others in training mode or in float16")
    except Exception as error:  # the others go on
        row |= {"error": None, "failure": f"{type(error).__name__}: {error}"}
    return row


def examine_larger(name: str, code: str) -> dict[str, Any]:
    """The larger groups of one row; `error` is None, and `failure` says why, without proof."""
    row: dict[str, Any] = {"commit": code}
    hand, why = LARGER.get(name, Larger(Counter()))  # of some nobody has written a table
    try:
        net, inputs = build(name), INPUTS[FAMILIES[name].inputs]
        example, other = inputs(2, 6), inputs(3, 9)
        start = time.process_time()
        bases = symmetry.find(net, example, kinds=symmetry.KINDS)
        row["seconds"] = round(time.process_time() - start, 2)
        factors = bases.factors.values()
        found = Counter(f"{f.kind} {f.size}" for f in factors)
        dimensions = Counter[str]()
        for f in factors:
            dimensions[f.kind] += f.dimension
        row["found"], row["by hand"] = dict(found), dict(hand)
        row["missing"], row["more"] = dict(hand - found), dict(found - hand)
        row["why"] = why if hand - found else ""
        row["dimensions"], row["folded"] = dict(dimensions), len(bases.folded)
        row["refused"] = bases.refusals().to_dict("records")
        row["error"] = bases.verify(net, example, others=[other])
    except Exception as error:  # the others go on
        row |= {"error": None, "failure": f"{type(error).__name__}: {error}"}
    return row


def compared(found: Groups, net: nn.Module, example: Any, train: bool = False) -> str:
    """Whether the same groups are found in another mode, or why none are."""
    try:
        return "same" if found_in(symmetry.find(net, example, train)) == found else "other groups"
    except symmetry.SymmetryError as error:
        return str(error)


def text(sizes: Mapping[str, int]) -> str:
    """Groups in a line: `24 · 20 · 6 blocks · 12 × 4`."""
    return " · ".join(size if n == 1 else f"{n} × {size}" for size, n in sizes.items())


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    if row["error"] is None:
        return f"{row['family']:12} {row['failure']}"
    return (
        f"{row['family']:12} {row['error']:8.1e} {row['seconds']:6.2f}  "
        f"{text(row['found']):40}  missing: {text(row['missing'])}"
    )


def larger_line(row: dict[str, Any]) -> str:
    """The larger groups of a row as they are printed."""
    own = row["larger"]
    if own["error"] is None:
        return f"{row['family']:12} {own['failure']}"
    parts = (f"{k}: {text(own[k])}" for k in ("found", "missing", "more") if own[k])
    return f"{row['family']:12} {own['error']:8.1e} {own['seconds']:6.2f}  {'; '.join(parts)}"


def summary(rows: list[dict[str, Any]]) -> dict[str, object]:
    """The last line."""
    good = [r for r in rows if r["error"] is not None]
    return {
        "families": len(rows),
        "verified": len(good),
        "complete": sum(not r["missing"] for r in good),
        "larger_verified": sum(r["larger"]["error"] is not None for r in rows),
        "larger_complete": sum(
            bool(r["larger"].get("by hand")) and not r["larger"]["missing"] for r in rows
        ),
        "worst_error": max((r["error"] for r in good), default=math.nan),
    }


def main() -> int:
    """Run the table and the programs; exit status 1 when a family fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="default: the whole list")
    parser.add_argument("--minutes", type=float, default=1.0, help="of random programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first programs")
    parser.add_argument("--operators", action="store_true", help="try PyTorch's list, too")
    parser.add_argument("--out", type=Path, help="also write a JSON file with provenance")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of configurations that are small
    torch.set_num_threads(1)
    kept = args.resume and args.out and args.out.exists()
    before = json.loads(args.out.read_text()) if kept else {}
    rows, runs = before.get("rows", []), before.get("random programs", [])
    operators = before.get("operators", {})
    done, code = {row["family"] for row in rows}, commit()
    symmetry.find(nn.Linear(2, 2), torch.rand(2, 2))
    for name in (name for name in args.families or FAMILIES if name not in done):
        rows.append(examine(name, code))
        print(line(rows[-1]), flush=True)
    for row in rows:
        if "larger" not in row and row["family"] in FAMILIES:
            row["larger"] = examine_larger(row["family"], code)
            print(larger_line(row), flush=True)
    tried = programs.try_programs(60 * args.minutes, args.seed)  # raises an error if one fails
    if args.operators:
        operators = {"networks": dict(programs.try_operators(print)), "commit": code}
    print(json.dumps(summary(rows) | {"programs": tried, "operators": operators}))
    if args.out:
        about = {"sizes": SIZES, **provenance(), "transformers": metadata.version("transformers")}
        if args.minutes:
            run = {"programs": tried, "minutes": args.minutes, "seed": args.seed, "commit": code}
            runs.append(run)
        about |= {"summary": summary(rows), "random programs": runs, "operators": operators}
        record = about | {"rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    wrong = {"unsound", "crashes"} & operators.get("networks", {}).keys()
    return int(bool(wrong) or any(None in (r["error"], r["larger"]["error"]) for r in rows))


if __name__ == "__main__":
    sys.exit(main())
