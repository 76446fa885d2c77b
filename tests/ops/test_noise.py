"""Dropout and noise are functions of key, token and channel alone, and look random along each of them.

All numbers are fixed by their keys, so bounds of five standard errors either hold or do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_llm.ops import noise
from megatron_llm.ops.noise import Addresses, dropout, uniform_noise
from megatron_llm.ops.random import stream_key

KEY = stream_key(7, "dropout", "mlp", 3)
ROWS = (900, 12, 2**40)


def fields(key: int, address: int, width: int, bits: int) -> list[int]:
    """The signed fields of `width` channels of a token, from SplitMix64 as published (Steele, Lea, Flood 2014)."""
    each = 64 // bits
    words, found = -(-width // each), []
    for channel in range(width):
        z = ((address * words + channel // each) * 0x9E3779B97F4A7C15 + key) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        field = (z ^ (z >> 31)) >> (bits * (channel % each)) & (2**bits - 1)
        found.append(field - 2**bits if field >= 2 ** (bits - 1) else field)
    return found


def masks(key: int, addresses: list[int], width: int, rate: float) -> Tensor:
    """What dropout multiplies with, [tokens, width] in float64."""
    dropped = round(rate * 2**16)
    kept = [[field >= dropped - 2**15 for field in fields(key, address, width, 16)] for address in addresses]
    return torch.tensor(kept, dtype=torch.float64) * (2**16 / (2**16 - dropped))


def _addresses(rows: tuple[int, ...], length: int) -> list[int]:
    return [row * length + place for row in rows for place in range(length)]


def _kept(tokens: int, width: int, rate: float, key: int = KEY, row: int = 0) -> Tensor:
    """Which elements of a row stay, 0 or 1."""
    return dropout(torch.ones(tokens, width), rate, key, Addresses((row,), tokens, 0, tokens)).sign()


@pytest.fixture(params=[1 << 15, 40, 1], ids=["one chunk", "several tokens a chunk", "less than a token"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(noise.CHUNK_WORDS, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("width", [1, 4, 10, 19])
def test_masks_and_noise_are_their_definition_on_any_shard(width: int) -> None:
    whole = Addresses(ROWS, 7, 0, 21)
    assert whole.on(torch.device("cpu")).tolist() == _addresses(ROWS, 7)
    x = torch.randn(21, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x * masks(KEY, _addresses(ROWS, 7), width, 0.3)
    most = torch.rand(21, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    numbers = [fields(KEY, address, width, 32) for address in _addresses(ROWS, 7)]
    expected_noise = torch.tensor(numbers, dtype=torch.float64) / 2**31 * most[:, None]
    assert torch.equal(dropout(x, 0.3, KEY, whole), expected)
    assert torch.equal(uniform_noise(x, most, KEY, whole), expected_noise)
    for size in (1, 3, 7):
        for start in range(0, 21, size):
            shard, at = Addresses(ROWS, 7, start, start + size), slice(start, start + size)
            assert torch.equal(dropout(x[at], 0.3, KEY, shard), expected[at])
            assert torch.equal(uniform_noise(x[at], most[at], KEY, shard), expected_noise[at])


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.5, 0.97])
def test_the_share_that_stays_and_the_mean(rate: float) -> None:
    elements = 1000 * 700
    y = dropout(torch.ones(1000, 700, dtype=torch.float64), rate, KEY, Addresses((3,), 1000, 0, 1000))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)], rel=2**-16 / (1 - rate))
    error = math.sqrt(rate * (1 - rate) / elements)
    assert abs(y.count_nonzero() / elements - (1 - rate)) < 5 * error + 2**-17
    assert abs(y.mean() - 1) < 5 * error / (1 - rate)


def test_rates_at_the_ends() -> None:
    x = torch.ones(64, 64)
    here = Addresses((0,), 64, 0, 64)
    assert dropout(x, 0.0, KEY, here) is x
    y = dropout(x, 1 - 1e-9, KEY, here)  # the highest there is: 65535 / 65536
    assert y.isfinite().all() and y.count_nonzero() <= 2


def _neighbours() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Pairs of masks that must have nothing to do with each other."""
    tokens, width = 500, 800

    def kept(key: int = KEY, row: int = 5) -> Tensor:
        return _kept(tokens, width, 0.3, key, row)

    def other(*address: int | str) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (kept(), kept(stream_key(*address)))

    def lag(rows: int, channels: int) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (kept()[: tokens - rows, : width - channels], kept()[rows:, channels:])

    return {
        "next layer": other(7, "dropout", "mlp", 4),
        "other site": other(7, "dropout", "attention", 3),
        "next seed": other(8, "dropout", "mlp", 3),
        "next row": lambda: (kept(), kept(row=6)),
        "far row": lambda: (kept(), kept(row=5 + 2**33)),
        **{f"{n} tokens on": lag(n, 0) for n in (1, 2, 64)},
        **{f"{n} channels on": lag(0, n) for n in (1, 2, 3, 4, 5, 128)},
        "next token, next channel": lag(1, 1),
    }


@pytest.mark.parametrize("pair", _neighbours())
def test_neighbours_are_independent(pair: str) -> None:
    """Chi-square of the table of both masks, one degree of freedom: 25 is five standard errors."""
    a, b = (mask.double().flatten() for mask in _neighbours()[pair]())
    observed = torch.stack([(x * y).sum() for x in (a, 1 - a) for y in (b, 1 - b)])
    expected = torch.stack([x.sum() * y.sum() / a.numel() for x in (a, 1 - a) for y in (b, 1 - b)])
    assert ((observed - expected).square() / expected).sum() < 25


def test_no_token_and_no_channel_is_dropped_more_often() -> None:
    """The counts of each follow the binomial distribution: chi-square of them within five standard errors of its mean."""
    kept, rate = _kept(400, 600, 0.2).double(), round(0.2 * 2**16) / 2**16
    for dim, terms in ((0, 400), (1, 600)):
        counts = kept.sum(dim)
        chi = ((counts - terms * (1 - rate)).square() / (terms * rate * (1 - rate))).sum()
        assert abs(chi - counts.numel()) < 5 * math.sqrt(2 * counts.numel())


def test_backward_makes_the_same_mask_and_nothing_is_kept() -> None:
    saved: list[Tensor] = []
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(21, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = dropout(x, 0.3, KEY, Addresses(ROWS, 7, 0, 21))
    dy = torch.randn(21, 10, dtype=torch.float64, generator=generator)
    y.backward(dy)
    assert x.grad is not None and torch.equal(x.grad, dy * masks(KEY, _addresses(ROWS, 7), 10, 0.3))
    assert not saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_have_the_same_mask_and_round_once(dtype: torch.dtype) -> None:
    here = Addresses(ROWS, 7, 0, 21)
    x = torch.randn(21, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = masks(KEY, _addresses(ROWS, 7), 12, 0.1)
    y = dropout(x, 0.1, KEY, here)
    assert y.dtype is dtype
    error = (y.double() - x.double() * mask).abs()
    bound = torch.finfo(dtype).eps / 2 + 2**-24  # the scale is a number of float32
    assert (error <= bound * (x.double() * mask).abs() * 1.001).all()
    u = uniform_noise(x, torch.full((21,), 0.5), KEY, here)
    exact = uniform_noise(x.double(), torch.full((21,), 0.5, dtype=torch.float64), KEY, here)
    assert u.dtype is dtype and (u.double() - exact).abs().max() <= torch.finfo(dtype).eps * 0.26


def test_what_is_not_finite_is_not_hidden() -> None:
    y = dropout(torch.full((21, 12), torch.nan), 0.5, KEY, Addresses(ROWS, 7, 0, 21))
    assert y.isnan().all()


def test_noise_is_uniform() -> None:
    """Mean, variance and fourth moment within 5 standard errors; the distribution function within its 0.9999 quantile."""
    count = 500 * 400
    x = uniform_noise(
        torch.empty(500, 400, dtype=torch.float64), torch.ones(500, dtype=torch.float64), KEY, Addresses((1,), 500, 0, 500)
    )
    root = math.sqrt(count)
    assert x.min() >= -1 and x.max() < 1
    assert abs(x.mean()) < 5 * math.sqrt(1 / 3) / root
    assert abs(x.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45) / root
    assert abs((x**4).mean() - 1 / 5) < 5 * math.sqrt(1 / 9 - 1 / 25) / root
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    expected = (x.flatten().sort().values + 1) / 2
    assert torch.maximum(steps - expected, expected - steps + 1 / count).max() < 2.23 / root
