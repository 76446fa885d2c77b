"""Buckets hold every parameter once, aligned; the ranks' slices tile them; values survive the move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_llm.optim.buffers import Bucket
from megatron_llm.optim.layout import bucket_layout, default_bucket_size
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.shard import Box, Part, ShardSpec

TIED = Axis("tied", 0, 2, (0, 1))


def parameter(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Parameter:
    """A parameter that holds a whole logical tensor, numbered values; `fields` are those of its Part."""
    result = nn.Parameter(torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape) + 1)
    whole = Box.full(shape)
    result.shard = ShardSpec((Part(name, shape, ((whole, whole),), **fields),))  # type: ignore[attr-defined]
    return result


def make_buckets(parameters: list[nn.Parameter], axis: Axis, bucket_size: int) -> list[Bucket]:
    return [Bucket(layout, axis) for layout in bucket_layout(parameters, axis.size, bucket_size)]


shapes = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=2).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, size=st.integers(1, 4), bucket_size=st.integers(1, 600))
def test_slices_of_all_ranks_hold_every_element_once(shapes: list[tuple[int, ...]], size: int, bucket_size: int) -> None:
    found: dict[str, Tensor] = {f"p{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    visits = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    for rank in range(size):
        parameters = [parameter(f"p{i}", shape) for i, shape in enumerate(shapes)]
        buckets = make_buckets(parameters, Axis("dp", rank, size), bucket_size)
        order = [span.parameter for bucket in buckets for span in bucket.spans]
        assert list(map(id, order)) == list(map(id, reversed(parameters)))
        for bucket in buckets:
            _check_layout(bucket, rank, size)
            held = sum(span.parameter.numel() for span in bucket.spans)
            assert held >= bucket_size or bucket is buckets[-1]
            assert held - bucket.spans[-1].parameter.numel() < bucket_size, "closed as soon as it is full"
            for piece, a, b in bucket.pieces(bucket.lo, bucket.hi):
                found[piece.part.name][piece.box.slices] = piece.view(bucket.own_data[a:b])
                visits[piece.part.name][piece.box.slices] += 1
    for name, tensor in found.items():
        assert torch.equal(visits[name], torch.ones_like(tensor))
        assert torch.equal(tensor.flatten(), torch.arange(tensor.numel()) + 1.0)


def _check_layout(bucket: Bucket, rank: int, size: int) -> None:
    share, rest = divmod(bucket.data.numel(), size)
    assert rest == 0 and share % 64 == 0 and (bucket.lo, bucket.hi) == (rank * share, (rank + 1) * share)
    assert bucket.grad.shape == bucket.data.shape
    end = 0
    for span in bucket.spans:
        assert span.start % 64 == 0 and end <= span.start < end + 64 and span.stop - span.start == span.parameter.numel()
        end = span.stop
    assert end <= bucket.data.numel() < end + 64 * size
    used = torch.zeros(bucket.data.numel(), dtype=torch.bool)
    for span in bucket.spans:
        used[span.start : span.stop] = True
    assert not bucket.data[~used].any()
    owned = [(a, b) for _, _, a, b in bucket.parts(bucket.lo, bucket.hi)]
    assert all(0 <= a < b <= share for a, b in owned)
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(owned))
    assert sum(b - a for a, b in owned) == int(used[bucket.lo : bucket.hi].sum())


def test_parameters_become_views_of_the_buffers() -> None:
    p, q = parameter("p", (3, 5)), parameter("q", (7,))
    (bucket,) = make_buckets([p, q], Axis("dp"), 1000)
    assert torch.equal(p, torch.arange(15.0).view(3, 5) + 1) and torch.equal(q, torch.arange(7.0) + 1)
    bucket.data.mul_(2)
    assert torch.equal(p, 2 * (torch.arange(15.0).view(3, 5) + 1))
    p.main_grad[1, 2] = 5.0  # type: ignore[attr-defined]
    assert bucket.grad.nonzero().tolist() == [[64 + 7]]  # q lies first: reverse order
    assert p.main_grad.shape == p.shape  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("compute", "main"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gradients_are_kept_in_at_least_float32(compute: torch.dtype, main: torch.dtype) -> None:
    (bucket,) = make_buckets([parameter("p", (4,), compute)], Axis("dp"), 10)
    assert (bucket.data.dtype, bucket.grad.dtype) == (compute, main)


def test_tied_parameter_has_a_bucket_of_its_own_and_dtypes_do_not_mix() -> None:
    """Wherever the tied one comes in the order, so that both stages cut it alike."""
    for place in range(3):
        parameters = [parameter(name, (10,)) for name in ("a", "b")]
        tied = parameter("embedding", (10,), replicas=2, gradient_sum=TIED)
        parameters.insert(place, tied)
        buckets = make_buckets(parameters, Axis("dp", 0, 2), 10_000)
        assert [span.parameter is tied for bucket in buckets for span in bucket.spans].count(True) == 1
        (own,) = [bucket for bucket in buckets if any(span.parameter is tied for span in bucket.spans)]
        assert len(own.spans) == 1
    mixed = [parameter("a", (4,)), parameter("b", (4,), torch.float64), parameter("c", (4,), torch.float64)]
    assert [bucket.data.dtype for bucket in make_buckets(mixed, Axis("dp"), 10_000)] == [torch.float64, torch.float32]


def test_owned_replicas_are_the_replicated_rows() -> None:
    """A fused weight whose middle 2 of 6 rows another rank holds too, cut between two data-parallel ranks."""
    kv = Axis("kv_replica", 0, 2, (0, 1))
    parts = [
        Part("q", (3, 30), ((Box((0, 0), (3, 30)), Box((0, 0), (3, 30))),)),
        Part("k", (2, 30), ((Box((3, 0), (2, 30)), Box((0, 0), (2, 30))),), replicas=2, gradient_sum=kv),
        Part("x", (1, 30), ((Box((5, 0), (1, 30)), Box((0, 0), (1, 30))),)),
    ]
    found = []
    for rank in range(2):
        weight = nn.Parameter(torch.zeros(6, 30))
        weight.shard = ShardSpec(tuple(parts))  # type: ignore[attr-defined]
        (bucket,) = make_buckets([weight], Axis("dp", rank, 2), 10)
        assert bucket.hi - bucket.lo == 128
        found.append([(part.name, a, b) for part, a, b in bucket.owned_replicas()])
    assert found == [[("k", 90, 128)], [("k", 0, 150 - 128)]]


def test_the_default_size_leaves_several_buckets_and_fills_a_network() -> None:
    assert default_bucket_size(8_000_000_000, 8) == 40_000_000  # of an eighth, 1e9, and 8e6
    assert default_bucket_size(80_000_000, 8) == 10_000_000
    assert default_bucket_size(80_000_000, 64) == 64_000_000
    assert default_bucket_size(8_000_000_000, 64) == 64_000_000
    assert default_bucket_size(5000, 1) == 1_000_000


def test_frozen_parameters_are_left_out_and_one_order_keeps_neighbours_together() -> None:
    parameters = [parameter(name, (10,)) for name in "abcd"]
    parameters[1].requires_grad_(False)
    rank = {id(parameters[0]): 0, id(parameters[2]): 1, id(parameters[3]): 0}
    (layout,) = bucket_layout(parameters, 1, 1000, lambda p: rank[id(p)])
    assert [span.spec.parts[0].name for span in layout.spans] == ["d", "a", "c"]
