"""Counter-based random numbers: a pure function of (key, index) that looks random along both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.random import normal, random_bits, stream_key

COUNT = 200_000
PINNED_KEY = 2597868162666555955
PINNED_NUMBERS = [-0.4516804225486383, 0.14193291921116286, 0.23683845155282598]
KEY = stream_key(1234, "init", "layers.0.mlp.up.weight")


def _splitmix64(state: int) -> int:
    """The published generator (Steele, Lea, Flood 2014) in Python's unbounded integers, on a state already advanced."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.fixture(scope="module")
def numbers() -> Tensor:
    return normal(KEY, torch.arange(COUNT))


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


@pytest.mark.parametrize("key", [0, 1, KEY, 2**63 - 1])
def test_bits_are_splitmix64(key: int) -> None:
    index = torch.tensor([0, 1, 2, 1000, 2**40 + 7, 2**62])
    expected = [_splitmix64(i * 0x9E3779B97F4A7C15 + key) for i in index.tolist()]
    assert [bits % 2**64 for bits in random_bits(key, index).tolist()] == expected


def test_published_outputs() -> None:
    """First outputs of the reference implementation for seed 1234567, whose n-th state is seed + n * gamma."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [bits % 2**64 for bits in random_bits(1234567, torch.arange(1, 4)).tolist()] == expected


def test_numbers_do_not_depend_on_order_shape_or_chunks(numbers: Tensor) -> None:
    order = torch.randperm(1000)
    assert torch.equal(normal(KEY, order), numbers[order])
    assert torch.equal(normal(KEY, torch.arange(600).view(20, 30)), numbers[:600].view(20, 30))
    assert torch.equal(torch.cat([normal(KEY, chunk) for chunk in torch.arange(1001).split(7)]), numbers[:1001])


def test_moments_and_distribution_are_standard_normal(numbers: Tensor) -> None:
    """Bounds of 5 standard errors; the largest distance of the distribution functions below its 0.9999 quantile."""
    root = math.sqrt(COUNT)
    assert abs(numbers.mean()) < 5 / root
    assert abs(numbers.square().mean() - 1) < 5 * math.sqrt(2) / root
    assert abs((numbers**3).mean()) < 5 * math.sqrt(15) / root
    assert abs((numbers**4).mean() - 3) < 5 * math.sqrt(96) / root
    expected = 0.5 * (1 + torch.erf(numbers.sort().values / math.sqrt(2)))
    steps = torch.arange(1, COUNT + 1, dtype=torch.float64) / COUNT
    distance = torch.maximum(steps - expected, expected - steps + 1 / COUNT).max()
    assert distance < 2.23 / root


def test_neighbouring_indices_and_keys_are_not_correlated(numbers: Tensor) -> None:
    bound = 5 / math.sqrt(COUNT)
    for lag in (1, 2, 3, 64, 4096):
        assert abs(_correlation(numbers[:-lag], numbers[lag:])) < bound, lag
        assert abs(_correlation(numbers[:-lag].square(), numbers[lag:].square())) < bound, lag
    for other in (KEY + 1, KEY ^ (1 << 40), stream_key(1234, "init", "layers.1.mlp.up.weight"), stream_key(1235)):
        neighbour = normal(other, torch.arange(COUNT))
        assert abs(_correlation(numbers, neighbour)) < bound
        assert abs(_correlation(numbers.square(), neighbour.square())) < bound


def test_one_bit_of_key_or_index_flips_half_of_the_bits() -> None:
    """Mean share of the 64 output bits that flip, over 2,000 indices, for every bit of key and index: 5 standard errors."""
    index = torch.arange(2000)
    bits = random_bits(KEY, index)
    for bit in range(63):
        for other in (random_bits(KEY ^ (1 << bit), index), random_bits(KEY, index ^ (1 << bit))):
            flipped = bits ^ other
            share = sum(((flipped >> position) & 1).double().mean().item() for position in range(0, 64, 9)) / 8
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(8 * 2000), bit


def test_keys_tell_addresses_apart() -> None:
    addresses = [(1, "12"), (11, "2"), (1, 12), (112,), ("1", "12"), (1, "1", 2), ("a", "b"), ("ab",), ("a, b",)]
    assert len({stream_key(*address) for address in addresses}) == len(addresses)
    keys = {stream_key(seed, "init", f"layers.{layer}.weight") for seed in range(100) for layer in range(100)}
    assert len(keys) == 10_000 and all(0 <= key < 2**63 for key in keys)


def test_keys_do_not_change_between_versions() -> None:
    """Fresh models of a seed are the same for ever: these are facts, not formulas."""
    assert stream_key(1234, "init", "embedding.weight") == PINNED_KEY
    assert normal(PINNED_KEY, torch.arange(3)).tolist() == pytest.approx(PINNED_NUMBERS, rel=1e-14)
