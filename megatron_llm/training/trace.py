"""What really happened in a step: a file for a trace viewer, and a picture beside the simulation. Called by `training/loop.py`.

`logging.trace_steps` says which steps. One model replica is looked at: the pipeline whose other coordinates are all zero.
The simulation is given the median duration of every stage's actions, so a difference between the two pictures is
not slow compute but waiting that the schedule does not explain: the network, a busy host, a rank that is slower now and then.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import Schedule
from megatron_llm.pipeline.simulate import Costs, simulate
from megatron_llm.pipeline.timeline import Event, Timeline
from megatron_llm.planning.timeline import counted, draw


def write_trace(run_dir: str | Path, step: int, events: Sequence[Event], schedule: Schedule, grid: Grid) -> None:
    """Write RUN/traces/step-NNNNNNNN.json (Chrome's trace format) and .png (measured and simulated on one time scale).

    events: of this rank, on a clock common to all ranks. Collective over the pipeline axis of the first replica; the other
    replicas' ranks return at once.
    """
    if not (grid.dp.first and grid.cp.first and grid.tp.first):
        return
    gathered = [list(events)]
    if grid.pp.size > 1:
        gathered = [[] for _ in range(grid.pp.size)]
        dist.gather_object(list(events), gathered if grid.pp.first else None, dst=grid.pp.ranks[0], group=grid.pp.group)
    if not grid.pp.first:
        return
    measured = _from_zero(Timeline(schedule.placement, tuple(event for of_rank in gathered for event in of_rank)))
    simulated = simulate(schedule, measured_costs(measured)).timeline
    folder = Path(run_dir) / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08}.json"
    path.write_text(json.dumps(chrome_trace(measured)), encoding="utf-8")
    draw(
        path.with_suffix(".png"),
        f"step {step:,}: {counted(schedule.microbatches, 'micro-batch')}, {counted(measured.ranks, 'rank')}",
        {"measured": measured, "simulated with the measured medians": simulated},
    )


def measured_costs(timeline: Timeline) -> Costs:
    """Median seconds of every stage's F, B and W, and of a message's way; nothing is known of bytes."""
    durations: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in timeline.events:
        durations[event.kind, event.stage].append(event.end - event.start)
    stages = range(len(timeline.placement))
    forward, backward, weight = (tuple(_median(durations[kind, stage]) for stage in stages) for kind in "FBW")
    nothing = (0.0,) * len(stages)
    return Costs(forward, backward, weight, _median(_message_seconds(timeline)), nothing, nothing)


def _message_seconds(timeline: Timeline) -> list[float]:
    """From the end of an action to the start of the one that needs its message, wherever that rank was idle all the while."""
    work = sorted((event for event in timeline.events if event.kind != "send"), key=lambda event: event.start)
    ends = {(event.kind, event.stage, event.microbatch): event.end for event in work}
    free = [-math.inf] * timeline.ranks
    seconds = []
    for event in work:
        source = {"F": event.stage - 1, "B": event.stage + 1}.get(event.kind, -1)
        if 0 <= source < len(timeline.placement) and timeline.placement[source] != event.rank:
            sent = ends[event.kind, source, event.microbatch]
            if free[event.rank] < sent:
                seconds.append(event.start - sent)
        free[event.rank] = event.end
    return seconds


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace as chrome://tracing and Perfetto read it: a process a rank, one lane of actions and one of messages.

    Format: "Trace Event Format", complete events ("X") in microseconds.
    """
    stages: dict[int, list[int]] = defaultdict(list)
    for stage, rank in enumerate(timeline.placement):
        stages[rank].append(stage)
    named: list[dict[str, Any]] = []
    for rank, held in sorted(stages.items()):
        label = f"pipeline rank {rank}, stage{'s' * (len(held) > 1)} {', '.join(map(str, held))}"
        named += _metadata("process", rank, 0, {"name": label})
        named += [{"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}]
        named += _metadata("thread", rank, 0, {"name": "actions"}) + _metadata("thread", rank, 1, {"name": "messages"})
    return {"displayTimeUnit": "ms", "traceEvents": named + [_complete(event) for event in timeline.events]}


def _metadata(what: str, pid: int, tid: int, args: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": args}]


def _complete(event: Event) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{event.kind} stage {event.stage} micro-batch {event.microbatch}",
        "cat": event.kind,
        "pid": event.rank,
        "tid": int(event.kind == "send"),
        "ts": event.start * 1e6,
        "dur": (event.end - event.start) * 1e6,
        "args": {"stage": event.stage, "microbatch": event.microbatch},
    }


def _from_zero(timeline: Timeline) -> Timeline:
    """The same with the first action at time zero."""
    start = min((event.start for event in timeline.events), default=0.0)

    def shifted(events: Iterable[Event]) -> tuple[Event, ...]:
        return tuple(Event(e.rank, e.kind, e.stage, e.microbatch, e.start - start, e.end - start) for e in events)

    return Timeline(timeline.placement, shifted(timeline.events))
