"""Adapters in PEFT's format, against `peft` itself: what we write it loads, what it wrote we load, and both compute the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_llm.checkpoint import Checkpoint, find_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config.peft import is_adapter
from megatron_llm.hf import HFFolder, PeftFolder
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.build import build_model
from tests.families.cases import cases, make_folder
from tests.families.models import packed_batch, reference
from tests.hf.folders import stored_tensors
from tests.training.commands import write_config

CASES = cases()
ADAPTER = {"rank": 4, "alpha": 6.0}
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def begin(run: Path, folder: Path, peft: dict[str, Any], steps: int = 0, **sections: Any) -> Checkpoint:
    """The last checkpoint of a run in float32 that starts from a folder, with rates that move adapters far in two steps."""
    raw = {
        "model": {"hf": str(folder)},
        "data": {"kind": "synthetic"},
        "training": {"sequence_length": 16, "global_batch_size": 2, "steps": steps, "eval_rows": 1},
        "optimizer": {"lr": 0.05, "grad_clip": 0},
        "lr_schedule": {"kind": "constant"},
        "logging": {"run_dir": str(run)},
        "device": "cpu",
        "peft": peft,
        **sections,
    }
    assert main(["train", str(write_config(run.with_suffix(".yaml"), raw))]) == 0
    return find_checkpoint(run)


def adapters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    source = checkpoint.state("weights")
    return {
        name: source.read(Part(name, info.shape, ()), Box.full(info.shape))
        for name, info in checkpoint.tensors("weights").items()
        if is_adapter(name)
    }


def our_logits(checkpoint: Checkpoint) -> Tensor:
    stage = build_model(checkpoint.model, checkpoint.source("weights"), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return stage.logits(stage(None, packed_batch(checkpoint.model.vocab_size)))


def load_base(name: str, folder: Path) -> Any:
    case = CASES[name]
    model = getattr(transformers, case.architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=case.attention
    )
    if case.adjust is not None:
        case.adjust(model)
    return model.eval()


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return reference(model, packed_batch(model.config.vocab_size))[0]


WRITTEN = {
    # everything, or parts of what a folder keeps in one matrix, or some layers
    "llama": [["all-linear"], ["q_proj", "layers.[02].attention.v", "mlp.*"]],
    "gpt-neox": [["all-linear"], ["attention.q", "mlp.down"]],
    "gpt2": [["all-linear"], ["attention.[qv]", "attention.o"]],
    "phi3": [["all-linear"], ["attention.q", "mlp.gate"]],
    "falcon-40b": [["all-linear"]],
    "bloom": [["layers.[12].attention.[kv]", "mlp.up"]],
    "gpt-bigcode-multi-query": [["all-linear"]],
    "codegen": [["all-linear"]],
    "opt": [["all-linear"]],
    "gpt-neo": [["all-linear"]],
    "mpt": [["all-linear"]],
    "gemma2": [["attention.*"]],
}
PAIRS = [(name, targets) for name, variants in WRITTEN.items() for targets in variants]
FAST = [("llama", ["all-linear"]), ("gpt-neox", ["all-linear"]), ("gpt2", ["attention.[qv]", "attention.o"])]


def _there_and_back(tmp_path: Path, name: str, targets: list[str], **peft: Any) -> None:
    folder, out = tmp_path / "hf", tmp_path / "adapter"
    make_folder(CASES[name], folder)
    checkpoint = begin(tmp_path / "run", folder, {**ADAPTER, "targets": targets, **peft}, steps=2)
    ours = our_logits(checkpoint)
    assert main(["export", str(tmp_path / "run"), str(out), "--adapter"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)

    theirs = PeftModel.from_pretrained(load_base(name, folder), out)
    loaded = {key.replace(".default.", "."): value for key, value in theirs.state_dict().items() if "lora_" in key}
    written = load_file(out / "adapter_model.safetensors")
    assert loaded.keys() == written.keys() and all(torch.equal(loaded[key], written[key]) for key in written)
    logits = their_logits(theirs)
    assert (logits - their_logits(load_base(name, folder))).abs().max() > 0.05  # the adapters do something
    torch.testing.assert_close(logits, ours, **CLOSE)

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = load_base(name, tmp_path / "merged").state_dict()
    for key, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6, msg=key)

    again = begin(tmp_path / "again", folder, {"init": str(out)})
    before, after = adapters(checkpoint), adapters(again)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert {key: again.config["peft"][key] for key in ADAPTER} == ADAPTER


@pytest.mark.parametrize(("name", "targets"), FAST)
def test_an_exported_adapter_is_loaded_by_peft_and_comes_back(tmp_path: Path, name: str, targets: list[str]) -> None:
    _there_and_back(tmp_path, name, targets)


def test_rank_stabilized_scales_are_kept(tmp_path: Path) -> None:
    _there_and_back(tmp_path, "phi3", ["all-linear"], rslora=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "targets"), [pair for pair in PAIRS if pair not in FAST])
def test_other_families_adapters_are_loaded_by_peft_and_come_back(tmp_path: Path, name: str, targets: list[str]) -> None:
    _there_and_back(tmp_path, name, targets)


def write_peft(name: str, folder: Path, out: Path, **config: Any) -> Tensor:
    """An adapter that PEFT wrote, with nothing of zeros in it; returns the logits."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(load_base(name, folder), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(out)
    return their_logits(model)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2", "phi3"])
def test_an_adapter_that_peft_wrote_is_a_start(tmp_path: Path, name: str) -> None:
    make_folder(CASES[name], tmp_path / "hf")
    expected = write_peft(name, tmp_path / "hf", tmp_path / "adapter", use_rslora=name == "phi3")
    checkpoint = begin(tmp_path / "run", tmp_path / "hf", {"init": str(tmp_path / "adapter")})
    torch.testing.assert_close(our_logits(checkpoint), expected, **CLOSE)
    assert checkpoint.config["peft"]["rank"] == 4 and checkpoint.config["peft"]["rslora"] == (name == "phi3")
    kinds = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"]
    assert checkpoint.config["peft"]["targets"] == kinds[:4] + ["mlp.gate"] * (name in ("llama", "phi3")) + kinds[4:]


def test_of_the_targets_that_peft_chose_only_those_have_an_adapter(tmp_path: Path) -> None:
    make_folder(CASES["llama"], tmp_path / "hf")
    chosen = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]}
    expected = write_peft("llama", tmp_path / "hf", tmp_path / "adapter", **chosen)
    checkpoint = begin(tmp_path / "run", tmp_path / "hf", {"init": str(tmp_path / "adapter"), "rank": 4})
    torch.testing.assert_close(our_logits(checkpoint), expected, **CLOSE)
    names = [f"layers.{layer}.{kind}" for kind in ("attention.q", "mlp.up") for layer in (1, 2)]
    assert checkpoint.config["peft"]["targets"] == names


# Refusals


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and an adapter for it."""
    place = tmp_path_factory.mktemp("llama")
    make_folder(CASES["llama"], place / "hf")
    write_peft("llama", place / "hf", place / "adapter", target_modules=["q_proj", "v_proj"])
    return place / "hf", place / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias lora_only: trained biases are not supported"),
        ({"lora_bias": True}, "biases of B"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the base model"),
        ({"alpha_pattern": {"v_proj": 12}}, "scale 3 and others 1.5"),
        ({"r": 3}, "has rank 4 and others 3"),
        ({"r": None}, "is damaged"),
        ({"alpha_pattern": {"[": 12}}, "is damaged"),
    ],
)
def test_what_is_no_lora_of_weights_is_refused(
    tmp_path: Path, llama: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    folder, adapter = llama
    shutil.copytree(adapter, tmp_path / "changed")
    file = tmp_path / "changed" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    hf = HFFolder(folder)
    from megatron_llm.config import ModelConfig

    with pytest.raises(ValueError, match=message):
        PeftFolder(tmp_path / "changed").settings(hf.family, ModelConfig(**hf.model_fields()))


def test_tensors_that_belong_nowhere_are_refused(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    folder, adapter = llama
    shutil.copytree(adapter, tmp_path / "changed")
    weights = tmp_path / "changed" / "adapter_model.safetensors"
    tensors = load_file(weights)
    extra = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(tensors | {extra: torch.ones(4, 131)}, weights)
    raw = {"model": {"hf": str(folder)}, "peft": {"init": str(tmp_path / "changed")}}
    with pytest.raises(ValueError, match="lora_embedding_A, which LlamaForCausalLM with 3 layers has no linear layer for"):
        _load(tmp_path, raw)
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"A and B of model.layers.1.self_attn.v_proj have shapes \(4, 48\) and \(\)"):
        _load(tmp_path, raw)


def _load(tmp_path: Path, raw: dict[str, Any]) -> Any:
    from megatron_llm.training.resolve import resolve

    base = {"data": {"kind": "synthetic"}, "training": {"sequence_length": 8, "global_batch_size": 1, "steps": 1}}
    config = write_config(tmp_path / "config.yaml", {**base, "optimizer": {"lr": 1e-3}, "device": "cpu", **raw})
    return resolve(config, [f"logging.run_dir={tmp_path / 'nowhere'}"], 1)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"rank": 8}, "peft.rank: 8 contradicts 4"),
        ({"alpha": 8}, "peft.alpha: 8 contradicts 6.0"),
        ({"targets": ["q_proj"]}, "differ in layers.0.attention.v, .*, layers.2.attention.v, of which the folder has one"),
        ({"targets": ["q_proj", "v_proj", "o_proj"]}, "differ in layers.0.attention.o.*of which the folder has none"),
        ({"targets": ["z_proj"]}, "'z_proj' is the name of no linear layer; there are all-linear, attention.q"),
        ({"init": "/nowhere"}, "/nowhere is not a folder"),
    ],
)  # fmt: skip
def test_settings_that_contradict_the_folder_are_refused(
    tmp_path: Path, llama: tuple[Path, Path], peft: dict[str, Any], message: str
) -> None:
    folder, adapter = llama
    with pytest.raises(ValueError, match=message):
        _load(tmp_path, {"model": {"hf": str(folder)}, "peft": {"init": str(adapter), **peft}})


def test_an_adapter_of_one_part_is_no_start_for_others(tmp_path: Path) -> None:
    """Of a matrix that holds several."""
    make_folder(CASES["phi3"], tmp_path / "hf")
    write_peft("phi3", tmp_path / "hf", tmp_path / "adapter", target_modules=["qkv_proj"])
    raw = {"model": {"hf": str(tmp_path / "hf")}, "peft": {"init": str(tmp_path / "adapter"), "targets": ["attention.[qk]"]}}
    with pytest.raises(ValueError, match="qkv_proj changes .*attention.v.weight, which peft.targets leaves out"):
        _load(tmp_path, raw)


def test_what_an_adapter_alone_cannot_hold_is_refused(tmp_path: Path, llama: tuple[Path, Path], capsys: Any) -> None:
    folder, _ = llama
    rules = {"lr": 0.05, "rules": [{"match": "*norm.weight", "frozen": False}]}
    begin(tmp_path / "norms", folder, ADAPTER, optimizer=rules)
    begin(tmp_path / "larger", folder, ADAPTER, model={"hf": str(folder), "resize_vocab": 140})
    begin(tmp_path / "full", folder, None)  # type: ignore[arg-type]
    for run, message in (
        ("norms", "had 7 weights trained beside the adapters (layers.0.attention_norm.weight, ...)"),
        ("larger", "the base model has 131 tokens and this one 140"),
        ("full", "was not trained with LoRA"),
    ):
        assert main(["export", str(tmp_path / run), str(tmp_path / "out"), "--adapter"]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "norms"), str(tmp_path / "out")]) == 0
    assert stored_tensors(tmp_path / "out").keys() == stored_tensors(folder).keys()
