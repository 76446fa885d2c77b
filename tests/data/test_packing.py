"""Packing loses nothing, fits, is stable over epochs, equals a plain search, and the C++ equals the Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data import packing as packing_module
from megatron_llm.data.order import hash64
from megatron_llm.data.packing import Method, best_fit_decreasing_reference, pack

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The rule word for word, in quadratic time: least room that fits; among equals the latest to have got there."""
    rooms: list[tuple[int, int]] = []  # (room, time of the last change) of every bin
    bins = []
    for time, length in enumerate(lengths):
        fitting = [(room, -changed, bin_) for bin_, (room, changed) in enumerate(rooms) if room >= length]
        bin_ = min(fitting)[2] if fitting else len(rooms)
        if not fitting:
            rooms.append((capacity, time))
        rooms[bin_] = (rooms[bin_][0] - length, time)
        bins.append(bin_)
    return bins


@given(lengths=LENGTHS, capacity=st.integers(40, 90))
def test_reference_is_best_fit(lengths: list[int], capacity: int) -> None:
    falling = sorted(lengths, reverse=True)
    assert best_fit_decreasing_reference(np.asarray(falling), capacity).tolist() == plain_best_fit(falling, capacity)


@settings(max_examples=300)
@given(lengths=LENGTHS, capacity=st.integers(40, 200))
def test_native_equals_reference(lengths: list[int], capacity: int) -> None:
    native = pytest.importorskip("megatron_llm._native", reason="C++ extension not built")
    falling = np.asarray(sorted(lengths, reverse=True))
    assert native.best_fit_decreasing(falling, capacity).tolist() == best_fit_decreasing_reference(falling, capacity).tolist()


@pytest.mark.parametrize("shape", ["log-normal", "few lengths", "mostly short", "uniform"])
def test_native_equals_reference_on_many_items(shape: str) -> None:
    native = pytest.importorskip("megatron_llm._native", reason="C++ extension not built")
    random = np.random.default_rng(1)
    lengths = {
        "log-normal": np.clip(np.exp(random.normal(5, 1.2, 20_000)).astype(np.int64), 1, 1024),
        "few lengths": random.choice([1, 7, 300, 511, 512, 513, 1024], 20_000),
        "mostly short": np.minimum(random.geometric(0.2, 20_000), 1024),
        "uniform": random.integers(1, 1025, 20_000),
    }[shape]
    falling = np.sort(lengths)[::-1].copy()
    assert np.array_equal(native.best_fit_decreasing(falling, 1024), best_fit_decreasing_reference(falling, 1024))


def plain_pack(lengths: list[int], capacity: int, seed: int, epoch: int, group: int) -> list[list[int]]:
    """Rows of `pack` from the rule: groups, random order among equal lengths, best fit."""
    rows = []
    for number, first in enumerate(range(0, len(lengths), group)):
        part = lengths[first : first + group]
        keys = np.random.Philox(key=hash64(seed, epoch, number)).random_raw(len(part)).tolist()
        order = sorted(range(len(part)), key=lambda i: (-part[i], keys[i]))
        bins = plain_best_fit([part[i] for i in order], capacity)
        rows += [[first + i for i, bin_ in zip(order, bins, strict=True) if bin_ == row] for row in range(max(bins) + 1)]
    return rows


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    capacity=st.sampled_from([40, 77, 1 << 20]),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 3),
    group=st.integers(1, 100),
    native=st.booleans(),
)
def test_rows_are_those_of_the_rule(lengths: list[int], capacity: int, seed: int, epoch: int, group: int, native: bool) -> None:
    """With and without the extension."""
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(packing_module, "_native_best_fit", None)
        packing = pack(np.asarray(lengths, np.int32), capacity, "best_fit", seed, epoch, group)
    assert [packing.row(i).tolist() for i in range(packing.rows)] == plain_pack(lengths, capacity, seed, epoch, group)


@pytest.mark.parametrize("median", [245, 600])
def test_near_the_lower_bound_on_log_normal_lengths(median: int) -> None:
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(np.log(median), 1.0, 100_000)).astype(np.int64), 1, 4096)
    packing = pack(lengths, 4096, "best_fit", 0, 0)
    assert packing.rows <= 1.001 * np.ceil(lengths.sum() / 4096)


def test_native_refuses_what_it_cannot_pack() -> None:
    native = pytest.importorskip("megatron_llm._native", reason="C++ extension not built")
    for lengths in ([1, 2], [9], [0]):
        with pytest.raises(ValueError, match="lengths must fall"):
            native.best_fit_decreasing(np.asarray(lengths), 8)


@given(
    lengths=LENGTHS,
    capacity=st.integers(40, 90),
    method=st.sampled_from(["best_fit", "in_order", "none"]),
    seed=st.integers(0, 9),
    group=st.integers(1, 100),
)
def test_every_item_lands_in_one_row_and_rows_fit(
    lengths: list[int], capacity: int, method: Method, seed: int, group: int
) -> None:
    packings = [pack(np.asarray(lengths), capacity, method, seed, epoch, group) for epoch in (0, 1)]
    for packing in packings:
        assert sorted(packing.items.tolist()) == list(range(len(lengths)))
        assert packing.starts[0] == 0
        assert packing.starts[-1] == len(lengths)
        for row in range(packing.rows):
            assert 1 <= sum(lengths[item] for item in packing.row(row)) <= capacity
    # Epochs permute among equal lengths only.
    assert packings[0].starts.tolist() == packings[1].starts.tolist()
    assert [lengths[i] for i in packings[0].items] == [lengths[i] for i in packings[1].items]


def test_epochs_and_seeds_mix_items_of_equal_length() -> None:
    lengths = np.full(60, 10)
    items = {tuple(pack(lengths, 40, "best_fit", seed, epoch).items.tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(items) == 4
    again = pack(lengths, 40, "best_fit", 1, 1)
    assert tuple(again.items.tolist()) in items


@settings(deadline=None)
@given(lengths=LENGTHS, method=st.sampled_from(["in_order", "none"]), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_rising(lengths: list[int], method: Method, seed: int, epoch: int) -> None:
    """Next-fit over rising lengths; equally long ones in another order for every seed and epoch."""
    packing = pack(np.asarray(lengths), 64, method, seed, epoch, rising=True)
    assert [lengths[item] for item in packing.items] == sorted(lengths)
    assert sorted(packing.items.tolist()) == list(range(len(lengths)))
    rows = [sum(lengths[item] for item in packing.row(row)) for row in range(packing.rows)]
    assert max(rows) <= 64
    for row in range(packing.rows - 1):
        assert len(packing.row(row)) == 1 if method == "none" else rows[row] + lengths[packing.row(row + 1)[0]] > 64
    equal = np.full(60, 10)
    orders = {tuple(pack(equal, 64, method, s, e, rising=True).items.tolist()) for s in (seed, 10) for e in (epoch, 10)}
    assert len(orders) == 4


def test_in_order_closes_a_row_when_the_next_does_not_fit() -> None:
    packing = pack(np.asarray([5, 5, 3, 8, 2, 10, 1]), 10, "in_order", 0, 0)
    assert [packing.row(i).tolist() for i in range(packing.rows)] == [[0, 1], [2], [3, 4], [5], [6]]


def test_best_fit_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 1024, 5000)
    packing = pack(lengths, 1024, "best_fit", 0, 0)
    assert lengths.sum() / (packing.rows * 1024) > 0.98


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="item 1 has 11 tokens"):
        pack(np.asarray([10, 11]), 10, "best_fit", 0, 0)
