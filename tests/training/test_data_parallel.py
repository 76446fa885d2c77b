"""Options of data parallelism that must not change the numbers do not; those that may, do what they say."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.step import RunState, train_step
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights
from tests.training.test_layouts import assert_same_training

V = {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}

OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "dp1 stage 0": (1, {"zero_stage": 0}),
    "dp2 without overlap": (2, {"overlap": False, "bucket_size": 500}),
    "dp2 stage 0": (2, {"zero_stage": 0}),
    "dp4 stage 0 in small buckets": (4, {"zero_stage": 0, "bucket_size": 500}),
    "dp4 stage 0 without overlap": (4, {"zero_stage": 0, "overlap": False, "bucket_size": 3000}),
    "dp4 every parameter its own bucket": (4, {"bucket_size": 1}),
    "tp2 dp2 stage 0": (4, {"tensor_parallel": 2, "zero_stage": 0, "bucket_size": 500}),
    "pp2 dp2 split backward, without overlap": (4, {**V, "overlap": False, "bucket_size": 500}),
    "pp2 dp2 split backward, stage 0": (4, {**V, "zero_stage": 0, "bucket_size": 500}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_numbers_do_not_depend_on(option: str, tied: bool) -> None:
    world, parallel = OPTIONS[option]
    assert_same_training(world, tied, parallel=parallel)


def _everything(config: Config, steps: int = 3) -> tuple[list[tuple[float, float]], dict[str, Pieces]]:
    """Losses and norms of a run on this rank, and all that it would write to a checkpoint."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    stream, state = build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(steps)]
    kept = {kind: owned_weights(engine, kind) for kind in engine.optimizer.state_kinds}
    return [(result.loss, result.grad_norm) for result in results], kept


def _float32(world: int, parallel: dict[str, Any], **sections: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    sections["precision"] = {"compute": "float32"} | sections.get("precision", {})
    results = run_ranks(world, _everything, config_of(parallel={"bucket_size": 700} | parallel, **sections))
    history, kept = results[0]
    assert all(history == other for other, _ in results)
    return history, {kind: assemble([kept[kind] for _, kept in results]) for kind in kept}


BITWISE: dict[str, tuple[int, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "dp2": (2, {}, {}),
    "dp4": (4, {}, {}),
    "tp4 dp2 over 2 kv heads": (8, {"tensor_parallel": 4}, {}),
    "pp2 dp2 tied": (4, {"pipeline_parallel": 2}, {"model": {"tie_word_embeddings": True}}),
    "dp4 lion": (4, {}, {"optimizer": {"name": "lion", "lr": 1e-3}}),
    "dp4 sgd and an average": (4, {}, {"optimizer": {"name": "sgd", "ema_decay": 0.9}}),
    "dp4 bfloat16": (4, {}, {"precision": {"compute": "bfloat16"}}),
    "dp4 bfloat16 sent": (4, {}, {"precision": {"gradient_reduction": "bfloat16"}}),
    "dp2 bfloat16 gradients": (2, {}, {"precision": {"gradients": "bfloat16"}}),
    "tp2 dp2 tied bfloat16 moments": (
        4,
        {"tensor_parallel": 2},
        {"optimizer": {"state_dtype": "bfloat16"}, "model": {"tie_word_embeddings": True}},
    ),
}


@functools.cache
def _expected(case: str) -> tuple[Any, dict[str, Any]]:
    world, parallel, sections = BITWISE[case]
    return _float32(world, parallel, **sections)


@pytest.mark.parametrize("case", BITWISE)
def test_stages_0_and_1_are_equal_to_the_bit(case: str) -> None:
    world, parallel, sections = BITWISE[case]
    expected_history, expected = _expected(case)
    history, kept = _float32(world, parallel | {"zero_stage": 0}, **sections)
    assert history == expected_history
    for kind, tensors in expected.items():
        assert any(tensor.any() for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert torch.equal(kept[kind][name], tensor), (kind, name)


@pytest.mark.parametrize("case", BITWISE)
def test_overlap_does_not_change_a_bit(case: str) -> None:
    world, parallel, sections = BITWISE[case]
    expected_history, expected = _expected(case)
    history, kept = _float32(world, parallel | {"overlap": False}, **sections)
    assert history == expected_history
    assert all(torch.equal(kept[kind][name], tensor) for kind in kept for name, tensor in expected[kind].items())


def test_the_average_of_a_fresh_run_begins_with_its_weights() -> None:
    """After one update: a tenth of the change, and not nine tenths of nothing."""
    config = config_of(optimizer={"ema_decay": 0.9})
    ((_, start),) = run_ranks(1, _everything, config, 0)
    before = assemble([start["weights"]])
    for world in (1, 2):
        kept = [kept for _, kept in run_ranks(world, _everything, config, 1)]
        weights, average = assemble([k["weights"] for k in kept]), assemble([k["ema"] for k in kept])
        for name, value in average.items():
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * weights[name], rtol=1e-12, atol=1e-12)


FROZEN = {"rules": [{"match": "embedding.*", "frozen": True}, {"match": "layers.[0-2].*", "frozen": True}]}


def _frozen(config: Config) -> tuple[Any, bool]:
    history, kept = _everything(config)
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"))
    clean = all(not hasattr(parameter, "main_grad") and parameter.grad is None for parameter in engine.optimizer.frozen)
    return (history, kept), clean and bool(engine.optimizer.frozen or grid.pp.last)


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"pipeline_parallel": 4}, V, {"zero_stage": 0}],
    ids=["tp2 dp2", "pp2 dp2: the first stage is frozen", "pp4", "zb_v dp2", "dp4 stage 0"],
)
def test_frozen_weights_stay_and_the_others_train_as_on_one_process(parallel: dict[str, Any]) -> None:
    free_history, _ = run_ranks(1, _everything, config_of())[0]
    ((expected_history, expected_kept),) = run_ranks(1, _everything, config_of(optimizer=FROZEN))
    assert expected_history[0][1] < free_history[0][1], "frozen weights take no part in the norm"
    results = run_ranks(4, _frozen, config_of(optimizer=FROZEN, parallel=parallel))
    assert all(clean for _, clean in results)
    for (history, _), _ in results:
        assert history == [pytest.approx(pair, rel=1e-9) for pair in expected_history]
    start = assemble([run_ranks(1, _everything, config_of(optimizer=FROZEN), 0)[0][1]["weights"]])
    expected = assemble([expected_kept["weights"]])
    weights = assemble([kept["weights"] for (_, kept), _ in results])
    moments = assemble([kept["m"] for (_, kept), _ in results])
    assert weights.keys() == expected.keys() == start.keys()
    for name, value in weights.items():
        frozen = name.startswith(("embedding.", "layers.0", "layers.1", "layers.2"))
        assert frozen == torch.equal(value, start[name]) == (name not in moments), name
        assert (value - expected[name]).norm() <= 1e-9 * expected[name].norm() + 1e-12 * value.numel() ** 0.5, name
