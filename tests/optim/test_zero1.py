"""ZeRO-1: bitwise the same for any number of ranks, replicas counted once, decay where it belongs, wide masters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_llm.config import OptimizerConfig, ParallelConfig
from megatron_llm.optim.zero1 import ZeroOptimizer
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from tests.ranks import run_ranks

SHAPES = {"a": (7, 13), "norm": (13,), "b": (5, 60), "c": (1,)}


def _parameter(name: str, values: Tensor, decay: bool = True, **fields: Any) -> nn.Parameter:
    """A parameter that holds a whole logical tensor."""
    result = nn.Parameter(values.clone())
    whole = Box.full(tuple(values.shape))
    part = Part(name, tuple(values.shape), ((whole, whole),), **fields)
    result.shard = ShardSpec((part,), decay)  # type: ignore[attr-defined]
    return result


def _random(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _integers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Sums of these are exact in float32 in any order."""
    return torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)).float()


def _main_grad(parameter: nn.Parameter) -> Tensor:
    return parameter.main_grad  # type: ignore[attr-defined]


# Any number of data-parallel ranks


def _step_on(world: int, bucket_size: int) -> tuple[list[float], dict[str, Tensor]]:
    """Three updates in which 4 micro-batches' gradients are dealt to the ranks: (squared norms, final weights)."""
    grid = Grid.build(ParallelConfig(), 1)
    parameters = {name: _parameter(name, _random(i, shape), name != "norm") for i, (name, shape) in enumerate(SHAPES.items())}
    optimizer = ZeroOptimizer(list(parameters.values()), grid, OptimizerConfig(lr=0.1, weight_decay=0.1), bucket_size)
    squares = []
    for step in range(3):
        optimizer.zero_gradients()
        for microbatch in range(grid.dp.rank, 4, world):
            for i, parameter in enumerate(parameters.values()):
                _main_grad(parameter).add_(_integers(100 * step + 10 * microbatch + i, tuple(parameter.shape)))
        total = optimizer.reduce_gradients()
        if world > 1:
            torch.distributed.all_reduce(total)
        squares.append(total.item())
        optimizer.update(step + 1, 0.01, 0.003)
    return squares, {name: parameter.detach().clone() for name, parameter in parameters.items()}


def test_one_rank_equals_torch() -> None:
    """The anchor of the bitwise comparison: plain torch.optim.AdamW with a group that does not decay."""
    ((squares, weights),) = run_ranks(1, _step_on, 1, 100)
    reference = {name: nn.Parameter(_random(i, shape)) for i, (name, shape) in enumerate(SHAPES.items())}
    groups = [
        {"params": [p for name, p in reference.items() if name != "norm"], "weight_decay": 0.1},
        {"params": [reference["norm"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=OptimizerConfig(lr=1).betas, eps=1e-8)
    for step in range(3):
        expected_square = 0.0
        for i, (name, shape) in enumerate(SHAPES.items()):
            total = torch.stack([_integers(100 * step + 10 * microbatch + i, shape) for microbatch in range(4)]).sum(0)
            expected_square += float(total.square().sum())
            reference[name].grad = total * 0.003
        assert squares[step] == expected_square
        optimizer.step()
    for name, parameter in reference.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bucket_size", [1, 100, 10_000])
@pytest.mark.parametrize("world", [2, 4])
def test_number_of_ranks_does_not_change_a_bit(world: int, bucket_size: int) -> None:
    ((expected_squares, expected),) = run_ranks(1, _step_on, 1, 10_000)
    for squares, weights in run_ranks(world, _step_on, world, bucket_size):
        assert squares == expected_squares
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


# Replicas


def _replicated(which: str) -> tuple[float, float, dict[str, Tensor]]:
    """tp2 x dp2: a fused weight, part of it on both tp ranks, and a vector on both, with complete or partial gradients there.

    (squared norm over the world, the same of the logical gradient, weights after one update)
    """
    grid = Grid.build(ParallelConfig(tensor_parallel=2), 1)
    tp, kv = grid.tp, grid.kv_replica
    partial = which == "partial"
    fused = nn.Parameter(torch.ones(5, 31))  # rows 0-2: this rank's half of q; rows 3-4: k, on both tp ranks
    q = Part("q", (6, 31), ((Box((0, 0), (3, 31)), Box((3 * tp.rank, 0), (3, 31))),))
    k = Part("k", (2, 31), ((Box((3, 0), (2, 31)), Box((0, 0), (2, 31))),), "normal", 2, tp.rank, kv if partial else None)
    fused.shard = ShardSpec((q, k))  # type: ignore[attr-defined]
    norm = _parameter("norm", torch.ones(40), False, replicas=2, replica_rank=tp.rank, gradient_sum=tp if partial else None)
    optimizer = ZeroOptimizer([fused, norm], grid, OptimizerConfig(lr=0.1), 10)

    def logical(name: str, shape: tuple[int, ...], dp: int, rank: int) -> Tensor:
        """The term that (dp, tp) ranks contribute; complete gradients of replicas are equal on all tp ranks."""
        seed = {"q": 1, "k": 2, "norm": 3}[name] + 10 * dp + (100 * rank if partial else 0)
        return _integers(seed, shape)

    _main_grad(fused)[:3] = logical("q", (6, 31), grid.dp.rank, 0)[3 * tp.rank : 3 * tp.rank + 3]
    _main_grad(fused)[3:] = logical("k", (2, 31), grid.dp.rank, tp.rank)
    _main_grad(norm).copy_(logical("norm", (40,), grid.dp.rank, tp.rank))
    square = optimizer.reduce_gradients()
    torch.distributed.all_reduce(square)

    expected = 0.0
    for name, shape in (("q", (6, 31)), ("k", (2, 31)), ("norm", (40,))):
        terms = [logical(name, shape, dp, rank) for dp in range(2) for rank in range(2 if partial and name != "q" else 1)]
        expected += float(torch.stack(terms).sum(0).square().sum())
    optimizer.update(1, 0.05, 1e-3)
    return square.item(), expected, {"q": fused[:3].detach(), "k": fused[3:].detach(), "norm": norm.detach()}


@pytest.mark.parametrize("which", ["complete", "partial"])
def test_norm_counts_every_logical_element_once_and_replicas_stay_equal(which: str) -> None:
    results = run_ranks(4, _replicated, which)
    for square, expected, weights in results:
        assert square == pytest.approx(expected, rel=1e-6)
        for name in ("k", "norm"):
            assert torch.equal(weights[name], results[0][2][name]), name
            assert not torch.equal(weights[name], torch.ones_like(weights[name]))
    assert not torch.equal(results[0][2]["q"], results[1][2]["q"])  # different rows on the two tp ranks


def _tied() -> tuple[float, float, Tensor]:
    """pp2 x dp2: the stages share an embedding and hold different other weights of different sizes."""
    grid = Grid.build(ParallelConfig(pipeline_parallel=2), 1)
    stage, seed = grid.pp.rank, grid.pp.rank + 2 * grid.dp.rank
    embedding = _parameter("embedding", torch.ones(9, 11), replicas=2, replica_rank=stage, gradient_sum=grid.tied)
    other = _parameter("other", torch.ones(70 + 200 * stage))
    parameters = [embedding, other] if stage == 0 else [other, embedding]
    optimizer = ZeroOptimizer(parameters, grid, OptimizerConfig(lr=0.1), 10_000)
    _main_grad(embedding).copy_(_integers(seed, (9, 11)))
    _main_grad(other).copy_(_integers(10 + seed, tuple(other.shape)))
    square = optimizer.reduce_gradients()
    torch.distributed.all_reduce(square)
    expected = float(sum(_integers(i, (9, 11)) for i in range(4)).square().sum())  # type: ignore[union-attr]
    for i in range(2):
        expected += float((_integers(10 + i, (70 + 200 * i,)) + _integers(12 + i, (70 + 200 * i,))).square().sum())
    optimizer.update(1, 0.05, 1e-3)
    return square.item(), expected, embedding.detach()


def test_tied_embedding_is_counted_once_and_stays_equal_on_both_stages() -> None:
    results = run_ranks(4, _tied)
    gradient = sum(_integers(i, (9, 11)) for i in range(4))
    assert isinstance(gradient, Tensor)
    for square, expected, weight in results:
        assert square == pytest.approx(expected, rel=1e-6)
        assert torch.equal(weight, results[0][2])
        torch.testing.assert_close(weight, 1 - 0.05 * 0.1 - 0.05 * gradient.sign(), rtol=0, atol=1e-5)  # a first update: the sign


def _two_axes() -> tuple[float, Tensor, Tensor]:
    """tp4 over 2 KV heads: rank r adds r + 1 to a norm that all ranks hold and to a head that two neighbours hold."""
    grid = Grid.build(ParallelConfig(tensor_parallel=4), 2)
    tp, kv = grid.tp, grid.kv_replica
    head = nn.Parameter(torch.ones(2, 3))
    boxes = (Box.full((2, 3)), Box((2 * (tp.rank // 2), 0), (2, 3)))
    head.shard = ShardSpec((Part("k", (4, 3), (boxes,), "normal", 2, kv.rank, kv),))  # type: ignore[attr-defined]
    norm = _parameter("norm", torch.ones(5), False, replicas=4, replica_rank=tp.rank, gradient_sum=tp)
    optimizer = ZeroOptimizer([head, norm], grid, OptimizerConfig(lr=0.1), 10_000)
    for parameter in (head, norm):
        _main_grad(parameter).fill_(tp.rank + 1.0)
    square = optimizer.reduce_gradients()
    torch.distributed.all_reduce(square)
    return square.item(), _main_grad(head).clone(), _main_grad(norm).clone()


def test_partial_gradients_are_summed_over_their_own_axis() -> None:
    for rank, (square, head, norm) in enumerate(run_ranks(4, _two_axes)):
        assert norm.tolist() == [10.0] * 5
        assert torch.equal(head, torch.full((2, 3), 3.0 if rank < 2 else 7.0))
        assert square == pytest.approx(5 * 10**2 + 6 * 3**2 + 6 * 7**2)


# One process


def _alone(parameters: list[nn.Parameter], **settings: Any) -> ZeroOptimizer:
    return ZeroOptimizer(parameters, Grid.single(), OptimizerConfig(**({"lr": 0.1} | settings)), 10_000)


def test_decay_applies_where_the_spec_says() -> None:
    """Without gradients a decaying weight shrinks by 1 - rate * decay an update, another does not move by a bit."""
    weight, norm = _parameter("w", _random(1, (3, 5))), _parameter("norm", _random(2, (5,)), decay=False)
    optimizer = _alone([weight, norm], weight_decay=0.3)
    for update in range(1, 4):
        optimizer.zero_gradients()
        optimizer.reduce_gradients()
        optimizer.update(update, 0.1, 1.0)
    torch.testing.assert_close(weight.detach(), _random(1, (3, 5)) * (1 - 0.1 * 0.3) ** 3)
    assert torch.equal(norm, _random(2, (5,)))


def test_bfloat16_weights_follow_a_float32_master() -> None:
    """100 updates of 1e-4 each vanish beside 1.0 in bfloat16 (spacing 2^-8), but not in the master."""
    weight = _parameter("w", torch.ones(10, dtype=torch.bfloat16))
    optimizer = _alone([weight], weight_decay=0.0)
    for update in range(1, 101):
        optimizer.zero_gradients()
        _main_grad(weight).fill_(1.0)
        optimizer.reduce_gradients()
        optimizer.update(update, 1e-4, 1.0)
        if update == 10:
            assert torch.equal(weight.float(), torch.ones(10)), "10 updates are less than half a spacing"
    ((_, master),) = optimizer.state_pieces("weights")
    assert master.dtype is torch.float32
    torch.testing.assert_close(master, torch.full((10,), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_their_own_master(dtype: torch.dtype) -> None:
    weight = _parameter("w", torch.ones(10, dtype=dtype))
    ((_, master),) = _alone([weight]).state_pieces("weights")
    assert master.dtype is dtype and master.data_ptr() == weight.data_ptr()


class _Source:
    """Values that bfloat16 cannot hold."""

    def read(self, part: Part, box: Box) -> Tensor:
        return torch.arange(math.prod(part.shape), dtype=torch.float64).view(part.shape)[box.slices] + 1 / 3


def _load(world: int) -> tuple[Tensor, list[tuple[tuple[slice, ...], Tensor]]]:
    weight = _parameter("w", torch.zeros(20, 20, dtype=torch.bfloat16))
    optimizer = ZeroOptimizer([weight], Grid.build(ParallelConfig(), 1), OptimizerConfig(lr=0.1), 10)
    optimizer.load("weights", _Source())
    optimizer.load("m", _Source())
    return weight.detach(), [(piece.box.slices, m.clone()) for piece, m in optimizer.state_pieces("m")]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loading_fills_masters_unrounded_and_weights_everywhere(world: int) -> None:
    values = torch.arange(400, dtype=torch.float64).view(20, 20) + 1 / 3
    results = run_ranks(world, _load, world)
    m = torch.zeros(20, 20)
    for weight, pieces in results:
        assert torch.equal(weight, values.float().bfloat16())
        for index, value in pieces:
            m[index] = value
    assert torch.equal(m, values.float())


def test_gradients_made_by_autograd_move_to_the_main_gradient() -> None:
    """As those of norms do; two backwards accumulate, in float32, and nothing stays in `.grad`."""
    weight = _parameter("w", torch.ones(3, dtype=torch.bfloat16))
    optimizer = _alone([weight])
    for factor in (256.0, 1.0):
        (weight * factor).sum().backward()
        assert weight.grad is None
    assert _main_grad(weight).tolist() == [257.0] * 3  # in bfloat16 256 + 1 is 256
    assert optimizer.reduce_gradients().item() == 3 * 257.0**2
    optimizer.zero_gradients()
    assert not _main_grad(weight).any()
