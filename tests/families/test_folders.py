"""Folders of every family: through a checkpoint and back they are the same to the bit, and transformers loads what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron_llm.checkpoint import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import ModelConfig
from megatron_llm.hf import HFFolder, export_hf
from megatron_llm.hf.assets import CONFIG, special_token_ids
from tests.families.cases import cases, make_folder
from tests.hf.folders import assert_same_tensors, stored_tensors

CASES = cases()


def logits(folder: Path, architecture: str, whole: bool = True) -> torch.Tensor:
    """What transformers computes with a folder.

    whole: the folder must hold every tensor of the model, and no other.
    """
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info[key]}
    assert not (whole and wrong)
    ids = torch.randint(0, model.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_a_folder_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    case, folder = CASES[name], tmp_path / "hf"
    make_folder(case, folder, torch.bfloat16)
    assert main(["import", str(folder), str(tmp_path / "native")]) == 0
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "out")]) == 0
    family = HFFolder(folder).family
    expected = {key: value for key, value in stored_tensors(folder).items() if not family.is_derived(key)}
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    before, after = logits(folder, case.architecture, whole=False), logits(tmp_path / "out", case.architecture)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_a_folder_gets_one(tmp_path: Path, name: str) -> None:
    """In its own family, and in the first that has such a model: transformers computes the same with either."""
    case, folder = CASES[name], tmp_path / "hf"
    make_folder(case, folder)
    expected = logits(folder, case.architecture, whole=False)
    assert main(["import", str(folder), str(tmp_path / "native")]) == 0
    checkpoint, hf = open_checkpoint(tmp_path / "native"), HFFolder(folder)
    model = ModelConfig(**hf.model_fields())
    own = {CONFIG: json.dumps({**hf.family.config(model), **special_token_ids({})}).encode()}
    for assets in (own, {}):
        out = tmp_path / ("own" if assets else "first")
        export_hf(checkpoint.source("weights"), model, assets, out)
        (architecture,) = json.loads((out / "config.json").read_text())["architectures"]
        assert architecture == hf.family.architecture or not assets
        torch.testing.assert_close(logits(out, architecture), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-40b", "phi3", "cohere-norms", "codegen", "stablelm-norms"])
def test_parts_of_any_size_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Transposed, fused by group, fused one after the other, a tensor for each head."""
    make_folder(CASES[name], tmp_path / "hf")
    expected = stored_tensors(tmp_path / "hf")
    monkeypatch.setattr("megatron_llm.parallel.shard._SLAB_ELEMENTS", 100)
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "native")]) == 0
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "out")]) == 0
    assert_same_tensors(stored_tensors(tmp_path / "out"), expected)
