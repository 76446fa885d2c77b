"""Gemma 1, 2 and 3 (text): the embedding times sqrt(hidden_size), norms with a weight of 1 + w, GELU in place of SiLU.

Gemma 2 has norms on both sides of attention and MLP, soft caps, and windows in every other layer. Gemma 3 has norms of
queries and keys in place of the caps, five layers with a window for each without, and rotary frequencies of their own for both.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name, preimage, rope_keys
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
    refuse_uneven_heads,
)
from megatron_llm.hf.families.mistral import layer_types, types_where, windows
from megatron_llm.hf.family import Family, Row

_DEFAULTS = DEFAULTS | {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_DEFAULTS_1 = _DEFAULTS | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"}
_DEFAULTS_2 = _DEFAULTS | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_DEFAULTS_3 = _DEFAULTS_2 | {
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}

_BOTH_NORMS = (
    Row("model.layers.{i}.post_attention_layernorm.{kind}", "layers.{i}.attention_post_norm.{kind}"),
    Row("model.layers.{i}.pre_feedforward_layernorm.{kind}", "layers.{i}.mlp_norm.{kind}"),
    *MLP,
    Row("model.layers.{i}.post_feedforward_layernorm.{kind}", "layers.{i}.mlp_post_norm.{kind}"),
)


def _common(read: ConfigReader, act: str) -> dict[str, Any]:
    read.only("use_bidirectional_attention", False)
    return {
        **base(read, act),
        "norm_weight_offset": 1.0,
        "embedding_multiplier": (read("hidden_size") or 1) ** 0.5,
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
    }


def _from_gemma(read: ConfigReader) -> dict[str, Any]:
    """Folders of the first release say hidden_act gelu and mean the approximation (transformers issue 29402).

    transformers 4 preferred `hidden_activation` where it was set, 5 ignores it: they must not contradict each other.
    """
    fields = _common(read, "hidden_act")
    if read("hidden_act") == "gelu":
        fields["hidden_act"] = "gelu_tanh"
    if read.config.get("hidden_activation") and read.activation("hidden_activation") != fields["hidden_act"]:
        read.problems.append(f"hidden_activation {read('hidden_activation')!r} contradicts hidden_act {read('hidden_act')!r}")
    return {**fields, **read.rope()}


def _to_gemma(model: ModelConfig) -> dict[str, Any]:
    both = {"hidden_activation": activation_name(model)}  # which of the two transformers 4 obeys differs by release
    return {**base_keys(model), **both, "attention_bias": model.qkv_bias, **rope_keys(model)}


def _sandwich(read: ConfigReader, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; `period`: of so many layers the last one has no window."""
    refuse_uneven_heads(read)
    sliding = [bool((layer + 1) % period) for layer in range(read("num_hidden_layers") or 0)]
    return {
        **_common(read, "hidden_activation"),
        "norm_placement": "both",
        "attention_scale": read("query_pre_attn_scalar") ** -0.5,
        "attn_logit_softcapping": read.optional("attn_logit_softcapping"),
        "final_logit_softcapping": read.optional("final_logit_softcapping"),
        **windows(read, read.optional("sliding_window"), types_where(read, sliding)),
    }


def _from_gemma2(read: ConfigReader) -> dict[str, Any]:
    read.only("sliding_window_pattern", 2)
    return {**_sandwich(read, 2), **read.rope()}


def _to_gemma2(model: ModelConfig) -> dict[str, Any]:
    """A window is written even if no layer has one: transformers makes a mask of it in any case."""
    scale = model.scale(0)
    scalar = preimage(scale, lambda scalar: scalar**-0.5, scale**-2)
    return {
        **base_keys(model, "hidden_activation"),
        "attention_bias": model.qkv_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,  # transformers 5 wants an integer
        "attn_logit_softcapping": model.attn_logit_softcapping,
        "final_logit_softcapping": model.final_logit_softcapping,
        "sliding_window": model.sliding_window or _DEFAULTS_2["sliding_window"],
        "layer_types": layer_types(model),
        **rope_keys(model),
    }


def _from_gemma3(read: ConfigReader) -> dict[str, Any]:
    read.only("attn_logit_softcapping")  # transformers reads it and does not apply it
    period = read("sliding_window_pattern")
    if not isinstance(period, int) or period < 1:
        read.problems.append(f"sliding_window_pattern {period!r} must be a positive number of layers")
        period = 1
    return {**_sandwich(read, period), "qk_norm": "head", **_rope_of_both(read)}


def _rope_of_both(read: ConfigReader) -> dict[str, Any]:
    """Rotary settings of layers without and with a window: transformers 5 nests them, 4 has a key for each."""
    scaling, parameters = read.config.get("rope_scaling") or {}, read.config.get("rope_parameters") or {}
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(value, dict):
            read.problems.append(f"{name} must be a mapping, got {value!r}")
            return {}
    if strange := parameters.keys() - {"full_attention", "sliding_attention"}:  # transformers ignores settings for both sorts
        read.problems.append(f"rope_parameters {', '.join(sorted(strange))} must be inside full_attention and sliding_attention")
    if "type" in scaling and "rope_type" not in scaling:  # transformers 5 would leave the frequencies as they are
        read.problems.append("rope_scaling must name its rope_type, not its type")
    full, sliding = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
    if (kind := sliding.get("rope_type", sliding.get("type", "default"))) != "default":
        read.problems.append(f"rope type {kind!r} of sliding_attention is not supported, only default")
    local = sliding.get("rope_theta") or read("rope_local_base_freq")
    return {**read.rope(parameters={**full, **scaling} or {"rope_type": "default"}), "rope_local_theta": local}


def _to_gemma3(model: ModelConfig) -> dict[str, Any]:
    keys = _to_gemma2(model)
    return {**keys, "rope_local_base_freq": model.rope_theta if model.rope_local_theta is None else model.rope_local_theta}


FAMILIES = (
    Family(
        architectures=("GemmaForCausalLM",),
        model_type="gemma",
        from_hf=_from_gemma,
        to_hf=_to_gemma,
        table=TABLE,
        defaults=_DEFAULTS_1,
        prefix="model.",
        derived=DERIVED,
    ),
    Family(
        architectures=("Gemma2ForCausalLM",),
        model_type="gemma2",
        from_hf=_from_gemma2,
        to_hf=_to_gemma2,
        table=(*EMBEDDING, *ATTENTION, *_BOTH_NORMS, *HEAD),
        defaults=_DEFAULTS_2,
        prefix="model.",
        derived=DERIVED,
    ),
    Family(
        architectures=("Gemma3ForCausalLM",),
        model_type="gemma3_text",
        from_hf=_from_gemma3,
        to_hf=_to_gemma3,
        table=(*EMBEDDING, *ATTENTION, *QK_NORM, *_BOTH_NORMS, *HEAD),
        defaults=_DEFAULTS_3,
        prefix="model.",
        derived=DERIVED,
    ),
)
