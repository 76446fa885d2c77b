"""What a step would take under each pipeline schedule. Called by `cli/plan.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llm.config import Config
from megatron_llm.pipeline.schedules import NAMES, Schedule, make_schedule
from megatron_llm.pipeline.simulate import Costs, Simulation, simulate
from megatron_llm.planning.stages import stage_costs

LOOPED = ("interleaved", "breadth_first")  # a rank holds several stages, as many as one likes


@dataclass(frozen=True)
class Assumptions:
    """What a configuration does not say: FLOP/s that a GPU achieves, bytes/s between pipeline neighbours."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Candidate:
    """A schedule with its simulated step. `chunks`: stages on a rank."""

    name: str
    schedule: Schedule
    costs: Costs
    simulation: Simulation

    @property
    def chunks(self) -> int:
        return len(self.schedule.placement) // len(self.schedule.actions)


def candidate(config: Config, microbatches: int, name: str, virtual_stages: int, assumed: Assumptions) -> Candidate:
    """The step under one schedule. Raises ValueError if the schedule does not fit the ranks."""
    schedule = make_schedule(name, config.parallel.pipeline_parallel, microbatches, virtual_stages)
    costs = stage_costs(config, schedule.placement, assumed.flops, assumed.bandwidth)
    return Candidate(name, schedule, costs, simulate(schedule, costs))


def chosen(config: Config, microbatches: int, assumed: Assumptions) -> Candidate:
    """The step under the schedule of the configuration."""
    parallel = config.parallel
    return candidate(config, microbatches, parallel.pipeline_schedule, parallel.virtual_stages, assumed)


def alternatives(config: Config, microbatches: int, assumed: Assumptions) -> Iterator[Candidate]:
    """The step under every other schedule on the same ranks; looped ones with the configured virtual stages, or 2."""
    for name in NAMES:
        if name == config.parallel.pipeline_schedule:
            continue
        virtual_stages = max(2, config.parallel.virtual_stages) if name in LOOPED else 1
        yield candidate(config, microbatches, name, virtual_stages, assumed)
