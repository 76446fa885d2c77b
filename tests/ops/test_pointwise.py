"""Norms, activations and rotary embeddings against their formulas in float64, their gradients against finite differences."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_llm.config import RopeScalingConfig
from megatron_llm.ops.activation import activation, gated
from megatron_llm.ops.norm import NormKind, add_norm, norm
from megatron_llm.ops.rope import rope_frequencies, rope_tables, rotary_

U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, relative
NARROW = pytest.mark.parametrize("dtype", U)


def _random(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def assert_within_roundings(actual: Tensor, exact: Tensor, roundings: int, noise: float = 1e-5) -> None:
    """Every element is within so many narrow roundings of the exact one; `noise` covers the float32 arithmetic."""
    bound = ((1 + U[actual.dtype]) ** roundings - 1) * exact.abs() + noise * exact.abs().max()
    assert ((actual.double() - exact).abs() <= bound).all(), ((actual.double() - exact).abs() / bound).max()


# RMSNorm


def _rms_norm_exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_rms_norm_is_its_formula(eps: float) -> None:
    x, weight, dy = _leaf(_random(5, 12)), _leaf(_random(12)), _random(5, 12, scale=2.0)
    exact = _rms_norm_exact(x, weight, eps)
    expected = torch.autograd.grad(exact, (x, weight), dy)
    y = norm(x, weight, None, NormKind(eps))
    torch.testing.assert_close(y, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), dy), expected, rtol=1e-12, atol=1e-14)
    assert gradcheck(lambda x, w: norm(x, w, None, NormKind(eps)), (x, weight))


@NARROW
def test_rms_norm_in_narrow_dtypes(dtype: torch.dtype) -> None:
    """The value is rounded after normalizing and after the weight, each gradient once."""
    x, weight, dy = (_random(*shape, dtype=dtype, scale=3.0) for shape in ((33, 64), (64,), (33, 64)))
    wide = [_leaf(x.double()), _leaf(weight.double())]
    exact = _rms_norm_exact(*wide, 1e-5)
    exact_gradients = torch.autograd.grad(exact, wide, dy.double())
    narrow = [_leaf(x), _leaf(weight)]
    y = norm(*narrow, None, NormKind(1e-5))
    assert_within_roundings(y, exact, 2)
    for actual, expected in zip(torch.autograd.grad(y, narrow, dy), exact_gradients, strict=True):
        assert_within_roundings(actual, expected, 1)


def test_rms_norm_of_large_and_small_bfloat16_values() -> None:
    """4096 equal squares summed in bfloat16 would stop growing at 256 of them."""
    for scale in (1e4, 1e-8):
        x = torch.full((1, 4096), scale, dtype=torch.bfloat16)
        y = norm(x, torch.ones(4096, dtype=torch.bfloat16), None, NormKind(1e-30))
        torch.testing.assert_close(y, torch.ones_like(y))


def test_rms_norm_in_float16_of_values_whose_squares_overflow() -> None:
    """Forward and backward, the gradient scaled as far as it fits."""
    x, dy = (sign * _random(9, 64, scale=1e4).flip(dim).half() for sign, dim in ((1, 0), (-1, 1)))
    weight = torch.ones(64).half()
    wide, narrow = _leaf(x.double()), _leaf(x)
    exact, y = _rms_norm_exact(wide, weight.double(), 1e-5), norm(narrow, weight, None, NormKind(1e-5))
    assert_within_roundings(y, exact, 2)
    (expected,) = torch.autograd.grad(exact, wide, dy.double())
    assert_within_roundings(torch.autograd.grad(y, narrow, dy)[0], expected, 1)


# LayerNorm, and what both norms may have


def test_layer_norm_is_its_formula() -> None:
    """Four heads with a weight and bias each; the weight counts from 0.5."""
    x, weight, bias = _leaf(_random(5, 4, 6, scale=2.0)), _leaf(_random(4, 6)), _leaf(_random(4, 6))
    n = x - x.mean(-1, keepdim=True)
    exact = n / (n.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * (0.5 + weight) + bias
    ours = partial(norm, kind=NormKind(0.1, 0.5, center=True))
    torch.testing.assert_close(ours(x, weight, bias), exact, rtol=1e-13, atol=1e-13)
    assert gradcheck(ours, (x, weight, bias))
    assert gradcheck(lambda x: norm(x, None, None, NormKind(0.1, center=True)), (x,))


def test_rms_norm_whose_weight_counts_from_one() -> None:
    x, weight = _leaf(_random(5, 6)), _leaf(_random(6))
    y = norm(x, weight, None, NormKind(0.1, offset=1.0))
    torch.testing.assert_close(y, _rms_norm_exact(x, 1 + weight, 0.1), rtol=1e-13, atol=1e-13)
    assert gradcheck(lambda x, w: norm(x, w, None, NormKind(0.1, offset=1.0)), (x, weight))
    assert gradcheck(lambda x: norm(x, None, None, NormKind(0.1)), (x,))


@pytest.mark.parametrize("kind", [NormKind(0.1), NormKind(0.1, 0.5, True)], ids=["rms", "layer"])
def test_norm_of_a_sum(kind: NormKind) -> None:
    x, f, weight = _leaf(_random(5, 6)), _leaf(_random(5, 6, scale=2.0)), _leaf(_random(6))
    bias = _leaf(_random(6)) if kind.center else None
    s, y = add_norm(x, f, weight, bias, kind)
    assert torch.equal(s, x + f)
    assert torch.equal(y, norm(s, weight, bias, kind))
    assert gradcheck(lambda *inputs: add_norm(*inputs, bias, kind), (x, f, weight))


# Activations

swiglu = partial(gated, name="silu")
FORMULAS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_are_their_formulas(name: str) -> None:
    x = _leaf(_random(4, 14, scale=3.0))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(activation(x, name), FORMULAS[name](x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gated(x, name), FORMULAS[name](gate) * up, rtol=1e-12, atol=1e-14)
    assert gradcheck(lambda x: activation(x, name), (x,)) and gradcheck(lambda x: gated(x, name), (x,))


def _swiglu_exact(x: Tensor) -> Tensor:
    gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return gate / (1 + (-gate).exp()) * up


def test_swiglu_is_its_formula() -> None:
    x, dy = _leaf(_random(4, 14, scale=3.0)), _random(4, 7)
    exact, y = _swiglu_exact(x), swiglu(x)
    torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-15)
    expected = torch.autograd.grad(exact, x, dy)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), expected, rtol=1e-12, atol=1e-14)
    assert gradcheck(swiglu, (x,))


@NARROW
def test_swiglu_in_narrow_dtypes(dtype: torch.dtype) -> None:
    x, dy = _random(65, 66, dtype=dtype, scale=3.0), _random(65, 33, dtype=dtype)
    wide, narrow = _leaf(x.double()), _leaf(x)
    exact, y = _swiglu_exact(wide), swiglu(narrow)
    assert_within_roundings(y, exact, 2)
    (expected,) = torch.autograd.grad(exact, wide, dy.double())
    assert_within_roundings(torch.autograd.grad(y, narrow, dy)[0], expected, 2)


def test_swiglu_in_float16_overflows_only_where_its_gradient_does() -> None:
    """With the factor of loss scaling, dy * up passes 65,504 where the gradient of the gate does not."""
    gate, up = torch.linspace(-30, -4, 50), torch.full((50,), 30.0)
    x, dy = _leaf(torch.cat((gate, up))[None].half()), torch.full((1, 50), 30_000.0).half()
    (actual,) = torch.autograd.grad(swiglu(x), x, dy)
    wide = _leaf(x.double())
    (expected,) = torch.autograd.grad(_swiglu_exact(wide), wide, dy.double())
    assert (dy.double() * up > 65_504).all() and (expected.abs() < 65_504).all()
    assert_within_roundings(actual, expected, 1)


# Rotary embeddings; where they lie, and by the kernel: `triton/test_rope.py`


def rotary(x_TND: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """A copy of queries, rotated."""
    return rotary_(x_TND.clone(), x_TND.new_empty(len(x_TND), 0, x_TND.shape[2]), cos_T1P, sin_T1P)[0]


def test_rotary_turns_pairs_as_complex_numbers() -> None:
    x = _random(7, 3, 10)
    positions = torch.tensor([0, 1, 2, 0, 5, 1000, 131071])
    frequencies = rope_frequencies(10, 500.0, None, torch.float64)
    assert frequencies.tolist() == pytest.approx([500.0 ** (-2 * i / 10) for i in range(5)], rel=1e-14)
    y = rotary(x, *rope_tables(positions, frequencies))
    angles = positions.double()[:, None, None] * frequencies
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.complex(angles.cos(), angles.sin())
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1), rtol=1e-13, atol=1e-13)
    assert torch.equal(y[[0, 3]], x[[0, 3]])


def test_rotary_scores_depend_on_distance_only() -> None:
    frequencies = rope_frequencies(8, 10000.0, None, torch.float64)
    q, k = _random(1, 1, 8), _random(1, 1, 8, scale=2.0)

    def score(m: int, n: int) -> float:
        (a, b) = (rotary(x, *rope_tables(torch.tensor([p]), frequencies)) for x, p in ((q, m), (k, n)))
        return float((a * b).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_rotary_gradient() -> None:
    tables = rope_tables(torch.tensor([0, 3, 11]), rope_frequencies(6, 100.0, None, torch.float64))
    assert gradcheck(lambda x: rotary(x, *tables), (_leaf(_random(3, 2, 6)),))


@NARROW
def test_rotary_in_narrow_dtypes_rounds_once(dtype: torch.dtype) -> None:
    positions = torch.arange(40)
    narrow = _leaf(_random(40, 2, 16, dtype=dtype))
    wide = _leaf(narrow.double())
    frequencies = rope_frequencies(16, 10000.0, None, torch.float32)
    y = rotary(narrow, *rope_tables(positions, frequencies))
    exact = rotary(wide, *rope_tables(positions, frequencies.double()))
    assert_within_roundings(y, exact, 1, noise=1e-5)
    dy = _random(40, 2, 16, dtype=dtype)
    assert_within_roundings(torch.autograd.grad(y, narrow, dy)[0], torch.autograd.grad(exact, wide, dy.double())[0], 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=["plain", "linear", "llama3.1", "llama3 other"],
)
def test_frequencies_equal_those_of_transformers(head_dim: int, theta: float, scaling: dict | None) -> None:
    ours = rope_frequencies(head_dim, theta, RopeScalingConfig(**scaling) if scaling else None, torch.float32)
    if scaling is None:
        theirs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    else:
        parameters = RopeScalingConfig(**scaling).model_dump() | {"rope_theta": theta}
        config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=parameters)
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
        assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    exact = rope_frequencies(head_dim, theta, RopeScalingConfig(**scaling) if scaling else None, torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_scaling_changes_what_it_should() -> None:
    """llama3: the fastest pair is left alone, the slowest is divided by the factor, one between is strictly between."""
    plain = rope_frequencies(128, 500000.0, None, torch.float64)
    scaled = rope_frequencies(128, 500000.0, RopeScalingConfig(rope_type="llama3", factor=8.0), torch.float64)
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8.0)
    assert ((ratio > 1.01) & (ratio < 7.9)).any()
