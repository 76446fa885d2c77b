"""A checkpoint of any layout continues in any other, moments included: float64, equal to the run that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_llm.checkpoint.load import Checkpoint
from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.recovery import check_agreement, find_resume, load_run
from megatron_llm.training.run_folder import RunFolder
from megatron_llm.training.step import RunState, train_step
from tests.ranks import RankFailure, run_ranks
from tests.runs import config_of, save_run

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
    checkpoint = find_resume(config)
    engine = build_engine(config, grid, torch.device("cpu"), checkpoint.source("weights") if checkpoint else None)
    state = load_run(engine, checkpoint) if checkpoint else RunState()
    stream = build_train_stream(config)
    results = [train_step(engine, stream, state) for _ in range(STEPS)]
    save_run(engine, state)
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


def agree(steps: list[int | None]) -> None:
    grid = Grid.build(config_of().parallel, 1)
    step = steps[grid.world.rank]
    check_agreement(None if step is None else cast(Checkpoint, SimpleNamespace(step=step)), grid.world)


@pytest.mark.parametrize("steps", [[6, 6, 6], [None, None, None]])
def test_ranks_that_agree_go_on(steps: list[int | None]) -> None:
    run_ranks(3, agree, steps)


@pytest.mark.parametrize(
    "steps, said", [([6, 6, 3], "rank 0 step 6, rank 2 step 3"), ([6, None, 6], "rank 0 step 6, rank 1 none")]
)
def test_ranks_that_see_different_checkpoints_do_not_train(steps: list[int | None], said: str) -> None:
    with pytest.raises(RankFailure, match=f"different checkpoints to continue from: {said}; they must be in a folder"):
        run_ranks(3, agree, steps)


def test_the_first_failure_is_the_one_reported(tmp_path: Path) -> None:
    config = config_of(logging={"run_dir": str(tmp_path)})
    for rank in (0, 1):
        with pytest.raises(RuntimeError), RunFolder(config, 0), RunFolder(config, rank + 1):
            raise RuntimeError(f"rank {rank + 1} has had enough")
        assert json.loads((tmp_path / "status.json").read_text())["reason"].endswith(f"rank {rank + 1} has had enough")
        assert json.loads((tmp_path / "status.json").read_text())["reason"].startswith(f"rank {rank + 1}: RuntimeError")
