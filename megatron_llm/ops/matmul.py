"""Matrix products of the linear layers, on the fastest exact path of the device.

Called by `parallel/linear.py` and `ops/attention.py`. Most CPUs have no bfloat16 arithmetic; torch then emulates it
(4 to 12 GFLOP/s on two AVX2 cores, against 90 in float32). There the operands are widened, which is exact, multiplied
in float32, and the result is rounded once: the same value as a fused bfloat16 GEMM with float32 accumulation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether oneDNN has native bfloat16 kernels on this processor."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen(x: Tensor) -> Tensor:
    """`x`, in float32 if it is a CPU bfloat16 tensor on a processor that would emulate the arithmetic."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and not cpu_has_bfloat16():
        return x.float()
    return x


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`a @ b` rounded once to `dtype`, by default that of `a`. Shapes [M, K] x [K, N] -> [M, N]."""
    return torch.mm(widen(a), widen(b)).to(dtype or a.dtype)


def accumulate_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in place, in the dtype of `total`: [M, N] += [M, K] x [K, N].

    The product is not rounded to the operands' dtype first where the device can avoid it.
    """
    a, b = widen(a), widen(b)
    if a.dtype is total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda and total.dtype is torch.float32:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(a, b))
