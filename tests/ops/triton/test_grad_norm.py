"""Sums of squares, in Triton and in pieces of torch's, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llm.ops import grad_norm
from megatron_llm.ops.grad_norm import sum_of_squares
from megatron_llm.ops.triton import grad_norm as module
from megatron_llm.ops.triton.grad_norm import BLOCK, BLOCKS
from megatron_llm.ops.triton.grad_norm import sum_of_squares as fused
from tests.ops.triton.common import DEVICE, randn
from tests.ops.triton.far import run_last_programs, sparse

PIECE = BLOCK * BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 1, PIECE, 2 * PIECE + 4097])
def test_is_the_sum_in_float64(size: int, dtype: torch.dtype) -> None:
    x = randn(size + 3, dtype=dtype)[3:]  # begins at no multiple of 16 bytes
    result = sum_of_squares(x, "triton")
    assert result.shape == () and result.dtype is torch.float32
    torch.testing.assert_close(result.double(), x.double().square().sum(), rtol=1e-6, atol=0)


def test_every_element_counts_once() -> None:
    x = torch.zeros(PIECE + 70, device=DEVICE)
    for place in (0, BLOCK - 1, BLOCK, PIECE - 1, PIECE, PIECE + 69):
        x[place] = 2.0 ** (place % 7)
    assert sum_of_squares(x, "triton").item() == x.double().square().sum().item()
    assert sum_of_squares(x[:PIECE], "triton").item() == x[:PIECE].double().square().sum().item()


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(special: float) -> None:
    x = torch.zeros(BLOCK + 5, device=DEVICE)
    x[-1] = special
    assert not sum_of_squares(x, "triton").isfinite()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of a grid, only the interpreter can run a part")
def test_more_elements_than_32_bits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sparse(tmp_path / "x", 2**31 + 5)
    x[0], x[2**31 - 1], x[2**31], x[-1] = 1.0, 2.0, 4.0, 8.0
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # partial sums of programs that do not run
    grids = run_last_programs(monkeypatch, module, "squares_kernel", 2)
    assert sum_of_squares(x, "triton").item() == 4 + 16 + 64
    assert grids == [(2**31 // PIECE + 1,)]


class _Dots(TorchDispatchMode):
    """Records how many elements each product of vectors has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.dot.default:
            self.sizes.append(args[0].numel())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_takes_no_more_than_a_piece_at_a_time(dtype: torch.dtype) -> None:
    """Its `dot` counts in 32 bits. Up to a piece it is that `dot`, to the bit."""
    x = randn(1000, dtype=dtype)
    for piece, expected in ((300, [300, 300, 300, 100]), (1000, [1000]), (10_000, [1000])):
        with _Dots() as dots:
            result = sum_of_squares(x, piece=piece)
        assert dots.sizes == expected and result.dtype is dtype
        torch.testing.assert_close(result, x.dot(x), rtol=1e-6 if dtype is torch.float32 else 1e-14, atol=0)
    assert torch.equal(sum_of_squares(x), x.dot(x))
    assert sum_of_squares(x[:0]).item() == 0.0
    assert grad_norm._PIECE < 2**31


def test_pieces_of_more_elements_than_32_bits_count() -> None:
    """On the meta device, where nothing is computed: 5 * 2^30 + 1 elements are six pieces."""
    x = torch.empty(5 * 2**30 + 1, device="meta")
    with _Dots() as dots:
        sum_of_squares(x)
    assert dots.sizes == [2**30] * 5 + [1]


def test_operator() -> None:
    x: Tensor = randn(10)
    torch.library.opcheck(fused, (x,))
