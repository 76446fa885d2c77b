"""config.json and names of the families of `gpt_like.py`, against transformers' classes: both ways, in every spelling."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from megatron_llm.config import ModelConfig
from megatron_llm.hf.families import find_family
from megatron_llm.hf.family import Family
from megatron_llm.hf.reader import HFFolder
from tests.families.cases import Case, make_folder, make_model
from tests.families.gpt_like import CASES

every_case = pytest.mark.parametrize("name", CASES)
ARCHITECTURES = sorted({case.architecture for case in CASES.values()})
ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


@cache
def config_json(name: str) -> dict[str, Any]:
    """A case's config.json; its weights are checked on the way."""
    with TemporaryDirectory() as folder:
        make_folder(CASES[name], Path(folder))
        assert HFFolder(folder).problems() == []
        return json.loads((Path(folder) / "config.json").read_text())


def family_of(config: dict[str, Any]) -> Family:
    return find_family(config["architectures"][0])


def read(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**family_of(config).fields(config))


def oracle(config: dict[str, Any], architecture: str) -> Any:
    """transformers' model of a config.json, with random weights."""
    return make_model(
        Case(architecture, {k: v for k, v in copy.deepcopy(config).items() if k not in ("architectures", "model_type")})
    )


def modules(model: Any, *attributes: str) -> Iterator[Any]:
    """What modules of a model have under the first of these names that they have."""
    for module in model.modules():
        found = next((name for name in attributes if hasattr(module, name)), None)
        if found is not None:
            yield getattr(module, found)


def assert_describes(ours: ModelConfig, model: Any) -> None:
    """Everything of a transformers model that is no tensor, read off its modules."""
    config = model.config
    assert ours.vocab_size == config.vocab_size
    assert (ours.hidden_size, ours.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)
    assert ours.num_attention_heads == config.num_attention_heads
    assert ours.tie_word_embeddings is config.tie_word_embeddings
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms and {norm.eps for norm in norms} == {ours.norm_eps}
    in_layers = {"one_norm": 1}.get(ours.parallel_block, 2) + (2 if ours.qk_norm != "none" else 0)
    assert len(norms) == in_layers * ours.num_hidden_layers + ours.final_norm + ours.embedding_norm
    x = torch.linspace(-5, 5, 101)
    for activation in modules(model, "act", "activation_fn", "gelu_impl"):
        if callable(activation):
            torch.testing.assert_close(activation(x), ACTIVATIONS[ours.hidden_act](x), rtol=1e-5, atol=1e-6)
    scales = list(modules(model, "scaling", "softmax_scale", "inv_norm_factor")) or [1.0] * ours.num_hidden_layers  # GPT-Neo
    assert [ours.scale(layer) for layer in range(ours.num_hidden_layers)] == pytest.approx(scales, rel=1e-12)
    assert_same_positions(ours, model)


def assert_same_positions(ours: ModelConfig, model: Any) -> None:
    channels = torch.arange(0, ours.rotary_dim, 2).float()
    frequencies = ours.rope_theta ** (-channels / (ours.rotary_dim or 1))
    if ours.rope_scaling is not None:
        assert ours.rope_scaling.rope_type == "linear"
        frequencies = frequencies / ours.rope_scaling.factor
    if ours.position_embedding == "rope":
        tables = [table for table in modules(model, "inv_freq", "embed_positions") if isinstance(table, torch.Tensor)]
        assert len(tables) == 1
        interleaved = type(model).__name__ in ("GPTJForCausalLM", "CodeGenForCausalLM")
        assert ours.rope_interleaved is interleaved
        if interleaved:
            angles = torch.cat((frequencies.sin(), frequencies.cos()))
            torch.testing.assert_close(tables[0][1], angles, rtol=1e-5, atol=1e-7)
        else:
            torch.testing.assert_close(tables[0], frequencies, rtol=1e-5, atol=0)
    rotated = type(model).__name__ in ("GPTNeoXForCausalLM", "GPTJForCausalLM", "CodeGenForCausalLM", "PhiForCausalLM")
    with_alibi = type(model).__name__ in ("BloomForCausalLM", "MptForCausalLM")
    alibi = getattr(model.config, "alibi", with_alibi)  # Falcon's flag
    assert (ours.position_embedding == "alibi") is alibi
    if type(model).__name__ == "FalconForCausalLM":
        rotated = not alibi
        assert ours.alibi_scaled is alibi
    assert (ours.position_embedding == "rope") is rotated
    if type(model).__name__ == "GPTNeoForCausalLM":
        for layer, block in enumerate(model.transformer.h):
            seen = int(block.attn.attention.bias[0, 0, -1].sum())
            assert (ours.window(layer) or ours.max_position_embeddings) == seen
    else:
        assert ours.sliding_window is None
    if type(model).__name__ == "MptForCausalLM":
        attention = model.config.attn_config
        assert (ours.alibi_bias_max, ours.clip_qkv) == (attention.alibi_bias_max, attention.clip_qkv)
    else:
        assert (ours.alibi_bias_max, ours.clip_qkv) == (8, None)


@every_case
def test_fields_are_what_transformers_reads(name: str) -> None:
    config = config_json(name)
    assert_describes(read(config), make_model(CASES[name]))
    assert_describes(read(config), oracle(config, CASES[name].architecture))  # the respelled one says the same to transformers


@every_case
def test_blocks_compute_in_the_order_of_the_model(name: str) -> None:
    """Where norms stand, by what they are given: the layer's input, attention's output, or sums."""
    model, ours = make_model(CASES[name]), read(config_json(name))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and ".0." in n and "attn.q_" not in n}
    norms = {n: m for n, m in norms.items() if "k_layernorm" not in n}
    layer = next(m for n, m in model.named_modules() if n.endswith(".0"))
    given: dict[str, torch.Tensor] = {}
    for key, module in norms.items():
        module.register_forward_hook(lambda _, inputs, out, key=key: given.update({key: inputs[0]}))
    layer.register_forward_hook(
        lambda _, inputs, kwargs, out: given.update({"in": inputs[0] if inputs else kwargs["hidden_states"]}), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.arange(20)[None])
    of_input = [key for key in norms if given[key].shape == given["in"].shape and torch.equal(given[key], given["in"])]
    count = {"none": 2, "one_norm": 1, "two_norms": 2}[ours.parallel_block]
    assert len(norms) == count
    expected = {"none": 0 if ours.norm_placement == "residual" else 1, "one_norm": 1, "two_norms": 2}[ours.parallel_block]
    assert len(of_input) == expected


@every_case
def test_stored_tensors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """As transformers saves them: it leaves out a tied head, and keeps old names of its own (embed_out)."""
    case = CASES[name]
    make_model(case).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    found = list(find_family(case.architecture).stored_tensors(read(config_json(name))))
    assert len({tensor.name for tensor in found}) == len(found)
    assert {tensor.name: tensor.shape for tensor in found} == stored


@every_case
def test_a_config_of_our_own_is_the_same_model(name: str) -> None:
    model = read(config_json(name))
    family = find_family(CASES[name].architecture)
    config = family.config(model)
    assert config == json.loads(json.dumps(config))
    assert read(config).model_dump(exclude={"max_position_embeddings"}) == model.model_dump(exclude={"max_position_embeddings"})
    theirs = oracle(config, CASES[name].architecture)
    assert_describes(model, theirs)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert shapes == {key: value.shape for key, value in make_model(CASES[name]).state_dict().items()}


@every_case
def test_patch_keeps_what_did_not_change(name: str) -> None:
    config = config_json(name)
    before = copy.deepcopy(config)
    model = read(config)
    assert family_of(config).patch(config, model) == config
    larger = model.model_copy(update={"vocab_size": 140})
    assert family_of(config).patch(config, larger) == config | {"vocab_size": 140}
    assert config == before


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("gpt-neox", "falcon", "phi"))])
def test_patch_says_new_rotations_in_the_folders_spelling(name: str) -> None:
    config = config_json(name)
    model = read(config)
    if model.position_embedding != "rope":
        return
    longer = ModelConfig(**{**model.model_dump(), "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 3.0}})
    patched = family_of(config).patch(config, longer)
    assert read(patched) == longer
    assert ("rope_parameters" in patched) == ("rope_parameters" in config)
    assert_describes(longer, oracle(patched, CASES[name].architecture))
    rotary = {
        "rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor",
    }  # fmt: skip
    assert {k: v for k, v in patched.items() if k not in rotary} == {k: v for k, v in config.items() if k not in rotary}
    if "rotary_emb_base" in config:
        assert patched["rotary_emb_base"] == 5e5
        assert patched.get("rope_theta", 5e5) == 5e5


def test_patch_uses_the_name_that_is_there() -> None:
    config = config_json("gpt2-half-precision-bin")
    assert "n_positions" not in config
    longer = read(config).model_copy(update={"max_position_embeddings": 80})
    assert family_of(config).patch(config, longer) == config | {"max_position_embeddings": 80}


def test_patch_keeps_the_other_keys_of_an_object() -> None:
    config = config_json("mpt-published")
    patched = family_of(config).patch(config, read(config).model_copy(update={"clip_qkv": 3.0}))
    assert patched == config | {"attn_config": config["attn_config"] | {"clip_qkv": 3.0}}


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("gptj", {"rope_theta": 5e5}, "rope_theta"),
        ("opt", {"norm_eps": 1e-3}, "norm_eps"),
        ("bloom", {"alibi_bias_max": 16.0}, "alibi_bias_max"),
        ("gpt2", {"attention_scale": 0.3}, "attention_scale"),
        ("phi", {"qkv_bias": False}, "qkv_bias"),
        ("falcon-7b", {"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_a_family_cannot_say_is_refused(name: str, change: dict[str, Any], field: str) -> None:
    config = config_json(name)
    model = ModelConfig(**{**read(config).model_dump(), **change})
    with pytest.raises(ValueError, match=f"has no model with .*{field}"):
        family_of(config).patch(config, model)
    with pytest.raises(ValueError, match=f"has no model with .*{field}"):
        family_of(config).config(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """Of every key: config.json without it reads as transformers' default does, or says that the key is missing."""
    default = getattr(transformers, architecture).config_class
    sizes = {
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "ffn_dim", "n_embd",
        "n_layer", "n_head", "num_heads", "num_layers", "d_model", "n_layers", "n_heads",
    }  # fmt: skip
    whole = json.loads(default().to_json_string(use_diff=False)) | {"architectures": [architecture]}
    expected = read(whole)
    missing = set()
    for key in whole.keys() - {"architectures"}:
        config = {other: value for other, value in whole.items() if other != key}
        try:
            assert read(config) == expected, key
        except ValueError as error:
            assert f"{key} is missing" in str(error)
            missing.add(key)
    assert missing <= sizes
    bare = {"architectures": [architecture], **{key: whole[key] for key in missing}}
    assert read(bare) == expected


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu'"),
    ("gpt2", {"auto_map": {"AutoModelForCausalLM": "modeling_x.OtherModel"}}, "auto_map"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("gpt-bigcode-multi-head", {"add_cross_attention": True}, "add_cross_attention True"),
    ("gptj", {"rotary_dim": None}, "rotary_dim None"),
    ("gptj", {"rotary_dim": 0}, "rotary_dim 0"),
    ("gptj", {"activation_function": "mish"}, "activation_function 'mish'"),
    ("codegen", {"n_embd": 42}, "n_embd 42"),
    ("gpt-neo-old", {"attention_types": [[["global"], 4]]}, "attention_types describes 4 layers of 3"),
    ("gpt-neo", {"attention_layers": ["global", "local", "sparse", "local"]}, "'sparse'"),
    ("gpt-neox", {"head_dim": 16}, "head_dim 16"),
    ("gpt-neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.0}}, "rotary_pct 0.0"),
    ("gpt-neox", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "rope type 'proportional'"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi False"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln True"),
    ("mpt", {"attn_config": {"qk_gn": True}}, "attn_config.qk_gn True"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm True"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type 'multiquery_attention'"),
    ("mpt", {"attn_config": {"rope": True}}, "attn_config.rope True"),
    ("mpt", {"attn_config": {"sliding_window_size": 128}}, "attn_config.sliding_window_size 128"),
    ("mpt", {"attn_config": {"attn_logit_softcapping": 30.0}}, "attn_config.attn_logit_softcapping 30.0"),
    ("mpt", {"ffn_config": {"ffn_type": "mb_moe"}}, "ffn_config.ffn_type 'mb_moe'"),
    ("mpt", {"ffn_config": {"ffn_act_fn": {"name": "silu"}}}, "ffn_config.ffn_act_fn"),
    ("mpt", {"no_bias": False}, "no_bias False"),
    ("mpt", {"expansion_ratio": 2}, "expansion_ratio 2"),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale 'inv_sqrt_d_model'"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type 'rmsnorm'"),
    ("mpt", {"embedding_fraction": 0.1}, "embedding_fraction 0.1"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact"),
    ("falcon-40b", {"parallel_attn": False}, "parallel_attn False"),
    ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3"),
    ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2"),
    ("falcon-multi-head", {"num_kv_heads": 2}, "num_kv_heads 2"),
    ("falcon-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16"),
    ("opt", {"activation_function": "tanh"}, "activation_function 'tanh'"),
    ("phi-options", {"head_dim": 16}, "qk_layernorm with head_dim 16"),
    ("phi", {"hidden_size": None}, "hidden_size is missing"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_the_decoder_cannot_do_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    config = config_json(name) | change
    with pytest.raises(ValueError) as caught:
        read(config)
    assert str(caught.value).count(message) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bloom", {"slow_but_exact": True}),
        ("bloom", {"n_embed": 48, "hidden_size": 64}),
        (
            "mpt",
            {"learned_pos_emb": True, "norm_type": "layernorm", "attn_config": {"attn_uses_sequence_id": True, "alibi": True}},
        ),
        ("falcon-40b", {"multi_query": False}),
        ("falcon-7b", {"num_kv_heads": 7, "alibi": None}),
        ("gpt2", {"attn_pdrop": 0.5, "reorder_and_upcast_attn": True}),
        ("gpt-neo-old", {"attention_types": [[["global", "local"], 1], [["global"], 1]]}),
        ("gpt-neo-old", {"attention_types": [[["local"], 3]], "attention_layers": ["global", "local", "global"]}),
    ],
)
def test_what_makes_no_difference_is_no_reason_to_refuse(name: str, change: dict[str, Any]) -> None:
    config = config_json(name)
    assert read(config | change) == read(config)
