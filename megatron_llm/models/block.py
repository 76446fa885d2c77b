"""One pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x)). Called by `models/decoder.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.attention import SelfAttention
from megatron_llm.models.context import ForwardContext
from megatron_llm.models.mlp import MLP
from megatron_llm.models.norm import RMSNorm
from megatron_llm.models.recompute import recomputed
from megatron_llm.ops.swiglu import swiglu
from megatron_llm.parallel.grid import Grid


class DecoderLayer(nn.Module):
    """[S, H] or [T, H] -> the same shape.

    Args:
        layer: the index in the whole model.
        recompute: what backward makes again (`models/recompute.py`); "layer" is everything but the last product.
    """

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        grid: Grid,
        partial: bool,
        recompute: frozenset[str],
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.recompute = recompute
        eps, size = model.rms_norm_eps, model.hidden_size
        self.attention_norm = RMSNorm(f"layers.{layer}.attention_norm.weight", size, eps, grid.tp, partial, dtype, device)
        self.attention = SelfAttention(model, layer, grid, recompute, dtype, device)
        self.mlp_norm = RMSNorm(f"layers.{layer}.mlp_norm.weight", size, eps, grid.tp, partial, dtype, device)
        self.mlp = MLP(model, layer, grid, recompute, dtype, device)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        def attended(x: Tensor) -> Tensor:
            return x + self.attention(x, self.attention_norm, context)

        def before_down(x: Tensor) -> tuple[Tensor, Tensor]:
            x = attended(x)
            return x, swiglu(self.mlp.expand(x, self.mlp_norm, context))

        if "layer" in self.recompute:
            return recomputed(True, before_down, lambda x, product: x + self.mlp.down(product, context.sequence_parallel), x)
        x = attended(x)
        return x + self.mlp(x, self.mlp_norm, context)
