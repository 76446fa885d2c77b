"""The statistics of a slice of the vocabulary combine to torch's cross-entropy, and so does the gradient made in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_llm.ops import cross_entropy
from megatron_llm.ops.cross_entropy import Penalties, local_statistics, logits_gradient_

VOCAB = 11
CUTS = {"whole": (0, 11), "halves": (0, 6, 11), "one empty": (0, 4, 8, 11, 11)}


def _logits(tokens: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    return logits.to(dtype), labels


def _combined(logits: Tensor, labels: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(loss, log-sum-exp) of each token from the slices' statistics."""
    slices = [local_statistics(logits[:, a:b], labels - a).unbind(1) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    maxima, totals, targets = (torch.stack(column) for column in zip(*slices, strict=True))
    top = maxima.amax(0)
    log_sum_exp = (totals * (maxima - top).exp()).sum(0).log() + top
    return log_sum_exp - targets.sum(0), log_sum_exp


@pytest.fixture(params=[1 << 20, 13, 1], ids=["one chunk", "a row a chunk", "less than a row"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.usefixtures("chunk")
def test_loss_and_gradient_equal_torch(cuts: str, offset: float) -> None:
    """Also far from zero, where the exponentials alone would overflow or vanish."""
    logits, labels = _logits(7)
    logits = (logits + offset).requires_grad_()
    scale = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, -1.0, 3.0], dtype=torch.float64)
    expected = functional.cross_entropy(logits, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, logits, scale)
    loss, log_sum_exp = _combined(logits.detach(), labels, CUTS[cuts])
    tolerance = 1e-13 * max(1.0, abs(offset))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=tolerance)
    gradient = logits.detach().clone()
    for a, b in zip(CUTS[cuts][:-1], CUTS[cuts][1:], strict=True):
        logits_gradient_(gradient[:, a:b], labels - a, log_sum_exp, scale)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.3), (0.7, 0.01)])
@pytest.mark.usefixtures("chunk")
def test_gradient_with_penalties_equals_torch(cuts: str, smoothing: float, z_loss: float) -> None:
    logits, labels = _logits(7)
    logits.requires_grad_()
    scale = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, -1.0, 3.0], dtype=torch.float64)
    plain = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(plain + z_loss * logits.logsumexp(1).square(), logits, scale)
    gradient, log_sum_exp = logits.detach().clone(), logits.detach().logsumexp(1)
    for a, b in zip(CUTS[cuts][:-1], CUTS[cuts][1:], strict=True):
        logits_gradient_(gradient[:, a:b], labels - a, log_sum_exp, scale, Penalties(VOCAB, smoothing, z_loss))
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("chunk")
def test_sums_of_logits(dtype: torch.dtype) -> None:
    logits, labels = _logits(7, dtype=dtype)
    sums = local_statistics(logits[:, 2:9], labels, extra="sum")[:, 3]
    assert sums.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), logits[:, 2:9].double().sum(1), rtol=1e-6, atol=1e-5)
    assert local_statistics(logits, labels, 0, "sum")[:, 3].tolist() == [0.0] * 7


def test_statistics_leave_the_logits_alone() -> None:
    logits, labels = _logits(5)
    before = logits.clone()
    local_statistics(logits, labels)
    assert torch.equal(logits, before)


def test_empty_slice_contributes_nothing() -> None:
    maximum, total, target = local_statistics(torch.empty(3, 0), torch.tensor([0, -1, 5])).unbind(1)
    assert maximum.tolist() == [-torch.inf] * 3 and total.tolist() == target.tolist() == [0.0] * 3


def test_labels_outside_the_slice_have_no_logit() -> None:
    logits, _ = _logits(4)
    target = local_statistics(logits, torch.tensor([-1, VOCAB, -100, 2]))[:, 2]
    assert target.tolist() == [0.0, 0.0, 0.0, logits[3, 2].item()]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_keep_float32_statistics(dtype: torch.dtype, scale: float) -> None:
    """The loss is exact to float32 although the logits are narrow; their gradient, with a loss scale, is rounded once."""
    logits, labels = _logits(50, dtype=dtype)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad(scale * expected.sum(), exact)
    loss, log_sum_exp = _combined(logits, labels, CUTS["halves"])
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    logits_gradient_(logits, labels, log_sum_exp, torch.full((50,), scale))
    error = (logits.double() - expected_gradient).abs()
    assert (error <= 0.5 * torch.finfo(dtype).eps * expected_gradient.abs() + 1e-6 * scale).all()
