"""The real commands on a GPU: train, save behind the steps, resume, change the device and the layout, export, generate."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_llm.config import parse_config
from megatron_llm.data.stream import build_train_stream
from tests.gpu.shared_gpu import ROOT, run_ranks_on_one_gpu
from tests.runs import TINY
from tests.training.commands import environment, read_metrics, read_status, write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STEPS = 8
DEVICE = "cuda"


def config_in(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run of eight steps in float64, with a checkpoint after every second one."""
    folder.mkdir(exist_ok=True)
    raw = {
        **TINY,
        "training": {**TINY["training"], "steps": STEPS},
        "lr_schedule": {"kind": "constant"},
        "checkpoint": {"every_steps": 2},
        "logging": {"run_dir": str(folder / "run"), "trace_steps": [3]},
        "device": DEVICE,
        **sections,
    }
    return write_config(folder / "config.yaml", raw)


def command(*arguments: str) -> str:
    """Run a `megatron-llm` command in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_llm", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_and_norms(run: Path) -> list[list[float]]:
    """Of each step of a run that is done."""
    assert read_status(run)["outcome"] == "done"
    return [[line["loss"], line["grad_norm"]] for line in read_metrics(run) if "loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    expected = losses_and_norms(other)
    assert len(expected) == STEPS
    assert losses_and_norms(one) == [pytest.approx(pair, rel=1e-9) for pair in expected]


def test_a_run_goes_on_from_gpu_to_cpu_and_back_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = config_in(tmp_path / "whole", device="cpu")
    command("train", str(whole))
    parts = config_in(tmp_path / "parts")
    command("train", str(parts), "training.steps=3")
    command("train", str(parts), "training.steps=5", "device=cpu")
    command("train", str(parts))
    assert_same_run(tmp_path / "parts" / "run", tmp_path / "whole" / "run")
    assert list((tmp_path / "parts" / "run" / "traces").glob("*.json"))


def test_ranks_over_nccl_save_and_go_on_in_another_layout(tmp_path: Path) -> None:
    whole = config_in(tmp_path / "whole", device="cpu")
    command("train", str(whole))
    parts = config_in(tmp_path / "parts", training={**TINY["training"], "steps": STEPS, "check_replicas_every": 2})
    for number, (steps, *layout) in enumerate([(3, "parallel.tensor_parallel=2"), (5,), (STEPS, "parallel.pipeline_parallel=2")]):
        arguments = ["-m", "megatron_llm", "train", str(parts), f"training.steps={steps}", *layout]
        run_ranks_on_one_gpu(2, *arguments, log=tmp_path / f"log{number}")
    assert_same_run(tmp_path / "parts" / "run", tmp_path / "whole" / "run")


def test_weights_exported_from_a_gpu_are_those_that_it_trained(tmp_path: Path) -> None:
    """`transformers` on the CPU finds the loss that the engine found on the GPU at the end."""
    from transformers import AutoModelForCausalLM

    config = config_in(tmp_path, precision={"compute": "bfloat16"})
    command("train", str(config))
    command("export", str(tmp_path / "run"), str(tmp_path / "hf"))
    command("train", str(config), f"training.steps={STEPS + 1}")
    expected, _ = losses_and_norms(tmp_path / "run")[-1]
    stream = build_train_stream(parse_config(yaml.safe_load(config.read_text())))
    batch = stream.batch(range(STEPS * 8, STEPS * 8 + 8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    losses = []
    for start, stop in itertools.pairwise(batch.cu_seqlens):
        with torch.no_grad():
            logits = model(input_ids=batch.tokens_T[None, start:stop]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels_T[start:stop], reduction="none")
        losses.append((loss * batch.weights_T[start:stop]).sum())
    assert float(sum(losses) / batch.weights_T.sum()) == pytest.approx(expected, rel=1e-2)
