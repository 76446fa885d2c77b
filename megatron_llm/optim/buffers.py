"""Flat buffers for parameters and gradients, cut into buckets of which every data-parallel rank owns an equal slice.

`param.data` and `param.main_grad` become views: gradients accumulate in place, and one collective moves many parameters.
Slices ignore parameter boundaries; `parallel.shard.pieces` says what a slice holds. Called by `optim/zero1.py`.

How the gradients of a bucket become the sums that this rank owns, by the dtype of main gradients and that of the exchange:

    main       sent       collective        where the sums end up
    float32    float32    reduce-scatter    in the rank's slice of the gradients
    float32    bfloat16   all-to-all        in the gradients' own memory, of which half is sent and half receives
    bfloat16   bfloat16   all-to-all        in a float32 slice, which lives until the update

Every bfloat16 term is added in float32: a reduce-scatter in bfloat16 would round at each of its steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.optim.layout import BucketLayout, Span
from megatron_llm.parallel.collectives import Handle, start_all_gather, start_all_to_all, start_reduce_scatter
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Part, Piece, pieces
from megatron_llm.parallel.weight_grad import WeightGradients


class Bucket:
    """Some parameters of one dtype in one flat buffer, reduced and gathered by one collective each.

    Args:
        axis: of the ranks that share the bucket.
        main: dtype of the gradients; sent: dtype in which they are exchanged; at least float32 if None.

    Attributes:
        data: flat compute weights [n]; grad: flat main gradients [n].
        lo, hi: the slice of both that this rank owns.
        wide: dtype of sums of gradients, of masters and of statistics.
    """

    def __init__(self, layout: BucketLayout, axis: Axis, main: torch.dtype | None = None, sent: torch.dtype | None = None):
        self.spans, self.axis = layout.spans, axis
        self.lo, self.hi = axis.rank * layout.share, (axis.rank + 1) * layout.share
        first = self.spans[0].parameter
        self.wide = stat_dtype(first.dtype)
        self._sent = sent or main or self.wide
        self.data = torch.zeros(axis.size * layout.share, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(axis.size * layout.share, dtype=main or self.wide, device=first.device)
        self._own_grad: Tensor | None = None
        self._reducing: Handle | None = None
        for span in self.spans:
            view = self.data[span.start : span.stop].view(span.parameter.shape)
            view.copy_(span.parameter.data)
            span.parameter.data = view
            span.parameter.main_grad = self.grad[span.start : span.stop].view(view.shape)  # type: ignore[attr-defined]

    @property
    def own_data(self) -> Tensor:
        return self.data[self.lo : self.hi]

    @property
    def own_grad(self) -> Tensor:
        """Sums over the ranks of what this rank owns, [hi - lo] in `wide`, after `finish_reduce`."""
        assert self._own_grad is not None, "gradients are read before they are reduced"
        return self._own_grad

    def start_reduce(self) -> None:
        """Begin to add up the ranks' gradients, unless that has begun. `grad` must not be touched from here to the next step."""
        if self._reducing is not None or self._own_grad is not None:
            return
        if self.axis.size == 1 or self._sent is self.wide:
            own = self.grad[self.lo : self.hi] if self.axis.size > 1 else None
            self._reducing = start_reduce_scatter(self.grad, self.axis, own)
        elif self.grad.dtype is self._sent:
            self._reducing = start_all_to_all(self.grad, self.axis)
        else:
            received, sent = self.grad.view(self._sent).chunk(2)
            sent.copy_(self.grad.to(self._sent))  # through a copy: the places of source and target overlap
            self._reducing = start_all_to_all(sent, self.axis, received)

    def finish_reduce(self) -> None:
        """Wait until `own_grad` holds the sums."""
        self.start_reduce()
        if self._reducing is None:
            return
        result, self._reducing = self._reducing.wait(), None
        if self.axis.size == 1:
            self._own_grad = result.to(self.wide)
        elif self._sent is self.wide:
            self._own_grad = result
        else:
            terms = result.view(self.axis.size, -1)
            if self.grad.dtype is self.wide:
                behind = self.grad[self.grad.numel() // 2 :]  # what was sent
                self._own_grad = torch.sum(terms, 0, dtype=self.wide, out=behind[: self.hi - self.lo])
            else:
                self._own_grad = torch.sum(terms, 0, dtype=self.wide)

    def start_gather(self) -> Handle:
        """Begin to collect the sums of all ranks: [n] in `wide`, mostly in the place of the gradients."""
        if self.axis.size == 1:
            return Handle(self.own_grad)
        own, whole = self.own_grad, self.grad
        if whole.dtype is not self.wide:
            whole = torch.empty(whole.shape, dtype=self.wide, device=whole.device)
        elif self._sent is not self.wide:
            own = self._own_grad = own.clone()  # it lies where the sums of others will
        return start_all_gather(own, self.axis, whole)

    def forget_gradients(self) -> None:
        """Before a step: nothing has been added."""
        assert self._reducing is None
        self._own_grad = None
        self.grad.zero_()

    def pieces(self, lo: int, hi: int) -> Iterator[tuple[Piece, int, int]]:
        """(piece, a, b): every rectangle of a logical tensor in elements [lo, hi) of the bucket; it lies in [a, b) of them."""
        for span in self.spans:
            a, b = max(span.start, lo), min(span.stop, hi)
            if a < b:
                for piece in pieces(span.spec, tuple(span.parameter.shape), a - span.start, b - span.start):
                    yield piece, a - lo, b - lo

    def parts(self, lo: int, hi: int) -> Iterator[tuple[Span, Part, int, int]]:
        """(span, part, a, b): elements [a, b) of [lo, hi) hold a part of that parameter; parts are whole rows of it."""
        for span in self.spans:
            width = span.parameter[0].numel() if span.parameter.dim() > 1 else 1
            for part in span.spec.parts:
                for local, _ in part.pairs:
                    assert local.numel == local.shape[0] * width, "parts are whole rows of the local tensor"
                    first = span.start + local.offset[0] * width
                    a, b = max(first, lo), min(first + local.numel, hi)
                    if a < b:
                        yield span, part, a - lo, b - lo

    def owned_replicas(self) -> Iterator[tuple[Part, int, int]]:
        """(part, a, b): elements [a, b) of this rank's slice that hold a logical tensor some other rank holds too."""
        for _, part, a, b in self.parts(self.lo, self.hi):
            if part.replicas > 1:
                yield part, a, b


def on_last_weight_gradient(buckets: list[Bucket], gradients: WeightGradients, last: Callable[[Bucket], None]) -> None:
    """From now on call `last(bucket)` in every step as soon as the last gradient of that bucket is in its buffer."""
    bucket_of: dict[nn.Parameter, Bucket] = {span.parameter: bucket for bucket in buckets for span in bucket.spans}
    sizes = Counter(bucket_of.values())
    missing = sizes.copy()

    def parameter_done(parameter: nn.Parameter) -> None:
        bucket = bucket_of[parameter]
        missing[bucket] -= 1
        if missing[bucket] == 0:
            missing[bucket] = sizes[bucket]  # for the next step
            last(bucket)

    gradients.on_last = parameter_done
