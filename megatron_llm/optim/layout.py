"""Which parameters share a bucket, and where they lie in it: pure arithmetic, for a rank's own buffers and for planning.

Called by `optim/buffers.py` and `planning/memory.py`. Layout after Megatron-LM's distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_llm.parallel.shard import ShardSpec

ALIGNMENT = 64  # elements; a parameter starts on a cache line, and on 128 bytes in bfloat16


@dataclass(frozen=True)
class Span:
    """A parameter's place in its bucket: elements [start, stop) of the bucket's flat buffers."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def spec(self) -> ShardSpec:
        return shard_of(self.parameter)


@dataclass(frozen=True)
class BucketLayout:
    """Attributes:
    spans: parameters of one dtype.
    share: elements that each data-parallel rank owns; of all of them together some are padding.
    """

    spans: tuple[Span, ...]
    share: int


def shard_of(parameter: nn.Parameter) -> ShardSpec:
    """What the parameter holds."""
    spec: ShardSpec = parameter.shard  # type: ignore[attr-defined]
    return spec


def default_bucket_size(elements: int, ranks: int) -> int:
    """Elements of a bucket, for that many parameters of a rank and data-parallel ranks.

    Eight buckets leave seven eighths of the communication something to hide behind. But a message below about a million
    elements a rank does not fill a network, and one above 40 million only comes later (Megatron-LM's rule, its upper end).
    """
    return max(1_000_000 * ranks, min(40_000_000, -(-elements // 8)))


def bucket_layout(
    parameters: Sequence[nn.Parameter],
    ranks: int,
    bucket_size: int | None = None,
    order: Callable[[nn.Parameter], Any] = lambda _: 0,
) -> list[BucketLayout]:
    """Buckets of at least `bucket_size` elements, in reverse order of the parameters: about that in which backward ends.

    All ranks of a model replica that hold parts of the same parameters lay them out alike, with room for the largest share of
    any: what they hold copies of, and add up slice by slice, lies at the same place on all of them.

    Those that are frozen are left out. The last bucket may be smaller. A parameter shared with another pipeline stage gets a
    bucket of its own: the two stages hold different layers, and only so do their slices of the shared one coincide.

    order: what parameters of a bucket are sorted by, so that those with one rule of update lie side by side.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if bucket_size is None:
        bucket_size = default_bucket_size(sum(map(_room, trainable)), ranks)
    layouts: list[BucketLayout] = []
    pending: list[nn.Parameter] = []

    def close() -> None:
        if pending:
            layouts.append(_lay_out(sorted(pending, key=order), ranks))
            pending.clear()

    for parameter in reversed(trainable):
        parts = shard_of(parameter).parts
        alone = any(part.gradient_sum is not None and part.gradient_sum.name == "tied" for part in parts)
        if alone or (pending and pending[0].dtype is not parameter.dtype):
            close()
        pending.append(parameter)
        if alone or sum(map(_room, pending)) >= bucket_size:
            close()
    close()
    return layouts


def _room(parameter: nn.Parameter) -> int:
    return max(shard_of(parameter).room, parameter.numel())


def _lay_out(parameters: Sequence[nn.Parameter], ranks: int) -> BucketLayout:
    spans = []
    end = 0
    for parameter in parameters:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + _room(parameter)
        spans.append(Span(parameter, start, start + parameter.numel()))
    return BucketLayout(tuple(spans), -(-end // (ranks * ALIGNMENT)) * ALIGNMENT)
