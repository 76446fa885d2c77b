"""`Batch`: flat packed tokens with their document boundaries, the one structure that `data` makes and `models` read.

It lives at the lowest level because both sides need it and must not import each other. Tokens of a micro-batch are one
flat axis T = rows * sequence_length, so every pipeline message has one static shape; documents are told apart by
`cu_seqlens` (block-diagonal attention) and `positions_T` (restart at 0 in every document). Every pipeline stage and
every tensor-parallel rank holds the boundaries: a stage without them would attend across documents.

Shape suffixes: T tokens of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one model replica.

    Attributes:
        tokens_T: int64 [T], the input ids.
        labels_T: int64 [T], the id that each position predicts; ignored where the weight is 0.
        weights_T: float32 [T], loss weight of each prediction; 0 for padding, prompts and fill rows.
        positions_T: int64 [T], position of each token inside its document.
        cu_seqlens: starts of the documents, then T: 0 = c[0] < c[1] < ... < c[n] = T. Kept on the host, so that no
            attention call has to wait for the device to learn its loop bounds.
    """

    tokens_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    positions_T: Tensor
    cu_seqlens: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(column: Tensor) -> Tensor:
            return column.to(device, non_blocking=True)

        return Batch(move(self.tokens_T), move(self.labels_T), move(self.weights_T), move(self.positions_T), self.cu_seqlens)
