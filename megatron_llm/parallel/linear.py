"""Linear layers whose weight is cut over the tensor-parallel axis (Shoeybi et al. 2019; sequence parallelism:
Korthikanti et al. 2022). Called by `models/attention.py`, `models/mlp.py` and `models/decoder.py`.

Overlap of communication with compute is written here, once, for every layer:

    column-parallel   sequence parallel                            without
    forward           x = all-gather(x_s);  y = x W^T              y = x W^T
    input gradient    dx = dy W  while x_s is gathered again;      dx = dy W
                      dx_s = reduce-scatter(dx)                    all-reduce(dx)
    weight gradient   dW += dy^T x  while dx is reduced            dW += dy^T x  while dx is reduced

    row-parallel      sequence parallel                            without
    forward           y_s = reduce-scatter(x W^T)                  y = all-reduce(x W^T)
    input gradient    dy = all-gather(dy_s);  dx = dy W            dx = dy W
    weight gradient   dW += dy^T x                                 dW += dy^T x

The gathered input is not kept for backward: sequence parallelism would otherwise save nothing. In a split backward the weight
gradient, and with it the second gather of x_s, waits in `parallel/weight_grad.py`; the reduction of dx then overlaps nothing.

A weight is an attribute of `ctx` and not a saved tensor: hooks on those (`models/recompute.py`) would give it back without its
`main_grad`.

Shape suffixes: T tokens, S tokens of this rank's sequence shard (T / tp), I input features, O output features (local).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.ops.matmul import matmul, widen
from megatron_llm.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from megatron_llm.parallel.weight_grad import defer_linear_weight_gradient, linear_weight_gradient


@dataclass(frozen=True)
class OutputShard:
    """This rank's share of the rows of one logical weight inside a (possibly fused) column-parallel weight.

    Attributes:
        name: logical name of the weight; rows: how many it has in the whole model.
        start, stop: the logical rows held here; local_rows: rows reserved, more than stop - start where padded.
        replica: the ranks that hold the same rows and partial gradients: KV heads when tp exceeds them, a tied embedding.
    """

    name: str
    rows: int
    start: int
    stop: int
    local_rows: int
    replica: Axis = Axis("none")

    @classmethod
    def even(cls, name: str, rows: int, tp: Axis, replica: Axis = Axis("none")) -> OutputShard:
        """Rows cut in equal blocks; the last ranks are padded where tp does not divide them."""
        local = -(-rows // tp.size)
        return cls(name, rows, min(tp.rank * local, rows), min((tp.rank + 1) * local, rows), local, replica)

    @classmethod
    def replicated_heads(cls, name: str, heads: int, head_dim: int, tp: Axis, replica: Axis) -> OutputShard:
        """Heads cut evenly over tp, or, when tp is larger, each head on `replica.size` neighbouring ranks."""
        local = max(1, heads // tp.size) * head_dim
        start = (tp.rank // replica.size) * local
        return cls(name, heads * head_dim, start, start + local, local, replica)


def sharded_weight(in_features: int, shards: list[OutputShard], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A zero-filled weight [sum of local rows, in_features] whose spec names each shard as a logical tensor."""
    weight = nn.Parameter(torch.zeros(sum(shard.local_rows for shard in shards), in_features, dtype=dtype, device=device))
    parts, row = [], 0
    for shard in shards:
        size = (shard.stop - shard.start, in_features)
        held = ((Box((row, 0), size), Box((shard.start, 0), size)),) if size[0] else ()
        summed = shard.replica if shard.replica.size > 1 else None
        parts.append(Part(shard.name, (shard.rows, in_features), held, "normal", shard.replica.size, shard.replica.rank, summed))
        row += shard.local_rows
    weight.shard = ShardSpec(tuple(parts))  # type: ignore[attr-defined]
    return weight


class ColumnParallelLinear(nn.Module):
    """y = x W^T with the rows of W (output features) cut over tp; several logical weights may share one W and one GEMM.

    Input [S, I] when sequence parallel, else [T, I]; output [T, O]: the outputs of all shards side by side.
    With `keep_wide` an output that the device computes in float32 anyway (`ops/matmul.py`) is not rounded.
    """

    def __init__(self, weight_OI: nn.Parameter, tp: Axis):
        super().__init__()
        self.weight, self.tp = weight_OI, tp

    def forward(self, x: Tensor, sequence_parallel: bool, keep_wide: bool = False) -> Tensor:
        return _ColumnParallel.apply(x, self.weight, self.tp, sequence_parallel and self.tp.size > 1, keep_wide)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x W^T with the columns of W (input features) cut over tp.

    Input [T, I]; output [S, O] when sequence parallel, else [T, O].
    """

    def __init__(self, name: str, in_features: int, out_features: int, tp: Axis, dtype: torch.dtype, device: torch.device):
        super().__init__()
        assert in_features % tp.size == 0, (name, in_features, tp.size)
        self.tp = tp
        local = in_features // tp.size
        self.weight = nn.Parameter(torch.zeros(out_features, local, dtype=dtype, device=device))
        boxes = (Box.full((out_features, local)), Box((0, tp.rank * local), (out_features, local)))
        self.weight.shard = ShardSpec((Part(name, (out_features, in_features), (boxes,)),))  # type: ignore[attr-defined]

    def forward(self, x_TI: Tensor, sequence_parallel: bool) -> Tensor:
        return _RowParallel.apply(x_TI, self.weight, self.tp, sequence_parallel and self.tp.size > 1)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, tp: Axis, gather: bool, keep_wide: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.tp, ctx.gather = weight_OI, tp, gather
        x_TI = widen(all_gather(x, tp) if gather else x)
        return matmul(x_TI, weight_OI.t(), x_TI.dtype if keep_wide else x.dtype)

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,), weight_OI = ctx.saved_tensors, ctx.weight
        need_dx, need_dw = ctx.needs_input_grad[:2]
        if need_dw and defer_linear_weight_gradient(weight_OI, dy_TO, x, ctx.tp if ctx.gather else None):
            need_dw = False
        gathering = start_all_gather(x, ctx.tp) if ctx.gather and need_dw else None
        reducing = None
        dy_TO = widen(dy_TO)  # once for both products
        if need_dx:
            dx = matmul(dy_TO, weight_OI, x.dtype)
            reducing = start_reduce_scatter(dx, ctx.tp) if ctx.gather else start_all_reduce(dx, ctx.tp)
        dw = linear_weight_gradient(weight_OI, dy_TO, gathering.wait() if gathering else x) if need_dw else None
        return reducing.wait() if reducing else None, dw, None, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, tp: Axis, scatter: bool) -> Tensor:
        ctx.save_for_backward(x_TI)
        ctx.weight, ctx.tp, ctx.scatter = weight_OI, tp, scatter
        y_TO = matmul(x_TI, weight_OI.t())
        return reduce_scatter(y_TO, tp) if scatter else all_reduce(y_TO, tp)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x_TI,), weight_OI = ctx.saved_tensors, ctx.weight
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dy_TO = all_gather(dy, ctx.tp) if ctx.scatter else dy
        if need_dw and defer_linear_weight_gradient(weight_OI, dy_TO, x_TI):
            need_dw = False
        dy_TO = widen(dy_TO)
        dx_TI = matmul(dy_TO, weight_OI, x_TI.dtype) if need_dx else None
        return dx_TI, linear_weight_gradient(weight_OI, dy_TO, x_TI) if need_dw else None, None, None
