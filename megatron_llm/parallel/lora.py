"""Low-rank adapters of the linear layers: y = x W^T + scale * (x A^T) B^T (LoRA: Hu et al. 2021, arXiv 2106.09685).

An adapter belongs to one logical weight (q, not the q, k, v that share a GEMM) and is cut as that is. `parallel/linear.py`
computes with it, inside the calls that the layer makes anyway, so that no message is added to a micro-batch:

    column-parallel   A [R, I] on every rank; B [O, R] cut with the rows of the weight
    forward           h = x A^T: one more product of the gathered x;  y += scale h B^T
    input gradient    dh = scale dy B;  dx = dy W + dh A, reduced once
    gradients         dB += dy^T h;  dA += dh^T x with the x that is gathered again: a partial sum over tp

    row-parallel      A [R, I] cut with the columns of the weight; B [O, R] on every rank
    forward           y = reduced(x W^T + scale (x A^T) B^T): both are partial sums, and added before the reduction
    input gradient    dh = scale dy B;  dx = dy W + dh A
    gradients         dA += dh^T x;  dB += dy^T h: a partial sum over tp

The partial sums are added at the end of a step with those of norms (`optim/zero1.py`). What it costs: 2 T R (I + O) more FLOPs
forward and twice that backward; T R elements (h) from forward to backward. The frozen W has no gradient, a third of its work.

The A of parts of one weight are one matrix and one product; a part's B multiplies its own R columns of h.

Shape suffixes: T tokens, I input features, O output features (local), R rank, N ranks of all adapted parts together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.config.peft import LORA_A, LORA_B
from megatron_llm.ops.matmul import accumulate_matmul, matmul
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, ShardSpec
from megatron_llm.parallel.weight_grad import defer_linear_weight_gradients, linear_weight_gradient


class ColumnLora(nn.Module):
    """The adapters of parts of a column-parallel weight.

    Args:
        weight_OI: whose `shard` says which rows are which part's. parts: those with an adapter, in its order.

    Attributes:
        a: [N, I]; b: [O of the part, R] for every part.
    """

    def __init__(self, weight_OI: nn.Parameter, tp: Axis, parts: list[Part], rank: int, scale: float):
        super().__init__()
        self.scale, self.rank, inputs = scale, rank, weight_OI.shape[1]
        summed = tp if tp.size > 1 else None
        a_parts, self.b, self.rows = [], nn.ParameterList(), list[slice]()
        for number, part in enumerate(parts):
            name, size = part.name.removesuffix(".weight"), (rank, inputs)
            held = ((Box((number * rank, 0), size), Box.full(size)),)
            a_parts.append(Part(name + LORA_A, size, held, "uniform", tp.size, tp.rank, summed))
            rows, boxes = slice(0, 0), []
            for local, logical in part.pairs:  # one, or none where a rank holds nothing of the part
                rows, size = local.slices[0], (local.shape[0], rank)
                boxes.append((Box.full(size), Box((logical.offset[0], 0), size)))
            b_part = Part(
                name + LORA_B, (part.shape[0], rank), tuple(boxes), "zeros", part.replicas, part.replica_rank, part.gradient_sum,
                part.room // inputs * rank,
            )  # fmt: skip
            self.b.append(_parameter(weight_OI, (rows.stop - rows.start, rank), b_part))
            self.rows.append(rows)
        self.a = _parameter(weight_OI, (len(parts) * rank, inputs), *a_parts)

    @classmethod
    def of(cls, weight_OI: nn.Parameter, tp: Axis, targets: frozenset[str], rank: int, scale: float) -> ColumnLora | None:
        """Adapters of the parts whose weights are among `targets`; None if there is no such part."""
        parts = _targeted(weight_OI, targets)
        return cls(weight_OI, tp, parts, rank, scale) if parts else None

    def add(self, y_TO: Tensor, h_TN: Tensor) -> Tensor:
        """y += scale h B^T in place, part by part; h is x A^T."""
        result: Tensor = _AddLowRank.apply(y_TO, h_TN, self.scale, self.rank, self.rows, *self.b)
        return result


class RowLora(nn.Module):
    """The adapter of a row-parallel weight.

    Attributes:
        a: [R, I of this rank]; b: [O, R].
    """

    def __init__(self, weight_OI: nn.Parameter, tp: Axis, part: Part, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        (outputs, inputs), name = weight_OI.shape, part.name.removesuffix(".weight")
        boxes = tuple(
            (Box((0, local.offset[1]), (rank, local.shape[1])), Box((0, logical.offset[1]), (rank, logical.shape[1])))
            for local, logical in part.pairs
        )
        a_part = Part(name + LORA_A, (rank, part.shape[1]), boxes, "uniform", room=part.room // outputs * rank)
        whole = Box.full((outputs, rank))
        summed = tp if tp.size > 1 else None
        b_part = Part(name + LORA_B, whole.shape, ((whole, whole),), "zeros", tp.size, tp.rank, summed)
        self.a = _parameter(weight_OI, (rank, inputs), a_part)
        self.b = _parameter(weight_OI, whole.shape, b_part)

    @classmethod
    def of(cls, weight_OI: nn.Parameter, tp: Axis, targets: frozenset[str], rank: int, scale: float) -> RowLora | None:
        """The adapter, if the weight is among `targets`."""
        parts = _targeted(weight_OI, targets)
        return cls(weight_OI, tp, parts[0], rank, scale) if parts else None


def _targeted(weight: nn.Parameter, targets: frozenset[str]) -> list[Part]:
    spec: ShardSpec = weight.shard  # type: ignore[attr-defined]
    return [part for part in spec.parts if part.name in targets]


def _parameter(like: Tensor, shape: tuple[int, ...], *parts: Part) -> nn.Parameter:
    parameter = nn.Parameter(like.new_zeros(shape))
    parameter.shard = ShardSpec(parts)  # type: ignore[attr-defined]
    return parameter


class _AddLowRank(torch.autograd.Function):
    """y[:, rows of a part] += scale h[:, R columns of the part] B^T, in place."""

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, h_TN: Tensor, scale: float, rank: int, rows: list[slice], *bs: Tensor) -> Tensor:
        scaled_TN = h_TN * scale
        for y_TP, h_TR, b_PR in zip((y_TO[:, part] for part in rows), scaled_TN.split(rank, 1), bs, strict=True):
            accumulate_matmul(y_TP, h_TR, b_PR.t())
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(scaled_TN)
        ctx.bs, ctx.scale, ctx.rank, ctx.rows = bs, scale, rank, rows
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Any, ...]:
        (scaled_TN,), need_dbs = ctx.saved_tensors, ctx.needs_input_grad[5:]
        dh_TN = torch.empty_like(scaled_TN)
        gradients: list[Tensor | None] = []
        pieces = zip(ctx.rows, scaled_TN.split(ctx.rank, 1), dh_TN.split(ctx.rank, 1), ctx.bs, need_dbs, strict=True)
        for rows, h_TR, dh_TR, b_PR, need_db in pieces:
            dy_TP = dy_TO[:, rows]
            dh_TR.copy_(matmul(dy_TP, b_PR))
            later = need_db and defer_linear_weight_gradients([(b_PR, dy_TP)], h_TR)
            gradients.append(linear_weight_gradient(b_PR, dy_TP, h_TR) if need_db and not later else None)
        return dy_TO, dh_TN.mul_(ctx.scale), None, None, None, *gradients
