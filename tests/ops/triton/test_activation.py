"""Activations in Triton against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_llm.ops.activation import activation, gated
from megatron_llm.ops.triton.activation import activation as fused
from megatron_llm.ops.triton.activation import activation_backward
from tests.ops.triton.common import DEVICE, assert_near, far_rows, randn

FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
DTYPES = [torch.float32, torch.bfloat16]


def _expected(x: Tensor, dy: Tensor, name: str, is_gated: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().double().requires_grad_()
    gate, up = x.chunk(2, -1) if is_gated else (x, 1.0)
    y = FUNCTIONS[name](gate) * up
    y.backward(dy.double())
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 1), (1, 1500), (5, 1024)], ids=str)
def test_is_torchs_in_float64(name: str, is_gated: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tokens, size = shape
    x = randn(tokens, size * (1 + is_gated), dtype=dtype, scale=3.0).requires_grad_()
    dy = randn(tokens, size, dtype=dtype, seed=1)
    y = (gated if is_gated else activation)(x, name, "triton")
    y.backward(dy)
    expected_y, expected_dx = _expected(x, dy, name, is_gated)
    assert_near(y, expected_y)
    assert x.grad is not None
    assert_near(x.grad, expected_dx)


def test_rows_that_are_not_neighbours() -> None:
    x, dy = randn(7, 2 * 24 + 8)[1::2, 3:51].requires_grad_(), randn(20, 3, seed=1).t()[:, :20]
    wide = randn(3, 40, seed=2)[:, ::2]  # neither is contiguous in its last dim
    for gradient in (dy, wide, torch.ones((), device=DEVICE).expand(3, 20)):
        y = gated(x[:, :40], "silu", "triton")
        (dx,) = torch.autograd.grad(y, x, gradient)
        expected_y, expected_dx = _expected(x[:, :40], gradient, "silu", True)
        assert_near(y, expected_y)
        assert_near(dx[:, :40], expected_dx)


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_number_stays_none(name: str, is_gated: bool) -> None:
    """Forward and backward, so that a step that is broken is seen to be: a GPU's maximum of nan and 0 is 0."""
    x = randn(2, 8 * (1 + is_gated))
    x[0, 3] = torch.nan
    x.requires_grad_()
    y = (gated if is_gated else activation)(x, name, "triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.isnan().nonzero().tolist() == [[0, 3]]
    expected_y, expected_dx = _expected(x, torch.ones_like(y), name, is_gated)
    assert torch.equal(y.isnan(), expected_y.isnan()) and torch.equal(dx.isnan(), expected_dx.isnan())


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
def test_rows_further_apart_than_int32_counts(is_gated: bool) -> None:
    size = 24
    x, dy = far_rows(3, size * (1 + is_gated)), far_rows(3, size)
    x.copy_(randn(*x.shape))
    dy.copy_(randn(*dy.shape, seed=1))
    expected_y, expected_dx = _expected(x.clone(), dy.clone(), "silu", is_gated)
    assert_near((gated if is_gated else activation)(x, "silu", "triton"), expected_y)
    assert_near(activation_backward(dy, x, "silu", is_gated), expected_dx)


def test_no_tokens() -> None:
    x = randn(0, 16).requires_grad_()
    y = gated(x, "silu", "triton")
    y.sum().backward()
    assert y.shape == (0, 8) and x.grad is not None and x.grad.shape == (0, 16)


def test_operators() -> None:
    x, dy = randn(3, 16).requires_grad_(), randn(3, 8)
    torch.library.opcheck(fused, (x, "silu", True))
    torch.library.opcheck(activation_backward, (dy, x.detach(), "silu", True))
