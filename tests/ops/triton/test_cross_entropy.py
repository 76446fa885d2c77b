"""Statistics and gradients of logits in Triton against torch's cross-entropy in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_llm.ops.cross_entropy import Extra, Penalties, local_statistics, logits_gradient_
from megatron_llm.ops.triton.cross_entropy import backward_block, forward_block, gradient_, statistics
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.head import Head, linear_objective, linear_scores
from megatron_llm.parallel.loss import VocabularySlice
from tests.ops.triton.common import DEVICE, assert_near, randn

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (5, 7), (3, 513), (4, 4096), (2, 8200)]  # 4096: a full block of float32 twice, of bfloat16 once


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


def _assert_statistics(logits: Tensor, labels: Tensor, width: int, extra: Extra = "", cap: float | None = None) -> None:
    found = local_statistics(logits, labels, width, extra, cap, "triton")
    assert found.dtype is torch.float32 and found.shape == (len(logits), 4 if extra else 3)
    z = _capped(logits[:, :width].double(), cap)
    inside = (labels >= 0) & (labels < width)
    target = z.gather(1, labels.clamp(0, width - 1)[:, None])[:, 0].masked_fill(~inside, 0.0)
    assert_near(found[:, 0], z.amax(1))
    assert_near(found[:, 1], (z - z.amax(1, keepdim=True)).exp().sum(1))
    assert_near(found[:, 2], target)
    if extra == "sum":
        assert (found[:, 3] - z.sum(1)).abs().max() <= 1e-6 * z.abs().sum(1).max()
    elif extra == "best":
        reference = local_statistics(logits, labels, width, extra, cap)
        assert torch.equal(found[:, 3], reference[:, 3])


def _labels(tokens: int, width: int) -> Tensor:
    """Some of them are in slices of other ranks, before and behind, and one is ignored."""
    labels = torch.randint(0, width, (tokens,), generator=torch.Generator().manual_seed(5))
    for place, label in ((1, -1), (2, width), (3, -100)):
        labels[place : place + 1] = label
    return labels.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("extra", ["", "sum", "best"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape: tuple[int, int], extra: Extra, cap: float | None, dtype: torch.dtype) -> None:
    tokens, vocabulary = shape
    logits = randn(tokens, vocabulary, dtype=dtype, scale=4.0)
    _assert_statistics(logits, _labels(tokens, vocabulary), vocabulary, extra, cap)
    if vocabulary > 5:
        _assert_statistics(logits, _labels(tokens, vocabulary - 5), vocabulary - 5, extra, cap)


def _assert_gradient(
    logits: Tensor, labels: Tensor, width: int, penalties: Penalties = Penalties(), cap: float | None = None
) -> None:
    """As if the slice were all there is, for labels in it; of the others the label's term is on other ranks."""
    scale = randn(len(logits), seed=3)
    scale[::3] = 0.0
    leaf = logits[:, :width].double().requires_grad_()
    z = _capped(leaf, cap)
    lse = z.logsumexp(1)
    inside = (labels >= 0) & (labels < width)
    target = z.gather(1, labels.clamp(0, width - 1)[:, None])[:, 0] * inside
    loss = lse - (1 - penalties.smoothing) * target - penalties.smoothing * z.sum(1) / penalties.vocabulary
    ((loss + penalties.z_loss * lse.square()) * scale.double()).sum().backward()
    assert leaf.grad is not None
    made = logits.clone() if logits.is_contiguous() else logits
    logits_gradient_(made, labels, lse.detach().float(), scale, penalties, width, cap, "triton")
    assert_near(made[:, :width], leaf.grad)
    assert not made[:, width:].any() and not made[::3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("penalties", [Penalties(), Penalties(20_000, 0.1, 1e-2)], ids=["plain", "penalties"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape: tuple[int, int], penalties: Penalties, cap: float | None, dtype: torch.dtype) -> None:
    tokens, vocabulary = shape
    logits = randn(tokens, vocabulary, dtype=dtype, scale=4.0)
    _assert_gradient(logits, _labels(tokens, vocabulary), vocabulary, penalties, cap)
    if vocabulary > 5:
        _assert_gradient(logits, _labels(tokens, vocabulary - 5), vocabulary - 5, penalties, cap)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero(offset: float) -> None:
    """lse is float32, so there the gradient is known to 2^-11 only; it is that of the lse that was given."""
    logits, labels, ones = randn(4, 700) + offset, _labels(4, 700), torch.ones(4, device=DEVICE)
    _assert_statistics(logits, labels, 700)
    _assert_statistics(randn(4, 700, scale=1e4), labels, 700)
    lse, expected = logits.double().logsumexp(1).float(), logits.double()
    logits_gradient_(expected, labels, lse.double(), ones.double())
    logits_gradient_(logits, labels, lse, ones, kernel="triton")
    assert_near(logits, expected)


def test_padding_is_not_looked_at() -> None:
    """Whatever is in it: the product with weights that nobody set."""
    logits = randn(4, 40, dtype=torch.bfloat16)
    for value in (-torch.inf, torch.inf, torch.nan):
        logits[:, 30:] = value
        _assert_statistics(logits, _labels(4, 30), 30, "best")
        _assert_gradient(logits, _labels(4, 30), 30)


def test_logits_of_minus_infinity() -> None:
    """Some of a row, a whole block of it, and a whole row, which then has nothing to add."""
    logits = randn(4, 9000)
    logits[0, ::2] = logits[1, :8192] = logits[2] = -torch.inf
    labels = torch.tensor([1, 8192, 3, 4], device=DEVICE)
    found = local_statistics(logits, labels, extra="best", kernel="triton")
    expected = local_statistics(logits, labels, extra="best")
    assert torch.equal(found[:, 0], expected[:, 0]) and torch.equal(found[:, 2:], expected[:, 2:])
    assert found[2, :2].tolist() == [-torch.inf, 0.0]
    torch.testing.assert_close(found[[0, 1, 3], 1], expected[[0, 1, 3], 1])


def test_what_is_no_number_stays_none() -> None:
    """So that a step whose logits are broken is seen to be."""
    logits = randn(3, 50)
    logits[0, 3] = torch.nan
    logits[1, 4] = torch.inf
    assert local_statistics(logits, _labels(3, 50), kernel="triton")[:, 1].isnan().tolist() == [True, True, False]


def test_the_best_is_the_first_of_several() -> None:
    logits = randn(64, 600).round()
    logits[0] = 1.0
    found = local_statistics(logits, torch.zeros(64, dtype=torch.int64, device=DEVICE), extra="best", kernel="triton")
    assert found[:, 3].tolist() == logits.argmax(1).tolist()


def test_an_empty_slice_and_no_tokens() -> None:
    labels = torch.tensor([0, -1, 5], device=DEVICE)
    for extra in ("sum", "best"):
        found = local_statistics(randn(3, 4), labels, 0, extra, kernel="triton")  # type: ignore[arg-type]
        assert found.tolist() == [[-torch.inf, 0.0, 0.0, 0.0]] * 3
    made = randn(3, 4)
    logits_gradient_(made, labels, torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE), width=0, kernel="triton")
    assert not made.any()
    none = randn(0, 4)
    assert local_statistics(none, labels[:0], kernel="triton").shape == (0, 3)
    logits_gradient_(none, labels[:0], none[:, 0], none[:, 0], kernel="triton")


def test_rows_that_are_not_neighbours() -> None:
    logits = randn(9, 80, dtype=torch.bfloat16)[1::2, 3:58]
    labels, untouched = _labels(8, 50)[::2], logits.clone()
    _assert_statistics(logits, labels, 50, "sum")
    assert torch.equal(logits, untouched)
    _assert_gradient(logits, labels, 50)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is not there")
def test_more_than_two_to_the_31_elements(tmp_path: Path) -> None:
    """The rows are 2^31 elements apart: one that was counted in 32 bits would lie elsewhere. Nobody touches what is between."""
    stride, tokens, width = (1 << 31) + 48, 3, 40
    pages = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + width, dtype=torch.bfloat16)
    logits = pages.as_strided((tokens, width), (stride, 1))
    logits.copy_(randn(tokens, width, dtype=torch.bfloat16))
    labels = torch.tensor([3, 39, 0])
    _assert_statistics(logits, labels, width, "best")
    expected = logits.clone()
    arguments = labels, expected.double().logsumexp(1).float(), torch.ones(tokens)
    logits_gradient_(expected, *arguments)
    logits_gradient_(logits, *arguments, kernel="triton")
    torch.testing.assert_close(logits.clone(), expected)


def test_operators() -> None:
    logits, labels = randn(3, 20), _labels(3, 18)
    for extra, cap in (("", 0.0), ("sum", 3.0), ("best", 0.0)):
        torch.library.opcheck(statistics, (logits, labels, 18, extra, cap))
    torch.library.opcheck(gradient_, (logits, labels, randn(3), randn(3, seed=1), 18, 0.1, 0.01, 0.1, 3.0))


def test_blocks_are_of_16_bytes_a_load_and_fit_the_slice() -> None:
    assert forward_block(128256, 2) == (4096, 8) and forward_block(128256, 4) == (2048, 4)
    assert forward_block(1, 2) == (256, 8) and backward_block(1, 4) == 128 and backward_block(128256, 2) == 4096


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [32, 45])
def test_the_head_is_that_of_torch(vocabulary: int, dtype: torch.dtype) -> None:
    """All of the head with its loss; of 45 ids rows of logits begin at multiples of 16 elements none the less."""
    x, w, b = randn(11, 8, dtype=dtype), randn(vocabulary, 8, dtype=dtype, seed=1), randn(vocabulary, dtype=dtype, seed=2)
    labels, weights = _labels(11, vocabulary - 3), randn(11, seed=4).abs()
    labels[labels == vocabulary - 3] = 0
    weights[labels < 0] = 0.0
    found, scored = [], []
    for kernel in ("torch", "triton"):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, w, b)]
        head = Head(leaves[1], leaves[2], VocabularySlice(0, vocabulary - 3, Axis("none"), 8.0, kernel), False)
        objective, _ = linear_objective(leaves[0], head, labels, weights, Penalties(vocabulary - 3, 0.1, 0.01))
        objective.backward()
        found.append([objective.detach(), *(leaf.grad for leaf in leaves)])
        scored.append(linear_scores(x, head, labels))
    tolerance = {"rtol": 2e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(scored[0][0], scored[1][0], rtol=1e-2, atol=1e-2)
    assert torch.equal(scored[0][1], scored[1][1])


def test_the_reference_is_torchs_cross_entropy() -> None:
    """What everything here is compared with, on one rank and without penalties."""
    logits = randn(5, 9).double().requires_grad_()
    labels = torch.arange(5, device=DEVICE)
    expected = functional.cross_entropy(logits, labels, reduction="none")
    maximum, total, target = local_statistics(logits.detach(), labels).unbind(1)
    torch.testing.assert_close(total.log() + maximum - target, expected.detach(), rtol=1e-13, atol=1e-13)
