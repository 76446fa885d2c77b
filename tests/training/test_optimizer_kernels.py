"""A run whose updates, norms and embedding gradients are Triton's trains as one with torch's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble
from tests.training.small import run, small

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

FUSED = {"optimizer": "triton", "embedding": "triton"}
# Positions are learned, so that their table has a gradient by row too; the table of tokens is the head's as well.
MODEL: dict[str, Any] = {"position_embedding": "learned", "max_position_embeddings": 8}


def _train(config: Any) -> tuple[list[tuple[float, float]], tuple[float, float], Pieces]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    return run(build_engine(config, grid, torch.device("cpu")), config)


def _run(world: int, data: Path, **sections: Any) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    results = run_ranks(world, _train, small(data, 3, True, precision={"compute": "float32"}, **sections))
    return results[0][0], assemble([pieces for *_, pieces in results])


def test_training_is_that_of_torch(data: Path) -> None:
    history, weights = _run(1, data, model=MODEL, kernels=FUSED)
    expected_history, expected = _run(1, data, model=MODEL)
    assert history == [pytest.approx(pair, rel=1e-5) for pair in expected_history]
    assert history[-1][0] < history[0][0]
    for name, value in expected.items():
        # An update moves by up to the rate, 0.01, whatever the size of the gradient.
        assert (weights[name] - value).abs().max() < 1e-4, name


def test_over_tensor_and_data_parallel_ranks(data: Path) -> None:
    """Each rank adds to the rows it holds, and updates the slice it owns."""
    expected_history, expected = _run(1, data, kernels=FUSED)
    parallel = {"tensor_parallel": 2, "sequence_parallel": True}
    history, weights = _run(4, data, kernels=FUSED, parallel=parallel)
    assert history == [pytest.approx(pair, rel=1e-4) for pair in expected_history]
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 2e-3, name
