"""The feed-forward part of a layer: plain, or gated with gate and up in one weight and one GEMM. Called by `models/block.py`."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_llm.models.setup import Setup
from megatron_llm.ops.activation import activation, gated
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
    """`up` (with the gate, if there is one) and `down` are the products, which a layer calls; `forward` is all between them."""

    def __init__(self, setup: Setup, layer: int):
        super().__init__()
        model, tp, dtype, device = setup.model, setup.tp, setup.dtype, setup.device
        name, inner = f"layers.{layer}.mlp", model.intermediate_size
        self.act, self.gated, self.kernel = model.hidden_act, model.mlp_gated, setup.kernels.activation
        held = balanced(inner, tp)
        parts = ("gate", "up") if self.gated else ("up",)
        shards = [OutputShard.of(f"{name}.{part}.weight", inner, held, most_of(inner, tp)) for part in parts]
        bias = sharded_bias(shards, dtype, device) if model.mlp_bias else None
        self.up = ColumnParallelLinear(sharded_weight(model.hidden_size, shards, dtype, device), tp, bias)
        self.down = RowParallelLinear(
            f"{name}.down.weight", inner, model.hidden_size, tp, dtype, device, held, bias=model.mlp_bias, partial=setup.partial
        )

    def forward(self, up: Tensor) -> Tensor:
        """[T, 2F] (gate, then up) or [T, F] -> [T, F]."""
        return (gated if self.gated else activation)(up, self.act, self.kernel)
