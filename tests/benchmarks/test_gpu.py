"""The benchmarks of kernels run, as far as that can be without a GPU: tiny, interpreted, in processes of their own.

A part whose kernels the package does not have is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.all import out_file
from benchmarks.gpu.measure import Compared, compare
from benchmarks.gpu.table import document, goals

ROOT = Path(__file__).parents[2]
PARTS = {"activation": 6, "norm": 6, "rope": 4, "cross_entropy": 5, "optimizer": 4, "attention": 19}
NEEDS = {"optimizer": "update"}


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("part", PARTS)
def test_every_case_of_a_part_runs_and_is_right(part: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(f"megatron_llm.ops.triton.{NEEDS.get(part, part)}") is None:
        pytest.skip("the package has no such kernel")
    out = tmp_path / "gpu.json"
    _run("benchmarks.gpu.all", "--smoke", "--out", str(out), "--only", part)
    entry = json.loads(out.read_text())["parts"][part]
    assert entry["absent"] == {} and len(entry["cases"]) == PARTS[part]
    assert all(case["errors"] and not case["wrong"] for case in entry["cases"])


@pytest.mark.slow
def test_a_training_step_is_measured_and_a_second_run_adds_to_the_file(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    _run("benchmarks.gpu.train_step", "--smoke", "--out", str(out))
    result = json.loads(out.read_text())
    (case,) = result["parts"]["train_step"]["cases"]
    assert case["peers"]["transformers, mixed"]["speed_ratio"]["median"] > 0
    _run("benchmarks.gpu.all", "--smoke", "--out", str(out), "--only", "activation", "--minutes", "0")
    parts = json.loads(out.read_text())["parts"]
    assert parts["train_step"] == result["parts"]["train_step"]
    assert all(found == {"absent": "no time was left"} for found in parts["activation"]["cases"][0]["peers"].values())
    assert "| SwiGLU forward |" in _run("benchmarks.gpu.table", str(out))


def test_what_is_off_by_more_than_its_roundings_is_wrong() -> None:
    exact = torch.tensor([1.0, -300.0], dtype=torch.float64)
    assert compare([Compared("y", exact.bfloat16(), exact)])["wrong"] == []
    assert compare([Compared("y", exact.float() + 0.01, exact)])["wrong"] == ["y"]
    assert compare([Compared("y", (exact * 1.02).bfloat16(), exact)])["wrong"] == ["y"]
    assert compare([Compared("y", exact.float() * torch.nan, exact)])["wrong"] == ["y"]


def _case(name: str, seconds: float, peers: dict[str, float], **more: Any) -> dict[str, Any]:
    found = {peer: {"seconds": took} for peer, took in peers.items()}
    return {"name": name, "seconds": seconds, "errors": {"y": 1e-7}, "wrong": [], "notes": {}, "peers": found, **more}


def test_the_table_says_which_goals_hold() -> None:
    attention = _case("attention 8k forward", 1.0, {"cudnn": 0.9, "sdpa": 2.0}, flops=4e14, per_second=4e14, share=0.5)
    attention["notes"] = {"auto": "triton"}
    step = {"name": "1B at 4k", "ours": {"tokens_per_second": 5e4, "mfu": 0.56, "peak_bytes": 2**34, "seconds": [1.0]}}
    step["peers"] = {"transformers": {"absent": "OutOfMemoryError: of memory"}}
    result = {
        "conditions": dict.fromkeys(("date", "device", "torch", "cuda", "triton", "liger_kernel", "transformers"), "x")
        | {"smoke": False},
        "floors": {"bytes_per_second": 4e12, "flops_per_second": 8e14},
        "parts": {
            "norm": {"cases": [_case("RMSNorm", 1.0, {"Liger": 0.8}, bytes=1e12, per_second=3.6e12, share=0.9)], "absent": {}},
            "attention": {"cases": [attention], "absent": {}},
            "train_step": {"cases": [step], "absent": {"3B at 8k": "OutOfMemoryError"}},
        },
    }
    assert list(goals(result).values()) == [
        "holds",
        "RMSNorm: 0.80 of it",
        "not measured",
        "forward: 0.89 of it",
        "attention 8k forward: 0.93 of it",
        "holds",
        "not measured",
    ]
    text = document(result)
    assert "| RMSNorm | 1000.000 | 3,600 GB/s | 90% | 1.0e-07 | 0.80x |" in text
    assert "| **1B at 4k** | 50,000 | 56.0% | 16.0 | |" in text and "3B at 8k: absent (OutOfMemoryError)" in text


def test_a_smoke_run_does_not_write_where_the_figures_are() -> None:
    assert out_file(None, smoke=False) == Path("benchmarks/results/gpu.json")
    assert out_file(None, smoke=True) == Path("runs/gpu_smoke.json")
    assert out_file(Path("here.json"), smoke=True) == Path("here.json")


def test_the_table_without_a_file_says_how_it_is_called() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.table"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "usage" in done.stderr and "FILE" in done.stderr
