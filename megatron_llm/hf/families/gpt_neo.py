"""GPT-Neo: 125M to 2.7B, and what was trained from them.

Scores are not scaled. Layers alternate between full attention and a window; `attention_types` says [[kinds], how often] and
`attention_layers`, where a folder has it, the same layer by layer (transformers believes it). A window counts the query itself:
`tril(ones) ^ tril(ones, -window_size)`.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader, activation_name
from megatron_llm.hf.family import Family, Row

SAME = (
    "vocab_size", "hidden_size", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "attention_types": [[["global", "local"], 12]],
    "attention_layers": None,
    "intermediate_size": None,
    "window_size": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}

TABLE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.wpe.weight", "position_embedding.weight"),
    Row("transformer.h.{i}.ln_1.{kind}", "layers.{i}.attention_norm.{kind}"),
    Row("transformer.h.{i}.attn.attention.q_proj.{kind}", "layers.{i}.attention.q.{kind}"),
    Row("transformer.h.{i}.attn.attention.k_proj.{kind}", "layers.{i}.attention.k.{kind}"),
    Row("transformer.h.{i}.attn.attention.v_proj.{kind}", "layers.{i}.attention.v.{kind}"),
    Row("transformer.h.{i}.attn.attention.out_proj.{kind}", "layers.{i}.attention.o.{kind}"),
    Row("transformer.h.{i}.ln_2.{kind}", "layers.{i}.mlp_norm.{kind}"),
    Row("transformer.h.{i}.mlp.c_fc.{kind}", "layers.{i}.mlp.up.{kind}"),
    Row("transformer.h.{i}.mlp.c_proj.{kind}", "layers.{i}.mlp.down.{kind}"),
    Row("transformer.ln_f.{kind}", "final_norm.{kind}"),
    Row("lm_head.{kind}", "head.{kind}"),
)

_KINDS = {"global": "full_attention", "local": "sliding_attention"}


def _windows(read: ConfigReader, layers: int) -> dict[str, Any]:
    """sliding_window and layer_types, as short as they can be said."""
    kinds = read("attention_layers")
    if kinds is None:
        kinds = [kind for group, times in read("attention_types") for _ in range(times) for kind in group]
    if len(kinds) != layers:
        read.problems.append(f"attention_types describes {len(kinds)} layers of {layers}")
    if unknown := [kind for kind in kinds if kind not in _KINDS]:
        read.problems.append(f"attention_types: {unknown[0]!r} is not supported, only {', '.join(_KINDS)}")
    if "local" not in kinds:
        return {"sliding_window": None, "layer_types": []}
    types = [_KINDS.get(kind, "full_attention") for kind in kinds]
    return {"sliding_window": read("window_size"), "layer_types": types if len(set(types)) > 1 else []}


def from_hf(read: ConfigReader) -> dict[str, Any]:
    same = {key: read(key) for key in SAME}
    layers = read("num_layers")
    return {
        **same,
        "num_hidden_layers": layers,
        "num_attention_heads": read("num_heads"),
        "intermediate_size": read("intermediate_size") or 4 * (same["hidden_size"] or 0),
        "norm": "layer_norm",
        "norm_bias": True,
        "norm_eps": read("layer_norm_epsilon"),
        "position_embedding": "learned",
        "attention_output_bias": True,
        "attention_scale": 1.0,
        **_windows(read, layers or 0),
        "hidden_act": read.activation("activation_function"),
        "mlp_gated": False,
        "mlp_bias": True,
    }


def to_hf(model: ModelConfig) -> dict[str, Any]:
    kinds = ["global" if model.window(layer) is None else "local" for layer in range(model.num_hidden_layers)]
    return {
        **{key: getattr(model, key) for key in SAME},
        "num_layers": model.num_hidden_layers,
        "num_heads": model.num_attention_heads,
        "intermediate_size": None if model.intermediate_size == 4 * model.hidden_size else model.intermediate_size,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": activation_name(model),
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        **({"window_size": model.sliding_window} if model.sliding_window else {}),
    }


FAMILY = Family(
    architectures=("GPTNeoForCausalLM",),
    model_type="gpt_neo",
    from_hf=from_hf,
    to_hf=to_hf,
    table=TABLE,
    defaults=DEFAULTS,
    aliases=ALIASES,
    prefix="transformer.",
    derived=(r"attn\.attention\.(?:masked_)?bias",),
)
