"""What a step would take under each pipeline schedule, and which is best. Called by `cli/plan.py` and `training/resolve.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

from megatron_llm.config import Config, ConfigError
from megatron_llm.pipeline.check import held
from megatron_llm.pipeline.schedules import NAMES, Schedule, make_schedule, placement
from megatron_llm.pipeline.simulate import Costs, Order, Simulation, simulate
from megatron_llm.planning.memory import Built, BytesPerParameter, RankMemory, rank_memory
from megatron_llm.planning.stages import Speed, rank_trained, rank_weights, stage_costs

SPLIT = ("zb_h1", "zb_h2", "zb_v", "v_half", "v_min")  # weight gradients wait for a gap
LOOPED = ("interleaved", "breadth_first")  # a rank holds several stages, as many as one likes
GIB = 2**30
SPARE = 0.04  # of a device's memory: what an allocator cannot use, CUDA's and NCCL's own


class Assumed(Protocol):
    """What a configuration does not say."""

    def speed(self, config: Config, world: int) -> Speed:
        """Of a GPU in the layout."""

    def outside(self, config: Config, world: int, costs: Costs, parameters: float) -> dict[str, float]:
        """Seconds of a step that are not in the schedule, by what they go to. parameters: trained ones of the fullest rank."""


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
    """A configuration with its step on `world` ranks. What is asked for is computed then: a search asks few for everything.

    brief: simulate four to six times as many micro-batches as ranks: of more each takes what the last of these took, and none
    is held besides. built: see `memory.rank_memory`.
    """

    config: Config
    world: int
    assumed: Assumed
    brief: bool = False
    built: Built = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of the schedule."""
        return self.config.parallel.pipeline_schedule

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The rank of every stage. Raises ValueError if the schedule does not fit the pipeline."""
        parallel = self.config.parallel
        return placement(self.name, parallel.pipeline_parallel, parallel.virtual_stages)

    @property
    def chunks(self) -> int:
        """Stages on a rank."""
        return len(self.placement) // self.config.parallel.pipeline_parallel

    @property
    def microbatches(self) -> int:
        """Of a step and replica."""
        parallel, training = self.config.parallel, self.config.training
        inside = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
        return training.global_batch_size // (training.micro_batch_size * (self.world // inside))

    @cached_property
    def costs(self) -> Costs:
        return stage_costs(self.config, self.placement, self.assumed.speed(self.config, self.world))

    @cached_property
    def outside(self) -> dict[str, float]:
        """Seconds of a step that are not in the schedule."""
        return self.assumed.outside(self.config, self.world, self.costs, max(rank_trained(self.config, self.placement)))

    @property
    def _simulated(self) -> int:
        """Micro-batches."""
        ranks = self.config.parallel.pipeline_parallel
        if self.brief and self.name not in ("gpipe", "breadth_first"):
            return min(self.microbatches, 5 * ranks + self.microbatches % ranks)
        return self.microbatches

    def _shape(self, microbatches: int) -> tuple[str, int, int, int]:
        parallel = self.config.parallel
        return self.name, parallel.pipeline_parallel, microbatches, parallel.virtual_stages

    @property
    def schedule(self) -> Schedule:
        """The simulated one."""
        return _scheduled(*self._shape(self._simulated))

    @cached_property
    def simulation(self) -> Simulation:
        return simulate(_ordered(*self._shape(self._simulated)), self.costs)

    @cached_property
    def steady(self) -> float:
        """Seconds of the micro-batches in the middle of the step that were not simulated."""
        simulated, ranks = self._simulated, self.config.parallel.pipeline_parallel
        if simulated == self.microbatches:
            return 0.0
        before = simulate(_ordered(*self._shape(simulated - ranks)), self.costs)
        return (self.microbatches - simulated) * (self.simulation.makespan - before.makespan) / ranks

    @property
    def seconds(self) -> float:
        """Of a step. Where stages are unequal few micro-batches may be through before the busiest rank holds up the others."""
        return max(self.simulation.makespan + self.steady + sum(self.outside.values()), self.shortest if self.brief else 0.0)

    @cached_property
    def shortest(self) -> float:
        """Seconds that the step cannot be shorter than, known without its schedule.

        A rank works without pause, but not before the first micro-batch has come to it, and after its last backward that goes
        back to the first stage. Where weight gradients wait, some may come after that: then what it has besides them.
        """
        costs, m, split = self.costs, self.microbatches, self.name in SPLIT
        whole = [b + w for b, w in zip(costs.backward, costs.weight, strict=True)]
        back = costs.backward if split else whole
        most = 0.0
        for rank in range(self.config.parallel.pipeline_parallel):
            own = [stage for stage, owner in enumerate(self.placement) if owner == rank]
            before = sum(costs.forward[: own[0]]) + own[0] * costs.message
            after = sum(back[: own[0]]) + own[0] * costs.message
            work = m * sum(costs.forward[stage] + whole[stage] for stage in own)
            least = m * sum(costs.forward[stage] + back[stage] for stage in own)
            most = max(most, before + least + after, before + work)
        return most + sum(self.outside.values())

    @cached_property
    def peak_bytes(self) -> tuple[float, ...]:
        """Of activations, on every rank."""
        return held(self.schedule, self.costs.held_after_forward, self.costs.held_after_backward)

    @cached_property
    def memory(self) -> list[RankMemory]:
        """Of every pipeline rank."""
        return rank_memory(self.config, self.schedule, self.peak_bytes, self.world, self.built)

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs most."""
        return max(rank.total for rank in self.memory)

    @property
    def at_least(self) -> float:
        """Bytes that the fullest rank needs whatever else it works with: matrices, their state, the peak of activations."""
        held = persistent_bytes(self.config, self.world, self.placement)
        return max(map(sum, zip(held, self.peak_bytes, strict=True)))

    def fits(self, limit: float | None) -> bool:
        """Into that many bytes of a device, but for what must be spared. The three grow, in bytes and in work."""
        if limit is None:
            return True
        usable = (1 - SPARE) * limit
        return (
            max(persistent_bytes(self.config, self.world, self.placement)) <= usable
            and self.at_least <= usable
            and self.peak <= usable
        )


@lru_cache(maxsize=24)
def _scheduled(name: str, ranks: int, microbatches: int, virtual_stages: int) -> Schedule:
    """To make one takes longer than to simulate it, and a search needs the same with many costs."""
    return make_schedule(name, ranks, microbatches, virtual_stages)


@lru_cache(maxsize=24)
def _ordered(name: str, ranks: int, microbatches: int, virtual_stages: int) -> Order:
    return Order.of(_scheduled(name, ranks, microbatches, virtual_stages))


def persistent_bytes(config: Config, world: int, placement: tuple[int, ...]) -> list[float]:
    """Of every pipeline rank: its matrices, and gradients and state of those that are trained."""
    ranks = world // (config.parallel.tensor_parallel * config.parallel.pipeline_parallel)
    bytes_ = BytesPerParameter.of(config)
    more = bytes_.persistent(ranks, config.parallel.zero_stage) - bytes_.weight
    held = zip(rank_weights(config, placement), rank_trained(config, placement), strict=True)
    return [bytes_.weight * every + more * trained for every, trained in held]


def candidate(config: Config, world: int, name: str, virtual_stages: int, assumed: Assumed, brief: bool = False) -> Candidate:
    """The step under one schedule on `world` ranks. Raises ValueError if the schedule does not fit the pipeline."""
    named = {"pipeline_schedule": name, "virtual_stages": virtual_stages}
    parallel = config.parallel.model_copy(update=named)
    row = Candidate(config.model_copy(update={"parallel": parallel}), world, assumed, brief)
    assert row.placement
    return row


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
