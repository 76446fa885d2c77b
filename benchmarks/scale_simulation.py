"""Claim: the model of `plan --device` predicts two published steps of Llama-3.1 405B, on 8,192 and 16,384 GPUs, within 15 %.

Nothing here is measured but what others published. The steps of Llama-3.1 8B, 70B and 405B are predicted on 8 to 16,384 H100, in
the layout that should be fastest at each number: strong scaling, where the tokens of a step stay the same, and weak scaling,
where they grow with the GPUs. The figure is docs/scale.png (`scale_figure.py`), docs/performance.md reads it.

    python benchmarks/scale_simulation.py [--smoke] [--figure docs/scale.png]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import heapq
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from common import finish, machine, parser

from megatron_llm.config import Config, parse_config
from megatron_llm.pipeline.schedules import placement
from megatron_llm.pipeline.simulate import Costs
from megatron_llm.planning.compare import GIB, LOOPED, SPARE, Candidate, candidate
from megatron_llm.planning.flops import model_flops_per_token
from megatron_llm.planning.hardware import DEVICES
from megatron_llm.planning.layouts import RECOMPUTE, shares
from megatron_llm.planning.memory import BytesPerParameter
from megatron_llm.planning.stages import rank_weights, stage_costs
from megatron_llm.planning.step_time import Modelled
from megatron_llm.training.resolve import layout_problems

TOLERANCE = 0.15
LENGTH = 8192
WORLDS = [2**n for n in range(3, 15)]
WHOLE = ("1f1b", "interleaved")  # schedules that do not split the backward
SPACE = {"schedules": ("1f1b", "interleaved", "zb_h1", "zb_v"), "loops": (2, 4, 8), "micro_batches": (1, 2), "pipeline": 16}
"""The part of the planner's space that is searched: simulating the rest takes an hour more. 405B was trained with 16 ranks."""
LEFT_OUT = (
    "stragglers, failures and restarts, checkpoint and evaluation stalls, data loading, launches and the host, contention and "
    "topology of the network beyond the node, congestion between axes, warm-up, variation between steps"
)


@dataclass(frozen=True)
class Llama:
    """A model and its batches: rows of a step in strong scaling; rows a GPU in weak scaling."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    rows: int
    rows_per_gpu: int

    def config(self, rows: int, length: int = LENGTH, **parallel: Any) -> Config:
        return parse_config(
            {
                "model": {
                    "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
                    "num_attention_heads": self.heads, "num_key_value_heads": 8, "vocab_size": 128_256,
                },
                "parallel": parallel,
                "data": {"kind": "synthetic"},
                "training": {"sequence_length": length, "micro_batch_size": 1, "global_batch_size": rows, "steps": 1},
                "optimizer": {"lr": 1e-4},
                "precision": {"compute": "bfloat16"},
                "device": "cuda",
            }
        )  # fmt: skip


MODELS = [
    Llama("8B", 4096, 14_336, 32, 32, rows=512, rows_per_gpu=8),
    Llama("70B", 8192, 28_672, 80, 64, rows=512, rows_per_gpu=2),
    Llama("405B", 16_384, 53_248, 126, 128, rows=2048, rows_per_gpu=1),
]


@dataclass(frozen=True)
class _Work:
    """Seconds of a rank: before its first F; for F and B of a micro-batch; for W, which can wait; after its last B."""

    before: float
    needed: float
    spare: float
    after: float

    @classmethod
    def of(cls, costs: Costs, owners: tuple[int, ...], rank: int, whole: bool) -> _Work:
        own = [stage for stage, owner in enumerate(owners) if owner == rank]
        earlier = range(own[0])
        forward, backward, weight = (sum(kind[s] for s in own) for kind in (costs.forward, costs.backward, costs.weight))
        after = sum(costs.backward[s] + whole * costs.weight[s] for s in earlier)
        return cls(sum(costs.forward[s] for s in earlier), forward + backward + whole * weight, 0.0 if whole else weight, after)


def _microbatches(config: Config, world: int) -> int:
    """Of a replica."""
    it, training = config.parallel, config.training
    return training.global_batch_size * it.tensor_parallel * it.pipeline_parallel // (training.micro_batch_size * world)


def _owners(config: Config) -> tuple[int, ...]:
    it = config.parallel
    return placement(it.pipeline_schedule, it.pipeline_parallel, it.virtual_stages)


class Search:
    """The fastest layout of one model at any number of GPUs, by the planner's model.

    `rank_layouts` finds the best variant of every split, to explain them; here one bound prunes across splits, and what a stage
    costs is kept from one number of GPUs to the next: only messages depend on that, and the bound leaves them out.
    """

    def __init__(self, assumed: Modelled, space: dict[str, Any] = SPACE):
        self.assumed, self.space = assumed, space
        self._kept: dict[tuple[Any, ...], tuple[Costs, list[_Work]]] = {}
        self._simulated: dict[tuple[Any, ...], Candidate] = {}
        self._weights: dict[tuple[Any, ...], list[float]] = {}

    def fastest(self, config: Config, world: int) -> Candidate | None:
        """Of all layouts that fit; None if none does. More recomputation is tried only where less does not fit."""
        order, best = count(), None
        heap: list[tuple[float, int, Config]] = []

        def push(variant: Config) -> None:
            bound = self.bound(variant, world)
            if best is None or bound < best.seconds:
                heapq.heappush(heap, (bound, next(order), variant))

        for variant in self._variants(config, world):
            push(variant)
        while heap:
            bound, _, variant = heapq.heappop(heap)
            if best is not None and bound >= best.seconds:
                break
            training = variant.training
            row = self._candidate(variant, world) if self._may_fit(variant, world) else None
            if row is not None and best is not None and row.seconds >= best.seconds:
                continue
            if row is not None and row.fits(self.assumed.device.memory * GIB):
                best = row
            elif training.recompute != RECOMPUTE[-1]:
                more = RECOMPUTE[RECOMPUTE.index(training.recompute) + 1]
                push(variant.model_copy(update={"training": training.model_copy(update={"recompute": more})}))
        return best

    def bound(self, config: Config, world: int) -> float:
        """Seconds that no step beats: a rank's work, between the first micro-batch's way to it and the last's way back."""
        costs, ranks = self._work(config, world)
        m = _microbatches(config, world)
        busy = max(rank.before + max(m * rank.needed + rank.after, m * (rank.needed + rank.spare)) for rank in ranks)
        return busy + sum(self.assumed.outside(config, world, costs, max(self._held(config))).values())

    def _work(self, config: Config, world: int) -> tuple[Costs, list[_Work]]:
        """What stages and ranks cost; the same for every number of GPUs but for messages, which the bound leaves out."""
        owners, whole = _owners(config), config.parallel.pipeline_schedule in WHOLE
        key = config.parallel.tensor_parallel, owners, whole, config.training.micro_batch_size, config.training.recompute
        if key not in self._kept:
            costs = stage_costs(config, owners, self.assumed.speed(config, world))
            ranks = [_Work.of(costs, owners, rank, whole) for rank in range(config.parallel.pipeline_parallel)]
            self._kept[key] = costs, ranks
        return self._kept[key]

    def _held(self, config: Config) -> list[float]:
        """Elements of the matrices of every pipeline rank."""
        key = config.parallel.tensor_parallel, _owners(config)
        if key not in self._weights:
            self._weights[key] = rank_weights(config, key[1])
        return self._weights[key]

    def _may_fit(self, config: Config, world: int) -> bool:
        """Whether state and the activations that rank 0 holds in a schedule that is not of the V family leave room."""
        it, (costs, _) = config.parallel, self._work(config, world)
        replicas = world // (it.tensor_parallel * it.pipeline_parallel)
        held = BytesPerParameter.of(config).persistent(replicas) * self._held(config)[0]
        if it.pipeline_schedule in (*WHOLE, "zb_h1"):
            own = [stage for stage, owner in enumerate(_owners(config)) if owner == 0]
            held += min(_microbatches(config, world), it.pipeline_parallel) * sum(costs.held_after_forward[s] for s in own)
        return held <= self._limit

    @property
    def _limit(self) -> float:
        return (1 - SPARE) * self.assumed.device.memory * GIB

    def _candidate(self, config: Config, world: int) -> Candidate:
        """`compare.candidate`, of which the simulation is kept: weak scaling has the same at every number of GPUs, and of more
        micro-batches than it simulates each takes as long as the last."""
        it, m = config.parallel, _microbatches(config, world)
        p = it.pipeline_parallel
        linear = m > 5 * p and m % p == 0
        replicas = world // (it.tensor_parallel * p)
        simulated = 10 * p if linear else m
        sized = config.training.model_copy(update={"global_batch_size": simulated * config.training.micro_batch_size * replicas})
        shorter = config.model_copy(update={"training": sized})
        key = (it.tensor_parallel, p, it.pipeline_schedule, it.virtual_stages, sized.micro_batch_size, sized.recompute, simulated,
               self.assumed.speed(config, world).bandwidth)  # fmt: skip
        if key not in self._simulated:
            self._simulated[key] = candidate(shorter, world, it.pipeline_schedule, it.virtual_stages, self.assumed, brief=True)
        row = self._simulated[key]
        outside = self.assumed.outside(config, world, row.costs, max(self._held(config)))
        steady = row.steady * (m - 5 * p) / (5 * p) if linear else row.steady
        return replace(row, config=config, world=world, outside=outside, steady=steady)

    def _variants(self, config: Config, world: int) -> Iterator[Config]:
        """Layouts of the space, without recomputation; not those in which matrices and their state alone do not fit."""
        space = self.space
        layers, rows = config.model.num_hidden_layers, config.training.global_batch_size
        each = BytesPerParameter.of(config)
        for tp in (n for n in (1, 2, 4, 8, 16) if n <= self.assumed.device.node and world % n == 0):
            for pp in (n for n in range(1, min(world // tp, layers, space["pipeline"]) + 1) if world // tp % n == 0):
                replicas = world // (tp * pp)
                if rows % replicas:
                    continue
                for name in space["schedules"] if pp > 1 else ("1f1b",):
                    for loops in [v for v in space["loops"] if v * pp <= layers] if name in LOOPED else [1]:
                        base = config.parallel.model_copy(
                            update={"tensor_parallel": tp, "pipeline_parallel": pp, "pipeline_schedule": name,
                                    "virtual_stages": loops, "sequence_parallel": True}
                        )  # fmt: skip
                        first = config.model_copy(update={"parallel": base})
                        if layout_problems(first, world):
                            continue
                        if each.persistent(replicas) * max(self._held(first)) > self._limit:
                            continue
                        for micro in (n for n in space["micro_batches"] if rows % (n * replicas) == 0):
                            training = config.training.model_copy(update={"micro_batch_size": micro, "recompute": "none"})
                            yield first.model_copy(update={"training": training})


def described(row: Candidate, assumed: Modelled) -> dict[str, Any]:
    """A predicted step as JSON."""
    parallel, training = row.config.parallel, row.config.training
    inside = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    tokens = training.global_batch_size * training.sequence_length
    flops = model_flops_per_token(row.config.model, training.sequence_length)
    parts = shares(row, assumed)
    return {
        "gpus": row.world,
        "tokens": tokens,
        "layout": {
            "tp": parallel.tensor_parallel, "pp": parallel.pipeline_parallel, "dp": row.world // inside,
            "schedule": row.name, "stages_a_rank": row.chunks, "micro_batch": training.micro_batch_size,
            "micro_batches": training.global_batch_size * inside // (training.micro_batch_size * row.world),
            "recompute": training.recompute,
        },
        "seconds": row.seconds,
        "tokens_per_second_per_gpu": tokens / row.seconds / row.world,
        "tflops_per_gpu": tokens * flops / row.seconds / row.world / 1e12,
        "mfu": tokens * flops / row.seconds / row.world / assumed.device.flops,
        "gib": row.peak / GIB,
        "parts": {"products and scores": 1 - sum(parts.values()), **parts},
    }  # fmt: skip


def scaling(model: Llama, worlds: Iterable[int], assumed: Modelled) -> dict[str, Any]:
    """Both curves of a model."""
    search, curves = Search(assumed), {"strong": [], "weak": []}
    for world in worlds:
        for kind, rows in (("strong", model.rows), ("weak", model.rows_per_gpu * world)):
            best = search.fastest(model.config(rows), world)
            if best is not None:
                curves[kind].append(described(best, assumed))
                print(line(model.name, kind, curves[kind][-1]), flush=True)
    return {"model": asdict(model), **curves}


# arXiv 2407.21783, table 4: name, world, layout, rows, length, TFLOP/s per GPU.
PUBLISHED = [
    ("8,192 GPUs, DP64", 8192, {}, 2048, 8192, 430.0),
    ("16,384 GPUs, DP128", 16_384, {}, 2048, 8192, 400.0),
    ("16,384 GPUs, CP16 DP8", 16_384, {"context_parallel": 16}, 128, 131_072, 380.0),
]


def published(assumed: Modelled) -> list[dict[str, Any]]:
    """Rows of the paper beside predictions of the same layouts, TP8 PP16. It does not say how many stages a rank has: 1 and 4."""
    results = []
    for name, world, parallel, rows, length, reached in PUBLISHED:
        for schedule, loops in (("1f1b", 1), ("interleaved", 4)):
            layout = {"tensor_parallel": 8, "pipeline_parallel": 16, "pipeline_schedule": schedule, "virtual_stages": loops}
            config = MODELS[-1].config(rows, length, **layout, **parallel)
            row = candidate(config, world, schedule, loops, assumed, brief=True)
            tflops = rows * length * model_flops_per_token(config.model, length) / row.seconds / world / 1e12
            results.append(
                {"name": name, "gpus": world, "schedule": schedule, "stages_a_rank": loops, "length": length,
                 "published_tflops": reached,
                 "predicted_tflops": tflops, "error": tflops / reached - 1, "seconds": row.seconds}
            )  # fmt: skip
    return results


def line(model: str, kind: str, row: dict[str, Any]) -> str:
    """A point of a curve for people."""
    it = row["layout"]
    layout = f"TP{it['tp']} PP{it['pp']} DP{it['dp']} {it['schedule']} x{it['stages_a_rank']} mb {it['micro_batch']}"
    parts = ", ".join(f"{name} {share:.0%}" for name, share in row["parts"].items() if share >= 0.005)
    return (
        f"{model:>5} {kind:6} {row['gpus']:6,} GPUs {row['tokens'] / 2**20:7.2f} Mi tokens  {row['seconds']:8.3f} s  "
        f"{row['tokens_per_second_per_gpu']:8,.0f} tokens/s/GPU  MFU {row['mfu']:5.1%}  {layout:40} {parts}"
    )


def _of_model(arguments: tuple[Llama, list[int], Modelled]) -> dict[str, Any]:
    return scaling(*arguments)


def main() -> int:
    """Predict, print, draw, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--figure", type=Path, help="also draw: FILE.png, .svg or .pdf")
    options.add_argument("--smoke", action="store_true", help="8B on three small numbers of GPUs only")
    options.add_argument("--processes", type=int, default=3)
    args = options.parse_args()
    assumed = Modelled(DEVICES["h100"])
    conditions = machine()
    assumptions = {
        "device": asdict(assumed.device), "shares": asdict(assumed.shares), "sources": "megatron_llm/planning/hardware.py",
        "sequence_length": LENGTH, "searched": SPACE,
        "precision": "bfloat16, masters and main gradients float32, AdamW, ZeRO stage 1",
        "left_out": LEFT_OUT,
    }  # fmt: skip
    for name, value in assumptions.items():
        print(f"{name}: {value}")
    models, worlds = ([replace(MODELS[0], rows=64)], [8, 16, 32]) if args.smoke else (MODELS, WORLDS)
    work = [(model, worlds, assumed) for model in reversed(models)]
    if args.processes > 1 and len(work) > 1:
        with multiprocessing.Pool(args.processes) as pool:
            curves = pool.map(_of_model, work, chunksize=1)[::-1]
    else:
        curves = [_of_model(one) for one in work][::-1]
    checks = published(assumed)
    for check in checks:
        print(
            f"published {check['name']}: {check['published_tflops']:.0f} TFLOP/s a GPU, predicted with {check['schedule']} "
            f"x{check['stages_a_rank']} {check['predicted_tflops']:.0f} ({check['error']:+.1%})"
        )
    judged = [check for check in checks if check["length"] == LENGTH and check["schedule"] == "interleaved"]
    if args.figure:
        from scale_figure import draw

        draw(args.figure, curves, judged)
    return finish(
        args.output,
        f"predicted, not measured: the published 405B steps of 8,192-token rows within {TOLERANCE:.0%}",
        all(abs(check["error"]) <= TOLERANCE for check in judged),
        conditions,
        assumptions=assumptions,
        published=checks,
        curves=curves,
    )


if __name__ == "__main__":
    sys.exit(main())
