"""8-bit products on a GPU that has them: the kernels that make the numbers, the GEMM and its shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.fp8 import fp8_problem, input_gradient, product, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or fp8_problem("cuda") is not None, reason="needs an NVIDIA GPU of compute capability 8.9"
    ),
]

KERNELS = pytest.mark.parametrize("kernel", ["torch", "triton"])


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()


def _wide(x: Tensor) -> Tensor:
    """What the numbers in 8 bits are, as the CPU makes them."""
    values, inverse = quantize(x.cpu())
    return (values.double() * inverse.double()).cuda()


@KERNELS
@pytest.mark.parametrize("transposed", [False, True])
def test_the_numbers_are_those_of_the_cpu(kernel: str, transposed: bool) -> None:
    x = _randn(1000, 752) * 2.0 ** torch.randint(-16, 8, (1000, 752), device="cuda")
    x[3], x[5, 7], x[6, 9] = 0, torch.inf, torch.nan
    x = x.t() if transposed else x
    values, inverse = quantize(x, kernel)
    expected, scales = quantize(x.cpu())
    finite = ~scales.isnan()[:, 0]
    assert torch.equal(inverse.cpu().isnan()[:, 0], ~finite)
    assert torch.equal(inverse.cpu()[finite], scales[finite])
    assert torch.equal(values.cpu()[finite].float(), expected[finite].float())


@KERNELS
@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 100, 4097])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_the_cpus_numbers(tokens: int, with_bias: bool, kernel: str) -> None:
    """Forward Hopper sums in fewer bits (about 14) than float32, whence the wider bound."""
    x, weight, dy = _randn(tokens, 4096, seed=1), _randn(1072, 4096, seed=2), _randn(tokens, 1072, seed=3)
    bias = _randn(1072, seed=4) if with_bias else None
    y = product(x, weight, bias, kernel)
    dx = input_gradient(dy, weight, kernel)
    expected_y = _wide(x) @ _wide(weight).t() + (0 if bias is None else bias.double())
    expected_dx = _wide(dy) @ _wide(weight.t()).t()
    for actual, expected, unit in ((y, expected_y, 2.0**-9), (dx, expected_dx, 2.0**-12)):
        assert actual.shape == expected.shape and actual.dtype is torch.bfloat16
        if tokens:
            allowed = 2.0**-8 * expected.abs() + unit * expected.abs().max()
            assert ((actual.double() - expected).abs() <= allowed).all()


@KERNELS
def test_what_is_not_finite_shows(kernel: str) -> None:
    x, weight = _randn(32, 64), _randn(48, 64, seed=1)
    x[2, 7] = torch.inf
    y = product(x, weight, None, kernel)
    assert y[2].isnan().all() and not y[3:].isnan().any()


def test_products_and_casts_are_faster_than_bfloat16() -> None:
    """A forward and input gradient of a large layer, casts included. No claim is made of small ones."""
    x, weight, dy = _randn(8192, 4096), _randn(14336, 4096, seed=1), _randn(8192, 14336, seed=2)

    def seconds(narrow: bool) -> float:
        def both() -> None:
            if narrow:
                product(x, weight, None, "triton")
                input_gradient(dy, weight, "triton")
            else:
                x @ weight.t()
                dy @ weight

        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            both()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return sorted(times)[6]

    wide, narrow = seconds(False), seconds(True)
    flops = 4 * 8192 * 4096 * 14336
    print(f"bfloat16 {flops / wide / 1e12:.0f} TFLOP/s, 8 bits with casts {flops / narrow / 1e12:.0f} TFLOP/s")
    assert narrow < wide
