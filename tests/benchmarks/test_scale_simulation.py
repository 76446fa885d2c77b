"""Scaling as the benchmark predicts it: limits with closed forms, conservation, and what is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scale_simulation import MODELS, Llama, described, point

from megatron_llm.planning.compare import candidate
from megatron_llm.planning.flops import model_flops_per_token
from megatron_llm.planning.hardware import DEVICES, Device, Shares
from megatron_llm.planning.step_time import Modelled

ROOT = Path(__file__).parents[2]
SMALL = Llama("small", 2048, 5632, 8, 16, rows=16, rows_per_gpu=2)
H100 = Modelled(DEVICES["h100"])
IDEAL = Modelled(
    Device("ideal", 1e15, 1e6, 1e30, 1e30, 1e30), Shares(1, scores=1, scores_backward=1.25, call=0, hop=0, network_hop=0)
)
"""Memory and links take no time, scores run at the peak (1.25: their backward makes a forward again that does not count)."""


def _step(assumed: Modelled, world: int, rows: int, **parallel: Any) -> dict[str, Any]:
    config = SMALL.config(rows, **parallel)
    it = config.parallel
    return described(candidate(config, world, it.pipeline_schedule, it.virtual_stages, assumed), assumed)


@pytest.mark.parametrize("world, parallel", [(1, {}), (2048, {}), (1024, {"tensor_parallel": 8}), (8, {"tensor_parallel": 2})])
def test_where_nothing_but_flops_takes_time_the_step_is_flops_over_the_peak(world: int, parallel: dict[str, int]) -> None:
    """Weak scaling is perfect then: MFU 1 on one GPU and on thousands."""
    row = _step(IDEAL, world, 2 * world, **parallel)
    flops = model_flops_per_token(SMALL.config(1).model, 8192) * row["tokens"]
    assert row["seconds"] == pytest.approx(flops / world / 1e15, rel=2e-3)
    assert row["mfu"] == pytest.approx(row["parts"]["products and scores"], rel=2e-3)


def test_one_micro_batch_makes_a_pipeline_serial() -> None:
    """However layers are split: the step takes as long as on one GPU, and three quarters of four GPUs idle."""
    row = _step(IDEAL, 4, 1, pipeline_parallel=4)
    assert row["seconds"] == pytest.approx(_step(IDEAL, 1, 1)["seconds"], rel=1e-6)
    assert row["mfu"] == pytest.approx(1 / 4, rel=2e-3)


def test_weak_scaling_of_one_layout_never_gains_and_flops_are_conserved() -> None:
    seconds = []
    for world in (8, 16, 64, 512, 4096, 16_384):
        row = _step(H100, world, world, tensor_parallel=4, pipeline_parallel=2)
        seconds.append(row["seconds"])
        assert sum(row["parts"].values()) == pytest.approx(1) and all(part >= 0 for part in row["parts"].values())
        model = model_flops_per_token(SMALL.config(1).model, 8192) * row["tokens"]
        assert row["tflops_per_gpu"] * 1e12 * row["seconds"] * world == pytest.approx(model)
        busy = row["parts"]["products and scores"] * row["seconds"] * world
        assert model / busy < H100.shares.products * 989e12  # no FLOP is made faster than the fastest
    assert seconds == sorted(seconds) and seconds[-1] > seconds[0]


def test_more_gpus_do_not_lengthen_the_best_step_of_a_batch() -> None:
    points = [point(SMALL, "strong", world, H100) for world in (1, 2, 4, 8, 16)]
    seconds = [step["seconds"] for step in points if step]
    assert len(seconds) == 5 and seconds == sorted(seconds, reverse=True)
    assert all(now >= before / 2 * 0.99 for before, now in zip(seconds, seconds[1:], strict=False))  # no more than linear


def _stored() -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    stored = json.loads((ROOT / "benchmarks/results/scale_simulation.json").read_text())
    assert [curve["model"]["name"] for curve in stored["curves"]] == [model.name for model in MODELS]
    for curve in stored["curves"]:
        for kind in ("strong", "weak"):
            yield curve["model"]["name"], kind, curve[kind]


def test_what_is_stored_is_possible() -> None:
    """Every point: its layout makes up the GPUs and the batch, its memory fits, its parts are the whole."""
    for name, kind, rows in _stored():
        assert rows[-1]["gpus"] == 16_384, name
        for row in rows:
            it = row["layout"]
            assert it["tp"] * it["pp"] * it["dp"] == row["gpus"]
            assert it["micro_batches"] * it["micro_batch"] * it["dp"] * 8192 == row["tokens"]
            assert row["gib"] < 0.96 * 79.1 and sum(row["parts"].values()) == pytest.approx(1), (name, kind)
            assert row["mfu"] < row["parts"]["products and scores"]
        for before, now in zip(rows, rows[1:], strict=False):
            factor = 2 if kind == "strong" else 1
            same = ("tp", "pp", "schedule", "stages_a_rank", "micro_batch", "recompute")
            if all(before["layout"][key] == now["layout"][key] for key in same):  # else more memory may be what is gained
                assert now["seconds"] >= before["seconds"] / factor * 0.999, (name, kind, now["gpus"])
            assert kind == "weak" or now["seconds"] < before["seconds"], (name, now["gpus"])


def test_stored_points_are_what_the_planner_says_of_their_layouts() -> None:
    """Also of all micro-batches, not of some that stand for them. If the model of a step has changed: run the benchmark again."""
    models = {model.name: model for model in MODELS}
    for name, _, rows in _stored():
        for row in rows[-4::3]:
            it = row["layout"]
            config = models[name].config(
                row["tokens"] // 8192, tensor_parallel=it["tp"], pipeline_parallel=it["pp"], pipeline_schedule=it["schedule"],
                virtual_stages=it["stages_a_rank"] if it["schedule"] == "interleaved" else 1, sequence_parallel=True,
            )  # fmt: skip
            training = config.training.model_copy(update={"micro_batch_size": it["micro_batch"], "recompute": it["recompute"]})
            config = config.model_copy(update={"training": training})
            for brief, tolerance in ((True, 1e-6), (False, 1e-2)):
                step = candidate(config, row["gpus"], it["schedule"], config.parallel.virtual_stages, H100, brief)
                assert row["seconds"] == pytest.approx(step.seconds, rel=tolerance), (name, row["gpus"], brief)


@pytest.mark.slow
def test_the_command_runs_and_draws(tmp_path: Path) -> None:
    arguments = ["--smoke", "--output", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")]
    command = [sys.executable, "benchmarks/scale_simulation.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left_out: stragglers" in done.stdout and "published 8,192 GPUs" in done.stdout
    assert (tmp_path / "out.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["holds"] and len(result["curves"][0]["weak"]) == 3
