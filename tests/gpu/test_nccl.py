"""Layouts over NCCL train as a single process on the CPU does. Several ranks share one GPU (`shared_gpu.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.parallel.grid import Grid
from tests.gpu.layouts import LAYOUTS, losses
from tests.gpu.shared_gpu import run_ranks_on_one_gpu
from tests.runs import config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FOUR_RANKS = "tp2 pp2"


def alone(name: str) -> list[tuple[float, float]]:
    """What one process on the CPU finds: the same training without a layout."""
    sections: dict[str, dict[str, Any]] = {key: value for key, value in LAYOUTS[name].items() if key in ("model", "optimizer")}
    return losses(config_of(**sections), Grid.single(), torch.device("cpu"))


def assert_alike(file: Path, names: list[str]) -> None:
    found = json.loads(file.read_text())
    assert [*found] == names
    for name, steps in found.items():
        tolerance = 1e-2 if "bfloat16" in name else 1e-9
        assert steps == [pytest.approx(list(pair), rel=tolerance) for pair in alone(name)], name


def test_two_ranks(tmp_path: Path) -> None:
    names = [name for name in LAYOUTS if name != FOUR_RANKS]
    run_ranks_on_one_gpu(2, "-m", "tests.gpu.layouts", "cuda", str(tmp_path / "found.json"), *names, log=tmp_path / "log")
    assert_alike(tmp_path / "found.json", names)


def test_four_ranks(tmp_path: Path) -> None:
    run_ranks_on_one_gpu(4, "-m", "tests.gpu.layouts", "cuda", str(tmp_path / "found.json"), FOUR_RANKS, log=tmp_path / "log")
    assert_alike(tmp_path / "found.json", [FOUR_RANKS])
