"""Collectives over one axis of the grid, plain and differentiable.

The `start_` functions return a handle, so that `parallel/linear.py` and `optim/zero1.py` can overlap them with compute.
The differentiable ones leave a tensor-parallel region: the second halves of Megatron's conjugate pairs (Shoeybi et al.
2019; sequence parallelism: Korthikanti et al. 2022). The halves that enter one are fused with products in `linear.py`.

    function          forward                         backward
    reduce_from       all-reduce                      identity
    scatter_sum       reduce-scatter along dim 0      all-gather along dim 0

An axis of size 1 costs nothing; on others every exchange is counted (`traffic.py`). How it is made is known to `_all_gather`,
`_reduce_scatter` and `_all_to_all` only: on a GPU by torch's collectives, which were renamed in 2.13; on a CPU by messages
between all pairs of ranks, because those of gloo take four times as long (two ranks, 64 MB: all-gather 75 ms and 18,
reduce-scatter 90 and 22). Messages of a group arrive in the order of sending, and ranks start their exchanges in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.parallel.grid import Axis

_gpu_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_gpu_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Messages:
    """Messages to and from all other ranks of a group. `wait` returns when the last is there and what follows is done."""

    def __init__(self, received: Sequence[Tensor], sent: Sequence[Tensor], group: Any, then: Callable[[], object] | None = None):
        """received, sent: by rank of the group; this rank's own entries are not looked at."""
        me, size = dist.get_rank(group), dist.get_world_size(group)
        others = [*range(me + 1, size), *range(me)]  # not all ranks send to the same one first
        self._works: list[Any] = [dist.irecv(received[rank], group=group, group_src=rank) for rank in others]
        self._works += [dist.isend(sent[rank], group=group, group_dst=rank) for rank in others]
        self._then = then

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        if self._then is not None:
            self._then()


def _all_gather(out: Tensor, x: Tensor, group: Any, async_op: bool = True) -> Any:
    """x [n, ...] of every rank into out [size * n, ...], of which x may be a part."""
    if x.device.type != "cpu":
        return _gpu_all_gather(out, x, group=group, async_op=async_op)
    places = out.chunk(dist.get_world_size(group))
    own = places[dist.get_rank(group)]
    if own.data_ptr() != x.data_ptr():
        own.copy_(x)
    return _Messages(places, [own] * len(places), group)


def _reduce_scatter(out: Tensor, x: Tensor, group: Any, async_op: bool = True) -> Any:
    """The sum over ranks of their x [size * n, ...], of which this rank gets its part [n, ...]; out may be that part of x."""
    if x.device.type != "cpu":
        return _gpu_reduce_scatter(out, x, group=group, async_op=async_op)
    parts, me = x.chunk(dist.get_world_size(group)), dist.get_rank(group)
    terms = [part if rank == me else torch.empty_like(part) for rank, part in enumerate(parts)]

    def add() -> None:
        """In the order of ranks, so that the sum does not depend on who makes it."""
        total = terms[0].clone() if me == 0 and len(terms) > 2 else terms[0]  # the caller's x stays as it is
        for term in terms[1:-1]:
            total += term
        torch.add(total, terms[-1], out=out)

    return _Messages(terms, parts, group, add)


def _all_to_all(out: Tensor, x: Tensor, group: Any, async_op: bool = True) -> Any:
    """Part r of x [size * n, ...] to rank r."""
    if x.device.type != "cpu":
        return dist.all_to_all_single(out, x, group=group, async_op=async_op)
    size, me = dist.get_world_size(group), dist.get_rank(group)
    received, sent = out.chunk(size), x.chunk(size)
    received[me].copy_(sent[me])
    return _Messages(received, sent, group)


class Handle:
    """A collective over `axis` under way: `wait()` returns its result. Keeps the buffers alive until then."""

    def __init__(
        self, result: Tensor, work: dist.Work | _Messages | None = None, axis: Axis | None = None, keep: Tensor | None = None
    ):
        self._result, self._work, self._axis, self._keep = result, work, axis, keep

    def wait(self) -> Tensor:
        if self._work is not None:
            assert self._axis is not None
            self._axis.waits.wait(self._work.wait, self._result.device)
            self._work = self._keep = None
        return self._result


def start_all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Handle:
    """Begin to combine `x` in place over the axis. The result is `x`."""
    if axis.size == 1:
        return Handle(x)
    axis.traffic.add("all_reduce", x)
    return Handle(x, dist.all_reduce(x, op=op, group=axis.group, async_op=True), axis)


def start_all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """Begin to collect [n, ...] from every rank as [size * n, ...], in the order of ranks, into `out` if given."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    if out is None:
        out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    axis.traffic.add("all_gather", out)
    return Handle(out, _all_gather(out, x, group=axis.group, async_op=True), axis, x)


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
    return Handle(out, _reduce_scatter(out, x, group=axis.group, async_op=True), axis, x)


def start_all_to_all(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """Begin to send part r of [size * n, ...] to rank r. The result has the parts that were sent here, in the order of ranks."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    if out is None:
        out = torch.empty_like(x)
    axis.traffic.add("all_to_all", x)
    return Handle(out, _all_to_all(out, x, group=axis.group, async_op=True), axis, x)


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Combine `x` in place over the axis and return it."""
    return start_all_reduce(x, axis, op).wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] from every rank -> [size * n, ...]."""
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[size * n, ...] summed over the ranks -> this rank's [n, ...]."""
    return start_reduce_scatter(x, axis).wait()


def broadcast(x: Tensor, axis: Axis, source: int) -> Tensor:
    """`x` of one rank of the axis in place of that of all others. Of few numbers: nobody counts its bytes."""
    if axis.size > 1:
        dist.broadcast(x, axis.ranks[source], group=axis.group)
    return x


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
