"""StarCoder2: layer norms with bias, an MLP without gate whose tensors are named as GPT-2's, one key for all biases."""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, rope_keys
from megatron_llm.hf.families.llama import ATTENTION, DEFAULTS, DERIVED, EMBEDDING, HEAD, MLP_NORM, base, base_keys
from megatron_llm.hf.family import Family, Row


def from_hf(read: ConfigReader) -> dict[str, Any]:
    bias = read("use_bias")
    return {
        **base(read, eps="norm_epsilon"),
        "norm": "layer_norm",
        "norm_bias": True,
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_gated": False,
        "mlp_bias": bias,
        "sliding_window": read("sliding_window"),
        **read.rope(),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **base_keys(model, eps="norm_epsilon"),
        "use_bias": model.mlp_bias,
        "sliding_window": model.window(0),
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("Starcoder2ForCausalLM",),
    model_type="starcoder2",
    from_hf=from_hf,
    to_hf=to_hf,
    table=(
        *EMBEDDING,
        *ATTENTION,
        *MLP_NORM,
        Row("model.layers.{i}.mlp.c_fc.{kind}", "layers.{i}.mlp.up.{kind}"),
        Row("model.layers.{i}.mlp.c_proj.{kind}", "layers.{i}.mlp.down.{kind}"),
        *HEAD,
    ),
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "tie_word_embeddings": True,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": None,
    },
    prefix="model.",
    derived=DERIVED,
)
