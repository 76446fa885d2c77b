"""OPT and Galactica: learned positions whose table begins two rows late, ReLU or GELU.

`do_layer_norm_before` false (OPT-350M's order) puts norms behind the residual sums and leaves out the final one. OPT-350M
itself also embeds into fewer channels than it computes with (`word_embed_proj_dim`), which is refused. Norms have a fixed
epsilon. Bare bodies and old folders name their tensors `decoder.` instead of `model.decoder.`.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name
from megatron_llm.hf.family import Family, Row

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "init_std",
}
"""Fields of ModelConfig -> keys of config.json."""

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "init_std": 0.02,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}

TABLE = (
    Row("model.decoder.embed_tokens.weight", "embedding.weight"),
    Row("model.decoder.embed_positions.weight", "position_embedding.weight"),
    Row("model.decoder.layers.{i}.self_attn_layer_norm.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("model.decoder.layers.{i}.self_attn.q_proj.{kind}", "layers.{i}.attention.q.{kind}"),
    Row("model.decoder.layers.{i}.self_attn.k_proj.{kind}", "layers.{i}.attention.k.{kind}"),
    Row("model.decoder.layers.{i}.self_attn.v_proj.{kind}", "layers.{i}.attention.v.{kind}"),
    Row("model.decoder.layers.{i}.self_attn.out_proj.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("model.decoder.layers.{i}.self_attn_layer_norm.{kind}", "layers.{i}.attention_post_norm.{kind}"),
    Row("model.decoder.layers.{i}.final_layer_norm.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("model.decoder.layers.{i}.fc1.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("model.decoder.layers.{i}.fc2.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("model.decoder.layers.{i}.final_layer_norm.{kind}", "layers.{i}.mlp_post_norm.{kind}"),
    Row("model.decoder.final_layer_norm.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    sizes = {field: read(key) for field, key in SIZES.items()}
    read.only("word_embed_proj_dim", sizes["hidden_size"])
    before, bias, affine = read("do_layer_norm_before"), read("enable_bias"), read("layer_norm_elementwise_affine")
    return {
        **sizes,
        "norm": "layer_norm",
        "norm_eps": 1e-5,
        "norm_weight": affine,
        "norm_bias": affine,
        "norm_placement": "input" if before else "residual",
        "final_norm": before and not read("_remove_final_layer_norm"),
        "position_embedding": "learned",
        "position_offset": 2,
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "hidden_act": read.activation("activation_function"),
        "mlp_gated": False,
        "mlp_bias": bias,
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    before = model.norm_placement == "input"
    return {
        **{key: getattr(model, field) for field, key in SIZES.items()},
        "word_embed_proj_dim": model.hidden_size,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not model.final_norm,
        "layer_norm_elementwise_affine": model.norm_weight,
        "enable_bias": model.qkv_bias,
        "activation_function": activation_name(model),
    }


FAMILY = Family(
    architectures=("OPTForCausalLM",),
    model_type="opt",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    prefix="model.",
)
