"""RMSNorm and LayerNorm as modules with their place in the whole model. Called by the other files of this package."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_llm.config import ModelConfig
from megatron_llm.models.setup import Setup
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.norm import NormKind, add_norm, norm
from megatron_llm.parallel.collectives import all_reduce
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.linear import replicated
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from megatron_llm.parallel.weight_grad import vector_weight_gradient


class Norm(nn.Module):
    """[..., H] -> the same, of the kind that the model has; without parameters if the model's norms have none."""

    def __init__(self, setup: Setup, weight: nn.Parameter | None, bias: nn.Parameter | None):
        super().__init__()
        model = setup.model
        center = model.norm == "layer_norm"
        self.kind = NormKind(model.norm_eps, model.norm_weight_offset, center, setup.kernels.norm, vector_weight_gradient)
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, self.kind)

    def of_sum(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """(x + f, its norm) of hidden states, which kernels make in one pass."""
        return add_norm(x, f, self.weight, self.bias, self.kind)


def hidden_norm(name: str, setup: Setup) -> Norm:
    """A norm of hidden states. Its parameters are replicated over tp; under sequence parallelism (`setup.partial`) each rank
    normalizes only its own tokens, so the ranks' gradients are partial sums, which the spec says.
    """
    return _replicated_norm(name, setup.model.hidden_size, setup.model.norm_bias, setup.partial, setup)


def _replicated_norm(name: str, size: int, biased: bool, partial: bool, setup: Setup) -> Norm:
    model, tp, dtype, device = setup.model, setup.tp, setup.dtype, setup.device
    if not model.norm_weight:
        return Norm(setup, None, None)
    weight = replicated(f"{name}.weight", (size,), _init(model), tp, partial, dtype, device)
    bias = replicated(f"{name}.bias", (size,), "zeros", tp, partial, dtype, device) if biased else None
    return Norm(setup, weight, bias)


def _init(model: ModelConfig) -> Any:
    return "zeros" if model.norm_weight_offset else "ones"


def head_norm(name: str, heads: int, held: range, most: int, replica: Axis, setup: Setup) -> nn.Module:
    """The norm of queries or keys, [T, heads here, D] -> the same, as ModelConfig.qk_norm says.

    heads: in the whole model; held: those here; most: how many no rank exceeds; replica: the ranks that hold the same ones.
    """
    model, dtype, device = setup.model, setup.dtype, setup.device
    dim = model.head_dim
    if model.qk_norm == "head":  # each rank normalizes its own heads with the one weight
        return _replicated_norm(name, dim, model.qk_norm_bias, True, setup)
    per_head = model.qk_norm == "per_head"
    whole, unit = ((heads, dim), 1) if per_head else ((heads * dim,), dim)
    rows, room = range(held.start * unit, held.stop * unit), most * dim
    weight = _of_heads(f"{name}.weight", whole, rows, room, _init(model), replica, dtype, device)
    bias = _of_heads(f"{name}.bias", whole, rows, room, "zeros", replica, dtype, device) if model.qk_norm_bias else None
    return Norm(setup, weight, bias) if per_head else FullNorm(model, weight, heads * dim, setup.tp, replica.size)


def _of_heads(
    name: str, whole: tuple[int, ...], rows: range, room: int, init: Any, replica: Axis, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """Some rows of a parameter that has rows for every head."""
    size = (len(rows), *whole[1:])
    parameter = nn.Parameter((torch.ones if init == "ones" else torch.zeros)(size, dtype=dtype, device=device))
    held = ((Box.full(size), Box((rows.start, *(0 for _ in whole[1:])), size)),)
    summed = replica if replica.size > 1 else None
    part = Part(name, whole, held, init, replica.size, replica.rank, summed, room)
    parameter.shard = ShardSpec((part,), False)  # type: ignore[attr-defined]
    return parameter


class FullNorm(nn.Module):
    """RMSNorm over all heads together, [T, heads here, D] -> the same: the ranks of tp add up their squares (OLMo-2).

    size: channels of all heads; copies: ranks that hold the same ones, whose squares count once.
    """

    def __init__(self, model: ModelConfig, weight: nn.Parameter, size: int, tp: Axis, copies: int):
        super().__init__()
        self.eps, self.offset, self.size, self.tp, self.copies = model.norm_eps, model.norm_weight_offset, size, tp, copies
        self.weight = weight

    def forward(self, x_TND: Tensor) -> Tensor:
        return _FullNorm.apply(x_TND, self.weight, self)


class _FullNorm(torch.autograd.Function):
    """As `ops/norm.py`, with both means over what all ranks hold. A copy's share of the mean's gradient is one of `copies`.

    The result is no view, so it may be rotated in place.
    """

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, weight_C: Tensor, norm: FullNorm) -> Tensor:
        x_TC = x_TND.flatten(1)
        wide_TC = x_TC.to(stat_dtype(x_TC.dtype))
        total_T1 = all_reduce(wide_TC.square().sum(-1, keepdim=True), norm.tp, dist.ReduceOp.SUM)
        rstd_T1 = torch.rsqrt(total_T1 / (norm.size * norm.copies) + norm.eps)
        ctx.save_for_backward(x_TC, rstd_T1)
        ctx.weight, ctx.norm = weight_C, norm
        y_TND = x_TND.new_empty(x_TND.shape)
        y_TND.flatten(1).copy_(wide_TC * rstd_T1 * (weight_C.to(wide_TC.dtype) + norm.offset))
        return y_TND

    @staticmethod
    def backward(ctx: Any, dy_TND: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x_TC, rstd_T1), weight_C, norm = ctx.saved_tensors, ctx.weight, ctx.norm
        wide = rstd_T1.dtype
        n_TC, dy_TC = x_TC.to(wide) * rstd_T1, dy_TND.flatten(1).to(wide)
        dweight_C = vector_weight_gradient(weight_C, (dy_TC * n_TC).sum(0)) if ctx.needs_input_grad[1] else None
        g_TC = dy_TC * (weight_C.to(wide) + norm.offset)
        # A copy's dy is a partial sum, so the sum over all ranks counts every channel once.
        mean_T1 = all_reduce((g_TC * n_TC).sum(-1, keepdim=True), norm.tp, dist.ReduceOp.SUM) / norm.size
        dx_TC = (g_TC - n_TC * mean_T1 / norm.copies) * rstd_T1
        return dx_TC.to(x_TC.dtype).view_as(dy_TND), dweight_C, None
