"""Rotary embeddings in place, in Triton and torch, against complex numbers in float64; and models with either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_llm.generation.cache import SequenceCache
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.recompute import Recompute
from megatron_llm.models.stages import add_adapters
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.kernels import Kernels
from megatron_llm.ops.rope import rope_frequencies, rope_tables, rotary_, split_heads, split_rotated
from megatron_llm.ops.triton.rope import rope_, rope_back, rope_join
from megatron_llm.parallel.grid import Grid
from tests.decoders import DECODERS
from tests.ops.triton.common import DEVICE, assert_near, far_rows, randn
from tests.runs import RECOMPUTE, config_of

DTYPES = [torch.float32, torch.bfloat16]
KERNELS = ["torch", "triton"]
SHAPES = {  # query heads, key/value heads, channels, of which rotated, interleaved
    "full": (6, 2, 8, 8, False),
    "a quarter": (3, 3, 64, 16, False),
    "no power of two": (5, 1, 40, 24, False),
    "all of no power of two": (1, 1, 6, 6, False),
    "interleaved": (4, 2, 16, 16, True),
    "interleaved in part": (3, 1, 12, 4, True),
    "several blocks of heads": (40, 9, 128, 128, False),
    "several blocks of heads in part": (20, 17, 256, 128, True),
}
POSITIONS = [0, 1, 2, 0, 5, 1000]


def _tables(rotated: int, positions: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    where = torch.tensor(positions, dtype=torch.int64, device=DEVICE)
    return rope_tables(where, rope_frequencies(rotated, 500.0, None, dtype).to(DEVICE), 1.25)


def _turned(x_TND: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """What x is multiplied by cos + i sin, in float64."""
    cos, sin = (table.double() for table in tables)
    turned, rest = x_TND.double().tensor_split([2 * cos.shape[-1]], dim=-1)
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    products = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return torch.cat(((products if interleaved else products.transpose(-1, -2)).flatten(-2), rest), -1)


def _back(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tables[0], -tables[1]


def _joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat((k, v, q), dim=1).flatten(1)


def _case(shape: str, dtype: torch.dtype, tokens: int = len(POSITIONS)) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]:
    """The buffer, gradients of q, k and v, and tables."""
    queries, keys, dim, rotated, _ = SHAPES[shape]
    gradients = [randn(tokens, n, dim, dtype=dtype, seed=n) for n in (queries, keys, keys)]
    return randn(tokens, (queries + 2 * keys) * dim, dtype=dtype), gradients, _tables(rotated, POSITIONS[:tokens])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_product_with_complex_numbers(shape: str, dtype: torch.dtype, kernel: str) -> None:
    qkv, (dq, dk, dv), tables = _case(shape, dtype)
    _, keys, dim, _, interleaved = SHAPES[shape]
    leaf = qkv.clone().requires_grad_()
    used = leaf.clone()
    out = split_rotated(used, *tables, keys, dim, interleaved, kernel)
    assert {x.untyped_storage().data_ptr() for x in out} == {used.untyped_storage().data_ptr()}
    q, k, v = split_heads(qkv, keys, dim)
    assert torch.equal(out[2], v)
    for actual, x in zip(out, (q, k), strict=False):
        assert_near(actual.detach(), _turned(x, tables, interleaved))
    (actual,) = torch.autograd.grad(out, leaf, (dq, dk, dv))
    assert actual.is_contiguous() and torch.equal(split_heads(actual, keys, dim)[2], dv)
    expected = _joined(_turned(dq, _back(tables), interleaved), _turned(dk, _back(tables), interleaved), dv.double())
    assert_near(actual, expected)

    parts = [x.clone().requires_grad_() for x in (q, k)]
    copies = [x.clone() for x in parts]
    alone = rotary_(*copies, *tables, interleaved, kernel)
    assert all(a.data_ptr() == b.data_ptr() and torch.equal(a, c) for a, b, c in zip(alone, copies, out, strict=False))
    gradients = torch.autograd.grad(alone, parts, (dq, dk))
    assert torch.equal(_joined(*gradients, dv), actual)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, kernel: str) -> None:
    qkv, gradients, tables = _case("full", torch.float32, tokens)
    leaf = qkv.clone().requires_grad_()
    out = split_rotated(leaf.clone(), *tables, 2, 8, False, kernel)
    (actual,) = torch.autograd.grad(out, leaf, gradients)
    assert (
        torch.equal(actual, qkv.new_tensor([]).view(0, 80))
        if not tokens
        else torch.equal(out[0][0], qkv[0, 32:].view(6, 8) * 1.25)
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_read_wherever_they_lie_and_stay_what_they_are(kernel: str) -> None:
    """As views of one tensor, with channels apart, one for many tokens, the same for q, k and v."""
    _, _, tables = _case("full", torch.float32)
    leaf = randn(6, 3 * 4 * 8).requires_grad_()
    shared = randn(6, 4, 8, seed=9)
    cases = [
        [shared] * 3,
        [shared.expand(6, 4, 8), shared[:1].expand(6, 4, 8), torch.ones((), device=DEVICE).expand(6, 4, 8)],
        [randn(4, 6, 8, seed=s).transpose(0, 1) for s in (1, 2, 3)],
        [randn(6, 4, 16, seed=s)[..., ::2] for s in (1, 2, 3)],
        [*randn(6, 3, 4, 8, seed=4).unbind(1)],
    ]
    for gradients in cases:
        before = [gradient.clone() for gradient in gradients]
        out = split_rotated(leaf.clone(), *tables, 4, 8, False, kernel)
        for _ in range(2):  # a graph that is kept runs backward again
            (actual,) = torch.autograd.grad(out, leaf, gradients, retain_graph=True)
            turned = [_turned(gradient, _back(tables), False) for gradient in before]
            assert_near(actual, _joined(turned[0], turned[1], before[2].double()))
        alone = [leaf[:, :32].reshape(6, 4, 8), leaf[:, 32:64].reshape(6, 4, 8)]
        rotated = rotary_(*(x.clone() for x in alone), *tables, False, kernel)
        for actual, expected in zip(torch.autograd.grad(rotated, alone, gradients[:2]), turned, strict=False):
            assert_near(actual, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_some_of_the_heads_matter(kernel: str) -> None:
    qkv, gradients, tables = _case("full", torch.float32)
    for place, gradient in enumerate(gradients):
        leaf = qkv.clone().requires_grad_()
        out = split_rotated(leaf.clone(), *tables, 2, 8, False, kernel)
        (actual,) = torch.autograd.grad(out[place], leaf, gradient)
        others = [torch.zeros_like(x) for x in gradients]
        turned = gradient.double() if place == 2 else _turned(gradient, _back(tables), False)
        assert_near(actual, _joined(*(turned if i == place else x.double() for i, x in enumerate(others))))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_was_kept_before_it_was_rotated_is_missed(kernel: str) -> None:
    """The buffer is changed behind autograd's back; not behind that of an operation that keeps it."""
    _, _, tables = _case("full", torch.float32)
    leaf = randn(6, 80).requires_grad_()
    out = split_rotated(leaf.exp(), *tables, 2, 8, False, kernel)  # exp keeps its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(x.sum() for x in out).backward()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [6, 4])
def test_gradcheck(rotated: int, interleaved: bool) -> None:
    tables = tuple(table.cpu() for table in _tables(rotated, [0, 3, 11], torch.float64))
    leaf = torch.randn(3, 4 * 6, dtype=torch.float64, requires_grad=True)
    q, k = (torch.randn(3, n, 6, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    assert gradcheck(lambda x: split_rotated(x.clone(), *tables, 1, 6, interleaved), (leaf,))
    assert gradcheck(lambda q, k: rotary_(q.clone(), k.clone(), *tables, interleaved), (q, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_apart(dtype: torch.dtype) -> None:
    """Offsets of more than 2^31 elements: of the buffer, of gradients, of what they are written into."""
    buffer, tables = far_rows(3, 3 * 2 * 8, dtype), _tables(6, [3, 0, 7])
    values = randn(3, 48, dtype=dtype)
    buffer.copy_(values)
    q, k, v = split_heads(buffer, 2, 8)
    near_q, near_k, near_v = split_heads(values, 2, 8)
    expected = [_turned(x, tables, False) for x in (near_q, near_k)]
    back = [_turned(x, _back(tables), False) for x in (near_q, near_k)]
    assert_near(rope_join(q, k, v, *tables, False), _joined(*back, near_v.double()))
    for actual, wanted in zip(rope_back(q, k, *tables, False), back, strict=True):
        assert_near(actual, wanted)
    rope_(q, k, *tables, False)
    assert_near(q, expected[0])
    assert_near(k, expected[1])
    assert torch.equal(v, near_v)


def test_tables_far_apart() -> None:
    cos, sin = _tables(8, [3, 0, 7])
    wide = far_rows(3, 16)
    wide[:, :4], wide[:, 8:12] = cos[:, 0], sin[:, 0]
    qkv = randn(3, 3 * 8)
    out = split_rotated(qkv.clone(), wide[:, None, :4], wide[:, None, 8:12], 1, 8, False, "triton")
    assert_near(out[0], _turned(split_heads(qkv, 1, 8)[0], (cos, sin), False))


def test_operators() -> None:
    q, k, v, tables = randn(3, 2, 8), randn(3, 1, 8), randn(3, 1, 8, seed=1), _tables(6, [3, 0, 7])
    torch.library.opcheck(rope_, (q, k, *tables, False))
    torch.library.opcheck(rope_back, (q, k, *tables, True))
    torch.library.opcheck(rope_join, (q, k, v, *tables, False))


# Models


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    **{name: DECODERS[name] for name in ("neox", "falcon", "cohere2", "olmo", "olmo2", "qwen3")},
    "gptj": DECODERS["neox"] | {"rope_interleaved": True, "qkv_bias": False, "parallel_block": "one_norm"},
    "gemma3": DECODERS["gemma2"] | {"attn_logit_softcapping": None, "rope_local_theta": 100.0, "qk_norm": "head"},
    "gemma3 without norms": DECODERS["gemma2"] | {"rope_local_theta": 100.0},
    "lora": DECODERS["qwen3"] | {"qk_norm": "none", "qkv_bias": True},
}


def _run(model: str, setting: str, kernel: str) -> list[Tensor]:
    """Output, gradient of the input, and of all parameters, of a stage in float32."""
    torch.manual_seed(0)
    config = config_of(
        model=MODELS[model], training=RECOMPUTE[setting] if setting else {},
        **({"peft": {"rank": 3, "targets": ["attention.q", "attention.v"]}} if model == "lora" else {}),
    )  # fmt: skip
    stage = DecoderStage(
        config.model, Grid.single(), range(2), first=False, last=False, sequence_parallel=False, dtype=torch.float32,
        device=DEVICE, kernels=Kernels(rope=kernel), recompute=Recompute.of(config.training),
    )  # fmt: skip
    if config.peft is not None:
        add_adapters([stage], config.model, config.peft)
    for parameter in stage.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    ids = torch.arange(12, device=DEVICE)
    batch = Batch(ids, ids, torch.ones(12, device=DEVICE), torch.cat((ids[:5], ids[:7])), (0, 5, 12))
    x = torch.randn(12, config.model.hidden_size).to(DEVICE).requires_grad_()
    y = stage(x, batch)
    y.backward(torch.randn(y.shape).to(DEVICE))
    assert x.grad is not None
    gradients = [parameter.main_grad if parameter.grad is None else parameter.grad for parameter in stage.parameters()]
    return [y.detach(), x.grad, *gradients]


@pytest.mark.parametrize("model", MODELS)
def test_models_are_the_same_by_either_kernel(model: str) -> None:
    """Rotated once, also where attention or the whole layer is made again in backward."""
    expected = _run(model, "", "torch")
    assert sum(bool(x.abs().max()) for x in expected) > 5
    once = _run(model, "", "triton")
    for actual, wanted in zip(once, expected, strict=True):
        assert_near(actual, wanted.double())
    for setting in ("attention", "full"):
        assert all(torch.equal(a, b) for a, b in zip(_run(model, setting, "triton"), once, strict=True)), setting


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model", ["llama", "cohere2"])
def test_a_cache_holds_rotated_keys(model: str, kernel: str) -> None:
    """A document token by token is the document at once."""
    torch.manual_seed(0)
    config = config_of(model=MODELS[model])
    stage = DecoderStage(
        config.model, Grid.single(), range(2), first=False, last=False, sequence_parallel=False, dtype=torch.float32,
        device=DEVICE, kernels=Kernels(rope=kernel),
    )  # fmt: skip
    for parameter in stage.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    x, ids = torch.randn(6, config.model.hidden_size).to(DEVICE), torch.arange(6, device=DEVICE)
    with torch.no_grad():
        expected = stage(x.clone(), Batch(ids, ids, torch.ones(6, device=DEVICE), ids, (0, 6)))
        cache, rows = SequenceCache([6]), []
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            positions = cache.begin([stop - start]).to(DEVICE)
            part = ids[start:stop]
            batch = Batch(part, part, torch.ones(stop - start, device=DEVICE), positions, (0, stop - start))
            rows.append(stage(x[start:stop].clone(), batch, cache))
    assert_near(torch.cat(rows), expected.double())
