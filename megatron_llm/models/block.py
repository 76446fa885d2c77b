"""One pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x)). Called by `models/decoder.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.attention import SelfAttention
from megatron_llm.models.context import ForwardContext
from megatron_llm.models.mlp import MLP
from megatron_llm.models.norm import RMSNorm
from megatron_llm.parallel.grid import Grid


class DecoderLayer(nn.Module):
    """[S, H] or [T, H] -> the same shape. `layer` is the index in the whole model."""

    def __init__(self, model: ModelConfig, layer: int, grid: Grid, partial: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        eps, size = model.rms_norm_eps, model.hidden_size
        self.attention_norm = RMSNorm(f"layers.{layer}.attention_norm.weight", size, eps, grid.tp, partial, dtype, device)
        self.attention = SelfAttention(model, layer, grid, dtype, device)
        self.mlp_norm = RMSNorm(f"layers.{layer}.mlp_norm.weight", size, eps, grid.tp, partial, dtype, device)
        self.mlp = MLP(model, layer, grid, dtype, device)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.mlp(self.mlp_norm(x), context)
