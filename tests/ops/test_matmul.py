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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_for_processors_that_emulate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dtype by what the processor has of it: one with bfloat16 only is common."""
    x, name = _integers(4, 4).to(dtype), str(dtype).removeprefix("torch.")
    for other in ("bfloat16", "float16"):
        monkeypatch.setattr(module, f"cpu_has_{other}", lambda other=other: other != name)
    assert widen(x).dtype is torch.float32 and torch.equal(widen(x), x.float())
    for other in ("bfloat16", "float16"):
        monkeypatch.setattr(module, f"cpu_has_{other}", lambda other=other: other == name)
    assert widen(x) is x
    assert widen(x.to("meta")).dtype is dtype


def test_a_float16_product_is_the_exact_one_rounded_once() -> None:
    """Partial sums pass 65,504, the largest float16, and come back."""
    a = torch.cat((torch.full((3, 64), 200.0), torch.full((3, 64), -200.0), torch.ones(3, 1)), dim=1).half()
    b = torch.full((129, 2), 30.0).half()
    assert matmul(a, b).dtype is torch.float16 and torch.equal(matmul(a, b), torch.full((3, 2), 30.0).half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_accumulate_without_a_rounded_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(module, "cpu_has_float16", lambda: False)
    a, b = _integers(5, 64).to(dtype), _integers(64, 6).to(dtype)
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


@pytest.mark.parametrize("arithmetic", [False, True], ids=["widened", "bfloat16 arithmetic"])
@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float32])
def test_a_bfloat16_total_is_rounded_once_a_product(
    operands: torch.dtype, arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once more before the sum: the total is small enough for the product's last bits to matter."""
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: arithmetic)
    a, b = _integers(40, 64), _integers(64, 30)
    product = (a.long() @ b.long()).double()
    total = (-0.9 * product).bfloat16()
    exact = total.double() + product
    assert not torch.equal((total + product.bfloat16()), exact.bfloat16())
    accumulate_matmul(total, a.to(operands), b.to(operands))
    assert total.dtype is torch.bfloat16 and torch.equal(total, exact.bfloat16())


def test_torch_has_the_gemm_that_adds_to_float32() -> None:
    """As far as a machine without a GPU can tell: the arguments, and that the result is the total itself."""
    for dtype in (torch.bfloat16, torch.float16):
        total, a, b = (torch.empty(4, 6, device="meta"), *(torch.empty(*s, dtype=dtype, device="meta") for s in ((4, 5), (5, 6))))
        assert torch.addmm(total, a, b, out_dtype=torch.float32, out=total) is total
        assert (total.shape, total.dtype) == ((4, 6), torch.float32)


def _rounds_the_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.add_((a.float() @ b.float()).to(a.dtype))


def _forgets_the_total(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.copy_(a.float() @ b.float())


def _writes_into_a_copy(total: Tensor, a: Tensor, b: Tensor) -> None:
    total = total + a.float() @ b.float()


def _writes_beside_the_total(total: Tensor, a: Tensor, b: Tensor) -> None:
    assert total._base is not None
    total._base.add_(1.0)
    total.sub_(1.0).add_(a.float() @ b.float())


def _ignores_strides(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.add_(a.t().float() @ b.float())


def _knows_no_such_argument(total: Tensor, a: Tensor, b: Tensor) -> None:
    raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")


def _is_right(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.add_(a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_device_is_tried_before_its_gemm_is_trusted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = module.adds_wide_products.__wrapped__
    assert not tried(torch.device("cpu"), dtype)  # torch has no such kernel there
    wrong = (_forgets_the_total, _writes_into_a_copy, _writes_beside_the_total, _ignores_strides, _knows_no_such_argument)
    for gemm in (*wrong, *([_rounds_the_product] if dtype is torch.bfloat16 else [])):  # the integers fit float16
        monkeypatch.setattr(module, "_add_wide_product", gemm)
        assert not tried(torch.device("cpu"), dtype), gemm
    monkeypatch.setattr(module, "_add_wide_product", _is_right)
    assert tried(torch.device("cpu"), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("in_place", [True, False], ids=["in the GEMM", "after it"])
@pytest.mark.parametrize("total", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float16])
def test_accumulation_on_a_gpu(
    operands: torch.dtype, total: torch.dtype, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_place:
        monkeypatch.setattr(module, "adds_wide_products", lambda device, dtype: False)
    a, b = _integers(64, 40).to(operands).cuda().t(), _integers(64, 30).to(operands).cuda()
    sums = torch.full((41, 30), 3.0, dtype=total, device="cuda")
    accumulate_matmul(sums[1:], a, b)
    exact = 3 + a.double() @ b.double()
    assert torch.equal(sums[1:], exact.to(total)) and (sums[0] == 3).all()
