"""config.json of the families with Llama's names, both ways and in both spellings, against transformers' own reading of it."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from megatron_llm.config import ModelConfig
from megatron_llm.hf.families import describe, find_family
from megatron_llm.hf.reader import HFFolder
from tests.families.cases import Case, make_folder, make_model
from tests.families.llama_like import CASES, LINEAR, LONGROPE, SIZES, YARN, old_spelling

ARCHITECTURES = sorted({case.architecture for case in CASES.values()})
SPELLINGS = {"new": dict, "old": old_spelling, "old with type": lambda config: old_spelling(config, "type")}
DOCUMENT = torch.arange(30)[None] % 131
each_case = pytest.mark.parametrize("name", CASES)
each_spelling = pytest.mark.parametrize("spelling", SPELLINGS)


def _written(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers makes of another one."""
    theirs = getattr(transformers, architecture).config_class(**copy.deepcopy(config))
    return {**json.loads(theirs.to_json_string()), "architectures": [architecture], "dtype": "float32"}


def _config(name: str, spelling: str = "new") -> dict[str, Any]:
    case = CASES[name]
    config = SPELLINGS[spelling](_written(case.architecture, case.config))
    if "gemma3" in name and spelling == "old with type":  # transformers 5 does not read that
        config = old_spelling(_written(case.architecture, case.config))
    return config


def _model(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**find_family(config["architectures"][0]).fields(config))


@cache
def _oracle(name: str) -> Any:
    return make_model(CASES[name])


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(DOCUMENT).logits
    return logits


@each_spelling
@each_case
def test_sizes_and_numbers_are_those_of_the_model_that_transformers_makes(name: str, spelling: str) -> None:
    model, oracle = _model(_config(name, spelling)), _oracle(name)
    config, attention = oracle.config, oracle.model.layers[0].self_attn
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "initializer_range")
    for key in same:
        assert getattr(model, key) == getattr(config, key), key
    for key in ("final_logit_softcapping", "clip_qkv"):
        assert getattr(model, key) == getattr(config, key, None), key
    assert model.attn_logit_softcapping == getattr(attention, "attn_logit_softcapping", None)
    assert model.head_dim == attention.head_dim
    assert [model.scale(layer) for layer in range(3)] == [oracle.model.layers[layer].self_attn.scaling for layer in range(3)]
    assert model.residual_multiplier == getattr(config, "residual_multiplier", 1.0)
    scale = getattr(oracle, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    assert model.logit_multiplier == scale
    embed_scale = getattr(oracle.model.embed_tokens, "scalar_embed_scale", None)
    assert model.embedding_multiplier == (embed_scale or getattr(config, "embedding_multiplier", 1.0))


@each_case
def test_norms_and_activation_compute_what_those_of_transformers_do(name: str) -> None:
    model, oracle = _model(_config(name)), _oracle(name)
    values = torch.randn(5, model.hidden_size, generator=torch.Generator().manual_seed(1)) * 1e-3  # so that epsilon matters
    norm = oracle.model.norm
    weight = norm.weight + model.norm_weight_offset if model.norm_weight else None
    shape = (model.hidden_size,)
    if model.norm == "layer_norm":
        expected = functional.layer_norm(values, shape, weight, norm.bias if model.norm_bias else None, model.norm_eps)
    else:
        expected = functional.rms_norm(values, shape, weight, model.norm_eps)
    torch.testing.assert_close(norm(values), expected, rtol=1e-5, atol=1e-6)
    mlp = oracle.model.layers[0].mlp
    act = next(getattr(mlp, key) for key in ("act_fn", "activation_fn", "act") if hasattr(mlp, key))
    ours = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }
    torch.testing.assert_close(act(values * 1e3), ours[model.hidden_act](values * 1e3), rtol=0, atol=1e-6)


@each_spelling
@each_case
def test_rotation_is_that_of_the_model_that_transformers_makes(name: str, spelling: str) -> None:
    model, oracle = _model(_config(name, spelling)), _oracle(name)
    rotary, parameters = oracle.model.rotary_emb, oracle.config.rope_parameters
    frequencies = {key: value for key, value in rotary.named_buffers() if key.endswith("inv_freq") and "original" not in key}
    assert {2 * len(value) for value in frequencies.values()} == {model.rotary_dim}
    if "sliding_attention" in parameters:
        assert model.rope_local_theta == parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
        factor = rotary.full_attention_attention_scaling
    else:
        assert model.rope_local_theta is None
        factor = rotary.attention_scaling
    assert model.rope_theta == parameters["rope_theta"]
    layers = oracle.model.layers
    assert model.nope_layers == [layer for layer, one in enumerate(layers) if not getattr(one.self_attn, "use_rope", True)]
    if parameters["rope_type"] == "default":
        assert model.rope_scaling is None
        return
    scaling = model.rope_scaling
    assert scaling is not None and scaling.rope_type == parameters["rope_type"]
    assert (scaling.attention_factor or 1.0) == pytest.approx(factor, rel=1e-12)
    for key in scaling.model_fields_set & parameters.keys():
        assert getattr(scaling, key) == parameters[key], key
    if scaling.rope_type == "dynamic":
        assert scaling.original_max_position_embeddings == oracle.config.max_position_embeddings


@each_case
def test_windows_are_those_of_attention_weights(name: str) -> None:
    """What a late token sees in each layer, from the weights that transformers' attention gives."""
    model, oracle = _model(_config(name)), _oracle(name)
    with torch.no_grad():
        attentions = oracle(DOCUMENT, output_attentions=True).attentions
    length = DOCUMENT.shape[1]
    for layer, weights in enumerate(attentions):
        seen = int((weights[0] > 0).any(0)[-1].sum())  # a head may give a token nothing
        assert seen == min(model.window(layer) or length, length), layer


@each_case
def test_tensors_are_those_of_the_model_that_transformers_makes(name: str) -> None:
    config = _config(name)
    model = _model(config)
    stored = list(find_family(config["architectures"][0]).stored_tensors(model))
    expected = {key: tuple(value.shape) for key, value in _oracle(name).state_dict().items()}
    if model.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert {tensor.name: tensor.shape for tensor in stored} == expected
    assert len(stored) == len(expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.respell is not None])
def test_respelled_folders_are_those_that_transformers_loads(name: str, tmp_path: Path) -> None:
    oracle = make_folder(CASES[name], tmp_path)
    loaded = type(oracle).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(_logits(loaded.eval()), _logits(oracle), rtol=0, atol=0)
    folder = HFFolder(tmp_path)
    assert folder.problems() == []
    assert ModelConfig(**folder.model_fields()) == _model(_config(name))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(architecture: str) -> None:
    least = {"vocab_size": 131, "hidden_size": 3072, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 32}
    least["architectures"] = [architecture]
    theirs = getattr(transformers, architecture).config_class(**copy.deepcopy(least))
    whole = {**json.loads(theirs.to_json_string(use_diff=False)), "architectures": [architecture]}
    assert _model(least) == _model(whole) == _model(old_spelling(whole))


SAID_SHORTLY: dict[str, tuple[str, dict[str, Any]]] = {
    "windows from a layer on": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "windows in no layer": ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    "windows without a size": ("Qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    "windows of nope layers": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 4, "no_rope_layer_interval": 2}),
    "no window by null": ("Mistral", {"sliding_window": None}),
    "key heads by null": ("Qwen3", {"num_key_value_heads": None}),
    "caps by null": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "every other layer": ("Gemma2", {"num_hidden_layers": 4}),
    "every third layer": ("Gemma3", {"num_hidden_layers": 7, "sliding_window_pattern": 3}),
    "both thetas": ("Gemma3", {"rope_theta": 3e5, "rope_local_base_freq": 2e4}),
    "scaling of the layers without window": ("Gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "one theta of two": ("Gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 3e5}}, "rope_local_base_freq": 2e4}),
    "no original context": ("Llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "a default original context": (
        "Phi3",
        {"hidden_size": 96, "head_dim": None, "rope_scaling": {**LONGROPE, "factor": 2.0}, "max_position_embeddings": 8192},
    ),
    "both spellings": (
        "Llama",
        {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": {"rope_theta": 1e4}},
    ),
    "theta in the scaling": ("Llama", {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 2e4}, "rope_theta": 1e4}),
    "a share beside": ("Phi3", {"partial_rotary_factor": 0.5}),
    "a share within": ("Glm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
}


@pytest.mark.parametrize("what", SAID_SHORTLY)
def test_what_is_said_shortly_means_what_it_means_to_transformers(what: str) -> None:
    family, said = SAID_SHORTLY[what]
    architecture = f"{family}ForCausalLM"
    config = {key: value for key, value in _least(architecture, **said).items() if key != "head_dim" or value is not None}
    model = _model(config)
    assert model == _model(_written(architecture, config))
    changed = model.model_copy(update={"rope_theta": 777.0})
    patched = find_family(architecture).patch(config, changed)
    assert _model(patched) == _model(_written(architecture, patched)) == changed
    assert find_family(architecture).patch(config, model) == config


@each_case
def test_a_new_config_json_means_the_model_and_transformers_agrees(name: str) -> None:
    architecture, model = CASES[name].architecture, _model(_config(name))
    config = find_family(architecture).config(model)
    assert _model(config) == model
    assert _model(_written(architecture, config)) == model
    same = make_model(Case(architecture, {**config, "pad_token_id": None}))
    torch.testing.assert_close(_logits(same), _logits(_oracle(name)), rtol=0, atol=0)


@each_case
def test_some_family_describes_the_model(name: str) -> None:
    model = _model(_config(name))
    family, config = describe(model)
    again = _model(config)
    layers = range(model.num_hidden_layers)
    assert [again.window(layer) for layer in layers] == [model.window(layer) for layer in layers]
    plain = {"sliding_window", "layer_types", "attention_scale", "rope_local_theta", "max_position_embeddings"}
    assert again.model_dump(exclude=plain) == model.model_dump(exclude=plain)
    assert family.architecture == config["architectures"][0]


def test_plain_models_are_described_as_llama_and_those_with_a_window_as_mistral() -> None:
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
    assert describe(ModelConfig(**sizes))[0].architecture == "LlamaForCausalLM"
    assert describe(ModelConfig(**sizes, sliding_window=4))[0].architecture == "MistralForCausalLM"
    uneven = {**sizes, "num_attention_heads": 5, "num_key_value_heads": 5}  # transformers' Llama refuses that
    assert describe(ModelConfig(**uneven))[0].architecture not in ("LlamaForCausalLM", "Gemma2ForCausalLM")


@each_spelling
@each_case
def test_patching_with_the_same_model_changes_nothing(name: str, spelling: str) -> None:
    config = {"own": {"kept": [1, None]}, **_config(name, spelling)}
    assert find_family(CASES[name].architecture).patch(config, _model(config)) == config


@each_spelling
@each_case
def test_patching_writes_a_new_theta_where_the_old_one_is(name: str, spelling: str) -> None:
    config = {"own": {"kept": [1, None]}, **_config(name, spelling)}
    before = copy.deepcopy(config)
    model = _model(config).model_copy(update={"rope_theta": 777.0, "vocab_size": 140})
    expected = copy.deepcopy(config) | {"vocab_size": 140}
    rope = expected.get("rope_parameters", expected)
    rope.get("full_attention", rope)["rope_theta"] = 777.0
    assert find_family(CASES[name].architecture).patch(config, model) == expected
    assert config == before
    assert _model(_written(CASES[name].architecture, expected)) == model


@each_spelling
@pytest.mark.parametrize("scaling", [None, LINEAR, YARN, LONGROPE], ids=["none", "linear", "yarn", "longrope"])
@pytest.mark.parametrize("name", ["llama", "llama-dynamic", "llama-yarn-full", "llama-longrope", "gemma3", "phi3-hub", "glm"])
def test_patching_writes_a_new_scaling_where_the_old_one_is(name: str, scaling: dict[str, Any] | None, spelling: str) -> None:
    architecture, config = CASES[name].architecture, {"own": 1, **_config(name, spelling)}
    fields = None if scaling is None else {key: value for key, value in scaling.items() if key != "rope_theta"}
    if fields and name == "glm" and "short_factor" in fields:  # half of each head
        fields |= {key: fields[key][:4] for key in ("short_factor", "long_factor")}
    model = ModelConfig(**{**_model(config).model_dump(), "rope_scaling": fields})
    if name.startswith("phi3") and fields and fields["rope_type"] != "longrope":
        with pytest.raises(ValueError, match=f"rope type '{fields['rope_type']}'"):
            find_family(architecture).patch(config, model)
        return
    patched = find_family(architecture).patch(config, model)
    assert _model(patched) == model
    assert _model(_written(architecture, patched)) == model
    touched = {"rope_scaling", "rope_parameters", "original_max_position_embeddings"}
    assert {key: patched.get(key) for key in config.keys() - touched} == {key: config[key] for key in config.keys() - touched}
    assert ("rope_parameters" in patched) == (spelling == "new")
    if config.get("rope_scaling") and scaling:  # its type is named as it was
        assert ("type" in patched["rope_scaling"]) == ("type" in config["rope_scaling"])


def test_patching_refuses_what_the_family_cannot_say() -> None:
    config = _config("qwen2")
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no model with attention_output_bias true"):
        find_family("Qwen2ForCausalLM").patch(config, _model(config).model_copy(update={"attention_output_bias": True}))


def test_a_top_level_original_context_wins_and_is_patched() -> None:
    config = {**_config("llama-yarn", "old"), "original_max_position_embeddings": 32}
    model = _model(config)
    assert model.rope_scaling is not None and model.rope_scaling.original_max_position_embeddings == 32
    assert _model(_written("LlamaForCausalLM", config)) == model
    shorter = model.rope_scaling.model_copy(update={"original_max_position_embeddings": 8})
    patched = find_family("LlamaForCausalLM").patch(config, model.model_copy(update={"rope_scaling": shorter}))
    assert patched["original_max_position_embeddings"] == 8


def test_an_attention_factor_that_followed_from_the_context_stays_when_the_context_changes() -> None:
    config = _config("phi3-hub", "old")
    model = _model(config).model_copy(update={"max_position_embeddings": 4096})
    patched = find_family("Phi3ForCausalLM").patch(config, model)
    assert patched["max_position_embeddings"] == 4096 and _model(patched) == model
    assert patched["rope_scaling"]["attention_factor"] == _model(config).rope_scaling.attention_factor  # type: ignore[union-attr]


def test_su_is_longrope() -> None:
    """What Phi-3 was released with, and transformers 4 reads."""
    config = _config("phi3-hub", "old with type")
    assert config["rope_scaling"]["type"] == "longrope"
    assert _model({**config, "rope_scaling": config["rope_scaling"] | {"type": "su"}}) == _model(config)


def test_phi3_writes_just_the_three_keys_of_longrope_that_transformers_4_takes() -> None:
    config = find_family("Phi3ForCausalLM").config(_model(_config("phi3-hub")))
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert config["original_max_position_embeddings"] == 16


@pytest.mark.parametrize("scalar", [24, 100, 128, 144, 168, 224, 255, 1000])
def test_query_pre_attn_scalar_is_written_as_the_integer_it_was(scalar: int) -> None:
    config = {**_config("gemma2"), "query_pre_attn_scalar": scalar}
    written = find_family("Gemma2ForCausalLM").config(_model(config))
    assert written["query_pre_attn_scalar"] == scalar and isinstance(written["query_pre_attn_scalar"], int)


@pytest.mark.parametrize("scaling", [6.0, 16, 0.1, 12.5, 49.0, 103.0])
def test_logits_scaling_is_written_as_the_number_it_was(scaling: float) -> None:
    written = find_family("GraniteForCausalLM").config(_model({**_config("granite"), "logits_scaling": scaling}))
    assert written["logits_scaling"] == scaling


@pytest.mark.parametrize(("dim", "rotary"), [(44, 30), (96, 72), (128, 64), *((96, even) for even in range(2, 97, 6))])
def test_every_share_of_a_head_can_be_written(dim: int, rotary: int) -> None:
    """30 / 44 * 44 is less than 30."""
    model = ModelConfig(**{**_model(_config("phi3")).model_dump(), "head_dim": dim, "rotary_dim": rotary})
    written = find_family("Phi3ForCausalLM").config(model)
    assert int(dim * written["partial_rotary_factor"]) == rotary


def test_dynamic_scaling_makes_the_pretrained_context_that_of_config_json() -> None:
    fields = _model(_config("llama-dynamic")).model_dump() | {"max_position_embeddings": 64}
    written = find_family("LlamaForCausalLM").config(ModelConfig(**fields))
    assert written["max_position_embeddings"] == 16
    assert "original_max_position_embeddings" not in written["rope_scaling"]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {"attention_scale": 0.25}),
        ("MistralForCausalLM", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}),
        ("LlamaForCausalLM", {"sliding_window": 4, "layer_types": ["full_attention"] * 3}),
        ("LlamaForCausalLM", {"rope_local_theta": 100.0}),
    ],
)
def test_another_way_to_say_the_same_is_no_other_model(architecture: str, fields: dict[str, Any]) -> None:
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
    assert describe(ModelConfig(**sizes, **fields))[0].architecture == architecture


def _least(architecture: str, **changes: Any) -> dict[str, Any]:
    return {**SIZES, "architectures": [architecture], **changes}


SLIDING = ["sliding_attention"] * 3
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ("Llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}, "auto_map"),
    ("Llama", {"is_causal": False}, "is_causal False"),
    ("Llama", {"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    ("Llama", {"vocab_size": None}, "vocab_size is missing"),
    ("Llama", {"hidden_act": "relu2"}, "hidden_act 'relu2'"),
    ("Llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 48 is not a multiple"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("Llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "of their own for full_attention"),
    ("Llama", {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional'"),
    ("Llama", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope type 'mrope'"),
    ("Llama", {"rope_scaling": {"type": "linear"}}, "linear lacks factor"),
    ("Llama", {"rope_scaling": {"type": "dynamic"}}, "dynamic lacks factor"),
    ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "lacks high_freq_factor"),
    ("Llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8}}, "longrope lacks long_factor"),
    ("Llama", {"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 7}}, "long_factor has 7 numbers; there are 8 pairs"),
    ("Llama", {"rope_scaling": [2.0]}, "must be a mapping"),
    ("Mistral", {"layer_types": ["full_attention"] * 3}, "layer_types do not fit sliding_window 4096"),
    ("Mistral", {"sliding_window": None, "layer_types": SLIDING}, "layer_types do not fit sliding_window None"),
    ("Qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types chunked_attention"),
    ("Qwen2", {"layer_types": SLIDING}, "sliding_window is not set"),
    ("Qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "use_sliding_window": True, "sliding_window": None},
     "sliding_window is not set"),
    ("Qwen3", {"layer_types": SLIDING[:2], "use_sliding_window": True}, "layer_types names 2 layers of 3"),
    ("Gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("Gemma", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}, "hidden_activation 'gelu' contradicts"),
    ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("Gemma2", {"sliding_window_pattern": 6}, "sliding_window_pattern 6"),
    ("Gemma2", {"sliding_window": None}, "sliding_window is not set"),
    ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported$"),
    ("Qwen2", {"layer_types": ["full_attention"]}, "layer_types names 1 layers of"),
    ("Gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern 0"),
    ("Gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters rope_theta, rope_type must"),
    ("Gemma3", {"rope_parameters": {"sliding_attention": LINEAR}}, "rope type 'linear' of sliding_attention"),
    ("Gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "must name its rope_type"),
    ("Gemma3", {"rope_scaling": [8.0]}, "rope_scaling must be a mapping"),
    ("Phi3", {"rope_scaling": LINEAR}, "rope type 'linear'"),
    ("Phi3", {"rope_scaling": {**LONGROPE, "rope_type": "yarn"}}, "rope type 'yarn'"),
    ("Phi3", {"partial_rotary_factor": 0.05}, "partial_rotary_factor 0.05 of head_dim 16 rotates nothing"),
    ("Phi3", {"partial_rotary_factor": 0.33}, "rotary_dim 5 is odd"),
    ("Olmo", {"clip_qkv": -1.0}, "clip_qkv"),
    ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers speaks of 2 layers of 3"),
    ("SmolLM3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval 0"),
    ("SmolLM3", {"layer_types": SLIDING, "sliding_window": 4}, "use_sliding_window is not set"),
    ("Cohere", {"logit_scale": -0.5}, "logit_multiplier"),
    ("StableLm", {"head_dim": 16}, "head_dim 16 is not supported, only 8"),
    ("Granite", {"embedding_multiplier": 0.0}, "embedding_multiplier"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "message"), REFUSED, ids=[f"{family}-{what[:30]}" for family, _, what in REFUSED])
def test_what_the_decoder_cannot_do_is_refused_by_name(family: str, change: dict[str, Any], message: str) -> None:
    architecture = f"{family}ForCausalLM"
    sizes = {"head_dim": 8} if family == "StableLm" else {}
    _model(_least(architecture, **sizes))  # it is the change that is refused
    with pytest.raises(ValueError, match=message):
        _model({**_least(architecture, **sizes), **change})


def test_all_reasons_come_in_one_message() -> None:
    with pytest.raises(ValueError, match="hidden_act.*use_bidirectional.*|use_bidirectional.*hidden_act.*'proportional'"):
        _model(
            _least(
                "GemmaForCausalLM",
                use_bidirectional_attention=True,
                hidden_act="mish",
                rope_scaling={"rope_type": "proportional"},
            )
        )


@pytest.mark.parametrize(
    ("family", "change", "field"),
    [
        ("Mistral", {"attention_output_bias": True}, "attention_output_bias"),
        ("Llama", {"qkv_bias": True}, "no model with attention_output_bias false"),
        ("Gemma", {"embedding_multiplier": 2.0}, "embedding_multiplier 2.0"),
        ("Gemma", {"hidden_act": "gelu"}, "contradicts hidden_act 'gelu'"),
        ("Olmo", {"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ("Olmo2", {"norm_placement": "input"}, "norm_placement"),
        (
            "Gemma3",
            {"rope_local_theta": None, "rope_scaling": LINEAR, "sliding_window": 4},
            "no model with rope_local_theta null",
        ),
    ],
)
def test_a_family_refuses_models_that_its_config_json_cannot_describe(family: str, change: dict[str, Any], field: str) -> None:
    config = _least(f"{family}ForCausalLM")
    change = {key: {k: v for k, v in value.items() if k != "rope_theta"} if isinstance(value, dict) else value
              for key, value in change.items()}  # fmt: skip
    fields = {**_model(config).model_dump(), **change}
    if "sliding_window" in change:
        fields["layer_types"] = []
    with pytest.raises(ValueError, match=field):
        find_family(f"{family}ForCausalLM").config(ModelConfig(**fields))
