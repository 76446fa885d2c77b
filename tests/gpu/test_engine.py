"""The engine on a GPU against the same run on the CPU. Skipped where there is no GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.generation.generate import Sampling, generate
from megatron_llm.ops.attention import attention
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.build import build_engine, build_model
from megatron_llm.training.sources import FreshWeights
from megatron_llm.training.step import RunState, train_step
from tests.runs import config_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def losses(config: Config, device: str) -> list[tuple[float, float]]:
    engine, stream, state = build_engine(config, Grid.single(), torch.device(device)), build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(6)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("compute, tolerance", [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 2e-2)])
def test_training_equals_the_cpu(compute: str, tolerance: float) -> None:
    config = config_of(optimizer={"lr": 1e-3}, precision={"compute": compute})
    expected = losses(config_of(optimizer={"lr": 1e-3}), "cpu")
    assert losses(config, "cuda") == [pytest.approx(pair, rel=tolerance) for pair in expected]


@pytest.mark.parametrize("compute, tolerance", [("float64", 1e-9), ("bfloat16", 2e-2)])
def test_training_of_adapters_equals_the_cpu(compute: str, tolerance: float) -> None:
    """Products with B are added to columns of q, k and v in place."""
    sections: dict[str, dict[str, Any]] = {"optimizer": {"lr": 1e-2}, "peft": {"rank": 4}}
    expected = losses(config_of(**sections), "cpu")
    assert losses(config_of(precision={"compute": compute}, **sections), "cuda") == [
        pytest.approx(pair, rel=tolerance) for pair in expected
    ]


def test_noise_and_penalties_equal_those_of_the_cpu() -> None:
    """The masks are the same to the bit, or losses would be far off."""
    chosen = {"hidden_dropout": 0.2, "neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    config = config_of(optimizer={"lr": 1e-3}, training={"regularization": chosen})
    assert losses(config, "cuda") == [pytest.approx(pair, rel=1e-9) for pair in losses(config, "cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_its_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cu = (0, 1, 65, 129, 400)
    q, k, v = (torch.randn(cu[-1], heads, 64, device="cuda", dtype=dtype) for heads in (8, 2, 2))
    expected = attention(*(x.double() for x in (q, k, v)), cu, cu, "reference")
    torch.testing.assert_close(attention(q, k, v, cu, cu, "sdpa").double(), expected, atol=2e-2, rtol=2e-2)


def test_greedy_generation_equals_the_cpu() -> None:
    model, source = config_of().model, FreshWeights(3, 0.3)
    outputs = [
        generate(
            build_model(model, source, torch.float64, torch.device(device)),
            [[1, 2, 3], [4]],
            max_new_tokens=8,
            sampling=Sampling(),
        )
        for device in ("cpu", "cuda")
    ]
    assert outputs[0] == outputs[1]


def test_fresh_weights_are_those_of_the_cpu() -> None:
    """But for the last bits of float64, so also where a rank makes a piece of them."""
    part = Part("layers.3.mlp.up.weight", (50, 70), ())
    box = Box((7, 11), (40, 50))
    expected, actual = (FreshWeights(3, 0.3, torch.device(kind)).read(part, box) for kind in ("cpu", "cuda"))
    assert actual.is_cuda
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=1e-14)
