"""Each differentiable collective does what its table says, and its backward is its adjoint: <f(x), y> = <x, f^T(y)>.

A tensor that is the same on every rank counts once in an inner product, shards and partial terms count each.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_llm.config import ParallelConfig
from megatron_llm.parallel import collectives
from megatron_llm.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_from,
    reduce_scatter,
    scatter_sum,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_llm.parallel.grid import Axis, Grid
from tests.ranks import RankFailure, run_ranks

TOKENS, HIDDEN = 8, 3


def _of_rank(seed: int, rank: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)


def _tp(world: int) -> Axis:
    return Grid.build(ParallelConfig(tensor_parallel=world), world).tp


def _apply(name: str, world: int, same_output: bool, shard_out: bool) -> list[Tensor]:
    """(x, f(x), y, f^T(y)) of this rank."""
    tp = _tp(world)
    shard = TOKENS // world
    x = _of_rank(1, tp.rank).requires_grad_()
    y = _of_rank(2, 0 if same_output else tp.rank, shard if shard_out else TOKENS)
    before = x.detach().clone(), y.clone()
    out = getattr(collectives, name)(x, tp)
    (back,) = torch.autograd.grad(out, x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "arguments must not be overwritten"
    return [x.detach(), out.detach(), y, back]


# name: (f(x) is the same on all ranks, f(x) is a shard), f in one process from all ranks' x
FORWARD: dict[str, tuple[tuple[bool, bool], Callable[[list[Tensor]], list[Tensor]]]] = {
    "reduce_from": ((True, False), lambda xs: [sum(xs)] * len(xs)),  # type: ignore[list-item]
    "scatter_sum": ((False, True), lambda xs: list(sum(xs).chunk(len(xs)))),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FORWARD)
def test_collective_and_its_adjoint(name: str, world: int) -> None:
    kinds, forward = FORWARD[name]
    xs, outs, ys, backs = zip(*run_ranks(world, _apply, name, world, *kinds), strict=True)
    for out, expected in zip(outs, forward(list(xs)), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)

    def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...], same: bool) -> float:
        products = [float((u * v).sum()) for u, v in zip(a, b, strict=True)]
        assert not same or products == pytest.approx([products[0]] * world, rel=1e-12)
        return products[0] if same else sum(products)

    assert inner(outs, ys, kinds[0]) == pytest.approx(inner(xs, backs, False), rel=1e-12)


def test_axis_of_one_rank_costs_nothing() -> None:
    alone, x = Axis("tp"), torch.ones(2, 3)
    for function in (reduce_from, scatter_sum, all_reduce, all_gather, reduce_scatter):
        assert function(x, alone) is x
    for start in (start_all_gather, start_reduce_scatter):
        out = torch.zeros(2, 3)
        assert start(x, alone, out).wait() is out and torch.equal(out, x)


def _plain(world: int) -> None:
    """The asynchronous forms: into a given buffer, in place in a slice of it, from a tensor that is not contiguous."""
    tp = _tp(world)
    everyone = [_of_rank(1, rank) for rank in range(world)]
    mine = everyone[tp.rank]
    strided = mine.t().contiguous().t()
    assert not strided.is_contiguous()
    total = sum(everyone)
    assert isinstance(total, Tensor)
    share = slice(tp.rank * TOKENS // world, (tp.rank + 1) * TOKENS // world)

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)

    check(start_all_gather(strided, tp).wait(), torch.cat(everyone))
    check(start_reduce_scatter(strided, tp).wait(), total[share])
    buffer = torch.zeros(world * TOKENS, HIDDEN, dtype=torch.float64)
    own = buffer[tp.rank * TOKENS : (tp.rank + 1) * TOKENS]
    own.copy_(mine)
    assert start_all_gather(own, tp, buffer).wait() is buffer
    check(buffer, torch.cat(everyone))
    buffer = mine.clone()
    start_reduce_scatter(buffer, tp, buffer[share]).wait()
    check(buffer[share], total[share])
    handles = [start_all_reduce(mine.clone(), tp), start_reduce_scatter(mine, tp), start_all_gather(mine, tp)]
    for handle, expected in zip(handles, (total, total[share], torch.cat(everyone)), strict=True):
        check(handle.wait(), expected)
        check(handle.wait(), expected)  # waiting twice is harmless
    largest = all_reduce(mine.clone(), tp, torch.distributed.ReduceOp.MAX)
    check(largest, torch.stack(everyone).amax(0))


@pytest.mark.parametrize("world", [2, 4])
def test_plain_collectives(world: int) -> None:
    run_ranks(world, _plain, world)


def _indivisible() -> None:
    reduce_scatter(torch.ones(5, 2), _tp(2))


def test_indivisible_reduce_scatter_is_refused() -> None:
    with pytest.raises(RankFailure, match=r"dim 0 of \(5, 2\) is not divisible by the 2 ranks of axis tp"):
        run_ranks(2, _indivisible)
