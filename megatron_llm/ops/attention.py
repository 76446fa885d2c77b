"""Causal attention over packed documents, behind one function. Called by `models/attention.py`.

Queries and keys carry their own boundaries, so training (equal), a KV cache (few queries, many keys) and later context
parallelism fit one signature. Document i has queries cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1]; its queries are the
*last* positions of its keys (bottom-right aligned causal mask). Documents never see each other.

Shape suffixes: T query tokens, S key tokens, N query heads, K key/value heads (N a multiple of K), D head dimension,
B equally long documents, L their length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.matmul import widen

BACKENDS = ("sdpa", "reference")


def attention(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v inside every document: [T, N, D], [S, K, D], [S, K, D] -> [T, N, D].

    `backend`: `sdpa` (torch's fused kernels, one call per run of equally long documents), `reference` (explicit
    matrices in `stat_dtype`: the oracle), `auto` = sdpa. Raises ValueError for another name.
    """
    if backend == "auto":
        backend = "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    attend = _sdpa if backend == "sdpa" else _reference
    dtype = q_TND.dtype
    q_TND, k_SKD, v_SKD = widen(q_TND), widen(k_SKD), widen(v_SKD)
    runs = _runs(cu_q, cu_k)
    q_tokens, k_tokens = [count * q_len for count, q_len, _ in runs], [count * k_len for count, _, k_len in runs]
    # One split, not a slice per document: the backward of a slice writes a whole tensor of zeros.
    blocks = zip(runs, q_TND.split(q_tokens), k_SKD.split(k_tokens), v_SKD.split(k_tokens), strict=True)
    outputs = [
        attend(*(x.unflatten(0, (count, -1)).transpose(1, 2) for x in tensors)).transpose(1, 2).flatten(0, 1)
        for (count, _, _), *tensors in blocks
    ]
    return torch.cat(outputs).to(dtype) if len(outputs) > 1 else outputs[0].to(dtype)


def _runs(cu_q: Sequence[int], cu_k: Sequence[int]) -> list[tuple[int, int, int]]:
    """(how many, query length, key length) for each run of neighbouring documents of equal lengths."""
    lengths = zip(map(_length, itertools.pairwise(cu_q)), map(_length, itertools.pairwise(cu_k)), strict=True)
    return [(len(list(run)), q_len, k_len) for (q_len, k_len), run in itertools.groupby(lengths)]


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


def _causal_mask(q_len: int, k_len: int, device: torch.device) -> Tensor:
    """bool [q_len, k_len], True where attention is allowed; the last query sees every key."""
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)


def _sdpa(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
    q_len, k_len = q_BNLD.shape[2], k_BKLD.shape[2]
    mask = None if q_len in (1, k_len) else _causal_mask(q_len, k_len, q_BNLD.device)
    return functional.scaled_dot_product_attention(
        q_BNLD,
        k_BKLD,
        v_BKLD,
        attn_mask=mask,
        is_causal=q_len == k_len and q_len > 1,
        enable_gqa=q_BNLD.shape[1] != k_BKLD.shape[1],
    )


def _reference(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
    copies = q_BNLD.shape[1] // k_BKLD.shape[1]
    wide = stat_dtype(q_BNLD.dtype)
    k_BNLD, v_BNLD = (x.to(wide).repeat_interleave(copies, dim=1) for x in (k_BKLD, v_BKLD))
    scores = q_BNLD.to(wide) @ k_BNLD.transpose(-1, -2) / math.sqrt(q_BNLD.shape[-1])
    allowed = _causal_mask(q_BNLD.shape[2], k_BKLD.shape[2], q_BNLD.device)
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v_BNLD).to(q_BNLD.dtype)
