"""Cases of Llama and the families that have its names of tensors. In pairs where possible: what is on in one is off in another.

Folders of the hub are mostly older than transformers 5; `old_spelling` says the same as they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.families.cases import Case

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {"num_key_value_heads": 6, "head_dim": None}
WIDE = {"hidden_size": 96, "head_dim": None}
"""For classes that know no head_dim: 16 channels a head too."""

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
YARN_FULL = {**YARN, "beta_fast": 1.0, "beta_slow": 0.2, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4}
"""A small theta, so that the ramp of so few channels lies among them: from 1.6 to 4.4 of 8, from 1 to 5 if truncated."""
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.5],
}  # fmt: skip
LONGROPE_OF_SIX = {**LONGROPE, "short_factor": LONGROPE["short_factor"][:6], "long_factor": LONGROPE["long_factor"][:6]}


def old_spelling(config: dict[str, Any], kind: str = "rope_type") -> dict[str, Any]:
    """A config.json of transformers 5 in the spelling of 4; `kind`: how it names the type of scaling."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    scaling = {kind: rope.pop("rope_type"), **rope}
    config["rope_scaling"] = None if scaling[kind] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype", "float32")
    return config


def _rewritten(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """A respelling of config.json alone."""

    def respell(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(change(json.loads(file.read_text())), indent=2))

    return respell


def _without(*keys: str, kind: str = "rope_type", **fields: Any) -> Callable[[Path], None]:
    """The old spelling, without these keys of newer ones, with the keys that stood for them."""
    return _rewritten(
        lambda config: {key: value for key, value in old_spelling(config, kind).items() if key not in keys} | fields
    )


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A respelling of the weights alone."""

    def respell(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return respell


def _all(*respellings: Callable[[Path], None]) -> Callable[[Path], None]:
    def respell(folder: Path) -> None:
        for one in respellings:
            one(folder)

    return respell


def _as_bin(folder: Path) -> None:
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


_with_frequencies = _tensors(
    lambda tensors: (
        tensors
        | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8, dtype=torch.float32) for layer in range(3)}
    )
)
_bare_body = _tensors(lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
_head_twice = _tensors(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})


def _case(architecture: str, *settings: dict[str, Any], **options: Any) -> Case:
    """A case of SIZES changed by the settings in turn; a setting of None is left to the class."""
    config: dict[str, Any] = {**SIZES}
    for setting in settings:
        config |= setting
    return Case(architecture, {key: value for key, value in config.items() if value is not None or key in _NULLS}, **options)


_NULLS = ("pad_token_id", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def _llama(*settings: dict[str, Any], **options: Any) -> Case:
    return _case("LlamaForCausalLM", *settings, **options)


_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5e5}

LLAMA = {
    "llama": _llama({"rope_parameters": _DEFAULT_ROPE}),
    "llama-biases": _llama(MHA, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama-linear": _llama({"rope_parameters": LINEAR}, layouts=False),
    "llama-dynamic": _llama({"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "llama-llama3": _llama({"rope_parameters": LLAMA3}, layouts=False),
    "llama-yarn": _llama({"rope_parameters": YARN}, layouts=False),
    "llama-yarn-full": _llama({"rope_parameters": YARN_FULL}, layouts=False),
    "llama-longrope": _llama({"rope_parameters": LONGROPE}),
    "llama-hub": _llama(
        {"rope_parameters": LINEAR, "rms_norm_eps": 1e-5, "initializer_range": 0.01},
        respell=_all(_without(kind="type", pretraining_tp=1), _with_frequencies),
        layouts=False,
    ),
    "llama-bin": _llama(MHA, respell=_all(_without("head_dim"), _as_bin), dtype=torch.float16, layouts=False),
    "llama-bare": _llama({"tie_word_embeddings": True}, respell=_bare_body, layouts=False),
    "llama-head-twice": _llama({"tie_word_embeddings": True}, respell=_head_twice, layouts=False),
}

MISTRAL = {
    "mistral": _case("MistralForCausalLM", {"sliding_window": 4, "rope_parameters": _DEFAULT_ROPE}),
    "mistral-full": _case("MistralForCausalLM", MHA, {"sliding_window": None, "tie_word_embeddings": True}, layouts=False),
    "mistral-hub": _case("MistralForCausalLM", {"sliding_window": 6}, respell=_without("head_dim", head_dim=16), layouts=False),
}

QWEN = {
    "qwen2": _case("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-windows": _case("Qwen2ForCausalLM", MHA, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-hub": _case(
        "Qwen2ForCausalLM",
        {"rope_parameters": YARN},
        respell=_without("layer_types", kind="type", use_sliding_window=False, sliding_window=131072, max_window_layers=3),
        layouts=False,
    ),
    "qwen3": _case("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3-windows": _case(
        "Qwen3ForCausalLM",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}

GEMMA = {
    "gemma": _case("GemmaForCausalLM", {"rms_norm_eps": 1e-2}),
    "gemma-untied": _case(
        "GemmaForCausalLM",
        {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu", "num_key_value_heads": 6},
        layouts=False,
    ),
    "gemma-hub": _case("GemmaForCausalLM", respell=_without(hidden_act="gelu", hidden_activation=None), layouts=False),
    "gemma2": _case(
        "Gemma2ForCausalLM",
        {"sliding_window": 4, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "rms_norm_eps": 1e-2},
    ),
    "gemma2-plain": _case(
        "Gemma2ForCausalLM",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * 3,
            "query_pre_attn_scalar": 16,
            "hidden_activation": "gelu",
        },
        layouts=False,
    ),
    "gemma3": _case(
        "Gemma3ForCausalLM",
        {
            "rms_norm_eps": 1e-2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "gemma3-hub": _case(
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 20.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        respell=_without("layer_types"),
        layouts=False,
    ),
}

PHI = {
    "phi3": _case("Phi3ForCausalLM", {"sliding_window": 4}),
    "phi3-longrope": _case(
        "Phi3ForCausalLM",
        WIDE,
        {
            "rope_parameters": {**LONGROPE_OF_SIX, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
    ),
    "phi3-hub": _case(
        "Phi3ForCausalLM",
        WIDE,
        {"num_key_value_heads": 6, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 131072},
        respell=_without(kind="type", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}),
        layouts=False,
    ),
}

OLMO = {
    "olmo": _case("OlmoForCausalLM", {"clip_qkv": 0.5}),
    "olmo-biases": _case("OlmoForCausalLM", MHA, {"attention_bias": True, "tie_word_embeddings": True}, layouts=False),
    "olmo2": _case("Olmo2ForCausalLM", {"rms_norm_eps": 1e-3}),
    "olmo2-biases": _case(
        "Olmo2ForCausalLM", MHA, {"attention_bias": True, "tie_word_embeddings": True}, respell=_without(), layouts=False
    ),
}

GLM = {
    "glm": _case("GlmForCausalLM", {"rms_norm_eps": 1e-3}),
    "glm-plain": _case(
        "GlmForCausalLM",
        {"attention_bias": False, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"partial_rotary_factor": 0.25, "num_key_value_heads": 6},
        layouts=False,
    ),
    "glm4": _case("Glm4ForCausalLM"),
    "glm4-plain": _case(
        "Glm4ForCausalLM",
        {"attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5},
        respell=_without(),
        layouts=False,
    ),
}

SMOLLM = {
    "smollm3": _case(
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0, 1], "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3-windows": _case(
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4},
        {"tie_word_embeddings": False},
    ),
    "smollm3-hub": _case(
        "SmolLM3ForCausalLM",
        WIDE,
        {"num_hidden_layers": 4, "rope_parameters": YARN},
        respell=_without("layer_types", "no_rope_layers", no_rope_layer_interval=4),
        layouts=False,
    ),
}

COHERE = {
    "cohere": _case("CohereForCausalLM", {"layer_norm_eps": 1e-3}),
    "cohere-norms": _case(
        "CohereForCausalLM",
        {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False, "logit_scale": 0.3},
    ),
    "cohere-hub": _case("CohereForCausalLM", WIDE, {"rope_parameters": DYNAMIC}, respell=_without(kind="type"), layouts=False),
}

STABLELM = {
    "stablelm": _case("StableLmForCausalLM", WIDE, {"layer_norm_eps": 1e-3}),
    "stablelm-parallel": _case(
        "StableLmForCausalLM",
        WIDE,
        {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
        {"tie_word_embeddings": True},
    ),
    "stablelm-norms": _case("StableLmForCausalLM", WIDE, {"qk_layernorm": True}, respell=_without(), layouts=False),
}

STARCODER = {
    "starcoder2": _case("Starcoder2ForCausalLM", {"sliding_window": 4, "norm_epsilon": 1e-3}),
    "starcoder2-plain": _case(
        "Starcoder2ForCausalLM",
        WIDE,
        {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
        respell=_without(),
        layouts=False,
    ),
}

GRANITE = {
    "granite": _case(
        "GraniteForCausalLM",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.05, "logits_scaling": 6.0},
    ),
    "granite-biases": _case(
        "GraniteForCausalLM", MHA, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, layouts=False
    ),
}

CASES: dict[str, Case] = {
    **LLAMA, **MISTRAL, **QWEN, **GEMMA, **PHI, **OLMO, **GLM, **SMOLLM, **COHERE, **STABLELM, **STARCODER, **GRANITE,
}  # fmt: skip
