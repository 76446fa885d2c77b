"""A rank that is made slow is named, in every kind of layout, although all ranks take the same time for a step."""

from __future__ import annotations

import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_llm.training.loop import _steps
from megatron_llm.training.stragglers import compare
from tests.ranks import run_ranks
from tests.runs import assemble, config_of, owned_weights
from tests.training.commands import read_metrics
from tests.training.planted import fresh_run

SLEEP = 0.75
STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "dp2": (2, {}, 1),
    "tp2": (2, {"tensor_parallel": 2}, 1),
    "pp2 dp2": (4, {"pipeline_parallel": 2}, 3),
    "pp2 tp2": (4, {"pipeline_parallel": 2, "tensor_parallel": 2}, 0),
}


def _job(run_dir: Path, parallel: dict[str, Any], every: int, slow: int | None) -> tuple[list[str], Any]:
    """Train on this rank, which sleeps in every forward pass if it is the slow one: warnings, and the weights it owns."""
    settings = {"run_dir": str(run_dir), "straggler_every": every, "straggler_factor": 1.5}
    run = fresh_run(config_of(parallel=parallel, training={"steps": STEPS}, logging=settings))
    for stage in run.engine.stages.values():
        if run.engine.grid.world.rank == slow:
            stage.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron_llm")
    log.addHandler(handler)
    try:
        _steps(run)
    finally:
        log.removeHandler(handler)
    return [line for line in said if "slow" in line], owned_weights(run.engine)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slow_rank_is_named(tmp_path: Path, layout: str) -> None:
    world, parallel, slow = LAYOUTS[layout]
    warnings = [said for said, _ in run_ranks(world, _job, tmp_path, parallel, STEPS, slow)]
    assert [len(said) for said in warnings] == [1] + [0] * (world - 1), "rank 0 says it for all"
    place = f"its only peer of pipeline rank {slow // 2}" if "pp2" in layout else "its only peer (logging"
    first = warnings[0][0].split(";")[0]  # on a busy machine another one may be slow, too
    assert f"rank {slow} on {os.uname().nodename} was busy" in first and place in first
    *others, line = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert "slowest_rank" in line and not any("slowest_rank" in other for other in others)
    passes = 2 if "dp2" in layout else 4
    assert line["slowest_rank"] == slow and line["slowest_factor"] > 1.5
    assert line["busy_seconds/max"] > passes * SLEEP
    assert line["busy_seconds/min"] < 0.7 * line["busy_seconds/max"], "waits are not work"


def test_measuring_changes_no_bit(tmp_path: Path) -> None:
    world, parallel, _ = LAYOUTS["pp2 tp2"]
    never, always = (
        assemble([weights for _, weights in run_ranks(world, _job, tmp_path / str(every), parallel, every, None)])
        for every in (0, 1)
    )
    assert never.keys() == always.keys() and all(torch.equal(never[name], always[name]) for name in never)
    numbers = [
        [(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / str(every)) if "loss" in line] for every in (0, 1)
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == STEPS
    keys = [set().union(*read_metrics(tmp_path / str(every))) for every in (0, 1)]
    assert "busy_seconds/max" in keys[1] and not any(key.startswith("busy") for key in keys[0])


@pytest.mark.parametrize(("pipeline_ranks", "size"), [(1, 2), (1, 3), (2, 4), (3, 5)])
def test_ranks_are_compared_with_the_others_of_their_stage(pipeline_ranks: int, size: int) -> None:
    seconds = np.random.default_rng(size).uniform(1, 2, pipeline_ranks * size).tolist()
    compared = compare(seconds, pipeline_ranks)
    assert sorted(one.rank for one in compared) == list(range(len(seconds)))
    assert [one.factor for one in compared] == sorted((one.factor for one in compared), reverse=True)
    for one in compared:
        stage = one.rank // size
        others = [seconds[rank] for rank in range(stage * size, (stage + 1) * size) if rank != one.rank]
        assert one.median == pytest.approx(statistics.median(others), rel=1e-12) and one.peers == size - 1


def test_a_rank_without_peers_is_compared_with_nobody() -> None:
    assert compare([1.0, 9.0, 1.0], 3) == []
