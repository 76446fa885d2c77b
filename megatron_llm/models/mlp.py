"""SwiGLU feed-forward with gate and up in one weight and one GEMM. Called by `models/block.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.context import ForwardContext
from megatron_llm.models.norm import RMSNorm
from megatron_llm.models.recompute import recomputed
from megatron_llm.ops.swiglu import swiglu
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import ColumnParallelLinear, OutputShard, RowParallelLinear, sharded_weight


class MLP(nn.Module):
    """[S, H] or [T, H] -> the same shape. `recompute`: what backward makes again; "norms" and "activation" are done here."""

    def __init__(
        self, model: ModelConfig, layer: int, grid: Grid, recompute: frozenset[str], dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        self.recompute = recompute
        name, tp = f"layers.{layer}.mlp", grid.tp
        shards = [OutputShard.even(f"{name}.{half}.weight", model.intermediate_size, tp) for half in ("gate", "up")]
        self.gate_up = ColumnParallelLinear(sharded_weight(model.hidden_size, shards, dtype, device), tp)
        self.down = RowParallelLinear(f"{name}.down.weight", model.intermediate_size, model.hidden_size, tp, dtype, device)

    def forward(self, x: Tensor, norm: RMSNorm, context: ForwardContext) -> Tensor:
        """The norm comes along because its output is kept for backward, or not, by the product that it enters."""
        gate_up = self.expand(x, norm, context)
        shard = context.sequence_parallel
        return recomputed("activation" in self.recompute, swiglu, lambda product: self.down(product, shard), gate_up)

    def expand(self, x: Tensor, norm: RMSNorm, context: ForwardContext) -> Tensor:
        """gate and up of the normalized input, side by side: [T, 2F]."""
        return recomputed("norms" in self.recompute, norm, lambda n: self.gate_up(n, context.sequence_parallel), x)
