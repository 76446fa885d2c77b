"""MPT: 7B, 7B-StoryWriter, 30B and what was trained from them. Nothing has a bias, norms included.

MosaicML's own code (the folder's `auto_map`) has many options, of which transformers' class knows the published setting alone
and takes no notice of the others. Those that change what is computed are refused here. One is read although transformers
overlooks it: `alibi_bias_max` (16 in StoryWriter), which is what the model was trained with.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.family import Family, Row, concatenated_qkv

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
    "norm_eps": "layer_norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
"""Fields of ModelConfig -> keys of config.json."""

ALIASES = {"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}

DEFAULTS: dict[str, Any] = {
    "max_seq_len": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "attn_config": {},
}

ATTENTION_DEFAULTS: dict[str, Any] = {"clip_qkv": None, "softmax_scale": None, "alibi_bias_max": 8}

TABLE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.blocks.{i}.norm_1.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.blocks.{i}.attn.Wqkv.{kind}", "layers.{i}.attention.{part}.{kind}", concatenated_qkv),
    Row("transformer.blocks.{i}.attn.out_proj.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("transformer.blocks.{i}.norm_2.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("transformer.blocks.{i}.ffn.up_proj.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("transformer.blocks.{i}.ffn.down_proj.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("transformer.norm_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    attention = ConfigReader(read("attn_config"), ATTENTION_DEFAULTS)
    fields = {
        **{field: read(key) for field, key in SIZES.items()},
        "norm": "layer_norm",
        "position_embedding": "alibi",
        "alibi_bias_max": attention("alibi_bias_max"),
        "attention_scale": attention("softmax_scale"),
        "clip_qkv": attention("clip_qkv") or None,  # 0 does not clip either
        "hidden_act": "gelu",
        "mlp_gated": False,
    }
    _refuse(read, attention)
    return {**fields, "intermediate_size": 4 * (fields["hidden_size"] or 0)}


def _refuse(read: ConfigReader, attention: ConfigReader) -> None:
    """Options that change what MosaicML's code computes. `learned_pos_emb` is none of them: ALiBi turns it off."""
    read.only("no_bias", True)
    read.only("expansion_ratio", 4)
    read.only("norm_type", "low_precision_layernorm", "layernorm")
    read.only("embedding_fraction", 1, 1.0)
    for key in ("logit_scale", "final_logit_softcapping", "block_overrides"):
        if read.config.get(key):
            read.problems.append(f"{key} {read.config[key]!r} is not supported")
    feedforward = ConfigReader(read.config.get("ffn_config") or {})
    feedforward.only("ffn_type", "mptmlp")
    feedforward.only("ffn_act_fn", {"name": "gelu", "approximate": "none"}, {"name": "gelu"})
    attention.only("alibi", True)
    attention.only("attn_type", "multihead_attention")
    attention.only("sliding_window_size", -1)
    for key in ("prefix_lm", "qk_ln", "qk_gn", "rope", "attn_logit_softcapping"):
        if attention.config.get(key):
            attention.problems.append(f"{key} {attention.config[key]!r} is not supported")
    read.problems += [f"attn_config.{problem}" for problem in attention.problems]
    read.problems += [f"ffn_config.{problem}" for problem in feedforward.problems]


def to_hf(model: ModelConfig) -> dict[str, Any]:
    slope = model.alibi_bias_max
    return {
        **{key: getattr(model, field) for field, key in SIZES.items()},
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(slope) if slope == int(slope) else slope,
            "clip_qkv": model.clip_qkv,
            "softmax_scale": model.attention_scale,
        },
    }


FAMILY = Family(
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    model_type="mpt",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    aliases=ALIASES,
    prefix="transformer.",
)
