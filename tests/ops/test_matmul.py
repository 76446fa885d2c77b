"""Products of narrow operands are accumulated wide and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_llm.ops import matmul as module
from megatron_llm.ops.matmul import accumulate_matmul, matmul, widen


def _integers(*shape: int) -> Tensor:
    """bfloat16 integers up to 200: products and sums of 64 of them are exact in float32, in whatever order."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randint(-200, 201, shape, generator=generator).bfloat16()


def test_bfloat16_product_is_the_exact_one_rounded_once() -> None:
    a, b = _integers(17, 64), _integers(64, 9)
    exact = a.long() @ b.long()
    assert (exact.abs() > 2**16).any()  # far beyond bfloat16's 8 bits: a narrow partial sum would be visible
    product = matmul(a, b)
    assert product.dtype is torch.bfloat16 and torch.equal(product, exact.double().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_operands_are_not_touched(dtype: torch.dtype) -> None:
    a = torch.randn(3, 4, dtype=dtype)
    assert widen(a) is a
    assert torch.equal(matmul(a, a.t()), a @ a.t())


def test_widening_is_for_processors_that_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _integers(4, 4)
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: False)
    assert widen(x).dtype is torch.float32 and torch.equal(widen(x), x.float())
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: True)
    assert widen(x) is x


def test_gradients_accumulate_without_a_rounded_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: False)
    a, b = _integers(5, 64), _integers(64, 6)
    total = torch.full((5, 6), 3.0)
    view = total[1:]
    accumulate_matmul(view, a[1:], b)
    accumulate_matmul(view, a[1:], b)
    exact = 3 + 2 * (a[1:].long() @ b.long())
    assert torch.equal(total[0], torch.full((6,), 3.0)) and torch.equal(view, exact.float())
    assert not torch.equal(exact.float(), exact.bfloat16().float())


@pytest.mark.parametrize(("operands", "total"), [(torch.float32, torch.float64), (torch.float64, torch.float64)])
def test_accumulation_keeps_the_dtype_of_the_total(operands: torch.dtype, total: torch.dtype) -> None:
    a, b = _integers(2, 8).to(operands), _integers(8, 3).to(operands)
    sums = torch.ones(2, 3, dtype=total)
    accumulate_matmul(sums, a, b)
    assert sums.dtype is total and torch.equal(sums, 1 + (a.double() @ b.double()).to(total))
