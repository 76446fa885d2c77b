"""Mistral 7B, Nemo, Small, ...: Llama whose layers all have a sliding window, or none (`sliding_window: null`).

How config.json speaks about windows, for the other families that have them, is here too.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, rope_keys
from megatron_llm.hf.families.llama import DEFAULTS, DERIVED, TABLE, base, base_keys
from megatron_llm.hf.family import Family

_TYPES = ("full_attention", "sliding_attention")


def windows(read: ConfigReader, window: int | None, types: list[str]) -> dict[str, Any]:
    """sliding_window and layer_types of ModelConfig, where config.json names the sort of each layer."""
    if unknown := [name for name in dict.fromkeys(types) if name not in _TYPES]:
        read.problems.append(f"layer_types {', '.join(unknown)} are not supported, only {' or '.join(_TYPES)}")
    if isinstance(layers := read("num_hidden_layers"), int) and len(types) != layers:
        read.problems.append(f"layer_types names {len(types)} layers of {layers}")
    if "sliding_attention" not in types:
        return {"sliding_window": None}
    return {"sliding_window": window, "layer_types": types}


def types_where(read: ConfigReader, sliding: list[bool]) -> list[str]:
    """`layer_types` of config.json; where it is silent, those with a window are given."""
    return read("layer_types") or [_TYPES[has_window] for has_window in sliding]


def layer_types(model: ModelConfig) -> list[str]:
    """What config.json calls the layers of a model."""
    return [_TYPES[model.window(layer) is not None] for layer in range(model.num_hidden_layers)]


def from_hf(read: ConfigReader) -> dict[str, Any]:
    window, types = read.optional("sliding_window"), read("layer_types") or []
    if any(name != _TYPES[window is not None] for name in types):  # transformers ignores what other implementations obey
        read.problems.append(f"layer_types do not fit sliding_window {window}, which is that of all layers")
    return {**base(read), "sliding_window": window, **read.rope()}


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {**base_keys(model), "sliding_window": model.window(0), **rope_keys(model)}


FAMILY = Family(
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None},
    prefix="model.",
    derived=DERIVED,
)
