"""The feed-forward part of a layer: plain, or gated with gate and up in one weight and one GEMM. Called by `models/block.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.ops.activation import activation, gated
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import (
    ColumnParallelLinear,
    OutputShard,
    RowParallelLinear,
    balanced,
    most_of,
    sharded_bias,
    sharded_weight,
)


class MLP(nn.Module):
    """`up` (with the gate, if there is one) and `down` are the products, which a layer calls; `forward` is all between them.

    partial: whether a rank sees only its own tokens of hidden states.
    """

    def __init__(self, model: ModelConfig, layer: int, grid: Grid, partial: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        name, tp, inner = f"layers.{layer}.mlp", grid.tp, model.intermediate_size
        self.act, self.gated = model.hidden_act, model.mlp_gated
        held = balanced(inner, tp)
        parts = ("gate", "up") if self.gated else ("up",)
        shards = [OutputShard.of(f"{name}.{part}.weight", inner, held, most_of(inner, tp)) for part in parts]
        bias = sharded_bias(shards, dtype, device) if model.mlp_bias else None
        self.up = ColumnParallelLinear(sharded_weight(model.hidden_size, shards, dtype, device), tp, bias)
        self.down = RowParallelLinear(
            f"{name}.down.weight", inner, model.hidden_size, tp, dtype, device, held, bias=model.mlp_bias, partial=partial
        )

    def forward(self, up: Tensor) -> Tensor:
        """[T, 2F] (gate, then up) or [T, F] -> [T, F]."""
        return gated(up, self.act) if self.gated else activation(up, self.act)
