"""What every layer of a stage needs to know about the tokens of one forward pass. Made by `models/decoder.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_llm.models.regularization import Noise
from megatron_llm.ops.scores import Shared


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens (`generation/cache.py`).

    lengths: tokens of each sequence, those of this pass included.
    """

    @property
    def lengths(self) -> Sequence[int]: ...

    def extend(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Append this pass's keys and values of a layer; all keys, all values [S, K, D] and their boundaries."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """Attributes:
    rope, local_rope: cosine and sine of all T tokens (never sharded), each [T, 1, P], for layers without and with a sliding
        window where these differ; None in models without rotary embeddings.
    cu_seqlens: document boundaries of the T tokens.
    sequence_parallel: whether activations between tensor-parallel regions are sharded along tokens in this pass.
    cache: earlier keys and values when generating.
    shared: what the layers' attention makes once for all of them.
    noise: dropout of this pass, when training with it.
    """

    rope: tuple[Tensor, Tensor] | None
    local_rope: tuple[Tensor, Tensor] | None
    cu_seqlens: tuple[int, ...]
    sequence_parallel: bool
    cache: KeyValueCache | None = None
    shared: Shared = field(default_factory=dict)
    noise: Noise | None = None
