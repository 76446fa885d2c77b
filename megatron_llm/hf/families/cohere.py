"""Command-R and Aya: attention and MLP side by side behind one layer norm without bias, neighbouring channels rotated together.

Logits are multiplied by logit_scale. Command-R+ norms queries and keys, each head with a weight of its own.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, rope_keys
from megatron_llm.hf.families.llama import ATTENTION, DEFAULTS, DERIVED, EMBEDDING, HEAD, MLP, QK_NORM, base, base_keys
from megatron_llm.hf.family import Family


def from_hf(read: ConfigReader) -> dict[str, Any]:
    return {
        **base(read, eps="layer_norm_eps"),
        "norm": "layer_norm",
        "parallel_block": "one_norm",
        "rope_interleaved": True,
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        "qk_norm": "per_head" if read("use_qk_norm") else "none",
        "logit_multiplier": read("logit_scale"),
        **read.rope(),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **base_keys(model, eps="layer_norm_eps"),
        "attention_bias": model.qkv_bias,
        "use_qk_norm": model.qk_norm == "per_head",
        "logit_scale": model.logit_multiplier,
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("CohereForCausalLM",),
    model_type="cohere",
    from_hf=from_hf,
    to_hf=to_hf,
    table=(*EMBEDDING, *ATTENTION, *QK_NORM, *MLP, *HEAD),
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "layer_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "use_qk_norm": False,
        "logit_scale": 0.0625,
    },
    prefix="model.",
    derived=DERIVED,
)
