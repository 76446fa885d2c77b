"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), in one formula. Called by
`models/norm.py`.

y = n * (offset + w) + b, where n is x, for LayerNorm less its mean, divided by sqrt(mean(n^2) + eps). Backward, with
g = dy * (offset + w):

    dx = rstd * (g - n * mean(g * n)), for LayerNorm less rstd * mean(g);   dw = sum over tokens of dy * n;   db = sum of dy

Saved for backward: x, and per token rstd and the mean; n is made again. The last dim is normalized. A weight may have more dims
than that one, as of heads that have one each.

`add_norm` is the same of a sum s = x + f, which it returns too. Kernels read x and f once for both; s is kept in the place of x.

Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype

WeightGradient = Callable[[Tensor, Tensor], Tensor | None]


def _rounded(weight: Tensor, dweight: Tensor) -> Tensor:
    return dweight.to(weight.dtype)


def _summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The sum over the leading dims that `shape` lacks."""
    return x.sum(tuple(range(x.dim() - len(shape)))) if x.dim() > len(shape) else x


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        center: bool,
        weight_gradient: WeightGradient,
    ) -> Tensor:
        n = x.to(stat_dtype(x.dtype))
        mean = n.mean(-1, keepdim=True) if center else None
        if mean is not None:
            n = n - mean
        rstd = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, mean)
        ctx.weight, ctx.bias, ctx.offset, ctx.weight_gradient = weight, bias, offset, weight_gradient
        n = n * rstd
        if weight is None:
            return n.to(x.dtype)
        if not (offset or center):
            return n.to(x.dtype) * weight  # rounded before the product, as Llama is
        n = n * (weight.to(n.dtype) + offset)
        return (n if bias is None else n + bias.to(n.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None, None]:
        (x, rstd, mean), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        wide = rstd.dtype
        n = (x.to(wide) if mean is None else x.to(wide) - mean) * rstd
        g = dy.to(wide)
        dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = ctx.weight_gradient(weight, _summed_to(g * n, weight.shape))
        if ctx.needs_input_grad[2]:
            dbias = ctx.weight_gradient(bias, _summed_to(g, bias.shape))
        if weight is not None:
            g = g * (weight.to(wide) + ctx.offset if ctx.offset else weight)
        dx = g - n * (g * n).mean(-1, keepdim=True)
        if mean is not None:
            dx = dx - g.mean(-1, keepdim=True)
        return (dx * rstd).to(x.dtype), dweight, dbias, None, None, None, None


class _FusedNorm(torch.autograd.Function):
    """The same, of x or of x + f (f may be None), in kernels of Triton: y, or (x + f, y)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        center: bool,
        weight_gradient: WeightGradient,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from megatron_llm.ops.triton.norm import add_norm, norm, rows

        if f is None:
            s = rows(x)
            y, stats = norm(s, weight, bias, eps, offset, center)
        else:
            s, y, stats = add_norm(rows(x), rows(f), weight, bias, eps, offset, center)
        ctx.save_for_backward(s, stats)
        ctx.weight, ctx.bias, ctx.offset, ctx.weight_gradient = weight, bias, offset, weight_gradient
        ctx.set_materialize_grads(False)
        return y if f is None else (s, y)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        from megatron_llm.ops.triton.norm import gradients

        s, stats = ctx.saved_tensors
        *ds, dy = given
        dx, dweight, dbias = gradients(dy, ds[0] if ds else None, s, stats, ctx.weight, ctx.offset, ctx.needs_input_grad[2:4])
        if dweight is not None:
            dweight = ctx.weight_gradient(ctx.weight, dweight)
        if dbias is not None:
            dbias = ctx.weight_gradient(ctx.bias, dbias)
        return dx, dx if ds else None, dweight, dbias, None, None, None, None


@dataclass(frozen=True)
class NormKind:
    """Attributes:
    eps: beside the mean square. offset: where weights count from. center: LayerNorm, not RMSNorm.
    kernel: "torch" or "triton".
    weight_gradient: given a parameter and its gradient in `stat_dtype`, returns what autograd is to have of it.
    """

    eps: float
    offset: float = 0.0
    center: bool = False
    kernel: str = "torch"
    weight_gradient: WeightGradient = _rounded


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> Tensor:
    """[..., D] -> the same in the dtype of x; statistics in `stat_dtype`. No weight: all ones; no bias: 0.

    Kernels in Triton take [T, D] and [T, N, D].
    """
    chosen = weight, bias, kind.eps, kind.offset, kind.center, kind.weight_gradient
    return _FusedNorm.apply(x, None, *chosen) if kind.kernel == "triton" else _Norm.apply(x, *chosen)


def add_norm(x: Tensor, f: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> tuple[Tensor, Tensor]:
    """(s = x + f, rounded; the norm of s) of [T, D], in one pass with kernels in Triton; a gradient of s is added in theirs."""
    if kind.kernel == "triton":
        return _FusedNorm.apply(x, f, weight, bias, kind.eps, kind.offset, kind.center, kind.weight_gradient)
    s = x + f
    return s, norm(s, weight, bias, kind)
