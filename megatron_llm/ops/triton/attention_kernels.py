"""The kernels of `ops/triton/attention.py`: FlashAttention-2 (Dao 2023) over packed documents, forward and backward.

    x_ij = bias_ij + cap tanh(scale q_i k_j / cap)        or scale q_i k_j without a soft cap
    P = softmax(x) over the keys that a query sees,  O = P V
    delta_i = sum_d dO_id O_id,  dS = P (dO V^T - delta) (1 - tanh^2)
    dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K

A program has one tile of rows of one document, (document, block) pairs made on the host: queries in `forward_kernel` and
`dq_kernel`, keys in `dkdv_kernel`, which goes through all query heads of its key head and so needs no atomics. It walks over
blocks of the other side. Only those at the edge of what is seen pay for a mask: queries have three loops, masked, unmasked,
masked; keys have one, in which the mask is a branch, because copies of its body cost registers (spills at D = 128 with three
loops), and it goes on through the heads, so that loads never stop. P is made again in both backward kernels from lse_i = log2
sum_j 2^(x_ij log2 e), which forward keeps as [N, T].

Rows past the end of a document are read as zeros and not written. Queries past the end see what a longer document would show
them; keys past the end are hidden by causality, as no query that is written comes after them.

A tile is five int32: first query token, queries of the document, first key token, keys of the document, first row of the tile in
the document. Queries are the last positions of the keys. Exponentials are powers of two, with log2(e) in the factors of scores.

M: rows of queries in a block, N: of keys. D: head dimension, DP: padded to a power of two. GROUP: query heads of a key head.
"""

from __future__ import annotations

import triton
import triton.language as tl

PER_BATCH = {"do_not_specialize": ["T"], "do_not_specialize_on_alignment": ["TILES"]}
"""What differs between micro-batches gets no kernels of its own: one that is loaded in the middle of a run may wait for the
GPU to come to rest, which a pipeline rank with receives under way does not do.
"""


@triton.jit
def _tile(TILES, at):
    """(first query token, queries, first key token, keys, first row): those of tile `at`."""
    T = TILES + at * 5
    return tl.load(T).to(tl.int64), tl.load(T + 1), tl.load(T + 2).to(tl.int64), tl.load(T + 3), tl.load(T + 4)


@triton.jit
def _read(X, rows, stride, count, D: tl.constexpr, DP: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, DP] of a document whose first row is at X; zeros past its `count` rows (all there are if WHOLE) and past D."""
    d = tl.arange(0, DP)
    at = X + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE and D == DP:
        x = tl.load(at)
    elif WHOLE:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    elif D == DP:
        x = tl.load(at, mask=(rows < count)[:, None], other=0.0)
    else:
        x = tl.load(at, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0)
    return x


@triton.jit
def _write(X, x, rows, stride, count, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    at = X + rows.to(tl.int64)[:, None] * stride + d[None, :]
    here = (rows < count)[:, None] if D == DP else (rows < count)[:, None] & (d < D)[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=here)


@triton.jit
def _slope(SLOPES, head, COARSE: tl.constexpr):
    """The slope of a head as `_scores` wants it; 0 without ALiBi."""
    slope = 0.0
    if SLOPES is not None:
        slope = tl.load(SLOPES + head).to(tl.float32)
        if COARSE:
            slope = slope.to(tl.bfloat16).to(tl.float32)
        else:
            slope *= 1.4426950408889634
    return slope


@triton.jit
def _scores(products, positions, keys, scale_log2, cap_scale, cap_log2, slope, CAP: tl.constexpr, ALIBI: tl.constexpr,
            COARSE: tl.constexpr):  # fmt: skip
    """(x log2 e, tanh) of products q k, to whose shape `positions` and `keys` broadcast. Without CAP and ALIBI the products: the
    caller multiplies by scale_log2 where it subtracts the maximum, in one instruction.
    """
    x = products
    t = products
    if CAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(products * cap_scale))  # tanh, of half the exponent
        x = t * cap_log2
    if ALIBI:
        if not CAP:
            x = products * scale_log2
        if COARSE:
            bias = (keys.to(tl.float32).to(tl.bfloat16).to(tl.float32) * slope).to(tl.bfloat16).to(tl.float32)
            x += bias * scale_log2
        else:
            x += (keys.to(tl.float32) - positions.to(tl.float32)) * slope
    return x, t


@triton.jit
def _hide(x, positions, keys, window, WINDOW: tl.constexpr):
    """x, but -inf for keys that the query at a position does not see."""
    seen = keys <= positions
    if WINDOW:
        seen = seen & (positions - keys < window)
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _spans(first, full_first, full_end, STEP: tl.constexpr):
    """(a, b): blocks first:a have some pairs hidden, a:b none, b:end some; a and b are whole STEPs after first, or past end."""
    a = first + tl.cdiv(tl.maximum(full_first - first, 0), STEP) * STEP
    b = a + tl.maximum(full_end - a, 0) // STEP * STEP
    return a, b


@triton.jit
def _keys_seen(row, rows, q_len, k_len, window, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """(first, a, b, end) as of `_spans` of the keys that queries row:row + rows see."""
    position = k_len - q_len + row  # of the first query
    last = k_len - q_len + tl.minimum(row + rows, q_len) - 1
    first = 0
    full_first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
        full_first = last - window + 1
    end = tl.maximum(last + 1, 0)
    a, b = _spans(first, full_first, position + 1, STEP)
    if WINDOW:  # without, the first block starts at 0 and the last whole one ends before the end
        a, b = tl.minimum(a, end), tl.minimum(b, end)
    return first, a, b, end


@triton.jit
def _queries_seeing(row, rows, q_len, k_len, window, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """(first, a, b, end) as of `_spans` of the queries that see keys row:row + rows."""
    shift = k_len - q_len
    last = tl.minimum(row + rows, k_len) - 1
    first = tl.maximum(row - shift, 0)
    end = q_len
    full_end = q_len
    if WINDOW:
        end = tl.minimum(end, last + window - shift)
        full_end = tl.minimum(full_end, row + window - shift)
    a, b = _spans(first, last - shift, full_end, STEP)
    return first, a, b, end


@triton.jit
def _attend(acc, total, top, q, K, V, positions, first, end, k_stride, v_stride, k_len, scale_log2, cap_scale, cap_log2, slope,
            window, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr,
            COARSE: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Online softmax over keys first:end: (unnormalized output, sum, maximum of x log2 e) go on."""
    for j in range(first, end, BLOCK):
        keys = j + tl.arange(0, BLOCK)
        k = _read(K, keys, k_stride, k_len, D, DP, not MASK)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = _read(V, keys, v_stride, k_len, D, DP, not MASK)
        x, _ = _scores(products, positions[:, None], keys[None, :], scale_log2, cap_scale, cap_log2, slope,
                       CAP, ALIBI, COARSE)  # fmt: skip
        if MASK:
            x = _hide(x, positions[:, None], keys[None, :], window, WINDOW)
        factor = 1.0 if CAP or ALIBI else scale_log2
        higher = tl.maximum(top, tl.max(x, 1) * factor)
        less = higher
        if MASK:
            less = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        p = tl.exp2(x * factor - less[:, None])
        fade = tl.exp2(top - less)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = higher
    return acc, total, top


@triton.jit(**PER_BATCH)
def forward_kernel(Q, K, V, OUT, LSE, TILES, SLOPES, q_stride, q_head, k_stride, k_head, v_stride, v_head, T, scale_log2,
                   cap_scale, cap_log2, window, heads, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
                   N: tl.constexpr, CAP: tl.constexpr, COARSE: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Grid: tiles of queries times heads. OUT: [T, heads, D] contiguous; LSE: [heads, T], +inf where a query sees no key."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    q0, q_len, k0, k_len, row = _tile(TILES, pid // heads)
    rows = row + tl.arange(0, M)
    positions = k_len - q_len + rows
    q = _read(Q + q0 * q_stride + head * q_head, rows, q_stride, q_len, D, DP, False)
    K += k0 * k_stride + head // GROUP * k_head
    V += k0 * v_stride + head // GROUP * v_head
    ALIBI: tl.constexpr = SLOPES is not None
    slope = _slope(SLOPES, head, COARSE)
    acc = tl.zeros((M, DP), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    first, a, b, end = _keys_seen(row, M, q_len, k_len, window, WINDOW, N)
    if WINDOW:
        acc, total, top = _attend(acc, total, top, q, K, V, positions, first, a, k_stride, v_stride, k_len, scale_log2, cap_scale,
                                  cap_log2, slope, window, D, DP, N, CAP, ALIBI, COARSE, WINDOW, True)  # fmt: skip
    acc, total, top = _attend(acc, total, top, q, K, V, positions, a, b, k_stride, v_stride, k_len, scale_log2, cap_scale,
                              cap_log2, slope, window, D, DP, N, CAP, ALIBI, COARSE, WINDOW, False)  # fmt: skip
    acc, total, top = _attend(acc, total, top, q, K, V, positions, b, end, k_stride, v_stride, k_len, scale_log2, cap_scale,
                              cap_log2, slope, window, D, DP, N, CAP, ALIBI, COARSE, WINDOW, True)  # fmt: skip
    some = total > 0.0
    _write(OUT + (q0 * heads + head) * D, acc / tl.where(some, total, 1.0)[:, None], rows, heads * D, q_len, D, DP)
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(LSE + head * T + q0 + rows, lse, mask=rows < q_len)


@triton.jit(do_not_specialize=["T"])
def delta_kernel(DO, OUT, DELTA, do_stride, do_head, T, heads, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    """delta = sum over D of dO O, [heads, T]. Grid: (blocks of tokens, heads). OUT: [T, heads, D] contiguous."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    do = _read(DO + head * do_head, rows, do_stride, T, D, DP, False).to(tl.float32)
    o = _read(OUT + head * D, rows, heads * D, T, D, DP, False).to(tl.float32)
    tl.store(DELTA + head * T + rows, tl.sum(do * o, 1), mask=rows < T)


@triton.jit(**PER_BATCH)
def dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, TILES, SLOPES, q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride,
                do_head, T, scale, scale_log2, cap_scale, cap_log2, window, heads, GROUP: tl.constexpr, D: tl.constexpr,
                DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAP: tl.constexpr, COARSE: tl.constexpr,
                WINDOW: tl.constexpr):  # fmt: skip
    """Grid: tiles of keys times key heads. DK, DV: [S, heads // GROUP, D] contiguous; None: not made.
    heads: of queries.
    """
    pid = tl.program_id(0)
    kv_heads = heads // GROUP
    kv_head = (pid % kv_heads).to(tl.int64)
    q0, q_len, k0, k_len, row = _tile(TILES, pid // kv_heads)
    keys = row + tl.arange(0, N)
    k = _read(K + k0 * k_stride + kv_head * k_head, keys, k_stride, k_len, D, DP, False)
    v = _read(V + k0 * v_stride + kv_head * v_head, keys, v_stride, k_len, D, DP, False)
    relative = keys - (k_len - q_len)  # where a query of that position would be
    ALIBI: tl.constexpr = SLOPES is not None
    factor = 1.0 if CAP or ALIBI else scale_log2
    dk = tl.zeros((N, DP), tl.float32)
    dv = tl.zeros((N, DP), tl.float32)
    first, a, b, end = _queries_seeing(row, N, q_len, k_len, window, WINDOW, M)
    blocks = tl.cdiv(tl.maximum(end - first, 0), M)
    for block in range(GROUP * blocks):
        head = kv_head * GROUP + block // blocks
        start = first + block % blocks * M
        rows = start + tl.arange(0, M)
        q = _read(Q + q0 * q_stride + head * q_head, rows, q_stride, q_len, D, DP, False)
        do = _read(DO + q0 * do_stride + head * do_head, rows, do_stride, q_len, D, DP, False)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        lse = tl.load(LSE + head * T + q0 + rows, mask=rows < q_len, other=float("inf"))  # P = 0 past the end
        delta = tl.load(DELTA + head * T + q0 + rows, mask=rows < q_len, other=0.0)
        x, t = _scores(products, rows[None, :], (keys if COARSE else relative)[:, None], scale_log2, cap_scale, cap_log2,
                       _slope(SLOPES, head, COARSE), CAP, ALIBI, COARSE)  # fmt: skip
        if start < a or start >= b:
            x = _hide(x, rows[None, :], relative[:, None], window, WINDOW)
        p = tl.exp2(x * factor - lse[None, :])
        if DV is not None:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        if DK is not None:
            ds = p * (dp - delta[None, :])
            if CAP:
                ds *= 1.0 - t * t
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    at = (k0 * kv_heads + kv_head) * D
    if DK is not None:
        _write(DK + at, dk * scale, keys, kv_heads * D, k_len, D, DP)
    if DV is not None:
        _write(DV + at, dv, keys, kv_heads * D, k_len, D, DP)


@triton.jit
def _add_dq(dq, q, do, lse, delta, K, V, positions, first, end, k_stride, v_stride, k_len, scale_log2, cap_scale, cap_log2,
            slope, window, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr,
            COARSE: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """What keys first:end add to dq."""
    for j in range(first, end, BLOCK):
        keys = j + tl.arange(0, BLOCK)
        k = _read(K, keys, k_stride, k_len, D, DP, not MASK)
        v = _read(V, keys, v_stride, k_len, D, DP, not MASK)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        x, t = _scores(products, positions[:, None], keys[None, :], scale_log2, cap_scale, cap_log2, slope,
                       CAP, ALIBI, COARSE)  # fmt: skip
        if MASK:
            x = _hide(x, positions[:, None], keys[None, :], window, WINDOW)
        factor = 1.0 if CAP or ALIBI else scale_log2
        p = tl.exp2(x * factor - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if CAP:
            ds *= 1.0 - t * t
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(**PER_BATCH)
def dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, TILES, SLOPES, q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride,
              do_head, T, scale, scale_log2, cap_scale, cap_log2, window, heads, GROUP: tl.constexpr, D: tl.constexpr,
              DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAP: tl.constexpr, COARSE: tl.constexpr,
              WINDOW: tl.constexpr):  # fmt: skip
    """Grid: tiles of queries times heads. DQ: [T, heads, D] contiguous."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    q0, q_len, k0, k_len, row = _tile(TILES, pid // heads)
    rows = row + tl.arange(0, M)
    positions = k_len - q_len + rows
    q = _read(Q + q0 * q_stride + head * q_head, rows, q_stride, q_len, D, DP, False)
    do = _read(DO + q0 * do_stride + head * do_head, rows, do_stride, q_len, D, DP, False)
    lse = tl.load(LSE + head * T + q0 + rows, mask=rows < q_len, other=float("inf"))
    delta = tl.load(DELTA + head * T + q0 + rows, mask=rows < q_len, other=0.0)
    K += k0 * k_stride + head // GROUP * k_head
    V += k0 * v_stride + head // GROUP * v_head
    ALIBI: tl.constexpr = SLOPES is not None
    slope = _slope(SLOPES, head, COARSE)
    dq = tl.zeros((M, DP), tl.float32)
    first, a, b, end = _keys_seen(row, M, q_len, k_len, window, WINDOW, N)
    if WINDOW:
        dq = _add_dq(dq, q, do, lse, delta, K, V, positions, first, a, k_stride, v_stride, k_len, scale_log2, cap_scale, cap_log2,
                     slope, window, D, DP, N, CAP, ALIBI, COARSE, WINDOW, True)  # fmt: skip
    dq = _add_dq(dq, q, do, lse, delta, K, V, positions, a, b, k_stride, v_stride, k_len, scale_log2, cap_scale, cap_log2,
                 slope, window, D, DP, N, CAP, ALIBI, COARSE, WINDOW, False)  # fmt: skip
    dq = _add_dq(dq, q, do, lse, delta, K, V, positions, b, end, k_stride, v_stride, k_len, scale_log2, cap_scale, cap_log2,
                 slope, window, D, DP, N, CAP, ALIBI, COARSE, WINDOW, True)  # fmt: skip
    _write(DQ + (q0 * heads + head) * D, dq * scale, rows, heads * D, q_len, D, DP)
