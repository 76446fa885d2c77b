"""More tokens than a source of weights has: new rows of embedding and head, which begin as the mean of the stored ones.

The mean row is the choice of transformers, too: random rows would be far from all others and get most of the probability. It is
summed in float64 in a fixed order, so it is the same on every rank and in every layout. Called by `training/resolve.py` and
`exchange/imports.py`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_llm.parallel.shard import Box, Part, TypedSource, slabs

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_TENSORS = ("embedding.weight", "head.weight", "head.bias")


def resized(source: TypedSource, stored: int, size: int, where: str) -> TypedSource:
    """`source`, whose vocabulary has `stored` tokens, with `size` of them.

    Raises ValueError saying `where` it came from if these are fewer: rows of tokens are never dropped.
    """
    refuse_to_shrink(stored, size, where)
    return source if size == stored else ResizedVocabulary(source, stored, size)


def refuse_to_shrink(stored: int, size: int, where: str) -> None:
    """Raises ValueError if there would be fewer tokens than before."""
    if size < stored:
        raise ValueError(f"a vocabulary of {size} tokens is smaller than the {stored} of {where}; rows are added, never dropped")


class ResizedVocabulary:
    """A source with more rows for tokens. Whoever asks for new rows reads all stored ones of the matrix once."""

    def __init__(self, source: TypedSource, stored: int, size: int):
        self._source, self._stored, self._size = source, stored, size
        self._means: dict[str, Tensor] = {}

    def dtype(self, name: str) -> str:
        return self._source.dtype(name)

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of a box, in the dtype of the source. Raises ValueError like the source."""
        if part.name not in VOCABULARY_TENSORS:
            return self._source.read(part, box)
        if part.shape[0] != self._size:
            raise ValueError(f"{part.name} has {part.shape[0]} rows in the model, the vocabulary {self._size} tokens")
        stored = dataclasses.replace(part, shape=(self._stored, *part.shape[1:]))
        known = max(0, min(box.shape[0], self._stored - box.offset[0]))
        values = self._source.read(stored, Box(box.offset, (known, *box.shape[1:]))) if known else None
        if values is not None and known == box.shape[0]:
            return values
        mean = self._mean(stored)
        whole = mean.new_empty(box.shape)
        whole[known:] = mean[box.slices[1:]]
        if values is not None:
            whole[:known] = values
        return whole

    def _mean(self, stored: Part) -> Tensor:
        """The mean of all stored rows, in the dtype of the source."""
        import numpy as np
        import torch

        from megatron_llm.ops.tensor_file import torch_dtype

        if stored.name not in self._means:
            total = np.zeros(stored.shape[1:])
            for slab in slabs(Box.full(stored.shape)):
                total = total + self._source.read(stored, slab).double().numpy().sum(axis=0)  # numpy: in order, by one thread
            self._means[stored.name] = torch.tensor(total / self._stored).to(torch_dtype(self.dtype(stored.name)))
        return self._means[stored.name]
