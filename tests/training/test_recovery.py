"""A checkpoint of any layout continues in any other, with all that it holds: float64, equal to the run that never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_llm.checkpoint.load import Checkpoint
from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.progress import Progress
from megatron_llm.training.recovery import (
    check_agreement,
    choose_checkpoint,
    find_resume,
    load_run,
    newest_checkpoint,
    probe_checkpoints,
)
from megatron_llm.training.run_folder import RunFolder
from megatron_llm.training.step import RunState, train_step
from tests.ranks import RankFailure, run_ranks
from tests.runs import config_of, save_run
from tests.training.blends import contents

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2 pp2 dp2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "pp4": (4, {"pipeline_parallel": 4}),
    "tp4 dp2": (8, {"tensor_parallel": 4, "bucket_size": 2000}),
    "tp2 pp2 dp2, ZeRO-0": (8, {"tensor_parallel": 2, "pipeline_parallel": 2, "zero_stage": 0}),
    "tp2 dp2, ZeRO-0": (4, {"tensor_parallel": 2, "zero_stage": 0, "bucket_size": 1500}),
    "pp2 dp2, interleaved": (4, {"pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}),
    "tp2 pp2, zb_v": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
}
TOURS = {  # every layout of them is left, and come to, with all that a run has
    "there and back": ["tp2 pp2 dp2", "pp4", "tp2 pp2 dp2", "tp4 dp2", "tp2 pp2 dp2", "single", "tp2 pp2 dp2"],
    "around": ["tp2 pp2 dp2", "single", "pp4", "tp4 dp2", "single"],
    "ZeRO and stages": [
        "tp2 pp2 dp2",
        "pp2 dp2, interleaved",
        "tp2 pp2 dp2, ZeRO-0",
        "tp2 pp2, zb_v",
        "tp2 dp2, ZeRO-0",
        "pp2 dp2, interleaved",
        "single",
    ],
}
STEPS = 3


def continue_run(config: Config, times: int = 1) -> list[tuple[float, float]]:
    """Load the newest checkpoint of the run folder if there is one; train on and save, some times. Losses, gradient norms."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    checkpoint = find_resume(config)
    engine = build_engine(config, grid, torch.device("cpu"), checkpoint.source("weights") if checkpoint else None)
    state = load_run(engine, checkpoint) if checkpoint else RunState()
    stream = build_train_stream(config)
    results = []
    for _ in range(times):
        results += [train_step(engine, stream, state) for _ in range(STEPS)]
        save_run(engine, state)
    return [(result.loss, result.grad_norm) for result in results]


def run(layout: str, folder: Path, tied: bool, times: int = 1) -> list[tuple[float, float]]:
    world, parallel = LAYOUTS[layout]
    sections = {
        "model": {"tie_word_embeddings": tied},
        "logging": {"run_dir": str(folder)},
        "optimizer": {"ema_decay": 0.9},
        "lr_schedule": {"decay_steps": 30},
        "checkpoint": {"keep_last": 10},
    }
    config = config_of(parallel=parallel, training={"micro_batch_size": 1}, **sections)
    return run_ranks(world, continue_run, config, times)[0]


@pytest.fixture(scope="module")
def stayed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[list[tuple[float, float]], Path]]:
    """Results of every step, and the folder, of a run of one process that never stopped and so loaded nothing."""
    made: dict[bool, tuple[list[tuple[float, float]], Path]] = {}

    def result(tied: bool) -> tuple[list[tuple[float, float]], Path]:
        if tied not in made:
            folder = tmp_path_factory.mktemp("stayed")
            longest = max(map(len, TOURS.values()))
            made[tied] = run("single", folder, tied, longest), folder
        return made[tied]

    return result


@pytest.mark.parametrize(
    "tour, tied",
    [
        ("around", False),
        ("ZeRO and stages", True),
        pytest.param("around", True, marks=pytest.mark.slow),
        pytest.param("ZeRO and stages", False, marks=pytest.mark.slow),
        pytest.param("there and back", False, marks=pytest.mark.slow),
        pytest.param("there and back", True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_continues_in_any_layout(tmp_path: Path, stayed: Any, tour: str, tied: bool) -> None:
    """Losses and norms of all steps, and in the end every tensor: weights, moments and average."""
    moved = [result for layout in TOURS[tour] for result in run(layout, tmp_path, tied)]
    expected, folder = stayed(tied)
    assert moved == [pytest.approx(result, rel=1e-9) for result in expected[: len(moved)]]
    step = len(moved)
    ours, theirs = contents(tmp_path / "checkpoints", step), contents(folder / "checkpoints", step)
    assert ours.keys() == theirs.keys() and {name.split("/")[0] for name in ours} >= {"weights", "m", "v", "ema"}
    for name, whole in theirs.items():
        if not isinstance(whole, torch.Tensor):
            assert ours[name] == whole, name
            continue
        error, limit = torch.linalg.vector_norm(ours[name] - whole), torch.linalg.vector_norm(whole)
        assert error <= 1e-9 * limit + 1e-12 * whole.numel() ** 0.5, name


def agree(seen: list[tuple[int, str] | None]) -> None:
    grid = Grid.build(config_of().parallel, 1)
    mine = seen[grid.world.rank]
    checkpoint = None if mine is None else cast(Checkpoint, SimpleNamespace(step=mine[0], checksum=mine[1]))
    check_agreement(checkpoint, grid.world)


@pytest.mark.parametrize("seen", [[(6, "a")] * 3, [None] * 3])
def test_ranks_that_agree_go_on(seen: list[tuple[int, str] | None]) -> None:
    run_ranks(3, agree, seen)


@pytest.mark.parametrize(
    "seen, said",
    [
        ([(6, "a"), (6, "a"), (3, "b")], r"rank 0 step 6 \(a\), rank 2 step 3 \(b\)"),
        ([(6, "a"), None, (6, "a")], r"rank 0 step 6 \(a\), rank 1 none"),
        ([(0, "a"), (0, "c"), (0, "a")], r"rank 0 step 0 \(a\), rank 1 step 0 \(c\)"),
    ],
)
def test_ranks_that_see_different_checkpoints_do_not_train(seen: list[tuple[int, str] | None], said: str) -> None:
    with pytest.raises(RankFailure, match=f"different checkpoints to start from: {said}; they must be in a folder"):
        run_ranks(3, agree, seen)


def choose(folder: Path) -> int | None:
    """What a rank goes on from if it alone does not see the newest checkpoint at first, or all of it is rank 0's to say."""
    config = config_of(logging={"run_dir": str(folder)})
    grid = Grid.build(config.parallel, 1)

    def chosen(damaged: Any) -> Checkpoint | None:
        assert grid.world.first, "the others are told"
        return newest_checkpoint(config, damaged)

    checkpoint = choose_checkpoint(chosen, config, grid.world, Progress("verifying"))
    return checkpoint.step if checkpoint else None


def test_rank_0_chooses_for_all(tmp_path: Path) -> None:
    assert run_ranks(3, choose, tmp_path) == [None] * 3
    engine = build_engine(config_of(logging={"run_dir": str(tmp_path)}), Grid.single(), torch.device("cpu"))
    for step in (3, 5):
        save_run(engine, RunState(step=step))
    assert run_ranks(3, choose, tmp_path) == [5] * 3
    file = tmp_path / "checkpoints/step-00000005/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert run_ranks(3, choose, tmp_path) == [3] * 3
    (tmp_path / "checkpoints/step-00000003/manifest.json").unlink()
    with pytest.raises(RankFailure, match="no checkpoint in .* is whole: restore one"):
        run_ranks(3, choose, tmp_path)


def test_the_first_failure_is_the_one_reported(tmp_path: Path) -> None:
    config = config_of(logging={"run_dir": str(tmp_path)})
    for rank in (0, 1):
        with pytest.raises(RuntimeError), RunFolder(config, 0), RunFolder(config, rank + 1) as folder:
            folder.joined()
            raise RuntimeError(f"rank {rank + 1} has had enough")
        assert json.loads((tmp_path / "status.json").read_text())["reason"].endswith(f"rank {rank + 1} has had enough")
        assert json.loads((tmp_path / "status.json").read_text())["reason"].startswith(f"rank {rank + 1}: RuntimeError")


def test_a_rank_that_never_joined_says_nothing_in_the_folder_of_a_live_run(tmp_path: Path) -> None:
    config = config_of(logging={"run_dir": str(tmp_path)})
    with RunFolder(config, 0) as live:
        live.report("running", step=3)
        with pytest.raises(ValueError, match="another run is writing"), RunFolder(config, 0):
            pass
        with pytest.raises(TimeoutError), RunFolder(config, 1):
            raise TimeoutError("rank 0 never came")
        assert json.loads((tmp_path / "status.json").read_text()) == {"outcome": "running", "step": 3}


def test_the_folder_of_checkpoints_may_be_set_aside_while_a_rank_tries_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 does with `resume: never`, when ranks do not wait for each other yet."""
    make, moved = LocalFolder.make, []

    def make_and_lose(self: LocalFolder) -> None:
        make(self)
        if not moved:
            moved.append(self.path.rename(tmp_path / "before"))

    monkeypatch.setattr(LocalFolder, "make", make_and_lose)
    probe_checkpoints(config_of(logging={"run_dir": str(tmp_path / "run")}))
    assert moved and not list((tmp_path / "run/checkpoints").iterdir())
