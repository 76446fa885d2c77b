"""The ring convention against a ring that is played through; and collectives, each counted once, on its axis."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel.collectives import all_gather, all_reduce, reduce_from, reduce_scatter, scatter_sum
from megatron_llm.parallel.grid import Axis, Grid
from megatron_llm.parallel.traffic import Exchange, Traffic
from tests.ranks import run_ranks


def _round_the_ring(chunks: np.ndarray, first: int, add: bool) -> int:
    """Chunks [ranks, ranks, elements] travel n - 1 hops: rank r sends chunk (r + first) first, then what it has just got.

    Returns the bytes that each rank has sent.
    """
    ranks, sent = len(chunks), 0
    for hop in range(ranks - 1):
        moving = [((rank + first - hop) % ranks, rank) for rank in range(ranks)]
        messages = [chunks[rank, chunk].copy() for chunk, rank in moving]
        for (chunk, rank), message in zip(moving, messages, strict=True):
            here = chunks[(rank + 1) % ranks, chunk]
            here[:] = here + message if add else message
        sent += messages[0].nbytes
    return sent


@given(ranks=st.integers(2, 9), elements=st.integers(1, 7))
@settings(deadline=None)
def test_sent_is_what_a_ring_sends(ranks: int, elements: int) -> None:
    chunks = np.random.default_rng(0).integers(0, 100, (ranks, ranks, elements))
    total, size = chunks.sum(0), chunks[0].nbytes
    scattered = _round_the_ring(chunks, 0, add=True)
    for rank in range(ranks):  # rank r has the sum of chunk r + 1
        np.testing.assert_array_equal(chunks[rank, (rank + 1) % ranks], total[(rank + 1) % ranks])
    gathered = _round_the_ring(chunks, 1, add=False)
    np.testing.assert_array_equal(chunks, np.broadcast_to(total, chunks.shape))

    def sent(kind: Exchange) -> float:
        return Traffic(ranks, Counter({kind: size})).sent

    assert sent("reduce_scatter") == pytest.approx(scattered, rel=1e-12)
    assert sent("all_gather") == pytest.approx(gathered, rel=1e-12)
    assert sent("all_reduce") == pytest.approx(scattered + gathered, rel=1e-12)
    assert sent("message") == size


def _each_kind() -> tuple[dict[str, Counter[Exchange]], dict[str, Counter[Exchange]]]:
    """What is counted for one of each on 2 x 2 ranks, and what the differentiable ones add."""
    grid = Grid.build(ParallelConfig(tensor_parallel=2), 2)
    all_reduce(torch.ones(3, dtype=torch.float64), grid.world)
    all_gather(torch.ones(5, 2), grid.tp)
    reduce_scatter(torch.ones(6, dtype=torch.bfloat16), grid.dp_cp)
    reduce_scatter(torch.ones(4, dtype=torch.bfloat16), grid.dp_cp)
    before = grid.traffic()
    x = torch.ones(4, 3, requires_grad=True)
    torch.autograd.backward([scatter_sum(x, grid.tp), reduce_from(x, grid.tp)], [torch.ones(2, 3), torch.ones(4, 3)])
    added = {name: (now - before[name]).payload for name, now in grid.traffic().items()}
    return {name: traffic.payload for name, traffic in before.items()}, added


def test_collectives_are_counted_on_their_axis() -> None:
    nothing: Counter[Exchange] = Counter()
    axes = {"dp", "tp", "dp_cp", "world"}  # of more than one rank; the copied heads of other models are on none
    for before, added in run_ranks(4, _each_kind):
        assert before.keys() == added.keys() == axes
        assert before == {
            "dp": nothing,
            "tp": Counter(all_gather=2 * 5 * 2 * 4),
            "dp_cp": Counter(reduce_scatter=(6 + 4) * 2),
            "world": Counter(all_reduce=3 * 8),
        }
        whole = 4 * 3 * 4
        assert added == {
            "dp": nothing,
            "tp": Counter(reduce_scatter=whole, all_gather=whole, all_reduce=whole),  # scatter_sum there and back, reduce_from
            "dp_cp": nothing,
            "world": nothing,
        }


def test_axis_of_one_rank_has_no_traffic() -> None:
    alone, x = Axis("tp"), torch.ones(2, 3)
    for function in (all_reduce, all_gather, reduce_scatter, reduce_from, scatter_sum):
        assert isinstance(function(x, alone), Tensor)
    assert not alone.traffic.payload and alone.traffic.sent == 0
    assert Grid.single().traffic() == {}
