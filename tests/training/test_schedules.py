"""Any pipeline schedule, the same training: float64, against one process that runs the whole batch at once.

The rows are packed documents in file order: shorter and longer than a row, so that they cross rows and micro-batches.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.schedules import NAMES
from megatron_llm.training.build import build_engine
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble
from tests.tiers import slow_one_in
from tests.training.small import FOLDED, LOOPED, run, schedule, small
from tests.training.test_recovery import continue_run

Results = tuple[list[tuple[float, float]], tuple[float, float], dict[str, Tensor]]


def _train(config: Config) -> tuple[list[tuple[float, float]], tuple[float, float], Pieces]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    return run(build_engine(config, grid, torch.device("cpu")), config)


@pytest.fixture(scope="module")
def oracle(data: Path) -> Any:
    """One process, one micro-batch a step; made once for tied and untied embeddings."""
    known: dict[tuple[Any, ...], Results] = {}

    def results(tied: bool, **model: Any) -> Results:
        key = (tied, *model.items())
        if key not in known:
            ((history, sums, pieces),) = run_ranks(1, _train, small(data, 6, tied, model=model))
            known[key] = history, sums, assemble([pieces])
        return known[key]

    return results


def assert_same(expected: Results, results: list[tuple[list[tuple[float, float]], tuple[float, float], Pieces]]) -> None:
    expected_history, expected_sums, expected_weights = expected
    for history, sums, _ in results:
        assert history == [pytest.approx(pair, rel=1e-9) for pair in expected_history]
        assert sums == pytest.approx(expected_sums, rel=1e-9)
    weights = assemble([pieces for *_, pieces in results])  # every element of the model is owned exactly once
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        error = (value - expected_weights[name]).norm().item()
        assert error <= 1e-9 * expected_weights[name].norm().item() + 1e-12 * value.numel() ** 0.5, name


def test_the_oracle_clips_learns_and_isolates(data: Path, oracle: Any) -> None:
    history, (_, weight), _ = oracle(False)
    assert any(norm > 0.7 for _, norm in history) and history[-1][0] < history[0][0]
    stream = build_train_stream(small(data))
    boundaries = [stream.batch([row]).cu_seqlens for row in range(18)]
    assert (0, 8) in boundaries, "a document fills a row"
    assert any(len(row) > 3 for row in boundaries), "several documents share a row"
    assert weight < 5 * 8, "the last token of a document predicts nothing"


# (ranks, micro-batch size): six micro-batches are no multiple of four ranks, three are fewer.
@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 1)], ids=["pp2, m=3", "pp4, m=6"])
@pytest.mark.parametrize("name", NAMES)
def test_schedule_does_not_change_training(data: Path, oracle: Any, name: str, ranks: int, size: int) -> None:
    tied = ranks == 2 or name in FOLDED
    assert_same(oracle(tied), run_ranks(ranks, _train, small(data, size, tied, parallel=schedule(name, ranks))))


CASES: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    # name: ranks, micro-batch size, tied, parallel
    "zb_v, fewer micro-batches than stages": (4, 3, True, schedule("zb_v", 4)),
    "interleaved, fewer micro-batches than stages": (4, 3, True, schedule("interleaved", 4)),
    "interleaved, tp2 pp2": (4, 2, True, schedule("interleaved", 2) | {"tensor_parallel": 2}),
    "zb_v, tp2 pp2": (4, 2, True, schedule("zb_v", 2) | {"tensor_parallel": 2}),
    "zb_h1, tp2 pp2 without sequence parallelism": (
        4,
        2,
        False,
        schedule("zb_h1", 2) | {"tensor_parallel": 2, "sequence_parallel": False},
    ),
    "breadth_first, pp2 dp2, small buckets": (4, 1, True, schedule("breadth_first", 2) | {"bucket_size": 500}),
    "v_min, pp2 dp2, small buckets": (4, 1, True, schedule("v_min", 2) | {"bucket_size": 500}),
    "interleaved on one rank": (1, 2, True, schedule("interleaved", 1)),
    "zb_v on one rank": (1, 2, True, schedule("zb_v", 1)),
    "interleaved, four stages a rank": (2, 1, True, schedule("interleaved", 2, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts_of_schedules_do_not_change_training(data: Path, oracle: Any, case: str) -> None:
    world, size, tied, parallel = CASES[case]
    assert_same(oracle(tied), run_ranks(world, _train, small(data, size, tied, parallel=parallel)))


@pytest.mark.parametrize(("ranks", "name", "size", "tied"), slow_one_in(7, product([2, 4], NAMES, [1, 2, 3, 6], [False, True])))
def test_every_schedule_and_number_of_micro_batches(
    data: Path, oracle: Any, name: str, ranks: int, size: int, tied: bool
) -> None:
    for chunks in (1, 2, 3) if name in LOOPED else (1,):
        parallel = schedule(name, ranks, chunks)
        assert_same(oracle(tied), run_ranks(ranks, _train, small(data, size, tied, parallel=parallel)))


ON_EIGHT_RANKS: dict[str, tuple[int, int, dict[str, Any]]] = {  # stages, micro-batch size, parallel
    "tp2 pp2 dp2": (2, 1, {"tensor_parallel": 2}),
    "tp2 pp2 dp2 without sp": (2, 3, {"tensor_parallel": 2, "sequence_parallel": False, "bucket_size": 500}),
    "tp2 pp4": (4, 2, {"tensor_parallel": 2}),
    "pp4 dp2": (4, 1, {"bucket_size": 500}),
    "tp4 pp2": (2, 1, {"tensor_parallel": 4}),
}


@pytest.mark.parametrize(("layout", "name", "tied"), slow_one_in(7, product(ON_EIGHT_RANKS, NAMES, [False, True])))
def test_every_schedule_with_other_parallelism(data: Path, oracle: Any, layout: str, name: str, tied: bool) -> None:
    ranks, size, more = ON_EIGHT_RANKS[layout]
    parallel = schedule(name, ranks) | more
    assert_same(oracle(tied), run_ranks(8, _train, small(data, size, tied, parallel=parallel)))


@pytest.mark.parametrize(("name", "layers"), slow_one_in(2, product(NAMES, [1, 2, 7])))
def test_every_schedule_with_any_number_of_layers(data: Path, oracle: Any, name: str, layers: int) -> None:
    """One or two layers leave stages without any parameter: on eight stages of four ranks most are."""
    model, parallel = {"num_hidden_layers": layers}, schedule(name, 4)
    assert_same(oracle(True, **model), run_ranks(4, _train, small(data, 1, True, model=model, parallel=parallel)))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    ranks=st.integers(1, 6),
    chunks=st.integers(1, 4),
    microbatches=st.integers(1, 9),
    layers=st.integers(1, 9),
    tied=st.booleans(),
)
def test_any_combination(
    data: Path, oracle: Any, name: str, ranks: int, chunks: int, microbatches: int, layers: int, tied: bool
) -> None:
    """Numbers that are multiples of nothing; a batch has as many rows as micro-batches."""
    model = {"num_hidden_layers": layers}
    training = {"global_batch_size": microbatches, "steps": 2}
    config = small(data, 1, tied, model=model, training=training, parallel=schedule(name, ranks, chunks))
    ((history, sums, pieces),) = run_ranks(1, _train, small(data, microbatches, tied, model=model, training=training))
    assert_same((history, sums, assemble([pieces])), run_ranks(ranks, _train, config))


def _spoil(batch: Batch, field: str) -> Batch:
    """The batch without document boundaries, or without positions (zeros: RoPE does not notice that all are shifted)."""
    nothing = {"cu_seqlens": (0, batch.cu_seqlens[-1]), "positions_T": torch.zeros_like(batch.positions_T)}
    return dataclasses.replace(batch, **{field: nothing[field]})


def _train_with_a_stage_without(config: Config, number: int | None, field: str) -> list[tuple[float, float]]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    if number in engine.stages:
        stage = engine.stages[number]
        assert len(stage.layers) and not stage.first and not stage.last
        forward = stage.forward
        stage.forward = lambda x, batch, *rest, **named: forward(x, _spoil(batch, field), *rest, **named)  # type: ignore[method-assign]
    return run(engine, config)[0]


@pytest.mark.parametrize("field", ["cu_seqlens", "positions_T"])
@pytest.mark.parametrize(("name", "ranks", "middle"), [("1f1b", 4, 2), ("interleaved", 2, 1), ("zb_v", 2, 2)])
def test_a_middle_stage_without_boundaries_is_noticed(
    data: Path, oracle: Any, name: str, ranks: int, middle: int, field: str
) -> None:
    config = small(data, 2, parallel=schedule(name, ranks))
    expected = oracle(False)[0]
    for history in run_ranks(ranks, _train_with_a_stage_without, config, middle, field):
        assert all(abs(loss - right) > 1e-6 * right for (loss, _), (right, _) in zip(history, expected, strict=True))


TOUR: list[tuple[int, dict[str, Any]]] = [
    (2, schedule("zb_v", 2)),
    (2, schedule("interleaved", 2)),
    (4, schedule("1f1b", 4)),
    (1, {}),
    (4, schedule("v_half", 2) | {"tensor_parallel": 2}),
    (2, schedule("breadth_first", 2, 3)),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_continues_under_any_schedule(data: Path, tmp_path: Path, tied: bool) -> None:
    def history(folder: str, layouts: list[tuple[int, dict[str, Any]]]) -> list[tuple[float, float]]:
        logging = {"run_dir": str(tmp_path / folder)}
        return [
            result
            for world, parallel in layouts
            for result in run_ranks(world, continue_run, small(data, 2, tied, parallel=parallel, logging=logging))[0]
        ]

    stayed = history("stayed", [(1, {})] * len(TOUR))
    assert history("moved", TOUR) == [pytest.approx(result, rel=1e-9) for result in stayed]
