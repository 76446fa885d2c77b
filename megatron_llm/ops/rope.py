"""Rotary position embeddings (Su et al. 2021) on packed tokens.

The first 2P channels of a head are rotated in pairs by the angle position * frequency: channels i and i + P together (half
rotation, as in Llama), or 2i and 2i + 1 (interleaved, as in GPT-J). Called by `models/attention.py` (rotation) and
`models/positions.py` (tables, once per micro-batch and stage).

Shape suffixes: T tokens, N heads, D head dimension, P rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_llm.config import RopeScalingConfig
from megatron_llm.ops.dtypes import stat_dtype


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


def _rotate(x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool) -> Tensor:
    pairs = cos_T1P.shape[-1]
    turned, rest = x_TND[..., : 2 * pairs], x_TND[..., 2 * pairs :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    if x_TND.dtype is not stat_dtype(x_TND.dtype):
        a, b = a.to(cos_T1P.dtype), b.to(cos_T1P.dtype)
    a, b = a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P
    if interleaved:
        a = torch.stack((a, b), dim=-1).flatten(-2)
        return torch.cat((a.to(x_TND.dtype), rest), dim=-1) if rest.shape[-1] else a.to(x_TND.dtype)
    if rest.shape[-1]:
        return torch.cat((a.to(x_TND.dtype), b.to(x_TND.dtype), rest), dim=-1)
    return torch.cat((a, b), dim=-1).to(x_TND.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_T1P, sin_T1P)
        ctx.interleaved = interleaved
        return _rotate(x_TND, cos_T1P, sin_T1P, interleaved)

    @staticmethod
    def backward(ctx: Any, dy_TND: Tensor) -> tuple[Tensor, None, None, None]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        return _rotate(dy_TND, cos_T1P, -sin_T1P, ctx.interleaved), None, None, None


def rotary(x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate queries or keys: [T, N, D] -> [T, N, D]; computed in the tables' dtype, rounded once. Backward rotates back.

    Channels beyond the tables' 2P pass through.
    """
    return _Rotary.apply(x_TND, cos_T1P, sin_T1P, interleaved)
