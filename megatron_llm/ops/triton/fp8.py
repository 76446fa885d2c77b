"""Vectors in 8 bits with a scale of their own, for the products of `ops/fp8.py`, which has the reference and the reasons.

    largest = max |x|  of a row      inverse = 2^(e - 8), twice that if the largest is above 1.75 * 2^e      q = e4m3(x / inverse)

Bytes a number of 2 bytes: 3 (x; q). A row is read twice, the second time from the L2 cache; 5 where that is too small. A
transposed x, such as a weight in dx, is read in its own order and written in that of q, whose rows are contiguous for the GEMM.

Shape suffixes: R rows, K numbers of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv

WARPS = 4


def blocks(rows: int, size: int, transposed: bool) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_K): at least 16 numbers a thread. Transposed: 64 bytes of x and 128 of q together; else 2048 of a row."""
    if transposed:
        return 32, 128
    block = min(2048, triton.next_power_of_2(max(16, size)))
    return max(1, min(2048 // block, triton.next_power_of_2(rows))), block


@triton.jit
def quantize_kernel(X, Q, INVERSE, stride, R, K, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid: (blocks of R). X: [R, K] with rows `stride` apart, or if transposed columns; Q: [R, K]; INVERSE: [R]."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    largest = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        here = (r < R)[:, None] & (k < K)[None, :]
        place = r[:, None] + k[None, :] * stride if TRANSPOSED else r[:, None] * stride + k[None, :]
        x = tl.load(X + place, mask=here, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # magnitudes in order, nan above infinity
    bits = tl.max(largest, axis=1)
    exponent = tl.maximum((tl.minimum(bits, 0x7F800000) + 0x1FFFFF) >> 23, 9)
    scale = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(bits < 0x7F800000, (exponent - 8) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    tl.store(INVERSE + r, inverse, mask=r < R)
    for start in range(0, K, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        here = (r < R)[:, None] & (k < K)[None, :]
        place = r[:, None] + k[None, :] * stride if TRANSPOSED else r[:, None] * stride + k[None, :]
        x = tl.load(X + place, mask=here, other=0.0).to(tl.float32)
        tl.store(Q + r[:, None] * K + k[None, :], (x * scale[:, None]).to(Q.dtype.element_ty), mask=here)


@torch.library.custom_op("megatron_llm::quantize_fp8", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K], one of whose dims is contiguous -> (e4m3 [R, K], contiguous; inverse scales [R, 1], float32)."""
    q, inverse = _fake(x)
    (rows, size), transposed = x.shape, x.stride(1) != 1
    if x.numel():
        block_r, block_k = blocks(rows, size, transposed)
        stride = x.stride(1) if transposed else x.stride(0)
        quantize_kernel[(cdiv(rows, block_r),)](
            x, q, inverse, stride, rows, size, transposed, block_r, block_k, num_warps=WARPS
        )  # fmt: skip
    return q, inverse


@quantize.register_fake
def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    return x.new_empty(rows, size, dtype=torch.float8_e4m3fn), x.new_empty(rows, 1, dtype=torch.float32)
