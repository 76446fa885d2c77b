"""SwiGLU (Shazeer 2020) on the fused layout: silu(gate) * up, gate and up side by side. Called by `models/mlp.py`.

Backward, with s = sigmoid(gate):   dgate = dy * up * s * (1 + gate * (1 - s)),   dup = dy * gate * s.
Saved: only the fused input; the sigmoid is recomputed. Shape suffixes: T tokens, F intermediate size (local).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_T2F)
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return functional.silu(gate_TF) * up_TF

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> Tensor:
        (gate_up_T2F,) = ctx.saved_tensors
        grad_T2F = torch.empty_like(gate_up_T2F)
        dgate_TF, dup_TF = grad_T2F.chunk(2, dim=-1)
        if dy_TF.dtype is torch.float16:  # a product of gradient and activation overflows long before the results do
            dy_TF, gate_up_T2F = dy_TF.float(), gate_up_T2F.float()
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        # Two roundings each in bfloat16: of a product, and of the result; torch's kernels are float32 inside.
        torch.mul(dy_TF, functional.silu(gate_TF), out=dup_TF)
        dgate_TF.copy_(torch.ops.aten.silu_backward(dy_TF * up_TF, gate_TF))
        return grad_T2F


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """[T, 2F] (gate, then up) -> [T, F]."""
    return _SwiGLU.apply(gate_up_T2F)
