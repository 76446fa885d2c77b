"""GPTBigCode: SantaCoder, StarCoder, StarCoderBase, TinyStarCoder.

GPT-2 with `nn.Linear` for `Conv1D` and, with `multi_query`, one key and one value for all heads. `c_attn` then holds all
queries, the key, the value; without, query, key, value of one head after the other: `grouped_qkv` either way. What config.json
says about float32 in the softmax changes rounding alone, and not even that in transformers 5.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.families.gpt2 import MLP_DEFAULTS, SIZES, shape, shape_keys
from megatron_llm.hf.family import Family, Row, grouped_qkv

DEFAULTS: dict[str, Any] = {
    **MLP_DEFAULTS,
    "activation_function": "gelu_pytorch_tanh",
    "n_positions": 1024,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "multi_query": True,
}

TABLE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.wpe.weight", "position_embedding.weight"),
    Row("transformer.h.{i}.ln_1.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.h.{i}.attn.c_attn.{kind}", "layers.{i}.attention.{part}.{kind}", grouped_qkv),
    Row("transformer.h.{i}.attn.c_proj.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("transformer.h.{i}.ln_2.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("transformer.h.{i}.mlp.c_fc.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("transformer.h.{i}.mlp.c_proj.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("transformer.ln_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)


def from_hf(read: ConfigReader) -> dict[str, Any]:
    read.only("add_cross_attention", False)
    fields = shape(read)
    return {
        **fields,
        "num_key_value_heads": 1 if read("multi_query") else fields["num_attention_heads"],
        "position_embedding": "learned",
        "qkv_bias": True,
        "attention_output_bias": True,
        "attention_scale": None if read("scale_attn_weights") else 1.0,
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    return {
        **shape_keys(model),
        "multi_query": model.num_key_value_heads == 1,
        "scale_attn_weights": model.attention_scale is None,
    }


FAMILY = Family(
    architectures=("GPTBigCodeForCausalLM",),
    model_type="gpt_bigcode",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    aliases=SIZES,
    prefix="transformer.",
    derived=(r"attn\.(?:masked_)?bias", r"transformer\.bias"),
)
