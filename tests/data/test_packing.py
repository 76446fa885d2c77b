"""Packing loses nothing, fits, is stable over epochs, equals a plain search, and the C++ equals the Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
