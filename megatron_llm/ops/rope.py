"""Rotary position embeddings (Su et al. 2021) in Hugging Face's half-rotation layout, on packed tokens.

Channel i of a head is rotated together with channel i + D/2 by the angle position * frequency_i. Called by
`models/attention.py` (rotation) and `models/decoder.py` (tables, once per micro-batch and stage).

Shape suffixes: T tokens, N heads, D head dimension, P = D/2 rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_llm.config import RopeScalingConfig
from megatron_llm.ops.dtypes import stat_dtype


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig | None, dtype: torch.dtype) -> Tensor:
    """Radians per position of each pair: [P] in `dtype` (float32, as in transformers, or float64).

    Scalings: `linear` divides every frequency by the factor (Chen et al. 2023); `llama3` does so for wavelengths longer
    than original_max_position_embeddings / low_freq_factor, leaves those shorter than / high_freq_factor, and
    interpolates between (Llama 3.1).
    """
    exponent_P = torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype) / head_dim
    freq_P = 1.0 / (theta**exponent_P)
    if scaling is None:
        return freq_P
    if scaling.rope_type == "linear":
        return freq_P / scaling.factor
    context = scaling.original_max_position_embeddings
    wavelength_P = 2 * math.pi / freq_P
    smooth_P = (context / wavelength_P - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth_P = smooth_P.clamp(0.0, 1.0)
    return (1 - smooth_P) * freq_P / scaling.factor + smooth_P * freq_P


def rope_tables(positions_T: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, each [T, 1, P], ready to broadcast over heads."""
    angles_TP = positions_T.to(freq_P.dtype)[:, None] * freq_P
    return angles_TP.cos()[:, None], angles_TP.sin()[:, None]


def _rotate(x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    half = x_TND.shape[-1] // 2
    a, b = x_TND[..., :half], x_TND[..., half:]
    if x_TND.dtype is not stat_dtype(x_TND.dtype):
        a, b = a.to(cos_T1P.dtype), b.to(cos_T1P.dtype)
    return torch.cat((a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P), dim=-1).to(x_TND.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1P, sin_T1P)
        return _rotate(x_TND, cos_T1P, sin_T1P)

    @staticmethod
    def backward(ctx: Any, dy_TND: Tensor) -> tuple[Tensor, None, None]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        return _rotate(dy_TND, cos_T1P, -sin_T1P), None, None


def rotary(x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Rotate queries or keys: [T, N, D] -> [T, N, D]; computed in the tables' dtype, rounded once. Backward rotates back."""
    return _Rotary.apply(x_TND, cos_T1P, sin_T1P)
