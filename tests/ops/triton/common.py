"""What the tests of all kernels need: a device, random numbers, and what counts as equal to float64."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_UNIT = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What is allowed relative to the largest value of float32; half a unit in the last place of the others."""


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor, roundings: float = 2.0) -> None:
    """`actual` is `expected`, which is float64: to 1e-5 of the largest value, and in a narrow dtype to so many roundings of each
    element besides.
    """
    assert expected.dtype is torch.float64 and actual.shape == expected.shape, (expected.dtype, actual.shape, expected.shape)
    assert not actual.isnan().any()
    if not expected.numel():
        return
    expected = expected.to(actual.device)
    error, largest = (actual.double() - expected).abs(), expected.abs().max()
    allowed = 1e-5 * largest
    if actual.dtype is not torch.float32:
        allowed = allowed + roundings * _UNIT[actual.dtype] * expected.abs()
    worst = (error - allowed).max().item()
    assert worst <= 0, f"off by {error.max().item():.3g} where the largest value is {largest.item():.3g}"
