"""Rows in 8 bits with scales of their own, and their products, against float64 and against torchao's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.fp8 import fp8_problem, input_gradient, product, quantize

LARGEST, FLOOR = 448.0, 2.0**-13


def _randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def _heavy(*shape: int, seed: int = 0) -> Tensor:
    """Magnitudes over 24 powers of two in every row, as of gradients and of activations with outliers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-16, 8, shape, generator=generator)).bfloat16()


def _wide(x: tuple[Tensor, Tensor]) -> Tensor:
    return x[0].double() * x[1].double()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-7, 300.0, 1e30])
def test_numbers_are_off_by_half_a_unit_of_three_bits(scale: float) -> None:
    x = _heavy(40, 96) * scale
    x = torch.where(x.abs() < 1e-36, 0, x)  # bfloat16's own last numbers
    q, inverse = quantize(x)
    assert q.dtype is torch.float8_e4m3fn and q.is_contiguous() and inverse.dtype is torch.float32 and inverse.shape == (40, 1)
    largest = x.double().abs().amax(1, keepdim=True)
    error, above = (_wide((q, inverse)) - x.double()).abs(), x.double().abs() >= FLOOR * largest
    assert above.any() and not above.all()
    assert (error <= 2.0**-4 * x.double().abs())[above].all()
    assert (error <= 2.0**-17 * largest)[~above].all()
    assert (error > 2.0**-5 * x.double().abs())[above].any()  # it is no wider format
    top = q.double().abs().amax(1)
    assert ((top >= LARGEST / 2) & (top <= LARGEST)).all()


def test_the_largest_number_never_saturates() -> None:
    """Around 448 times a power of two, where one more or one less must be taken."""
    tops = torch.tensor([448.0, 450.0, 446.0, 1.75, 1.7578125, 1.7421875, 7e-20, 1.0, 255.0, 3.3e38]).bfloat16()
    x = torch.stack((tops, -tops, tops / 2), 1)
    q, inverse = quantize(x)
    assert not q.double().isnan().any()
    assert q.double()[:, 0].tolist()[:3] == [448.0, 224.0, 448.0] and inverse[:3, 0].tolist() == [1.0, 2.0, 1.0]
    assert ((_wide((q, inverse)) - x.double()).abs() <= 2.0**-4 * x.double().abs()).all()
    mantissa, _ = torch.frexp(inverse)
    assert (mantissa == 0.5).all()  # powers of two


def test_zeros_stay_zeros() -> None:
    x = _randn(3, 32)
    x[1] = 0
    assert not _wide(quantize(x))[1].any()
    assert not product(x, _randn(16, 32, seed=1))[1].any()
    assert not quantize(torch.zeros(4, 32).bfloat16())[0].double().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_every_result_of_its_vector(value: float) -> None:
    """An infinity would saturate otherwise, and the step be taken."""
    x, weight = _randn(5, 32), _randn(16, 32, seed=1)
    clean = product(x, weight)
    x[2, 7] = value
    y = product(x, weight)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    weight[3, 0] = value
    assert input_gradient(_randn(5, 16), weight)[:, 0].isnan().all()
    assert product(_randn(5, 32), weight)[:, 3].isnan().all()


def test_a_row_depends_on_nothing_but_itself() -> None:
    x = _heavy(8, 64)
    q, inverse = quantize(x)
    for rows in (slice(3, 4), slice(0, 8, 3)):
        alone, its = quantize(x[rows])
        assert torch.equal(alone.view(torch.uint8), q[rows].view(torch.uint8)) and torch.equal(its, inverse[rows])


def test_a_cut_of_a_row_changes_no_number_above_the_floor() -> None:
    """What tensor parallelism does to sums over features: the scale differs, the numbers do not."""
    x = _randn(20, 64)
    x[:, 5] *= 37.0  # the other half has another scale
    whole, halves = _wide(quantize(x)), torch.cat([_wide(quantize(half)) for half in x.split(32, 1)], 1)
    above = x.abs() >= FLOOR * x.abs().amax(1, keepdim=True)
    assert (quantize(x)[1] != quantize(x[:, 32:])[1]).any() and above.float().mean() > 0.99
    assert torch.equal(whole[above], halves[above])


def test_strides_and_width_do_not_matter() -> None:
    x = _heavy(64, 48)
    for other in (x[1::3, 4:36], x.t(), x.t()[:, 5:37], x[:, ::2], x[:1].expand(6, 48)):
        q, inverse = quantize(other)
        for same in (other.contiguous(), other.float()):
            again, its = quantize(same)
            assert again.is_contiguous() and q.is_contiguous()
            assert torch.equal(again.view(torch.uint8), q.view(torch.uint8)) and torch.equal(its, inverse)


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_the_numbers_in_8_bits(tokens: int, with_bias: bool) -> None:
    x, weight, dy = _heavy(tokens, 48, seed=1), _heavy(32, 48, seed=2), _heavy(tokens, 32, seed=3)
    bias = _randn(32, seed=4, scale=300.0) if with_bias else None
    y, dx = product(x, weight, bias), input_gradient(dy, weight)
    assert y.dtype is dx.dtype is torch.bfloat16
    expected_y = _wide(quantize(x)) @ _wide(quantize(weight)).t() + (0 if bias is None else bias.double())
    expected_dx = _wide(quantize(dy)) @ _wide(quantize(weight.t())).t()
    for actual, expected in ((y, expected_y), (dx, expected_dx)):
        assert actual.shape == expected.shape
        largest = expected.abs().max() if tokens else 0.0
        assert ((actual.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5 * largest).all()


def test_products_are_near_the_exact_ones() -> None:
    """Each term is off by two factors of 2^-4; of many, which are off at random, the sum is off by 3.7 % in the mean."""
    x, weight, dy = _randn(64, 256, seed=1), _randn(96, 256, seed=2), _randn(64, 96, seed=3)
    cases = ((product(x, weight), x, weight.t()), (input_gradient(dy, weight), dy, weight))
    for actual, a, b in cases:
        exact, most = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        error = (actual.double() - exact).abs()
        assert (error <= (2.0**-3 + 2.0**-7) * most).all()
        assert 0.02 < error.norm() / exact.norm() < 0.045


def test_is_torchaos_rowwise_with_gw_hp() -> None:
    """Its own linear layer, which multiplies in float32 what it has made 8-bit numbers of."""
    config = pytest.importorskip("torchao.float8.config")
    linear = pytest.importorskip("torchao.float8.float8_linear")
    recipe = config.Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    object.__setattr__(recipe, "emulate", True)
    x, weight, dy = _randn(24, 64, seed=1).requires_grad_(), _randn(32, 64, seed=2), _randn(24, 32, seed=3)
    theirs = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    theirs.weight.data.copy_(weight)
    y = linear.Float8Linear.from_float(theirs, recipe)(x)
    y.backward(dy)
    assert x.grad is not None
    for actual, expected in ((product(x.detach(), weight), y.detach()), (input_gradient(dy, weight), x.grad)):
        torch.testing.assert_close(actual, expected, rtol=2.0**-7, atol=1e-3 * float(expected.abs().max()))


def test_devices_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs an NVIDIA GPU of compute capability 8.9 or more" in str(fp8_problem("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    for capability in ((7, 5), (8, 0), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        number = ".".join(map(str, capability))
        assert f"and NVIDIA A100-SXM4-80GB has {number}; remove it, or set it to compute" in str(fp8_problem("cuda"))
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert fp8_problem("cuda") is None
    monkeypatch.setattr(torch.version, "hip", "6.4")  # another e4m3
    assert "needs an NVIDIA GPU" in str(fp8_problem("cuda"))
