"""A pipeline of one small linear layer a stage, what it must compute, and random schedules. Used by `test_runtime_*.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.linear import ColumnParallelLinear
from megatron_llm.parallel.weight_grad import WeightGradients
from megatron_llm.pipeline.check import dependencies
from megatron_llm.pipeline.runtime import Forward, PipelineRuntime
from megatron_llm.pipeline.schedules import Action, Schedule

SHAPE = (3, 4)


def make_grid(ranks: int, timeout_seconds: float = 60) -> Grid:
    return Grid.build(ParallelConfig(pipeline_parallel=ranks, timeout_seconds=timeout_seconds), 1)


def matrices(stages: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(stages)]


def make_input(microbatch: int) -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float64).view(SHAPE) * (microbatch + 1)


def loss_of(y: Tensor, microbatch: int) -> Tensor:
    return y.square().sum() * (microbatch + 2)


def reference(schedule: Schedule) -> tuple[dict[int, float], list[Tensor]]:
    """Losses of one step by micro-batch, and gradients by stage: the composed function in plain torch."""
    weights = [matrix.requires_grad_() for matrix in matrices(len(schedule.placement))]
    losses = {}
    for mb in range(schedule.microbatches):
        y = make_input(mb)
        for stage, weight in enumerate(weights):
            y = torch.tanh(y @ weight.t() + 0.1 * stage + 0.01 * mb)
        loss = loss_of(y, mb)
        losses[mb] = loss.item()
        loss.backward()
    return losses, [weight.grad for weight in weights if weight.grad is not None]


class Toy:
    """The stages of one rank and the runtime that drives them. Stages are not symmetric in number and micro-batch."""

    def __init__(self, placement: tuple[int, ...], timeout_seconds: float = 60, grid: Grid | None = None):
        self.grid = grid or make_grid(max(placement) + 1, timeout_seconds)
        self.last = len(placement) - 1
        self.layers: dict[int, ColumnParallelLinear] = {}
        for stage, matrix in enumerate(matrices(len(placement))):
            if placement[stage] == self.grid.pp.rank:
                self.layers[stage] = ColumnParallelLinear(nn.Parameter(matrix), Axis("tp"))
                self.layers[stage].weight.main_grad = torch.zeros_like(matrix)  # type: ignore[assignment]
        self.gradients = WeightGradients(self.layers.values())
        self.losses: dict[int, float] = {}
        device = torch.device("cpu")
        self.runtime = PipelineRuntime(
            self.grid, SHAPE, torch.float64, device, placement, self.gradients, timeout_seconds=timeout_seconds
        )

    def main_grads(self) -> dict[int, Tensor]:
        return {stage: layer.weight.main_grad for stage, layer in self.layers.items()}  # type: ignore[misc]

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        assert (x is None) == (stage == 0)
        y = self.layers[stage](make_input(microbatch) if x is None else x, False)
        y = torch.tanh(y + 0.1 * stage + 0.01 * microbatch)
        if stage < self.last:
            return y
        loss = loss_of(y, microbatch)
        assert microbatch not in self.losses
        self.losses[microbatch] = loss.item()
        return loss

    def run(self, schedule: Schedule, wrap: Callable[[Forward], Forward] = lambda forward: forward, **options: Any) -> None:
        self.runtime.run(schedule, wrap(self.forward), **options)


def random_schedule(seed: int, ranks: int, stages: int, microbatches: int, split: bool) -> Schedule:
    """Any placement, any order: at every turn some action is done whose inputs are there."""
    rng = random.Random(seed)
    placement = [*range(ranks), *(rng.randrange(ranks) for _ in range(stages - ranks))]
    rng.shuffle(placement)
    waiting = {Action(kind, s, mb) for kind in ("FBW" if split else "FB") for s in range(stages) for mb in range(microbatches)}  # type: ignore[arg-type]
    done: list[Action] = []
    while waiting:
        ready = sorted(action for action in waiting if not waiting.intersection(dependencies(action, stages)))
        done.append(rng.choice(ready))
        waiting.remove(done[-1])
    rows = tuple(tuple(action for action in done if placement[action.stage] == rank) for rank in range(ranks))
    return Schedule(tuple(placement), microbatches, rows)
