"""What a traced step leaves behind, from real ranks: a file that trace viewers read, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import NAMES, make_schedule
from megatron_llm.pipeline.simulate import Costs, simulate
from megatron_llm.pipeline.timeline import Event, Timeline
from megatron_llm.training.trace import chrome_trace, measured_costs, write_trace
from tests.ranks import run_ranks

ZERO = 1_700_000_000.0  # a clock that does not begin at 0


def _costs(stages: int) -> Costs:
    """Different on every stage."""
    f, b, w = ([base + stage / 10 for stage in range(stages)] for base in (1.0, 2.0, 0.5))
    return Costs(tuple(f), tuple(b), tuple(w), 0.25, (0.0,) * stages, (0.0,) * stages)


def _later(event: Event) -> Event:
    return Event(event.rank, event.kind, event.stage, event.microbatch, event.start + ZERO, event.end + ZERO)


def _write(run_dir: Path, pipeline: int, name: str) -> int:
    """Every rank of every replica has the events of its place; the others' are marked by their stage. Returns how many."""
    grid = Grid.build(ParallelConfig(pipeline_parallel=pipeline), 1)
    schedule = make_schedule(name, pipeline, 5)
    timeline = simulate(schedule, _costs(len(schedule.placement))).timeline
    mine = [_later(event) for event in timeline.events if event.rank == grid.pp.rank]
    write_trace(run_dir, 12, mine if grid.dp.first else [], schedule, grid)
    return len(mine)


def _traces(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(metadata, complete events) of the one step that was traced."""
    assert sorted(path.name for path in (folder / "traces").iterdir()) == ["step-00000012.json", "step-00000012.png"]
    assert (folder / "traces/step-00000012.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((folder / "traces/step-00000012.json").read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "M"], [event for event in events if event["ph"] == "X"]


@pytest.mark.parametrize(("world", "pipeline", "name"), [(1, 1, "1f1b"), (2, 2, "zb_v"), (4, 2, "1f1b")])
def test_first_replica_is_written_whole(world: int, pipeline: int, name: str, tmp_path: Path) -> None:
    counts = run_ranks(world, _write, tmp_path, pipeline, name)
    metadata, events = _traces(tmp_path)
    assert len(events) == sum(counts) // (world // pipeline)
    assert {event["pid"] for event in events} == set(range(pipeline))
    named = {event["pid"]: event["args"]["name"] for event in metadata if event["name"] == "process_name"}
    stages = {"1f1b": ["stage 0", "stage 1"], "zb_v": ["stages 0, 3", "stages 1, 2"]}[name]
    assert named == {rank: f"pipeline rank {rank}, {stages[rank]}" for rank in range(pipeline)}


def test_times_are_microseconds_from_the_first_action(tmp_path: Path) -> None:
    (_,) = run_ranks(1, _write, tmp_path, 1, "zb_h1")
    _, events = _traces(tmp_path)
    assert min(event["ts"] for event in events) == 0
    by_kind = {kind: [event for event in events if event["cat"] == kind] for kind in "FBW"}
    for kind, microseconds in (("F", 1.0e6), ("B", 2.0e6), ("W", 0.5e6)):
        assert [event["dur"] for event in by_kind[kind]] == pytest.approx([microseconds] * 5, rel=1e-6)
        assert [event["args"] for event in by_kind[kind]] == [{"stage": 0, "microbatch": mb} for mb in range(5)]


def test_messages_have_a_lane_of_their_own() -> None:
    timeline = Timeline((0, 1), (Event(0, "F", 0, 0, 0, 1), Event(1, "send", 1, 0, 1, 1.5), Event(1, "F", 1, 0, 1.5, 2)))
    lanes = {event["name"]: (event["pid"], event["tid"]) for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "X"}
    assert lanes == {
        "F stage 0 micro-batch 0": (0, 0),
        "send stage 1 micro-batch 0": (1, 1),
        "F stage 1 micro-batch 0": (1, 0),
    }


@pytest.mark.parametrize("name", NAMES)
def test_measured_costs_are_those_that_made_the_events(name: str) -> None:
    """The simulation of the measured costs is then the measured timeline itself."""
    schedule = make_schedule(name, 4, 6, 2 if name in ("interleaved", "breadth_first") else 1)
    costs = _costs(len(schedule.placement))
    made = simulate(schedule, costs).timeline
    measured = measured_costs(made)
    assert measured.message == pytest.approx(costs.message)
    assert measured.forward == pytest.approx(costs.forward)
    again = simulate(schedule, measured).timeline
    assert again.makespan == pytest.approx(made.makespan)
    assert [(e.rank, e.kind) for e in again.events] == [(e.rank, e.kind) for e in made.events]


def test_one_slow_action_does_not_change_the_costs() -> None:
    made = simulate(make_schedule("1f1b", 2, 5), Costs.uniform(2)).timeline
    slow = Timeline(made.placement, tuple(Event(*_stretched(event)) for event in made.events))
    assert measured_costs(slow).forward == (1.0, 1.0)


def _stretched(event: Event) -> tuple[Any, ...]:
    end = event.end + 50 * (event.microbatch == 4)
    return event.rank, event.kind, event.stage, event.microbatch, event.start, end
