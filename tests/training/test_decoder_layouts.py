"""Any layout, the same training, for decoders that are no Llamas: float64, against one process that runs the batch at once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.config import Config, ModelConfig
from megatron_llm.data.stream import build_train_stream
from megatron_llm.models.heads import head_problem
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.replicas import check_replicas
from megatron_llm.training.step import RunState, train_step
from tests.decoders import DECODERS, AllRandom
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights
from tests.tiers import slow_one_in

History = list[tuple[float, float]]


def _config(name: str, micro_batch_size: int, parallel: dict[str, Any], **training: Any) -> Config:
    training = {"sequence_length": 12, "micro_batch_size": micro_batch_size, "global_batch_size": 4, "steps": 3, **training}
    return config_of(model=DECODERS[name], training=training, parallel=parallel)


def _train(config: Config) -> tuple[History, Pieces]:
    """(loss, gradient norm) of each step, and the weights owned at the end, whose copies are equal to the bit."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), AllRandom(5))
    stream, state = build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(config.training.steps)]
    check_replicas(engine)
    return [(result.loss, result.grad_norm) for result in results], owned_weights(engine)


@functools.cache
def single_process(name: str) -> tuple[History, dict[str, Tensor]]:
    """The oracle: one micro-batch a step."""
    ((history, pieces),) = run_ranks(1, _train, _config(name, 4, {}))
    return history, assemble([pieces])


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    # ranks, micro-batch size, parallel
    "tp2": (2, 2, {"tensor_parallel": 2}),
    "tp2 without sequence parallel": (2, 2, {"tensor_parallel": 2, "sequence_parallel": False}),
    "tp3": (3, 2, {"tensor_parallel": 3}),
    "tp4": (4, 4, {"tensor_parallel": 4}),
    "tp4 without sequence parallel": (4, 4, {"tensor_parallel": 4, "sequence_parallel": False}),
    "zb_h1, tp2 pp2": (4, 2, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_h1"}),
    "zb_v, tp2 pp2": (4, 1, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_v"}),
    "zb_h1, tp2 pp2 without sequence parallel": (
        4, 2, {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_h1", "sequence_parallel": False},
    ),
    "tp2 dp2 in small buckets": (4, 2, {"tensor_parallel": 2, "bucket_size": 700}),
    # Shares of the ranks differ, and slices of data parallelism end anywhere: in the middle of copied key heads, too.
    "tp2 dp2, each parameter a bucket": (4, 2, {"tensor_parallel": 2, "bucket_size": 1}),
    "pp3": (3, 1, {"pipeline_parallel": 3}),
}  # fmt: skip

FAST = {
    "tp2": ("gemma2", "opt"),
    "tp3": ("falcon", "neox", "cohere2", "olmo", "qwen3"),
    "tp4": ("olmo2", "gpt"),
    "tp4 without sequence parallel": ("bloom",),
    "zb_h1, tp2 pp2": ("neox", "gemma2", "starcoder"),
    "zb_v, tp2 pp2": ("falcon", "opt"),
    "zb_h1, tp2 pp2 without sequence parallel": ("cohere2", "qwen3"),
    "tp2 dp2 in small buckets": ("bloom", "olmo2"),
    "tp2 dp2, each parameter a bucket": ("falcon",),
}


def _cases(fast: bool) -> list[tuple[str, str]]:
    """(decoder, layout), where heads can be cut so."""

    def possible(name: str, layout: str) -> bool:
        return head_problem(ModelConfig(**DECODERS[name]), LAYOUTS[layout][2].get("tensor_parallel", 1)) is None

    return [
        (name, layout)
        for name in DECODERS
        for layout in LAYOUTS
        if (name in FAST.get(layout, ())) == fast and possible(name, layout)
    ]


def _assert_same_training(name: str, layout: str) -> None:
    expected_history, expected = single_process(name)
    world, size, parallel = LAYOUTS[layout]
    results = run_ranks(world, _train, _config(name, size, parallel))
    for history, _ in results:
        assert history == [pytest.approx(line, rel=1e-9) for line in expected_history]
    weights = assemble([pieces for _, pieces in results])
    assert weights.keys() == expected.keys()
    for tensor, value in weights.items():
        error = (value - expected[tensor]).norm().item()
        assert error <= 1e-9 * expected[tensor].norm().item() + 1e-12 * value.numel() ** 0.5, tensor


@pytest.mark.parametrize(("name", "layout"), _cases(fast=True))
def test_layout_does_not_change_training_of(name: str, layout: str) -> None:
    _assert_same_training(name, layout)


@pytest.mark.parametrize(("name", "layout"), slow_one_in(3, _cases(fast=False)))
def test_other_layouts_do_not_change_training_of(name: str, layout: str) -> None:
    _assert_same_training(name, layout)


def test_the_fast_cases_exist_and_have_every_decoder() -> None:
    assert {name for name, _ in _cases(fast=True)} == set(DECODERS)
    assert len(_cases(fast=True)) == sum(map(len, FAST.values()))


@pytest.mark.parametrize("name", DECODERS)
def test_every_weight_of_the_oracle_moves(name: str) -> None:
    """So each has a gradient, which the layouts above have to make too. What is added to all keys alike, softmax does not see."""
    _, weights = single_process(name)
    ((_, pieces),) = run_ranks(1, _train, _config(name, 4, {}, steps=0))
    before = assemble([pieces])
    still = {tensor for tensor, value in weights.items() if (value - before[tensor]).norm() <= 1e-4 * before[tensor].norm()}
    assert all(tensor.endswith(("attention.k.bias", "attention.k_norm.bias")) for tensor in still), still
