"""What a run tells: one log line and one JSON line a step. Called by `training/loop.py`, rank 0 only.

The file is what holds; `training/sinks.py` shows it elsewhere. Nothing of this can end a run: what cannot be written is missing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_llm.config import Config
from megatron_llm.parallel.traffic import Traffic
from megatron_llm.planning.flops import model_flops_per_token, peak_flops
from megatron_llm.training.sinks import close_all, make_feeds, step_of
from megatron_llm.training.step import RunState, StepResult

logger = logging.getLogger("megatron_llm")


def setup_logging(rank: int) -> None:
    """Rank 0 says what happens; the others only what went wrong, with their number."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


class Metrics:
    """`RUN/metrics.jsonl`, the log lines of a run, and what feeds its sinks.

    Args:
        start: step that the run continues from; later lines, of steps that will be taken again, are removed.
    """

    def __init__(self, config: Config, world_size: int, device: torch.device, start: int):
        self.config, self.world_size, self.device = config, world_size, device
        self.path = Path(config.logging.run_dir) / "metrics.jsonl"
        self.flops_per_token = model_flops_per_token(config.model, config.training.sequence_length, config.peft)
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.mean_row_seconds: float | None = None
        self._complained = False
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.feeds = make_feeds(config, {"world_size": world_size, "device_name": device_name, "torch": torch.__version__})
        self.forget_after(start or -1)  # step 0 is evaluated again

    def forget_after(self, step: int) -> None:
        """Remove the lines of later steps, which will be taken again."""
        if self.feeds:
            lines = [json.loads(line) for line in _lines(self.path) if _step_of(line) < math.inf]
            kept = [line for line in lines if step_of(line) <= step]
            undone = [line for line in lines if step_of(line) > step]
            for feed in self.feeds:
                feed.begin(step, kept, undone)
        self._change_file(lambda: forget_lines_after(self.path, step))

    def add(self, state: RunState, values: dict[str, Any]) -> None:
        """Add values to the line of the last step, or write them as a line if it has none."""
        lines, line = _lines(self.path), dict[str, Any]()
        if lines and "back_to_step" not in lines[-1] and _step_of(lines[-1]) == state.step:
            line = json.loads(lines.pop())
        clean = _clean({"step": state.step, "tokens": state.tokens} | values)
        new = {name: value for name, value in clean.items() if name not in line or line[name] != value}
        if line:  # in one piece: whoever is killed meanwhile has one or the other
            self._change_file(lambda: _replace(self.path, [*lines, json.dumps(line | clean)]))
        else:
            self._change_file(lambda: append_line(self.path, clean))
        self._show({"step": state.step} | new)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line. Numbers that are not finite become null: JSON has no nan."""
        clean = _clean(values)
        self._change_file(lambda: append_line(self.path, clean))
        self._show(clean)

    def _change_file(self, change: Callable[[], None]) -> None:
        """Do that; if it cannot be done, say so once."""
        try:
            change()
        except OSError as error:
            if not self._complained:
                logger.warning("%s cannot be written, lines are missing from now on: %s", self.path, error)
            self._complained = True
        else:
            self._complained = False

    def _show(self, line: dict[str, Any]) -> None:
        for feed in self.feeds:
            feed.write(line)

    def close(self, failed: bool) -> None:
        """Let the sinks finish, for a limited time."""
        close_all(self.feeds, failed)

    def step(
        self, state: RunState, result: StepResult, seconds: float, traffic: dict[str, Traffic], stall: float = 0.0
    ) -> dict[str, Any]:
        """The metrics of a step, which are also logged.

        traffic: what this rank exchanged in the step, by axis. stall: seconds that training stood still for checkpoints since
        the step before.
        """
        training = self.config.training
        rate = result.rows * training.sequence_length / seconds
        flops = rate * self.flops_per_token / self.world_size
        values = {
            "step": state.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "rows": result.rows,
            "tokens": state.tokens,
            "tokens_per_second": rate,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
            "step_seconds": seconds,
            "memory_peak_bytes": self._memory_peak(),
            "skipped": result.skipped,
            "skipped_steps": state.skipped,
            **({"loss_scale": result.loss_scale} if self.config.precision.compute == "float16" else {}),
            **({"checkpoint_stall_seconds": stall} if stall else {}),
            **{f"traffic_bytes/{axis}": round(moved.sent) for axis, moved in traffic.items() if moved.payload},
        }
        # Smoothed, so that one slow step does not shake the estimate; the first steps of a process are slower anyway.
        of_row = seconds / result.rows  # batches may grow
        self.mean_row_seconds = of_row if self.mean_row_seconds is None else 0.9 * self.mean_row_seconds + 0.1 * of_row
        if state.step % self.config.logging.every_steps == 0 or state.step == training.steps:
            logger.info(self._line(state, values))
        return values

    def _line(self, state: RunState, values: dict[str, Any]) -> str:
        training, steps = self.config.training, self.config.training.steps
        rows_left = training.rows_after(steps - state.step, state.trained_rows) - state.trained_rows
        assert self.mean_row_seconds is not None
        fields = [
            f"step {state.step:>{len(str(steps))}}/{steps}",
            f"loss {values['loss']:.4f}",
            f"grad norm {values['grad_norm']:.3f}",
            f"lr {values['lr']:.2e}",
            f"{values['tokens_per_second']:,.0f} tok/s",
            f"{values['tflops_per_device']:.3g} TFLOP/s" + (f" ({values['mfu']:.1%} MFU)" if values["mfu"] is not None else ""),
            f"{values['memory_peak_bytes'] / 2**30:.1f} GiB",
            f"ETA {_duration(rows_left * self.mean_row_seconds)}",
        ]
        if "loss_scale" in values:
            fields.append(f"loss scale {values['loss_scale']:g}")
        return " | ".join(fields + ["SKIPPED"] * values["skipped"])

    def _memory_peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clean(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append to a file of JSON lines: the whole line or, with OSError, nothing of it."""
    text = json.dumps(line).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if (written := file.write(text)) != len(text):
                raise OSError(errno.ENOSPC, f"{written} of {len(text)} bytes were written")
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def forget_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of JSON lines with steps, if it is there."""
    if path.exists():
        _replace(path, [line for line in _lines(path) if _step_of(line) <= step])


def _lines(path: Path) -> list[str]:
    """Of a file of JSON lines, none if it is not there. A text in one may have line ends of other kinds, such as U+2028."""
    return path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n") if path.exists() else []


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for a line that a crash cut off."""
    try:
        values = json.loads(line)
        return float(values.get("back_to_step", values["step"]))  # what a run went back to, it has not undone
    except (ValueError, KeyError, TypeError, AttributeError):
        return math.inf


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
