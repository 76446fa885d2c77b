"""Linear layers whose weight is cut over the tensor-parallel axis (Shoeybi et al. 2019; sequence parallelism:
Korthikanti et al. 2022). Called by `models/attention.py`, `models/mlp.py` and `models/decoder.py`.

Overlap of communication with compute is written here, once, for every layer:

    column-parallel   sequence parallel                            without
    forward           x = all-gather(x_s);  y = x W^T              y = x W^T
    input gradient    dx = dy W  while x_s is gathered again;      dx = dy W
                      dx_s = reduce-scatter(dx)                    all-reduce(dx)
    weight gradient   dW += dy^T x  while dx is reduced            dW += dy^T x  while dx is reduced

    row-parallel      sequence parallel                            without
    forward           y_s = reduce-scatter(x W^T)                  y = all-reduce(x W^T)
    input gradient    dy = all-gather(dy_s);  dx = dy W            dx = dy W
    weight gradient   dW += dy^T x                                 dW += dy^T x

Branches that share their input (q, k, v and the MLP of a parallel block) or whose outputs are added are one call: one gather, one
reduction, however many weights. The gathered input is not kept for backward: sequence parallelism would otherwise save nothing.
In a split backward the weight gradients, and with them the second gather of x_s, wait in `parallel/weight_grad.py`; the
reduction of dx then overlaps nothing. Biases of columns are cut with their rows; one of a row-parallel layer is added after the
reduction, so its gradient is a partial sum where tokens are sharded. Low-rank adapters (`parallel/lora.py`) take part in these
calls and send nothing of their own.

Sizes that tp does not divide are cut unevenly: no weight is padded, so there is no padding to keep dead. Only the vocabulary is,
because its ranks exchange statistics of equal shape.

A weight with an attribute `fp8` (`multiply_in_fp8`) is multiplied in 8 bits for y and dx, which changes no message: what is sent
stays in the compute dtype, and what was gathered is rounded after it. dW, and what waits for W, are as ever (`ops/fp8.py`).

A weight is an attribute of `ctx` and not a saved tensor: hooks on those (`models/recompute.py`) would give it back without its
`main_grad`.

Shape suffixes: T tokens, S tokens of this rank's sequence shard (T / tp), I input features, O output features (local).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_llm.ops import fp8
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.matmul import accumulate_matmul, matmul, widen
from megatron_llm.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.lora import ColumnLora, RowLora
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from megatron_llm.parallel.weight_grad import defer_linear_weight_gradients, linear_weight_gradient, vector_weight_gradient


@dataclass(frozen=True)
class OutputShard:
    """This rank's share of the rows of one logical weight inside a (possibly fused) column-parallel weight.

    Attributes:
        name: logical name of the weight; rows: how many it has in the whole model.
        start, stop: the logical rows held here; local_rows: rows reserved, more than stop - start where padded.
        most_rows: local_rows of the rank that has the most.
        replica: the ranks that hold the same rows and partial gradients: KV heads when tp exceeds them, a tied embedding.
    """

    name: str
    rows: int
    start: int
    stop: int
    local_rows: int
    most_rows: int
    replica: Axis = Axis("none")

    @classmethod
    def even(cls, name: str, rows: int, tp: Axis, replica: Axis = Axis("none")) -> OutputShard:
        """Rows cut in equal blocks; the last ranks are padded where tp does not divide them."""
        local = -(-rows // tp.size)
        return cls(name, rows, min(tp.rank * local, rows), min((tp.rank + 1) * local, rows), local, local, replica)

    @classmethod
    def of(cls, name: str, rows: int, held: range, most: int, unit: int = 1, replica: Axis = Axis("none")) -> OutputShard:
        """The rows of the units in `held`, such as heads of `unit` rows; no rank has more than `most` units."""
        return cls(name, rows, held.start * unit, held.stop * unit, len(held) * unit, most * unit, replica)


def balanced(size: int, tp: Axis) -> range:
    """This rank's block of `size` things; those of the first ranks are larger by one where tp does not divide them."""
    each, more = divmod(size, tp.size)
    start = tp.rank * each + min(tp.rank, more)
    return range(start, start + each + (tp.rank < more))


def most_of(size: int, tp: Axis) -> int:
    """The length of the longest block that `balanced` gives a rank."""
    return -(-size // tp.size)


def sharded_weight(in_features: int, shards: list[OutputShard], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A zero-filled weight [sum of local rows, in_features] whose spec names each shard as a logical tensor."""
    return _sharded(shards, (in_features,), dtype, device)


def sharded_bias(shards: list[OutputShard], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """The bias [sum of local rows] that belongs to a sharded weight."""
    biases = [replace(shard, name=shard.name.removesuffix("weight") + "bias") for shard in shards]
    return _sharded(biases, (), dtype, device, init="zeros", decay=False)


def _sharded(
    shards: list[OutputShard],
    inner: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    init: Literal["normal", "zeros"] = "normal",
    decay: bool = True,
) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(sum(shard.local_rows for shard in shards), *inner, dtype=dtype, device=device))
    parts, row, rest = [], 0, (0,) * len(inner)
    for shard in shards:
        size = (shard.stop - shard.start, *inner)
        held = ((Box((row, *rest), size), Box((shard.start, *rest), size)),) if size[0] else ()
        summed = shard.replica if shard.replica.size > 1 else None
        whole, room, copies = (shard.rows, *inner), shard.most_rows * math.prod(inner), shard.replica
        parts.append(Part(shard.name, whole, held, init, copies.size, copies.rank, summed, room))
        row += shard.local_rows
    parameter.shard = ShardSpec(tuple(parts), decay)  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W (output features) cut over tp; several logical weights may share one W and one GEMM.

    Input [S, I] when sequence parallel, else [T, I]; output [T, O]: the outputs of all shards side by side.
    With `keep_wide` an output that the device computes in float32 anyway (`ops/matmul.py`) is not rounded.
    """

    def __init__(self, weight_OI: nn.Parameter, tp: Axis, bias_O: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.bias, self.tp = weight_OI, bias_O, tp
        self.lora: ColumnLora | None = None

    def forward(self, x: Tensor, sequence_parallel: bool, keep_wide: bool = False) -> Tensor:
        return column_parallel(x, [self], sequence_parallel, keep_wide)[0]


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x W^T, plus b, with the columns of W (input features) cut over tp.

    Input [T, I]; output [S, O] when sequence parallel, else [T, O].

    Args:
        held: the input features of this rank; None: an equal share.
        most: how many no rank has more than; None: of equal shares.
        bias: whether there is one; its gradient is a partial sum with `partial`, as under sequence parallelism.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        tp: Axis,
        dtype: torch.dtype,
        device: torch.device,
        held: range | None = None,
        most: int | None = None,
        bias: bool = False,
        partial: bool = False,
    ):
        super().__init__()
        self.tp = tp
        self.lora: RowLora | None = None
        held = balanced(in_features, tp) if held is None else held
        self.weight = nn.Parameter(torch.zeros(out_features, len(held), dtype=dtype, device=device))
        size = (out_features, len(held))
        boxes = ((Box.full(size), Box((0, held.start), size)),) if len(held) else ()
        room = out_features * (most_of(in_features, tp) if most is None else most)
        self.weight.shard = ShardSpec((Part(name, (out_features, in_features), boxes, room=room),))  # type: ignore[attr-defined]
        self.bias: nn.Parameter | None = None
        if bias:
            name = name.removesuffix("weight") + "bias"
            self.bias = replicated(name, (out_features,), "zeros", tp, partial, dtype, device)

    def forward(self, x_TI: Tensor, sequence_parallel: bool) -> Tensor:
        return row_parallel([x_TI], [self], sequence_parallel)


def multiply_in_fp8(linears: Iterable[ColumnParallelLinear | RowParallelLinear], kernel: str) -> None:
    """Let layers multiply by their weights in 8 bits; adapters go on as they are. kernel: as in `ops/fp8.py`.

    Both sizes of a weight must be multiples of `fp8.MULTIPLE`, and the dtype bfloat16.
    """
    for linear in linears:
        linear.weight.fp8 = kernel  # type: ignore[attr-defined]


def replicated(
    name: str,
    shape: tuple[int, ...],
    init: Literal["normal", "ones", "zeros"],
    tp: Axis,
    partial: bool,
    dtype: torch.dtype,
    device: torch.device,
    decay: bool = False,
) -> nn.Parameter:
    """A parameter that every rank of tp holds whole; `partial`: each computes its gradient from its own tokens or heads alone."""
    fill = torch.ones if init == "ones" else torch.zeros
    parameter = nn.Parameter(fill(shape, dtype=dtype, device=device))
    whole = Box.full(shape)
    summed = tp if partial and tp.size > 1 else None
    parameter.shard = ShardSpec((Part(name, shape, ((whole, whole),), init, tp.size, tp.rank, summed),), decay)  # type: ignore[attr-defined]
    return parameter


def column_parallel(
    x: Tensor, linears: Sequence[ColumnParallelLinear], sequence_parallel: bool, keep_wide: bool = False
) -> tuple[Tensor, ...]:
    """The outputs of several layers of one input, which is gathered once and whose gradient is reduced once."""
    tp = linears[0].tp
    parameters = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
    adapters = [linear.lora for linear in linears if linear.lora is not None]
    parameters += [parameter for lora in adapters for parameter in (lora.a, None)]  # more products of the same input
    outputs = _ColumnParallel.apply(x, tp, sequence_parallel and tp.size > 1, keep_wide, *parameters)
    inner = iter(outputs[len(linears) :])
    return tuple(
        y if linear.lora is None else linear.lora.add(y, next(inner)) for y, linear in zip(outputs, linears, strict=False)
    )


def row_parallel(inputs: Sequence[Tensor], linears: Sequence[RowParallelLinear], sequence_parallel: bool) -> Tensor:
    """The sum of several layers' outputs, which is reduced once."""
    tp = linears[0].tp
    tensors: list[Tensor | None] = []
    for x, linear in zip(inputs, linears, strict=True):
        adapter = (None, None) if linear.lora is None else (linear.lora.a, linear.lora.b)
        tensors += (x, linear.weight, linear.bias, *adapter)
    scales = tuple(0.0 if linear.lora is None else linear.lora.scale for linear in linears)
    return _RowParallel.apply(tp, sequence_parallel and tp.size > 1, scales, *tensors)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: Axis, gather: bool, keep_wide: bool, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x if any(weight.requires_grad for weight, _ in _pairs(parameters)) else None)
        ctx.parameters, ctx.tp, ctx.gather, ctx.dtype = parameters, tp, gather, x.dtype
        x_TI = widen(all_gather(x, tp) if gather else x)
        dtype = x_TI.dtype if keep_wide else x.dtype
        return tuple(_product(x_TI, weight, dtype, bias) for weight, bias in _pairs(parameters))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        (x,), pairs = ctx.saved_tensors, _pairs(ctx.parameters)
        need_dx, needs = ctx.needs_input_grad[0], _pairs(ctx.needs_input_grad[4:])
        wanted = [(weight, dy) for (weight, _), dy, (need, _) in zip(pairs, dys, needs, strict=True) if need]
        if wanted and defer_linear_weight_gradients(wanted, x, ctx.tp if ctx.gather else None):
            wanted = []
        gathering = start_all_gather(x, ctx.tp) if ctx.gather and wanted else None
        reducing = None
        dys = tuple(widen(dy) for dy in dys)  # once for both products
        if need_dx:
            dx = _input_gradient(dys[0], pairs[0][0], ctx.dtype)
            for dy_TO, (weight_OI, _) in zip(dys[1:], pairs[1:], strict=True):
                _add_input_gradient(dx, dy_TO, weight_OI)
            reducing = start_reduce_scatter(dx, ctx.tp) if ctx.gather else start_all_reduce(dx, ctx.tp)
        x_TI = gathering.wait() if gathering else x
        gradients: list[Tensor | None] = []
        computed = {id(weight) for weight, _ in wanted}
        for dy_TO, (weight_OI, bias), (_, need_bias) in zip(dys, pairs, needs, strict=True):
            gradients.append(linear_weight_gradient(weight_OI, dy_TO, x_TI) if id(weight_OI) in computed else None)
            gradients.append(_bias_gradient(bias, dy_TO) if need_bias else None)
        return reducing.wait() if reducing else None, None, None, None, *gradients


class _RowParallel(torch.autograd.Function):
    """tensors: (x, weight, bias, A, B) of every layer; scales: of A and B, which are None where there is no adapter.

    x, which has the dtype of y, is kept for gradients of weights only.
    """

    @staticmethod
    def forward(ctx: Any, tp: Axis, scatter: bool, scales: tuple[float, ...], *tensors: Any) -> Tensor:
        layers = _layers(tensors)
        y_TO: Tensor | None = None
        saved: list[Tensor | None] = []
        for (x_TI, weight_OI, _, a_RI, b_OR), scale in zip(layers, scales, strict=True):
            if y_TO is None:
                y_TO = _product(x_TI, weight_OI, x_TI.dtype)
            else:
                _add_product(y_TO, x_TI, weight_OI)
            h_TR = None
            if a_RI is not None:  # a partial sum over the features of this rank, like the product with the weight
                h_TR = matmul(x_TI, a_RI.t()).mul_(scale)
                accumulate_matmul(y_TO, h_TR, b_OR.t())
            needed = weight_OI.requires_grad or (a_RI is not None and a_RI.requires_grad)
            saved += (x_TI if needed else None, h_TR)
        assert y_TO is not None
        ctx.save_for_backward(*saved)
        ctx.parameters, ctx.tp, ctx.scatter, ctx.scales = [layer[1:] for layer in layers], tp, scatter, scales
        y = reduce_scatter(y_TO, tp) if scatter else all_reduce(y_TO, tp)
        for _, _, bias, _, _ in layers:
            if bias is not None:
                y += bias
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved, needs = ctx.saved_tensors, _layers(ctx.needs_input_grad[3:])
        dy_TO = all_gather(dy, ctx.tp) if ctx.scatter else dy
        wide_TO = widen(dy_TO)
        gradients: list[Tensor | None] = []
        for x_TI, h_TR, (weight_OI, bias, a_RI, b_OR), need, scale in zip(
            saved[::2], saved[1::2], ctx.parameters, needs, ctx.scales, strict=True
        ):
            need_dx, need_dw, need_bias, need_da, need_db = need
            dx_TI = dweight = da = db = None
            if need_dw and not defer_linear_weight_gradients([(weight_OI, dy_TO)], x_TI):
                dweight = linear_weight_gradient(weight_OI, wide_TO, x_TI)
            if need_dx:
                dx_TI = _input_gradient(wide_TO, weight_OI, dy.dtype)
            if need_db and not defer_linear_weight_gradients([(b_OR, dy_TO)], h_TR):
                db = linear_weight_gradient(b_OR, wide_TO, h_TR)
            if a_RI is not None and (need_dx or need_da):
                dh_TR = matmul(wide_TO, b_OR, dy.dtype).mul_(scale)
                if dx_TI is not None:
                    accumulate_matmul(dx_TI, dh_TR, a_RI)
                if need_da and not defer_linear_weight_gradients([(a_RI, dh_TR)], x_TI):
                    da = linear_weight_gradient(a_RI, dh_TR, x_TI)
            gradients += (dx_TI, dweight, _bias_gradient(bias, dy) if need_bias else None, da, db)
        return None, None, None, *gradients


def _product(x_TI: Tensor, weight_OI: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in `dtype`."""
    kernel: str | None = getattr(weight_OI, "fp8", None)
    return matmul(x_TI, weight_OI.t(), dtype, bias) if kernel is None else fp8.product(x_TI, weight_OI, bias, kernel)


def _add_product(total_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """total += x W^T in place."""
    if hasattr(weight_OI, "fp8"):
        total_TO += _product(x_TI, weight_OI, total_TO.dtype)
    else:
        accumulate_matmul(total_TO, x_TI, weight_OI.t())


def _input_gradient(dy_TO: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """dy W in `dtype`."""
    kernel: str | None = getattr(weight_OI, "fp8", None)
    return matmul(dy_TO, weight_OI, dtype) if kernel is None else fp8.input_gradient(dy_TO, weight_OI, kernel)


def _add_input_gradient(total_TI: Tensor, dy_TO: Tensor, weight_OI: Tensor) -> None:
    """total += dy W in place."""
    if hasattr(weight_OI, "fp8"):
        total_TI += _input_gradient(dy_TO, weight_OI, total_TI.dtype)
    else:
        accumulate_matmul(total_TI, dy_TO, weight_OI)


def _layers(flat: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What belongs to x, weight, bias, A and B of every layer."""
    return [tuple(flat[place : place + 5]) for place in range(0, len(flat), 5)]


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(of the weight, of the bias) of every layer."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _bias_gradient(bias: Tensor, dy: Tensor) -> Tensor | None:
    return vector_weight_gradient(bias, dy.sum(0, dtype=stat_dtype(bias.dtype)))
