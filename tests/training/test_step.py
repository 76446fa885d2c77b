"""Which rows a step takes, on any number of replicas."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.training.step import RunState, train_step
from tests.data.sources import make_config


class RecordingStream:
    """Notes which rows a rank asks for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def batch(self, rows: Sequence[int | None]) -> Batch:
        self.rows += [row for row in rows if row is not None]
        size = len(rows)
        tokens = torch.zeros(size, dtype=torch.int64)
        return Batch(tokens, tokens, torch.ones(size), tokens, tuple(range(size + 1)))


def rows_of_step(rank: int, replicas: int, micro_batch: int, batch: int, state: RunState) -> list[int]:
    """Rows that one replica takes in the next `train_step`, whose model and optimizer are stand-ins."""

    class Stage:
        last, dtype = True, torch.float32

        def __call__(self, x: Any, batch: Batch, before_layer: Any, regularization: Any) -> torch.Tensor:
            return torch.zeros(())

        def objective(
            self, hidden: torch.Tensor, batch: Batch, regularization: Any, scale: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return batch.weights_T.sum(), batch.weights_T.sum()

    def run(microbatches: int, forward: Any, trace: Any) -> None:
        for microbatch in range(microbatches):
            forward(0, microbatch, None)

    optimizer = SimpleNamespace(zero_gradients=lambda: None, reduce_gradients=lambda: torch.ones(()), update=lambda *_: None)
    engine = SimpleNamespace(
        config=make_config(training={"global_batch_size": batch, "micro_batch_size": micro_batch}),
        grid=dataclasses.replace(Grid.single(), dp=Axis("dp", rank, replicas)),
        device=torch.device("cpu"),
        stages={0: Stage()},
        optimizer=optimizer,
        runtime=SimpleNamespace(run=run, before_layer=None),
        schedules={batch: batch // (micro_batch * replicas)},
    )
    stream = RecordingStream()
    train_step(cast(Any, engine), cast(Any, stream), state)
    return stream.rows


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_a_step_depend_on_nothing_but_its_number(data: st.DataObject) -> None:
    """Any data-parallel size and micro-batch, changed at a restart: step k takes rows k B to (k + 1) B, each once."""
    batch = data.draw(st.sampled_from([1, 6, 12, 16]))
    state = RunState()
    for step in range(4):
        replicas = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
        micro_batch = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch // replicas % n == 0]))
        states = [dataclasses.replace(state) for _ in range(replicas)]
        rows = [rows_of_step(rank, replicas, micro_batch, batch, states[rank]) for rank in range(replicas)]
        assert sorted(itertools.chain.from_iterable(rows)) == list(range(step * batch, (step + 1) * batch))
        assert all(after == states[0] for after in states)
        state = states[0]
