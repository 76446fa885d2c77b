"""Runs with something wrong in chosen rows, for tests of what they do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch

from megatron_llm.checkpoint import Saver
from megatron_llm.config import Config
from megatron_llm.data.stream import TokenStream, build_train_stream
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.loop import Run
from megatron_llm.training.metrics import Metrics
from megatron_llm.training.recovery import make_pruner
from megatron_llm.training.run_folder import RunFolder
from megatron_llm.training.signals import StopRequest
from megatron_llm.training.step import RunState
from megatron_llm.training.stragglers import Stragglers


class PlantedStream:
    """`stream`, but the loss weights of the rows in `factors` are multiplied."""

    def __init__(self, stream: TokenStream, factors: dict[int, float]):
        self.stream, self.factors, self.summary = stream, factors, stream.summary

    def batch(self, rows: Sequence[int | None]) -> Batch:
        batch = self.stream.batch(rows)
        length = len(batch.weights_T) // len(rows)
        factors = torch.tensor([1.0 if row is None else self.factors.get(row, 1.0) for row in rows])
        return dataclasses.replace(batch, weights_T=batch.weights_T * factors.repeat_interleave(length))


def fresh_run(config: Config) -> Run:
    """What the loop of a new run steps through, on a rank of `run_ranks`. The run folder is not entered."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    folder = RunFolder(config, grid.world.rank)
    folder.path.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(config, grid.world.size, engine.device, 0) if grid.world.first else None
    stop = cast(StopRequest, SimpleNamespace(requested=False))
    saver = Saver(grid.world, True, make_pruner(config))
    stragglers = Stragglers(grid, engine.device, config.logging)
    return Run(engine, RunState(), build_train_stream(config), {}, {}, {}, metrics, stop, saver, None, folder, [], stragglers)
