"""Cross-entropy over a vocabulary that is cut over the tensor-parallel axis. Called by `parallel/head.py`.

No rank sees all logits: per token the ranks exchange, once, a maximum, a sum of exponentials and the label's logit (12 bytes in
float32; 16 with label smoothing, which needs the sum of logits, and with accuracy, which needs the place of the maximum), and
each turns its own logits into their gradient in place:

    max = max_p max_p        sum = sum_p sum_p * exp(max_p - max)        lse = log(sum) + max        loss = lse - sum_p target_p

Shape suffixes: T tokens, V local vocabulary (padded), P ranks of the axis, C numbers of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_llm.ops.cross_entropy import Extra, Penalties, local_statistics, logits_gradient_
from megatron_llm.parallel.collectives import Handle, start_all_gather
from megatron_llm.parallel.grid import Axis


class Combined(NamedTuple):
    """Of every token, over all ids: log-sum-exp, the label's logit, and what `extra` asked for; all [T]."""

    lse_T: Tensor
    target_T: Tensor
    extra_T: Tensor | None


@dataclass(frozen=True)
class VocabularySlice:
    """This rank's columns of the logits, and what is made of them.

    Attributes:
        start, stop: columns [0, stop - start) are ids [start, stop); later ones are padding and take no part.
        tp: the ranks that have the others.
        cap: logits are cap * tanh(column / cap); None: they are the columns.
        kernel: "torch" or "triton".
    """

    start: int
    stop: int
    tp: Axis
    cap: float | None = None
    kernel: str = "torch"

    def start_exchange(self, logits_TV: Tensor, labels_T: Tensor, extra: Extra = "") -> Handle:
        """Begin to collect the statistics of all ranks, [P * T, C], for `combined`. extra: as in `local_statistics`."""
        width = self.stop - self.start
        statistics_TC = local_statistics(logits_TV, labels_T - self.start, width, extra, self.cap, self.kernel)
        if extra == "best":
            statistics_TC[:, 3] += self.start
        return start_all_gather(statistics_TC, self.tp)

    def combined(self, exchange: Handle, extra: Extra = "") -> Combined:
        """What the ranks' statistics are together. Of several largest logits the one of the lowest id is the best."""
        gathered = exchange.wait()
        max_PT, total_PT, target_PT, *more = gathered.view(self.tp.size, -1, gathered.shape[1]).unbind(2)
        max_T = max_PT.amax(0)
        lse_T = (total_PT * (max_PT - max_T).exp()).sum(0).log() + max_T
        extra_T = None
        if extra == "sum":
            extra_T = more[0].sum(0)
        elif extra == "best":
            extra_T = more[0].masked_fill(max_PT != max_T, torch.inf).amin(0)
        return Combined(lse_T, target_PT.sum(0), extra_T)

    def gradient_(self, logits_TV: Tensor, labels_T: Tensor, lse_T: Tensor, scale_T: Tensor, penalties: Penalties) -> None:
        """Overwrite logits by the gradient of the sum of scale * loss with penalties."""
        width = self.stop - self.start
        logits_gradient_(logits_TV, labels_T - self.start, lse_T, scale_T, penalties, width, self.cap, self.kernel)


def weighted_sums(of: Combined, weights_T: Tensor, penalties: Penalties) -> tuple[Tensor, Tensor]:
    """(sum over tokens of weight * loss with penalties, the same without). Smoothing needs the sum of logits."""
    loss = ((of.lse_T - of.target_T) * weights_T).sum()
    objective = loss.clone()
    if penalties.smoothing:  # the label's logit gives way to the mean of all
        assert of.extra_T is not None
        objective += penalties.smoothing * ((of.target_T - of.extra_T / penalties.vocabulary) * weights_T).sum()
    if penalties.z_loss:
        objective += penalties.z_loss * (of.lse_T.square() * weights_T).sum()
    return objective, loss


class _VocabParallelObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, vocabulary: VocabularySlice, penalties: Penalties
    ) -> tuple[Tensor, Tensor]:
        extra: Extra = "sum" if penalties.smoothing else ""
        of = vocabulary.combined(vocabulary.start_exchange(logits_TV, labels_T, extra), extra)
        weights_T = weights_T.to(of.lse_T.dtype)
        ctx.save_for_backward(logits_TV, labels_T, of.lse_T, weights_T)
        ctx.vocabulary, ctx.penalties = vocabulary, penalties
        objective, loss = weighted_sums(of, weights_T, penalties)
        ctx.mark_non_differentiable(loss)
        return objective, loss

    @staticmethod
    def backward(ctx: Any, dobjective: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_TV, labels_T, lse_T, weights_T = ctx.saved_tensors
        ctx.vocabulary.gradient_(logits_TV, labels_T, lse_T, weights_T * dobjective, ctx.penalties)
        return logits_TV, None, None, None, None


def vocab_parallel_cross_entropy(logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, vocabulary: VocabularySlice) -> Tensor:
    """Sum over tokens of weight * -log softmax(logits)[label], the same scalar on every rank of the axis.

    Of logits that are whole; training never has them (`parallel/head.py`). Backward may run once: it overwrites the logits by
    their gradient.
    """
    return vocab_parallel_objective(logits_TV, labels_T, weights_T, vocabulary, Penalties())[0]


def vocab_parallel_objective(
    logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor, vocabulary: VocabularySlice, penalties: Penalties
) -> tuple[Tensor, Tensor]:
    """(the same with penalties, `vocab_parallel_cross_entropy` as a number without gradient)."""
    return _VocabParallelObjective.apply(logits_TV, labels_T, weights_T, vocabulary, penalties)
