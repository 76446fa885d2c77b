"""Rotary embeddings of all heads of a token, in place forward, and rotated back into one gradient. Called by `ops/rope.py`.

    forward     (a, b) -> (a cos - b sin, b cos + a sin), for the pairs of channels of queries and keys
    backward    the same with -sin, from the gradients of q, k and v into that of the buffer that has them side by side

Bytes an element in 2-byte numbers: forward 4 (read, write) for the rotated channels of the N + K heads, nothing else is touched;
backward 4 for all of N + 2 K heads, since values are copied in the same pass, which autograd would do in one of its own. Besides,
8 bytes a pair and token of the tables, read once for all heads. Nothing is made again, nothing kept.

A program has one token, whose cosines and sines it reads once, and goes over its heads, some KB on their way at a time.

Shape suffixes: T tokens, N query heads, K key/value heads, D head dimension, P rotated pairs, C = (2 K + N) D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    X, Y, x_head, cos, sin, HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Heads of one token: from X, x_head apart, into Y, DIM apart."""
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    both = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    for first in tl.static_range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        x, y = X + head.to(tl.int64) * x_head, Y + head * DIM
        if INTERLEAVED:
            here = (head < HEADS) & (both < 2 * PAIRS)
            a, b = tl.split(tl.reshape(tl.load(x + both, mask=here).to(tl.float32), (BLOCK, BLOCK_PAIRS, 2)))
            turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK, 2 * BLOCK_PAIRS))
            tl.store(y + both, turned.to(Y.dtype.element_ty), mask=here)
        else:
            here = (head < HEADS) & (pair < PAIRS)
            a, b = tl.load(x + pair, mask=here).to(tl.float32), tl.load(x + PAIRS + pair, mask=here).to(tl.float32)
            tl.store(y + pair, (a * cos - b * sin).to(Y.dtype.element_ty), mask=here)
            tl.store(y + PAIRS + pair, (b * cos + a * sin).to(Y.dtype.element_ty), mask=here)


@triton.jit
def _copy(X, Y, x_head, HEADS: tl.constexpr, FROM: tl.constexpr, DIM: tl.constexpr, ELEMENTS: tl.constexpr):
    """The channels of heads of one token behind the first FROM, alike."""
    if FROM < DIM:
        WIDTH: tl.constexpr = triton.next_power_of_2(DIM - FROM)
        BLOCK: tl.constexpr = max(1, ELEMENTS // WIDTH)
        channel = FROM + tl.arange(0, WIDTH)[None, :]
        for first in tl.static_range(0, HEADS, BLOCK):
            head = first + tl.arange(0, BLOCK)[:, None]
            here = (head < HEADS) & (channel < DIM)
            tl.store(Y + head * DIM + channel, tl.load(X + head.to(tl.int64) * x_head + channel, mask=here), mask=here)


@triton.jit
def rotate_kernel(
    Q, K, V, YQ, YK, YV, COS, SIN,
    q_token, q_head, k_token, k_head, v_token, v_head, yq_token, yk_token, table_token,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, COPY: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_COPY: tl.constexpr,
):  # fmt: skip
    """Grid: tokens. Q, K and V, if there are values: [T, heads, D] with given strides, channels side by side.

    YQ, YK, YV: the same with heads D apart, and tokens of YV as those of YK; YQ and YK may be Q and K. COPY: channels that are
    not rotated too, with which there is nothing to do in place.
    """
    token = tl.program_id(0).to(tl.int64)
    Q, K, YQ, YK = Q + token * q_token, K + token * k_token, YQ + token * yq_token, YK + token * yk_token
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    cos = tl.load(COS + token * table_token + pair, mask=pair < PAIRS).to(tl.float32)
    sin = tl.load(SIN + token * table_token + pair, mask=pair < PAIRS).to(tl.float32)
    if BACK:
        sin = -sin
    _rotate(Q, YQ, q_head, cos, sin, QUERIES, DIM, PAIRS, INTERLEAVED, BLOCK_QUERIES, BLOCK_PAIRS)
    _rotate(K, YK, k_head, cos, sin, KEYS, DIM, PAIRS, INTERLEAVED, BLOCK_KEYS, BLOCK_PAIRS)
    if COPY:
        _copy(Q, YQ, q_head, QUERIES, 2 * PAIRS, DIM, BLOCK_COPY)
        _copy(K, YK, k_head, KEYS, 2 * PAIRS, DIM, BLOCK_COPY)
    if V is not None:
        _copy(V + token * v_token, YV + token * yk_token, v_head, KEYS, 0, DIM, BLOCK_COPY)


def launch_options(queries: int, keys: int, dim: int, pairs: int, copy: bool) -> dict[str, int]:
    """Block sizes and warps: up to 4 warps with 32 channels of the queries a thread, 16 at least, which it reads 8 at a time."""
    block_pairs = triton.next_power_of_2(pairs)
    channels = triton.next_power_of_2(dim) if copy else 2 * block_pairs
    warps = min(4, max(1, triton.next_power_of_2(queries) * channels // 1024))
    most, least = (max(1, pairs_of_thread * 32 * warps // block_pairs) for pairs_of_thread in (16, 8))
    return {
        "BLOCK_QUERIES": max(least, min(most, triton.next_power_of_2(queries))),
        "BLOCK_KEYS": max(least, min(most, triton.next_power_of_2(keys))),
        "BLOCK_PAIRS": block_pairs,
        "BLOCK_COPY": 32 * 32 * warps,
        "num_warps": warps,
    }


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, into: tuple[Tensor, Tensor, Tensor | None], cos: Tensor, sin: Tensor,
    interleaved: bool, back: bool, copy: bool,
) -> None:  # fmt: skip
    (tokens, queries, dim), keys, pairs, (yq, yk, yv) = q.shape, k.shape[1], cos.shape[-1], into
    if not tokens:
        return
    rotate_kernel[(tokens,)](
        q, k, v, yq, yk, yv, cos, sin,
        *q.stride()[:2], *k.stride()[:2], *((0, 0) if v is None else v.stride()[:2]), yq.stride(0), yk.stride(0), cos.stride(0),
        queries, keys, dim, pairs, interleaved, back, copy, **launch_options(queries, keys, dim, pairs, copy),
    )  # fmt: skip


@torch.library.custom_op("megatron_llm::rope_", mutates_args=("q", "k"))
def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotates [T, N, D] and [T, K, D] in place; a head's channels and its heads are neighbours. Tables: [T, 1, P], alike."""
    _launch(q, k, None, (q, k, None), cos, sin, interleaved, False, False)


@rope_.register_fake
def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    pass


@torch.library.custom_op("megatron_llm::rope_back", mutates_args=())
def rope_back(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both rotated back, contiguous; the channels of what comes in are neighbours."""
    into = _fake_back(dq, dk, cos, sin, interleaved)
    _launch(dq, dk, None, (*into, None), cos, sin, interleaved, True, True)
    return into


@rope_back.register_fake
def _fake_back(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape)


@torch.library.custom_op("megatron_llm::rope_join", mutates_args=())
def rope_join(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[T, C] with dk rotated back, dv, and dq rotated back side by side; the channels of what comes in are neighbours."""
    joined = _fake_join(dq, dk, dv, cos, sin, interleaved)
    (tokens, keys, dim), queries = dk.shape, dq.shape[1]
    k, v, q = joined.view(tokens, 2 * keys + queries, dim).split([keys, keys, queries], dim=1)
    _launch(dq, dk, dv, (q, k, v), cos, sin, interleaved, True, True)
    return joined


@rope_join.register_fake
def _fake_join(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])
