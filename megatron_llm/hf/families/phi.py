"""Phi-1, Phi-1.5, Phi-2: attention and MLP side by side behind one norm, partial rotation, biases everywhere, the head too.

Phi-3 and later are other architectures. With `qk_layernorm` one norm serves all heads, before the rotation.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name, partial_rotary_factor, rope_keys
from megatron_llm.hf.family import Family, Row

SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "tie_word_embeddings", "initializer_range",
)  # fmt: skip

DEFAULTS: dict[str, Any] = {  # 0: derived from the others
    "num_key_value_heads": 0,
    "head_dim": 0,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
}

TABLE = (
    Row("model.embed_tokens.weight", "embedding.weight"),
    Row("model.layers.{i}.input_layernorm.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("model.layers.{i}.self_attn.q_proj.{kind}", "layers.{i}.attention.q.{kind}"),
    Row("model.layers.{i}.self_attn.k_proj.{kind}", "layers.{i}.attention.k.{kind}"),
    Row("model.layers.{i}.self_attn.v_proj.{kind}", "layers.{i}.attention.v.{kind}"),
    Row("model.layers.{i}.self_attn.q_layernorm.{kind}", "layers.{i}.attention.q_norm.{kind}"),
    Row("model.layers.{i}.self_attn.k_layernorm.{kind}", "layers.{i}.attention.k_norm.{kind}"),
    Row("model.layers.{i}.self_attn.dense.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("model.layers.{i}.mlp.fc1.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("model.layers.{i}.mlp.fc2.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("model.final_layernorm.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    same = {key: read(key) for key in SAME}
    derived = (same["hidden_size"] or 0) // (same["num_attention_heads"] or 1)
    head_dim = read("head_dim") or derived
    qk_norm = read("qk_layernorm")
    if qk_norm and head_dim != derived:
        read.problems.append(f"qk_layernorm with head_dim {head_dim} is not supported, only with {derived}")
    return {
        **same,
        "head_dim": head_dim,
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": read("layer_norm_eps"),
        "parallel_block": "one_norm",
        "qkv_bias": True,
        "attention_output_bias": True,
        "qk_norm": "head" if qk_norm else "none",
        "qk_norm_bias": qk_norm,
        "hidden_act": read.activation("hidden_act"),
        "mlp_gated": False,
        "mlp_bias": True,
        "head_bias": True,
        **read.rope(head_dim),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    usual = model.head_dim * model.num_attention_heads == model.hidden_size
    return {
        **{key: getattr(model, key) for key in SAME},
        **({} if usual else {"head_dim": model.head_dim}),
        "layer_norm_eps": model.norm_eps,
        "hidden_act": activation_name(model),
        "qk_layernorm": model.qk_norm != "none",
        "partial_rotary_factor": partial_rotary_factor(model),
        **rope_keys(model),
    }


FAMILY = Family(
    architectures=("PhiForCausalLM",),
    model_type="phi",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    prefix="model.",
    derived=(r"rotary_emb\.inv_freq",),
)
