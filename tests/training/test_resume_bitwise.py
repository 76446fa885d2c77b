"""Interrupted and continued equals uninterrupted, to the bit: float32, real commands, any unchanged layout.

Compared are all tensors of the last checkpoint (weights, moments, average), the state, and every line of the metrics. The data
are a blend of two sources that are read more than once; the interruptions fall into the middle of both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.cli.main import main
from megatron_llm.data.stream import build_train_stream
from megatron_llm.training import loop
from megatron_llm.training.resolve import resolve
from tests.launch import launch
from tests.training.blends import Job, assert_same_end, blend, contents, differences, logs
from tests.training.commands import read_metrics
from tests.training.planted import PlantedStream

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "dp2": (2, {}),
    "dp2, ZeRO-0": (2, {"zero_stage": 0, "bucket_size": 1000}),
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "pp2, interleaved": (2, {"pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}),
    "tp2 pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
}
MANY = "tp2 pp2"  # ranks for two cores
STOPS, LAST = (2, 5), 7
ROWS = 6  # of a step
Factors = dict[int, float]
Make = Callable[..., Job]


@pytest.fixture
def make(data: Path, more_data: Path, tmp_path: Path) -> Make:
    def job(name: str, layout: str, **training: Any) -> Job:
        world, parallel = LAYOUTS[layout]
        sections = {
            "model": {"num_hidden_layers": 4},
            "parallel": parallel,
            "training": {"steps": LAST, "loss_spike": {"window": 4, "threshold": 1e6}} | training,  # the state keeps losses
            "checkpoint": {"every_steps": 0},
        }
        return Job.make(world, blend(data, more_data, tmp_path / name, **sections))

    return job


def train_planted(arguments: list[str], factors: Factors) -> int:
    """The command, on rows of which some have their loss weights multiplied."""
    build = loop.build_train_stream
    loop.build_train_stream = lambda config: PlantedStream(build(config), factors)  # type: ignore[assignment, return-value]
    return main(["train", *arguments])


def run(job: Job, steps: int, factors: Factors) -> None:
    endings = launch(job.world, train_planted, [str(job.config), f"training.steps={steps}"], factors)
    assert [ending.code for ending in endings] == [0] * job.world, logs(endings)


def interrupted_and_not(make: Make, layout: str, factors: Factors | None = None, **training: Any) -> Job:
    """Run to the end with and without interruptions, and compare. Returns the job with interruptions."""
    whole, parts = (make(name, layout, **training) for name in ("whole", "parts"))
    run(whole, LAST, factors or {})
    for steps in (*STOPS, LAST):
        run(parts, steps, factors or {})
    assert_same_end(parts, whole, LAST)
    before = contents(parts.checkpoints, STOPS[-1])
    changed = {name.split("/")[0] for name in differences(before, contents(parts.checkpoints, LAST))}
    assert changed >= {"weights", "m", "v", "ema", "step", "updates", "rows", "tokens", "losses"}, "steps change all of it"
    return parts


@pytest.mark.parametrize("layout", ["single", pytest.param("tp2", marks=pytest.mark.slow)])
def test_noise_goes_on_where_it_was(make: Make, layout: str) -> None:
    """The losses of steps are compared, which dropout and noise on embeddings are part of."""
    chosen = {"hidden_dropout": 0.2, "neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    interrupted_and_not(make, layout, regularization=chosen)


@pytest.mark.parametrize("layout", [*[name for name in LAYOUTS if name != MANY], pytest.param(MANY, marks=pytest.mark.slow)])
def test_in_the_middle_of_epochs_and_blend(make: Make, layout: str) -> None:
    job = interrupted_and_not(make, layout)
    stream = build_train_stream(resolve(str(job.config), [], job.world).config)
    for step in STOPS:
        taken = [stream._blend(row)[0] for row in range(step * ROWS)]
        read = [taken.count(number) / source.rows_per_epoch for number, source in enumerate(stream._sources)]
        assert len(read) == 2 and all(epochs % 1 for epochs in read), "each stop is in the middle of both sources"
    assert max(read) > 1, "and one of them in a second epoch"


@pytest.mark.parametrize("layout", ["single", "dp2", "pp2"])
def test_right_after_skipped_steps(make: Make, layout: str) -> None:
    """A step with a number that is not finite before the first stop, one without weight before the second."""
    silent = range((STOPS[1] - 1) * ROWS, STOPS[1] * ROWS)
    job = interrupted_and_not(make, layout, {STOPS[0] * ROWS - 1: float("nan"), **dict.fromkeys(silent, 0.0)})
    assert [line["step"] for line in read_metrics(job.run) if line["skipped"]] == list(STOPS)
    state = contents(job.checkpoints, LAST)
    assert (state["step"], state["updates"], state["skipped"]) == (LAST, LAST - 2, 1)


@pytest.mark.parametrize("layout", ["single", "dp2", "pp2"])
def test_while_the_batch_grows(make: Make, layout: str) -> None:
    """The second stop is at the end of the first size: nothing but the state says that the next one has come."""
    job = interrupted_and_not(make, layout, batch_size_rampup={"start": 2, "increment": 2, "rows": 20})
    assert [line["rows"] for line in read_metrics(job.run)] == [2, 2, 2, 2, 2, 4, 4]
