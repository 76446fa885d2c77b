"""GLM-4 (GlmForCausalLM) and GLM-4-0414 (Glm4ForCausalLM): half of a head is rotated, neighbouring channels together.

Queries, keys and values have a bias, the output projection never does. The second has norms on both sides of attention and MLP.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, partial_rotary_factor, rope_keys
from megatron_llm.hf.families.llama import ATTENTION, DEFAULTS, DERIVED, EMBEDDING, HEAD, MLP_NORM, base, base_keys, head_dim
from megatron_llm.hf.families.phi3 import GATE_UP
from megatron_llm.hf.family import Family, Row

_DEFAULTS = DEFAULTS | {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def _from_glm(read: ConfigReader) -> dict[str, Any]:
    fields = base(read)
    return {**fields, "qkv_bias": read("attention_bias"), "rope_interleaved": True, **read.rope(head_dim(fields))}


def _from_glm4(read: ConfigReader) -> dict[str, Any]:
    return {**_from_glm(read), "norm_placement": "both"}


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **base_keys(model),
        "attention_bias": model.qkv_bias,
        "partial_rotary_factor": partial_rotary_factor(model),
        **rope_keys(model),
    }


FAMILIES = (
    Family(
        architectures=("GlmForCausalLM",),
        model_type="glm",
        from_hf=_from_glm,
        to_hf=_to_hf,
        table=(*EMBEDDING, *ATTENTION, *MLP_NORM, *GATE_UP, *HEAD),
        defaults=_DEFAULTS,
        prefix="model.",
        derived=DERIVED,
    ),
    Family(
        architectures=("Glm4ForCausalLM",),
        model_type="glm4",
        from_hf=_from_glm4,
        to_hf=_to_hf,
        table=(
            *EMBEDDING,
            *ATTENTION,
            Row("model.layers.{i}.post_self_attn_layernorm.{kind}", "layers.{i}.attention_post_norm.{kind}"),
            *MLP_NORM,
            *GATE_UP,
            Row("model.layers.{i}.post_mlp_layernorm.{kind}", "layers.{i}.mlp_post_norm.{kind}"),
            *HEAD,
        ),
        defaults=_DEFAULTS,
        prefix="model.",
        derived=DERIVED,
    ),
)
