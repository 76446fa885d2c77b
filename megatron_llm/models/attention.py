"""Grouped-query self-attention (Ainslie et al. 2023), everything but what stands around it. Called by `models/block.py`.

Which heads are here: `models/heads.py`; copies of key/value heads have partial gradients, which the shard spec adds up. q, k
and v share one weight and one GEMM.

Shape suffixes: T tokens, N query heads here, K key/value heads here, D head dimension, S all cached tokens, X all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_llm.models.context import ForwardContext
from megatron_llm.models.heads import Heads
from megatron_llm.models.norm import head_norm
from megatron_llm.models.setup import Setup
from megatron_llm.ops.attention import Available, Case, attention, choose
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.rope import rotary_, split_heads, split_rotated
from megatron_llm.ops.scores import Scores, alibi_slopes
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.linear import ColumnParallelLinear, OutputShard, RowParallelLinear, sharded_bias, sharded_weight


class SelfAttention(nn.Module):
    """`qkv` and `o` are the products on either side, which a layer calls; `split` and then `forward` are all between them."""

    def __init__(self, setup: Setup, layer: int):
        super().__init__()
        model, tp, dtype, device = setup.model, setup.tp, setup.dtype, setup.device
        name, dim = f"layers.{layer}.attention", model.head_dim
        self.model, self.layer = model, layer
        heads = Heads.of(model, setup.grid)
        copies = setup.grid.kv_replica
        queries, keys = model.num_attention_heads, model.num_key_value_heads
        # Queries last: ranks with copies of a key head may differ in queries, and what is copied must lie at the same place.
        shards = [
            OutputShard.of(f"{name}.k.weight", keys * dim, heads.keys, heads.most_keys, dim, copies),
            OutputShard.of(f"{name}.v.weight", keys * dim, heads.keys, heads.most_keys, dim, copies),
            OutputShard.of(f"{name}.q.weight", queries * dim, heads.queries, heads.most_queries, dim),
        ]
        self.keys = len(heads.keys)
        bias = sharded_bias(shards, dtype, device) if model.qkv_bias else None
        self.qkv = ColumnParallelLinear(sharded_weight(model.hidden_size, shards, dtype, device), tp, bias)
        self.o = RowParallelLinear(
            f"{name}.o.weight", model.num_attention_heads * dim, model.hidden_size, tp, dtype, device,
            range(heads.queries.start * dim, heads.queries.stop * dim), heads.most_queries * dim,
            model.attention_output_bias, setup.partial,
        )  # fmt: skip
        self.q_norm = self.k_norm = None
        if model.qk_norm != "none":
            most = heads.most_queries, heads.most_keys
            self.q_norm = head_norm(f"{name}.q_norm", queries, heads.queries, most[0], Axis("none"), setup)
            self.k_norm = head_norm(f"{name}.k_norm", keys, heads.keys, most[1], copies, setup)
        self.scores = self._scores(heads.queries, stat_dtype(dtype), device)
        self.deterministic = setup.kernels.deterministic
        case = Case.of(model, layer, dtype, self.deterministic)
        self.choice = choose(setup.kernels.attention, case, Available.on(device))
        self.rotates = model.position_embedding == "rope" and layer not in model.nope_layers
        self.altered = model.clip_qkv is not None or model.qk_norm != "none"  # before they are rotated
        self.interleaved, self.kernel = model.rope_interleaved, setup.kernels.rope

    def _scores(self, queries: range, dtype: torch.dtype, device: torch.device) -> Scores:
        model = self.model
        slopes = None
        if model.position_embedding == "alibi":
            all_slopes = alibi_slopes(model.num_attention_heads, model.alibi_bias_max)
            slopes = torch.tensor(all_slopes[queries.start : queries.stop], dtype=dtype, device=device)
        window = model.window(self.layer)
        return Scores(model.scale(self.layer), model.attn_logit_softcapping, slopes, model.alibi_scaled, window)

    def split(self, qkv: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (2 K + N) D] as projected -> views of it, q [T, N, D], k and v [T, K, D]: what a layer keeps for `forward`.

        Where nothing comes before the rotation it has happened, once and in the buffer: `forward` may run again in backward.
        """
        if self.rotates and not self.altered:
            return split_rotated(qkv, *self._tables(context), self.keys, self.model.head_dim, self.interleaved, self.kernel)
        return split_heads(qkv, self.keys, self.model.head_dim)

    def forward(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, context: ForwardContext) -> Tensor:
        """What `split` gives -> [T, N D]."""
        clip = self.model.clip_qkv
        if clip is not None:
            q_TND, k_TKD, v_TKD = (x.clamp(-clip, clip) for x in (q_TND, k_TKD, v_TKD))
        if self.q_norm is not None and self.k_norm is not None:
            q_TND, k_TKD = self.q_norm(q_TND), self.k_norm(k_TKD)
        if self.rotates and self.altered:
            q_TND, k_TKD = rotary_(q_TND, k_TKD, *self._tables(context), self.interleaved, self.kernel)
        k_SKD, v_SKD, cu_k = k_TKD, v_TKD, context.cu_seqlens
        if context.cache is not None:
            k_SKD, v_SKD, cu_k = context.cache.extend(self.layer, k_TKD, v_TKD)
        terms = context.cu_seqlens, cu_k, self.choice.name, self.scores, context.shared, self.deterministic
        return attention(q_TND, k_SKD, v_SKD, *terms).flatten(1)

    def _tables(self, context: ForwardContext) -> tuple[Tensor, Tensor]:
        tables = context.local_rope if self.scores.window is not None else context.rope
        assert tables is not None
        return tables
