"""Falcon: 7B, 40B, 180B, 11B, and the RefinedWeb models (falcon-rw-1b, -7b).

Four settings of one class, told apart by flags that partly overrule each other (`FalconDecoderLayer`, `FalconAttention`):

    falcon-rw         parallel_attn false, ALiBi, biases; attention before MLP, each with its norm
    falcon-7b         parallel_attn, multi_query; side by side behind one norm
    falcon-40b, 180b  new_decoder_architecture; side by side, a norm each, num_kv_heads
    falcon-11B        new_decoder_architecture with num_ln_in_parallel_attn 1; one norm, num_kv_heads

Its ALiBi is computed in bfloat16 and multiplied by the scale of the scores. transformers 5 adds it twice with eager attention;
its `sdpa` is what the models were trained with.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name, rope_keys
from megatron_llm.hf.family import Family, Row, grouped_qkv

SAME = (
    "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "tie_word_embeddings",
    "initializer_range",
)  # fmt: skip

FLAGS = {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False}

DEFAULTS: dict[str, Any] = {
    **FLAGS,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "ffn_hidden_size": None,
    "activation": "gelu",
    "tie_word_embeddings": True,
}


def _with(*blocks: str) -> Any:
    return lambda model: model.parallel_block in blocks


TABLE = (
    Row("transformer.word_embeddings.weight", "embedding.weight"),
    Row("transformer.h.{i}.input_layernorm.{kind}", "layers.{i}.attention_norm.{kind}", when=_with("none", "one_norm")),
    Row("transformer.h.{i}.ln_attn.{kind}", "layers.{i}.attention_norm.{kind}", when=_with("two_norms")),
    Row("transformer.h.{i}.self_attention.query_key_value.{kind}", "layers.{i}.attention.{part}.{kind}", grouped_qkv),
    Row("transformer.h.{i}.self_attention.dense.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("transformer.h.{i}.post_attention_layernorm.{kind}", "layers.{i}.mlp_norm.{kind}", when=_with("none")),
    Row("transformer.h.{i}.ln_mlp.{kind}", "layers.{i}.mlp_norm.{kind}", when=_with("two_norms")),
    Row("transformer.h.{i}.mlp.dense_h_to_4h.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("transformer.h.{i}.mlp.dense_4h_to_h.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("transformer.ln_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)


def _block(read: ConfigReader, flags: dict[str, bool]) -> str:
    """ModelConfig.parallel_block."""
    norms = read.config.get("num_ln_in_parallel_attn")
    if flags["new_decoder_architecture"]:
        read.only("parallel_attn", True)
        read.only("num_ln_in_parallel_attn", 1, 2)
        return "one_norm" if norms == 1 else "two_norms"
    if not flags["parallel_attn"]:
        return "none"
    read.only("num_ln_in_parallel_attn", 1)
    return "one_norm"


def _key_heads(read: ConfigReader, flags: dict[str, bool], heads: int) -> int:
    """num_kv_heads where it counts."""
    if flags["new_decoder_architecture"]:
        return read.config.get("num_kv_heads") or heads
    if flags["multi_query"]:
        return 1
    if heads:
        read.only("num_kv_heads", heads)
    return heads


def from_hf(read: ConfigReader) -> dict[str, Any]:
    same = {key: read(key) for key in SAME}
    flags = {key: bool(read.config.get(key, default)) for key, default in FLAGS.items()}  # null is false
    hidden = read.config.get("n_embed") or read("hidden_size")
    positions = {"position_embedding": "alibi", "alibi_scaled": True} if flags["alibi"] else read.rope()
    return {
        **same,
        "hidden_size": hidden,
        "intermediate_size": read("ffn_hidden_size") or 4 * (hidden or 0),
        "num_key_value_heads": _key_heads(read, flags, same["num_attention_heads"] or 0),
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": read("layer_norm_epsilon"),
        "parallel_block": _block(read, flags),
        "qkv_bias": flags["bias"],
        "attention_output_bias": flags["bias"],
        "hidden_act": read.activation("activation"),
        "mlp_gated": False,
        "mlp_bias": flags["bias"],
        **positions,
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    new = model.parallel_block == "two_norms" or (model.parallel_block == "one_norm" and 1 < key_heads < heads)
    alibi = model.position_embedding == "alibi"
    return {
        **{key: getattr(model, key) for key in SAME},
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "new_decoder_architecture": new,
        "num_kv_heads": key_heads if new else heads,
        "multi_query": new or key_heads == 1,
        "parallel_attn": model.parallel_block != "none",
        "num_ln_in_parallel_attn": (2 if model.parallel_block == "two_norms" else 1) if new else None,
        "bias": model.qkv_bias,
        "layer_norm_epsilon": model.norm_eps,
        "activation": activation_name(model),
        "alibi": alibi,
        **({} if alibi else rope_keys(model)),
    }


FAMILY = Family(
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    prefix="transformer.",
    derived=(r"(?:maybe_rotary|rotary|rotary_emb)\.inv_freq",),
)
