"""GPT-2 and what was made like it: DistilGPT-2, DialoGPT, Cerebras-GPT, CodeParrot, ...

Matrices are stored [inputs, outputs] (transformers' `Conv1D`), queries, keys and values in one. Old folders name their tensors
without `transformer.` and hold the causal mask of every layer as a buffer.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name
from megatron_llm.hf.family import Family, Row, concatenated_qkv

SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""Fields of ModelConfig -> keys of config.json; transformers reads either name (`attribute_map`). Relatives say the same."""

SAME = ("vocab_size", "tie_word_embeddings", "initializer_range")

MLP_DEFAULTS: dict[str, Any] = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}

DEFAULTS: dict[str, Any] = {
    **MLP_DEFAULTS,
    "n_positions": 1024,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}

TABLE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.wpe.weight", "position_embedding.weight"),
    Row("transformer.h.{i}.ln_1.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.h.{i}.attn.c_attn.{kind}", "layers.{i}.attention.{part}.{kind}", concatenated_qkv, transposed=True),
    Row("transformer.h.{i}.attn.c_proj.{kind}", "layers.{i}.attention.o.{kind}", transposed=True),
    Row("transformer.h.{i}.ln_2.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("transformer.h.{i}.mlp.c_fc.{kind}", "layers.{i}.mlp.up.{kind}", transposed=True),
    Row("transformer.h.{i}.mlp.c_proj.{kind}", "layers.{i}.mlp.down.{kind}", transposed=True),
    Row("transformer.ln_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)

DERIVED = (r"attn\.(?:masked_)?bias",)


def shape(read: ConfigReader) -> dict[str, Any]:
    """What GPT-2 and its relatives (GPT-J, CodeGen, GPTBigCode) say with the same keys."""
    sizes = {field: read(key) for field, key in SIZES.items()}
    return {
        **sizes,
        **{key: read(key) for key in SAME},
        "intermediate_size": read("n_inner") or 4 * (sizes["hidden_size"] or 0),
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": read("layer_norm_epsilon"),
        "hidden_act": read.activation("activation_function"),
        "mlp_gated": False,
        "mlp_bias": True,
    }


def shape_keys(model: ModelConfig) -> dict[str, Any]:
    """The other way."""
    return {
        **{key: getattr(model, field) for field, key in SIZES.items()},
        **{key: getattr(model, key) for key in SAME},
        "n_inner": None if model.intermediate_size == 4 * model.hidden_size else model.intermediate_size,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": activation_name(model),
    }


def from_hf(read: ConfigReader) -> dict[str, Any]:
    read.only("add_cross_attention", False)
    return {
        **shape(read),
        "position_embedding": "learned",
        "qkv_bias": True,
        "attention_output_bias": True,
        "attention_scale": None if read("scale_attn_weights") else 1.0,
        "attention_scale_by_layer": read("scale_attn_by_inverse_layer_idx"),
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **shape_keys(model),
        "scale_attn_weights": model.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": model.attention_scale_by_layer,
    }


FAMILY = Family(
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    aliases=SIZES,
    prefix="transformer.",
    derived=DERIVED,
)
