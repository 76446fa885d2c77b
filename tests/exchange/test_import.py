"""Checkpoints that megatron-core itself saved, on one rank and on several, in every form of keys: imported they are its model."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_llm.checkpoint import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import ModelConfig
from megatron_llm.exchange.source import MASTERS, MegatronSource
from megatron_llm.exchange.torch_dist import TorchDistFolder
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.build import build_model
from tests.exchange import megatron
from tests.hf.folders import assert_same_tensors, make_folder, make_tokenizer, stored_tensors
from tests.ranks import run_ranks

IDS = [int(i) for i in torch.randint(0, megatron.VOCAB, (60,), generator=torch.Generator().manual_seed(1))]


def import_(source: Path, output: Path, *options: str, origin: str = "megatron") -> dict[str, torch.Tensor]:
    """Run the command; returns every tensor of the checkpoint."""
    assert main(["import", "--from", origin, str(source), str(output), *options]) == 0
    return tensors_of(output)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    source = checkpoint.source("weights")
    return {
        name: source.read(Part(name, info.shape, ()), Box.full(info.shape))
        for name, info in checkpoint.tensors("weights").items()
    }


def logits(folder: Path, **changes: Any) -> torch.Tensor:
    """What the engine computes for IDS, with the checkpoint's architecture or a changed one."""
    checkpoint = open_checkpoint(folder)
    model = ModelConfig(**{**checkpoint.model.model_dump(), **changes})
    stage = build_model(model, checkpoint.source("weights"), torch.float32, torch.device("cpu"))
    ids, count = torch.tensor(IDS), len(IDS)
    with torch.no_grad():
        hidden = stage(None, Batch(ids, ids, torch.zeros(count), torch.arange(count), (0, count)))
        return stage.logits(hidden)


@pytest.mark.parametrize(
    ("tied", "rope", "args"),
    [
        (False, {}, {}),
        (True, {}, {}),
        (False, {"rope_scaling": True, "rope_scaling_factor": 16.0}, {"use_rope_scaling": True, "rope_scaling_factor": 16.0}),
        (False, {"seq_len_interpolation_factor": 4}, {"rotary_seq_len_interpolation_factor": 4}),
    ],
    ids=["untied", "tied", "llama3", "linear"],
)
def test_logits_are_those_of_megatron_core(tmp_path: Path, tied: bool, rope: dict[str, Any], args: dict[str, Any]) -> None:
    (expected,) = run_ranks(1, megatron.save_and_run, str(tmp_path / "megatron"), IDS, rope, tied=tied, args=args)
    import_(tmp_path / "megatron", tmp_path / "native")
    actual = logits(tmp_path / "native")
    assert actual.shape == (len(IDS), megatron.VOCAB) and expected.shape == (len(IDS), megatron.PADDED)
    torch.testing.assert_close(actual, expected[:, : megatron.VOCAB], rtol=1e-4, atol=1e-4)
    if rope:  # the scaling is seen at this length
        assert (logits(tmp_path / "native", rope_scaling=None) - actual).abs().max() > 1e-2
    assert open_checkpoint(tmp_path / "native").model.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"tp": 2}),
        (2, {"pp": 2, "tied": True, "layers": 4}),
        (1, {"per_layer": True}),
        (2, {"tp": 2, "per_layer": True, "singleton": True}),
    ],
    ids=["tp2", "pp2 tied", "a key a layer", "keys of gate and up"],
)
def test_every_layout_and_form_of_keys_is_the_same_model(tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    whole = {name: value for name, value in options.items() if name in ("tied", "layers")}
    run_ranks(1, megatron.save, str(tmp_path / "whole"), **whole)
    run_ranks(ranks, megatron.save, str(tmp_path / "parts"), **options)
    assert_same_tensors(import_(tmp_path / "parts" / "iter_0000007", tmp_path / "a"), import_(tmp_path / "whole", tmp_path / "b"))


def test_bfloat16_weights_stay_and_float32_masters_are_preferred(tmp_path: Path) -> None:
    run_ranks(2, megatron.save, str(tmp_path / "plain"), dtype=torch.bfloat16, tp=2)
    run_ranks(2, megatron.save, str(tmp_path / "masters"), dtype=torch.bfloat16, tp=2, masters=True)
    plain = import_(tmp_path / "plain", tmp_path / "a")
    masters = import_(tmp_path / "masters", tmp_path / "b")  # twice the weights there
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert_same_tensors(masters, {name: tensor.float() * 2 for name, tensor in plain.items()})


def test_masters_that_are_not_complete_are_not_used(tmp_path: Path) -> None:
    run_ranks(1, megatron.save, str(tmp_path / "m"), dtype=torch.bfloat16, masters=True)
    import_(tmp_path / "m", tmp_path / "native")
    model = open_checkpoint(tmp_path / "native").model
    folder = TorchDistFolder(tmp_path / "m")
    assert MegatronSource(folder, model).masters
    del folder.tensors[MASTERS + "decoder.final_layernorm.weight"]
    assert not MegatronSource(folder, model).masters


def test_the_local_spelling_of_norms(tmp_path: Path) -> None:
    """megatron-core writes fused names whatever the layers are; the plain ones are documented, so a renamed file is read."""
    run_ranks(1, megatron.save, str(tmp_path / "m"))
    expected = import_(tmp_path / "m", tmp_path / "a")
    file = tmp_path / "m" / "iter_0000007" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for old, new in (
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.input_layernorm.weight"),
        ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"),
    ):
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
        for index in [index for index in metadata.storage_data if index.fqn == old]:
            metadata.storage_data[type(index)(new, index.offset)] = metadata.storage_data.pop(index)
    file.write_bytes(pickle.dumps(metadata))
    assert_same_tensors(import_(tmp_path / "m", tmp_path / "b"), expected)


def test_a_config_folder_describes_what_has_no_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the checkpoint then exports to a Hugging Face folder with that config, in the dtype of the weights."""
    run_ranks(1, megatron.save, str(tmp_path / "m"), dtype=torch.bfloat16, with_args=False)
    run_ranks(1, megatron.save, str(tmp_path / "with"), dtype=torch.bfloat16)
    hf = config_folder(tmp_path / "hf")
    plain = import_(tmp_path / "m", tmp_path / "a", "--config", str(hf))
    assert_same_tensors(plain, import_(tmp_path / "with", tmp_path / "b"))
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    exported = stored_tensors(tmp_path / "out")
    assert torch.equal(exported["model.layers.2.self_attn.k_proj.weight"], plain["layers.2.attention.k.weight"])
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()

    file = hf / "config.json"
    file.write_text(file.read_text().replace('"rope_theta": 5000', '"rope_theta": 10000'))
    assert main(["import", "--from", "megatron", str(tmp_path / "with"), str(tmp_path / "c"), "--config", str(hf)]) == 1
    assert "disagree: rope_theta 10000.0 and 5000.0. Leave out --config" in capsys.readouterr().err


def config_folder(path: Path) -> Path:
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": megatron.VOCAB, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-4,
        "rope_theta": megatron.ROTARY_BASE, "max_position_embeddings": 64, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_vocabulary_is_cut_where_the_tokenizer_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    size = len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    run_ranks(1, megatron.save, str(tmp_path / "m"), args={"vocab_size": None})
    command = ["import", "--from", "megatron", str(tmp_path / "m"), str(tmp_path / "a")]
    assert main(command) == 1
    assert "the embedding has 96 rows" in (said := capsys.readouterr().err) and "--vocab-size N" in said
    assert not (tmp_path / "a").exists()
    assert main([*command, "--vocab-size", "97"]) == 1
    assert "a vocabulary of 97 tokens (--vocab-size), but" in capsys.readouterr().err
    with_tokenizer = import_(tmp_path / "m", tmp_path / "a", "--tokenizer", str(tmp_path / "tokenizer"))
    assert with_tokenizer["embedding.weight"].shape == (size, 24) == with_tokenizer["head.weight"].shape
    assert f"vocabulary: {size} tokens ({tmp_path / 'tokenizer'});" in capsys.readouterr().out
    generate = ["generate", "--checkpoint", str(tmp_path / "a"), "--prompt", "a b", "--max-new-tokens", "3"]
    assert main(generate) == 0 and capsys.readouterr().out.startswith("a b")


@pytest.mark.parametrize(
    "args",
    [
        {"vocab_size": 66, "tokenizer_type": "NullTokenizer"},  # which has one token more
        {"vocab_size": 50},  # padded it would be 64, so the run took no notice of it
        {"make_vocab_size_divisible_by": 128},
        {"padded_vocab_size": None},
    ],
    ids=str,
)
def test_a_vocabulary_that_does_not_fit_the_padding_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: dict[str, Any]
) -> None:
    run_ranks(1, megatron.save, str(tmp_path / "m"), args=args)
    assert main(["import", "--from", "megatron", str(tmp_path / "m"), str(tmp_path / "a")]) == 1
    assert "--vocab-size N" in capsys.readouterr().err
    assert import_(tmp_path / "m", tmp_path / "a", "--vocab-size", "90")["head.weight"].shape == (90, 24)


def test_a_hugging_face_folder_becomes_a_checkpoint_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = make_folder(tmp_path / "hf", torch.bfloat16, shard="16KB")
    tensors = import_(tmp_path / "hf", tmp_path / "native", origin="hf")
    assert torch.equal(tensors["layers.1.mlp.up.weight"], stored["model.layers.1.mlp.up_proj.weight"])
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "out")]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "out"), stored)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert main(["inspect", str(tmp_path / "native"), "--verify"]) == 0
    assert "state: step 0" in capsys.readouterr().out

    again = ["import", str(tmp_path / "hf"), str(tmp_path / "native")]
    assert main(again) == 1
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "hf"), "--overwrite"]) == 1
    assert "has no manifest.json, so it is no earlier checkpoint" in capsys.readouterr().err
    assert main([*again, "--overwrite", "--vocab-size", "3"]) == 1
    assert "--vocab-size belongs to --from megatron" in capsys.readouterr().err
    assert_same_tensors(tensors_of(tmp_path / "native"), tensors)
