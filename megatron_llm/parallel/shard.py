"""How a local tensor relates to the whole model: the one description that everything else derives from.

Every parameter carries a `ShardSpec`. Initialization, Hugging Face import, checkpoints, the global gradient norm and
the summing of partial gradients all read it; nothing else in the project knows that a fused matrix holds q, k and v,
that KV heads are replicated, or that the vocabulary is padded.

A spec is a list of *parts*. A part is a logical tensor of the whole model (`layers.3.attention.k.weight`) and says which
rectangle of the local tensor holds which rectangle of it. Elements of the local tensor outside all rectangles are padding.

Called by: `parallel/linear.py`, `parallel/embedding.py`, `models/*` (make specs); `optim/zero1.py`, `checkpoint/`,
`training/build.py` (read them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megatron_llm.parallel.grid import Axis


@dataclass(frozen=True)
class Box:
    """A rectangle inside a tensor: `offset` of its first element and its `shape`, one number per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a whole tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index that selects the box from its tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common rectangle of two boxes of the same tensor, None if they do not touch."""
        starts = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True))
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def relative_to(self, origin: Box) -> Box:
        """The same box with offsets counted from the first element of `origin`."""
        return self.shifted(tuple(-start for start in origin.offset))

    def shifted(self, by: tuple[int, ...]) -> Box:
        """The same box moved by `by`."""
        return Box(tuple(start + move for start, move in zip(self.offset, by, strict=True)), self.shape)


@dataclass(frozen=True)
class Part:
    """The share of one logical tensor that a local tensor holds.

    Attributes:
        name: logical name in the whole model; independent of the layout, layer indices are global.
        shape: shape of the whole logical tensor, without any padding.
        pairs: (box of the local tensor, box of the logical tensor), equal shapes; none where a rank holds only padding.
        init: how a fresh model fills it; uniform: within the root of one over the inputs, as an adapter's A.
        replicas: how many ranks of one model copy (tensor and pipeline axes) hold these very elements.
        replica_rank: this rank's number among them; number 0 writes checkpoints.
        gradient_sum: axis over which the replicas' gradients are partial and must be added; None if each is complete.
        room: elements of it on the rank with the most, where ranks have different shares; 0: as many everywhere.
    """

    name: str
    shape: tuple[int, ...]
    pairs: tuple[tuple[Box, Box], ...]
    init: Literal["normal", "ones", "zeros", "uniform"] = "normal"
    replicas: int = 1
    replica_rank: int = 0
    gradient_sum: Axis | None = None
    room: int = 0


@dataclass(frozen=True)
class ShardSpec:
    """What a parameter holds.

    Attributes:
        decay: whether weight decay applies to it.
    """

    parts: tuple[Part, ...]
    decay: bool = True

    @property
    def room(self) -> int:
        """Elements that it has on the rank with the most of it, where ranks have different shares; 0: as many everywhere."""
        return sum(part.room for part in self.parts)


class TensorSource(Protocol):
    """Where values come from: a fresh initialization, a Hugging Face folder or a checkpoint."""

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of `box` of the logical tensor `part.name`: a CPU tensor of `box.shape` in the source's dtype.

        Raises ValueError naming the tensor if the source lacks it or has another shape.
        """
        ...


class TypedSource(TensorSource, Protocol):
    """A source that knows the dtypes of what it has not read yet: everything but a fresh initialization."""

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype of a logical tensor."""
        ...


_SLAB_ELEMENTS = 1 << 22  # an allocator hands out memory of this size again; larger pieces come new from the system each time


def slabs(box: Box) -> Iterator[Box]:
    """A box as boxes of whole rows that follow each other and are small whatever the tensor."""
    if not box.shape:
        yield box
        return
    rows = max(1, _SLAB_ELEMENTS // max(1, math.prod(box.shape[1:])))
    for first in range(0, box.shape[0], rows):
        yield Box((box.offset[0] + first, *box.offset[1:]), (min(rows, box.shape[0] - first), *box.shape[1:]))


def fill(values: Tensor, part: Part, box: Box, source: TensorSource) -> Iterator[int]:
    """Copy `box` of the logical tensor `part` from a source into `values`, of the same shape, a slab of rows at a time.

    So the memory beside `values` is small whatever the tensor. Yields the number of elements of each slab when it is there.
    """
    for slab in slabs(box):
        values[slab.relative_to(box).slices].copy_(source.read(part, slab))
        yield slab.numel


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor, and where it lies in the flat slice [lo, hi) of the local tensor that holds it."""

    part: Part
    box: Box
    _start: int
    _rectangle: Box
    _inner: Box

    def view(self, flat: Tensor) -> Tensor:
        """The piece inside `flat` (1-D, the hi - lo elements of the slice) as a view of shape `box.shape`."""
        return flat[self._start : self._start + self._rectangle.numel].view(self._rectangle.shape)[self._inner.slices]


def flat_boxes(lo: int, hi: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Rectangles, at most 2 * ndim - 1, that make up elements [lo, hi) of a row-major tensor of `shape`, in order."""
    if lo >= hi:
        return
    if not shape:
        yield Box((), ())
        return
    if len(shape) == 1:
        yield Box((lo,), (hi - lo,))
        return
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-lo // row), hi // row

    def inside(index: int, start: int, end: int) -> Iterator[Box]:
        for box in flat_boxes(start, end, shape[1:]):
            yield Box((index, *box.offset), (1, *box.shape))

    if first_whole > end_whole:  # the slice lies inside one row
        yield from inside(end_whole, lo - end_whole * row, hi - end_whole * row)
        return
    if lo < first_whole * row:
        yield from inside(first_whole - 1, lo - (first_whole - 1) * row, row)
    if first_whole < end_whole:
        yield Box((first_whole,) + (0,) * (len(shape) - 1), (end_whole - first_whole, *shape[1:]))
    if end_whole * row < hi:
        yield from inside(end_whole, 0, hi - end_whole * row)


def pieces(spec: ShardSpec, local_shape: tuple[int, ...], lo: int = 0, hi: int | None = None) -> Iterator[Piece]:
    """What elements [lo, hi) of a flattened local tensor are in the whole model. Padding belongs to no piece.

    A ZeRO-1 slice cuts parameters anywhere; this turns it into a few rectangles of logical tensors without gathering.
    """
    hi = math.prod(local_shape) if hi is None else hi
    for rectangle in flat_boxes(lo, hi, local_shape):
        start = sum(index * math.prod(local_shape[dim + 1 :]) for dim, index in enumerate(rectangle.offset)) - lo
        for part in spec.parts:
            for local, logical in part.pairs:
                common = rectangle.intersect(local)
                if common is not None:
                    move = tuple(b - a for a, b in zip(local.offset, logical.offset, strict=True))
                    yield Piece(part, common.shifted(move), start, rectangle, common.relative_to(rectangle))
