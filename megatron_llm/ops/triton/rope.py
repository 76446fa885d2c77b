"""Rotary embeddings of all heads of a token, in place forward, and rotated back into one gradient. Called by `ops/rope.py`.

    forward     (a, b) -> (a cos - b sin, b cos + a sin), for the pairs of channels of queries and keys
    backward    the same with -sin, from the gradients of q, k and v into that of the buffer that has them side by side

Bytes an element in 2-byte numbers: forward 4 (read, write) for the rotated channels of the N + K heads, nothing else is touched;
backward 4 for all of N + 2 K heads, and the values are copied in the same pass, which autograd would do in one of its own. Besides, 8
bytes a pair and token of the tables, read once for all heads that a program has. Nothing is made again, nothing kept.

A program has one token and a tile of heads by pairs of channels: with 40 heads of 128 some 10 KB on their way at once.

Shape suffixes: T tokens, N query heads, K key/value heads, D head dimension, P rotated pairs, C = (2 K + N) D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_llm.ops.triton import cdiv

ELEMENTS = 8192
"""At most in a tile of heads by channels."""


@triton.jit
def rotate_kernel(
    Q, K, V, YQ, YK, YV, COS, SIN,
    q_token, q_head, k_token, k_head, v_token, v_head, yq_token, yk_token, table_token,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, COPY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, blocks of heads). Heads are counted as keys, values if there are any (VALUES is KEYS or 0), queries.

    Q, K, V: [T, heads, D] with given strides; YQ, YK, YV the same with heads D apart, tokens of YV as those of YK; they may be Q
    and K themselves. COPY: channels that are not rotated are copied too.
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    there = (head < QUERIES + KEYS + VALUES)[:, None]
    x = tl.where(
        head < KEYS, K + token * k_token + head * k_head, Q + token * q_token + (head - KEYS - VALUES) * q_head
    )
    y = tl.where(
        head < KEYS, YK + token * yk_token + head * DIM, YQ + token * yq_token + (head - KEYS - VALUES) * DIM
    )
    value = (head >= KEYS) & (head < KEYS + VALUES)
    if VALUES:
        x = tl.where(value, V + token * v_token + (head - KEYS) * v_head, x)
        y = tl.where(value, YV + token * yk_token + (head - KEYS) * DIM, y)

    pair = tl.arange(0, BLOCK_PAIRS)
    cos = tl.load(COS + token * table_token + pair, mask=pair < PAIRS, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + token * table_token + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        here = there & (channel < 2 * PAIRS)
        both = tl.load(x[:, None] + channel, mask=here, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (BLOCK_HEADS, BLOCK_PAIRS, 2)))
    else:
        here = there & (pair < PAIRS)[None, :]
        a = tl.load(x[:, None] + pair[None, :], mask=here, other=0.0).to(tl.float32)
        b = tl.load(x[:, None] + PAIRS + pair[None, :], mask=here, other=0.0).to(tl.float32)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if VALUES:
        turned_a, turned_b = tl.where(value[:, None], a, turned_a), tl.where(value[:, None], b, turned_b)
    if INTERLEAVED:
        both = tl.reshape(tl.join(turned_a, turned_b), (BLOCK_HEADS, 2 * BLOCK_PAIRS))
        tl.store(y[:, None] + channel, both.to(YQ.dtype.element_ty), mask=here)
    else:
        tl.store(y[:, None] + pair[None, :], turned_a.to(YQ.dtype.element_ty), mask=here)
        tl.store(y[:, None] + PAIRS + pair[None, :], turned_b.to(YQ.dtype.element_ty), mask=here)
    if COPY and 2 * PAIRS < DIM:
        rest = (2 * PAIRS + tl.arange(0, BLOCK_REST))[None, :]
        tl.store(y[:, None] + rest, tl.load(x[:, None] + rest, mask=there & (rest < DIM)), mask=there & (rest < DIM))


def shape_of_launch(heads: int, dim: int, pairs: int) -> tuple[int, dict[str, int]]:
    """(programs for a token, block sizes and warps): as few programs as tiles of `ELEMENTS` allow, 16 pairs a thread or 8."""
    blocks = cdiv(heads, max(1, ELEMENTS // triton.next_power_of_2(dim)))
    block_heads = triton.next_power_of_2(cdiv(heads, blocks))
    block_pairs = triton.next_power_of_2(pairs)
    sizes = {
        "BLOCK_HEADS": block_heads,
        "BLOCK_PAIRS": block_pairs,
        "BLOCK_REST": triton.next_power_of_2(max(1, dim - 2 * pairs)),
        "num_warps": min(8, max(1, block_heads * block_pairs // 512)),
    }
    return cdiv(heads, block_heads), sizes


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, into: tuple[Tensor, Tensor, Tensor | None], cos: Tensor, sin: Tensor,
    interleaved: bool, back: bool, copy: bool,
) -> None:  # fmt: skip
    (tokens, queries, dim), keys, pairs = q.shape, k.shape[1], cos.shape[-1]
    values = 0 if v is None else keys
    programs, sizes = shape_of_launch(queries + keys + values, dim, pairs)
    if not tokens:
        return
    (v_token, v_head), (yq, yk, yv) = (0, 0) if v is None else v.stride()[:2], into
    rotate_kernel[(tokens, programs)](
        q, k, v, yq, yk, yv, cos, sin,
        *q.stride()[:2], *k.stride()[:2], v_token, v_head, yq.stride(0), yk.stride(0), cos.stride(0),
        queries, keys, values, dim, pairs, interleaved, back, copy, **sizes,
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
