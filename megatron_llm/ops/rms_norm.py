"""RMSNorm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * w. Called by `models/norm.py`.

Backward, with n = x * rstd, g = dy * w:   dx = rstd * (g - n * mean(g * n)),   dw = sum over tokens of dy * n.
Saved for backward: x and one rstd per token; n is recomputed.

Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype

WeightGradient = Callable[[Tensor, Tensor], Tensor | None]


def _rounded(weight_H: Tensor, dweight_H: Tensor) -> Tensor:
    return dweight_H.to(weight_H.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float, weight_gradient: WeightGradient) -> Tensor:
        wide_TH = x_TH.to(stat_dtype(x_TH.dtype))
        rstd_T1 = torch.rsqrt(wide_TH.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TH, rstd_T1)
        ctx.weight, ctx.weight_gradient = weight_H, weight_gradient
        return (wide_TH * rstd_T1).to(x_TH.dtype) * weight_H

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x_TH, rstd_T1), weight_H = ctx.saved_tensors, ctx.weight
        wide = rstd_T1.dtype
        n_TH = x_TH.to(wide) * rstd_T1
        dy_wide_TH = dy_TH.to(wide)
        dweight_H = ctx.weight_gradient(weight_H, (dy_wide_TH * n_TH).sum(0)) if ctx.needs_input_grad[1] else None
        g_TH = dy_wide_TH * weight_H
        dx_TH = (g_TH - n_TH * (g_TH * n_TH).mean(-1, keepdim=True)) * rstd_T1
        return dx_TH.to(x_TH.dtype), dweight_H, None, None


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, weight_gradient: WeightGradient = _rounded) -> Tensor:
    """Normalize each token: [T, H], [H] -> [T, H] in the dtype of x; statistics in `stat_dtype`.

    weight_gradient: given the weight and its gradient in `stat_dtype`, returns what autograd is to have of it.
    """
    return _RMSNorm.apply(x_TH, weight_H, eps, weight_gradient)
