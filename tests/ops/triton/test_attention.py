"""FlashAttention in Triton against float64: the reference backend of `ops.attention`, itself held to torch's sdpa here."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.attention import Scores, alibi_slopes, attention
from megatron_llm.ops.triton import attention as fused
from megatron_llm.ops.triton.attention import Launch, Tiles, flash_attention, launch, tiles
from tests.ops.triton.common import DEVICE, assert_near, randn

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


def _expected(q: Tensor, k: Tensor, v: Tensor, do: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scores: Scores) -> list[Tensor]:
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    return _grads(attention(*inputs, cu_q, cu_k, "reference", scores), inputs, do.double())


def _check(inputs: list[Tensor], cu_q: Sequence[int], cu_k: Sequence[int], scores: Scores = Scores()) -> None:
    """To 1e-5 in float32. In bfloat16 o is float32's rounded, of P that was rounded: two roundings of an element and one of what it is a sum
    of. Gradients: P and dS are rounded, which are factors of all terms; see `_allowed`.
    """
    actual, expected = _fused(*inputs, cu_q, cu_k, scores), _expected(*inputs, cu_q, cu_k, scores)
    for value, right in zip(actual, expected, strict=True):
        assert_near(value, right)


FEATURES = {
    "plain": {},
    "window": {"window": 9},
    "wide window": {"window": 40},
    "softcap": {"softcap": 3.0},
    "alibi": {"slopes_N": True},
    "coarse": {"slopes_N": True, "coarse": True},
    "window and softcap": {"window": 20, "softcap": 3.0},
    "window, softcap, alibi": {"window": 20, "softcap": 3.0, "slopes_N": True, "scale": 0.3},
    "coarse, softcap": {"softcap": 3.0, "slopes_N": True, "coarse": True},
}


def _scores(heads: int, **features: Any) -> Scores:
    if features.get("slopes_N"):
        features["slopes_N"] = torch.tensor(alibi_slopes(heads), device=DEVICE)
    return Scores(**features)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    _check(_inputs(DOCUMENTS, DOCUMENTS, 3, 1, 16), DOCUMENTS, DOCUMENTS, _scores(3, **FEATURES[name]))
