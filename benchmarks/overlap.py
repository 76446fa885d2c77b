"""Claim: the data-parallel exchange hides behind compute as far as the structure of a step allows.

Devices and links are simulated, so that two cores can stand for many of both: a product of a linear layer sleeps for its FLOPs
and then makes a tiny one; a collective over data-parallel ranks queues for the rank's link, which is one thread, sleeps for the
bytes that the rank sends, and is then carried out. Everything else is real: engine, gloo, schedule, buckets. With C the time of
a step without the sleeps of the link, K their sum, and T the time of a step with them,

    exposed = (T - max(C, K)) / min(C, K)

is 0 where all is hidden that can be, and 1 where nothing is. The structure of a step forbids 0: a reduce-scatter begins when the
last micro-batch has come back to the layers of its bucket, new weights need the norm of all gradients, and a layer needs its
weights. The bound is the same figure for a step that is simulated with these rules and no others, see `ideal_step`.

    python benchmarks/overlap.py [--ratios 0.25 0.5 1 2] [--steps 4]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from common import Ranks, finish, machine, parser
from torch import Tensor

from megatron_llm.config import Config, parse_config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.ops.matmul import accumulate_matmul, matmul
from megatron_llm.parallel import collectives, linear, weight_grad
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.actions import Schedule
from megatron_llm.pipeline.check import dependencies, walk
from megatron_llm.pipeline.schedules import make_schedule
from megatron_llm.training.build import Engine, build_engine
from megatron_llm.training.step import RunState, train_step

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SEQUENCE, ROWS = 16, 4  # rows of a replica and step
SPEED = 1e8  # FLOP/s of a simulated device: the smallest product takes 1.3 ms
BUCKETS = 10  # of a rank, about
TOLERANCE = 0.1
CASES = (("1f1b", 1, 1), ("1f1b", 1, 4), ("zb_h1", 2, 4))  # schedule, pipeline ranks, micro-batches; two data-parallel ranks


class Link:
    """This rank's simulated connection to its data-parallel neighbours: one exchange after another, in the order of their start.

    Attributes:
        bandwidth: bytes a second. sent: bytes so far.
    """

    def __init__(self) -> None:
        self.bandwidth, self.sent = math.inf, 0.0
        self._thread = ThreadPoolExecutor(max_workers=1)

    def through(self, collective: Callable[..., object]) -> Callable[..., _Work]:
        """The collective, begun asynchronously, over this link."""

        def begin(out: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool) -> _Work:
            assert async_op
            size = dist.get_world_size(group)
            sent = (size - 1) / size * max(out.nbytes, x.nbytes)
            self.sent += sent
            return _Work(self._thread.submit(self._carry, sent / self.bandwidth, collective, out, x, group))

        return begin

    @staticmethod
    def _carry(seconds: float, collective: Callable[..., object], out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        time.sleep(seconds)
        collective(out, x, group=group)


@dataclass(frozen=True)
class _Work:
    """What torch returns for an asynchronous collective."""

    future: Future[None]

    def wait(self) -> None:
        self.future.result()


def _product_seconds(a: Tensor, b: Tensor) -> float:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / SPEED


def _slow_matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    time.sleep(_product_seconds(a, b))
    return matmul(a, b, dtype)


def _slow_accumulate_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    time.sleep(_product_seconds(a, b))
    accumulate_matmul(total, a, b)


@dataclass(frozen=True)
class Product:
    """What a parameter costs: seconds of each of its products, 0 where it has none, and the bucket of this rank it is in."""

    bucket: int
    seconds: float


@dataclass(frozen=True)
class Layout:
    """What a rank holds.

    Attributes:
        stages: by number, for each layer that is announced by `before_layer` its parameters in the order of the forward.
        sent: bytes that each bucket's reduce-scatter sends, and as many its all-gather.
    """

    stages: dict[int, list[list[Product]]]
    sent: list[float]


@dataclass(frozen=True)
class Steps:
    """What a rank measured: seconds of each step, and the bytes that it sent over its link in one."""

    seconds: list[float]
    sent: float


def config_of(name: str, pipeline: int, microbatches: int, overlap: bool) -> Config:
    """What is trained."""
    raw: dict[str, Any] = {
        "model": SHAPE,
        "data": {"kind": "synthetic"},
        "training": {
            "sequence_length": SEQUENCE,
            "micro_batch_size": ROWS // microbatches,
            "global_batch_size": 2 * ROWS,
            "steps": 1000,
            "document_isolation": False,
        },
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"kind": "constant"},
        "parallel": {"pipeline_parallel": pipeline, "pipeline_schedule": name, "overlap": overlap},
        "precision": {"compute": "float32"},
        "device": "cpu",
    }
    raw["parallel"]["bucket_size"] = 263_000 // (pipeline * BUCKETS)
    return parse_config(raw)


def engines(name: str, pipeline: int, microbatches: int) -> Callable[..., Any]:
    """On a rank: a function that gives the layout, or takes steps with and without overlap at some bandwidth."""
    link = Link()
    collectives._all_gather = link.through(collectives._all_gather)
    collectives._reduce_scatter = link.through(collectives._reduce_scatter)
    linear.matmul, weight_grad.accumulate_matmul = _slow_matmul, _slow_accumulate_matmul
    grid = Grid.build(config_of(name, pipeline, microbatches, False).parallel, SHAPE["num_key_value_heads"])
    made = {on: build_engine(config_of(name, pipeline, microbatches, on), grid, torch.device("cpu")) for on in (False, True)}
    streams = {on: (build_train_stream(engine.config), RunState()) for on, engine in made.items()}

    def answer(what: str, overlap: bool = False, bandwidth: float = math.inf, steps: int = 0) -> Any:
        if what == "layout":
            return layout(made[True])
        link.bandwidth = bandwidth
        ends, before = [], 0.0
        for number in range(steps + 2):
            train_step(made[overlap], *streams[overlap])
            ends.append(time.perf_counter())  # all ranks' losses met just before: a step ends for all at the same time
            if number == 0:
                before = link.sent
        return Steps([b - a for a, b in zip(ends[1:], ends[2:], strict=False)], (link.sent - before) / (steps + 1))

    return answer


def layout(engine: Engine) -> Layout:
    """Where the parameters of this rank's stages are, and what they cost. (They register in the order of the forward.)"""
    buckets, tokens = engine.optimizer.buckets, engine.config.training.micro_batch_size * SEQUENCE
    ranges = [(bucket.data.data_ptr(), bucket.data.data_ptr() + bucket.data.nbytes) for bucket in buckets]

    def product(name: str, parameter: Tensor) -> Product:
        bucket = next(i for i, (start, stop) in enumerate(ranges) if start <= parameter.data_ptr() < stop)
        multiplied = parameter.dim() == 2 and not name.startswith("embedding")
        return Product(bucket, 2 * tokens * parameter.numel() / SPEED if multiplied else 0.0)

    def announced(named: tuple[str, Tensor]) -> str:
        first, second, *_ = named[0].split(".")
        return second if first == "layers" else "embedding" if first == "embedding" else "head"

    stages = {
        number: [[product(*named) for named in group] for _, group in groupby(stage.named_parameters(), announced)]
        for number, stage in engine.stages.items()
    }
    axis = engine.grid.dp_cp
    return Layout(stages, [(axis.size - 1) / axis.size * bucket.data.nbytes for bucket in buckets])


def ideal_step(schedule: Schedule, layouts: list[Layout], bandwidth: float) -> float:
    """Seconds of a step in which nothing waits but for what it must.

    layouts: of every pipeline rank. A rank's link is serial. It first gathers the weights that the last step made, in the
    order in which the first micro-batch needs them; then it reduces each bucket as soon as its last gradient is in. The step
    ends for all when everything is reduced everywhere: the norm of the gradient is needed before any weight changes.
    """
    stages, ranks = len(schedule.placement), range(len(layouts))
    links = [_gathered(schedule, rank, layouts[rank], bandwidth) for rank in ranks]
    missing = [Counter(p.bucket for layers in of.stages.values() for layer in layers for p in layer) for of in layouts]
    for counter in missing:
        for bucket in counter:
            counter[bucket] *= schedule.microbatches
    reduced = [max(link.values()) for link in links]
    free, ends = [0.0 for _ in ranks], {}
    for rank, action in walk(schedule):
        now = max([free[rank], *(ends[needed] for needed in dependencies(action, stages))])
        layers = layouts[rank].stages[action.stage]
        for layer in layers if action.kind == "F" else reversed(layers):
            if action.kind == "F":
                now = max([now, *(links[rank][product.bucket] for product in layer)]) + sum(p.seconds for p in layer)
                continue
            for product in reversed(layer):
                weight = action.kind == "W" or not schedule.split
                now += product.seconds * ((action.kind == "B") + weight)
                if weight:
                    missing[rank][product.bucket] -= 1
                    if missing[rank][product.bucket] == 0:
                        reduced[rank] = max(now, reduced[rank]) + layouts[rank].sent[product.bucket] / bandwidth
        free[rank] = ends[action] = now
    return max(free + reduced)


def _gathered(schedule: Schedule, rank: int, of: Layout, bandwidth: float) -> dict[int, float]:
    """When each bucket's new weights are there, from the start of the step."""
    firsts = dict.fromkeys(action.stage for action in schedule.actions[rank] if action.kind == "F")
    order = dict.fromkeys(product.bucket for stage in firsts for layer in of.stages[stage] for product in layer)
    now, there = 0.0, {}
    for bucket in order:
        now += of.sent[bucket] / bandwidth
        there[bucket] = now
    return there


def stretched(of: Layout, factor: float) -> Layout:
    """The same with products that take `factor` times as long."""
    stages = {
        number: [[replace(product, seconds=product.seconds * factor) for product in layer] for layer in layers]
        for number, layers in of.stages.items()
    }
    return replace(of, stages=stages)


def exposed(step: float, compute: float, link: float) -> float:
    """The share of what could be hidden that was not."""
    return (step - max(compute, link)) / min(compute, link)


def measure(name: str, pipeline: int, microbatches: int, ratios: list[float], steps: int) -> list[dict[str, Any]]:
    """A row of the table for every ratio of exchange to compute."""
    with Ranks(2 * pipeline, engines, name, pipeline, microbatches) as ranks:
        # The shortest: other programs may slow what sleeps, but make nothing faster.
        seconds = lambda *what: min(ranks("steps", *what, steps)[0].seconds)  # noqa: E731
        free: list[Steps] = ranks("steps", False, math.inf, steps)
        compute, sent = min(free[0].seconds), max(of.sent for of in free)
        layouts: list[Layout] = ranks("layout")[::2]  # pipeline ranks are outside, data-parallel ones inside
        schedule = make_schedule(name, pipeline, microbatches)
        products = ideal_step(schedule, layouts, math.inf)
        layouts = [stretched(of, compute / products) for of in layouts]
        rows = []
        for ratio in ratios:
            link = ratio * compute
            bandwidth = sent / link
            off, on = seconds(False, bandwidth), seconds(True, bandwidth)
            rows.append(
                {
                    "schedule": name,
                    "pipeline_ranks": pipeline,
                    "microbatches": microbatches,
                    "buckets": len(layouts[0].sent),
                    "ratio": ratio,
                    "compute_seconds": compute,
                    "products_of_compute": products / compute,
                    "link_seconds": link,
                    "off_seconds": off,
                    "on_seconds": on,
                    "off": exposed(off, compute, link),
                    "on": exposed(on, compute, link),
                    "bound": exposed(ideal_step(schedule, layouts, bandwidth), compute, link),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


HEAD = (
    f"{'schedule':10} {'ranks':>8} {'m':>2} {'buckets':>7} {'K / C':>6} {'C':>8} {'K':>8} {'T, off':>8} {'T, on':>8}   "
    f"{'exposed: off':>12} {'on':>5} {'bound':>6}"
)


def line(row: dict[str, Any]) -> str:
    """A row under HEAD."""
    times = " ".join(f"{row[key + '_seconds']:6.3f} s" for key in ("compute", "link", "off", "on"))
    shares = f"{row['off']:12.2f} {row['on']:5.2f} {row['bound']:6.2f}"
    ranks = f"pp{row['pipeline_ranks']} dp2"
    return f"{row['schedule']:10} {ranks:>8} {row['microbatches']:2} {row['buckets']:7} {row['ratio']:6.2f} {times}   {shares}"


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 1, 2], help="K / C (default: 0.25 0.5 1 2)")
    options.add_argument("--steps", type=int, default=4, help="timed steps of each kind (default: %(default)s)")
    args = options.parse_args()
    conditions = machine("torch", speed_of_a_device=SPEED)
    print(HEAD)
    rows = [row for case in CASES for row in measure(*case, args.ratios, args.steps)]
    return finish(
        args.output,
        f"with parallel.overlap the exposed share of the exchange is within {TOLERANCE} of the bound",
        all(row["on"] <= row["bound"] + TOLERANCE for row in rows),
        conditions,
        shape={**SHAPE, "tokens_of_a_step_and_replica": ROWS * SEQUENCE},
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(main())
