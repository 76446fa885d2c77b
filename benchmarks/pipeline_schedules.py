"""Claim: a step takes as long as `pipeline/simulate.py` says, within 5 % and the scheduling noise, under every schedule.

Stages that only sleep let two cores stand for many devices: F, B and W of a stage sleep a fixed time, and everything else is
real, processes, messages over gloo, autograd, the queue of weight gradients, the runtime and its trace. The simulation knows
the sleeps and takes messages to be free. Noise is what sleeping itself loses: every rank, at the same time as the others,
sleeps as often and as long as its actions do in a step, without any message, just before the step that is measured.

    python benchmarks/pipeline_schedules.py [--ranks 2 4 8] [--repeats 3] [--milliseconds 50]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from common import finish, machine, parser
from torch import Tensor

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.pipeline.check import check
from megatron_llm.pipeline.runtime import PipelineRuntime
from megatron_llm.pipeline.schedules import NAMES, Schedule, make_schedule
from megatron_llm.pipeline.simulate import Costs, simulate
from megatron_llm.pipeline.timeline import Event, Timeline

TOLERANCE = 0.05
SHAPE = (16, 16)  # of the messages
RATIO = {"F": 1.0, "B": 1.1, "W": 0.8}  # of the sleeps
LIMIT = 600.0  # seconds


@dataclass(frozen=True)
class Case:
    """A schedule, and how long a rank sleeps in the F of a micro-batch, over all of its stages."""

    name: str
    ranks: int
    microbatches: int
    seconds: float

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.name, self.ranks, self.microbatches, 2 if self.name in ("interleaved", "breadth_first") else 1)

    @property
    def costs(self) -> Costs:
        stages = len(self.schedule.placement)
        forward, backward, weight = (RATIO[kind] * self.seconds * self.ranks / stages for kind in "FBW")
        held = self.ranks / stages  # in activations of a micro-batch on a rank
        return Costs.uniform(stages, forward, backward, weight, 0.0, held, held)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step from the first action to the last, and what sleeping loses, as a share of the sleep."""

    makespan: float
    bubble: float
    noise: float


class _Sleep(torch.autograd.Function):
    """A stage: the identity, slowly. What has to sleep for W goes into the queue, as a weight gradient would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: tuple[float, float, float], queue: WeightGradients) -> Tensor:
        ctx.seconds, ctx.queue = seconds, queue
        time.sleep(seconds[0])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        _, backward, weight = ctx.seconds
        time.sleep(backward)
        if not ctx.queue.put(lambda: lambda: time.sleep(weight)):
            time.sleep(weight)
        return dy.clone(), None, None


def measure(cases: list[Case], repeats: int) -> list[list[Measured]]:
    """`repeats` steps of every case, on every rank of an initialized process group; the result is that of rank 0."""
    ranks = dist.get_world_size()
    grid = Grid.build(ParallelConfig(pipeline_parallel=ranks, timeout_seconds=LIMIT), 1)
    return [_measure(case, grid, repeats) for case in cases]


def _measure(case: Case, grid: Grid, repeats: int) -> list[Measured]:
    schedule, costs = case.schedule, case.costs
    check(schedule)
    last = len(schedule.placement) - 1
    queue = WeightGradients(())
    runtime = PipelineRuntime(grid, SHAPE, torch.float32, torch.device("cpu"), schedule.placement, queue, LIMIT)

    def forward(pace: float, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
        f, b, w = (pace * seconds[stage] for seconds in (costs.forward, costs.backward, costs.weight))
        y = _Sleep.apply(x, (f, b, w), queue)
        return y.sum() if stage == last else y

    runtime.run(schedule, partial(forward, 0.0))  # first uses: sockets, autograd, threads
    results = []
    for _ in range(repeats):
        noise = _noise(schedule, costs, grid)
        events: list[Event] = []
        runtime.run(schedule, partial(forward, 1.0), events)
        gathered: list[Any] = [None] * grid.pp.size
        dist.all_gather_object(gathered, (events, noise), group=grid.pp.group)
        timeline = Timeline(schedule.placement, tuple(event for of_rank, _ in gathered for event in of_rank))
        results.append(Measured(timeline.makespan, timeline.bubble_of_makespan, max(noise for _, noise in gathered)))
    return results


def _noise(schedule: Schedule, costs: Costs, grid: Grid) -> float:
    """By how much, relatively, the sleeps of this rank's actions take longer than they should."""
    durations = {"F": costs.forward, "B": costs.backward, "W": costs.weight}
    if not schedule.split:
        durations["B"] = tuple(b + w for b, w in zip(costs.backward, costs.weight, strict=True))
    sleeps = [durations[action.kind][action.stage] for action in schedule.actions[grid.pp.rank]]
    dist.barrier(group=grid.pp.group)
    start = time.perf_counter()
    for seconds in sleeps:
        time.sleep(seconds)
    return (time.perf_counter() - start) / sum(sleeps) - 1


def summary(case: Case, runs: list[Measured]) -> dict[str, Any]:
    """One line of the table: medians of the runs beside the simulation."""
    simulation = simulate(case.schedule, case.costs)
    ratio = statistics.median(run.makespan for run in runs) / simulation.timeline.makespan
    noise = statistics.median(run.noise for run in runs)
    return {
        "schedule": case.name,
        "ranks": case.ranks,
        "microbatches": case.microbatches,
        "simulated_seconds": simulation.timeline.makespan,
        "measured_seconds": statistics.median(run.makespan for run in runs),
        "ratio": ratio,
        "noise": noise,
        "bubble": {
            "simulated": simulation.timeline.bubble_of_makespan,
            "measured": statistics.median(run.bubble for run in runs),
        },
        "peak_activations": max(simulation.peak_bytes),
        "holds": abs(ratio - 1) <= TOLERANCE + noise,
        "runs": [asdict(run) for run in runs],
    }


def _rank(rank: int, folder: str, ranks: int, cases: list[Case], repeats: int) -> None:
    """A process of the benchmark; rank 0 writes what was measured."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's host name need not resolve
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT))
    results = measure(cases, repeats)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps([[asdict(run) for run in runs] for runs in results]))
    dist.barrier()
    dist.destroy_process_group()


def run(cases: list[Case], repeats: int) -> list[list[Measured]]:
    """Measure on as many processes as the cases have ranks."""
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        # Forked, not spawned: eight interpreters that import torch at once take a minute on two cores.
        multiprocessing.start_processes(_rank, (folder, ranks, cases, repeats), nprocs=ranks, start_method="fork")
        stored = json.loads(Path(folder, "results.json").read_text())
    return [[Measured(**run) for run in runs] for runs in stored]


HEAD = (
    f"{'schedule':14} {'ranks':>5} {'micro-batches':>13} {'simulated':>10} {'measured':>10} {'ratio':>6} {'noise':>7} "
    f"{'bubble':>7} {'measured':>8} {'peak':>6}"
)


def line(row: dict[str, Any]) -> str:
    """A summary under HEAD. Bubbles are idle over busy time; the peak is in activations of a micro-batch on a rank."""
    bubble = row["bubble"]
    return (
        f"{row['schedule']:14} {row['ranks']:5} {row['microbatches']:13} {row['simulated_seconds']:8.3f} s "
        f"{row['measured_seconds']:8.3f} s {row['ratio']:6.3f} {row['noise']:7.2%} {bubble['simulated']:7.1%} "
        f"{bubble['measured']:8.1%} {row['peak_activations']:6.1f}" + "  <- does not hold" * (not row["holds"])
    )


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8], help="pipeline sizes (default: 2 4 8)")
    options.add_argument("--schedules", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="default: all")
    options.add_argument("--repeats", type=int, default=3, help="steps of each schedule (default: %(default)s)")
    options.add_argument("--milliseconds", type=float, default=50.0, help="F of a micro-batch on a rank (default: %(default)g)")
    args = options.parse_args()
    conditions = machine("torch")
    torch.set_num_threads(1)  # before the fork: an OpenMP pool does not survive it

    print(HEAD)
    rows = []
    for ranks in args.ranks:
        cases = [Case(name, ranks, max(8, 2 * ranks), args.milliseconds / 1000) for name in args.schedules]
        for case, runs in zip(cases, run(cases, args.repeats), strict=True):
            row = summary(case, runs)
            rows.append(row)
            print(line(row), flush=True)
    return finish(
        args.output,
        f"measured makespan of sleeping stages within {TOLERANCE:.0%} plus noise of the simulated one",
        all(row["holds"] for row in rows),
        conditions,
        sleeps={"milliseconds": args.milliseconds, "ratio": RATIO},
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(main())
