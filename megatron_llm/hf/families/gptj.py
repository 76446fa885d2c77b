"""GPT-J: GPT-J-6B, Dolly-v1, GPT4All-J, PygmalionAI's, ...

Attention and MLP side by side behind one norm, rotation of neighbouring channels on the first `rotary_dim` of a head, no biases
in attention, one in the head. Its rotary base is fixed: no key of config.json changes it.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.families.gpt2 import MLP_DEFAULTS, SIZES, shape, shape_keys
from megatron_llm.hf.family import Family, Row

DEFAULTS: dict[str, Any] = {
    **MLP_DEFAULTS,
    "n_positions": 2048,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
}

BODY = (
    Row("transformer.h.{i}.attn.out_proj.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("transformer.h.{i}.mlp.fc_in.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("transformer.h.{i}.mlp.fc_out.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("transformer.ln_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)
"""What follows queries, keys and values; CodeGen's names too."""

TABLE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.h.{i}.ln_1.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.h.{i}.attn.q_proj.{kind}", "layers.{i}.attention.q.{kind}"),
    Row("transformer.h.{i}.attn.k_proj.{kind}", "layers.{i}.attention.k.{kind}"),
    Row("transformer.h.{i}.attn.v_proj.{kind}", "layers.{i}.attention.v.{kind}"),
    *BODY,
)

DERIVED = (r"attn\.(?:masked_)?bias", r"attn\.causal_mask", r"embed_positions")


def from_hf(read: ConfigReader) -> dict[str, Any]:
    if not read.config.get("rotary_dim", True):  # transformers rotates heads by angles for the hidden size: shapes clash
        read.problems.append(f"rotary_dim {read.config['rotary_dim']} is not supported, only rotated channels of a head")
    return {
        **shape(read),
        "parallel_block": "one_norm",
        "rotary_dim": read("rotary_dim"),
        "rope_interleaved": True,
        "head_bias": True,
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {**shape_keys(model), "rotary_dim": model.rotary_dim}


FAMILY = Family(
    architectures=("GPTJForCausalLM",),
    model_type="gptj",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    aliases=SIZES,
    prefix="transformer.",
    derived=DERIVED,
)
