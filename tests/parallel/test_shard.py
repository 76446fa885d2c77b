"""Boxes and pieces: every cut of a flat tensor is tiled exactly once by rectangles that hold the right elements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.linear import OutputShard, sharded_weight
from megatron_llm.parallel.shard import Box, Part, ShardSpec, flat_boxes, pieces

fast = settings(max_examples=150, deadline=None)


def _numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(offset, tuple(draw(st.integers(1, size - start)) for size, start in zip(shape, offset, strict=True)))


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@fast
@given(st.data(), shapes)
def test_flat_boxes_are_the_slice_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    lo = data.draw(st.integers(0, numel))
    hi = data.draw(st.integers(lo, numel))
    found = list(flat_boxes(lo, hi, shape))
    elements = [element for box in found for element in _numbered(shape)[box.slices].flatten().tolist()]
    assert elements == list(range(lo, hi))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(len(box.offset) == len(box.shape) == len(shape) for box in found)


@fast
@given(st.data(), shapes)
def test_intersection_is_that_of_the_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    numbered = _numbered(shape)
    expected = set(numbered[a.slices].flatten().tolist()) & set(numbered[b.slices].flatten().tolist())
    common = a.intersect(b)
    assert (set(numbered[common.slices].flatten().tolist()) if common else set()) == expected
    if common:
        assert common.numel == len(expected)
        assert torch.equal(numbered[a.slices][common.relative_to(a).slices], numbered[common.slices])


@st.composite
def sharded_locals(draw: st.DrawFn) -> tuple[ShardSpec, tuple[int, ...]]:
    """A local matrix or vector that fuses row ranges of several logical tensors, with padding rows between them."""
    inner = draw(st.lists(st.integers(1, 4), max_size=2).map(tuple))
    parts, row = [], 0
    for number in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 6)), *(size + draw(st.integers(0, 2)) for size in inner))
        offset = tuple(draw(st.integers(0, size - held)) for size, held in zip(shape[1:], inner, strict=True))
        pairs = []
        for _ in range(draw(st.integers(0, 2))):
            start = draw(st.integers(0, shape[0] - 1))
            rows = draw(st.integers(1, shape[0] - start))
            row += draw(st.integers(0, 1))
            pairs.append((Box((row,) + (0,) * len(inner), (rows, *inner)), Box((start, *offset), (rows, *inner))))
            row += rows
        parts.append(Part(f"part{number}", shape, tuple(pairs)))
    return ShardSpec(tuple(parts)), (row + draw(st.integers(1, 2)), *inner)


def _logical(part: Part) -> Tensor:
    """Distinct values over all parts."""
    return _numbered(part.shape) + 1000 * int(part.name.removeprefix("part")) + 1


@fast
@given(st.data(), sharded_locals())
def test_pieces_of_all_cuts_tile_the_tensor_once(data: st.DataObject, local: tuple[ShardSpec, tuple[int, ...]]) -> None:
    """Filling every piece of every slice from the logical tensors gives what the pairs say; padding is never touched."""
    spec, shape = local
    expected = torch.zeros(shape, dtype=torch.int64)
    for part in spec.parts:
        for inside, logical in part.pairs:
            expected[inside.slices] = _logical(part)[logical.slices]
    numel = math.prod(shape)
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=4))})
    flat, visits = torch.zeros(numel, dtype=torch.int64), torch.zeros(numel, dtype=torch.int64)
    for lo, hi in zip(cuts[:-1], cuts[1:], strict=True):
        for piece in pieces(spec, shape, lo, hi):
            view = piece.view(flat[lo:hi])
            assert tuple(view.shape) == piece.box.shape
            view.copy_(_logical(piece.part)[piece.box.slices])
            piece.view(visits[lo:hi]).add_(1)
    assert torch.equal(flat.view(shape), expected)
    assert torch.equal(visits.view(shape), (expected > 0).long())


def test_pieces_default_to_the_whole_tensor() -> None:
    part = Part("w", (4, 3), ((Box.full((2, 3)), Box((2, 0), (2, 3))),))
    (piece,) = pieces(ShardSpec((part,)), (2, 3))
    assert piece.box == Box((2, 0), (2, 3)) and torch.equal(piece.view(torch.arange(6)), _numbered((2, 3)))


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (9, 4, [(0, 3), (3, 6), (6, 9), (9, 9)]),  # the last holds only padding
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (1, 4, [(0, 1), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_even_shards(rows: int, size: int, expected: list[tuple[int, int]]) -> None:
    shards = [OutputShard.even("w", rows, Axis("tp", rank, size)) for rank in range(size)]
    assert [(shard.start, shard.stop) for shard in shards] == expected
    assert {shard.local_rows for shard in shards} == {-(-rows // size)}


def test_spec_of_a_fused_weight_by_hand() -> None:
    """Rank 3 of 4 of q (8 rows), x (5 rows, here only padding) and k (2 heads of 2 rows, each on 2 ranks)."""
    tp, replica = Axis("tp", 3, 4), Axis("kv_replica", 1, 2)
    shards = [
        OutputShard.even("q", 8, tp),
        OutputShard.even("x", 5, tp),
        OutputShard.of("k", 4, range(1, 2), 1, 2, replica),
    ]
    weight = sharded_weight(7, shards, torch.float64, torch.device("cpu"))
    assert weight.shape == (6, 7) and weight.dtype is torch.float64 and not weight.any()
    spec: ShardSpec = weight.shard  # type: ignore[attr-defined]
    assert spec == ShardSpec(
        (
            Part("q", (8, 7), ((Box((0, 0), (2, 7)), Box((6, 0), (2, 7))),), room=14),
            Part("x", (5, 7), (), room=14),
            Part("k", (4, 7), ((Box((4, 0), (2, 7)), Box((2, 0), (2, 7))),), "normal", 2, 1, replica, 14),
        ),
    )
    assert spec.room == 42
