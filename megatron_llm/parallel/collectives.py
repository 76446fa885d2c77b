"""Collectives over one axis of the grid, plain and differentiable.

The `start_` functions return a handle, so that `parallel/linear.py` and `optim/zero1.py` can overlap them with compute.
The differentiable ones leave a tensor-parallel region: the second halves of Megatron's conjugate pairs (Shoeybi et al.
2019; sequence parallelism: Korthikanti et al. 2022). The halves that enter one are fused with products in `linear.py`.

    function          forward                         backward
    reduce_from       all-reduce                      identity
    scatter_sum       reduce-scatter along dim 0      all-gather along dim 0

An axis of size 1 costs nothing; on others every exchange is counted (`traffic.py`). Torch renamed the tensor
collectives in 2.13; `_all_gather` and `_reduce_scatter` are the only place that knows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.grid import Axis

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Handle:
    """A collective under way: `wait()` returns its result. Keeps the buffers alive until then."""

    def __init__(self, result: Tensor, work: dist.Work | None = None, keep: Tensor | None = None):
        self._result, self._work, self._keep = result, work, keep

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = self._keep = None
        return self._result


def start_all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Handle:
    """Begin to combine `x` in place over the axis. The result is `x`."""
    if axis.size == 1:
        return Handle(x)
    axis.traffic.add("all_reduce", x)
    return Handle(x, dist.all_reduce(x, op=op, group=axis.group, async_op=True))


def start_all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """Begin to collect [n, ...] from every rank as [size * n, ...], in the order of ranks, into `out` if given."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    if out is None:
        out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    axis.traffic.add("all_gather", out)
    return Handle(out, _all_gather(out, x, group=axis.group, async_op=True), x)


def start_reduce_scatter(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """Begin to sum [size * n, ...] over the ranks, of which rank r keeps rows [r * n, (r + 1) * n)."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    if x.shape[0] % axis.size:
        raise ValueError(f"dim 0 of {tuple(x.shape)} is not divisible by the {axis.size} ranks of axis {axis.name}")
    x = x.contiguous()
    if out is None:
        out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    axis.traffic.add("reduce_scatter", x)
    return Handle(out, _reduce_scatter(out, x, group=axis.group, async_op=True), x)


def start_all_to_all(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """Begin to send part r of [size * n, ...] to rank r. The result has the parts that were sent here, in the order of ranks."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    if out is None:
        out = torch.empty_like(x)
    axis.traffic.add("all_to_all", x)
    return Handle(out, dist.all_to_all_single(out, x, group=axis.group, async_op=True), x)


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Combine `x` in place over the axis and return it."""
    return start_all_reduce(x, axis, op).wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] from every rank -> [size * n, ...]."""
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[size * n, ...] summed over the ranks -> this rank's [n, ...]."""
    return start_reduce_scatter(x, axis).wait()


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.axis), None


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave such a region: the sum of every rank's partial `x`, on every rank."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, ...] -> this rank's tokens [T / size, ...] of the total."""
    return x if axis.size == 1 else _ScatterSum.apply(x, axis)
