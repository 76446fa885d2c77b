"""How gradients are kept and sent: each term is rounded once, to what the options say, and all sums are float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.config import ParallelConfig
from megatron_llm.optim.buffers import Bucket
from megatron_llm.optim.layout import bucket_layout
from megatron_llm.parallel.grid import Grid
from tests.optim.test_buffers import parameter
from tests.ranks import run_ranks

SHAPES = [(7, 13), (40,), (5, 60)]


def _gradient(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(17 * rank + len(shape) + shape[0]))


def _reduce(main: torch.dtype | None, sent: torch.dtype | None, early: bool) -> tuple[dict[str, Tensor], torch.dtype, int]:
    """One reduction of two added gradients: what this rank owns by name, its dtype, bytes that were sent."""
    grid = Grid.build(ParallelConfig(), 1)
    parameters: list[nn.Parameter] = [parameter(f"p{i}", shape) for i, shape in enumerate(SHAPES)]
    (layout,) = bucket_layout(parameters, grid.dp_cp.size, 10_000)
    bucket = Bucket(layout, grid.dp_cp, main, sent)
    owned: dict[str, Tensor] = {}
    for _ in range(2):  # the second step finds the buffers as the first left them
        bucket.forget_gradients()
        for p in parameters:
            p.main_grad.add_(_gradient(grid.dp_cp.rank, tuple(p.shape)))  # type: ignore[attr-defined]
            p.main_grad.add_(1.0)  # type: ignore[attr-defined]
        if early:
            bucket.start_reduce()
        bucket.finish_reduce()
        for piece, a, b in bucket.pieces(bucket.lo, bucket.hi):
            whole = owned.setdefault(piece.part.name, torch.full(piece.part.shape, torch.nan))
            whole[piece.box.slices] = piece.view(bucket.own_grad[a:b])
    return owned, bucket.own_grad.dtype, round(grid.dp_cp.traffic.sent / 2)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("option", ["float32", "sent in bfloat16", "kept in bfloat16"])
def test_every_term_is_rounded_once_and_added_in_float32(option: str, world: int, early: bool) -> None:
    bf16 = torch.bfloat16
    main, sent = {"float32": (None, None), "sent in bfloat16": (None, bf16), "kept in bfloat16": (bf16, None)}[option]
    results = run_ranks(world, _reduce, main, sent, early)
    for i, shape in enumerate(SHAPES):
        if main:
            terms = [_gradient(rank, shape).to(bf16).add_(1.0).float() for rank in range(world)]
        else:
            terms = [_gradient(rank, shape) + 1.0 for rank in range(world)]
        if sent and world > 1:
            terms = [term.to(bf16).float() for term in terms]
        found = torch.full(shape, torch.nan)
        for owned, _, _ in results:
            here = ~owned[f"p{i}"].isnan() if f"p{i}" in owned else torch.zeros(shape, dtype=torch.bool)
            found[here] = owned[f"p{i}"][here] if here.any() else found[here]
        torch.testing.assert_close(found, torch.stack(terms).double().sum(0).float(), rtol=1e-6, atol=1e-6)
    elements = -(-(7 * 13 + 37 + 40 + 24 + 300) // (64 * world)) * 64 * world
    for _, dtype, bytes_sent in results:
        assert dtype is torch.float32
        assert bytes_sent == elements * (world - 1) / world * (4 if option == "float32" else 2)


def test_gradients_are_not_read_before_they_are_summed() -> None:
    (layout,) = bucket_layout([parameter("p", (4,))], 1)
    bucket = Bucket(layout, Grid.single().dp_cp)
    with pytest.raises(AssertionError, match="before they are reduced"):
        _ = bucket.own_grad
    bucket.finish_reduce()
    assert bucket.own_grad.shape == (64,)
    bucket.forget_gradients()
    with pytest.raises(AssertionError, match="before they are reduced"):
        _ = bucket.own_grad
