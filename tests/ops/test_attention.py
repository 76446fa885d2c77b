"""Attention over packed documents: against a plain loop in float64, and documents that never see each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from megatron_llm.ops.attention import attention
from megatron_llm.ops.scores import Scores, alibi_slopes

BACKENDS = ("reference", "sdpa")
PLAIN = Scores()
# (query lengths, key lengths) of the documents
CASES = {
    "one document spans all": ([9], [9]),
    "documents of length 1": ([1, 1, 1], [1, 1, 1]),
    "runs of equal lengths": ([3, 3, 1, 1, 4, 3, 3], [3, 3, 1, 1, 4, 3, 3]),
    "more keys than queries": ([2, 3], [5, 7]),
    "one query each": ([1, 1, 1], [4, 4, 6]),
    "prefill beside decoding": ([5, 1, 1, 2], [5, 8, 1, 4]),
    "empty documents": ([0, 0, 3, 0, 3, 2, 0], [0, 0, 3, 0, 3, 4, 0]),
    "keys without queries": ([0, 2, 0], [3, 4, 2]),
}


def boundaries(lengths: list[int]) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def inputs_of(q_lens: list[int], k_lens: list[int], heads: int, kv_heads: int, dim: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(sum(q_lens), heads, dim), (sum(k_lens), kv_heads, dim), (sum(k_lens), kv_heads, dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def loop(
    q: Tensor, k: Tensor, v: Tensor, q_lens: list[int], k_lens: list[int], settings: Scores = PLAIN
) -> tuple[Tensor, Tensor]:
    """One query and one head at a time: the outputs, and the same weighted means of |v| (to bound roundings)."""
    rows, bounds = [], []
    q_start = k_start = 0
    copies = q.shape[1] // k.shape[1]
    for q_len, k_len in zip(q_lens, k_lens, strict=True):
        for i in range(q_len):
            position = k_len - q_len + i
            first = 0 if settings.window is None else max(0, position + 1 - settings.window)
            seen = slice(k_start + first, k_start + position + 1)
            for head in range(q.shape[1]):
                keys, values = k[seen, head // copies], v[seen, head // copies]
                scores = _scored(keys @ q[q_start + i, head], settings, head, range(first, position + 1), q.shape[2])
                p = torch.softmax(scores, 0)
                rows.append(p @ values)
                bounds.append(p @ values.abs())
        q_start, k_start = q_start + q_len, k_start + k_len
    return torch.stack(rows).view(q.shape), torch.stack(bounds).view(q.shape)


def _scored(products: Tensor, settings: Scores, head: int, keys: range, dim: int) -> Tensor:
    """What the softmax gets for one query, which is at the last of the keys' positions."""
    scale = 1 / math.sqrt(dim) if settings.scale is None else settings.scale
    scores = products * scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    if settings.slopes_N is not None:
        slope = settings.slopes_N[head]
        if settings.coarse:
            bias = [float((slope.bfloat16() * key).bfloat16()) * scale for key in keys]
        else:
            bias = [float(slope) * (key - keys[-1]) for key in keys]
        scores = scores + torch.tensor(bias, dtype=scores.dtype)
    return scores


SLOPES = torch.tensor([0.7, 0.31, 0.05, 0.013], dtype=torch.float64)
SETTINGS = {
    "scale": Scores(scale=0.9),
    "window": Scores(window=3),
    "window of one": Scores(window=1),
    "soft cap": Scores(scale=2.0, softcap=1.5),
    "ALiBi": Scores(slopes_N=SLOPES),
    "coarse ALiBi": Scores(slopes_N=SLOPES, coarse=True),
    "all of them": Scores(0.9, 1.5, SLOPES, False, 2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_scores_are_their_definition(name: str, case: str, backend: str) -> None:
    (q_lens, k_lens), settings = CASES[case], SETTINGS[name]
    inputs = inputs_of(q_lens, k_lens, 4, 2)
    expected, _ = loop(*inputs, q_lens, k_lens, settings)
    dy = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    actual = attention(*inputs, boundaries(q_lens), boundaries(k_lens), backend, settings)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    wanted = torch.autograd.grad(expected, inputs, dy)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, dy), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 71])
@pytest.mark.parametrize("most", [8, 16])
def test_slopes_are_those_of_transformers(heads: int, most: int) -> None:
    """Of MPT, which reorders those of the next power of two, and for the usual maximum also of BLOOM."""
    theirs = -build_mpt_alibi_tensor(heads, 2, most).flatten(1)[:, 0].double()
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads, most), dtype=torch.float64), theirs, rtol=1e-6, atol=0)
    if most == 8:
        bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].double()
        torch.testing.assert_close(bloom, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_its_definition(case: str, heads: int, kv_heads: int, backend: str) -> None:
    q_lens, k_lens = CASES[case]
    inputs = inputs_of(q_lens, k_lens, heads, kv_heads)
    expected, _ = loop(*inputs, q_lens, k_lens)
    dy = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    expected_gradients = torch.autograd.grad(expected, inputs, dy)
    actual = attention(*inputs, boundaries(q_lens), boundaries(k_lens), backend)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, dy), expected_gradients, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend: str) -> None:
    q_lens, k_lens = [3, 1, 2], [3, 4, 3]
    inputs = inputs_of(q_lens, k_lens, 2, 1, 2)
    bounds = boundaries(q_lens), boundaries(k_lens)
    assert gradcheck(lambda q, k, v: attention(q, k, v, *bounds, backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_isolated_and_causal(backend: str) -> None:
    """A key of position j of the middle document moves exactly the outputs of its positions >= j, even when infinite-like."""
    lengths = [4, 5, 3]
    q, k, v = inputs_of(lengths, lengths, 4, 2)
    bounds = boundaries(lengths)
    before = attention(q, k, v, bounds, bounds, backend)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[4 + 2] = 1e3
    changed_v[4 + 2] = -1e6
    after = attention(q, changed_k, changed_v, bounds, bounds, backend)
    moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == [6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_narrow_dtypes_are_within_two_roundings(case: str, backend: str, dtype: torch.dtype) -> None:
    """Relative to the mean of |v| under the same weights: rounding the probabilities, then the result."""
    q_lens, k_lens = CASES[case]
    narrow = [x.detach().to(dtype) for x in inputs_of(q_lens, k_lens, 4, 2, 16)]
    expected, bound = loop(*(x.double() for x in narrow), q_lens, k_lens)
    actual = attention(*narrow, boundaries(q_lens), boundaries(k_lens), backend)
    assert actual.dtype is dtype
    assert ((actual.double() - expected).abs() <= 2.02 * 0.5 * torch.finfo(dtype).eps * bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_scores_and_gradients_may_pass_its_range_inside(backend: str) -> None:
    """q k^T before the root of D is beyond 65,504; the gradient carries a factor that leaves it in range."""
    q, k, v = (x.detach().half() for x in inputs_of([5], [5], 2, 1, 64))
    inputs = [x.requires_grad_() for x in (q * 300, k * 300, v)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = loop(*wide, [5], [5])
    assert (torch.einsum("tnd,skd->ns", wide[0], wide[1])).abs().max() > 65_504
    actual = attention(*inputs, (0, 5), (0, 5), backend)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)
    dy = torch.full_like(actual, 2_000.0)
    for ours, exact in zip(
        torch.autograd.grad(actual, inputs, dy), torch.autograd.grad(expected, wide, dy.double()), strict=True
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=5e-3 * exact.abs().max().item() + 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [(0,), (0, 0), (0, 0, 0)])
def test_no_tokens(bounds: tuple[int, ...], backend: str) -> None:
    q, k, v = inputs_of([0], [0], 4, 2)
    out = attention(q, k, v, bounds, bounds, backend)
    out.sum().backward()
    assert out.shape == q.shape == (0, 4, 6) and q.grad is not None and q.grad.shape == q.shape
