"""What a schedule would take: the start and end of every action for given costs, and the memory each rank needs.

Called by the planning command, which draws it, by `training/trace.py`, which puts it beside what was measured, and by tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_llm.pipeline.actions import Action, Schedule
from megatron_llm.pipeline.check import KINDS, held, walk
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
class Order:
    """A schedule made ready for being simulated with any costs; to make it takes longer than to simulate it.

    Attributes:
        actions: all, with their ranks, in an order that the ranks' lists and all dependencies allow.
        steps: of each the rank, the stage in a list of all F, all B and all W, and the number of the action on another rank
            whose message it needs, or -1. What it needs from its own rank is done before.
    """

    schedule: Schedule
    actions: list[tuple[int, Action]]
    steps: list[tuple[int, int, int]]

    @classmethod
    def of(cls, schedule: Schedule) -> Order:
        """Raises ValueError if the schedule deadlocks."""
        stages, owner = len(schedule.placement), schedule.placement
        base = {kind: number * stages for number, kind in enumerate(KINDS)}
        numbers: dict[tuple[str, int, int], int] = {}
        actions: list[tuple[int, Action]] = []
        steps: list[tuple[int, int, int]] = []
        for rank, action in walk(schedule):
            kind, stage, microbatch = action
            before, producer = stage - 1 if kind == "F" else stage + 1, -1  # the stage that the message comes from
            if kind != "W" and 0 <= before < stages and owner[before] != rank:
                producer = numbers[kind, before, microbatch]
            numbers[action] = len(actions)
            actions.append((rank, action))
            steps.append((rank, base[kind] + stage, producer))
        return cls(schedule, actions, steps)


@dataclass(frozen=True)
class Simulation:
    """Attributes: order, costs: what was simulated. starts, ends: of its actions."""

    order: Order
    costs: Costs
    starts: list[float]
    ends: list[float]

    @property
    def makespan(self) -> float:
        """That of `timeline`: seconds from the first start to the last end."""
        return max(self.ends) - min(self.starts)

    @cached_property
    def peak_bytes(self) -> tuple[float, ...]:
        """The most each rank holds at once."""
        return held(self.order.schedule, self.costs.held_after_forward, self.costs.held_after_backward)

    @cached_property
    def timeline(self) -> Timeline:
        """Every action and every message, at the times that the costs give."""
        message = self.costs.message
        events: list[Event] = []
        for (rank, action), (_, _, need), start, end in zip(
            self.order.actions, self.order.steps, self.starts, self.ends, strict=True
        ):
            if need >= 0 and message:
                sent = self.ends[need]
                events.append(Event(rank, "send", action.stage, action.microbatch, sent, sent + message))
            events.append(Event(rank, action.kind, action.stage, action.microbatch, start, end))
        return Timeline(self.order.schedule.placement, tuple(events))


def simulate(schedule: Schedule | Order, costs: Costs) -> Simulation:
    """Run a schedule in which every rank does its next action as soon as what it needs is there.

    Raises ValueError if the costs are not those of as many stages, or if the schedule deadlocks.
    """
    order = schedule if isinstance(schedule, Order) else Order.of(schedule)
    stages = len(order.schedule.placement)
    if any(len(values) != stages for values in vars(costs).values() if isinstance(values, tuple)):
        raise ValueError(f"the costs are not those of the schedule's {stages} stages: make them with one number a stage")
    last = costs.weight if not order.schedule.split else (0.0,) * stages
    durations = [*costs.forward, *(b + w for b, w in zip(costs.backward, last, strict=True)), *costs.weight]
    message, free = costs.message, [0.0] * len(order.schedule.actions)
    starts: list[float] = []
    ends: list[float] = []
    for rank, row, need in order.steps:
        start = free[rank]
        if need >= 0:
            start = max(start, ends[need] + message)
        starts.append(start)
        end = free[rank] = start + durations[row]
        ends.append(end)
    return Simulation(order, costs, starts, ends)
