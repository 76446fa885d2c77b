"""What a tensor-parallel rank has of a model's heads and channels. Called by the other files of this package."""

from __future__ import annotations

from typing import NamedTuple

from megatron_llm.config import Config
from megatron_llm.models.heads import Heads
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import balanced


class Share(NamedTuple):
    """Of query heads, key/value heads, channels inside the MLP, and the vocabulary with its padding."""

    queries: int
    keys: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: Config, rank: int = 0) -> Share:
        """That of a tensor-parallel rank; none has more than the first."""
        model, tp = config.model, config.parallel.tensor_parallel
        alone = config.parallel.model_copy(
            update={"pipeline_parallel": 1, "context_parallel": 1, "pipeline_schedule": "1f1b", "virtual_stages": 1}
        )
        grid = Grid.imagined(alone, model.num_key_value_heads, tp, rank)
        heads = Heads.of(model, grid)
        inner = balanced(model.intermediate_size, grid.tp)
        return cls(len(heads.queries), len(heads.keys), len(inner), -(-model.vocab_size // tp))
