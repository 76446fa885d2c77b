"""The head and its cross-entropy in chunks of tokens: logits are never all in memory. Called by `models/decoder.py`.

    for every chunk      x = all-gather(x_s)                 while the chunk before is worked on (sequence parallel)
                         logits = x W^T                      [chunk, V]
                         max, sum, target                    one pass over them
                         exchange of these                   12 bytes a token, while the next chunk's logits are made
                         logits := their gradient            in place
                         dx = logits W                       reduced (reduce-scatter to dx_s) during what follows
                         dW += logits^T x                    into the main gradient

All of it is the forward pass: whatever multiplies the objective (a loss scale) is known there. So each of T H V elements takes 6
FLOP, where a backward that made the logits again would take 8; x is gathered once instead of twice, and what waits for the
backward is dx, [S, H]. The price: dW cannot fill gaps of zero-bubble schedules, and who asks for gradients of a weight with a
`main_grad` must run the backward, of this very objective. The backward hands dx on, and counts the weight's gradient, so that
its bucket is reduced no earlier than any other.

Under sequence parallelism a chunk has the same rows of every rank's shard, so that chunks of x and dx are shards of chunks.
At most two chunks of logits are alive, on one rank one.

Shape suffixes: T tokens of a chunk, S rows of hidden states on this rank (all tokens, or its shard of them), H hidden,
V local vocabulary (padded). Labels and weights without suffix are of all tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_llm.ops.cross_entropy import Extra, Penalties
from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.ops.matmul import accumulate_matmul, matmul, widen
from megatron_llm.parallel.collectives import Handle, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron_llm.parallel.loss import Combined, VocabularySlice, weighted_sums
from megatron_llm.parallel.weight_grad import count_weight_gradient, vector_weight_gradient

CHUNK_BYTES = 1 << 29
LEAST_TOKENS = 2048


def chunk_tokens(vocabulary: int, size: int) -> int:
    """Tokens of a chunk whose logits, `size` bytes each, have so many columns on a rank: the largest power of two with which they
    take no more than CHUNK_BYTES, but LEAST_TOKENS at least.

    Each chunk reads and writes the float32 dW: 8 bytes for 2 * 2048 FLOP, which at 2048 tokens is below half of the product's own
    time on an H100 or H200 (about 180 FLOP a byte). 2048 tokens of 128,256 ids in bfloat16 are 501 MiB.
    """
    return max(LEAST_TOKENS, 1 << max(0, (CHUNK_BYTES // max(1, vocabulary * size)).bit_length() - 1))


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states, and which.

    Attributes:
        weight: [V, H]; bias: [V].
        vocabulary: which ids they are, on which ranks.
        gather: whether hidden states are this rank's tokens only.
    """

    weight: Tensor
    bias: Tensor | None
    vocabulary: VocabularySlice
    gather: bool


class _Chunk(NamedTuple):
    """Tokens whose statistics all ranks have. labels_T are ids of the whole vocabulary."""

    rows: slice
    x_TH: Tensor
    logits_TV: Tensor
    labels_T: Tensor
    of: Combined


def _chunks(x: Tensor, weight_VH: Tensor, head: Head, labels: Tensor, extra: Extra) -> Iterator[_Chunk]:
    """The chunks of x [S, H] in order. What is yielded is no longer held here."""
    tp, vocabulary = head.vocabulary.tp, head.vocabulary
    ranks = tp.size if head.gather else 1
    each = max(1, chunk_tokens(weight_VH.shape[0], weight_VH.element_size()) // ranks)
    places = [slice(start, min(start + each, len(x))) for start in range(0, len(x), each)]
    gathers = (start_all_gather(x[rows], tp) if head.gather else Handle(x[rows]) for rows in places)
    gathering = next(gathers, None)
    under_way: deque[tuple[slice, Tensor, Tensor, Tensor, Handle]] = deque()

    def finished() -> _Chunk:
        rows, x_TH, logits_TV, labels_T, exchange = under_way.popleft()
        return _Chunk(rows, x_TH, logits_TV, labels_T, vocabulary.combined(exchange, extra))

    for rows in places:
        assert gathering is not None
        x_TH = widen(gathering.wait())
        gathering = next(gathers, None)
        labels_T = chunk_of(labels, rows, ranks)
        logits_TV = _logits(x_TH, weight_VH, head)
        under_way.append((rows, x_TH, logits_TV, labels_T, vocabulary.start_exchange(logits_TV, labels_T, extra)))
        del x_TH, logits_TV
        if tp.size == 1 or len(under_way) > 1:
            yield finished()
    if under_way:
        yield finished()


def chunk_of(tokens: Tensor, rows: slice, ranks: int) -> Tensor:
    """Those of all tokens that a chunk has: the same rows of every rank's shard."""
    return tokens.view(ranks, -1)[:, rows].reshape(-1)


def _logits(x_TH: Tensor, weight_VH: Tensor, head: Head) -> Tensor:
    """[T, V]; for kernels of 16-byte loads rows begin at multiples of 16 elements, whatever V is."""
    vocabulary = len(weight_VH)
    if head.vocabulary.kernel == "torch" or vocabulary % 16 == 0:
        return matmul(x_TH, weight_VH.t(), x_TH.dtype, head.bias)
    logits_TV = x_TH.new_empty(len(x_TH), -(-vocabulary // 16) * 16)[:, :vocabulary]
    if head.bias is None:
        return torch.mm(x_TH, weight_VH.t(), out=logits_TV)
    return torch.addmm(head.bias.to(x_TH.dtype), x_TH, weight_VH.t(), out=logits_TV)


class _Gradients:
    """Of x, weight and bias, as chunks bring them in. A weight's goes into its `main_grad` if it has one."""

    def __init__(self, head: Head, weight_VH: Tensor, dtype: torch.dtype, chunks_are_one: bool, wanted: tuple[bool, bool, bool]):
        """weight_VH: the weight as products read it. dtype: of dx. wanted: of x, weight, bias."""
        self.head, self.weight_VH, self.dtype, self.wanted = head, weight_VH, dtype, wanted
        self.one = chunks_are_one
        self.dx: list[Tensor] = []
        self.dweight: Tensor | None = getattr(head.weight, "main_grad", None) if wanted[1] else None
        self.dbias: Tensor | None = None
        self._reducing: Handle | None = None

    def add(self, x_TH: Tensor, dlogits_TV: Tensor) -> None:
        need_dx, need_dweight, need_dbias = self.wanted
        tp, weight = self.head.vocabulary.tp, self.head.weight
        dlogits_TV = widen(dlogits_TV)  # once for both products
        if need_dx:
            dx = matmul(dlogits_TV, self.weight_VH, self.dtype)
            self._settle()
            self._reducing = start_reduce_scatter(dx, tp) if self.head.gather else start_all_reduce(dx, tp)
        if need_dweight and self.dweight is None and self.one:
            self.dweight = matmul(dlogits_TV.t(), x_TH, weight.dtype)
        elif need_dweight:
            if self.dweight is None:
                self.dweight = torch.zeros(weight.shape, dtype=stat_dtype(weight.dtype), device=weight.device)
            accumulate_matmul(self.dweight, dlogits_TV.t(), x_TH)
        if need_dbias:
            dbias = dlogits_TV.sum(0, dtype=stat_dtype(weight.dtype))
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)

    def _settle(self) -> None:
        if self._reducing is not None:
            self.dx.append(self._reducing.wait())
            self._reducing = None

    def finish(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight unless it is in a `main_grad`, dbias in the dtype of statistics); None where not wanted."""
        self._settle()
        dx = None
        if self.wanted[0]:
            dx = self.dx[0] if len(self.dx) == 1 else torch.cat(self.dx) if self.dx else torch.zeros_like(x)
        weight = self.head.weight
        dweight = None
        if self.wanted[1] and not hasattr(weight, "main_grad"):
            dweight = torch.zeros_like(weight) if self.dweight is None else self.dweight.to(weight.dtype)
        dbias = self.dbias
        if self.wanted[2] and dbias is None:
            dbias = torch.zeros(len(weight), dtype=stat_dtype(weight.dtype), device=weight.device)
        return dx, dweight, dbias


class _LinearObjective(torch.autograd.Function):
    """x, weight and bias are given besides `head` for autograd to see them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, head: Head, labels: Tensor, weights: Tensor,
        penalties: Penalties, scale: float, wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight_VH, ranks = widen(weight), head.vocabulary.tp.size if head.gather else 1
        dtype = stat_dtype(x.dtype)
        objective, loss = torch.zeros((2,), dtype=dtype, device=x.device).unbind()
        extra: Extra = "sum" if penalties.smoothing else ""
        gradients: _Gradients | None = None
        for chunk in _chunks(x, weight_VH, head, labels, extra):
            weights_T = chunk_of(weights, chunk.rows, ranks).to(dtype)
            more, plain = weighted_sums(chunk.of, weights_T, penalties)
            objective, loss = objective + more, loss + plain
            if any(wanted):
                if gradients is None:
                    gradients = _Gradients(head, weight_VH, x.dtype, chunk.rows.stop == len(x), wanted)
                head.vocabulary.gradient_(chunk.logits_TV, chunk.labels_T, chunk.of.lse_T, weights_T * scale, penalties)
                gradients.add(chunk.x_TH, chunk.logits_TV)
            del chunk  # before the next one is made
        gradients = gradients or _Gradients(head, weight_VH, x.dtype, True, wanted)
        ctx.save_for_backward(*gradients.finish(x))
        ctx.weight, ctx.bias, ctx.wanted = weight, bias, wanted
        ctx.mark_non_differentiable(loss)
        return objective * scale if scale != 1.0 else objective, loss

    @staticmethod
    def backward(ctx: Any, dobjective: Tensor, _: Tensor) -> tuple[Any, ...]:
        dx, dweight, dbias = ctx.saved_tensors
        if ctx.wanted[1] and dweight is None:
            torch._assert_async(dobjective == 1, "the head's gradient was made for the objective itself, not for a multiple")
            count_weight_gradient(ctx.weight)
        else:
            dx, dweight, dbias = (None if made is None else made * dobjective for made in (dx, dweight, dbias))
        if dbias is not None:
            dbias = vector_weight_gradient(ctx.bias, dbias)
        return dx, dweight, dbias, None, None, None, None, None, None


def linear_objective(
    x: Tensor, head: Head, labels: Tensor, weights: Tensor, penalties: Penalties = Penalties(), scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scale * sum over tokens of weight * (-log softmax(x W^T + b)[label]) with penalties, the sum without penalties and scale).

    Scalars in `stat_dtype`, equal on every rank of the axis; the second is a number without gradient. x: [S, H]; labels, weights:
    of all tokens. In grad mode gradients are made at once: dW is in the weight's `main_grad`, if it has one, when this returns.
    Beside a `main_grad` the backward may run once, and for a gradient of 1: `scale` is there for a loss scale.
    """
    tensors = (x, head.weight, head.bias)
    graded = torch.is_grad_enabled()
    wanted = tuple(graded and tensor is not None and tensor.requires_grad for tensor in tensors)
    return _LinearObjective.apply(*tensors, head, labels, weights, penalties, scale, wanted)


@torch.no_grad()
def linear_scores(x: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(-log softmax(x W^T + b)[label], whether the label is the most likely id) of every token: [T] in `stat_dtype`, bool [T].

    The same on every rank of the axis. Of several largest logits the one of the lowest id counts, as in `torch.argmax` of all.
    """
    ranks = head.vocabulary.tp.size if head.gather else 1
    losses, hits = [], []
    for chunk in _chunks(x, widen(head.weight), head, labels, "best"):
        losses.append((chunk.of.lse_T - chunk.of.target_T).view(ranks, -1))
        assert chunk.of.extra_T is not None
        hits.append(chunk.of.extra_T.eq(chunk.labels_T).view(ranks, -1))
        del chunk
    if not losses:
        return torch.zeros(0, dtype=stat_dtype(x.dtype), device=x.device), torch.zeros(0, dtype=torch.bool, device=x.device)
    return torch.cat(losses, 1).reshape(-1), torch.cat(hits, 1).reshape(-1)
