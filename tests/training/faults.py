"""Faults at a chosen call into the file system, in a process that is about to train.

`train` replaces functions of the `os` module by ones that count the calls that touch the checkpoints of a run, by a path or by
an open file, while one of its steps is saved. At the chosen one the process dies as from kill -9, or the call fails.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_llm.cli.main import main
from tests.training.blends import KEEP_LAST

CHANGING = ("open", "write", "fsync", "close", "replace", "rename", "unlink", "remove", "rmdir", "mkdir")
"""The calls that are counted: all by which a save changes files, or makes sure that they are changed."""


@dataclass(frozen=True)
class Fault:
    """What happens to `rank` at its call number `call`, from 0, in the save of `step`.

    how: "before": it is killed before the call. "torn": it is killed after the call, which of a write does only half.
        Or the name of an error, such as ENOSPC: the call does nothing and fails.
    """

    rank: int
    step: int
    call: int
    how: Literal["before", "torn"] | str = "before"


class _Counter:
    """Counts this process's calls in the save of a step, and notes each in `record`: `NAME PATH`, a line a call.

    Those are the calls that touch the step's folder and, from then on, the folders of old checkpoints that it replaces; and
    the folder of all checkpoints, until the next step's is touched.
    """

    def __init__(self, checkpoints: Path, record: Path, step: int, fault: Fault | None):
        self.checkpoints, self.step, self.fault = os.path.realpath(checkpoints), step, fault
        self.calls, self.begun, self.ended = 0, False, False
        self.lock = threading.Lock()
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.real = {name: getattr(os, name) for name in CHANGING}
        for name in CHANGING:
            setattr(os, name, self._counting(name))

    def _counting(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            paths = [_touched(args[0], kwargs.get("dir_fd"))]
            paths += [_touched(args[1], None)] if name in ("replace", "rename") else []
            path = next((path for path in paths if path.startswith(self.checkpoints)), "")
            if not path:
                return real(*args, **kwargs)
            with self.lock:  # one call after the other, so that the number is that of the record
                here = self._counts(path)
                if here:
                    self.real["write"](self.record, f"{name} {os.path.relpath(path, self.checkpoints)}\n".encode())
                    self.calls += 1
            if here and self.fault and self.calls == self.fault.call + 1:
                self._happen(self.fault.how, name, real, args, kwargs)
            return real(*args, **kwargs)

        return call

    def _counts(self, path: str) -> bool:
        number = re.search(r"step-(\d{8,})", path[len(self.checkpoints) :])
        step = int(number[1]) if number else None
        self.begun |= step == self.step
        self.ended |= step is not None and step > self.step
        if step is None:
            return self.begun and not self.ended
        return step == self.step or (self.begun and step <= self.step - KEEP_LAST)

    def _happen(self, how: str, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if how == "torn":
            real(args[0], memoryview(args[1])[: len(args[1]) // 2]) if name == "write" else real(*args, **kwargs)
        elif how != "before":
            number = getattr(errno, how)
            raise OSError(number, os.strerror(number))
        os.kill(os.getpid(), signal.SIGKILL)


def _touched(file: Any, folder: int | None) -> str:
    """The path that a call is about: an open file's, or one given by name, maybe in an open folder."""
    if isinstance(file, int):
        try:
            return os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            return ""
    path = os.fsdecode(file)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd(), path)


def train(arguments: list[str], checkpoints: Path, step: int, fault: Fault | None) -> int:
    """`megatron-llm train` on a rank of `tests.launch.launch`; what is counted goes to `calls` in the run folder."""
    rank = int(os.environ["RANK"])
    _Counter(checkpoints, record_of(checkpoints, rank), step, fault if fault and fault.rank == rank else None)
    return main(["train", *arguments])


def record_of(checkpoints: Path, rank: int) -> Path:
    return checkpoints.parent / f"calls-{rank}"


def counted(checkpoints: Path, rank: int) -> list[str]:
    """What a rank of the last `train` called in the save, in order, as `NAME PATH`. Forgets it."""
    record = record_of(checkpoints, rank)
    lines = record.read_text().splitlines()
    record.unlink()
    return lines
