"""Llama's config.json, both ways and in both spellings, against transformers' own reading of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import LlamaConfig

from megatron_llm.config import ModelConfig
from megatron_llm.hf.families import find_family
from tests.hf.folders import LLAMA3

LLAMA = find_family("LlamaForCausalLM")
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "least": SIZES,
    "llama 1": {**SIZES, "rms_norm_eps": 1e-6, "rope_scaling": None, "torch_dtype": "float16", "pretraining_tp": 1},
    "old theta": {**SIZES, "num_key_value_heads": 2, "rope_theta": 5e5, "tie_word_embeddings": True, "head_dim": None},
    "old linear": {**SIZES, "rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 99},
    "old llama3": {**SIZES, "rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 1024},
    "new default": {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "dtype": "bfloat16", "head_dim": 16},
    "new linear": {**SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}},
    "new llama3": {**SIZES, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "max_position_embeddings": 1024},
    "llama3 without original length": {
        **SIZES,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "max_position_embeddings": 4096,
    },
    "biases": {**SIZES, "attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1},
    "old dynamic": {**SIZES, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 512},
    "new yarn": {
        **SIZES,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
        "max_position_embeddings": 256,
    },
    "old longrope": {
        **SIZES,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "attention_factor": 1.5,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
    },
    "both spellings": {
        **SIZES,
        "rope_theta": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def _assert_like_transformers(model: ModelConfig, config: dict[str, Any]) -> None:
    """`model` is what transformers makes of `config`."""
    theirs = LlamaConfig.from_dict(copy.deepcopy(config))  # it changes what it is given
    assert model.norm_eps == theirs.rms_norm_eps
    assert (model.qkv_bias, model.attention_output_bias) == (theirs.attention_bias, theirs.attention_bias)
    for name in (
        *SIZES,
        "num_key_value_heads",
        "head_dim",
        "mlp_bias",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
    ):
        assert getattr(model, name) == getattr(theirs, name), name
    rope = dict(theirs.rope_parameters)
    assert model.rope_theta == rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    rope.pop("type", None)
    if kind == "default":
        assert model.rope_scaling is None
    else:
        assert model.rope_scaling is not None and model.rope_scaling.rope_type == kind
        assert {key: getattr(model.rope_scaling, key) for key in rope} == rope


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_are_those_that_transformers_reads(name: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIGS[name]}
    _assert_like_transformers(ModelConfig(**LLAMA.fields(config)), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_config_json_means_the_model(name: str) -> None:
    model = ModelConfig(**LLAMA.fields(CONFIGS[name]))
    written = LLAMA.config(model)
    _assert_like_transformers(model, written)
    assert ModelConfig(**LLAMA.fields(written)) == model


@pytest.mark.parametrize("name", CONFIGS)
def test_patching_with_the_same_model_changes_nothing(name: str) -> None:
    assert LLAMA.patch(CONFIGS[name], ModelConfig(**LLAMA.fields(CONFIGS[name]))) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 16.0}])
def test_patching_says_what_was_changed_and_keeps_the_rest(name: str, scaling: dict[str, Any] | None) -> None:
    config = {"own": "field", "original_max_position_embeddings": 32, **CONFIGS[name]}
    fields = {**LLAMA.fields(config), "rope_theta": 123456.0, "rope_scaling": scaling, "max_position_embeddings": 7777}
    patched = LLAMA.patch(config, ModelConfig(**fields))
    assert ModelConfig(**LLAMA.fields(patched)) == ModelConfig(**fields)
    assert patched["own"] == "field" and patched["max_position_embeddings"] == 7777
    touched = {"rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "original_max_position_embeddings"}
    assert {key: value for key, value in patched.items() if key not in touched} == {
        key: value for key, value in config.items() if key not in touched
    }
    assert ("rope_parameters" in patched) == ("rope_parameters" in config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope lacks short_factor"),
        ({"rope_scaling": {"type": "linear"}}, "linear lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "llama3 lacks high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_scaling": [2.0]}, "must be a mapping"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLAMA.fields({**SIZES, **change})


def test_all_reasons_come_in_one_message() -> None:
    with pytest.raises(ValueError, match="vocab_size is missing; hidden_act.*'ntk'"):
        LLAMA.fields({**SIZES, "vocab_size": None, "hidden_act": "mish", "rope_scaling": {"type": "ntk"}})


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="T5ForCausalLM is not supported; supported: .*LlamaForCausalLM"):
        find_family("T5ForCausalLM")
