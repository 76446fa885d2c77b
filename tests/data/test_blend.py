"""Blends keep every prefix within a row of each source's share, and number each source's rows without gap."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_llm.data.blend import RESOLUTION, Blend, tijdeman


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_prefix_is_within_one_row_of_its_share(counts: list[int]) -> None:
    given_out = [0] * len(counts)
    total = sum(counts)
    limit = 1 - Fraction(1, max(2, 2 * len(counts) - 2))
    for row, source in enumerate(tijdeman(counts), 1):
        given_out[source] += 1
        for count, out in zip(counts, given_out, strict=True):
            assert abs(Fraction(count * row, total) - out) <= limit
    assert given_out == counts


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_rounded_weights_are_near_and_none_is_lost(weights: list[float]) -> None:
    blend = Blend(weights)
    assert blend.period <= RESOLUTION
    for count, weight in zip(blend.counts, weights, strict=True):
        assert count > 0
        # Sources below 1/65536 are raised to it, at the cost of the others.
        assert abs(count / blend.period - weight / sum(weights)) <= (len(weights) + 1) / RESOLUTION


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=4), start=st.integers(0, 200_000))
def test_rows_of_a_source_are_numbered_without_gap(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    following: dict[int, int] = {}
    for row in range(start, start + 300):
        source, within = blend(row)
        assert within == following.get(source, within)
        following[source] = within + 1
        share = blend.counts[source] / blend.period
        assert abs(within + 1 - share * (row + 1)) < 1


@settings(max_examples=30, deadline=None)
@given(
    sources=st.lists(st.tuples(st.sampled_from([0.3, 0.5, 1.0, 2.0, 3.7]), st.integers(1, 40_000)), min_size=1, max_size=6),
)
def test_planned_epochs_are_met_at_the_end(sources: list[tuple[float, int]]) -> None:
    """Within one row of dealing, and one row for each 65,536 rows of rounding."""
    shares = [epochs * rows for epochs, rows in sources]
    assume(min(shares) >= sum(shares) / RESOLUTION)  # less is raised to that, at the cost of the others
    blend = Blend(shares)
    planned = math.floor(sum(shares))
    given_out = [0] * len(sources)
    last = [blend(row) for row in range(max(0, planned - 5 * blend.period), planned)]
    for source, within in last:
        given_out[source] = within + 1
    for (epochs, rows), out in zip(sources, given_out, strict=True):
        assert abs(out - epochs * rows) <= 2 + planned / RESOLUTION


@pytest.mark.parametrize(
    "rows", [[4310, 1800, 4425, 3049, 2517, 3436, 5429, 5847, 2134, 4030, 4926], [65_535, 1], [1, 2, 40_000, 3], [7, 7, 7]]
)
def test_whole_numbers_are_met_exactly(rows: list[int]) -> None:
    """As epochs of up to 65,536 rows in all are: at the end every source has given its rows, none of them twice."""
    blend = Blend([float(count) for count in rows])
    given_out = sorted(blend(row) for row in range(sum(rows)))
    assert given_out == [(source, number) for source, count in enumerate(rows) for number in range(count)]


def test_simple_shares_have_short_tables() -> None:
    assert Blend([3.0, 3.0]).period == 2
    assert Blend([0.75, 0.25]).counts == [3, 1]
    assert [Blend([5.0])(row) for row in (0, 1, 10**12)] == [(0, 0), (0, 1), (0, 10**12)]


def test_too_many_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="65537 sources"):
        Blend([1.0] * (RESOLUTION + 1))
