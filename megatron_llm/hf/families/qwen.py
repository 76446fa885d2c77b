"""Qwen 1.5, 2, 2.5 and 3, dense: Llama with a bias on queries, keys and values (2), or a norm over each of their heads (3).

Windows are off unless `use_sliding_window`; then the layers from max_window_layers on have them.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, rope_keys
from megatron_llm.hf.families.llama import (
    ATTENTION,
    DEFAULTS,
    DERIVED,
    EMBEDDING,
    HEAD,
    MLP,
    MLP_NORM,
    QK_NORM,
    TABLE,
    base,
    base_keys,
)
from megatron_llm.hf.families.mistral import layer_types, types_where, windows
from megatron_llm.hf.family import Family

_DEFAULTS = DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def _windows(read: ConfigReader) -> dict[str, Any]:
    window = read.optional("sliding_window") if read("use_sliding_window") else None
    layers, first = range(read("num_hidden_layers") or 0), read("max_window_layers")
    return windows(read, window, types_where(read, [window is not None and layer >= first for layer in layers]))


def _window_keys(model: ModelConfig) -> dict[str, Any]:
    types = layer_types(model)
    window = model.sliding_window if "sliding_attention" in types else None
    first = types.index("sliding_attention") if window else len(types)
    keys = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
    return {**keys, "layer_types": types}


def _from_qwen2(read: ConfigReader) -> dict[str, Any]:
    return {**base(read), "qkv_bias": True, **_windows(read), **read.rope()}


def _to_qwen2(model: ModelConfig) -> dict[str, Any]:
    return {**base_keys(model), **_window_keys(model), **rope_keys(model)}


def _from_qwen3(read: ConfigReader) -> dict[str, Any]:
    return {
        **base(read),
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        "qk_norm": "head",
        **_windows(read),
        **read.rope(),
    }


def _to_qwen3(model: ModelConfig) -> dict[str, Any]:
    return {**base_keys(model), "attention_bias": model.qkv_bias, **_window_keys(model), **rope_keys(model)}


FAMILIES = (
    Family(
        architectures=("Qwen2ForCausalLM",),
        model_type="qwen2",
        from_hf=_from_qwen2,
        to_hf=_to_qwen2,
        table=TABLE,
        defaults=_DEFAULTS,
        prefix="model.",
        derived=DERIVED,
    ),
    Family(
        architectures=("Qwen3ForCausalLM",),
        model_type="qwen3",
        from_hf=_from_qwen3,
        to_hf=_to_qwen3,
        table=(*EMBEDDING, *ATTENTION, *QK_NORM, *MLP_NORM, *MLP, *HEAD),
        defaults=_DEFAULTS | {"head_dim": 128},
        prefix="model.",
        derived=DERIVED,
    ),
)
