"""What a step would take under each pipeline schedule, and which is best. Called by `cli/plan.py` and `training/resolve.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from megatron_llm.config import Config, ConfigError
from megatron_llm.pipeline.schedules import NAMES, Schedule, make_schedule
from megatron_llm.pipeline.simulate import Costs, Simulation, simulate
from megatron_llm.planning.memory import BytesPerParameter, RankMemory, rank_memory
from megatron_llm.planning.stages import Speed, rank_weights, stage_costs

LOOPED = ("interleaved", "breadth_first")  # a rank holds several stages, as many as one likes
GIB = 2**30
SPARE = 0.04  # of a device's memory: what an allocator cannot use, CUDA's and NCCL's own


class Assumed(Protocol):
    """What a configuration does not say."""

    def speed(self, config: Config, world: int) -> Speed:
        """Of a GPU in the layout."""

    def outside(self, config: Config, world: int, costs: Costs, parameters: float) -> dict[str, float]:
        """Seconds of a step that are not in the schedule, by what they go to. parameters: of the fullest rank."""


@dataclass(frozen=True)
class Assumptions:
    """The simplest: FLOP/s that a GPU achieves in everything, bytes/s between pipeline neighbours; see `step_time.Modelled`."""

    flops: float = 400e12
    bandwidth: float = 25e9

    def speed(self, config: Config, world: int) -> Speed:
        return Speed.uniform(self.flops, self.bandwidth)

    def outside(self, config: Config, world: int, costs: Costs, parameters: float) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Candidate:
    """A schedule with its simulated step. `config` names it.

    outside: seconds of a step that are not in the schedule. steady: of micro-batches in its middle that were not simulated.
    """

    config: Config
    world: int
    schedule: Schedule
    costs: Costs
    simulation: Simulation
    outside: dict[str, float]
    steady: float = 0.0

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.simulation.timeline.makespan + self.steady + sum(self.outside.values())

    @property
    def name(self) -> str:
        return self.config.parallel.pipeline_schedule

    @property
    def chunks(self) -> int:
        """Stages on a rank."""
        return len(self.schedule.placement) // len(self.schedule.actions)

    @cached_property
    def memory(self) -> list[RankMemory]:
        """Of every pipeline rank."""
        return rank_memory(self.config, self.schedule, self.simulation.peak_bytes, self.world)

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs most."""
        return max(rank.total for rank in self.memory)

    @property
    def at_least(self) -> float:
        """Bytes that the fullest rank needs whatever else it works with: matrices, their state, the peak of activations."""
        held = persistent_bytes(self.config, self.world, self.schedule.placement)
        return max(map(sum, zip(held, self.simulation.peak_bytes, strict=True)))

    def fits(self, limit: float | None) -> bool:
        """Into that many bytes of a device, but for what must be spared."""
        return limit is None or (self.at_least <= (1 - SPARE) * limit and self.peak <= (1 - SPARE) * limit)


def persistent_bytes(config: Config, world: int, placement: tuple[int, ...]) -> list[float]:
    """Of every pipeline rank: its matrices, and their gradients and state unless they are frozen beside adapters."""
    ranks = world // (config.parallel.tensor_parallel * config.parallel.pipeline_parallel)
    bytes_ = BytesPerParameter.of(config)
    each = bytes_.persistent(ranks, config.parallel.zero_stage) if config.peft is None else bytes_.weight
    return [each * held for held in rank_weights(config, placement)]


def candidate(config: Config, world: int, name: str, virtual_stages: int, assumed: Assumed, brief: bool = False) -> Candidate:
    """The step under one schedule on `world` ranks. Raises ValueError if the schedule does not fit the pipeline.

    brief: simulate four to six times as many micro-batches as ranks: of more each takes what the last of these took, and none
    is held besides.
    """
    parallel, training = config.parallel, config.training
    replicas = world // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)
    microbatches = training.global_batch_size // (training.micro_batch_size * replicas)
    ranks, simulated, steady = parallel.pipeline_parallel, microbatches, 0.0
    if brief and name not in ("gpipe", "breadth_first"):
        simulated = min(microbatches, 5 * ranks + microbatches % ranks)
    schedule = make_schedule(name, ranks, simulated, virtual_stages)
    costs = stage_costs(config, schedule.placement, assumed.speed(config, world))
    named = config.model_copy(
        update={"parallel": parallel.model_copy(update={"pipeline_schedule": name, "virtual_stages": virtual_stages})}
    )
    outside = assumed.outside(named, world, costs, max(rank_weights(config, schedule.placement)))
    simulation = simulate(schedule, costs)
    if simulated < microbatches:
        before = simulate(make_schedule(name, ranks, simulated - ranks, virtual_stages), costs)
        each = (simulation.timeline.makespan - before.timeline.makespan) / ranks
        steady = (microbatches - simulated) * each
    return Candidate(named, world, schedule, costs, simulation, outside, steady)


def chosen(config: Config, world: int, assumed: Assumed = Assumptions()) -> Candidate:
    """The step under the schedule of the configuration."""
    parallel = config.parallel
    return candidate(config, world, parallel.pipeline_schedule, parallel.virtual_stages, assumed)


def alternatives(config: Config, world: int, assumed: Assumed = Assumptions()) -> Iterator[Candidate]:
    """The step under every other schedule on the same ranks; looped ones with the configured virtual stages, or 2."""
    for name in NAMES:
        if name == config.parallel.pipeline_schedule:
            continue
        virtual_stages = max(2, config.parallel.virtual_stages) if name in LOOPED else 1
        yield candidate(config, world, name, virtual_stages, assumed)


def choose(config: Config, world: int, limit: float | None, assumed: Assumed = Assumptions()) -> tuple[Candidate, str]:
    """The schedule for `pipeline_schedule: auto`, and a sentence about the choice.

    The shortest simulated step of those that fit into `limit` bytes a device; of equal ones the one that needs less memory, of
    those the simplest. Raises ConfigError with the numbers if none fits.
    """
    if config.parallel.pipeline_parallel == 1:
        only = candidate(config, world, "1f1b", 1, assumed)
        if not only.fits(limit):
            raise ConfigError([_too_large([only], limit)])
        return only, "parallel.pipeline_schedule: auto is 1f1b, as there is one pipeline rank"
    known = list(alternatives(config, world, assumed))
    fitting = [row for row in known if row.fits(limit)]
    if not fitting:
        raise ConfigError([_too_large(known, limit)])
    best = min(fitting, key=_rank)
    note = f"parallel.pipeline_schedule: auto is {best.name}" + (f" with {best.chunks} stages a rank" if best.chunks > 1 else "")
    idle = best.simulation.timeline.bubble_of_makespan
    note += f": {idle:.1%} of the simulated step idle, {best.peak / GIB:.3g} GiB on the fullest rank"
    faster = [row.name for row in sorted(known, key=_rank) if not row.fits(limit) and _rank(row) < _rank(best)]
    if faster and limit:
        note += f"; {', '.join(faster)} would be faster, but do not fit into {limit / GIB:.4g} GiB"
    return best, note


def _rank(row: Candidate) -> tuple[float, float, int]:
    return float(f"{row.simulation.timeline.makespan:.9g}"), row.peak, NAMES.index(row.name)


def _too_large(known: list[Candidate], limit: float | None) -> str:
    assert limit is not None
    least = min(known, key=lambda row: row.peak)
    return (
        f"parallel.pipeline_schedule: auto finds no schedule that fits into {limit / GIB:.4g} GiB a device, {SPARE:.0%} of it "
        f"spared; the smallest is {least.name} with {least.peak / GIB:.4g} GiB. Use more tensor_parallel or pipeline_parallel, "
        "training.recompute: selective or full, a smaller micro_batch_size, or optimizer.state_dtype: bfloat16"
    )
