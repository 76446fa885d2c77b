"""The folder of a run: who may write to it, what it says about the run's outcome. Called by `training/loop.py`, `hang_watch.py`.

`RUN/status.json` carries the outcome (running, done, stopped, failed with the reason), because torchrun turns every exit
code but 0 into 1. `RUN/lock` keeps two runs from writing to the same folder: ranks can outlive a launcher that was killed.
Ranks that a launcher has restarted wait for it, as those before may be about to end on another node.
`RUN/starts.jsonl` has a line for every time that training began: from which step, on what, and what had become of the run before.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml

from megatron_llm.config import Config
from megatron_llm.ops.storage import Folder, LocalFolder, open_folder

logger = logging.getLogger("megatron_llm")

_PATIENCE_SECONDS = 120.0  # a launcher gives ranks 30 s to end, and a file server 90 s to a node that is gone


def checkpoints_folder(config: Config) -> Folder:
    """Where the checkpoints of a run lie. Raises ValueError for a URL that cannot be used."""
    return open_folder(config.checkpoint.path or Path(config.logging.run_dir) / "checkpoints")


def entered_since(config: Config, launched_at: float) -> bool:
    """Whether a run has entered the folder after a launch that began at `launched_at` (`time.monotonic()`)."""
    try:
        entered = (Path(config.logging.run_dir) / "lock").stat().st_mtime
    except OSError:
        return False
    return time.time() - entered <= time.monotonic() - launched_at


def restarted(config: Config) -> Config:
    """The config of ranks that a launcher has started again: `checkpoint.resume: never` was meant for the first start."""
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "auto"})})


class RunFolder:
    """Context manager around a run. Rank 0 makes and locks the folder; any rank that fails says so in the status.

    Entering raises ValueError if the folder cannot be written or another run holds it.

    restarted: whether these ranks replace others of the same run, for whose end the lock is waited for.
    """

    def __init__(self, config: Config, rank: int, restarted: bool = False):
        self.config, self.rank, self.restarted = config, rank, restarted
        self.path = Path(config.logging.run_dir)
        self._lock: TextIO | None = None
        self._speaks = False  # not of a folder that another run may be writing to
        self._before: dict[str, Any] = {}  # the status that an earlier start has left

    def __enter__(self) -> RunFolder:
        if self.rank == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = self._locked()
                self.joined()
                self._before = self._status()
                if self.config.checkpoint.resume == "never":
                    self._before = {}
                    self._set_aside_earlier_run()
                self.report("running")
            except OSError as error:
                raise ValueError(f"logging.run_dir: {self.path} cannot be written: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self.path.is_dir() and self._speaks:
            self.fail("; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        if self._lock is not None:
            self._lock.close()

    def joined(self) -> None:
        """This rank belongs to the run that holds the folder, and may say in the status what happened to it."""
        self._speaks = True

    def write_config(self, config: Config) -> None:
        """Say what the run was accepted with."""
        raw = config.model_dump(mode="json")
        if config.checkpoint.path is not None:  # who reads this may be elsewhere
            raw["checkpoint"]["path"] = str(checkpoints_folder(config).absolute())
        text = yaml.safe_dump(raw, sort_keys=False)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def record_start(self, step: int, world_size: int, device: str) -> None:
        """Append to starts.jsonl that the run begins, or goes on, after `step`. `device`: what rank 0 computes on.

        A line without `before` is the first of a run; those above it are of one that `resume: never` has set aside.
        """
        parallel = self.config.parallel
        sizes = {"tp": parallel.tensor_parallel, "pp": parallel.pipeline_parallel, "cp": parallel.context_parallel}
        layout = sizes | {"dp": world_size // math.prod(sizes.values())}
        line = {"step": step, "time": round(time.time(), 3), "world_size": world_size, "layout": layout, "device": device}
        if self._before:
            line["before"] = {key: self._before[key] for key in ("outcome", "step", "reason") if key in self._before}
        with (self.path / "starts.jsonl").open("a+b") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"  # by a crash
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")

    def report(self, outcome: str, **details: Any) -> None:
        """Replace status.json in one piece."""
        temporary = self.path / f"status.json.{self.rank}.tmp"
        temporary.write_text(json.dumps({"outcome": outcome, **details}) + "\n", encoding="utf-8")
        temporary.replace(self.path / "status.json")

    def fail(self, reason: str, replaces: str | None = None) -> bool:
        """Say why this rank failed, and return True, unless another reason than its own `replaces` is there.

        Whatever comes after a first failure is a consequence of it.
        """
        if self._failure() not in (None, f"rank {self.rank}: {replaces}"):
            return False
        self.report("failed", reason=f"rank {self.rank}: {reason}")
        return True

    def _failure(self) -> str | None:
        """The reason that has been reported."""
        status = self._status()
        return str(status["reason"]) if status.get("outcome") == "failed" and "reason" in status else None

    def _status(self) -> dict[str, Any]:
        """What status.json says; nothing if it is not there or damaged."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def _locked(self) -> TextIO:
        """The open lock file; the lock ends with the process, however it ends."""
        file = (self.path / "lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + (_PATIENCE_SECONDS if self.restarted else 0.0)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise ValueError(
                    f"logging.run_dir: another run is writing to {self.path} (process {holder}); "
                    "wait for it, end it, or choose another folder"
                ) from None
            except OSError as error:  # some network file systems have no locks
                logger.warning("%s cannot be locked (%s): make sure that no other run writes to it", self.path, error)
            break
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        return file

    def _set_aside_earlier_run(self) -> None:
        """With `resume: never` in a used folder: rename what the earlier run left, so that nothing mixes or is lost."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        checkpoints = checkpoints_folder(self.config)
        if isinstance(checkpoints, LocalFolder):
            self._move_away(checkpoints.path, stamp)
        elif checkpoints.names():
            raise ValueError(
                f"checkpoint.resume: never, but {checkpoints} holds checkpoints of an earlier run, and renaming would copy them; "
                "choose another checkpoint.path"
            )
        for name in ("metrics.jsonl", "tensorboard", "sinks"):
            self._move_away(self.path / name, stamp)

    @staticmethod
    def _move_away(path: Path, stamp: str) -> None:
        if path.exists():
            target = path.with_name(f"{path.name}.before-{stamp}")
            while target.exists():  # the second one within a second
                target = target.with_name(f"{target.name}-again")
            path.rename(target)
            logger.warning("checkpoint.resume is never: moved %s of an earlier run to %s", path, target)
