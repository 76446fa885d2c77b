"""Stochastic rounding: unbiased, exact where it can be, and its random bits random along elements and keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.random import stream_key
from megatron_llm.ops.rounding import RoundingBits, StochasticRounding, round_into

COUNT = 1 << 18


def _draw(key: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    return RoundingBits(StochasticRounding(key, start), count, torch.device("cpu")).draw(0, count)


def _rounded(x: Tensor, key: int = 1) -> Tensor:
    narrow = torch.empty(x.numel(), dtype=torch.bfloat16)
    round_into(narrow, x.clone(), _draw(key, 0, x.numel())[0])
    return narrow


def _bits(key: int, start: int = 0, count: int = COUNT) -> Tensor:
    """All 32 bits of each element, as int64."""
    low, high = _draw(key, start, count)
    return high.long() << 16 | low.long()


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-3, -7.77e20, 1e-40, 2.0**-133 * 1.3])
def test_the_mean_of_many_is_the_value(value: float) -> None:
    """Within 5 standard errors; the results are the two neighbours."""
    x = torch.full((COUNT,), value)
    rounded = _rounded(x).double()
    below, above = rounded.min().item(), rounded.max().item()
    exact = x[0].item()
    assert below < exact < above and rounded.unique().numel() == 2
    share = (exact - below) / (above - below)
    error = 5 * math.sqrt(share * (1 - share) / COUNT)
    assert (rounded.mean().item() - below) / (above - below) == pytest.approx(share, abs=error)


@pytest.mark.parametrize("low", [0, 1, 2, 0x7FFF, 0x8000, 0xABCD, 0xFFFF])
def test_of_all_random_bits_exactly_the_right_share_rounds_up(low: int) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32)
    narrow = torch.empty(1 << 16, dtype=torch.bfloat16)
    round_into(narrow, torch.full((1 << 16,), 0x3F800000 + low, dtype=torch.int32).view(torch.float32), bits)
    assert (narrow == 1).sum() == (1 << 16) - low and (narrow == 1 + 2**-7).sum() == low


def test_what_bfloat16_has_stays() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = _rounded(every.float())
    nan = every.isnan()
    assert torch.equal(rounded.isnan(), nan)
    assert torch.equal(rounded.view(torch.int16)[~nan], every.view(torch.int16)[~nan])  # also -0, infinities, subnormals


def test_nans_of_any_bits_stay_nans() -> None:
    """CUDA's own NaN is 0x7FFFFFFF: with anything added it would be -0."""
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x400000, -0x7FFFFF], dtype=torch.int32)
    for key in range(20):
        assert _rounded(patterns.view(torch.float32), key).isnan().all()


def test_beyond_the_largest_bfloat16() -> None:
    """Documented: that or infinity, of the same sign."""
    largest = torch.finfo(torch.bfloat16).max
    x = torch.full((1000,), torch.finfo(torch.float32).max * 0.999)
    assert set(_rounded(x).tolist()) == {largest, math.inf} and set(_rounded(-x).tolist()) == {-largest, -math.inf}


def test_bits_are_the_published_mixer_of_a_weyl_sequence() -> None:
    """Written out in unbounded integers, far from zero too; a vector's end and its middle."""

    def expected(key: int, index: int) -> int:
        z = (stream_key(key) + index * 0x9E3779B9) % 2**32
        z = (z ^ (z >> 16)) * 0x21F0AAAD % 2**32
        z = (z ^ (z >> 15)) * 0x735A2D97 % 2**32
        return z ^ (z >> 16)

    for key, start in ((0, 0), (5, 123_456_789), (2**62 + 1, 2**32 - 20), (9, 2**40)):
        assert _bits(key, start, 37).tolist() == [expected(key, index) for index in range(start, start + 37)]


def test_bits_do_not_depend_on_the_cut() -> None:
    whole = [bits.clone() for bits in _draw(3, 50, 1000)]
    again = RoundingBits(StochasticRounding(3, 50), 500, torch.device("cpu"))
    for first, count in ((0, 1), (1, 6), (333, 500), (999, 1)):
        for part, other, bits in zip(again.draw(first, count), _draw(3, 50 + first, count), whole, strict=True):
            assert torch.equal(part, bits[first : first + count]) and torch.equal(part, other)


def test_bits_are_uniform() -> None:
    """Each half fills 256 bins evenly by its upper and by its lower byte: chi squared within 5 standard deviations."""
    bits = _bits(11)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(bits >> shift & 0xFF, minlength=256).double()
        chi = ((counts - COUNT / 256).square() / (COUNT / 256)).sum().item()
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255), shift


def _signs(bits: Tensor) -> Tensor:
    """[32, n]: each bit as +1 or -1."""
    return ((bits >> torch.arange(32)[:, None] & 1) * 2 - 1).float()


def test_bits_of_an_element_of_neighbours_and_of_other_keys_are_not_correlated() -> None:
    """Every bit with every other: 1,024 correlations each, all within 6 standard errors."""
    bound, here = 6 / math.sqrt(COUNT), _signs(_bits(1000))
    own = here @ here.T / COUNT - torch.eye(32)
    assert own.abs().max() < bound
    for lag in (1, 2, 3, 64, 4096):
        assert (here[:, lag:] @ here[:, :-lag].T / (COUNT - lag)).abs().max() < bound, lag
    for key in (1001, 1002, 999, 1000 + 2**40):
        assert (here @ _signs(_bits(key)).T / COUNT).abs().max() < bound, key


def test_an_element_draws_evenly_over_consecutive_updates() -> None:
    """The same 64 elements under 4,096 keys in a row: means of their bits and products with the update before."""
    signs = torch.stack([_signs(_bits(key, 10**9, 64)) for key in range(4096)])  # [update, bit, element]
    bound = 5.5 / math.sqrt(4096)
    assert signs.mean(0).abs().max() < bound
    assert (signs[1:] * signs[:-1]).mean(0).abs().max() < bound
