"""Keys and values of earlier tokens, per layer and sequence. Implements `models.context.KeyValueCache`.

Shape suffixes: T tokens of this pass, S all cached tokens, K key/value heads, D head dimension, L capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


class SequenceCache:
    """Room for `capacities[i]` tokens of sequence i in each of the layers that ask for it."""

    def __init__(self, capacities: Sequence[int]):
        self.starts = [0, *accumulate(capacities)]
        self.lengths = [0] * len(capacities)
        self.cu_seqlens: tuple[int, ...] = ()
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self, index: int) -> None:
        """Drop all of a sequence: its next pass brings it from the start."""
        self.lengths[index] = 0

    def begin(self, counts: Sequence[int]) -> Tensor:
        """Announce a pass that brings `counts[i]` new tokens of sequence i. Returns their positions, int64 [T]."""
        for index, (count, (start, stop)) in enumerate(zip(counts, pairwise(self.starts), strict=True)):
            assert self.lengths[index] + count <= stop - start, "the cache is too small"
        self._before = list(self.lengths)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.cu_seqlens = (0, *accumulate(counts))
        return torch.cat([torch.arange(a, b) for a, b in zip(self._before, self.lengths, strict=True)])

    def extend(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Store a layer's new keys and values; all of its keys and values, [S, K, D], and their boundaries."""
        if layer not in self._layers:
            shape = (self.starts[-1], *k_TKD.shape[1:])
            self._layers[layer] = (k_TKD.new_empty(shape), v_TKD.new_empty(shape))
        held = []
        for cache_LKD, new_TKD in zip(self._layers[layer], (k_TKD, v_TKD), strict=True):
            rows = []
            for index, (a, b) in enumerate(pairwise(self.cu_seqlens)):
                start = self.starts[index]
                cache_LKD[start + self._before[index] : start + self.lengths[index]] = new_TKD[a:b]
                rows.append(cache_LKD[start : start + self.lengths[index]])
            held.append(torch.cat(rows) if len(rows) > 1 else rows[0])
        return held[0], held[1], (0, *accumulate(self.lengths))
