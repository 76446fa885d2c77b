"""Any layout, the same training of adapters: float64, against one process with one micro-batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.config import Config
from megatron_llm.config.peft import is_adapter
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.replicas import check_replicas
from megatron_llm.training.step import RunState, train_step
from tests.decoders import DECODERS, AllRandom
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights

History = list[tuple[float, float]]
PEFT = {"rank": 8, "alpha": 11.0, "rslora": True}
SOME = {**PEFT, "targets": ["q_proj", "attention.v", "layers.[1-2].mlp.down"]}


def _config(name: str, peft: dict[str, Any], micro_batch_size: int, parallel: dict[str, Any], **training: Any) -> Config:
    training = {"sequence_length": 12, "micro_batch_size": micro_batch_size, "global_batch_size": 4, "steps": 3, **training}
    return config_of(model=DECODERS[name], training=training, parallel=parallel, peft=peft)


def _train(config: Config) -> tuple[History, Pieces]:
    """(loss, gradient norm) of each step, and the weights owned at the end, whose copies are equal to the bit."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), AllRandom(5))
    stream, state = build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(config.training.steps)]
    check_replicas(engine)
    return [(result.loss, result.grad_norm) for result in results], owned_weights(engine)


@functools.cache
def single_process(name: str, some: bool) -> tuple[History, dict[str, Tensor]]:
    """The oracle: one micro-batch a step."""
    ((history, pieces),) = run_ranks(1, _train, _config(name, SOME if some else PEFT, 4, {}))
    return history, assemble([pieces])


def _pp(schedule: str, **more: Any) -> dict[str, Any]:
    return {"pipeline_parallel": 2, "pipeline_schedule": schedule, **more}


CASES: dict[str, tuple[str, bool, int, int, dict[str, Any], dict[str, Any]]] = {
    # decoder, some targets only, ranks, micro-batch size, parallel, training
    "tp2": ("qwen3", False, 2, 2, {"tensor_parallel": 2}, {}),
    "tp2 without sequence parallel": ("gemma2", True, 2, 2, {"tensor_parallel": 2, "sequence_parallel": False}, {}),
    "tp3, uneven heads and inner features": ("neox", False, 3, 2, {"tensor_parallel": 3}, {}),
    "tp4, copied key heads": ("olmo2", False, 4, 4, {"tensor_parallel": 4}, {}),
    "tp4, one key head, uneven queries": ("falcon", True, 4, 4, {"tensor_parallel": 4}, {}),
    "1f1b, tp2 pp2": ("starcoder", False, 4, 1, _pp("1f1b", tensor_parallel=2), {}),
    "zb_h1, tp2 pp2": ("cohere2", False, 4, 2, _pp("zb_h1", tensor_parallel=2), {}),
    "zb_v, pp2": ("opt", True, 2, 1, _pp("zb_v"), {}),
    "dp2 of stage 1, each parameter a bucket": ("qwen3", False, 2, 2, {"bucket_size": 1}, {}),
    "tp2 dp2 of stage 0, uneven heads": ("neox", False, 4, 2, {"tensor_parallel": 2, "zero_stage": 0, "bucket_size": 500}, {}),
    "tp2 dp2 in small buckets, uneven queries": ("falcon", True, 4, 2, {"tensor_parallel": 2, "bucket_size": 100}, {}),
    "tp2, all recomputed": ("neox", False, 2, 2, {"tensor_parallel": 2}, {"recompute": "full"}),
    "tp2 zb_h1, parts recomputed": ("qwen3", False, 4, 2, _pp("zb_h1", tensor_parallel=2), {"recompute": "selective"}),
}  # fmt: skip


SLOW = (
    "tp2 without sequence parallel", "tp4, one key head, uneven queries", "dp2 of stage 1, each parameter a bucket",
    "tp2 dp2 in small buckets, uneven queries", "tp2, all recomputed",
)  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES])
def test_layout_does_not_change_the_training_of_adapters(case: str) -> None:
    name, some, world, size, parallel, training = CASES[case]
    expected_history, expected = single_process(name, some)
    results = run_ranks(world, _train, _config(name, SOME if some else PEFT, size, parallel, **training))
    for history, _ in results:
        assert history == [pytest.approx(line, rel=1e-9) for line in expected_history]
    weights = assemble([pieces for _, pieces in results])
    assert weights.keys() == expected.keys() and any(map(is_adapter, weights))
    for tensor, value in weights.items():
        error = (value - expected[tensor]).norm().item()
        assert error <= 1e-9 * expected[tensor].norm().item() + 1e-12 * value.numel() ** 0.5, tensor


@pytest.mark.parametrize(("name", "some"), sorted({case[:2] for case in CASES.values()}))
def test_every_adapter_of_the_oracle_moves_and_nothing_else(name: str, some: bool) -> None:
    """So each has a gradient, which the layouts above have to make too."""
    _, weights = single_process(name, some)
    ((_, pieces),) = run_ranks(1, _train, _config(name, SOME if some else PEFT, 4, {}, steps=0))
    before = assemble([pieces])
    moved = {tensor for tensor, value in weights.items() if (value - before[tensor]).norm() > 1e-4 * before[tensor].norm()}
    still = {tensor for tensor in weights if torch.equal(weights[tensor], before[tensor])}
    assert moved == set(filter(is_adapter, weights)) and still == set(weights) - moved


@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recomputation_makes_the_same_bits(recompute: str) -> None:
    (plain,), (again,) = (run_ranks(1, _train, _config("qwen3", PEFT, 2, {}, recompute=chosen)) for chosen in ("none", recompute))
    assert plain[0] == again[0]
    assert all(torch.equal(value, other) for (*_, value), (*_, other) in zip(plain[1], again[1], strict=True))
