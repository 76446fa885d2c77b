"""What the tests of all kernels need: a device, random numbers, and what counts as equal to float64."""

from __future__ import annotations

import mmap

import pytest
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


_MAP_NORESERVE = 0x4000
"""As Linux has it; Python 3.13 knows it by name."""


def far_rows(rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, [rows, size], at least 3 rows, the last of which begins more than 2^31 elements behind the first.

    The distance of neighbours fits into int32 and is a multiple of 16, as strides that a launcher hands over: a kernel that
    multiplies it by the row in int32 finds another place, up to 2^31 elements before the first row. That place is there too, and
    zero: nothing crashes, but what is read is not what the test wrote into these rows. On the CPU untouched memory costs nothing;
    on a GPU it is real (8.6 GB for two-byte numbers), and the test is skipped where there is not so much.
    """
    assert rows >= 3
    before = 1 << 31
    stride = -(-(before + 16) // (rows - 1) // 16) * 16
    assert size <= stride
    count = before + (rows - 1) * stride + size
    nbytes = count * dtype.itemsize
    if DEVICE.type == "cuda":
        if torch.cuda.mem_get_info()[0] < nbytes + (1 << 30):
            pytest.skip(f"{nbytes / 1e9:.1f} GB of a GPU's memory are not free")
        storage = torch.zeros(count, dtype=dtype, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        storage = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=dtype)
    return storage.as_strided((rows, size), (stride, 1), before)
