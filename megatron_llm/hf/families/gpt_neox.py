"""GPT-NeoX: GPT-NeoX-20B, Pythia, Dolly-v2, StableLM-alpha, RedPajama-INCITE, ...

Queries, keys and values lie head by head in one matrix. config.json had names of its own for rotary settings before
transformers 5: `rotary_pct` and `rotary_emb_base`; a `rope_theta` beside them was never read. The head is `embed_out` in every
folder, whatever transformers calls it in memory.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name, partial_rotary_factor, rope_keys
from megatron_llm.hf.family import Family, Row, grouped_qkv

SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "tie_word_embeddings", "initializer_range",
)  # fmt: skip

DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
}

ROPE_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}

TABLE = (
    Row("gpt_neox.embed_in.weight", "embedding.weight"),
    Row("gpt_neox.layers.{i}.input_layernorm.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("gpt_neox.layers.{i}.attention.query_key_value.{kind}", "layers.{i}.attention.{part}.{kind}", grouped_qkv),
    Row("gpt_neox.layers.{i}.attention.dense.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("gpt_neox.layers.{i}.post_attention_layernorm.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("gpt_neox.layers.{i}.mlp.dense_h_to_4h.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("gpt_neox.layers.{i}.mlp.dense_4h_to_h.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("gpt_neox.final_layer_norm.{kind}", "final_norm.{kind}"),
    Row("embed_out.{kind}", "head.{kind}"),
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    same = {key: read(key) for key in SAME}
    head_dim = (same["hidden_size"] or 0) // (same["num_attention_heads"] or 1)
    read.only("head_dim", head_dim)  # transformers would take it for the rotation alone
    bias = read("attention_bias")
    return {
        **same,
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": read("layer_norm_eps"),
        "parallel_block": "two_norms" if read("use_parallel_residual") else "none",
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "hidden_act": read.activation("hidden_act"),
        "mlp_gated": False,
        "mlp_bias": True,
        **read.rope(head_dim),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    rope = {**rope_keys(model), "partial_rotary_factor": partial_rotary_factor(model)}
    return {
        **{key: getattr(model, key) for key in SAME},
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel_block != "none",
        "attention_bias": model.qkv_bias,
        "hidden_act": activation_name(model),
        **{ROPE_NAMES.get(key, key): value for key, value in rope.items()},
    }


FAMILY = Family(
    architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    rope_names=ROPE_NAMES,
    prefix="gpt_neox.",
    derived=(r"attention\.(?:masked_)?bias", r"rotary_emb\.inv_freq"),
)
