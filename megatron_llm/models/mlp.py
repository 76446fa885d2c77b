"""SwiGLU feed-forward with gate and up in one weight and one GEMM. Called by `models/block.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.context import ForwardContext
from megatron_llm.ops.swiglu import swiglu
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import ColumnParallelLinear, OutputShard, RowParallelLinear, sharded_weight


class MLP(nn.Module):
    """[S, H] or [T, H] -> the same shape."""

    def __init__(self, model: ModelConfig, layer: int, grid: Grid, dtype: torch.dtype, device: torch.device):
        super().__init__()
        name, tp = f"layers.{layer}.mlp", grid.tp
        shards = [OutputShard.even(f"{name}.{half}.weight", model.intermediate_size, tp) for half in ("gate", "up")]
        self.gate_up = ColumnParallelLinear(sharded_weight(model.hidden_size, shards, dtype, device), tp)
        self.down = RowParallelLinear(f"{name}.down.weight", model.intermediate_size, model.hidden_size, tp, dtype, device)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.down(swiglu(self.gate_up(x, context.sequence_parallel)), context.sequence_parallel)
