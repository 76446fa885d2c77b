"""Which layout trains a model fastest on so many GPUs, and why the others do not. Called by `cli/plan.py`.

A *cell* is a tensor- and a pipeline-parallel size; a *variant* of it has a schedule, a micro-batch and a recomputation besides.
Every variant has a step time that it cannot beat: its busiest rank without idle time. Variants are simulated in that order, and
their memory is predicted (`planning/memory.py`, the slow part) until no other can be faster, so few of the thousand are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_llm.config import Config
from megatron_llm.planning.compare import GIB, LOOPED, SPARE, Candidate
from megatron_llm.planning.memory import Built
from megatron_llm.planning.step_time import Modelled, layer_parts

SCHEDULES = ("1f1b", "interleaved", "zb_h1", "zb_v", "v_half")
"""Those worth a try: the others are slower or need more memory than one of these."""

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "full")
Problems = Callable[[Config, int], list[str]]


@dataclass(frozen=True)
class Ranking:
    """Attributes:
    best: of every cell that fits the variant that is fastest, the fastest first.
    refused: of the other cells a variant that needs little, and the GiB that it has too many.
    replicas: data-parallel sizes that only the batch size forbids. problems: of cells without a variant.
    """

    best: list[Candidate]
    refused: list[tuple[Candidate, float]]
    replicas: set[int]
    problems: list[str]


def rank_layouts(
    config: Config, world: int, assumed: Modelled, problems: Problems, tell: Callable[[float], object] = lambda _: None
) -> Ranking:
    """All layouts of `world` GPUs whose step has the rows of the configuration.

    problems: what is impossible about a configuration on so many ranks. tell: told which part of the cells is done.
    """
    best, refused = [], []
    replicas: set[int] = set()
    impossible: list[str] = []
    cells = list(_cells(config, world, assumed.device.node))
    for number, (tp, pp) in enumerate(cells):
        variants = sorted(_variants(config, world, tp, pp, assumed, problems), key=lambda row: row.shortest)
        if variants:
            fitting = _fastest(variants, assumed)
            if fitting is not None:
                best.append(fitting)
            else:
                least = _smallest(variants)
                refused.append((least, least.peak / GIB - _limit(assumed)))
        else:
            found = problems(_with(config, tp, pp, "1f1b", 1, 1, "none"), world)
            if all(problem.startswith("training.global_batch_size") for problem in found):
                replicas.add(world // (tp * pp))
            impossible += [problem for problem in found if problem not in impossible]
        tell((number + 1) / len(cells))
    return Ranking(sorted(best, key=lambda row: row.seconds), sorted(refused, key=lambda row: row[1]), replicas, impossible)


def _limit(assumed: Modelled) -> float:
    """GiB that may be used."""
    return (1 - SPARE) * assumed.device.memory


def _cells(config: Config, world: int, node: int) -> Iterator[tuple[int, int]]:
    """Tensor parallelism stays inside a node, where its transfers are bearable; pipelines have no more ranks than layers."""
    for pp in range(1, min(world, config.model.num_hidden_layers) + 1):
        for tp in (1, 2, 4, 8, 16):
            if tp <= node and world % (tp * pp) == 0:
                yield tp, pp


def _variants(config: Config, world: int, tp: int, pp: int, assumed: Modelled, problems: Problems) -> Iterator[Candidate]:
    layers = config.model.num_hidden_layers
    built: Built = {}
    for name in SCHEDULES if pp > 1 else ("1f1b",):
        loops = [v for v in (2, 3, 4, 5, 6, 8) if v * pp <= layers] if name in LOOPED else [1]
        for virtual_stages in loops:
            for micro in MICRO_BATCHES:
                for recompute in RECOMPUTE:
                    variant = _with(config, tp, pp, name, virtual_stages, micro, recompute)
                    if not problems(variant, world):
                        yield Candidate(variant, world, assumed, True, built)


def _with(config: Config, tp: int, pp: int, schedule: str, virtual_stages: int, micro: int, recompute: str) -> Config:
    """Sequence parallelism is never slower and saves memory, so it is on where the tokens can be divided."""
    divisible = micro * config.training.sequence_length % tp == 0
    parallel = {
        "tensor_parallel": tp, "pipeline_parallel": pp, "context_parallel": 1, "pipeline_schedule": schedule,
        "virtual_stages": virtual_stages, "sequence_parallel": divisible,
    }  # fmt: skip
    training = {"micro_batch_size": micro, "recompute": recompute}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "training": config.training.model_copy(update=training),
        }
    )


def _fastest(variants: list[Candidate], assumed: Modelled) -> Candidate | None:
    """Of those that fit. variants: in the order of the time that they cannot beat."""
    limit = assumed.device.memory * GIB
    fastest: Candidate | None = None
    too_large: set[tuple[str, int, str, int]] = set()
    for row in variants:
        if fastest is not None and row.shortest >= fastest.seconds:
            break
        training = row.config.training
        kind = row.name, row.chunks, training.recompute
        if any((*kind, smaller) in too_large for smaller in MICRO_BATCHES if smaller < training.micro_batch_size):
            continue  # what does not fit with fewer rows does not with more
        if not row.fits(limit):
            too_large.add((*kind, training.micro_batch_size))
        elif fastest is None or row.seconds < fastest.seconds:
            fastest = row
    return fastest


def _smallest(variants: list[Candidate]) -> Candidate:
    """Of those with the fewest rows and all recomputed."""
    fewest = min(row.config.training.micro_batch_size for row in variants)
    return min(
        (row for row in variants if (row.config.training.micro_batch_size, row.config.training.recompute) == (fewest, "full")),
        key=lambda row: row.at_least,
    )


def shares(row: Candidate, assumed: Modelled) -> dict[str, float]:
    """What a step's time goes to besides products and scores, as parts of it: idle time, exchanges, memory-bound work."""
    config, world = row.config, row.world
    parallel, training = config.parallel, config.training
    microbatches = (
        training.global_batch_size * parallel.tensor_parallel * parallel.pipeline_parallel // (training.micro_batch_size * world)
    )
    layers = microbatches * config.model.num_hidden_layers / parallel.pipeline_parallel
    parts = {name: layers * sum(both) / row.seconds for name, both in layer_parts(config, assumed).items() if sum(both)}
    timeline = row.simulation.timeline
    idle = timeline.makespan - max(timeline.busy(rank) for rank in range(timeline.ranks))
    outside = row.outside
    return {
        "idle": idle / row.seconds,
        **parts,
        "data parallel": (outside["gradients"] + outside["weights"]) / row.seconds,
        "optimizer": outside["optimizer"] / row.seconds,
    }
