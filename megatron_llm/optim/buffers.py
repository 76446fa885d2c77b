"""Flat buffers for parameters and gradients, cut into buckets of which every data-parallel rank owns an equal slice.

Parameters lie in reverse order of registration, about the order in which backward finishes them. `param.data` and
`param.main_grad` become views: gradients accumulate in at least float32 in place, and one collective moves many
parameters. Slices ignore parameter boundaries; `parallel.shard.pieces` says what a slice holds.

Called by `optim/zero1.py`. Layout after Megatron-LM's distributed optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_llm.ops.dtypes import stat_dtype
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Part, Piece, ShardSpec, pieces
from megatron_llm.parallel.weight_grad import WeightGradients

_ALIGNMENT = 64  # elements; a parameter starts on a cache line, and on 128 bytes in bfloat16


@dataclass(frozen=True)
class Span:
    """A parameter's place in its bucket: elements [start, stop) of the bucket's flat buffers."""

    parameter: nn.Parameter
    spec: ShardSpec
    start: int
    stop: int


class Bucket:
    """Some parameters of one dtype in one flat buffer, reduced and gathered by one collective each.

    Attributes:
        data: flat compute weights [n]; grad: flat main gradients [n] in `stat_dtype`.
        lo, hi: the slice of both that this rank owns.
    """

    def __init__(self, parameters: list[nn.Parameter], axis: Axis):
        self.spans: list[Span] = []
        end = 0
        for parameter in parameters:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + parameter.numel()
            self.spans.append(Span(parameter, parameter.shard, start, end))  # type: ignore[attr-defined]
        share = -(-end // (axis.size * _ALIGNMENT)) * _ALIGNMENT
        self.lo, self.hi = axis.rank * share, (axis.rank + 1) * share
        first = parameters[0]
        self.data = torch.zeros(axis.size * share, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(axis.size * share, dtype=stat_dtype(first.dtype), device=first.device)
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
        return self.grad[self.lo : self.hi]

    def owned_spans(self) -> Iterator[tuple[Span, int, int]]:
        """(span, a, b): the elements [a, b) of this rank's slice that belong to each parameter."""
        for span in self.spans:
            a, b = max(span.start, self.lo), min(span.stop, self.hi)
            if a < b:
                yield span, a - self.lo, b - self.lo

    def owned_pieces(self) -> Iterator[tuple[Piece, int, int]]:
        """(piece, a, b): every rectangle of a logical tensor in this rank's slice; it lies in elements [a, b) of it."""
        for span, a, b in self.owned_spans():
            offset = self.lo - span.start
            for piece in pieces(span.spec, tuple(span.parameter.shape), a + offset, b + offset):
                yield piece, a, b

    def owned_ranges(self) -> Iterator[tuple[Part, int, int]]:
        """(part, a, b): elements [a, b) of this rank's slice that hold a logical tensor some other rank holds too."""
        for span in self.spans:
            width = span.parameter[0].numel() if span.parameter.dim() > 1 else 1
            for part in span.spec.parts:
                if part.replicas == 1:
                    continue
                for local, _ in part.pairs:
                    assert local.numel == local.shape[0] * width, "replicated parts are whole rows"
                    first = span.start + local.offset[0] * width
                    a, b = max(first, self.lo), min(first + local.numel, self.hi)
                    if a < b:
                        yield part, a - self.lo, b - self.lo


def default_bucket_size(elements: int, ranks: int) -> int:
    """Elements of a bucket, for that many parameters of a rank and data-parallel ranks.

    Eight buckets leave seven eighths of the communication something to hide behind. But a message below about a million
    elements a rank does not fill a network, and one above 40 million only comes later (Megatron-LM's rule, its upper end).
    """
    return max(1_000_000 * ranks, min(40_000_000, -(-elements // 8)))


def make_buckets(parameters: list[nn.Parameter], axis: Axis, bucket_size: int) -> list[Bucket]:
    """Buckets of at least `bucket_size` elements (the last may be smaller), in reverse order of the parameters.

    A parameter shared with another pipeline stage gets a bucket of its own: the two stages hold different layers, and
    only so do their slices of the shared one coincide.
    """
    buckets: list[Bucket] = []
    pending: list[nn.Parameter] = []

    def close() -> None:
        if pending:
            buckets.append(Bucket(list(pending), axis))
            pending.clear()

    for parameter in reversed(parameters):
        spec: ShardSpec = parameter.shard  # type: ignore[attr-defined]
        alone = any(part.gradient_sum is not None and part.gradient_sum.name == "tied" for part in spec.parts)
        if alone or (pending and pending[0].dtype is not parameter.dtype):
            close()
        pending.append(parameter)
        if alone or sum(p.numel() for p in pending) >= bucket_size:
            close()
    close()
    return buckets


def on_last_weight_gradient(buckets: list[Bucket], gradients: WeightGradients, last: Callable[[Bucket], None]) -> None:
    """From now on call `last(bucket)` in every step as soon as the last gradient of that bucket is in its buffer.

    A bucket without trainable parameters is never reported.
    """
    bucket_of = {span.parameter: bucket for bucket in buckets for span in bucket.spans if span.parameter.requires_grad}
    sizes = Counter(bucket_of.values())
    missing = sizes.copy()

    def parameter_done(parameter: nn.Parameter) -> None:
        bucket = bucket_of[parameter]
        missing[bucket] -= 1
        if missing[bucket] == 0:
            missing[bucket] = sizes[bucket]  # for the next step
            last(bucket)

    gradients.on_last = parameter_done
