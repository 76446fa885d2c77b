"""The gradient of an embedding, straight into the main gradients. Called by `ops/embedding.py`, which has the reference.

    table[r] += sum of dy[t] over the tokens t with rows[t] = r

Bytes an element: dy read once, 2; every distinct row of a float32 table read and written once, 8. Nothing of the size of the
table is made, and nothing is added atomically: tokens come sorted by row, so those of a row are neighbours, a *run*.

Runs are cut at every WINDOW-th token, so that a token that fills half of a batch is not one program's work. A program adds up the
runs of its window token by token. A run that ends where the window does not cut it goes to the table at once. Of the others,
the sums of their windows (4 bytes an element of a window, written and read) go to a second kernel, which adds them in their order
and the result to the table. So every sum has one order, which the rows alone decide, and the bits are the same in every run.

Where runs end is found on the device: the host knows the number of tokens, and nothing of the rows.

Shape suffixes: T tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv

WINDOW = 32  # tokens of a program, one after the other; the next one's gradients are on their way meanwhile
BLOCK = 1024  # columns of a program: 8 a thread, 16 bytes of a bfloat16 tensor
JOINED = 8  # partial sums of a long run that are read at a time
JOINED_BLOCK = 512
WARPS = 4


def block_of(hidden: int) -> int:
    """Columns of a program of the first kernel: no more than there are."""
    return min(BLOCK, max(16, triton.next_power_of_2(hidden)))


@triton.jit
def runs_kernel(ROWS, ORDER, DY, TABLE, PARTIAL, T, V, H, dy_stride, stride, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (windows of tokens, blocks of columns). ROWS: [T] sorted; ORDER: [T], the token of each.

    TABLE: [V, H] with rows `stride` apart. PARTIAL: [windows, 2, H], sums of a run that began in an earlier window (0), and
    of one that begins here and goes on (1).
    """
    window = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = window * WINDOW
    stop = tl.minimum(first + WINDOW, T)
    row = tl.load(ROWS + first)
    began_before = (first > 0) & (tl.load(ROWS + first - 1, mask=first > 0, other=0) == row)
    # Conditions are columns to take, H or none, as one comparison with h keeps loads of 16 bytes.
    columns = tl.where((row >= 0) & (row < V), H, 0)
    dy = tl.load(DY + tl.load(ORDER + first).to(tl.int64) * dy_stride + h, mask=h < columns, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(WINDOW):
        token = first + step
        total += dy.to(tl.float32)
        here, last = token < stop, token + 1 == stop
        following = tl.load(ROWS + token + 1, mask=token + 1 < T, other=-1)
        ends = here & ((following != row) | (token + 1 == T))
        into = h < tl.where(ends & (began_before == 0), columns, 0)
        at = TABLE + row.to(tl.int64) * stride + h
        old = tl.load(at, mask=into, other=0.0)
        ahead = tl.where((following >= 0) & (following < V) & (token + 1 < stop), H, 0)
        dy_row = tl.load(ORDER + token + 1, mask=token + 1 < stop, other=0).to(tl.int64)
        dy = tl.load(DY + dy_row * dy_stride + h, mask=h < ahead, other=0.0)
        tl.store(at, (old.to(tl.float32) + total).to(TABLE.dtype.element_ty), mask=into)
        cut = (ends & began_before) | (here & last & (ends == 0))
        slot = 2 * window + (began_before == 0).to(tl.int64)
        tl.store(PARTIAL + slot * H + h, total, mask=h < tl.where(cut, columns, 0))
        total = tl.where(ends, 0.0, total)
        began_before = began_before & (ends == 0)
        row, columns = following, ahead


@triton.jit
def join_kernel(ROWS, TABLE, PARTIAL, T, V, H, stride, WINDOW: tl.constexpr, JOINED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (windows but the last, blocks of columns). Of the run that begins in this window and goes on, if there is one."""
    window = tl.program_id(0).to(tl.int64)
    first, following = window * WINDOW, (window + 1) * WINDOW
    row = tl.load(ROWS + following)
    goes_on = tl.load(ROWS + following - 1) == row
    began_before = (window > 0) & (tl.load(ROWS + first - 1, mask=window > 0, other=-1) == row)
    if goes_on & (began_before == 0) & (row >= 0) & (row < V):
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(PARTIAL + (2 * window + 1) * H + h, mask=h < H, other=0.0)
        ahead = window + 1 + tl.arange(0, JOINED)
        more = goes_on
        while more:
            part = (ahead * WINDOW < T) & (tl.load(ROWS + ahead * WINDOW, mask=ahead * WINDOW < T, other=-1) == row)
            sums = tl.load(PARTIAL + (2 * ahead[:, None]) * H + h[None, :], mask=part[:, None] & (h < H)[None, :], other=0.0)
            total += tl.sum(sums, 0)
            ahead += JOINED
            more = tl.min(part.to(tl.int32), 0) == 1
        at = TABLE + row.to(tl.int64) * stride + h
        tl.store(at, (tl.load(at, mask=h < H, other=0.0).to(tl.float32) + total).to(TABLE.dtype.element_ty), mask=h < H)


@torch.library.custom_op("megatron_llm::add_to_rows", mutates_args=("table",))
def add_to_rows(table: Tensor, rows: Tensor, order: Tensor, dy: Tensor) -> None:
    """Add dy [T, H] to rows of a table [V, H]; the last dim of both is contiguous.

    rows: [T], sorted; those that the table does not have are left out. order: [T], the place in dy of each.
    """
    (tokens, hidden), windows = dy.shape, cdiv(len(dy), WINDOW)
    if not dy.numel():
        return
    partial = dy.new_empty((windows, 2, hidden), dtype=torch.float32)
    block = block_of(hidden)
    sizes = (tokens, len(table), hidden)
    runs_kernel[(windows, cdiv(hidden, block))](
        rows, order, dy, table, partial, *sizes, dy.stride(0), table.stride(0), WINDOW, block, num_warps=WARPS
    )
    if windows > 1:
        block = min(block, JOINED_BLOCK)
        join_kernel[(windows - 1, cdiv(hidden, block))](
            rows, table, partial, *sizes, table.stride(0), WINDOW, JOINED, block, num_warps=WARPS
        )


@add_to_rows.register_fake
def _fake(*_: Any) -> None:
    return None
