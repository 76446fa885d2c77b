"""Norms in Triton against their formulas in float64, with and without the addition before them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_llm.ops.norm import NormKind, add_norm, norm
from megatron_llm.ops.triton import norm as operators
from tests.ops.triton.common import DEVICE, assert_near, randn

DTYPES = [torch.float32, torch.bfloat16]
LLAMA, GEMMA = NormKind(1e-6, kernel="triton"), NormKind(1e-5, 1.0, kernel="triton")
LAYER = NormKind(0.1, center=True, kernel="triton")
FORMS = {  # kind, whether there is a weight, a bias
    "llama": (LLAMA, True, False),
    "gemma": (GEMMA, True, False),
    "without weight": (GEMMA, False, False),
    "layer": (LAYER, True, True),
    "layer without bias": (replace(LAYER, offset=1.0), True, False),
    "olmo": (LAYER, False, False),
}


def _exact(s: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> Tensor:
    n = s - s.mean(-1, keepdim=True) if kind.center else s
    n = n / (n.square().mean(-1, keepdim=True) + kind.eps).sqrt()
    y = n if weight is None else n * (kind.offset + weight)
    return y if bias is None else y + bias


def _leaf(x: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).requires_grad_()


def _vectors(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[NormKind, Tensor | None, Tensor | None]:
    """The kind of a form, and its weight and bias."""
    chosen, weighted, biased = FORMS[kind]
    weight = randn(*shape, dtype=dtype, seed=5).requires_grad_() if weighted else None
    return chosen, weight, randn(*shape, dtype=dtype, seed=6).requires_grad_() if biased else None


def _assert_norm(x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> None:
    """Of x, and gradients of all."""
    y = norm(x, weight, bias, kind)
    wide = [_leaf(t) for t in (x, weight, bias)]
    expected = _exact(*wide, kind)  # type: ignore[arg-type]
    assert y.dtype is x.dtype and y.is_contiguous()
    assert_near(y, expected)
    inputs = [t for t in (x, weight, bias) if t is not None]
    exact = torch.autograd.grad(expected, [t for t in wide if t is not None], dy.double())
    for actual, gradient in zip(torch.autograd.grad(y, inputs, dy), exact, strict=True):
        assert_near(actual, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 5), (1, 2048), (301, 40), (7, 1500)], ids=str)
def test_is_the_formula(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Blocks of one and of several rows, more blocks than programs."""
    kind, weight, bias = _vectors(form, shape[1:], dtype)
    x = (randn(*shape, dtype=dtype, scale=3.0) + 0.5).requires_grad_()
    _assert_norm(x, randn(*shape, dtype=dtype, seed=1), weight, bias, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["llama", "layer"])
def test_rows_that_registers_do_not_hold(form: str, dtype: torch.dtype) -> None:
    kind, weight, bias = _vectors(form, (9000,), dtype)
    x, dy = randn(7, 9000, dtype=dtype).requires_grad_(), randn(9000, 7, dtype=dtype, seed=1).t()
    _assert_norm(x, dy, weight, bias, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 4096), (25, 36)], ids=str)
def test_of_a_sum(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The sum is rounded as torch rounds it, and then normalized; gradients of sum and norm are added before rounding."""
    kind, weight, bias = _vectors(form, shape[1:], dtype)
    x, f, dy, ds = (randn(*shape, dtype=dtype, seed=seed, scale=2.0) for seed in range(4))
    x, f = x.requires_grad_(), f.requires_grad_()
    s, y = add_norm(x, f, weight, bias, kind)
    assert torch.equal(s, x + f)
    wide = [_leaf(t) for t in (s, weight, bias)]
    expected = _exact(*wide, kind)  # type: ignore[arg-type]
    assert_near(y, expected)
    inputs = [t for t in (x, f, weight, bias) if t is not None]
    exact = list(torch.autograd.grad(expected, [t for t in wide if t is not None], dy.double()))
    exact[0] = exact[0] + ds.double()
    for actual, gradient in zip(torch.autograd.grad((s, y), inputs, (ds, dy)), [exact[0], *exact], strict=True):
        assert_near(actual, gradient)


@pytest.mark.parametrize("size", [40, 9000])
def test_of_a_sum_that_is_used_only_once(size: int) -> None:
    """By nothing but the norm; by all but the norm."""
    x, f, dy = (randn(3, size, seed=seed).requires_grad_() for seed in range(3))
    weight = randn(size, seed=3).requires_grad_()
    s, y = add_norm(x, f, weight, None, LLAMA)
    only_norm = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    alone = norm(s.detach().requires_grad_(), weight, None, LLAMA)
    assert torch.equal(only_norm[1], torch.autograd.grad(alone, weight, dy)[0])
    dx, df, dweight = torch.autograd.grad(s, (x, f, weight), dy, allow_unused=True)
    assert torch.equal(dx, dy) and torch.equal(df, dy) and dweight is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["llama", "layer", "olmo"])
@pytest.mark.parametrize("per_head", [False, True], ids=["one weight", "per head"])
def test_heads_that_are_views(form: str, per_head: bool, dtype: torch.dtype) -> None:
    """Queries and keys in the fused buffer; gradients come in a layout of their own."""
    keys, queries, dim = 2, 5, 24
    qkv = randn(11, 2 * keys + queries, dim, dtype=dtype, scale=2.0)
    parts = qkv.split([keys, keys, queries], dim=1)
    for x in (parts[0], parts[2]):
        heads = x.shape[1]
        kind, weight, bias = _vectors(form, (heads, dim) if per_head else (dim,), dtype)
        x = x.detach().requires_grad_()
        assert not x.is_contiguous()
        dy = randn(heads, 11, dim, dtype=dtype, seed=2).transpose(0, 1)
        _assert_norm(x, dy, weight, bias, kind)
        if form == "layer":  # not contiguous in the last dim
            _assert_norm(x, randn(dim, 11, heads, dtype=dtype, seed=3).permute(1, 2, 0), weight, bias, kind)


def test_rows_that_are_not_neighbours() -> None:
    x, f = randn(40, 90).requires_grad_(), randn(40, 20, seed=1).requires_grad_()
    weight = randn(20, seed=2).requires_grad_()
    for view, other in ((x[::2, 3:23], f[1::2]), (x[:20, ::4][:, :20], f[:20].expand(20, 20)), (x[:20, :20].t(), f[20:])):
        s, y = add_norm(view, other, weight, None, LLAMA)
        assert torch.equal(s, view + other)
        wide = s.detach().double().requires_grad_()
        expected = _exact(wide, weight.double(), None, LLAMA)
        assert_near(y, expected)
        ds = torch.ones((), device=DEVICE).expand(20, 20)
        (exact,) = torch.autograd.grad(expected, wide, randn(20, 20, seed=3).double())
        (actual,) = torch.autograd.grad((s, y), other, (ds, randn(20, 20, seed=3)))
        assert_near(actual, exact + 1.0)


def test_values_at_the_ends_of_what_fits() -> None:
    """Squares that overflow float16, and rows of zeros."""
    x = randn(9, 64, dtype=torch.float16, scale=1e4)
    x[4] = 0.0
    weight = torch.ones(64, device=DEVICE, dtype=torch.float16)
    _assert_norm(x.requires_grad_(), randn(9, 64, dtype=torch.float16, seed=1), weight.requires_grad_(), None, GEMMA)
    assert not norm(torch.zeros(3, 64, device=DEVICE), None, None, LAYER).any()


def test_no_tokens() -> None:
    x, f, weight = randn(0, 16).requires_grad_(), randn(0, 16), randn(16).requires_grad_()
    for heads in (x, randn(0, 3, 16).requires_grad_()):
        y = norm(heads, weight, weight, LAYER)
        dx, dweight = torch.autograd.grad(y.sum(), (heads, weight))
        assert y.shape == dx.shape == heads.shape and dweight.shape == (16,) and not dweight.any()
    s, y = add_norm(x, f, weight, None, LLAMA)
    (s.sum() + y.sum()).backward()
    assert s.shape == y.shape == (0, 16) and x.grad is not None and x.grad.shape == (0, 16)


def test_rows_further_apart_than_int32_counts(tmp_path: Path) -> None:
    """The third is 2^31 elements behind the first. Counted in 32 bits it would be 2^31 before it, where there are zeros."""
    apart, first = (1 << 30) + 8, 1 << 31
    size = first + 2 * apart + 64
    if DEVICE.type == "cuda":
        places = [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    else:  # files of holes
        places = [torch.from_file(str(tmp_path / str(i)), True, size, dtype=torch.bfloat16) for i in range(2)]
    x, dy = (place.as_strided((3, 2, 24), (apart, 32, 1), first) for place in places)
    x.copy_(randn(3, 2, 24, seed=1))
    dy.copy_(randn(3, 2, 24, seed=2))
    _assert_norm(x.requires_grad_(), dy, None, None, GEMMA)


def test_gradients_that_are_not_wanted_are_not_made() -> None:
    """Weights and biases that are frozen; what the callback is given is not rounded."""
    x, dy = randn(5, 24, dtype=torch.bfloat16).requires_grad_(), randn(5, 24, dtype=torch.bfloat16, seed=1)
    weight, bias = (randn(24, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    given: list[tuple[Tensor, Tensor]] = []
    kind = replace(LAYER, weight_gradient=lambda vector, gradient: given.append((vector, gradient)))
    for wanted in ((False, False), (True, False), (False, True), (True, True)):
        vectors = [v.detach().requires_grad_(w) for v, w in zip((weight, bias), wanted, strict=True)]
        norm(x, *vectors, kind).backward(dy)
        assert [id(vector) for vector, _ in given] == [id(v) for v in vectors if v.requires_grad]
        assert all(v.grad is None for v in vectors)
        wide = [_leaf(t) for t in (x, *vectors)]
        exact = torch.autograd.grad(_exact(*wide, LAYER), wide[1:], dy.double())  # type: ignore[arg-type]
        for (_, gradient), expected in zip(given, [e for e, w in zip(exact, wanted, strict=True) if w], strict=True):
            assert gradient.dtype is torch.float32
            assert_near(gradient, expected)
        given.clear()


def test_operators() -> None:
    x, f, dy = (randn(3, 2, 16, seed=seed)[:, seed % 2] for seed in range(3))
    weight, bias, rest = randn(16, seed=4).requires_grad_(), randn(16, seed=5).requires_grad_(), (1e-5, 0.0, True)
    torch.library.opcheck(operators.norm, (x.requires_grad_(), weight, bias, *rest))
    torch.library.opcheck(operators.add_norm, (x, f.requires_grad_(), weight, None, *rest))
    stats = operators.norm(x, weight, bias, *rest)[1].detach()
    backward = (dy, x.detach(), stats, weight.detach())
    torch.library.opcheck(operators.norm_backward, (*backward, f.detach(), 0.0, 2))
    torch.library.opcheck(operators.norm_backward, (*backward, None, 0.0, 0), test_utils="test_faketensor")


def test_operators_differentiate_as_the_engine_does() -> None:
    x, f, weight = (t.requires_grad_() for t in (randn(5, 16), randn(5, 16, seed=1), randn(16, seed=2)))
    s, y, _ = operators.add_norm(x, f, weight, None, 1e-6, 0.0, False)
    given = randn(5, 16, seed=3), randn(5, 16, seed=4)
    actual = torch.autograd.grad((s, y), (x, f, weight), given)
    expected = torch.autograd.grad(add_norm(x, f, weight, None, LLAMA), (x, f, weight), given)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    compiled = torch.compile(lambda *t: operators.add_norm(*t, None, 1e-6, 0.0, False)[:2], backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(x, f, weight), (x, f, weight), given)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
