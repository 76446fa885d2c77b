"""Which rows of a global batch fall into which micro-batch of this replica. Called by `training/step.py` and `evaluation.py`.

Every rank builds its batches from row numbers: nothing is broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llm.data.stream import TokenStream
from megatron_llm.ops.batch import Batch
from megatron_llm.training.build import Engine


class Microbatches:
    """The micro-batches of the rows of a global batch; None is a fill row. Each is kept from a rank's first stage to its last."""

    def __init__(self, engine: Engine, stream: TokenStream, rows: Sequence[int | None]):
        self._engine, self._stream, self._rows = engine, stream, rows
        self._last_here = max(engine.stages)
        self._batches: dict[int, Batch] = {}

    def batch(self, stage: int, microbatch: int) -> Batch:
        """What a stage of this rank reads of a micro-batch, on the device. Each is asked for once, in the order of the stages."""
        if microbatch not in self._batches:
            dp, size = self._engine.grid.dp, self._engine.config.training.micro_batch_size
            first = (microbatch * dp.size + dp.rank) * size
            self._batches[microbatch] = self._stream.batch(self._rows[first : first + size]).to(self._engine.device)
        return self._batches.pop(microbatch) if stage == self._last_here else self._batches[microbatch]
