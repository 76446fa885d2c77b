"""The page of one run or several: what is on it, and the template that lays it out. Called by `cli/report.py`."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llm import __version__
from megatron_llm.training.report.charts import Chart, Line, draw, wants_log, x_range
from megatron_llm.training.report.curves import Axis, Curve, axis, curve, smoothed, window
from megatron_llm.training.report.facts import Event, differences, duration, events, facts, figures, marks, outcome
from megatron_llm.training.report.read import RunData, Sample, find_runs, read_run

COLOURS = 8  # in templates/report.css
_EVENTS, _PROMPTS, _EARLIER, _CHARACTERS = 200, 8, 5, 6000  # shown of each; the page says what it leaves out
_KINDS = ("start", "rollback")
_ROLES = ("system", "user", "assistant", "tool")


def write_report(paths: Sequence[str], output: Path, progress: Callable[[int], object] = lambda read: None) -> list[RunData]:
    """Write the page of runs, given as RUN or RUN/metrics.jsonl, and return what was read of each.

    progress: called with the number of bytes of metrics that were read since the last call.
    Raises ValueError for a path that is no run, and for an output that cannot be a file.
    """
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give a file, such as {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
    folders = find_runs(paths)
    runs = [read_run(folder, name, progress) for folder, name in zip(folders, names(folders), strict=True)]
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(render(runs, time.time()), encoding="utf-8", errors="replace")  # half of a surrogate pair is no text
    temporary.replace(output)
    return runs


def names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        short = ["/".join(parts[-count:]) for parts in whole]
        if len(set(short)) == len(short):
            break
    return short


def render(runs: Sequence[RunData], now: float) -> str:
    """The page. `now`: Unix seconds."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_llm.training.report"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    templates = Path(__file__).parent / "templates"
    style, script = ((templates / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    charts = make_charts(runs)
    xs = x_range(charts)
    happened = [events(run) for run in runs]
    marked = [mark for number, run in enumerate(runs) for mark in marks(number, run, happened[number], xs)]
    return environment.get_template("report.html.jinja").render(
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
        style=style,
        script=script,
        # The browser refuses every other script, and all that is not in this file.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=embedded(charts, xs, marked, [run.name for run in runs]),
        runs=[{"name": run.name, "folder": str(run.folder.resolve()), "notes": run.notes,
               "outcome": outcome(run, now), "figures": figures(run), "facts": facts(run), "trace": _picture(run),
               "events": _shown_events(happened[number]), "stalls": _stalls(run), "colour": number % COLOURS}
              for number, run in enumerate(runs)],
        charts=[(chart, draw(chart, xs, marked), _legend(chart, len(runs))) for chart in charts],
        kinds={mark.kind for mark in marked},
        differences=differences(runs) if len(runs) > 1 else [],
        samples=_samples(runs),
        columns=[(run.name, axis(run.steps).steps_per_point) for run in runs if axis(run.steps).steps_per_point > 1],
    )  # fmt: skip


def make_charts(runs: Sequence[RunData]) -> list[Chart]:
    """The charts of what the runs have; none is empty."""
    along = {id(table): axis(table) for run in runs for table in (run.steps, run.valid, run.busy)}
    several = len(runs) > 1

    def lines(*wanted: Callable[[RunData], Curve | None]) -> list[Line]:
        found = []
        for number, run in enumerate(runs):
            curves = [made for make in wanted if (made := make(run)) is not None]
            raw = any(made.key == "loss smoothed" for made in curves)
            for index, made in enumerate(curves):
                colour = number if several else max(0, index - 1) if raw else index
                found.append(Line(number, colour % COLOURS, made))
        return found

    def of_steps(key: str, label: str) -> Callable[[RunData], Curve | None]:
        return lambda run: curve(run.steps, along[id(run.steps)], key, label)

    def of_valid(key: str, label: str) -> Callable[[RunData], Curve | None]:
        return lambda run: curve(run.valid, along[id(run.valid)], key, label, "dots")

    def of_ranks(key: str) -> Callable[[RunData], Curve | None]:
        label = f"{key}, all ranks"
        return lambda run: curve(run.busy, along[id(run.busy)], f"busy_seconds/{key}", label, "dots")

    def raw_loss(run: RunData) -> Curve | None:
        averaged = window(run.steps) >= 3
        label = "train, every step" if averaged or several else "train"
        return curve(run.steps, along[id(run.steps)], "loss", label, "raw" if averaged else "line")

    def mean_loss(run: RunData) -> Curve | None:
        label = "train, smoothed" if several else f"train, mean of {window(run.steps):,} steps"
        return smoothed(run.steps, along[id(run.steps)], "loss", label)

    def sets(prefix: str) -> list[Callable[[RunData], Curve | None]]:
        keys = sorted({key for run in runs for key in run.valid.values if key.startswith(f"{prefix}/")})
        return [of_valid(key, key.removeprefix(f"{prefix}/")) for key in keys]

    skipped, stalls = (*_KINDS, "skipped"), (*_KINDS, "stall")
    found = [Chart("loss", "Loss", "nats a token", lines(raw_loss, mean_loss, of_valid("valid_loss", "validation")), skipped)]
    for prefix, title, unit, divide in (("valid_loss", "loss", "nats a token", 1.0), ("valid_accuracy", "accuracy", "%", 0.01)):
        by_set = sets(prefix) if len(sets(prefix)) > 1 else []
        if prefix == "valid_accuracy":
            by_set = [of_valid(prefix, "all sets" if by_set else "validation"), *by_set]
        name = f"Validation {title}" + (" by set" if len(by_set) > 1 else "")
        found.append(Chart(prefix.replace("_", "-"), name, unit, lines(*by_set), _KINDS, divide))
    found += [
        Chart("lr", "Learning rate", "", lines(of_steps("lr", "learning rate")), _KINDS, zero=True),
        Chart("grad-norm", "Gradient norm", "before clipping", lines(of_steps("grad_norm", "gradient norm")), skipped),
        Chart("tokens-per-second", "Throughput", "tokens/s", lines(of_steps("tokens_per_second", "tokens/s")), stalls, zero=True),
        Chart("tflops", "Compute", "TFLOP/s a device", lines(of_steps("tflops_per_device", "TFLOP/s")), stalls, zero=True),
        Chart("mfu", "Model FLOPs utilization", "%", lines(of_steps("mfu", "MFU")), stalls, 0.01, zero=True),
        Chart("memory", "Memory", "GiB, peak of rank 0", lines(of_steps("memory_peak_bytes", "peak")), _KINDS, 2**30, zero=True),
        Chart("busy", "Busy ranks", "seconds a step, waits left out", lines(*map(of_ranks, ("min", "median", "max"))), _KINDS),
        Chart("loss-scale", "Loss scale", "", lines(of_steps("loss_scale", "loss scale")), skipped, log=True),
    ]
    return [
        Chart(**{**vars(chart), "log": chart.log or (not chart.zero and wants_log(chart.lines))})
        for chart in found
        if chart.lines
    ]


def embedded(charts: Sequence[Chart], xs: tuple[float, float], marked: Sequence[Any], run_names: Sequence[str]) -> dict[str, Any]:
    """What the script draws from, and what anybody may read out of the page: numbers as in metrics.jsonl."""
    axes: list[Axis] = []
    for chart in charts:
        for line in chart.lines:
            if not any(line.curve.axis is known for known in axes):
                axes.append(line.curve.axis)
    place = {id(known): index for index, known in enumerate(axes)}

    def points(curve: Curve) -> dict[str, list[float | None]]:
        short = curve.axis.steps_per_point > 1 or curve.key.endswith(" smoothed")
        found = {"values": _numbers(curve.mid, short)}
        if curve.low is not None and curve.high is not None:
            found |= {"low": _numbers(curve.low), "high": _numbers(curve.high)}
        return found

    return {
        "runs": list(run_names),
        "x": list(xs),
        "axes": [
            {"step": _numbers(known.step), "tokens": _numbers(known.tokens), "steps_per_point": known.steps_per_point}
            for known in axes
        ],
        "charts": {
            chart.id: {
                "divide": chart.divide, "zero": chart.zero, "log": chart.log, "unit": chart.unit, "marks": chart.marks,
                "curves": [
                    {"run": line.run, "colour": line.colour, "key": line.curve.key, "label": line.curve.label,
                     "kind": line.curve.kind, "axis": place[id(line.curve.axis)], **points(line.curve)}
                    for line in chart.lines
                ],
            }
            for chart in charts
        },
        "marks": [{**vars(mark), "tokens": mark.tokens if math.isfinite(mark.tokens) else None} for mark in marked],
    }  # fmt: skip


def _numbers(values: Any, short: bool = False) -> list[float | None]:
    """For JSON: whole numbers without a point, six digits if `short`, null for nan."""
    found: list[float | None] = []
    for value in values.tolist():
        if value != value:
            found.append(None)
        elif value == int(value):
            found.append(int(value))
        else:
            found.append(float(f"{value:.6g}") if short else value)
    return found


def _legend(chart: Chart, runs: int) -> list[tuple[str, str]]:
    """(class, label) of what is to be told apart within the chart; the colours of several runs are explained once, above."""
    found = dict.fromkeys(
        (f"{line.curve.kind} {'any' if runs > 1 else f'c{line.colour}'}", line.curve.label) for line in chart.lines
    )
    return list(found) if len(found) > 1 else []


def _picture(run: RunData) -> dict[str, str] | None:
    if run.trace is None:
        return None
    return {"name": run.trace.name, "data": base64.b64encode(run.trace.read_bytes()).decode()}


def _shown_events(found: Sequence[Event]) -> dict[str, Any]:
    """Stalls are only marked and summed up: there is one with every checkpoint."""
    listed = [event for event in found if event.kind != "stall"]
    return {"listed": listed[:_EVENTS], "more": max(0, len(listed) - _EVENTS)}


def _stalls(run: RunData) -> str:
    stalls = run.steps.values.get("checkpoint_stall_seconds", np.array([]))
    stalls = stalls[np.nan_to_num(stalls) > 0]
    seconds = float(np.nansum(run.steps.values.get("step_seconds", np.zeros(1))))
    if not len(stalls):
        return ""
    share = f", {stalls.sum() / (seconds + stalls.sum()):.2%} of the time" if seconds else ""
    total, longest = duration(stalls.sum()), duration(stalls.max())
    return f"Checkpoints stopped training {len(stalls):,} times, {total} in all{share}; the longest took {longest}."


def _samples(runs: Sequence[RunData]) -> dict[str, Any]:
    """Prompts in order, with the last reply of every run and some earlier ones."""
    by_prompt: dict[str, dict[int, list[Sample]]] = defaultdict(dict)
    for number, run in enumerate(runs):
        for sample in run.samples:
            by_prompt[sample.prompt].setdefault(number, []).append(sample)
    shown = []
    for prompt, replies in list(by_prompt.items())[:_PROMPTS]:
        of_runs = []
        for number, samples in replies.items():
            *earlier, last = samples
            kept = [earlier[int(place)] for place in np.linspace(0, len(earlier) - 1, min(_EARLIER, len(earlier)))]
            of_runs.append({"run": number, "last": _cut(last), "earlier": [_cut(s) for s in kept], "count": len(samples)})
        shown.append({"prompt": _shortened(prompt), "runs": of_runs})
    return {"prompts": shown, "more": max(0, len(by_prompt) - _PROMPTS)}


def _cut(sample: Sample) -> dict[str, Any]:
    return {"step": sample.step, "reply": _shortened(sample.reply), "ended": sample.ended}


def _shortened(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} … ({len(text) - _CHARACTERS:,} more characters)"
