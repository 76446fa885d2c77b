"""SmolLM3: Llama of which every fourth layer has no rotary embedding.

In `no_rope_layers`, despite its name, 1 stands for a layer that rotates. With windows, it is the others that have them.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, rope_keys
from megatron_llm.hf.families.llama import DEFAULTS, DERIVED, TABLE, base, base_keys
from megatron_llm.hf.families.mistral import layer_types, types_where, windows
from megatron_llm.hf.family import Family


def _rotates(read: ConfigReader) -> list[bool]:
    """Whether each layer rotates."""
    layers, listed, interval = read("num_hidden_layers") or 0, read("no_rope_layers"), read("no_rope_layer_interval")
    if listed is not None:
        if len(listed) < layers:
            read.problems.append(f"no_rope_layers speaks of {len(listed)} layers of {layers}")
            return [True] * layers
        return [bool(rotates) for rotates in listed[:layers]]
    if interval < 1:
        read.problems.append(f"no_rope_layer_interval {interval} must be positive")
        return [True] * layers
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def from_hf(read: ConfigReader) -> dict[str, Any]:
    rotates, window = _rotates(read), read("sliding_window")
    uses_window = read("use_sliding_window") and window is not None
    types = types_where(read, [bool(uses_window and not rotary) for rotary in rotates])
    if "sliding_attention" in types and not uses_window:  # transformers' implementations of attention differ in what they do
        read.problems.append("layer_types has sliding_attention, but use_sliding_window is not set")
    return {
        **base(read),
        "nope_layers": [layer for layer, rotary in enumerate(rotates) if not rotary],
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        "mlp_bias": read("mlp_bias"),
        **windows(read, window, types),
        **read.rope(),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    types = layer_types(model)
    has_windows = "sliding_attention" in types
    return {
        **base_keys(model),
        "no_rope_layers": [int(layer not in model.nope_layers) for layer in range(model.num_hidden_layers)],
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        "use_sliding_window": has_windows,
        "sliding_window": model.sliding_window if has_windows else None,
        "layer_types": types,
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    },
    prefix="model.",
    derived=DERIVED,
)
