"""Operations on a GPU that have no other test there: random bits and hashes to the bit, host copies, products into wider sums."""

from __future__ import annotations

import pytest
import torch

from megatron_llm.checkpoint.save import TensorToSave
from megatron_llm.checkpoint.saver import Staging
from megatron_llm.ops.rounding import RoundingBits, StochasticRounding
from megatron_llm.parallel.shard import Box
from megatron_llm.training.replicas import hash_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_the_bits_of_stochastic_rounding_are_those_of_the_cpu() -> None:
    drawn = [RoundingBits(StochasticRounding(7, 10), 1000, torch.device(kind)).draw(3, 900) for kind in ("cpu", "cuda")]
    for expected, actual in zip(*drawn, strict=True):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_hashes_of_weights_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    values = torch.randn(5, 1001, dtype=dtype)
    assert hash_bits(values.cuda()).item() == hash_bits(values).item()


def test_what_is_saved_is_copied_into_page_locked_memory_before_it_changes() -> None:
    tensors = [torch.randn(1 << 20, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    expected = [tensor.cpu() for tensor in tensors]
    staging = Staging()
    for size in (1 << 10, 1 << 20):  # the buffer grows
        items = [TensorToSave("m", "w", (size,), Box((0,), (size,)), tensor[:size]) for tensor in tensors]
        copies = [item.tensor for item in staging.copy(items)]
        assert all(copy.is_pinned() for copy in copies)
    for tensor, copy, values in zip(tensors, copies, expected, strict=True):
        tensor.zero_()
        assert torch.equal(copy, values)
