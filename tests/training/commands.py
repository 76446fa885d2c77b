"""Running the real commands from tests: in this process, or on several ranks under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

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
    """Train to the end; the log is the failure's message."""
    done = subprocess.run(
        train_command(world, config, *overrides), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())
