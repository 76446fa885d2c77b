"""Llama (1 to 3.x, and every model that says `LlamaForCausalLM`): config.json both ways, and the names of its tensors.

Two spellings of config.json are alive. Until transformers 4: `rope_theta` and `rope_scaling` at the top, `torch_dtype`.
Since 5: both inside `rope_parameters`, `dtype`. Both are read; new files get the old one, which every reader knows.

Query and key rows are in the half-rotation order that our RoPE uses too, so every tensor is copied as it is.
"""

from __future__ import annotations

from typing import Any

from megatron_llm.config import ModelConfig, RopeScalingConfig
from megatron_llm.hf.family import Family
from megatron_llm.ops.safetensors import TORCH_NAMES

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULTS: dict[str, Any] = {  # transformers' values of what a config.json may leave out; 0: derived from the others
    "num_key_value_heads": 0,
    "head_dim": 0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
}
_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields from a config.json. Raises ValueError with every reason why this engine cannot run it."""
    problems = [f"{key} is missing" for key in _REQUIRED if config.get(key) is None]
    for key, supported in _ONLY.items():
        if config.get(key) not in (None, supported):
            problems.append(f"{key} {config[key]!r} is not supported, only {supported!r}")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantized weights cannot be trained; take the unquantized model")
    fields = {key: config.get(key) for key in _REQUIRED}
    fields |= {key: default if config.get(key) is None else config[key] for key, default in _DEFAULTS.items()}
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(config, problems)
    if problems:
        raise ValueError("config.json of LlamaForCausalLM: " + "; ".join(problems))
    return fields


def _read_rope(config: dict[str, Any], problems: list[str]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, fields of RopeScalingConfig) from either spelling, with transformers' precedence; adds to `problems`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_scaling must be a mapping, got {rope!r}")
        rope = {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append(f"rope_parameters of their own for {', '.join(rope)} are not supported")
        return theta, None
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0")
    if kind == "default":
        return theta, None
    if kind not in _SCALING_KEYS:
        problems.append(f"rope type {kind!r} is not supported, only default, {', '.join(_SCALING_KEYS)}")
        return theta, None
    values = {key: rope.get(key) for key in _SCALING_KEYS[kind]}
    if kind == "llama3":
        # transformers lets the value beside rope_parameters win, and falls back to the model's whole context
        original = "original_max_position_embeddings"
        fallback = config.get("max_position_embeddings") or _DEFAULTS["max_position_embeddings"]
        values[original] = config.get(original) or values[original] or fallback
    problems += [f"rope scaling {kind} lacks {key}" for key, value in values.items() if value is None]
    return theta, {"rope_type": kind, **values}


def patch(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """`config` changed where it does not describe `model`, in its own spelling; all other fields are kept."""
    now = ModelConfig(**from_hf(config))
    scaling = _write_scaling(model.rope_scaling)
    patched = dict(config)
    patched |= {key: getattr(model, key) for key in (*_REQUIRED, *_DEFAULTS) if getattr(model, key) != getattr(now, key)}
    if (model.rope_theta, scaling) != (now.rope_theta, _write_scaling(now.rope_scaling)):
        if "rope_parameters" in config:
            patched["rope_parameters"] = {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta}
            patched.pop("rope_scaling", None)
        else:
            patched |= {"rope_theta": model.rope_theta, "rope_scaling": scaling}
        if "original_max_position_embeddings" in config and scaling:
            patched["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
    return patched


def _write_scaling(scaling: RopeScalingConfig | None) -> dict[str, Any] | None:
    """The scaling as config.json says it, without the fields that its type does not use."""
    if scaling is None:
        return None
    return {"rope_type": scaling.rope_type} | {key: getattr(scaling, key) for key in _SCALING_KEYS[scaling.rope_type]}


def to_hf(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model trained from scratch. `dtype` is safetensors' name, such as BF16."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(model, key) for key in (*_REQUIRED, *_DEFAULTS)},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": _write_scaling(model.rope_scaling),
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
    }


FAMILY = Family(
    architecture="LlamaForCausalLM",
    from_hf=from_hf,
    patch=patch,
    to_hf=to_hf,
    tensors=(
        ("embedding.weight", "model.embed_tokens.weight", "VH"),
        ("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight", "H"),
        ("layers.{i}.attention.q.weight", "model.layers.{i}.self_attn.q_proj.weight", "QH"),
        ("layers.{i}.attention.k.weight", "model.layers.{i}.self_attn.k_proj.weight", "KH"),
        ("layers.{i}.attention.v.weight", "model.layers.{i}.self_attn.v_proj.weight", "KH"),
        ("layers.{i}.attention.o.weight", "model.layers.{i}.self_attn.o_proj.weight", "HQ"),
        ("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", "H"),
        ("layers.{i}.mlp.gate.weight", "model.layers.{i}.mlp.gate_proj.weight", "FH"),
        ("layers.{i}.mlp.up.weight", "model.layers.{i}.mlp.up_proj.weight", "FH"),
        ("layers.{i}.mlp.down.weight", "model.layers.{i}.mlp.down_proj.weight", "HF"),
        ("final_norm.weight", "model.norm.weight", "H"),
        ("head.weight", "lm_head.weight", "VH"),
    ),
    derived=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
