"""Ranks as plain processes without a launcher, which show their own exit codes; and runs in which something is planted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port

SECONDS = 300.0  # in which whatever a test waits for must have happened, on a machine with other work to do too


# The start of a script that is `megatron-llm`. Ranks need seconds to import torch, and on a busy machine not the same number:
# they wait for each other, so that a short limit on exchanges is not spent on that.
MEETING = """
import glob, os, sys, time
import megatron_llm.training.loop
from megatron_llm.cli.main import main
rank = int(os.environ.get("RANK", "0"))
open(f"{folder}/met-{{rank}}", "w").close()
while len(glob.glob("{folder}/met-*")) < int(os.environ.get("WORLD_SIZE", "1")): time.sleep(0.01)
"""


def planted(folder: Path, body: str) -> Path:
    """A script that is `megatron-llm`, but `body`, which may use `rank` and `calls`, runs before every stage's forward."""
    script = folder / "planted.py"
    script.write_text(
        MEETING.format(folder=folder) + "from megatron_llm.models.decoder import DecoderStage\n"
        "forward, calls = DecoderStage.forward, 0\n"
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


class _Logged(subprocess.Popen[str]):
    """A process that writes to a file: it never waits for a reader, as at a pipe, nor does a reader for what it has started."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 - it lives as long as this
        super().__init__(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT, text=True)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        self._log.seek(0)
        return self._log.read(), ""


@contextmanager
def launched(*command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher, whose log is its stdout. At the end of the context it and all that it started are killed."""
    process = _Logged(command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **variables})
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def descendants(process: int, name: str = "") -> list[int]:
    """Processes that a process has started, and those that they have, whose command line has `name`."""
    found: list[int] = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if name in " ".join(child.cmdline()):
                    found.append(child.pid)
    return found


def ranks_of(launcher: int) -> list[int]:
    """The processes of the ranks that run under a launcher."""
    found: list[int] = []
    for pid in descendants(launcher, " train "):
        with suppress(psutil.NoSuchProcess):
            if "RANK" in psutil.Process(pid).environ():
                found.append(pid)
    return found


def kill_tree(process: int) -> None:
    """Kill a process and all that it has started; it is stopped first, so that it starts no more."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGSTOP)
    for pid in (*descendants(process), process):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(ranks: list[subprocess.Popen[str]], seconds: float = SECONDS) -> list[tuple[int, str]]:
    """Exit code and what was said on stderr of every rank, in rank order."""
    deadline = time.monotonic() + seconds
    said = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]


def insist(process: subprocess.Popen[Any], number: signal.Signals, gap: float) -> None:
    """Send a signal every `gap` seconds until the process ends: who is late to hear one takes the next for the same request."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None:
        assert time.monotonic() < deadline, f"it did not end by {number.name}"
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(gap)


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
    while lines_of(run / "metrics.jsonl") < steps:
        assert time.monotonic() < deadline, f"no {steps} steps within {SECONDS:g} s"
        assert all(process.poll() is None for process in processes), "a process has ended"
        time.sleep(0.05)


def lines_of(file: Path) -> int:
    """How many whole lines a file has to which another process appends; 0 if it is not there."""
    return file.read_bytes().count(b"\n") if file.exists() else 0
