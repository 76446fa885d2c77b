"""Token embedding with the vocabulary cut over the tensor-parallel axis. Called by `models/decoder.py` and
`models/positions.py`.

Each rank looks up the ids that it owns and contributes zeros for the others; the sum over ranks is the embedding.
The gradient goes to the rows that were looked up, without a dense [V, H] tensor per micro-batch.

Shape suffixes: T tokens, V vocabulary rows held here (padded), H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.parallel.collectives import reduce_from, scatter_sum
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import ShardSpec
from megatron_llm.parallel.weight_grad import embedding_weight_gradient


class VocabParallelEmbedding(nn.Module):
    """[T] ids -> [T, H], or this rank's [T / tp, H] tokens when sequence parallel.

    `weight` and its spec are made by the caller, because a tied head shares them; `start` is the first id held here.
    kernel: that adds the gradients of tokens to rows, "torch" or "triton".
    """

    def __init__(self, weight_VH: nn.Parameter, start: int, tp: Axis, kernel: str = "torch"):
        super().__init__()
        assert isinstance(getattr(weight_VH, "shard", None), ShardSpec)
        self.weight, self.start, self.tp, self.kernel = weight_VH, start, tp, kernel

    def forward(self, ids_T: Tensor, sequence_parallel: bool) -> Tensor:
        partial_TH = _Lookup.apply(ids_T, self.weight, self.start, self.tp.size > 1, self.kernel)
        return scatter_sum(partial_TH, self.tp) if sequence_parallel else reduce_from(partial_TH, self.tp)


def lookup(rows_T: Tensor, weight_VH: Tensor, kernel: str = "torch") -> Tensor:
    """Rows of a table that is whole on this rank: [T] -> [T, H]."""
    return _Lookup.apply(rows_T, weight_VH, 0, False, kernel)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: Tensor, weight_VH: Tensor, start: int, partial: bool, kernel: str) -> Tensor:
        rows_T = ids_T - start
        ctx.kernel = kernel
        if not partial:
            ctx.save_for_backward(rows_T, weight_VH)
            return weight_VH[rows_T]
        absent_T = (rows_T < 0) | (rows_T >= weight_VH.shape[0])
        held_T = rows_T % weight_VH.shape[0]  # any row does for an absent id, as what it reads and adds is zero
        if kernel == "triton":  # which leaves absent rows out by itself
            ctx.save_for_backward(rows_T, weight_VH)
        else:
            ctx.save_for_backward(held_T, weight_VH, absent_T)
        return weight_VH[held_T].masked_fill(absent_T[:, None], 0)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        rows_T, weight_VH, *absent = ctx.saved_tensors
        if absent:
            dy_TH = dy_TH.masked_fill(absent[0][:, None], 0)  # not left out: a GPU would have to tell the host how many
        return None, embedding_weight_gradient(weight_VH, rows_T, dy_TH, ctx.kernel), None, None, None
