"""A checkpoint of any layout continues in any other, moments included: float64, equal to the run that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.recovery import find_resume, load_run, save_run
from megatron_llm.training.step import RunState, train_step
from tests.ranks import run_ranks
from tests.runs import config_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2 pp2 dp2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "pp4": (4, {"pipeline_parallel": 4}),
    "tp4 dp2": (8, {"tensor_parallel": 4, "bucket_size": 2000}),
}
STEPS = 3


def continue_run(config: Config) -> list[tuple[float, float]]:
    """Load the newest checkpoint of the run folder if there is one, train on, save. Losses and gradient norms."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    checkpoint = find_resume(config)
    state = load_run(engine, checkpoint) if checkpoint else RunState()
    stream = build_train_stream(config)
    results = [train_step(engine, stream, state) for _ in range(STEPS)]
    save_run(engine, state, {})
    return [(result.loss, result.grad_norm) for result in results]


def run(layout: str, folder: Path, tied: bool) -> list[tuple[float, float]]:
    world, parallel = LAYOUTS[layout]
    sections = {"model": {"tie_word_embeddings": tied}, "logging": {"run_dir": str(folder)}}
    return run_ranks(world, continue_run, config_of(parallel=parallel, training={"micro_batch_size": 1}, **sections))[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_continues_in_any_layout(tmp_path: Path, tied: bool) -> None:
    tour = ["tp2 pp2 dp2", "single", "pp4", "tp4 dp2", "single"]
    moved = [result for layout in tour for result in run(layout, tmp_path / "moved", tied)]
    stayed = [result for _ in tour for result in run("single", tmp_path / "stayed", tied)]
    assert moved == [pytest.approx(result, rel=1e-9) for result in stayed]
