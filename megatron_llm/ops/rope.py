"""Rotary position embeddings (Su et al. 2021) on packed tokens.

The first 2P channels of a head are rotated in pairs by the angle position * frequency: channels i and i + P together (half
rotation, as in Llama), or 2i and 2i + 1 (interleaved, as in GPT-J). Called by `models/attention.py` (rotation) and
`models/positions.py` (tables, once per micro-batch and stage).

Queries and keys are rotated where they lie, so nothing is kept for backward but the tables. Gradients never are: one that comes
in may be somebody else's too. Rotating them back is a pass that writes what must be written anyway, the gradient of q, k and v
side by side, which autograd would otherwise put together in a pass of its own.

Shape suffixes: T tokens, N query heads, K key/value heads, D head dimension, P rotated pairs, C = (2 K + N) D channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_llm.config import RopeScalingConfig


def rope_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScalingConfig | None, dtype: torch.dtype, length: int = 0
) -> Tensor:
    """Radians per position of each pair: [P] in `dtype` (float32, as in transformers, or float64).

    length: tokens of the document, for scalings that depend on it. The scalings:
        linear    every frequency divided by the factor (Chen et al. 2023)
        dynamic   theta grown with the length beyond the pretrained context ("NTK-aware", as transformers has it)
        llama3    wavelengths longer than context / low_freq_factor divided, those shorter than context / high_freq_factor left,
                  between them interpolated (Llama 3.1)
        yarn      the same by number of rotations within the context, between beta_fast and beta_slow (Peng et al. 2023)
        longrope  a divisor for each pair, one set for documents within the context and one for longer (Ding et al. 2024)
    """
    exponent_P = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(dtype) / rotary_dim
    if scaling is not None and scaling.rope_type == "dynamic":
        context, factor = scaling.original_max_position_embeddings, scaling.factor
        grown = factor * max(length, context) / context - (factor - 1)
        theta = theta * grown ** (rotary_dim / (rotary_dim - 2))
    freq_P = 1.0 / (theta**exponent_P)
    if scaling is None or scaling.rope_type == "dynamic":
        return freq_P
    if scaling.rope_type == "linear":
        return freq_P / scaling.factor
    if scaling.rope_type == "longrope":
        long = length > scaling.original_max_position_embeddings
        return 1.0 / (torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=dtype) * theta**exponent_P)
    keep_P = _llama3_keep(freq_P, scaling) if scaling.rope_type == "llama3" else _yarn_keep(rotary_dim, theta, scaling, dtype)
    return (1 - keep_P) * freq_P / scaling.factor + keep_P * freq_P


def _llama3_keep(freq_P: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """How much of each frequency stays as it is, 0 to 1."""
    wavelength_P = 2 * math.pi / freq_P
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((scaling.original_max_position_embeddings / wavelength_P - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_keep(rotary_dim: int, theta: float, scaling: RopeScalingConfig, dtype: torch.dtype) -> Tensor:
    """The same for YaRN."""

    def pair_with(rotations: float) -> float:
        """The pair, as a fraction, that turns so often within the pretrained context."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    return 1 - ((torch.arange(rotary_dim // 2, dtype=dtype) - low) / (high - low)).clamp(0, 1)


def rope_tables(positions_T: Tensor, freq_P: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, times `factor`, each [T, 1, P], ready to broadcast over heads.

    freq_P: [P], or [T, P] with frequencies of each token's own.
    """
    angles_TP = positions_T.to(freq_P.dtype)[:, None] * freq_P
    cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin()
    if factor != 1.0:
        cos_TP, sin_TP = cos_TP * factor, sin_TP * factor
    return cos_TP[:, None], sin_TP[:, None]


def _pairs(x_TND: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the channels that turn together."""
    if interleaved:
        return x_TND[..., : 2 * pairs : 2], x_TND[..., 1 : 2 * pairs : 2]
    return x_TND[..., :pairs], x_TND[..., pairs : 2 * pairs]


def _rotate(x_TND: Tensor, y_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool) -> None:
    """Writes the first 2P channels of x, rotated, into y, which may be x itself."""
    pairs = cos_T1P.shape[-1]
    a, b = (part.to(cos_T1P.dtype) for part in _pairs(x_TND, pairs, interleaved))
    turned = a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P
    for y, part in zip(_pairs(y_TND, pairs, interleaved), turned, strict=True):
        y.copy_(part)


def _rotated_back(dy_TND: Tensor, into_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool) -> None:
    _rotate(dy_TND, into_TND, cos_T1P, -sin_T1P, interleaved)
    turned = 2 * cos_T1P.shape[-1]
    into_TND[..., turned:].copy_(dy_TND[..., turned:])


def split_heads(qkv_TC: Tensor, keys: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [T, N, D], k and v [T, K, D]; in the buffer they are k, v, q."""
    heads_TXD = qkv_TC.unflatten(-1, (-1, head_dim))
    k_TKD, v_TKD, q_TND = heads_TXD.split([keys, keys, heads_TXD.shape[1] - 2 * keys], dim=1)
    return q_TND, k_TKD, v_TKD


class _SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TC: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, keys: int, head_dim: int, interleaved: bool, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_T1P, sin_T1P)
        ctx.interleaved, ctx.kernel = interleaved, kernel
        q_TND, k_TKD, v_TKD = split_heads(qkv_TC, keys, head_dim)
        _rotate_both(q_TND, k_TKD, cos_T1P, sin_T1P, interleaved, kernel)
        return q_TND, k_TKD, v_TKD

    @staticmethod
    def backward(ctx: Any, dq_TND: Tensor, dk_TKD: Tensor, dv_TKD: Tensor) -> tuple[Tensor | None, ...]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        if ctx.kernel == "triton":
            from megatron_llm.ops.triton.rope import rope_join

            grads = (_dense_heads(grad) for grad in (dq_TND, dk_TKD, dv_TKD))
            return rope_join(*grads, cos_T1P, sin_T1P, ctx.interleaved), *[None] * 6
        (tokens, keys, dim), queries = dk_TKD.shape, dq_TND.shape[1]
        dqkv_TC = dq_TND.new_empty(tokens, (2 * keys + queries) * dim)
        q_TND, k_TKD, v_TKD = split_heads(dqkv_TC, keys, dim)
        _rotated_back(dq_TND, q_TND, cos_T1P, sin_T1P, ctx.interleaved)
        _rotated_back(dk_TKD, k_TKD, cos_T1P, sin_T1P, ctx.interleaved)
        v_TKD.copy_(dv_TKD)
        return dqkv_TC, *[None] * 6


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TND: Tensor, k_TKD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool, kernel: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_T1P, sin_T1P)
        ctx.interleaved, ctx.kernel = interleaved, kernel
        ctx.mark_dirty(q_TND, k_TKD)
        _rotate_both(q_TND, k_TKD, cos_T1P, sin_T1P, interleaved, kernel)
        return q_TND, k_TKD

    @staticmethod
    def backward(ctx: Any, dq_TND: Tensor, dk_TKD: Tensor) -> tuple[Tensor | None, ...]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        if ctx.kernel == "triton":
            from megatron_llm.ops.triton.rope import rope_back

            return *rope_back(_dense_heads(dq_TND), _dense_heads(dk_TKD), cos_T1P, sin_T1P, ctx.interleaved), *[None] * 4
        grads = tuple(torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) for dy in (dq_TND, dk_TKD))
        for dy, grad in zip((dq_TND, dk_TKD), grads, strict=True):
            _rotated_back(dy, grad, cos_T1P, sin_T1P, ctx.interleaved)
        return *grads, *[None] * 4


def _rotate_both(q_TND: Tensor, k_TKD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool, kernel: str) -> None:
    if kernel == "triton":
        from megatron_llm.ops.triton.rope import rope_

        rope_(q_TND, k_TKD, cos_T1P, sin_T1P, interleaved)
        return
    _rotate(q_TND, q_TND, cos_T1P, sin_T1P, interleaved)
    _rotate(k_TKD, k_TKD, cos_T1P, sin_T1P, interleaved)


def _dense_heads(dy_TND: Tensor) -> Tensor:
    """With neighbouring channels side by side, as the kernels read them."""
    return dy_TND if dy_TND.stride(-1) == 1 else dy_TND.contiguous()


def split_rotated(
    qkv_TC: Tensor,
    cos_T1P: Tensor,
    sin_T1P: Tensor,
    keys: int,
    head_dim: int,
    interleaved: bool = False,
    kernel: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, N, D], k and v [T, K, D] of [T, C] (k, v, q), q and k rotated: views of the buffer, which is used up.

    It must not be a leaf, nor kept by what made it, and nothing else may use it. Computed in the tables' dtype, rounded once.
    Channels beyond the tables' 2P pass through.
    """
    q_TND, k_TKD, v_TKD = _SplitRotated.apply(qkv_TC, cos_T1P, sin_T1P, keys, head_dim, interleaved, kernel)
    return q_TND, k_TKD, v_TKD


def rotary_(
    q_TND: Tensor, k_TKD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool = False, kernel: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, contiguous tensors of their own, in place; otherwise like `split_rotated`."""
    q_TND, k_TKD = _Rotary.apply(q_TND, k_TKD, cos_T1P, sin_T1P, interleaved, kernel)
    return q_TND, k_TKD
