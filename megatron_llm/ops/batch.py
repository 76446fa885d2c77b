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
        roles_T: uint8 [T], who speaks the label of each position (`data.indexed.ROLES`), 0 where nobody is known to; None of
            batches that are not measured by role.
        rows: number of each row of the micro-batch in its stream, -1 for a fill row: with the place in the row the address of a
            token that does not depend on the layout.
    """

    tokens_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    positions_T: Tensor
    cu_seqlens: tuple[int, ...]
    roles_T: Tensor | None = None
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(column: Tensor) -> Tensor:
            return column.to(device, non_blocking=True)

        tokens_T, labels_T, weights_T, positions_T = map(move, (self.tokens_T, self.labels_T, self.weights_T, self.positions_T))
        roles_T = None if self.roles_T is None else move(self.roles_T)
        return Batch(tokens_T, labels_T, weights_T, positions_T, self.cu_seqlens, roles_T, self.rows)
