"""Grouped-query self-attention (Ainslie et al. 2023) with rotary positions. Called by `models/block.py`.

Query heads are cut over tp. KV heads too, or, when tp is larger than their number, each is copied to tp / heads
neighbouring ranks, whose partial gradients the shard spec adds up. q, k and v share one weight and one GEMM.

Shape suffixes: T tokens, N query heads here, K key/value heads here, D head dimension, S all cached tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.context import ForwardContext
from megatron_llm.models.norm import RMSNorm
from megatron_llm.models.recompute import recomputed
from megatron_llm.ops.attention import attention
from megatron_llm.ops.rope import rotary
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.linear import ColumnParallelLinear, OutputShard, RowParallelLinear, sharded_weight


class SelfAttention(nn.Module):
    """[S, H] or [T, H] -> the same shape. `recompute`: what backward makes again; "norms" and "attention" are done here."""

    def __init__(
        self, model: ModelConfig, layer: int, grid: Grid, recompute: frozenset[str], dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        name, dim, tp = f"layers.{layer}.attention", model.head_dim, grid.tp
        self.layer, self.head_dim, self.recompute = layer, dim, recompute
        shards = [
            OutputShard.even(f"{name}.q.weight", model.num_attention_heads * dim, tp),
            OutputShard.replicated_heads(f"{name}.k.weight", model.num_key_value_heads, dim, tp, grid.kv_replica),
            OutputShard.replicated_heads(f"{name}.v.weight", model.num_key_value_heads, dim, tp, grid.kv_replica),
        ]
        self.heads = [shard.local_rows // dim for shard in shards]
        self.qkv = ColumnParallelLinear(sharded_weight(model.hidden_size, shards, dtype, device), tp)
        self.o = RowParallelLinear(f"{name}.o.weight", model.num_attention_heads * dim, model.hidden_size, tp, dtype, device)

    def forward(self, x: Tensor, norm: RMSNorm, context: ForwardContext) -> Tensor:
        """The norm comes along because its output is kept for backward, or not, by the product that it enters."""
        shard = context.sequence_parallel
        qkv = recomputed("norms" in self.recompute, norm, lambda n: self.qkv(n, shard), x)
        attend = partial(self._attend, context=context)
        return recomputed("attention" in self.recompute, attend, lambda out: self.o(out, shard), qkv)

    def _attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """Everything between the two products."""
        qkv_TXD = qkv.unflatten(-1, (-1, self.head_dim))
        q_TND, k_TKD, v_TKD = qkv_TXD.split(self.heads, dim=1)
        q_TND = rotary(q_TND, context.cos_T1P, context.sin_T1P)
        k_TKD = rotary(k_TKD, context.cos_T1P, context.sin_T1P)
        k_SKD, v_SKD, cu_k = k_TKD, v_TKD, context.cu_seqlens
        if context.cache is not None:
            k_SKD, v_SKD, cu_k = context.cache.extend(self.layer, k_TKD, v_TKD)
        out_TND = attention(q_TND, k_SKD, v_SKD, context.cu_seqlens, cu_k, context.attention_backend)
        return out_TND.flatten(1)
