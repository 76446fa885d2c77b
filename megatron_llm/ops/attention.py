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
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.matmul import widen

BACKENDS = ("sdpa", "reference")
Masks = dict[object, Tensor]


@dataclass(frozen=True)
class Scores:
    """What happens to scores between q k^T and the softmax, in this order.

    Attributes:
        scale: they are multiplied by it; None: 1 / sqrt(D).
        softcap: they become cap * tanh(scores / cap).
        slopes_N: ALiBi (Press et al. 2022): less slope * distance, for each query head here.
        coarse: ALiBi as a bfloat16 number, slope * position of the key, multiplied by the scale like the scores (Falcon).
        window: a query sees so many keys, itself included; None: all before it.
    """

    scale: float | None = None
    softcap: float | None = None
    slopes_N: Tensor | None = None
    coarse: bool = False
    window: int | None = None

    def bias(self, q_len: int, k_len: int, head_dim: int, dtype: torch.dtype) -> Tensor | None:
        """ALiBi's [N, q_len, k_len] (or [N, 1, k_len]), None without; the last query is at the last key's position."""
        if self.slopes_N is None:
            return None
        keys_S = torch.arange(k_len, device=self.slopes_N.device)
        if self.coarse:
            bias_N1S = (self.slopes_N.bfloat16()[:, None] * keys_S)[:, None].to(dtype)
            return bias_N1S * (head_dim**-0.5 if self.scale is None else self.scale)
        distance_TS = keys_S - keys_S[k_len - q_len :, None]
        return (self.slopes_N[:, None, None] * distance_TS).to(dtype)


def alibi_slopes(heads: int, bias_max: float = 8.0) -> list[float]:
    """The slope of each head: 2^(-bias_max * i / heads) for powers of two; others take every second one of twice as many too."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-bias_max * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-bias_max * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]


def attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    backend: str = "auto",
    scores: Scores = Scores(),
    masks: Masks | None = None,
) -> Tensor:
    """softmax(scores of q k^T) v inside every document: [T, N, D], [S, K, D], [S, K, D] -> [T, N, D].

    `backend`: `sdpa` (torch's fused kernels, one call per run of equally long documents; explicit matrices where scores have a
    soft cap, which torch's kernels do not know), `reference` (explicit matrices in `stat_dtype`: the oracle), `auto` = sdpa.
    Raises ValueError for another name. masks: where layers of one pass with the same heads share what they need to make once.
    """
    masks = {} if masks is None else masks
    if backend == "auto":
        backend = "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    attend = _reference if backend == "reference" or scores.softcap is not None else _sdpa
    dtype = q_TND.dtype
    q_TND, k_SKD, v_SKD = widen(q_TND), widen(k_SKD), widen(v_SKD)
    runs = _runs(cu_q, cu_k)
    q_tokens, k_tokens = [count * q_len for count, q_len, _ in runs], [count * k_len for count, _, k_len in runs]
    # One split, not a slice per document: the backward of a slice writes a whole tensor of zeros.
    blocks = zip(runs, q_TND.split(q_tokens), k_SKD.split(k_tokens), v_SKD.split(k_tokens), strict=True)
    outputs = []
    for (count, _, _), *tensors in blocks:
        q_BNLD, k_BKLD, v_BKLD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in tensors)
        outputs.append(attend(q_BNLD, k_BKLD, v_BKLD, scores, masks).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype) if len(outputs) > 1 else outputs[0].to(dtype)


def _runs(cu_q: Sequence[int], cu_k: Sequence[int]) -> list[tuple[int, int, int]]:
    """(how many, query length, key length) for each run of neighbouring documents of equal lengths."""
    lengths = zip(map(_length, itertools.pairwise(cu_q)), map(_length, itertools.pairwise(cu_k)), strict=True)
    return [(len(list(run)), q_len, k_len) for (q_len, k_len), run in itertools.groupby(lengths)]


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


def _causal_mask(q_len: int, k_len: int, window: int | None, device: torch.device) -> Tensor:
    """bool [q_len, k_len], True where attention is allowed; the last query is at the last key's position."""
    allowed = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
    return allowed if window is None else allowed.triu(k_len - q_len - window + 1)


def _mask(q_BNLD: Tensor, k_len: int, scores: Scores, masks: Masks) -> Tensor | None:
    """What torch's kernels are given: None for plain causal attention, else what is added to scores, in the dtype of the queries.

    Not bool: each call would make numbers of it, which backward would keep for every layer.
    """
    q_len = q_BNLD.shape[2]
    window = scores.window if scores.window is not None and scores.window < k_len else None
    if scores.slopes_N is None and window is None and q_len in (1, k_len):
        return None
    key = (q_len, k_len, window, scores.slopes_N is not None, scores.scale if scores.coarse else None)
    if key not in masks:
        bias = scores.bias(q_len, k_len, q_BNLD.shape[3], q_BNLD.dtype)
        hidden = ~_causal_mask(q_len, k_len, window, q_BNLD.device)
        masks[key] = (q_BNLD.new_zeros(1, q_len, k_len) if bias is None else bias).masked_fill(hidden, -math.inf)[None]
    return masks[key]


def _sdpa(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scores: Scores, masks: Masks) -> Tensor:
    mask = _mask(q_BNLD, k_BKLD.shape[2], scores, masks)
    return functional.scaled_dot_product_attention(
        q_BNLD,
        k_BKLD,
        v_BKLD,
        attn_mask=mask,
        is_causal=mask is None and q_BNLD.shape[2] > 1,
        scale=scores.scale,
        enable_gqa=q_BNLD.shape[1] != k_BKLD.shape[1],
    )


def _reference(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, settings: Scores, masks: Masks) -> Tensor:
    copies = q_BNLD.shape[1] // k_BKLD.shape[1]
    wide = stat_dtype(q_BNLD.dtype)
    k_BNLD, v_BNLD = (x.to(wide).repeat_interleave(copies, dim=1) for x in (k_BKLD, v_BKLD))
    scale = q_BNLD.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    scores = q_BNLD.to(wide) @ k_BNLD.transpose(-1, -2) * scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    q_len, k_len = scores.shape[2:]
    bias = settings.bias(q_len, k_len, q_BNLD.shape[3], wide)
    if bias is not None:
        scores = scores + bias
    allowed = _causal_mask(q_len, k_len, settings.window, q_BNLD.device)
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v_BNLD).to(q_BNLD.dtype)
