"""Activations of the MLP, plain and gated (Shazeer 2020): act(gate) * up, side by side. Called by `models/mlp.py`.

Backward of the gated ones: dgate = dy * up * act'(gate), dup = dy * act(gate). Saved: only the fused input; act is made again.

Shape suffixes: T tokens, F intermediate size (local).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

_aten = torch.ops.aten
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, _aten.silu_backward),
    "gelu": (functional.gelu, _aten.gelu_backward),
    "gelu_tanh": (partial(functional.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
    "relu": (functional.relu, lambda dy, x: _aten.threshold_backward(dy, x, 0)),
}
"""By ModelConfig.hidden_act: the function, and its backward (dy, x) -> dx."""


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate_up_T2F)
        ctx.name = name
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return _ACTIVATIONS[name][0](gate_TF) * up_TF

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor, None]:
        (gate_up_T2F,) = ctx.saved_tensors
        forward, backward = _ACTIVATIONS[ctx.name]
        grad_T2F = torch.empty_like(gate_up_T2F)
        dgate_TF, dup_TF = grad_T2F.chunk(2, dim=-1)
        if dy_TF.dtype is torch.float16:  # a product of gradient and activation overflows long before the results do
            dy_TF, gate_up_T2F = dy_TF.float(), gate_up_T2F.float()
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        # Two roundings each in bfloat16: of a product, and of the result; torch's kernels are float32 inside.
        torch.mul(dy_TF, forward(gate_TF), out=dup_TF)
        dgate_TF.copy_(backward(dy_TF * up_TF, gate_TF))
        return grad_T2F, None


def gated(gate_up_T2F: Tensor, name: str, kernel: str = "torch") -> Tensor:
    """[T, 2F] (gate, then up) -> act(gate) * up, [T, F]. `name`: as in ModelConfig.hidden_act."""
    return _fused(gate_up_T2F, name, True) if kernel == "triton" else _Gated.apply(gate_up_T2F, name)


def activation(x_TF: Tensor, name: str, kernel: str = "torch") -> Tensor:
    """The activation of every element of [T, F]."""
    return _fused(x_TF, name, False) if kernel == "triton" else _ACTIVATIONS[name][0](x_TF)


def _fused(x: Tensor, name: str, gated: bool) -> Tensor:
    from megatron_llm.ops.triton.activation import activation

    return activation(x if x.stride(-1) == 1 else x.contiguous(), name, gated)
