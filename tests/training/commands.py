"""Running the real commands from tests: in this process, or on several ranks under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_llm.cli.main import main
from tests.launch import launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def write_config(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def train_command(world: int, config: Path, *overrides: str) -> list[str]:
    launcher = [*TORCHRUN, "--nproc-per-node", str(world)] if world > 1 else [sys.executable]
    return [*launcher, "-m", "megatron_llm", "train", str(config), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_train(world: int, config: Path, *overrides: str) -> None:
    """Train to the end; the logs are the failure's message."""
    endings = launch(world, main, ["train", str(config), *overrides])
    assert [ending.code for ending in endings] == [0] * world, "\n".join(ending.log for ending in endings)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
