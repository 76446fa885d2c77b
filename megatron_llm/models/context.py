"""What every layer of a stage needs to know about the tokens of one forward pass. Made by `models/decoder.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens (`generation/cache.py`)."""

    def extend(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Append this pass's keys and values of a layer; all keys, all values [S, K, D] and their boundaries."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """Attributes:
    cos_T1P, sin_T1P: rotary tables of all T tokens (never sharded).
    cu_seqlens: document boundaries of the T tokens.
    sequence_parallel: whether activations between tensor-parallel regions are sharded along tokens in this pass.
    attention_backend: name for `ops.attention`.
    cache: earlier keys and values when generating.
    """

    cos_T1P: Tensor
    sin_T1P: Tensor
    cu_seqlens: tuple[int, ...]
    sequence_parallel: bool
    attention_backend: str
    cache: KeyValueCache | None = None
