"""Matrix products of the linear layers, on the fastest exact path of the device.

Called by `parallel/linear.py` and `ops/attention.py`. Most CPUs have no bfloat16 arithmetic, and hardly one has float16; torch
then emulates it (4 to 12 GFLOP/s on two AVX2 cores, against 90 in float32). There the operands are widened, which is exact,
multiplied in float32, and the result is rounded once: the same value as a fused narrow GEMM with float32 accumulation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether oneDNN has native bfloat16 kernels on this processor."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def cpu_has_float16() -> bool:
    """Whether oneDNN has native float16 kernels on this processor."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def widen(x: Tensor) -> Tensor:
    """`x`, in float32 if it is a narrow CPU tensor on a processor that would emulate the arithmetic."""
    if x.device.type == "cpu" and (
        (x.dtype is torch.bfloat16 and not cpu_has_bfloat16()) or (x.dtype is torch.float16 and not cpu_has_float16())
    ):
        return x.float()
    return x


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None) -> Tensor:
    """`a @ b (+ bias)` rounded once to `dtype`, by default that of `a`. Shapes [M, K] x [K, N] + [N] -> [M, N]."""
    wide_a, wide_b = widen(a), widen(b)
    product = torch.mm(wide_a, wide_b) if bias is None else torch.addmm(bias.to(wide_a.dtype), wide_a, wide_b)
    return product.to(dtype or a.dtype)


def accumulate_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in place, in the dtype of `total`: [M, N] += [M, K] x [K, N].

    Product and sum are made in float32 at least and rounded once, except that a CPU with narrow arithmetic rounds a product that
    is added to a wider total. `total` may be narrow too: bfloat16 main gradients.
    """
    a, b = widen(a), widen(b)
    if a.dtype is total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda and a.dtype is not torch.float32 and total.dtype is not torch.float64:
        if total.dtype is torch.float32 and adds_wide_products(a.device, a.dtype):
            _add_wide_product(total, a, b)
        else:
            total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.add_(torch.mm(a, b))


def _add_wide_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """float32 total += narrow a @ b in the GEMM itself: no product in memory and no second pass over `total`."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@functools.cache
def adds_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of `dtype` operands to float32 in place, and rightly; tried once on a device.

    Operands lie as in a layer's weight gradient, dy^T x into a view of a flat buffer; integers make every sum exact.
    """
    rows = torch.arange(32, device=device)[:, None]
    dy, x = ((rows * step + torch.arange(32, device=device)) % 17 - 8 for step in (5, 3))
    buffer = torch.full((33, 32), 0.25, dtype=torch.float32, device=device)
    try:
        _add_wide_product(buffer[1:], dy.to(dtype).t(), x.to(dtype))
    except (RuntimeError, TypeError):  # no kernel for the device, or a torch that does not know the argument
        return False
    expected = torch.full_like(buffer, 0.25)
    expected[1:] += dy.float().t() @ x.float()
    return torch.equal(buffer, expected)
