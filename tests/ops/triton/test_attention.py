"""FlashAttention in Triton against float64: the reference backend of `ops.attention`, itself held to torch's sdpa here."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.attention import Scores, attention
from megatron_llm.ops.scores import alibi_slopes
from megatron_llm.ops.triton import attention as fused
from megatron_llm.ops.triton.attention import Launch, flash_attention, launch, tiles
from megatron_llm.ops.triton.attention_kernels import dkdv_kernel, dq_kernel, forward_kernel
from tests.ops.triton.common import DEVICE, assert_near, randn

PLAIN = Scores()
SMALL = Launch(16, 16, 4, 1)
DOCUMENTS = (0, 33, 40, 40, 41, 64)
"""Longer than two blocks, shorter than one, empty, of one token, and one that ends within a block."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 by 16, so that short documents have many."""
    monkeypatch.setattr(fused, "launch", lambda *_: SMALL)


def _inputs(
    cu_q: Sequence[int], cu_k: Sequence[int], heads: int, groups: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v as views of one buffer where they are of the same tokens, and the gradient of the output."""
    tokens, keys = cu_q[-1], cu_k[-1]
    if tokens == keys:
        q, k, v = randn(tokens, heads + 2 * groups, head_dim, dtype=dtype).split([heads, groups, groups], dim=1)
    else:
        q = randn(tokens, heads, head_dim, dtype=dtype)
        k, v = randn(keys, 2 * groups, head_dim, dtype=dtype, seed=1).chunk(2, dim=1)
    return [q, k, v, randn(tokens, heads, head_dim, dtype=dtype, seed=2)]


def _grads(o: Tensor, inputs: Sequence[Tensor], do: Tensor) -> list[Tensor]:
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def _fused(q: Tensor, k: Tensor, v: Tensor, do: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scores: Scores) -> list[Tensor]:
    """o, dq, dk, dv."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    work = tiles(cu_q, cu_k, q.shape[2], scores.window, q.device)
    scale = q.shape[2] ** -0.5 if scores.scale is None else scores.scale
    o = flash_attention(*inputs, work, scale, scores.softcap, scores.slopes_N, scores.coarse, scores.window)
    return _grads(o, inputs, do)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scores: Scores
) -> tuple[Any, Any]:
    """(o, dq, dk, dv) in float64 from explicit matrices, by the formulas of the kernels' docstring; and what rounding P, dS, o
    and the results to bfloat16 can change in each.

    unit = 2^-8 of a value: P is off by unit P, so o by unit (P |V| + |o|), delta by e = |dO| of that; dV by unit (P^T |dO| +
    |dV|); dS by unit |dS| + P e, as the derivative of the cap is at most 1; dQ and dK by scale times that times |K| or |Q|, and
    by unit of themselves.
    """
    q, k, v, do = (x.detach().double() for x in (q, k, v, do))
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scores.scale is None else scores.scale
    values, errors = ([torch.zeros_like(x) for x in (q, q, k, v)] for _ in range(2))
    unit = 2.0**-8
    for n in range(q.shape[1]):
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            Q, dO, K, V = q[q0:q1, n], do[q0:q1, n], k[k0:k1, n // group], v[k0:k1, n // group]
            keys = torch.arange(k1 - k0, device=q.device)
            positions = keys[len(keys) - len(Q) :, None]
            x, slope = Q @ K.T * scale, torch.ones((), dtype=torch.double)
            if scores.softcap is not None:
                t = torch.tanh(x / scores.softcap)
                x, slope = scores.softcap * t, 1 - t * t
            if scores.slopes_N is not None and scores.coarse:
                x = x + (scores.slopes_N[n].bfloat16() * keys.bfloat16()).double() * scale
            elif scores.slopes_N is not None:
                x = x - scores.slopes_N[n].double() * (positions - keys)
            hidden = (keys > positions) | (positions - keys >= (scores.window or 10**9))
            P = x.masked_fill(hidden, -torch.inf).softmax(-1)
            O = P @ V  # noqa: E741
            dS = P * (dO @ V.T - (dO * O).sum(-1, keepdim=True)) * slope
            here = O, scale * dS @ K, scale * dS.T @ Q, P.T @ dO
            O_error = unit * (P @ V.abs() + O.abs())
            dS_error = unit * dS.abs() + P * (dO.abs() * O_error).sum(-1, keepdim=True)
            error = (
                O_error,
                scale * dS_error @ K.abs() + unit * here[1].abs(),
                scale * dS_error.T @ Q.abs(),
                unit * P.T @ dO.abs(),
            )  # fmt: skip
            for total, parts in ((values, here), (errors, error)):
                for tensor, part, head, rows in zip(
                    total, parts, (n, n, n // group, n // group), (slice(q0, q1), slice(q0, q1), slice(k0, k1), slice(k0, k1)),
                    strict=True,
                ):  # fmt: skip
                    tensor[rows, head] += part
    for i in (2, 3):  # summed over the heads of a group, then rounded
        errors[i] += unit * values[i].abs()
    return values, errors


def _check(inputs: list[Tensor], cu_q: Sequence[int], cu_k: Sequence[int], scores: Scores = PLAIN) -> None:
    """float32 to 1e-5 of the largest; bfloat16 within what its roundings allow, and 6e-3 off in the mean: a rounding is off by
    1.7e-3 there, three are between the arguments and any result, and dP - delta loses some digits.
    """
    values, errors = _dense(*inputs, cu_q, cu_k, scores)
    for actual, value, error in zip(_fused(*inputs, cu_q, cu_k, scores), values, errors, strict=True):
        if actual.dtype is torch.float32:
            assert_near(actual, value)
        elif value.numel():
            off = (actual.double() - value).abs()
            assert (off <= error + 1e-5 * value.abs().max()).all(), (off - error).max()
            assert off.norm() <= 1.5 * 2.0**-8 * value.norm(), off.norm() / value.norm()


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "narrow window": {"window": 2},
    "wide window": {"window": 40},
    "softcap": {"softcap": 3.0},
    "alibi": {"slopes_N": True},
    "coarse": {"slopes_N": True, "coarse": True},
    "window and softcap": {"window": 20, "softcap": 3.0},
    "window, softcap, alibi": {"window": 20, "softcap": 3.0, "slopes_N": True, "scale": 0.3},
    "coarse and window": {"window": 17, "slopes_N": True, "coarse": True},
}


def _scores(heads: int, **features: Any) -> Scores:
    if features.get("slopes_N"):
        features["slopes_N"] = torch.tensor(alibi_slopes(heads), device=DEVICE)
    return Scores(**features)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dtype: torch.dtype) -> None:
    _check(_inputs(DOCUMENTS, DOCUMENTS, 3, 1, 16, dtype), DOCUMENTS, DOCUMENTS, _scores(3, **FEATURES[name]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["plain", "window", "alibi", "coarse and window"])
def test_keys_before_the_queries(name: str) -> None:
    """More keys than queries, as many, no queries (then dk = dv = 0), neither, one query, and 16 that see two blocks."""
    cu_q, cu_k = (0, 5, 11, 11, 11, 12, 28), (0, 40, 46, 53, 53, 87, 119)
    _check(_inputs(cu_q, cu_k, 4, 2, 16), cu_q, cu_k, _scores(4, **FEATURES[name]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    dtype = torch.bfloat16 if head_dim in (80, 128) else torch.float32
    _check(_inputs((0, 1, 20), (0, 1, 20), 2, 1, head_dim, dtype), (0, 1, 20), (0, 1, 20))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("heads, groups", [(6, 2), (5, 5)])
def test_groups_of_heads(heads: int, groups: int) -> None:
    _check(_inputs((0, 18, 21), (0, 18, 21), heads, groups, 16), (0, 18, 21), (0, 18, 21), _scores(heads, slopes_N=True))


@pytest.mark.parametrize(
    "head_dim, dtype", [(128, torch.bfloat16), (64, torch.float32), (256, torch.bfloat16)], ids=["128", "64", "256"]
)
def test_block_sizes_that_are_launched(head_dim: int, dtype: torch.dtype) -> None:
    """256: dk and dv apart."""
    cu = (0, 300, 310)
    _check(_inputs(cu, cu, 2, 1, head_dim, dtype), cu, cu, Scores(window=200))


def test_reference_is_torchs() -> None:
    """The dense oracle, the reference backend, and torch's sdpa of equally long documents in float64."""
    q, k, v, do = (x.double() for x in _inputs((0, 7, 14), (0, 7, 14), 4, 2, 16))
    (o, *_), _ = _dense(q, k, v, do, (0, 7, 14), (0, 7, 14), Scores())
    batched = [x.unflatten(0, (2, 7)).transpose(1, 2) for x in (q, k, v)]
    torchs = functional.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(o, torchs)
    for name in FEATURES:
        inputs = [x.detach().requires_grad_() for x in (q, k[:12], v[:12])]
        cu_q, cu_k = (0, 4, 9), (0, 4, 12)
        scores = _scores(4, **FEATURES[name])
        reference = attention(inputs[0][:9], *inputs[1:], cu_q, cu_k, "reference", scores)
        values, _ = _dense(q[:9], k[:12], v[:12], do[:9], cu_q, cu_k, scores)
        gradients = torch.autograd.grad(reference, inputs, do[:9])
        for right, value in zip((reference, gradients[0][:9], *gradients[1:]), values, strict=True):
            torch.testing.assert_close(right, value, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_of_the_reference() -> None:
    q, k, v, _ = (x.double().requires_grad_() for x in _inputs((0, 3), (0, 4), 2, 1, 8))
    scores = _scores(2, window=3, softcap=2.0, slopes_N=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, (0, 1, 3), (0, 1, 4), "reference", scores), (q, k, v))


@pytest.mark.usefixtures("small")
def test_strides() -> None:
    """Heads before tokens, every other token, keys shared by all heads, and gradients that are broadcast or not contiguous."""
    q, k, v, do = (
        randn(2, 20, 16).transpose(0, 1),
        randn(40, 1, 24, seed=1)[::2, :, 3:19],
        randn(20, 1, 16, seed=2),
        randn(20, 2, 16, seed=3),
    )
    k, v = k.expand(20, 2, 16), v.expand(20, 2, 16)
    for gradient in (
        do,
        do.transpose(1, 2).contiguous().transpose(1, 2),
        torch.ones((), device=DEVICE).expand(20, 2, 16),
        do[:1].expand(20, 2, 16),
    ):
        _check([q, k, v, gradient], (0, 20), (0, 20))


def _sparse(elements: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros of which none is in memory until it is written."""
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


on_host = pytest.mark.skipif(DEVICE.type == "cuda", reason="only on the host is memory free that is not touched")


@on_host
@pytest.mark.usefixtures("small")
def test_rows_further_apart_than_int32_counts() -> None:
    """2^30 elements: within a document, and from one to the next. Offsets that wrap around would read the zeros before."""
    inputs = []
    for x in _inputs((0, 3, 5), (0, 3, 5), 2, 1, 16, torch.bfloat16):
        far = _sparse(2**31 + 4 * 2**30 + 2**10).as_strided(x.shape, (2**30, 16, 1), 2**31)
        inputs.append(far.copy_(x))
    _check(inputs, (0, 3, 5), (0, 3, 5))


@on_host
@pytest.mark.usefixtures("small")
def test_tokens_further_on_than_int32_counts() -> None:
    """A document whose first token is the 2^28th, 2^32 elements from the first: what is read and written, by every kernel."""
    inputs, first, at = _inputs((0, 3), (0, 3), 1, 1, 16, torch.bfloat16), 2**28, 2**32
    buffers = [_sparse(at + 48) for _ in range(8)]
    q, k, v, do, o, dq, dk, dv = buffers
    for x, memory in zip(inputs, buffers, strict=False):
        memory[at:].copy_(x.flatten())
    lse, delta = _sparse(first + 3, torch.float32), _sparse(first + 3, torch.float32)
    (expected_o, *expected), _ = _dense(*inputs, (0, 3), (0, 3), Scores())
    delta[first:] = (expected_o * inputs[3].double()).sum(-1)[:, 0]
    strides = {f"{name}_{what}": 16 for name in "qkv" for what in ("stride", "head")}
    shared = fused._settings(inputs[0], inputs[1], None, 0.25, None, None) | {
        "T": first + 3, "COARSE": False, "M": 16, "N": 16, "TILES": torch.tensor([[first, 3, first, 3, 0]], dtype=torch.int32),
    } | strides  # fmt: skip
    backward = shared | {"scale": 0.25, "do_stride": 16, "do_head": 16}
    forward_kernel[(1,)](q, k, v, o, lse, **shared)
    dkdv_kernel[(1,)](q, k, v, do, lse, delta, dk, dv, **backward)
    dq_kernel[(1,)](q, k, v, do, lse, delta, dq, **backward)
    for memory, value in zip((o, dq, dk, dv), (expected_o, *expected), strict=True):
        torch.testing.assert_close(memory[at:].view(3, 1, 16).double(), value, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("small")
def test_other_documents_are_not_seen() -> None:
    """Not even as 0 * nan."""
    cu = (0, 21, 40, 55)
    q, k, v, do = (x.clone() for x in _inputs(cu, cu, 1, 1, 16))
    clean = _fused(q[21:40], k[21:40], v[21:40], do[21:40], (0, 19), (0, 19), Scores(window=18))
    for x in (q, k, v, do):
        x[:21] = x[40:] = torch.nan
    for one, all_of_them in zip(clean, _fused(q, k, v, do, cu, cu, Scores(window=18)), strict=True):
        assert torch.equal(one, all_of_them[21:40])


@pytest.mark.parametrize("cu_q, cu_k", [((0,), (0,)), ((0, 0), (0, 0)), ((0, 0), (0, 3)), ((0, 2, 2), (0, 2, 5))], ids=str)
def test_no_tokens(cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> None:
    _check(_inputs(cu_q, cu_k, 2, 1, 16), cu_q, cu_k, Scores(window=2))


def test_queries_that_see_nothing_get_zeros() -> None:
    """More queries than keys: the first ones are before all keys."""
    q, k, v, do = _inputs((0, 5), (0, 2), 2, 1, 16)
    o, dq, dk, _ = _fused(q, k, v, do, (0, 5), (0, 2), Scores())
    assert not o[:3].any() and not dq[:3].any()
    assert_near(o[3:], _dense(q[3:], k, v, do[3:], (0, 2), (0, 2), Scores())[0][0])
    assert_near(dk, _dense(q[3:], k, v, do[3:], (0, 2), (0, 2), Scores())[0][2])


def test_tiles_are_sorted_by_work() -> None:
    rows = launch("forward", 90, 128).rows
    made = tiles((0, 2 * rows + 1, 2 * rows + 1, 3 * rows), (0, 2 * rows + 1, 4 * rows, 6 * rows), 128, None, torch.device("cpu"))
    first, queries, _, keys, row = made.forward.T.tolist()
    assert list(zip(first, row, strict=True)) == [(0, 2 * rows), (0, rows), (2 * rows + 1, 0), (0, 0)], made.forward
    assert queries == [2 * rows + 1, 2 * rows + 1, rows - 1, 2 * rows + 1] and keys[2] == 2 * rows


def test_operators() -> None:
    q, k, v, do = _inputs((0, 5), (0, 5), 2, 1, 16)
    work = tiles((0, 5), (0, 5), 16, None, DEVICE)
    slopes = torch.tensor(alibi_slopes(2), device=DEVICE)
    arguments = (work.forward, work.dkdv, work.dq, slopes, 0.25, 5.0, False, 4)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.megatron_llm.flash_attention.default, (*inputs, *arguments))
    o, lse = torch.ops.megatron_llm.flash_attention(q, k, v, *arguments)
    torch.library.opcheck(torch.ops.megatron_llm.flash_attention_backward.default, (do, q, k, v, o, lse, *arguments[1:]))
