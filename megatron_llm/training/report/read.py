"""What a run folder says, whatever state the run is in. Called by `report/page.py`."""

from __future__ import annotations

import difflib
import json
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

Values = np.ndarray[Any, np.dtype[np.float64]]
_OF_STEPS = (
    "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "tflops_per_device", "mfu", "step_seconds", "memory_peak_bytes",
    "skipped", "loss_scale", "checkpoint_stall_seconds",
)  # fmt: skip
_NUMBERS = (float, int, bool)
_CHUNK = 8 << 20  # bytes read at a time


@dataclass(frozen=True)
class Table:
    """Lines of metrics of one sort, by step.

    Attributes:
        step, tokens: [lines], ascending; tokens so far, nan where a line does not say.
        values: [lines] by name; nan where a line has no number.
    """

    step: Values
    tokens: Values
    values: dict[str, Values]


@dataclass(frozen=True)
class Start:
    """A line of starts.jsonl. `before`: outcome, step and reason that the status had then, nothing at the first start."""

    step: int
    time: float | None
    world_size: int | None
    layout: dict[str, int]
    device: str
    before: dict[str, Any]


@dataclass(frozen=True)
class Rollback:
    """The run went from step `undone` back to `step`."""

    undone: int
    step: int


@dataclass(frozen=True)
class Sample:
    """A reply of the model after a step."""

    step: int
    prompt: str
    reply: str
    ended: bool


@dataclass
class RunData:
    """A run.

    Attributes:
        steps: of each step that was taken and not undone. valid: of each step after which the run was evaluated. busy: of each
            step in which ranks were compared.
        status, config: as the files have them; empty if there are none.
        starts: of this run, in order of time. trace: the newest picture of a pipeline.
        written: when the run last wrote a line of metrics or its status, in Unix seconds.
        notes: what could not be read.
    """

    folder: Path
    name: str
    steps: Table
    valid: Table
    busy: Table
    rollbacks: list[Rollback] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    trace: Path | None = None
    written: float | None = None
    notes: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The folders of runs that are given as RUN or RUN/metrics.jsonl, each once. Raises ValueError for what is no run."""
    folders: list[Path] = []
    for given in paths:
        path = Path(given)
        folder = path.parent if path.name == "metrics.jsonl" and not path.is_dir() else path
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "status.json")):
            raise ValueError(_no_run(path))
        if folder.resolve() not in [known.resolve() for known in folders]:
            folders.append(folder)
    return folders


def _no_run(path: Path) -> str:
    expected = "a run is the folder that `train` writes to (logging.run_dir), with metrics.jsonl in it"
    if path.is_file():
        return f"{path} is a file, and no metrics.jsonl; {expected}"
    if not path.is_dir():
        beside = [str(file.parent) for file in sorted(path.parent.glob("*/metrics.jsonl"))]
        near = difflib.get_close_matches(str(path), beside) or beside[:5]
        return f"{path} does not exist; {expected}" + (f". Did you mean {' or '.join(near)}?" if near else "")
    inside = [str(file.parent) for pattern in ("*", "*/*") for file in sorted(path.glob(f"{pattern}/metrics.jsonl"))]
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        return f"{path} is no run, but there are some in it: {', '.join(inside[:5])}{more}; give one or several of them"
    return f"{path} is no run: it has neither metrics.jsonl nor status.json; {expected}"


def read_run(folder: Path, name: str, progress: Callable[[int], object] = lambda read: None) -> RunData:
    """Read a run. Whatever is missing or damaged is left out and named in the notes.

    progress: called with the number of bytes of metrics.jsonl that were read since the last call.
    """
    notes: list[str] = []
    steps, valid, busy, rollbacks = _read_metrics(folder / "metrics.jsonl", notes, progress)
    traces = sorted(folder.glob("traces/step-*.png"), key=lambda path: (len(path.stem), path.stem))
    told = [path.stat().st_mtime for name in ("metrics.jsonl", "status.json") if (path := folder / name).exists()]
    return RunData(
        folder=folder,
        name=name,
        steps=steps,
        valid=valid,
        busy=busy,
        rollbacks=rollbacks,
        starts=_read_starts(folder / "starts.jsonl", notes),
        samples=_read_samples(folder / "samples.jsonl", notes),
        status=_read_mapping(folder / "status.json", json.loads, notes),
        config=_read_mapping(folder / "config.yaml", yaml.safe_load, notes),
        trace=traces[-1] if traces else None,
        written=max(told, default=None),
        notes=notes,
    )


class _Columns:
    """Rows of numbers that grow; a name that comes later has nan in the rows before."""

    def __init__(self) -> None:
        self.steps = array("d")
        self.columns: dict[str, array[float]] = defaultdict(lambda: array("d", [math.nan]) * len(self.steps))

    def add(self, step: float, values: dict[str, Any]) -> None:
        """A line; one of the step of the last line adds to it, one of an earlier step undoes all since."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            for column in self.columns.values():
                column.pop()
        if not self.steps or self.steps[-1] != step:
            for column in self.columns.values():
                column.append(math.nan)
            self.steps.append(step)
        for name, value in values.items():
            if type(value) in _NUMBERS:
                self.columns[name][-1] = value

    def table(self) -> Table:
        values = {name: np.array(column, dtype=np.float64) for name, column in self.columns.items()}
        for column in values.values():
            column[np.isinf(column)] = np.nan
        tokens = values.pop("tokens", np.full(len(self.steps), np.nan))
        return Table(np.array(self.steps, dtype=np.float64), tokens, values)


def _read_metrics(path: Path, notes: list[str], progress: Callable[[int], object]) -> tuple[Table, Table, Table, list[Rollback]]:
    """The tables of a run, and the times that it went back."""
    steps, valid, busy = _Columns(), _Columns(), _Columns()
    rollbacks = []
    unread = 0
    for line in _lines(path, progress):
        values = _parse(line)
        if values is None:
            unread += 1
        elif "back_to_step" in values:
            if type(values["back_to_step"]) is int:
                rollbacks.append(Rollback(int(values["step"]), values["back_to_step"]))
        else:
            step = values["step"]
            if "loss" in values or "lr" in values:
                steps.add(step, {name: values[name] for name in _OF_STEPS if name in values})
            for start, table in (("valid_", valid), ("busy_seconds/", busy)):
                if f'"{start}'.encode() in line:  # most lines have none
                    found = {name: value for name, value in values.items() if name.startswith(start)}
                    table.add(step, found | {"tokens": values.get("tokens")})
    if unread:
        notes.append(f"{unread:,} {'line' if unread == 1 else 'lines'} of metrics.jsonl could not be read and left out")
    return steps.table(), valid.table(), busy.table(), rollbacks


def _lines(path: Path, progress: Callable[[int], object] = lambda read: None) -> Iterator[bytes]:
    """The lines of a file of JSON lines, none if it is not there; the last may be torn, as the run may be writing it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while lines := file.readlines(_CHUNK):
            progress(sum(map(len, lines)))
            yield from (line for line in lines if line.strip())


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line with a step; None for anything else."""
    try:
        values = orjson.loads(line)
    except ValueError:
        try:
            values = json.loads(line)  # NaN and Infinity, which others write
        except ValueError:
            return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def _read_starts(path: Path, notes: list[str]) -> list[Start]:
    """Those since the last one that had nothing before it: earlier ones belong to a run that was set aside."""
    starts: list[Start] = []
    unread = 0
    for line in _lines(path):
        values = _parse(line)
        if values is None:
            unread += 1
            continue
        before = values.get("before")
        if not before:
            starts.clear()
        layout = values.get("layout")
        starts.append(
            Start(
                values["step"],
                values["time"] if type(values.get("time")) in (int, float) else None,
                values["world_size"] if type(values.get("world_size")) is int else None,
                layout if isinstance(layout, dict) else {},
                str(values.get("device", "")),
                before if isinstance(before, dict) else {},
            )
        )
    if unread:
        notes.append(f"{unread:,} {'line' if unread == 1 else 'lines'} of starts.jsonl could not be read and left out")
    return starts


def _read_samples(path: Path, notes: list[str]) -> list[Sample]:
    samples = []
    unread = 0
    for line in _lines(path):
        values = _parse(line)
        if values is None or not isinstance(values.get("reply"), str):
            unread += 1
            continue
        samples.append(Sample(values["step"], str(values.get("prompt", "")), values["reply"], bool(values.get("ended"))))
    if unread:
        notes.append(f"{unread:,} {'line' if unread == 1 else 'lines'} of samples.jsonl could not be read and left out")
    return samples


def _read_mapping(path: Path, load: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return {}
    try:
        values = load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        notes.append(f"{path.name} could not be read")
        return {}
    return values
