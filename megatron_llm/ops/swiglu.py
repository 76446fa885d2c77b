"""SwiGLU (Shazeer 2020) on the fused layout: silu(gate) * up, gate and up side by side. Called by `models/mlp.py`.

Backward, with s = sigmoid(gate):   dgate = dy * up * s * (1 + gate * (1 - s)),   dup = dy * gate * s.
Saved: only the fused input; the sigmoid is recomputed. Shape suffixes: T tokens, F intermediate size (local).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.dtypes import stat_dtype


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_T2F)
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return functional.silu(gate_TF) * up_TF

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> Tensor:
        (gate_up_T2F,) = ctx.saved_tensors
        wide = stat_dtype(gate_up_T2F.dtype)
        gate_TF, up_TF = gate_up_T2F.to(wide).chunk(2, dim=-1)
        grad_T2F = torch.empty_like(gate_up_T2F)
        dgate_TF, dup_TF = grad_T2F.chunk(2, dim=-1)
        s_TF, dy_TF = gate_TF.sigmoid(), dy_TF.to(wide)
        dup_TF.copy_(dy_TF * gate_TF * s_TF)
        dgate_TF.copy_(dy_TF * up_TF * s_TF * (1 + gate_TF * (1 - s_TF)))
        return grad_T2F


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """[T, 2F] (gate, then up) -> [T, F]."""
    return _SwiGLU.apply(gate_up_T2F)
