"""Where metrics go besides `RUN/metrics.jsonl`: TensorBoard and Weights & Biases. Called by `training/metrics.py`, on rank 0.

The file is what holds; a sink follows it. `Feed` runs a sink in a thread of its own, so that neither a slow disk nor a network
that is gone makes training wait, and an error ends the sink and not the run. How far a sink has come is kept in
RUN/sinks/NAME.json: what it has not got by the next start, because it failed or was not asked for before, it gets then, from
the file. Values are those of the file, under the same names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_llm.config import Config, LoggingConfig
from megatron_llm.training.wandb_store import end_service, last_row

logger = logging.getLogger("megatron_llm")

Line = Mapping[str, Any]
FINISH_SECONDS = 30.0  # that the end of a run waits for its sinks
_FAILED_SECONDS = 15.0  # that its failure does: other ranks wait for the reason
_WAITING_LINES = 100_000  # of a sink that is slower than training, before it is given up


def sink_problems(settings: LoggingConfig) -> list[str]:
    """What is not installed, and how to get it. Imports none of it."""
    asked = {"tensorboard": settings.tensorboard, "wandb": settings.wandb is not None}
    return [
        f"logging.{name}: the package {name} is not installed; pip install {name}, or remove the setting"
        for name, wanted in asked.items()
        if wanted and importlib.util.find_spec(name) is None
    ]


def step_of(line: Line) -> int:
    """The step after which a line of metrics stands. What a run went back to, it has not undone."""
    return int(line.get("back_to_step", line["step"]))


class Sink(Protocol):
    """Something that shows metrics. All calls come from one thread, and may raise anything.

    Attributes:
        mark: what the sink needs to know at the next start; `step` in it is the last one that it has.
    """

    name: str
    mark: dict[str, Any]

    def begin(self, step: int, undone: Iterable[Line]) -> int:
        """The run is after `step`, and goes on; `undone`: the lines that the file had of later steps.

        Returns the last step up to which the sink has everything. Lines of later ones come next.
        """

    def write(self, line: Line) -> None:
        """Take a line, or more values of one: no nulls; numbers, but for `skipped_rows`."""

    def close(self, failed: bool) -> None:
        """Bring everything to where it belongs."""

    def abandon(self) -> None:
        """Leave nothing that would keep the process from ending. Called from another thread, whatever the sink is doing."""


def make_feeds(config: Config, describe: Mapping[str, Any]) -> list[Feed]:
    """A feed for every sink that is asked for. describe: what there is to say of a run besides its config."""
    run_dir = Path(config.logging.run_dir)
    sinks: list[Sink] = []
    if config.logging.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard"))
    if config.logging.wandb is not None:
        sinks.append(Wandb(config, describe))
    return [Feed(sink, run_dir / "sinks") for sink in sinks]


def close_all(feeds: Sequence[Feed], failed: bool) -> None:
    """Let all sinks finish side by side, but wait no longer than FINISH_SECONDS, or less after a failure."""
    deadline = time.monotonic() + (_FAILED_SECONDS if failed else FINISH_SECONDS)
    for feed in feeds:
        feed.finish(failed)
    for feed in feeds:
        feed.wait(deadline)


class Feed:
    """One sink and the thread that it lives in."""

    def __init__(self, sink: Sink, folder: Path):
        self._sink, self._path = sink, folder / f"{sink.name}.json"
        with contextlib.suppress(OSError, ValueError):
            sink.mark |= json.loads(self._path.read_text(encoding="utf-8"))
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_LINES)
        self._broken, self._failed = False, False
        self._thread = threading.Thread(target=self._work, name=f"sink {self._sink.name}", daemon=True)
        self._thread.start()

    def begin(self, step: int, kept: Iterable[Line], undone: Iterable[Line]) -> None:
        """The run is after `step`; the file has the lines `kept`, and had those `undone`, whose steps are taken again."""
        self._put(lambda: self._begin(step, kept, undone))

    def write(self, line: Line) -> None:
        self._put(lambda: self._write(line))

    def finish(self, failed: bool) -> None:
        """Nothing more comes: let the sink finish."""
        self._failed = failed
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """Wait until the sink has finished, or until `deadline` (`time.monotonic()`)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up("it did not finish in time")
        if self._broken:
            self._sink.abandon()

    def _put(self, call: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"{_WAITING_LINES:,} lines wait for it")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if not self._broken:
                    call()
            except BaseException as error:  # whatever a package may raise, SystemExit too
                self._give_up(f"{type(error).__name__}: {error}")
        try:
            self._sink.close(self._failed)
        except BaseException as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        """Say so, once."""
        if not self._broken:
            self._broken = True
            logger.warning(
                "logging.%s gets nothing more in this start: %s. Training goes on, metrics.jsonl has everything, "
                "and the next start hands over what is missing",
                self._sink.name,
                why,
            )

    def _begin(self, step: int, kept: Iterable[Line], undone: Iterable[Line]) -> None:
        has = self._sink.begin(step, undone)
        for line in kept:
            if step_of(line) > has:
                self._sink.write(_shown(line))
        self._keep(step)

    def _write(self, line: Line) -> None:
        self._sink.write(_shown(line))
        self._keep(step_of(line))

    def _keep(self, step: int) -> None:
        self._sink.mark["step"] = step
        self._path.parent.mkdir(exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._sink.mark) + "\n", encoding="utf-8")
        temporary.replace(self._path)


def _shown(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.items() if value is not None}


class TensorBoard:
    """Event files. What was written of steps that are undone TensorBoard itself leaves out, told by `purge_step`."""

    name = "tensorboard"

    def __init__(self, folder: Path):
        self.mark: dict[str, Any] = {}
        self._folder = folder
        self._writer: Any = None

    def begin(self, step: int, undone: Iterable[Line]) -> int:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        has = min(step, self.mark.get("step", -1))
        self._writer = SummaryWriter(str(self._folder), purge_step=has + 1)
        return has

    def write(self, line: Line) -> None:
        step = step_of(line)
        if "back_to_step" in line:
            text = f"step {line['step']} was undone: back to step {step}; rows left out so far: {line['skipped_rows']}"
            self._writer.add_text("rollbacks", text, step)
        else:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a process that is killed leaves what it has said

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        """Its threads end with the process."""


class Wandb:
    """One run of Weights & Biases, whose id stays the same over all starts, online and offline.

    It only ever appends: rows are counted on (its own "step"), and charts have our `step` as their axis. A step that is taken
    again with the same numbers, as after a kill, is there already and left out. With other numbers, as after going back from a
    spike of the loss, it is another row, and the later one holds.
    """

    name = "wandb"

    def __init__(self, config: Config, describe: Mapping[str, Any]):
        self.mark: dict[str, Any] = {"id": secrets.token_hex(4), "rows": 0}
        self._config, self._describe = config, describe
        self._run: Any = None
        self._abandoned = False
        self._known: dict[int, Line] = {}

    def begin(self, step: int, undone: Iterable[Line]) -> int:
        if self._run is None:
            self._start()
        last = self.mark.get("step", -1)
        self._known = {step_of(line): line for line in undone if step_of(line) <= last and "back_to_step" not in line}
        return min(step, last)

    def _start(self) -> None:
        """Begin or resume, and find out what has really arrived of what was handed over: by the server, or by the disk."""
        import wandb

        if self._abandoned:  # meanwhile: its service would live on
            raise TimeoutError("wandb took too long to import")
        settings, run_dir = self._config.logging.wandb, Path(self._config.logging.run_dir).absolute()
        assert settings is not None
        row = last_row(run_dir / "wandb", self.mark["id"])  # of starts before this one
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_dir.name,
            group=settings.group,
            tags=settings.tags or None,
            mode=settings.mode,
            id=self.mark["id"],
            resume="allow",
            dir=str(run_dir),
            # The console is the log's, not wandb's; and its own limits are a little shorter than ours.
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS * 0.8, finish_timeout_raises=True),
        )
        self._run.config.update({**self._config.model_dump(mode="json"), **self._describe}, allow_val_change=True)
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline:
            logger.info("wandb: %s", self._run.url)
            step = self._run.summary.get("step") if self._run.resumed else None
            row = None if step is None else {"step": step, "_step": self._run.step - 1}
        if row is not None:
            self.mark |= {"step": min(self.mark.get("step", -1), int(row["step"])), "rows": int(row["_step"]) + 1}

    def write(self, line: Line) -> None:
        known = self._known.pop(step_of(line), None)
        if known is not None and all(known.get(name) == value for name, value in line.items() if _is_result(name)):
            return
        undone = {"undone_step": line["step"]} if "back_to_step" in line else {}
        self._run.log({**line, **undone, "step": step_of(line)}, step=self.mark["rows"], commit=True)
        self.mark["rows"] += 1

    def close(self, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def abandon(self) -> None:
        self._abandoned = True
        end_service()


def _is_result(name: str) -> bool:
    """Whether a metric is the same whenever a step is taken, unlike one that tells of time."""
    return name in ("loss", "grad_norm", "lr", "rows") or name.startswith("valid_")
