"""OLMo 1 and 2: the first has layer norms without parameters and may clip queries, keys and values; the second norms what
attention and MLP give, not what they get, and all heads of queries, and of keys, together.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name, rope_keys
from megatron_llm.hf.families.llama import (
    ATTENTION,
    DEFAULTS,
    DERIVED,
    EMBEDDING,
    HEAD,
    MLP,
    QK_NORM,
    TABLE,
    base,
    base_keys,
    size_keys,
    sizes,
)
from megatron_llm.hf.family import Family, Row

_EPS = 1e-5  # OLMo 1: written in transformers' code, config.json has no such key


def _from_olmo(read: ConfigReader) -> dict[str, Any]:
    return {
        **sizes(read),
        "hidden_act": read.activation("hidden_act"),
        "norm": "layer_norm",
        "norm_weight": False,
        "norm_eps": _EPS,
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        "clip_qkv": read("clip_qkv"),
        **read.rope(),
    }


def _to_olmo(model: ModelConfig) -> dict[str, Any]:
    return {
        **size_keys(model),
        "hidden_act": activation_name(model),
        "attention_bias": model.qkv_bias,
        "clip_qkv": model.clip_qkv,
        **rope_keys(model),
    }


def _from_olmo2(read: ConfigReader) -> dict[str, Any]:
    return {
        **base(read),
        "norm_placement": "output",
        "qk_norm": "full",
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        **read.rope(),
    }


def _to_olmo2(model: ModelConfig) -> dict[str, Any]:
    return {**base_keys(model), "attention_bias": model.qkv_bias, **rope_keys(model)}


FAMILIES = (
    Family(
        architectures=("OlmoForCausalLM",),
        model_type="olmo",
        from_hf=_from_olmo,
        to_hf=_to_olmo,
        table=TABLE,
        defaults=DEFAULTS | {"clip_qkv": None},
        prefix="model.",
        derived=DERIVED,
    ),
    Family(
        architectures=("Olmo2ForCausalLM",),
        model_type="olmo2",
        from_hf=_from_olmo2,
        to_hf=_to_olmo2,
        table=(
            *EMBEDDING,
            *ATTENTION[1:],
            *QK_NORM,
            Row("model.layers.{i}.post_attention_layernorm.{kind}", "layers.{i}.attention_post_norm.{kind}"),
            *MLP,
            Row("model.layers.{i}.post_feedforward_layernorm.{kind}", "layers.{i}.mlp_post_norm.{kind}"),
            *HEAD,
        ),
        defaults=DEFAULTS | {"rms_norm_eps": 1e-5},
        prefix="model.",
        derived=DERIVED,
    ),
)
