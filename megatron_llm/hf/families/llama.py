"""Llama 1 to 3.x, and every model that says so: Code Llama, Vicuna, Open-Llama, Yi, TinyLlama, ...

What other families have in common with it they import from here.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name, rope_keys
from megatron_llm.hf.family import Family, Row

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
"""Keys that mean in config.json what they mean in ModelConfig; other families of this kind read them too."""

DEFAULTS: dict[str, Any] = {  # 0: derived from the others
    "num_key_value_heads": 0,
    "head_dim": 0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
}

EMBEDDING = (Row("model.embed_tokens.weight", "embedding.weight"),)
ATTENTION = (
    Row("model.layers.{i}.input_layernorm.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("model.layers.{i}.self_attn.q_proj.{kind}", "layers.{i}.attention.q.{kind}"),
    Row("model.layers.{i}.self_attn.k_proj.{kind}", "layers.{i}.attention.k.{kind}"),
    Row("model.layers.{i}.self_attn.v_proj.{kind}", "layers.{i}.attention.v.{kind}"),
    Row("model.layers.{i}.self_attn.o_proj.{kind}", "layers.{i}.attention.o.{kind}"),
)
QK_NORM = (
    Row("model.layers.{i}.self_attn.q_norm.{kind}", "layers.{i}.attention.q_norm.{kind}"),
    Row("model.layers.{i}.self_attn.k_norm.{kind}", "layers.{i}.attention.k_norm.{kind}"),
)
MLP_NORM = (Row("model.layers.{i}.post_attention_layernorm.{kind}", "layers.{i}.mlp_norm.{kind}"),)
MLP = (
    Row("model.layers.{i}.mlp.gate_proj.{kind}", "layers.{i}.mlp.gate.{kind}"),
    Row("model.layers.{i}.mlp.up_proj.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("model.layers.{i}.mlp.down_proj.{kind}", "layers.{i}.mlp.down.{kind}"),
)
HEAD = (Row("model.norm.{kind}", "final_norm.{kind}"), Row("lm_head.{kind}", "head.{kind}"))
TABLE = (*EMBEDDING, *ATTENTION, *MLP_NORM, *MLP, *HEAD)
"""Query and key rows are in the half-rotation order that our RoPE uses too, so every tensor is copied as it is."""

DERIVED = (r"rotary_emb\.inv_freq",)


def sizes(read: ConfigReader) -> dict[str, Any]:
    """Fields of SIZES; null key/value heads and head_dim are derived, whatever the default."""
    derived = {key: read.optional(key) or 0 for key in ("num_key_value_heads", "head_dim")}
    return {**{key: read(key) for key in SIZES if key not in derived}, **derived}


def size_keys(model: ModelConfig) -> dict[str, Any]:
    return {key: getattr(model, key) for key in SIZES}


def head_dim(fields: dict[str, Any]) -> int:
    """The channels of a head, by the fields of SIZES; 0 if it cannot be known."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    return fields["head_dim"] or (hidden // heads if hidden and heads else 0)


def base(read: ConfigReader, act: str = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Sizes, activation and epsilon, which every family of this kind has."""
    return {**sizes(read), "norm_eps": read(eps), "hidden_act": read.activation(act)}


def base_keys(model: ModelConfig, act: str = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    return {**size_keys(model), eps: model.norm_eps, act: activation_name(model)}


def refuse_uneven_heads(read: ConfigReader) -> None:
    """Some classes of transformers want this even where config.json gives head_dim."""
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads and hidden % heads:
        read.problems.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")


def from_hf(read: ConfigReader) -> dict[str, Any]:
    refuse_uneven_heads(read)
    return {
        **base(read),
        "qkv_bias": read("attention_bias"),
        "attention_output_bias": read("attention_bias"),
        "mlp_bias": read("mlp_bias"),
        **read.rope(),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **base_keys(model),
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_type="llama",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    prefix="model.",
    derived=DERIVED,
)
