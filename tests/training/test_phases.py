"""`model.checkpoint`: a new phase starts from the weights of a checkpoint, and from nothing else of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_llm.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.parallel.shard import Box, Part
from tests.launch import launch
from tests.runs import TINY
from tests.training.commands import read_metrics, read_status, write_config

MODEL_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def raw_config(run: Path, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(run)}}
    raw["training"] |= {"steps": 3, "eval_rows": 8}
    if model:
        raw["model"] = model
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return raw


def weights_of(checkpoint: Checkpoint, kind: str = "weights") -> dict[str, torch.Tensor]:
    source = checkpoint.source(kind)
    return {
        name: source.read(Part(name, info.shape, ()), Box.full(info.shape)) for name, info in checkpoint.tensors(kind).items()
    }


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A run of three steps in float32 that keeps an average."""
    raw = raw_config(tmp_path / "first", precision={"compute": "float32"}, optimizer={"ema_decay": 0.5})
    assert main(["train", str(write_config(tmp_path / "first.yaml", raw))]) == 0
    return tmp_path / "first"


def begun(tmp_path: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Checkpoint:
    """What a phase of no steps saves."""
    raw = raw_config(tmp_path / "second", model, training={"steps": 0}, **sections)
    assert main(["train", str(write_config(tmp_path / "second.yaml", raw))]) == 0
    return open_checkpoint(tmp_path / "second/checkpoints/step-00000000")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_masters_are_the_weights_unrounded_and_all_else_is_new(tmp_path: Path, first: Path, compute: str) -> None:
    second = begun(tmp_path, {"checkpoint": str(first)}, precision={"compute": compute}, optimizer={"ema_decay": None})
    expected, actual = weights_of(find_checkpoint(first)), weights_of(second)
    assert {str(value.dtype) for value in actual.values()} == {"torch.float32"}
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert all(not value.any() for value in weights_of(second, "m").values())
    assert {name: second.run_state[name] for name in ("step", "updates", "rows", "tokens")} == dict.fromkeys(
        ("step", "updates", "rows", "tokens"), 0
    )
    assert all(second.config["model"][key] == TINY["model"][key] for key in MODEL_KEYS)


def test_the_average_may_be_what_a_phase_starts_from(tmp_path: Path, first: Path) -> None:
    second = begun(tmp_path, {"checkpoint": str(first), "checkpoint_ema": True})
    expected, weights = weights_of(find_checkpoint(first), "ema"), weights_of(find_checkpoint(first))
    actual = weights_of(second)
    assert all(torch.equal(actual[name].float(), expected[name]) for name in expected)
    assert any(not torch.equal(weights[name], expected[name]) for name in expected)


def test_nothing_goes_back_after_the_first_step(tmp_path: Path, first: Path) -> None:
    """The phase is the run that Hugging Face's folder of the same weights begins: two ways in, the same numbers."""
    assert main(["export", str(first), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    losses = {}
    for name, model in (("native", {"checkpoint": str(first)}), ("hf", {"hf": str(tmp_path / "hf")})):
        raw = raw_config(tmp_path / name, model, precision={"compute": "bfloat16"}, checkpoint={"every_steps": 1})
        assert main(["train", str(write_config(tmp_path / f"{name}.yaml", raw)), "training.steps=2"]) == 0
        assert main(["train", str(tmp_path / f"{name}.yaml"), "--allow-change"]) == 0
        losses[name] = [
            (line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name) if "loss" in line
        ]
    assert losses["native"] == losses["hf"] and [step for step, *_ in losses["native"]] == [1, 2, 3]
    a, b = (weights_of(find_checkpoint(tmp_path / name)) for name in losses)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_any_layout_begins_alike(tmp_path: Path, first: Path) -> None:
    losses = []
    for number, (world, parallel) in enumerate(((1, {}), (4, {"tensor_parallel": 2, "pipeline_parallel": 2}))):
        raw = raw_config(
            tmp_path / f"run-{number}", {"checkpoint": str(first)}, parallel=parallel, training={"micro_batch_size": 1}
        )
        config = write_config(tmp_path / f"{number}.yaml", raw)
        endings = launch(world, main, ["train", str(config)])
        assert [ending.code for ending in endings] == [0] * world, [ending.log for ending in endings]
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"run-{number}") if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_the_files_of_the_model_travel_on_and_a_new_tokenizer_replaces_the_old(tmp_path: Path) -> None:
    from megatron_llm.training.resolve import load_config

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "name": name}))
    (tmp_path / "old" / "vocab.txt").write_text("old")
    raw = raw_config(tmp_path / "first", data={"tokenizer": str(tmp_path / "old")})
    assert main(["train", str(write_config(tmp_path / "first.yaml", raw)), "training.steps=1"]) == 0
    phase = write_config(tmp_path / "second.yaml", raw_config(tmp_path / "second", {"checkpoint": str(tmp_path / "first")}))
    kept, replaced = load_config(phase).assets(), load_config(phase, [f"data.tokenizer={tmp_path / 'new'}"]).assets()
    assert set(kept) == {"hf/tokenizer.json", "hf/vocab.txt"} and json.loads(kept["hf/tokenizer.json"])["name"] == "old"
    assert set(replaced) == {"hf/tokenizer.json"} and json.loads(replaced["hf/tokenizer.json"])["name"] == "new"


def test_a_phase_goes_on_from_its_own_checkpoints(tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_config(tmp_path / "second", {"checkpoint": str(first)}, lr_schedule={"kind": "constant"})
    config = str(write_config(tmp_path / "second.yaml", raw))
    assert main(["train", config]) == 0
    for path in first.rglob("*"):
        if path.name == "manifest.json":
            assert str(path.parent) not in str(find_checkpoint(tmp_path / "second").folder)
    assert main(["train", config, "training.steps=4"]) == 0
    assert f"continuing from {tmp_path}/second/checkpoints/step-00000003" in capsys.readouterr().err
    assert read_status(tmp_path / "second") == {"outcome": "done", "step": 4}


def test_sources_that_make_no_sense_are_refused(tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(model: dict[str, Any]) -> str:
        assert main(["train", str(write_config(tmp_path / "bad.yaml", raw_config(tmp_path / "bad", model)))]) == 1
        assert not (tmp_path / "bad").exists()
        return capsys.readouterr().err

    assert "both give weights; remove one" in refused({"checkpoint": str(first), "hf": "somewhere"})
    assert "model.checkpoint: " in (text := refused({"checkpoint": str(tmp_path / "absent")})) and "is not a folder" in text
    assert "model.checkpoint: must be the path of a checkpoint or run folder, got 3" in refused({"checkpoint": 3})
    text = refused({"checkpoint": str(first), "hidden_size": 64})
    assert f"model.hidden_size: 64 contradicts 32 of {first}; remove it here" in text
    raw = raw_config(tmp_path / "plain", training={"steps": 0})
    assert main(["train", str(write_config(tmp_path / "plain.yaml", raw))]) == 0
    text = refused({"checkpoint": str(tmp_path / "plain"), "checkpoint_ema": True})
    assert "has no average of the weights; remove model.checkpoint_ema" in text


def test_a_damaged_source_is_named_before_training(tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = first / "checkpoints/step-00000003/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))
    raw = raw_config(tmp_path / "second", {"checkpoint": str(first)})
    assert main(["train", str(write_config(tmp_path / "second.yaml", raw))]) == 1
    assert f"model.checkpoint: {file} is damaged" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "second.yaml").read_text())["model"] == {"checkpoint": str(first)}


def test_a_run_with_weights_of_its_own_can_do_without_those_it_began_with(tmp_path: Path, first: Path) -> None:
    raw = raw_config(tmp_path / "second", {"checkpoint": str(first)}, lr_schedule={"kind": "constant"})
    config = str(write_config(tmp_path / "second.yaml", raw))
    assert main(["train", config]) == 0
    assert open_checkpoint(tmp_path / "second/checkpoints/step-00000003").config["model"]["checkpoint"] == str(
        first / "checkpoints/step-00000003"
    ), "which step it began from, is kept"
    first.rename(tmp_path / "gone")
    assert main(["train", config, "training.steps=4"]) == 0
    assert main(["train", config, "training.steps=4", f"logging.run_dir={tmp_path / 'third'}"]) == 1


def test_the_runs_own_checkpoint_is_not_moved_away_before_it_is_read(
    tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_config(first, {"checkpoint": str(first)}, checkpoint={"resume": "never"})
    assert main(["train", str(write_config(tmp_path / "again.yaml", raw))]) == 1
    assert "is one of the run's own, which checkpoint.resume=never moves aside" in capsys.readouterr().err
    assert find_checkpoint(first).step == 3


def test_weights_without_a_run_are_no_run_to_go_on_with(tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(first), str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run/checkpoints/step-00000000")]) == 0
    raw = raw_config(tmp_path / "run", training={"steps": 1})
    assert main(["train", str(write_config(tmp_path / "run.yaml", raw))]) == 1
    text = capsys.readouterr().err
    assert "step-00000000 holds weights only, no run that could go on: start from it with model.checkpoint" in text
    raw = raw_config(tmp_path / "next", {"checkpoint": str(tmp_path / "run/checkpoints/step-00000000")}, training={"steps": 1})
    assert main(["train", str(write_config(tmp_path / "next.yaml", raw))]) == 0
    assert read_status(tmp_path / "next") == {"outcome": "done", "step": 1}


def test_damaged_weights_are_neither_exported_nor_used(tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = first / "checkpoints/step-00000003/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(bytes(content))
    out = str(tmp_path / "out")
    for command in (
        ["export", str(first), out],
        ["export", "--to", "megatron", str(first), out],
        ["generate", "--checkpoint", str(first), "--prompt", "a"],
    ):
        assert main(command) == 1
        assert f"{file} is damaged" in capsys.readouterr().err
        assert not Path(out).exists()
    assert main(["export", str(first), out, "--no-verify"]) == 0


def test_commands_do_not_write_where_they_should_not(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["export", str(first), "s3://bucket/x"], ["export", "--to", "megatron", str(first), "memory://x"]):
        assert main(command) == 1
        assert f"{command[-1]}: what this command writes is a local folder" in capsys.readouterr().err
    assert main(["export", str(first), "hf"]) == 0
    assert main(["import", "hf", str(first / "checkpoints/step-00000003"), "--overwrite"]) == 1
    assert "is the checkpoint of a run, so it is no earlier checkpoint and is not deleted" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "first.yaml", "hf"]
