"""Ranks as plain processes without a launcher, which show their own exit codes; and runs in which something is planted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port
from tests.training.commands import read_metrics

SECONDS = 120.0  # in which whatever a test waits for must have happened, on a machine with other work to do too


def planted(folder: Path, body: str) -> Path:
    """A script that is `megatron-llm`, but `body`, which may use `rank` and `calls`, runs before every stage's forward."""
    script = folder / "planted.py"
    script.write_text(
        "import os, sys, time\n"
        "from megatron_llm.cli.main import main\n"
        "from megatron_llm.models.decoder import DecoderStage\n"
        "forward, rank, calls = DecoderStage.forward, int(os.environ.get('RANK', '0')), 0\n"
        "def planted_forward(*args, **kwargs):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    {body}\n"
        "    return forward(*args, **kwargs)\n"
        "DecoderStage.forward = planted_forward\n"
        "sys.exit(main())\n",
        encoding="utf-8",
    )
    return script


@contextmanager
def started(world: int, config: Path, *overrides: str, script: Path | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks of a run. They are killed at the end of the context."""
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *([str(script)] if script else ["-m", "megatron_llm"]), "train", str(config), *overrides]
    ranks = [
        subprocess.Popen(
            command, env={**shared, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()


@contextmanager
def launched(*command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher, whose log is its stdout. At the end of the context it and all that it started are killed."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **variables}
    process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.communicate()


def descendants(process: int, name: str = "") -> list[int]:
    """Processes that a process has started, and those that they have, whose command line has `name`."""
    try:
        found = psutil.Process(process).children(recursive=True)
        return [child.pid for child in found if name in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def ranks_of(launcher: int) -> list[int]:
    """The processes of the ranks that run under a launcher."""
    return [pid for pid in descendants(launcher, " train ") if "RANK" in psutil.Process(pid).environ()]


def kill_tree(process: int) -> None:
    for pid in (*descendants(process), process):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(ranks: list[subprocess.Popen[str]], seconds: float = SECONDS) -> list[tuple[int, str]]:
    """Exit code and what was said on stderr of every rank, in rank order."""
    deadline = time.monotonic() + seconds
    said = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]


def wait_for_checkpoint(run: Path, step: int, *processes: subprocess.Popen[Any]) -> None:
    """Wait until that of a step, or a later one, has been committed, while none of the processes ends."""
    deadline = time.monotonic() + SECONDS
    while not any(int(path.parent.name[5:]) >= step for path in run.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within {SECONDS:g} s"
        for process in processes:
            assert process.poll() is None, "it ended"
        time.sleep(0.02)


def wait_for_steps(run: Path, steps: int, *processes: subprocess.Popen[Any]) -> None:
    """Wait until so many lines of metrics are there, while none of the processes ends."""
    deadline = time.monotonic() + SECONDS
    while not ((run / "metrics.jsonl").exists() and len(read_metrics(run)) >= steps):
        assert time.monotonic() < deadline, f"no {steps} steps within {SECONDS:g} s"
        assert all(process.poll() is None for process in processes), "a process has ended"
        time.sleep(0.05)
