"""StableLM 3B, Zephyr, 2 1.6B and 2 12B: layer norms with bias, a quarter of each head rotated.

The 12B norms queries and keys, each head with a weight of its own and each weight a tensor of its own, and has attention and
MLP side by side behind one norm.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, partial_rotary_factor, rope_keys
from megatron_llm.hf.families.llama import ATTENTION, DEFAULTS, DERIVED, EMBEDDING, HEAD, MLP, MLP_NORM, base, base_keys, head_dim
from megatron_llm.hf.family import Family, Row


def from_hf(read: ConfigReader) -> dict[str, Any]:
    fields = base(read, eps="layer_norm_eps")
    derived = head_dim({**fields, "head_dim": 0})
    read.only("head_dim", derived)  # transformers' rotary embedding would obey it, its attention would not
    return {
        **fields,
        "norm": "layer_norm",
        "norm_bias": True,
        "parallel_block": "one_norm" if read("use_parallel_residual") else "none",
        "qkv_bias": read("use_qkv_bias"),
        "qk_norm": "per_head" if read("qk_layernorm") else "none",
        **read.rope(derived),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **base_keys(model, eps="layer_norm_eps"),
        "use_parallel_residual": model.parallel_block == "one_norm",
        "use_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm == "per_head",
        "partial_rotary_factor": partial_rotary_factor(model),
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("StableLmForCausalLM",),
    model_type="stablelm",
    from_hf=from_hf,
    to_hf=to_hf,
    table=(
        *EMBEDDING,
        *ATTENTION,
        Row("model.layers.{i}.self_attn.q_layernorm.norms.{h}.{kind}", "layers.{i}.attention.q_norm.{kind}"),
        Row("model.layers.{i}.self_attn.k_layernorm.norms.{h}.{kind}", "layers.{i}.attention.k_norm.{kind}"),
        *MLP_NORM,
        *MLP,
        *HEAD,
    ),
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
    },
    prefix="model.",
    derived=DERIVED,
)
