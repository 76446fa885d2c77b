"""Granite 3, dense: Llama with a factor for the embedding, the scores, what each layer adds, and the logits (muP)."""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, preimage, rope_keys
from megatron_llm.hf.families.llama import DEFAULTS, DERIVED, TABLE, base, base_keys
from megatron_llm.hf.family import Family


def from_hf(read: ConfigReader) -> dict[str, Any]:
    return {
        **base(read),
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        "mlp_bias": read("mlp_bias"),
        "embedding_multiplier": read("embedding_multiplier"),
        "residual_multiplier": read("residual_multiplier"),
        "attention_scale": read("attention_multiplier"),
        "logit_multiplier": 1 / read("logits_scaling"),
        **read.rope(),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **base_keys(model),
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.scale(0),
        "logits_scaling": preimage(model.logit_multiplier, lambda scaling: 1 / scaling, 1 / model.logit_multiplier),
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS
    | {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    prefix="model.",
    derived=DERIVED,
)
