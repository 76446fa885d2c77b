"""Any layout, the same training: in float64 nothing but rounding may depend on how a run is laid out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import assemble, config_of, train

History = list[tuple[float, float, bool]]
STEPS = 4


@functools.cache
def single_process(tied: bool, theta: float = 10000.0) -> tuple[History, dict[str, torch.Tensor]]:
    """The oracle: one process, one micro-batch a step."""
    config = config_of(model={"tie_word_embeddings": tied}, training={"micro_batch_size": 8, "steps": STEPS})
    ((history, pieces),) = run_ranks(1, train, config)
    return history, assemble([pieces])


def assert_same_training(world: int, tied: bool = False, **sections: dict[str, Any]) -> None:
    expected_history, expected = single_process(tied)
    sections["training"] = {"steps": STEPS} | sections.get("training", {})
    config = config_of(model={"tie_word_embeddings": tied}, **sections)
    results = run_ranks(world, train, config)
    for history, _ in results:
        assert [h[:2] for h in history] == [pytest.approx(h[:2], rel=1e-9) for h in expected_history]
    weights = assemble([pieces for _, pieces in results])
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        error = (value - expected[name]).norm().item()
        assert error <= 1e-9 * expected[name].norm().item() + 1e-12 * value.numel() ** 0.5, name


def test_the_oracle_clips_and_learns() -> None:
    history, _ = single_process(False)
    assert sum(norm > 0.7 for _, norm, _ in history) >= STEPS / 2, "clipping must be active in at least half of the steps"
    assert any(norm < 0.7 for _, norm, _ in history) or history[-1][0] < history[0][0]
    assert not any(skipped for *_, skipped in history)


LAYOUTS = {
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2 without sequence parallel": (2, {"tensor_parallel": 2, "sequence_parallel": False}),
    "tp4 over 2 kv heads": (4, {"tensor_parallel": 4}),
    "tp4 over 2 kv heads without sequence parallel": (4, {"tensor_parallel": 4, "sequence_parallel": False}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "pp2 gpipe": (2, {"pipeline_parallel": 2, "pipeline_schedule": "gpipe"}),
    "pp4 with 5 layers": (4, {"pipeline_parallel": 4}),
    "pp4 gpipe": (4, {"pipeline_parallel": 4, "pipeline_schedule": "gpipe"}),
    "pp8, some stages without any parameter": (8, {"pipeline_parallel": 8}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp2 in small buckets": (2, {"bucket_size": 1000}),
    "tp2 pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2 dp2": (4, {"tensor_parallel": 2, "bucket_size": 3000}),
    "pp2 dp2": (4, {"pipeline_parallel": 2}),
    "tp2 pp2 dp2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2 pp2 dp2 without sequence parallel": (8, {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": False}),
    "tp4 dp2 over 2 kv heads": (8, {"tensor_parallel": 4}),
    "tp8 over 2 kv heads": (8, {"tensor_parallel": 8}),
}


TIED = ("tp2", "tp4 over 2 kv heads without sequence parallel", "pp8, some stages without any parameter", "tp2 pp2 dp2")
CASES = [
    *((layout, False) for layout in LAYOUTS),
    *((layout, True) for layout in TIED),
    *(pytest.param(layout, True, marks=pytest.mark.exhaustive) for layout in LAYOUTS if layout not in TIED),
]


@pytest.mark.parametrize(("layout", "tied"), CASES)
def test_layout_does_not_change_training(layout: str, tied: bool) -> None:
    world, parallel = LAYOUTS[layout]
    size = {"tp8 over 2 kv heads": 8, "tp2 pp2 dp2": 1}.get(layout, 2)  # a collective of 8 ranks on 2 cores is slow
    assert_same_training(world, tied, parallel=parallel, training={"micro_batch_size": size})


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_micro_batch_size_does_not_change_training(size: int, schedule: str) -> None:
    parallel = {"pipeline_parallel": 2, "pipeline_schedule": schedule}
    assert_same_training(2, parallel=parallel, training={"micro_batch_size": size})
