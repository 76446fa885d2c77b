"""Rows in 8 bits made in Triton: bit for bit those of `ops/fp8.py`, which has tests against float64."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.fp8 import product, quantize
from megatron_llm.ops.triton.fp8 import quantize as fused
from tests.ops.triton.common import DEVICE, randn


def _assert_same(x: Tensor) -> None:
    (q, inverse), (expected, scales) = quantize(x, "triton"), quantize(x)
    assert q.is_contiguous() and torch.equal(q.view(torch.uint8) & 0x7F, expected.view(torch.uint8) & 0x7F)
    assert torch.equal(q.double(), expected.double()) or q.double().isnan().any()
    assert inverse.shape == scales.shape and torch.equal(inverse.isnan(), scales.isnan())
    assert torch.equal(inverse.nan_to_num(), scales.nan_to_num())


def _heavy(*shape: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over 24 powers of two in every row."""
    powers = torch.randint(-16, 8, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return (randn(*shape) * 2.0**powers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (3, 40), (130, 16), (2, 2048), (1, 4100)], ids=str)
def test_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    _assert_same(_heavy(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(16, 16), (33, 130), (48, 300)], ids=str)
def test_columns(shape: tuple[int, int]) -> None:
    """A weight in dx: blocks of rows and of columns, whole and not."""
    _assert_same(_heavy(*shape, dtype=torch.bfloat16).t())


def test_rows_that_are_not_neighbours() -> None:
    x = _heavy(24, 96, dtype=torch.bfloat16)
    for view in (x[1::3, 5:69], x.t()[3:70:7], x[:, ::2], x[:1].expand(5, 96), x[:, 7:8]):
        _assert_same(view)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, 448.0, 450.0, 1e-38, 3.3e38])
def test_rows_of_extremes(value: float) -> None:
    x = randn(4, 24, dtype=torch.bfloat16)
    x[1], x[2, 3] = value, value
    _assert_same(x)
    _assert_same(x.t())


def test_no_tokens() -> None:
    x, weight = randn(0, 32, dtype=torch.bfloat16), randn(16, 32, dtype=torch.bfloat16)
    assert product(x, weight, kernel="triton").shape == (0, 16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="pages that are never touched are of a CPU")
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_31_bits(transposed: bool) -> None:
    """Rows 2^30 numbers apart: one whose offset wrapped around would be another, or none."""
    rows, size, stride = 4, 16, 2**30 + 8
    memory = mmap.mmap(-1, 2 * (rows * stride))  # pages come when they are written
    storage = torch.frombuffer(memory, dtype=torch.bfloat16)
    x = torch.as_strided(storage, (rows, size), (stride, 1))
    x.copy_(randn(rows, size))
    _assert_same(x.t() if transposed else x)


def test_operator() -> None:
    for x in (randn(5, 32, dtype=torch.bfloat16), randn(32, 5, dtype=torch.bfloat16).t()):
        torch.library.opcheck(fused, (x,))
