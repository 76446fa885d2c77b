"""What a schedule would take: the start and end of every action for given costs, and the memory each rank needs.

Called by the planning command, which draws it, by `training/trace.py`, which puts it beside what was measured, and by tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llm.pipeline.actions import Action, Schedule
from megatron_llm.pipeline.check import dependencies, held, walk
from megatron_llm.pipeline.timeline import Event, Timeline


@dataclass(frozen=True)
class Costs:
    """What one micro-batch costs on every stage: tuples of one number a stage, in seconds and bytes.

    forward, backward, weight: duration of F, B and W; where weight gradients are not split off, B takes backward + weight.
    message: seconds that an activation or a gradient travels between two ranks; nobody is busy with it.
    held_after_forward: bytes held from the start of F to the end of B.
    held_after_backward: bytes still held from the end of B to the end of W; of no effect where W is not split off.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    message: float
    held_after_forward: tuple[float, ...]
    held_after_backward: tuple[float, ...]

    @classmethod
    def uniform(
        cls,
        stages: int,
        forward: float = 1.0,
        backward: float = 1.0,
        weight: float = 1.0,
        message: float = 0.0,
        held_after_forward: float = 1.0,
        held_after_backward: float = 1.0,
    ) -> Costs:
        """The same costs on every stage."""
        values = (forward, backward, weight, held_after_forward, held_after_backward)
        f, b, w, first, second = ((value,) * stages for value in values)
        return cls(f, b, w, message, first, second)


@dataclass(frozen=True)
class Simulation:
    """Attributes:
    timeline: every action and every message, at the times that the costs give.
    peak_bytes: the most each rank holds at once.
    """

    timeline: Timeline
    peak_bytes: tuple[float, ...]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run a schedule in which every rank does its next action as soon as what it needs is there.

    Raises ValueError if the costs are not those of as many stages, or if the schedule deadlocks.
    """
    stages = len(schedule.placement)
    if any(len(values) != stages for values in vars(costs).values() if isinstance(values, tuple)):
        raise ValueError(f"the costs are not those of the schedule's {stages} stages: make them with one number a stage")
    last = costs.weight if not schedule.split else (0.0,) * stages
    durations = {"F": costs.forward, "B": [b + w for b, w in zip(costs.backward, last, strict=True)], "W": costs.weight}
    free = [0.0] * len(schedule.actions)
    ends: dict[Action, float] = {}
    events: list[Event] = []
    for rank, action in walk(schedule):
        start = free[rank]
        for needed in dependencies(action, stages):
            there = ends[needed]
            if schedule.placement[needed.stage] != rank:
                there += costs.message
                if costs.message:
                    events.append(Event(rank, "send", action.stage, action.microbatch, ends[needed], there))
            start = max(start, there)
        ends[action] = free[rank] = start + durations[action.kind][action.stage]
        events.append(Event(rank, action.kind, action.stage, action.microbatch, start, free[rank]))
    peaks = held(schedule, costs.held_after_forward, costs.held_after_backward)
    return Simulation(Timeline(schedule.placement, tuple(events)), peaks)
