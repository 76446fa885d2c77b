"""Attention by kernels that know no documents: one call for each run of neighbouring documents of equal lengths.

Called by `ops/attention.py`, which says what the arguments are.

    reference   explicit matrices in `stat_dtype`: the oracle
    sdpa        torch's fused kernels, whichever it finds; what is more than causal is added to scores as a matrix, made once a
                pass. With a soft cap, which they do not know, the reference
    cudnn       torch's fused kernels, cuDNN's by force where a document has as many queries as keys, so without any matrix;
                its causal mask is aligned to the first query and key, and it knows no single key, so elsewhere sdpa

Shape suffixes: T query tokens, S key tokens, N query heads, K key/value heads, D head dimension, B equally long documents,
L their length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.matmul import widen
from megatron_llm.ops.scores import Scores, Shared, Terms, causal_mask

_AttendRun = Callable[[Tensor, Tensor, Tensor, Scores, Shared], Tensor]
"""[B, N, L, D], [B, K, L, D], [B, K, L, D] -> [B, N, L, D]."""


def reference(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    return _by_runs(_explicit, q_TND, k_SKD, v_SKD, terms)


def sdpa(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    return _by_runs(_explicit if terms.scores.softcap is not None else _sdpa, q_TND, k_SKD, v_SKD, terms)


def cudnn(q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    return _by_runs(_cudnn, q_TND, k_SKD, v_SKD, terms)


def _by_runs(attend: _AttendRun, q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, terms: Terms) -> Tensor:
    dtype = q_TND.dtype
    q_TND, k_SKD, v_SKD = widen(q_TND), widen(k_SKD), widen(v_SKD)
    runs = _runs(terms.cu_q, terms.cu_k)
    q_tokens, k_tokens = [count * q_len for count, q_len, _ in runs], [count * k_len for count, _, k_len in runs]
    # One split, not a slice per document: the backward of a slice writes a whole tensor of zeros.
    blocks = zip(runs, q_TND.split(q_tokens), k_SKD.split(k_tokens), v_SKD.split(k_tokens), strict=True)
    outputs = []
    for (count, q_len, _), *tensors in blocks:
        if q_len:
            q_BNLD, k_BKLD, v_BKLD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in tensors)
            outputs.append(attend(q_BNLD, k_BKLD, v_BKLD, terms.scores, terms.shared).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype) if len(outputs) > 1 else outputs[0].to(dtype)


def _runs(cu_q: Sequence[int], cu_k: Sequence[int]) -> list[tuple[int, int, int]]:
    """(how many, query length, key length) for each run of neighbouring documents of equal lengths."""
    lengths = zip(map(_length, itertools.pairwise(cu_q)), map(_length, itertools.pairwise(cu_k)), strict=True)
    return [(len(list(run)), q_len, k_len) for (q_len, k_len), run in itertools.groupby(lengths)]


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


def _mask(q_BNLD: Tensor, k_len: int, scores: Scores, shared: Shared) -> Tensor | None:
    """What torch's kernels are given: None for plain causal attention, else what is added to scores, in the dtype of the queries.

    Not bool: each call would make numbers of it, which backward would keep for every layer.
    """
    q_len = q_BNLD.shape[2]
    window = scores.window if scores.window is not None and scores.window < k_len else None
    if scores.slopes_N is None and window is None and q_len in (1, k_len):
        return None
    key = ("mask", q_len, k_len, window, scores.slopes_N is not None, scores.scale if scores.coarse else None)
    if key not in shared:
        bias = scores.bias(q_len, k_len, q_BNLD.shape[3], q_BNLD.dtype)
        hidden = ~causal_mask(q_len, k_len, window, q_BNLD.device)
        shared[key] = (q_BNLD.new_zeros(1, q_len, k_len) if bias is None else bias).masked_fill(hidden, -math.inf)[None]
    mask: Tensor = shared[key]
    return mask


def _sdpa(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scores: Scores, shared: Shared) -> Tensor:
    mask = _mask(q_BNLD, k_BKLD.shape[2], scores, shared)
    return functional.scaled_dot_product_attention(
        q_BNLD,
        k_BKLD,
        v_BKLD,
        attn_mask=mask,
        is_causal=mask is None and q_BNLD.shape[2] > 1,
        scale=scores.scale,
        enable_gqa=q_BNLD.shape[1] != k_BKLD.shape[1],
    )


def _cudnn(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scores: Scores, shared: Shared) -> Tensor:
    if not 1 < q_BNLD.shape[2] == k_BKLD.shape[2]:
        return _sdpa(q_BNLD, k_BKLD, v_BKLD, scores, shared)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BNLD, k_BKLD, v_BKLD, scores, shared)


def _explicit(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, settings: Scores, shared: Shared) -> Tensor:
    copies = q_BNLD.shape[1] // k_BKLD.shape[1]
    wide = stat_dtype(q_BNLD.dtype)
    k_BNLD, v_BNLD = (x.to(wide).repeat_interleave(copies, dim=1) for x in (k_BKLD, v_BKLD))
    scores = q_BNLD.to(wide) @ k_BNLD.transpose(-1, -2) * settings.factor(q_BNLD.shape[-1])
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    q_len, k_len = scores.shape[2:]
    bias = settings.bias(q_len, k_len, q_BNLD.shape[3], wide)
    if bias is not None:
        scores = scores + bias
    allowed = causal_mask(q_len, k_len, settings.window, q_BNLD.device)
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v_BNLD).to(q_BNLD.dtype)
