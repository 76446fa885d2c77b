"""Real processes without a launcher, so that rank 0 holds the store of the run: whoever is lost is named by all that are left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.runs import config_of

SECONDS = 60  # in which all must have ended; the time limit of collectives is 5


def _start(folder: Path, world: int, **parallel: object) -> list[subprocess.Popen[str]]:
    config = config_of(
        parallel={**parallel, "timeout_seconds": 5.0},
        training={"steps": 100_000},
        logging={"run_dir": str(folder / "run")},
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "megatron_llm", "train", str(path)]
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "how", "parallel"),
    [
        (2, signal.SIGKILL, {"pipeline_parallel": 3}),
        (1, signal.SIGSTOP, {"pipeline_parallel": 3}),
        (0, signal.SIGSTOP, {"pipeline_parallel": 3}),
        (0, signal.SIGKILL, {"pipeline_parallel": 3}),
        (3, signal.SIGKILL, {"pipeline_parallel": 2}),
        (3, signal.SIGSTOP, {}),
    ],
)
def test_who_is_lost_is_named_by_all_others(tmp_path: Path, lost: int, how: signal.Signals, parallel: dict[str, object]) -> None:
    world = 3 if parallel == {"pipeline_parallel": 3} else 4
    ranks = _start(tmp_path, world, **parallel)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + SECONDS
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks[lost].send_signal(how)
        said = {rank: process.communicate(timeout=SECONDS)[1] for rank, process in enumerate(ranks) if rank != lost}
    finally:
        for process in ranks:
            process.kill()
    expected = f"rank {lost} of the run gave no sign of life"
    if lost == 0:  # and nobody can be asked
        expected = "nothing more is known: the store of the run is gone, which its rank 0 or its launcher holds"
    for rank, text in said.items():
        assert expected in text, f"rank {rank}:\n{text[-3000:]}"
