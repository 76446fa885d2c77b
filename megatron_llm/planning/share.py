"""What a tensor-parallel rank has of a model's heads and channels. Called by the other files of this package."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from megatron_llm.config import Config, ParallelConfig
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
        grid = _grid(model.num_key_value_heads, tp, rank)
        heads = Heads.of(model, grid)
        inner = balanced(model.intermediate_size, grid.tp)
        return cls(len(heads.queries), len(heads.keys), len(inner), -(-model.vocab_size // tp))


@lru_cache(maxsize=256)
def _grid(key_value_heads: int, tensor_parallel: int, rank: int) -> Grid:
    """Of tensor parallelism alone. A search asks for the same few thousands of times."""
    return Grid.imagined(ParallelConfig(tensor_parallel=tensor_parallel), key_value_heads, tensor_parallel, rank)
