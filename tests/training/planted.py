"""Token streams with something wrong in chosen rows, for tests of what a run does about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_llm.data.stream import TokenStream
from megatron_llm.ops.batch import Batch


class PlantedStream:
    """`stream`, but the loss weights of the rows in `factors` are multiplied."""

    def __init__(self, stream: TokenStream, factors: dict[int, float]):
        self.stream, self.factors = stream, factors

    def batch(self, rows: Sequence[int | None]) -> Batch:
        batch = self.stream.batch(rows)
        length = len(batch.weights_T) // len(rows)
        factors = torch.tensor([1.0 if row is None else self.factors.get(row, 1.0) for row in rows])
        return dataclasses.replace(batch, weights_T=batch.weights_T * factors.repeat_interleave(length))
