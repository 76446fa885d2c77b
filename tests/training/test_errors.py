"""Wrong input ends with one clear message and exit code 1, before any process group exists."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llm.cli.main import main
from megatron_llm.data.indexed import token_dtype
from megatron_llm.data.writer import IndexedWriter
from megatron_llm.training.resolve import resolve
from tests.runs import TINY
from tests.training.commands import read_metrics, write_config


@pytest.fixture
def message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `train` on a config that must be refused and return what was printed."""

    def refused(world: int = 1, rank: int = 0, replace: dict[str, Any] | None = None, **sections: dict[str, Any]) -> str:
        raw = copy.deepcopy(TINY)
        raw["logging"] = {"run_dir": str(tmp_path / "run")}
        for name, values in sections.items():
            raw.setdefault(name, {}).update(values)
        raw |= replace or {}
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was made"))
        assert main(["train", str(write_config(tmp_path / "config.yaml", raw))]) == 1
        assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
        return capsys.readouterr().err

    return refused


def test_world_size_that_the_layout_does_not_divide(message: Any) -> None:
    text = message(world=6, parallel={"tensor_parallel": 2, "pipeline_parallel": 2})
    assert "= 4 does not divide the world size 6" in text and "multiple of 4" in text


def test_dropout_that_rises_over_one_layer(message: Any) -> None:
    chosen = {"hidden_dropout": 0.3, "hidden_dropout_profile": "rising"}
    text = message(model={"num_hidden_layers": 1}, training={"regularization": chosen})
    assert (
        "training.regularization.hidden_dropout_profile: rising begins with 0 in the first layer" in text
        and "use constant" in text
    )


def test_only_rank_0_speaks(message: Any) -> None:
    assert message(world=6, rank=3, parallel={"tensor_parallel": 4}) == ""


def test_more_ranks_than_heads(message: Any) -> None:
    text = message(world=16, parallel={"tensor_parallel": 16}, model={"intermediate_size": 12})
    assert "num_attention_heads: 8 are fewer than parallel.tensor_parallel 16; lower it to at most 8" in text
    assert "intermediate_size: 12 is less than parallel.tensor_parallel 16" in text


def test_kv_heads_that_do_not_fit(message: Any) -> None:
    text = message(world=3, parallel={"tensor_parallel": 3})
    assert "num_key_value_heads: parallel.tensor_parallel 3 is more than 2 and no multiple of it; possible: 1, 2, 4, 6, 8" in text


def test_rows_beyond_the_table_of_positions(message: Any) -> None:
    text = message(model={"position_embedding": "learned", "max_position_embeddings": 15})
    assert "training.sequence_length: 16 positions, but model.max_position_embeddings" in text and "has 15" in text


def test_sequence_that_sequence_parallelism_cannot_cut(message: Any) -> None:
    text = message(world=2, parallel={"tensor_parallel": 2}, training={"sequence_length": 15, "micro_batch_size": 1})
    assert "sequence_length 15 = 15 tokens" in text and "parallel.sequence_parallel=false" in text


def test_batch_that_the_replicas_do_not_divide(message: Any) -> None:
    assert "8 is not a multiple of micro_batch_size 2 * data parallel size 3 = 6" in message(world=3)


def test_context_parallelism_waits_for_its_time_and_1f1b_has_one_stage_a_rank(message: Any) -> None:
    text = message(world=2, parallel={"context_parallel": 2, "virtual_stages": 2})
    assert "context_parallel: 2 is not supported yet" in text
    assert "parallel.virtual_stages: schedule 1f1b has 1 virtual stage, not 2: set virtual_stages to 1, or" in text


def test_narrow_moments_of_float64(message: Any) -> None:
    text = message(optimizer={"state_dtype": "bfloat16"})
    assert "optimizer.state_dtype: bfloat16 has no place in precision.compute float64" in text


def test_unknown_key_with_suggestion(message: Any) -> None:
    assert "training.sequence_lenght: unknown key; did you mean training.sequence_length?" in message(
        training={"sequence_lenght": 3}
    )


def test_everything_wrong_is_said_at_once(message: Any) -> None:
    text = message(
        world=3,
        parallel={"tensor_parallel": 3},
        lr_schedule={"min_lr": 1.0},
        data={"kind": "pretrain", "train": [{"path": "gone"}]},
    )
    for part in ("4 problems", "num_key_value_heads: parallel", "= 32 tokens", "min_lr: 1.0", "gone.idx"):
        assert part in text


def test_missing_data(message: Any, tmp_path: Path) -> None:
    text = message(data={"kind": "pretrain", "train": [{"path": str(tmp_path / "absent")}]})
    assert "data.train.0.path" in text and "absent" in text


def test_token_ids_beyond_the_vocabulary(message: Any, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "big", token_dtype(200)) as writer:
        writer.add_document(np.arange(120))
    text = message(data={"kind": "pretrain", "train": [{"path": str(tmp_path / "big")}]})
    assert "big.bin has token id 97 at byte 194 and ids up to 119, but model.vocab_size is 97" in text
    assert "set model.vocab_size to at least 120" in text


def write_rows(prefix: Path, rows: int) -> str:
    """A data set of that many rows of TINY."""
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(16 * rows + 1) % 97)
    return str(prefix)


def test_steps_of_epochs_without_epochs(message: Any, tmp_path: Path) -> None:
    sources = [{"path": write_rows(tmp_path / "a", 3)}]
    assert "no source there has epochs" in message(training={"steps": -1}, data={"kind": "pretrain", "train": sources})
    assert "no source there has epochs" in message(training={"steps": -1})


def test_epochs_of_less_than_a_batch(message: Any, tmp_path: Path) -> None:
    sources = [{"path": write_rows(tmp_path / "a", 3), "epochs": 2.5}]
    text = message(training={"steps": -1}, data={"kind": "pretrain", "train": sources})
    assert "fewer rows than one training.global_batch_size (8)" in text


def test_steps_of_epochs(tmp_path: Path) -> None:
    """0.29 of 100 rows and 1.5 of 20 rows are 59 rows: 7 batches of 8, though 0.29 * 100 < 29 in floating point."""
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(tmp_path / "run")}}
    raw["training"]["steps"] = -1
    raw["data"] = {
        "kind": "pretrain",
        "train": [
            {"path": write_rows(tmp_path / "a", 100), "epochs": 0.29},
            {"path": write_rows(tmp_path / "b", 20), "epochs": 1.5},
        ],
    }
    config = resolve(write_config(tmp_path / "config.yaml", raw), None, world_size=1).config
    assert config.training.steps == 7
    raw["training"]["global_batch_size"], raw["training"]["micro_batch_size"] = 59, 1
    assert resolve(write_config(tmp_path / "config.yaml", raw), None, world_size=1).config.training.steps == 1


def llama(folder: Path) -> Path:
    shape = {**TINY["model"]}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


def test_unsupported_architecture(message: Any, tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}')
    text = message(replace={"model": {"hf": str(tmp_path / "t5")}})
    assert "T5ForConditionalGeneration is not supported" in text and "LlamaForCausalLM" in text


def test_truncated_safetensors(message: Any, tmp_path: Path) -> None:
    file = llama(tmp_path / "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    text = message(replace={"model": {"hf": str(tmp_path / "llama")}})
    assert "model.safetensors" in text and str(file.stat().st_size) in text.replace(",", "")


def test_hf_folder_that_contradicts_the_config(message: Any, tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    text = message(replace={"model": {"hf": str(tmp_path / "llama"), "hidden_size": 64}})
    assert "model.hidden_size: 64 contradicts 32" in text


def test_a_folder_beside_settings_in_other_words(message: Any, tmp_path: Path) -> None:
    """The former name of a setting, and 0 where it stands for what is derived."""
    llama(tmp_path / "llama")
    model = {"hf": str(tmp_path / "llama"), "rms_norm_eps": 0.5, "rotary_dim": 0, "head_dim": 0}
    text = message(replace={"model": model})
    assert "model.norm_eps: 0.5 contradicts" in text and "rotary_dim" not in text and "rms_norm_eps" not in text


def test_hf_folder_with_missing_weights(message: Any, tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 7}
    (folder / "config.json").write_text(json.dumps(config))
    text = message(replace={"model": {"hf": str(folder)}})
    assert "lacks" in text and "layers.5" in text


def test_another_models_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(tmp_path / "run")}}
    raw["training"]["steps"] = 0
    config = str(write_config(tmp_path / "config.yaml", raw))
    assert main(["train", config]) == 0
    assert main(["train", config, "model.hidden_size=64", "model.head_dim=8"]) == 1
    text = capsys.readouterr().err
    assert "belongs to another run" in text and "hidden_size: 32 -> 64" in text
    assert main(["train", config, "model.hidden_size=64", "checkpoint.resume=never"]) == 0
    kept = {path.name.split(".before")[0] for path in (tmp_path / "run").iterdir() if ".before-" in path.name}
    assert kept == {"checkpoints", "metrics.jsonl"}, "an earlier run is moved aside, not overwritten"


def test_gpu_asked_for_and_absent(message: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "torch sees no GPU" in message(replace={"device": "cuda"})


def test_a_folder_that_another_run_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_llm.training.run_folder import RunFolder
    from tests.runs import config_of

    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(tmp_path / "run")}}
    raw["training"]["steps"] = 0
    config = str(write_config(tmp_path / "config.yaml", raw))
    with RunFolder(config_of(logging={"run_dir": str(tmp_path / "run")}), rank=0):
        assert main(["train", config]) == 1
    assert f"another run is writing to {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["train", config]) == 0, "the lock ends with its holder"


def test_numbers_that_are_not_finite_or_absurd(message: Any) -> None:
    text = message(optimizer={"lr": float("inf")}, parallel={"timeout_seconds": 1e300}, training={"steps": 10**400})
    for setting in ("optimizer.lr: Input should be a finite number", "parallel.timeout_seconds", "training.steps"):
        assert setting in text


@pytest.mark.parametrize("folder", [5, ["a"], {"a": 1}, False])
def test_hf_folder_that_is_no_path(message: Any, folder: Any) -> None:
    assert f"model.hf: must be the path of a Hugging Face folder, got {folder!r}" in message(replace={"model": {"hf": folder}})


def test_warm_up_beyond_the_decay(message: Any) -> None:
    text = message(lr_schedule={"warmup_steps": 7, "decay_steps": 5})
    assert "warmup_steps: 7 lie beyond" in text and "decay_steps 5" in text


def test_a_run_may_end_within_its_warm_up(tmp_path: Path) -> None:
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(tmp_path / "run")}, "lr_schedule": {"warmup_steps": 20}}
    assert main(["train", str(write_config(tmp_path / "config.yaml", raw)), "training.steps=2"]) == 0
    assert [line["lr"] for line in read_metrics(tmp_path / "run") if "lr" in line] == pytest.approx([1e-2 / 20, 2e-2 / 20])


def test_hf_config_with_values_that_make_no_model(message: Any, tmp_path: Path) -> None:
    config = {**TINY["model"], "architectures": ["LlamaForCausalLM"], "hidden_size": "wide", "vocab_size": -1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = message(replace={"model": {"hf": str(tmp_path)}})
    assert f"model.hf: {tmp_path}/config.json: vocab_size: Input should be greater than 0 (got -1); hidden_size: " in text
    assert "pydantic" not in text


def test_tokenizer_folder_without_a_tokenizer(message: Any, tmp_path: Path) -> None:
    assert f"data.tokenizer: {tmp_path} is not a tokenizer folder: it has none of" in message(data={"tokenizer": str(tmp_path)})


def test_run_folder_that_cannot_be_made(message: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = message(logging={"run_dir": str(tmp_path / "file/run")})
    assert f"logging.run_dir: {tmp_path}/file/run cannot be written" in text


def test_export_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(tmp_path / "run")}}
    assert main(["train", str(write_config(tmp_path / "config.yaml", raw)), "training.steps=0"]) == 0
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "file/out")]) == 1
    assert capsys.readouterr().err.startswith(f"megatron-llm export: error: {tmp_path}/file/.out.partial: Not a directory")
