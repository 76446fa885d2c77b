"""Noise and penalties are the same in any layout, schedule and micro-batch: float64, against one process with the batch at once.

That recomputation changes no bit of them: `tests/models/test_recompute.py`; a resumed run: `test_resume_bitwise.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.config import Config, ConfigError, parse_config
from megatron_llm.data.stream import build_train_stream, build_valid_streams
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.evaluation import Score, evaluate
from megatron_llm.training.replicas import check_replicas
from megatron_llm.training.step import RunState, train_step
from tests.decoders import DECODERS, AllRandom
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights
from tests.tiers import slow_one_in

ALL: dict[str, Any] = {
    "hidden_dropout": 0.3,
    "hidden_dropout_profile": "rising",
    "neftune_noise_alpha": 5.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
}
FROZEN = {"rules": [{"match": "embedding.*", "frozen": True}, {"match": "layers.[0-2].*", "frozen": True}]}
DECODER = {name: DECODERS[name] for name in ("neox", "gemma2")} | {"llama": {}}
History = list[tuple[float, float]]
Result = tuple[History, tuple[float, float], dict[str, Pieces]]


def _config(
    decoder: str, size: int = 8, parallel: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **training: Any
) -> Config:
    chosen = {"sequence_length": 12, "micro_batch_size": size, "steps": 3, "eval_rows": 5, "regularization": ALL, **training}
    return config_of(
        model=DECODER[decoder], training=chosen, parallel=parallel or {}, optimizer={"ema_decay": 0.9, **(optimizer or {})}
    )


def _sums(score: Score) -> tuple[float, float]:
    return score.loss, score.weight


def _run(config: Config) -> Result:
    """Losses and norms, sums of an evaluation after the first step, weights and averages at the end, equal on all replicas."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), AllRandom(5) if config.model.num_hidden_layers == 3 else None)
    stream, valid, state, history, sums = (
        build_train_stream(config),
        build_valid_streams(config)["synthetic"],
        RunState(),
        [],
        None,
    )
    for _ in range(config.training.steps):
        result = train_step(engine, stream, state)
        history.append((result.loss, result.grad_norm))
        sums = sums or _sums(evaluate(engine, valid).score)
    check_replicas(engine)
    assert sums is not None
    return history, sums, {kind: owned_weights(engine, kind) for kind in ("weights", "ema")}


@functools.cache
def _alone(decoder: str, frozen: bool = False) -> tuple[History, tuple[float, float], dict[str, dict[str, Tensor]]]:
    """The oracle: one micro-batch a step."""
    ((history, sums, kept),) = run_ranks(1, _run, _config(decoder, optimizer=FROZEN if frozen else {}))
    return history, sums, {kind: assemble([pieces]) for kind, pieces in kept.items()}


def _assert_same(world: int, decoder: str, frozen: bool = False, **changes: Any) -> None:
    expected_history, expected_sums, expected = _alone(decoder, frozen)
    results = run_ranks(world, _run, _config(decoder, optimizer=FROZEN if frozen else {}, **changes))
    for history, sums, _ in results:
        assert history == [pytest.approx(line, rel=1e-9) for line in expected_history]
        assert sums == pytest.approx(expected_sums, rel=1e-9)
    for kind, tensors in expected.items():
        found = assemble([kept[kind] for *_, kept in results])
        assert found.keys() == tensors.keys()
        for name, value in found.items():
            error = (value - tensors[name]).norm().item()
            assert error <= 1e-9 * tensors[name].norm().item() + 1e-12 * value.numel() ** 0.5, (kind, name)


LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp2": (2, "llama", {"parallel": {"tensor_parallel": 2}, "size": 2}),
    "tp2 without sequence parallel": (2, "llama", {"parallel": {"tensor_parallel": 2, "sequence_parallel": False}, "size": 2}),
    "tp4, a rank has half a row": (4, "llama", {"parallel": {"tensor_parallel": 4}, "size": 2}),
    "pp2 1f1b": (2, "llama", {"parallel": {"pipeline_parallel": 2}, "size": 2}),
    "pp4 zb_h1": (4, "llama", {"parallel": {"pipeline_parallel": 4, "pipeline_schedule": "zb_h1"}, "size": 1}),
    "pp2 zb_v": (2, "llama", {"parallel": {"pipeline_parallel": 2, "pipeline_schedule": "zb_v"}, "size": 1}),
    "dp2": (2, "llama", {"size": 1}),
    "accumulation": (1, "llama", {"size": 2}),
    "neox, tp2 pp2 zb_v": (
        4,
        "neox",
        {"parallel": {"tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_schedule": "zb_v"}, "size": 1, "recompute": "full"},
    ),
    "gemma2, tp2 dp2": (4, "gemma2", {"parallel": {"tensor_parallel": 2}, "size": 2, "recompute": "selective"}),
}  # fmt: skip


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow if "tp4" in name else ()) for name in LAYOUTS])
def test_layout_does_not_change_training_with_noise(layout: str) -> None:
    world, decoder, changes = LAYOUTS[layout]
    _assert_same(world, decoder, **changes)


OTHERS = [  # neox has three layers
    (layout, decoder)
    for layout, (_, usual, _) in LAYOUTS.items()
    for decoder in DECODER
    if decoder != usual and not (decoder == "neox" and "pp4" in layout)
]


@pytest.mark.parametrize(("layout", "decoder"), slow_one_in(2, OTHERS))
def test_layout_does_not_change_training_of_other_decoders_with_noise(layout: str, decoder: str) -> None:
    world, _, changes = LAYOUTS[layout]
    _assert_same(world, decoder, **changes)


@pytest.mark.parametrize(
    "parallel", [{"tensor_parallel": 2}, {"pipeline_parallel": 2, "pipeline_schedule": "zb_h1"}], ids=["tp2 dp2", "pp2 dp2"]
)
def test_frozen_weights_and_averages_with_noise(parallel: dict[str, Any]) -> None:
    """A first stage that is all frozen has noise and no gradients."""
    _assert_same(4, "llama", True, parallel=parallel, size=2)
    assert _alone("llama", True)[0] != _alone("llama")[0]


@pytest.mark.parametrize("key", ["hidden_dropout", "neftune_noise_alpha", "label_smoothing", "z_loss"])
def test_evaluation_has_none_of_it_and_the_loss_is_that_of_the_data(key: str) -> None:
    """The first step's loss is without penalties, to the bit, its gradient is not; an evaluation before it is the same in all."""

    def first(chosen: dict[str, Any]) -> tuple[tuple[float, float], float, float]:
        config = _config("llama", 4, regularization=chosen)
        engine = build_engine(config, Grid.single(), torch.device("cpu"))
        sums = _sums(evaluate(engine, build_valid_streams(config)["synthetic"]).score)
        result = train_step(engine, build_train_stream(config), RunState())
        return sums, result.loss, result.grad_norm

    sums, loss, norm = first({key: ALL[key]})
    plain_sums, plain_loss, plain_norm = first({})
    assert sums == plain_sums and not math.isclose(norm, plain_norm, rel_tol=1e-4)
    assert (loss == plain_loss) == (key in ("label_smoothing", "z_loss"))


class _SameRows:
    """Eight rows again and again, under numbers that go on."""

    def __init__(self, config: Config):
        self.stream = build_train_stream(config)

    def batch(self, rows: Sequence[int]) -> Batch:
        return dataclasses.replace(self.stream.batch([row % 8 for row in rows]), rows=tuple(rows))


def test_every_step_and_every_seed_has_other_noise() -> None:
    """With the same weights and rows in all steps nothing else tells their losses apart."""
    found = []
    for seed in (7, 8):
        config = _config("neox", optimizer={"lr": 1e-300}, regularization={"hidden_dropout": 0.3}, seed=seed)
        engine = build_engine(config, Grid.single(), torch.device("cpu"), AllRandom(5))
        state, stream = RunState(), _SameRows(_config("neox"))
        found += [train_step(engine, stream, state).loss for _ in range(3)]  # type: ignore[arg-type]
    assert len(set(found)) == 6


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"hidden_dropout": 1.0}, "less than 1"),
        ({"hidden_dropout_profile": "rising"}, "hidden_dropout, and that is 0|hidden_dropout rises, and that is 0"),
        ({"label_smoothing": -0.1}, "greater than or equal to 0"),
        ({"z_loss": math.inf}, "finite"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_makes_no_sense_is_refused(chosen: dict[str, Any], message: str) -> None:
    raw = config_of().model_dump(mode="json")
    raw["training"]["regularization"] = chosen
    with pytest.raises(ConfigError, match=message):
        parse_config(raw)
