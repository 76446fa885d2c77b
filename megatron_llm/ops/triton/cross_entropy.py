"""Softmax cross-entropy on one rank's slice of the vocabulary. Called by `ops/cross_entropy.py`, which has the reference.

    z = x, or cap * tanh(x / cap)                                    x: logits, as the head makes them
    forward     max = max_v z_v,  sum = sum_v exp(z_v - max),  z_label                                 12 bytes a token out
                with label smoothing sum_v z_v besides, with accuracy the first v where z_v = max      16
    backward    dx = scale * ((1 + 2 z_loss lse) exp(z - lse) - (1 - smoothing) [v = label] - smoothing / vocabulary) * dz/dx

lse is the log of the sum of exp(z) on all ranks. Bytes an element in 2-byte numbers: forward 2, backward 4, in place; 6 together,
where a maximum, a sum, and exponentials kept in float32 would take 16 and more. Forward reads x once: the maximum is kept as
of the elements seen so far, and the sum is rescaled when it grows. Backward makes exp(z) again from x and lse. The gradient of
padding columns, behind the slice's ids, is 0; a token whose scale is 0 is not read.

A program has a row in forward, so that no second kernel adds up parts: there are as many rows as a chunk of the head has tokens
(`parallel/head.py`), thousands. Each thread keeps the maxima of the 16 bytes that it reads at once, and threads meet only at the
end of the row. Blocks that are full are read without a mask, because one that ends anywhere makes loads of single elements.

Shape suffixes: T tokens, V local vocabulary with padding, U without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv
from megatron_llm.ops.triton.maths import tanh

WARPS = 8
EXTRAS = ("", "sum", "best")


def forward_block(width: int, size: int) -> tuple[int, int]:
    """(elements that a program reads at once, of which those of a thread's load are neighbours), for elements of `size` bytes:
    two loads of 16 bytes a thread, less in a narrow slice.
    """
    each = 16 // size
    return min(2 * 32 * WARPS * each, max(32 * each, triton.next_power_of_2(width))), each


def backward_block(vocabulary: int, size: int) -> int:
    """Elements of a program: two loads of 16 bytes a thread, less in a narrow slice."""
    return min(2 * 32 * WARPS * (16 // size), max(128, triton.next_power_of_2(vocabulary)))


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    if CAPPED:
        x = cap * tanh(x / cap)
    return x


@triton.jit
def _add_block(X, v, group, start, U, cap, m, s, z_sum, first, MASKED: tl.constexpr, CAPPED: tl.constexpr, EXTRA: tl.constexpr):
    """The statistics with one block more."""
    if MASKED:
        z = _capped(tl.load(X + v, mask=v < U, other=0.0).to(tl.float32), cap, CAPPED)
        if EXTRA == "sum":
            z_sum += tl.sum(tl.where(v < U, z, 0.0), 1)
        z = tl.where(v < U, z, float("-inf"))
    else:
        z = _capped(tl.load(X + v).to(tl.float32), cap, CAPPED)
        if EXTRA == "sum":
            z_sum += tl.sum(z, 1)
    new = tl.maximum(m, tl.max(z, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # -inf less -inf is no number
    s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base[:, None]), 1)
    if EXTRA == "best":
        first = tl.where(new > m, start + group, first)
    return new, s, z_sum, first


@triton.jit
def forward_kernel(
    X, LABELS, OUT, stride, U, cap, CAPPED: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr
):
    """Grid: tokens. X: [T, U] with rows `stride` apart; LABELS: int64 [T], within [0, U) if they are here; OUT: [T, 3 or 4]."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride
    group = tl.arange(0, BLOCK // EACH) * EACH
    inside = group[:, None] + tl.arange(0, EACH)[None, :]
    m = tl.full([BLOCK // EACH], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK // EACH], tl.float32)
    z_sum = tl.zeros([BLOCK // EACH], tl.float32)
    first = tl.zeros([BLOCK // EACH], tl.int32)
    full = U // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        m, s, z_sum, first = _add_block(X, start + inside, group, start, U, cap, m, s, z_sum, first, False, CAPPED, EXTRA)
    if full < U:
        m, s, z_sum, first = _add_block(X, full + inside, group, full, U, cap, m, s, z_sum, first, True, CAPPED, EXTRA)
    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    label = tl.load(LABELS + row)
    here = (label >= 0) & (label < U)
    z_label = _capped(tl.load(X + label, mask=here, other=0.0).to(tl.float32), cap, CAPPED)
    COLUMNS: tl.constexpr = 3 if EXTRA == "" else 4
    OUT += row * COLUMNS
    tl.store(OUT, top)
    tl.store(OUT + 1, tl.sum(s * tl.exp(m - base), 0))
    tl.store(OUT + 2, z_label)
    if EXTRA == "sum":
        tl.store(OUT + 3, tl.sum(z_sum, 0))
    if EXTRA == "best":
        v = tl.min(tl.where(m == top, first, 1 << 30), 0) + tl.arange(0, EACH)  # the first neighbours that have the maximum
        z = _capped(tl.load(X + v, mask=v < U, other=float("-inf")).to(tl.float32), cap, CAPPED)
        tl.store(OUT + 3, tl.min(tl.where(z == top, v, 1 << 30), 0).to(tl.float32))


@triton.jit
def _gradient(x, v, label, lse, scale, factor, smoothing, share, cap, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr):
    """factor: of the exponentials; share: of smoothing, of every id."""
    x = x.to(tl.float32)
    if CAPPED:
        t = tanh(x / cap)
        g = factor * tl.exp(cap * t - lse)
    else:
        g = factor * tl.exp(x - lse)
    if SMOOTHED:
        g -= share
    g = tl.where(v == label, g - (1.0 - smoothing), g) * scale
    if CAPPED:
        g *= 1.0 - t * t
    return g


@triton.jit
def backward_kernel(
    X, LABELS, LSE, SCALE, stride, U, V, cap, smoothing, share, z_loss,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, blocks of V). X: [T, V] with rows `stride` apart, overwritten by the gradient. LSE, SCALE: float32 [T]."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride
    start = tl.program_id(1) * BLOCK
    v = start + tl.arange(0, BLOCK)
    label, lse, scale = tl.load(LABELS + row), tl.load(LSE + row), tl.load(SCALE + row)
    factor = 1.0 + 2.0 * z_loss * lse
    if start + BLOCK <= U:
        g = tl.zeros([BLOCK], tl.float32)
        if scale != 0.0:
            g = _gradient(tl.load(X + v), v, label, lse, scale, factor, smoothing, share, cap, CAPPED, SMOOTHED)
        tl.store(X + v, g.to(X.dtype.element_ty))
    else:
        x = tl.load(X + v, mask=v < U, other=0.0)
        g = _gradient(x, v, label, lse, scale, factor, smoothing, share, cap, CAPPED, SMOOTHED)
        g = tl.where(scale == 0.0, 0.0, g)
        tl.store(X + v, tl.where(v < U, g, 0.0).to(X.dtype.element_ty), mask=v < V)


@torch.library.custom_op("megatron_llm::vocab_statistics", mutates_args=())
def statistics(logits: Tensor, labels: Tensor, width: int, extra: str, cap: float) -> Tensor:
    """[T, V] with a contiguous last dim -> float32 [T, 3 or 4], of the first `width` columns: max, sum, z of the label or 0,
    and what `extra` names, one of `EXTRAS`. labels: int64 [T], contiguous. cap: 0 if there is none.
    """
    out = _fake(logits, labels, width, extra, cap)
    if len(out):
        block, each = forward_block(width, logits.element_size())
        forward_kernel[(len(out),)](
            logits, labels, out, logits.stride(0), width, cap or 1.0, cap != 0, extra, block, each, num_warps=WARPS
        )
    return out


@statistics.register_fake
def _fake(logits: Tensor, labels: Tensor, width: int, extra: str, cap: float) -> Tensor:
    return torch.empty(logits.shape[0], 3 + (extra != ""), dtype=torch.float32, device=logits.device)


@torch.library.custom_op("megatron_llm::logits_gradient_", mutates_args=("logits",))
def gradient_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    scale: Tensor,
    width: int,
    smoothing: float,
    share: float,
    z_loss: float,
    cap: float,
) -> None:
    """Overwrite logits [T, V], with a contiguous last dim, by their gradient: zero beyond the first `width` columns.

    labels: int64 [T]; lse, scale: float32 [T]; all contiguous. share: smoothing / vocabulary. cap: 0 if there is none.
    """
    tokens, vocabulary = logits.shape
    if logits.numel():
        block = backward_block(vocabulary, logits.element_size())
        backward_kernel[(tokens, cdiv(vocabulary, block))](
            logits, labels, lse, scale, logits.stride(0), width, vocabulary, cap or 1.0, smoothing, share, z_loss,
            cap != 0, smoothing != 0, block, num_warps=WARPS,
        )  # fmt: skip
