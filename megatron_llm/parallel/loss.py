"""Cross-entropy over a vocabulary that is cut over the tensor-parallel axis. Called by `models/decoder.py`.

No rank sees all logits: per token the ranks exchange a maximum, a sum of exponentials and the label's logit
(12 bytes in float32; with label smoothing the sum of logits besides), and each turns its own logits into their gradient in place.

Shape suffixes: T tokens, V local vocabulary (padded), U local vocabulary without padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.ops.cross_entropy import Penalties, local_statistics, logits_gradient_, logits_sums
from megatron_llm.parallel.collectives import all_reduce
from megatron_llm.parallel.grid import Axis


class _VocabParallelObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, start: int, stop: int, tp: Axis, penalties: Penalties
    ) -> tuple[Tensor, Tensor]:
        logits_TU = logits_TV[:, : stop - start]
        local_T = labels_T - start
        maximum_T, total_T, target_T = local_statistics(logits_TU, local_T)
        global_max_T = all_reduce(maximum_T.clone(), tp, dist.ReduceOp.MAX)
        total_T = total_T * (maximum_T - global_max_T).exp()
        smoothed = [logits_sums(logits_TU)] if penalties.smoothing else []
        total_T, target_T, *smoothed = all_reduce(torch.stack((total_T, target_T, *smoothed)), tp).unbind()
        log_sum_exp_T = total_T.log() + global_max_T
        weights_T = weights_T.to(log_sum_exp_T.dtype)
        ctx.save_for_backward(logits_TV, local_T, log_sum_exp_T, weights_T)
        ctx.width, ctx.penalties = stop - start, penalties
        loss = ((log_sum_exp_T - target_T) * weights_T).sum()
        objective = loss.clone()
        if smoothed:  # the label's logit gives way to the mean of all
            mean_T = smoothed[0] / penalties.vocabulary
            objective += penalties.smoothing * ((target_T - mean_T) * weights_T).sum()
        if penalties.z_loss:
            objective += penalties.z_loss * (log_sum_exp_T.square() * weights_T).sum()
        ctx.mark_non_differentiable(loss)
        return objective, loss

    @staticmethod
    def backward(ctx: Any, dobjective: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        logits_TV, local_T, log_sum_exp_T, weights_T = ctx.saved_tensors
        logits_gradient_(logits_TV[:, : ctx.width], local_T, log_sum_exp_T, weights_T * dobjective, ctx.penalties)
        logits_TV[:, ctx.width :] = 0
        return logits_TV, None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, start: int, stop: int, tp: Axis
) -> Tensor:
    """Sum over tokens of weight * -log softmax(logits)[label], the same scalar on every rank of the axis.

    Columns [0, stop - start) of `logits_TV` are ids [start, stop); later columns are padding and take no part.
    Backward may run once: it overwrites the logits by their gradient.
    """
    return vocab_parallel_objective(logits_TV, labels_T, weights_T, start, stop, tp, Penalties())[0]


def vocab_parallel_objective(
    logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, start: int, stop: int, tp: Axis, penalties: Penalties
) -> tuple[Tensor, Tensor]:
    """(the same with penalties, `vocab_parallel_cross_entropy` as a number without gradient)."""
    return _VocabParallelObjective.apply(logits_TV, labels_T, weights_T, start, stop, tp, penalties)
