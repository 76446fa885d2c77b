"""RMSNorm and LayerNorm, forward and backward, with the addition before them. Called by `ops/norm.py`, which has the reference.

    forward     s = x + f (if there is an f);  n = (s - mean) * rstd;  y = n * (offset + w) + b
    backward    ds = rstd * (g - n * mean(g * n) - mean(g)) + dres,  g = dy * (offset + w);  dw = sum of dy * n;  db = sum of dy

RMSNorm has no mean and no b, and with offset 0 rounds n before the product, as the reference does. s is rounded before it is
normalized: what is normalized is what is kept. dres is the gradient of s from elsewhere (the residual stream).

Bytes an element in 2-byte numbers, each the least that there is: forward 4 (x; y), with an addition 8 (x, f; s, y); backward 6
(x, dy; dx), with dres 8. Besides, 4 or 8 a row of statistics; and as each program of backward sums over its rows in registers,
8 * H * programs for dw (written, then read by the sum over programs), as much for db: 4 MB at H 4096 on 132 multiprocessors,
what 130 tokens cost. n is made again in backward. LayerNorm of more than 8192 channels reads dy once more for db: 2 bytes.
Rows above 16384 run too, but their registers may spill.

A row is one token, or one head of a token: rows need not be neighbours, as in a view of fused queries, keys and values.
Programs take several short rows at once.

Shape suffixes: T tokens, N heads, D normalized (H of hidden states).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv, stream_multiprocessors


def launch(size: int) -> dict[str, int]:
    """Rows and width of a block, and warps, for rows of a size: 16 elements a thread, which is two loads of 16 bytes."""
    block = triton.next_power_of_2(size)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(32, rows * block // 512)}


def launch_backward(size: int) -> dict[str, Any]:
    """The same of backward, which has one program a multiprocessor: 16 warps, and the next rows on their way in shared memory.

    WIDE, rows of which registers cannot hold sums, operands and weights: rows are read again behind their means, from L1 or L2.
    """
    block = triton.next_power_of_2(size)
    rows, wide = max(1, 8192 // block), block > 8192
    warps = 16
    return {"ROWS": rows, "BLOCK": block, "WIDE": wide, "STAGES": 1 if wide else 2, "num_warps": warps}


@triton.jit
def _rows(block, ROWS: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr):
    """(token, head) of the rows of a block: [ROWS, 1]. PER_HEAD: those of the head that is the second axis of the grid."""
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if PER_HEAD:
        token, head = row, tl.zeros_like(row) + tl.program_id(1)
    else:
        token, head = row // HEADS, row % HEADS
    return token, head


@triton.jit
def _widened(P, at, here):
    return tl.load(P + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _weight(W, offset, D: tl.constexpr, BLOCK: tl.constexpr, PER_HEAD: tl.constexpr):
    """offset + w: [1, BLOCK]."""
    d = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(1) * D if PER_HEAD else 0
    return _widened(W, first + d, d < D) + offset


@triton.jit
def forward_kernel(
    X, F, W, B, S, Y, STATS, x_token, x_head, f_token, tokens, eps, offset,
    D: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr, CENTER: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, heads if each has a weight else 1).

    X: [T, N, D], strides of tokens and heads given; F, S: [T, D] and N = 1, or None; W, B: [D] or [N, D] or None; Y: [T, N, D];
    STATS: rstd [T, N], then if CENTER the mean.
    """
    token, head = _rows(tl.program_id(0), ROWS, HEADS, PER_HEAD)
    d = tl.arange(0, BLOCK)[None, :]
    there = token < tokens
    here = there & (d < D)
    row = token * HEADS + head
    n = _widened(X, token * x_token + head * x_head + d, here)
    if F is not None:
        s = (n + _widened(F, token * f_token + d, here)).to(S.dtype.element_ty)
        tl.store(S + row * D + d, s, mask=here)
        n = s.to(tl.float32)
    if CENTER:
        mean = tl.sum(n, 1, keep_dims=True) / D
        tl.store(STATS + tl.cast(tokens, tl.int64) * HEADS + row, mean, mask=there)
        n = tl.where(here, n - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(n * n, 1, keep_dims=True) / D + eps)
    tl.store(STATS + row, rstd, mask=there)
    n *= rstd
    if ROUND:
        n = n.to(Y.dtype.element_ty).to(tl.float32)
    if W is not None:
        n *= _weight(W, offset, D, BLOCK, PER_HEAD)
    if B is not None:
        n += _weight(B, 0.0, D, BLOCK, PER_HEAD)
    tl.store(Y + row * D + d, n.to(Y.dtype.element_ty), mask=here)


@triton.jit
def _operands(DY, X, rstd, mean, at_dy, at_x, here, CENTER: tl.constexpr, KEEP: tl.constexpr):
    """(n, dy) of a block. KEEP: where the cache is to put them; what is read again must differ in it, or is not."""
    n = tl.load(X + at_x, mask=here, other=0.0, eviction_policy=KEEP).to(tl.float32)
    dy = tl.load(DY + at_dy, mask=here, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if CENTER:
        n -= mean  # not 0 beyond the row, but dy is
    return n * rstd, dy


@triton.jit
def backward_kernel(
    DY, X, STATS, W, DRES, DX, SUMS, dy_token, dy_head, x_token, x_head, dres_token, tokens, blocks, offset,
    D: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr, CENTER: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, heads if each has a weight else 1); a program takes the blocks that are `programs` apart.

    DX: [T, N, D]; DRES: [T, D] and N = 1, or None; SUMS: of each program dw, then if BIAS db, [programs, 1 or 2, 1 or N, D];
    None if no gradient but DX is wanted.
    """
    d = tl.arange(0, BLOCK)[None, :]
    if W is not None and not WIDE:
        w = _weight(W, offset, D, BLOCK, PER_HEAD)
    if SUMS is not None:
        dw = tl.zeros((ROWS, BLOCK), tl.float32)
        if BIAS:
            db = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        token, head = _rows(block, ROWS, HEADS, PER_HEAD)
        there = token < tokens
        here = there & (d < D)
        row = token * HEADS + head
        at_dy, at_x = token * dy_token + head * dy_head + d, token * x_token + head * x_head + d
        rstd = tl.load(STATS + row, mask=there, other=0.0)
        mean = tl.load(STATS + tl.cast(tokens, tl.int64) * HEADS + row, mask=there, other=0.0) if CENTER else 0.0
        n, dy = _operands(DY, X, rstd, mean, at_dy, at_x, here, CENTER, "evict_last" if WIDE else "")
        g = dy
        if W is not None:
            if WIDE:
                w = _weight(W, offset, D, BLOCK, PER_HEAD)
            g *= w
        along = tl.sum(g * n, 1, keep_dims=True) / D
        level = tl.sum(g, 1, keep_dims=True) / D if CENTER else 0.0
        if WIDE:
            n, dy = _operands(DY, X, rstd, mean, at_dy, at_x, here, CENTER, "evict_first")
            g = dy
            if W is not None:
                g *= _weight(W, offset, D, BLOCK, PER_HEAD)
        if SUMS is not None:
            dw += dy * n
            if BIAS:
                db += dy
        dx = (g - n * along - level) * rstd
        if DRES is not None:
            dx += _widened(DRES, token * dres_token + d, here)
        tl.store(DX + row * D + d, dx.to(DX.dtype.element_ty), mask=here)
    if SUMS is not None:
        groups = tl.num_programs(1)
        at = (tl.program_id(0) * (1 + BIAS) * groups + tl.program_id(1)) * D + d
        tl.store(SUMS + at, tl.sum(dw, 0, keep_dims=True), mask=d < D)
        if BIAS:
            tl.store(SUMS + groups * D + at, tl.sum(db, 0, keep_dims=True), mask=d < D)


def _sizes(x: Tensor, weight: Tensor | None) -> tuple[int, int, int, bool]:
    """T, N, D, and whether heads have weights of their own."""
    heads = x.shape[1] if x.dim() == 3 else 1
    return x.shape[0], heads, x.shape[-1], weight is not None and weight.dim() == 2


def _strides(x: Tensor) -> tuple[int, int]:
    """Of tokens and heads."""
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def _forward(
    x: Tensor, f: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    tokens, heads, size, per_head = _sizes(x, weight)
    s = None if f is None else _like(x)
    y, stats = _like(x), _statistics(x, center)
    if y.numel():
        chosen = launch(size)
        grid = (cdiv(tokens if per_head else tokens * heads, chosen["ROWS"]), heads if per_head else 1)
        rounded = weight is not None and not (offset or center)
        forward_kernel[grid](
            x, f, weight, bias, s, y, stats, *_strides(x), 0 if f is None else f.stride(0), tokens, eps, offset,
            size, heads, per_head, center, rounded, **chosen,
        )  # fmt: skip
    return s, y, stats


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _statistics(x: Tensor, center: bool) -> Tensor:
    return torch.empty((1 + center, *x.shape[:-1]), dtype=torch.float32, device=x.device)


@torch.library.custom_op("megatron_llm::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool) -> tuple[Tensor, Tensor]:
    """(y, statistics [1 or 2, T, ...] in float32: rstd, and of LayerNorm the mean) of x [T, D] or [T, N, D].

    The last dim is contiguous in all. weight: [D], or [N, D] of heads that have one each; bias: as the weight. center: LayerNorm.
    """
    _, y, stats = _forward(x, None, weight, bias, eps, offset, center)
    return y, stats


@norm.register_fake
def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool
) -> tuple[Tensor, Tensor]:
    return _like(x), _statistics(x, center)


@torch.library.custom_op("megatron_llm::add_norm", mutates_args=())
def add_norm(
    x: Tensor, f: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(s = x + f, and of s what `norm` gives) of x and f [T, D]."""
    s, y, stats = _forward(x, f, weight, bias, eps, offset, center)
    assert s is not None
    return s, y, stats


@add_norm.register_fake
def _fake_add(
    x: Tensor, f: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _statistics(x, center)


@torch.library.custom_op("megatron_llm::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, dres: Tensor | None, offset: float, sums: int
) -> tuple[Tensor, Tensor]:
    """(dx, contiguous; the sums over tokens [sums, 1 or N, D] in float32: dw, db).

    x: what was normalized; dres: its gradient from elsewhere, if x is [T, D]. sums: how many are wanted. The last dim is
    contiguous in all.
    """
    tokens, heads, size, per_head = _sizes(x, weight)
    groups, chosen = heads if per_head else 1, launch_backward(size)
    blocks = cdiv(tokens if per_head else tokens * heads, chosen["ROWS"])
    programs = min(blocks, cdiv(stream_multiprocessors(x), groups))
    summed = min(sums, 1) if chosen["WIDE"] else sums
    dx = _like(x)
    partial = torch.empty((programs, summed, groups, size), dtype=torch.float32, device=x.device)
    if dx.numel():
        backward_kernel[programs, groups](
            dy, x, stats, weight, dres, dx, partial if sums else None, *_strides(dy), *_strides(x),
            0 if dres is None else dres.stride(0), tokens, blocks, offset,
            size, heads, per_head, len(stats) == 2, summed == 2, **chosen,
        )  # fmt: skip
    total = partial.sum(0)
    if summed < sums:  # registers do not hold both of such rows: dy is read once more
        total = torch.cat((total, dy.sum(0, dtype=torch.float32).view_as(total)))
    return dx, total


@norm_backward.register_fake
def _fake_backward(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, dres: Tensor | None, offset: float, sums: int
) -> tuple[Tensor, Tensor]:
    _, heads, size, per_head = _sizes(x, weight)
    return _like(x), torch.empty((sums, heads if per_head else 1, size), dtype=torch.float32, device=x.device)


def gradients(
    dy: Tensor | None,
    dres: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    offset: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x (and of f alike), and in float32 of the weight and the bias if `wanted`; x, stats: as the operators gave them."""
    if dy is None:
        return dres, None, None
    dy, dres = rows(dy), None if dres is None else rows(dres)
    dx, sums = norm_backward(dy, x, stats, weight, dres, offset, 2 if wanted[1] else int(wanted[0]))
    vectors = [None if weight is None else total.view(weight.shape) for total in sums]
    return dx, vectors[0] if wanted[0] else None, vectors[1] if wanted[1] else None


def rows(x: Tensor) -> Tensor:
    """x as operators take it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *added, weight, _, _, ctx.offset, _ = inputs
    ctx.save_for_backward(output[0] if added else x, output[-1], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    """given: gradients of y and of the statistics (which have none), before them of s if there was an addition."""
    x, stats, weight = ctx.saved_tensors
    *dres, dy, _ = given
    wanted = ctx.needs_input_grad[len(dres) + 1 : len(dres) + 3]
    dx, *vectors = gradients(dy, dres[0] if dres else None, x, stats, weight, ctx.offset, wanted)
    return *(dx for _ in (0, *dres)), *(v if v is None else v.to(weight.dtype) for v in vectors), None, None, None


norm.register_autograd(_backward, setup_context=_save)
add_norm.register_autograd(_backward, setup_context=_save)
