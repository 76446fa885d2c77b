"""A run in words and numbers: how it stands, what it is, what happened to it, how it differs. Called by `report/page.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llm.training.report.charts import Mark, number
from megatron_llm.training.report.read import RunData, Start, Values

_SILENT_SECONDS = 900.0  # without a line of metrics, or ten steps' time: a run that says "running" may be dead
_PLACES = 250  # along a chart: skipped steps and stalls nearer to each other than this are one mark
_MISSING = "–"


@dataclass(frozen=True)
class Outcome:
    """How a run stands. `kind`: done, stopped, failed, running, silent or unknown."""

    kind: str
    word: str
    detail: str


@dataclass(frozen=True)
class Event:
    """Something that happened. `step`: after which one; `kind`: start, rollback, skipped or stall."""

    kind: str
    step: float
    last: float
    what: str


def outcome(run: RunData, now: float) -> Outcome:
    """From status.json, and from how long ago the run wrote something."""
    kind = str(run.status.get("outcome", "unknown"))
    reason = str(run.status.get("reason", ""))
    if kind == "running" and run.written is not None:
        seconds = run.steps.values.get("step_seconds", np.array([]))
        quiet = max(_SILENT_SECONDS, 10 * float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else 0.0)
        if now - run.written > quiet:
            written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.written))
            return Outcome(
                "silent", "no sign of life", f"The status is “running”, but the run last wrote something {written}: killed?"
            )
        return Outcome("running", "running", _left(run))
    known = {"done": "done", "stopped": "stopped", "failed": "failed", "running": "running"}
    if kind in known:
        return Outcome(kind, known[kind], reason)
    return Outcome("unknown", "outcome unknown", reason)


def _left(run: RunData) -> str:
    planned, taken, seconds = setting(run, "training.steps"), last_step(run), run.steps.values.get("step_seconds")
    if not isinstance(planned, int) or planned <= taken or seconds is None or not np.isfinite(seconds).any():
        return ""
    return f"about {duration((planned - taken) * float(np.nanmedian(seconds[-100:])))} left"


def setting(run: RunData, name: str) -> Any:
    """A setting of the run by its dotted name; None if it is not there."""
    value: Any = run.config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def last_step(run: RunData) -> int:
    return int(run.steps.step[-1]) if len(run.steps.step) else int(run.valid.step[-1]) if len(run.valid.step) else 0


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return _MISSING
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"


def figures(run: RunData) -> dict[str, tuple[str, str]]:
    """The final numbers and totals: name -> (value, what else there is to say)."""
    values, planned = run.steps.values, setting(run, "training.steps")
    found = {"steps": (f"{last_step(run):,}", f"of {planned:,}" if isinstance(planned, int) and planned >= 0 else "")}
    tokens = run.steps.tokens[np.isfinite(run.steps.tokens)]
    found["tokens"] = (number(float(tokens[-1])) if len(tokens) else _MISSING, "")
    found["train loss"] = _last(run.steps.step, values.get("loss"))
    valid = run.valid.values.get("valid_loss")
    value, best = _last(run.valid.step, valid)
    if valid is not None and _has(valid) and np.nanargmin(valid) < len(valid) - 1:
        best = f"best {np.nanmin(valid):.4f} at step {run.valid.step[np.nanargmin(valid)]:,.0f}"
    found["validation loss"] = (value, best)
    rate = values.get("tokens_per_second")
    found["median tokens/s"] = (_middle(rate), f"MFU {_middle(values.get('mfu'), 100)} %" if _has(values.get("mfu")) else "")
    seconds = values.get("step_seconds", np.array([]))
    found["time in steps"] = (duration(float(np.nansum(seconds))), "") if _has(seconds) else (_MISSING, "")
    world = world_sizes(run)
    unit = "GPU-hours" if any(start.device not in ("", "cpu") for start in run.starts) else "rank-hours"
    hours = np.nansum(seconds * world) / 3600 if _has(seconds) and np.isfinite(world).all() else math.nan
    text = _MISSING if math.isnan(hours) else f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}"
    found[unit] = (text, "starts.jsonl is missing" if not run.starts and _has(seconds) else "")
    return found


def _has(values: Values | None) -> bool:
    return values is not None and bool(np.isfinite(values).any())


def _last(step: Values, values: Values | None) -> tuple[str, str]:
    if values is None or not _has(values):
        return _MISSING, ""
    place = int(np.flatnonzero(np.isfinite(values))[-1])
    return f"{values[place]:.4f}", "" if place == len(values) - 1 else f"at step {step[place]:,.0f}; null since"


def _middle(values: Values | None, scale: float = 1.0) -> str:
    return number(float(f"{np.nanmedian(values) * scale:.3g}")) if values is not None and _has(values) else _MISSING


def world_sizes(run: RunData) -> Values:
    """[steps]: on how many ranks each was taken; nan if that is not known."""
    sizes = np.full(len(run.steps.step), np.nan)
    for start in run.starts:
        sizes[run.steps.step > start.step] = start.world_size or np.nan
    return sizes


def facts(run: RunData) -> dict[str, str]:
    """What the run is, from its config and its last start; what is not known is left out."""
    found = {
        "model": _model(run),
        "weights from": _first(run, "model.checkpoint", "model.hf"),
        "adapters": _format(run, "LoRA, rank {peft.rank}, alpha {peft.alpha}"),
        "layout": layout(run.starts[-1]) if run.starts else _configured_layout(run),
        "schedule": _schedule(run),
        "batch": _batch(run),
        "data": ", ".join(str(source.get("path")) for source in setting(run, "data.train") or [] if isinstance(source, dict)),
        "optimizer": _format(run, "{optimizer.name}, lr {optimizer.lr}, {lr_schedule.kind}"),
        "warm-up": _format(run, "{lr_schedule.warmup_tokens} tokens") or _format(run, "{lr_schedule.warmup_steps} steps"),
        "precision": _format(run, "{precision.compute}"),
        "device": ", ".join(dict.fromkeys(start.device for start in run.starts if start.device)),
        "changed on resume": "; ".join(map(str, run.status.get("changes") or [])),
        "rows left out": ", ".join(f"[{rows[0]:,}, {rows[1]:,})" for rows in _ranges(run.status.get("skipped_rows"))),
    }
    return {name: text for name, text in found.items() if text}


def _ranges(value: Any) -> list[list[int]]:
    return [r for r in value if isinstance(r, list) and len(r) == 2] if isinstance(value, list) else []


def _first(run: RunData, *names: str) -> str:
    return next((str(setting(run, name)) for name in names if setting(run, name)), "")


def _format(run: RunData, text: str) -> str:
    """The text with settings in it by their dotted names; empty if one is missing."""
    parts = text.replace("}", "{").split("{")
    values = [part if index % 2 == 0 else setting(run, part) for index, part in enumerate(parts)]
    return "" if None in values else "".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _model(run: RunData) -> str:
    from megatron_llm.config import ModelConfig
    from megatron_llm.models.names import logical_tensors

    text = _format(run, "{model.num_hidden_layers} layers of {model.hidden_size}, {model.num_attention_heads} heads")
    try:
        model = ModelConfig.model_validate(run.config.get("model"))
        count = sum(math.prod(shape) for _, shape in logical_tensors(model))
    except Exception:  # of another version, or not complete: the page does without
        return text
    return f"{number(float(f'{count:.3g}'))} parameters" + (f": {text}" if text else "")


def layout(start: Start) -> str:
    """4 ranks: TP2 × PP2."""
    named = [f"{axis.upper()}{size}" for axis, size in start.layout.items() if size != 1]
    ranks = "" if start.world_size is None else f"{start.world_size:,} rank{'s' * (start.world_size != 1)}"
    return ": ".join(part for part in (ranks, " × ".join(named)) if part)


def _configured_layout(run: RunData) -> str:
    sizes = {axis: setting(run, f"parallel.{name}_parallel") for axis, name in (("TP", "tensor"), ("PP", "pipeline"))}
    return " × ".join(f"{axis}{size}" for axis, size in sizes.items() if isinstance(size, int) and size != 1)


def _schedule(run: RunData) -> str:
    pipeline = setting(run, "parallel.pipeline_parallel")
    name = str(setting(run, "parallel.pipeline_schedule") or "") if isinstance(pipeline, int) and pipeline > 1 else ""
    recompute = setting(run, "training.recompute")
    return ", ".join(part for part in (name, f"{recompute} recomputation" if recompute not in (None, "none") else "") if part)


def _batch(run: RunData) -> str:
    rows, length = setting(run, "training.global_batch_size"), setting(run, "training.sequence_length")
    if not isinstance(rows, int) or not isinstance(length, int):
        return ""
    return f"{rows:,} rows × {length:,} = {rows * length:,} tokens a step"


def events(run: RunData) -> list[Event]:
    """Restarts, going back, skipped steps in a row and stalls, by step."""
    found = [*_restarts(run), *_skipped(run), *_stalls(run)]
    for back in run.rollbacks:
        what = f"the loss leapt: back from step {back.undone:,} to step {back.step:,}, past the rows in between"
        found.append(Event("rollback", back.step, back.step, what))
    return sorted(found, key=lambda event: event.step)


def _restarts(run: RunData) -> Iterator[Event]:
    for last, start in zip(run.starts, run.starts[1:], strict=False):
        how = str(start.before.get("outcome", ""))
        why = f": {start.before['reason']}" if start.before.get("reason") else ""
        before = {"running": "killed", "failed": f"failed{why}", "stopped": f"stopped{why}", "done": "done, and continued"}.get(
            how, how
        )
        when = "" if start.time is None else time.strftime("%Y-%m-%d %H:%M UTC, ", time.gmtime(start.time))
        now = layout(start) if layout(start) == layout(last) else f"{layout(last)} → {layout(start)}"
        yield Event("start", start.step, start.step, f"restart ({when}{now}); before: {before}")


def _skipped(run: RunData) -> Iterator[Event]:
    flags = np.nan_to_num(run.steps.values.get("skipped", np.zeros(len(run.steps.step)))) > 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    for first, stop in edges.reshape(-1, 2):
        count = f"{stop - first:,} steps in a row" if stop - first > 1 else "step"
        what = f"{count} without an update: loss or gradient not finite"
        yield Event("skipped", run.steps.step[first], run.steps.step[stop - 1], what)


def _stalls(run: RunData) -> Iterator[Event]:
    stalls = run.steps.values.get("checkpoint_stall_seconds", np.array([]))
    for place in np.flatnonzero(np.nan_to_num(stalls) > 0):
        step = run.steps.step[place]
        yield Event("stall", step, step, f"training stood still {duration(float(stalls[place]))} for a checkpoint")


def marks(run: int, of_run: RunData, happened: Sequence[Event], xs: tuple[float, float]) -> list[Mark]:
    """What is marked in charts over the steps `xs`; what is too near to be told apart becomes one."""
    found: dict[tuple[str, int], list[Event]] = {}
    for event in happened:
        place = int((event.step - xs[0]) / (xs[1] - xs[0]) * _PLACES)
        found.setdefault((event.kind, place), []).append(event)
    known = np.isfinite(of_run.steps.tokens)
    steps, tokens = (np.concatenate([[0.0], column[known]]) for column in (of_run.steps.step, of_run.steps.tokens))
    result = []
    for (kind, _), group in found.items():
        first, last = group[0], group[-1]
        where = f"step {first.step:,.0f}" + (f" to {last.last:,.0f}" if last.last > first.step else "")
        title = f"{where}: {first.what}" + (f" (and {len(group) - 1:,} more)" if len(group) > 1 else "")
        result.append(Mark(run, kind, first.step, float(np.interp(first.step, steps, tokens)), title))
    return result


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: dotted name, and the value in each. Where they write to is no difference."""
    flat = [dict(_flattened(run.config)) for run in runs]
    names = sorted({name for settings in flat for name in settings} - {"logging.run_dir", "checkpoint.path"})
    rows = [(name, [settings.get(name, _MISSING) for settings in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _flattened(inner, f"{prefix}.{index}")
    else:
        yield prefix, f"{value:g}" if isinstance(value, float) else _MISSING if value is None else str(value)
