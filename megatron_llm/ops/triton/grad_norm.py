"""Sum of squares of a flat run of gradients. Called by `ops/grad_norm.py`, which has the reference.

    s = sum of x_i^2, in float32

Bytes an element: 4, or 2 in bfloat16; x is read once. A program leaves one partial sum for 32,768 elements, and one more small
sum adds those: no atomics, and the same bits on every GPU, as the cut follows from the size alone. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv

BLOCK = 4096  # elements that a program reads at a time: 16 a thread
BLOCKS = 8  # that it adds up
WARPS = 8


@triton.jit
def squares_kernel(X, PARTIAL, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Grid: pieces of BLOCKS * BLOCK elements of [n]. PARTIAL: one sum of each."""
    piece = tl.program_id(0).to(tl.int64)
    start = piece * (BLOCKS * BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        i = start + block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + i, mask=i < n, other=0.0).to(tl.float32)
        total += x * x
    tl.store(PARTIAL + piece, tl.sum(total, 0))


@torch.library.custom_op("megatron_llm::sum_of_squares", mutates_args=())
def sum_of_squares(x: Tensor) -> Tensor:
    """[n], contiguous -> a scalar in float32."""
    partial = x.new_empty(cdiv(x.numel(), BLOCKS * BLOCK), dtype=torch.float32)
    if x.numel():
        squares_kernel[partial.shape](x, partial, x.numel(), BLOCK, BLOCKS, num_warps=WARPS)
    return partial.sum()


@sum_of_squares.register_fake
def _fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)
