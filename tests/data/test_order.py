"""The keyed permutation is a permutation, differs by key, and looks random."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llm.data.order import Permutation, mix64, permutation


@given(n=st.integers(1, 700), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 5))
def test_every_row_is_visited_once(n: int, seed: int, epoch: int) -> None:
    permutation = Permutation(n, seed, epoch)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


def test_kept_permutations_are_told_apart() -> None:
    keys = [(n, seed, epoch) for n in (50, 51) for seed in (0, 1) for epoch in (0, 1)]
    for _ in range(2):
        for key in keys:
            assert [permutation(*key)(i) for i in range(50)] == [Permutation(*key)(i) for i in range(50)]


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(Permutation(50, seed, epoch)(i) for i in range(50)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9


def test_huge_n_stays_in_range_without_collisions() -> None:
    n = 10**12 + 39
    permutation = Permutation(n, 7, 0)
    images = [permutation(i) for i in range(2000)]
    assert len(set(images)) == 2000
    assert max(images) < n
    assert sum(image < n // 2 for image in images) in range(900, 1100)  # 4.5 standard deviations


def test_places_are_uniform() -> None:
    """Each of 5 rows is first equally often over epochs: chi-square with 4 degrees of freedom below its 0.9999 quantile."""
    first = [Permutation(5, 3, epoch)(0) for epoch in range(5000)]
    assert sum((first.count(i) - 1000) ** 2 / 1000 for i in range(5)) < 23.5


def test_rows_outside_are_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 0, 0)(index)


def test_mix64_is_splitmix64() -> None:
    """First outputs of the published generator for seed 1234567."""
    gamma = 0x9E3779B97F4A7C15
    state = 1234567
    outputs = [mix64((state + i * gamma) % 2**64) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
