"""BLOOM and BLOOMZ: ALiBi, a norm behind the embedding, queries, keys and values head by head in one matrix.

The published folders are of the bare body: no `transformer.` before the names, some with the architecture `BloomModel`; the head
is the embedding. Their config.json says `n_embed` or `hidden_size`; the former wins.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.family import Family, Row, grouped_qkv

SAME = ("vocab_size", "tie_word_embeddings", "initializer_range")
ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

DEFAULTS: dict[str, Any] = {
    "seq_length": 0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}

TABLE = (
    Row("transformer.word_embeddings.weight", "embedding.weight"),
    Row("transformer.word_embeddings_layernorm.{kind}", "embedding_norm.{kind}"),
    Row("transformer.h.{i}.input_layernorm.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.h.{i}.self_attention.query_key_value.{kind}", "layers.{i}.attention.{part}.{kind}", grouped_qkv),
    Row("transformer.h.{i}.self_attention.dense.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("transformer.h.{i}.post_attention_layernorm.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("transformer.h.{i}.mlp.dense_h_to_4h.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("transformer.h.{i}.mlp.dense_4h_to_h.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("transformer.ln_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    read.only("apply_residual_connection_post_layernorm", False)
    if read.config.get("slow_but_exact") and (read.config.get("pretraining_tp") or 1) > 1:
        read.problems.append("slow_but_exact is not supported with pretraining_tp above 1: transformers then leaves out biases")
    hidden = read.config.get("n_embed") or read("hidden_size")
    return {
        **{key: read(key) for key in SAME},
        "hidden_size": hidden,
        "intermediate_size": 4 * (hidden or 0),
        "num_hidden_layers": read("n_layer"),
        "num_attention_heads": read("n_head"),
        "max_position_embeddings": read("seq_length"),
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": read("layer_norm_epsilon"),
        "embedding_norm": True,
        "position_embedding": "alibi",
        "qkv_bias": True,
        "attention_output_bias": True,
        "hidden_act": "gelu_tanh",
        "mlp_gated": False,
        "mlp_bias": True,
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """Without seq_length: transformers does not know it, and a folder that lacks it should go back without."""
    return {
        **{key: getattr(model, key) for key in SAME},
        "hidden_size": model.hidden_size,
        "n_layer": model.num_hidden_layers,
        "n_head": model.num_attention_heads,
        "layer_norm_epsilon": model.norm_eps,
    }


FAMILY = Family(
    architectures=("BloomForCausalLM", "BloomModel"),
    model_type="bloom",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    aliases=ALIASES,
    prefix="transformer.",
)
