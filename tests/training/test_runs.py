"""Whole runs under torchrun: resume, signals, evaluation, and the round trip of a Hugging Face folder."""

from __future__ import annotations

import copy
import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_llm.checkpoint.load import Checkpoint, open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import parse_config
from megatron_llm.data.stream import build_valid_streams
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.loop import Run, _steps
from megatron_llm.training.metrics import Metrics
from megatron_llm.training.signals import StopRequest
from tests.launch import launch
from tests.runs import TINY
from tests.training.commands import environment, read_metrics, read_status, run_train, train_command, write_config
from tests.training.planted import fresh_run
from tests.training.processes import SECONDS, launched, wait_for_steps


def tiny(run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(TINY)
    raw["precision"] = {"compute": "float32"}
    raw["logging"] = {"run_dir": str(run)}
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return raw


def state_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    tensors = {}
    for kind in checkpoint.kinds:
        source = checkpoint.source(kind)
        for name, info in checkpoint.tensors(kind).items():
            tensors[f"{kind}/{name}"] = source.read(Part(name, info.shape, ()), Box.full(info.shape))
    return tensors


def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    sections = {
        "parallel": {"tensor_parallel": 2},
        "training": {"steps": 12, "eval_every": 5, "eval_rows": 6},
        "lr_schedule": {"decay_steps": 12},
    }
    whole = write_config(tmp_path / "whole.yaml", tiny(tmp_path / "whole", **sections))
    parts = write_config(tmp_path / "parts.yaml", tiny(tmp_path / "parts", **sections))
    run_train(4, whole)
    run_train(4, parts, "training.steps=6")
    run_train(4, parts)

    expected = state_of(open_checkpoint(tmp_path / "whole/checkpoints/step-00000012"))
    actual = state_of(open_checkpoint(tmp_path / "parts/checkpoints/step-00000012"))
    assert actual.keys() == expected.keys() and {name.split("/")[0] for name in expected} == {"weights", "m", "v"}
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []

    def numbers(run: str) -> list[tuple[Any, ...]]:
        return [
            tuple(line.get(key) for key in ("step", "loss", "grad_norm", "lr", "tokens")) for line in read_metrics(tmp_path / run)
        ]

    assert numbers("parts") == numbers("whole")
    assert [line[0] for line in numbers("whole")] == list(range(13))
    losses = [(line["step"], line["valid_loss"]) for line in read_metrics(tmp_path / "whole") if "valid_loss" in line]
    assert [step for step, _ in losses] == [0, 5, 10, 12]
    assert read_status(tmp_path / "parts") == {"outcome": "done", "step": 12}


def _train_and_look(config: str) -> int:
    """Fails if threads of the process groups or of their store outlive the run."""
    code = main(["train", config])
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            names.append((task / "comm").read_text().strip())
    assert not [name for name in names if name.startswith(("gloo", "pt_"))], names
    return code


@pytest.mark.parametrize("parallel", [{}, {"pipeline_parallel": 2}])
def test_nothing_of_the_groups_is_left(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """A thread of gloo that is at work while the interpreter ends would abort a process whose run is done."""
    config = write_config(tmp_path / "run.yaml", tiny(tmp_path / "run", parallel=parallel, training={"steps": 2}))
    endings = launch(2, _train_and_look, str(config))
    assert [ending.code for ending in endings] == [0, 0], endings[0].log


def test_a_signal_saves_and_the_next_start_continues(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sections = {"parallel": {"pipeline_parallel": 2}, "training": {"steps": 100_000}, "lr_schedule": {"kind": "constant"}}
    config = write_config(tmp_path / "run.yaml", tiny(run, **sections))
    with launched(*train_command(2, config), **environment()) as process:
        wait_for_steps(run, 4, process)
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0, "a stopped run is not a finished one"
    status = read_status(run)
    assert status["outcome"] == "stopped", log
    step = status["step"]
    assert open_checkpoint(run / f"checkpoints/step-{step:08}").run_state["step"] == step == read_metrics(run)[-1]["step"]
    run_train(2, config, f"training.steps={step + 2}")
    assert [line["step"] for line in read_metrics(run)] == list(range(step + 3))
    assert read_status(run) == {"outcome": "done", "step": step + 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("tied", [False, True])
def test_import_zero_steps_export_is_the_same_folder(tmp_path: Path, dtype: torch.dtype, spelling: str, tied: bool) -> None:
    torch.manual_seed(0)
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    settings = {key: value for key, value in TINY["model"].items()}
    hf_config = LlamaConfig(**settings, tie_word_embeddings=tied, rope_parameters={**scaling, "rope_theta": 5e5})
    LlamaForCausalLM(hf_config).to(dtype).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    raw = json.loads(file.read_text()) | {"custom_field": {"kept": [1, 2, None]}, "_name_or_path": "somewhere"}
    if spelling == "old":
        del raw["rope_parameters"]
        raw["torch_dtype"] = raw.pop("dtype")
        raw |= {"rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}}
    file.write_text(json.dumps(raw, indent=2))

    config = tiny(tmp_path / "run", training={"steps": 0}) | {"model": {"hf": str(tmp_path / "hf")}}
    assert main(["train", str(write_config(tmp_path / "run.yaml", config))]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0

    assert json.loads((tmp_path / "out/config.json").read_text()) == raw
    with (
        safe_open(tmp_path / "hf/model.safetensors", "pt") as before,
        safe_open(tmp_path / "out/model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # noqa: SIM118
            a, b = before.get_tensor(name), after.get_tensor(name)
            assert a.dtype == b.dtype == dtype and a.shape == b.shape and torch.equal(a, b), name


def test_a_run_that_has_not_stepped_yet_writes_its_first_line_once(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny(tmp_path / "run"))
    assert main(["train", str(config), "training.steps=0"]) == 0
    assert main(["train", str(config), "training.steps=2"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]


def test_a_batch_without_weight_is_skipped(tmp_path: Path) -> None:
    """With one-token documents no position has a next token, so nothing carries loss: no update, and it is said."""
    from megatron_llm.data.indexed import token_dtype
    from megatron_llm.data.writer import IndexedWriter

    with IndexedWriter(tmp_path / "ones", token_dtype(97)) as writer:
        for token in range(90):
            writer.add_document(np.array([token]))
    data = {"kind": "pretrain", "train": [{"path": str(tmp_path / "ones")}]}
    config = write_config(tmp_path / "run.yaml", tiny(tmp_path / "run", data=data, training={"steps": 3, "global_batch_size": 4}))
    assert main(["train", str(config)]) == 0
    lines = read_metrics(tmp_path / "run")
    assert [(line["skipped"], line["loss"]) for line in lines] == [(True, None)] * 3
    assert open_checkpoint(tmp_path / "run/checkpoints/step-00000003").run_state["updates"] == 0


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    """Twelve steps stay within bfloat16's rounding of the float32 run, and masters are stored in float32."""
    losses = {}
    for compute in ("bfloat16", "float32"):
        run = tmp_path / compute
        sections = {"precision": {"compute": compute}, "training": {"steps": 12}, "optimizer": {"lr": 1e-3}}
        assert main(["train", str(write_config(tmp_path / "run.yaml", tiny(run, **sections)))]) == 0
        losses[compute] = [line["loss"] for line in read_metrics(run) if "loss" in line]
        checkpoint = open_checkpoint(run / "checkpoints/step-00000012")
        assert {info.dtype for kind in checkpoint.kinds for info in checkpoint.tensors(kind).values()} == {"F32"}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3)
    assert losses["bfloat16"] != losses["float32"]


class StopAfter:
    """A request to stop that comes while a step is taken."""

    def __init__(self, run: Run, step: int):
        self.run, self.step, self.reason = run, step, "planted"

    @property
    def requested(self) -> bool:
        return self.run.state.step == self.step - 1


def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_goes_on(tmp_path: Path) -> None:
    sections = {"training": {"steps": 6, "eval_every": 3, "eval_rows": 6}, "model": {**TINY["model"], "num_hidden_layers": 1}}
    whole, parts = (tiny(tmp_path / name, **sections) for name in ("whole", "parts"))
    assert main(["train", str(write_config(tmp_path / "whole.yaml", whole))]) == 0
    run = fresh_run(parse_config(parts))
    run.valid_streams = build_valid_streams(run.config)
    run.stop = cast(StopRequest, StopAfter(run, 3))
    assert _steps(run) and "valid_loss" not in read_metrics(tmp_path / "parts")[-1]
    assert main(["train", str(write_config(tmp_path / "parts.yaml", parts))]) == 0
    kept = ("step", "tokens", "loss", "valid_loss", "valid_loss/synthetic")
    lines = [[{key: line.get(key) for key in kept} for line in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0] if line["valid_loss"]] == [0, 3, 6]


def test_lines_of_going_back_stay_and_lines_of_undone_steps_go(tmp_path: Path) -> None:
    config = parse_config(tiny(tmp_path))
    lines = [{"step": 9}, {"step": 12, "back_to_step": 9}, {"step": 10}, {"step": 11}, {"step": 14, "back_to_step": 11}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{cut of\xff", "latin-1")
    Metrics(config, 1, torch.device("cpu"), 10)
    assert read_metrics(tmp_path) == lines[:3]
