"""Packed, padded and one by one: the same conversations give the same loss and the same gradient, whatever shares their rows.

The oracle takes each conversation alone, without rows, padding or pipelines, with weights read from the role bytes. Float64.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_llm.config import Config
from megatron_llm.data.indexed import DatasetMeta
from megatron_llm.data.stream import build_train_stream
from megatron_llm.data.writer import IndexedWriter
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine, build_model
from megatron_llm.training.step import RunState, train_step
from tests.decoders import DECODERS, AllRandom
from tests.families.models import gradients_of_stage
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights
from tests.tiers import slow_one_in

LENGTH = 16
# Rows as packing in order fills them, each with some room; best-fit packing needs as many.
ROWS = ((10, 5), (12, 3), (9, 7), (8, 6), (15,), (5, 9, 2), (13, 3), (14, 2))
LENGTHS = [length for row in ROWS for length in row]
VOCABULARY = 61
USER, ASSISTANT, NOT_TRAINED = 2, 3, 8


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray], list[np.ndarray]]:
    """(prefix of a chat data set, ids of each conversation, role bytes of each)."""
    prefix = tmp_path_factory.mktemp("chat") / "chat"
    random = np.random.default_rng(0)
    meta = DatasetMeta("chat", "tokenizer", "f" * 64, VOCABULARY)
    ids = [random.integers(0, VOCABULARY, length) for length in LENGTHS]
    kinds = [USER, ASSISTANT, ASSISTANT, ASSISTANT | NOT_TRAINED, 0]
    roles = [random.choice(kinds, length).astype(np.uint8) for length in LENGTHS]
    for bytes_ in roles:
        bytes_[-1] = ASSISTANT  # or a conversation may have nothing to learn, and would be left out
    with IndexedWriter(prefix, np.uint16, meta, roles=True) as writer:
        for document, bytes_ in zip(ids, roles, strict=True):
            writer.add_document(document, bytes_)
    return prefix, ids, roles


def _config(prefix: Path, packing: str, decoder: str, micro_batch_size: int, parallel: dict[str, Any]) -> Config:
    rows = len(LENGTHS) if packing == "none" else len(ROWS)
    model = DECODERS[decoder] if decoder else {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    model = {**model, "max_position_embeddings": LENGTH}  # where positions are learned there must be enough
    return config_of(
        model=model, parallel=parallel,
        data={"kind": "chat", "train": [{"path": str(prefix)}], "packing": packing},
        training={"sequence_length": LENGTH, "micro_batch_size": micro_batch_size, "global_batch_size": rows, "steps": 1},
        optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "grad_clip": 0.0},
        lr_schedule={"kind": "constant", "warmup_steps": 0, "min_lr": 0.0},
    )  # fmt: skip


def _one_step(config: Config) -> tuple[float, float, Pieces, Pieces]:
    """(loss, gradient norm, weights before, weights after), on this rank; with this optimizer the difference is the gradient."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    engine = build_engine(config, grid, torch.device("cpu"), AllRandom(5))
    stream = build_train_stream(config)
    assert stream.rows_per_epoch == config.training.global_batch_size
    before = owned_weights(engine)
    result = train_step(engine, stream, RunState())
    return result.loss, result.grad_norm, before, owned_weights(engine)


def _one_by_one(config: Config, ids: list[np.ndarray], roles: list[np.ndarray]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of the mean over all trained tokens, a conversation at a time."""
    stage = build_model(config.model, AllRandom(5), torch.float64, torch.device("cpu"))
    loss_sum, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    for tokens, bytes_ in zip(ids, roles, strict=True):
        count = len(tokens) - 1
        weights = torch.tensor([float(byte == ASSISTANT) for byte in bytes_[1:]])
        whole = torch.from_numpy(tokens)
        batch = Batch(whole[:-1], whole[1:], weights, torch.arange(count), (0, count))
        loss = stage.loss(stage(None, batch), batch)
        loss.backward()
        loss_sum += loss.detach()
        weight_sum += float(weights.sum())
    return float(loss_sum) / weight_sum, {name: value / weight_sum for name, value in gradients_of_stage(stage).items()}


def _check(
    conversations: tuple[Path, list[np.ndarray], list[np.ndarray]],
    packing: str,
    world: int = 1,
    micro_batch_size: int = 1,
    decoder: str = "",
    **parallel: Any,
) -> None:
    prefix, ids, roles = conversations
    config = _config(prefix, packing, decoder, micro_batch_size, parallel)
    expected_loss, expected = _one_by_one(config, ids, roles)
    results = run_ranks(world, _one_step, config)
    before, after = (assemble([result[which] for result in results]) for which in (2, 3))
    norm = torch.stack([value.norm() for value in expected.values()]).norm().item()
    for loss, grad_norm, *_ in results:
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert grad_norm == pytest.approx(norm, rel=1e-9)
    assert after.keys() == expected.keys() and norm > 0.01
    for name, gradient in expected.items():
        error = (before[name] - after[name] - gradient).norm().item()
        assert error <= 1e-9 * gradient.norm().item() + 1e-12 * gradient.numel() ** 0.5, name


PACKINGS = ("best_fit", "in_order", "none")
LAYOUTS: dict[str, dict[str, Any]] = {
    "all rows at once": {"micro_batch_size": 8},
    "two rows at a time": {"micro_batch_size": 2},
    "dp2": {"world": 2},
    "dp4": {"world": 4, "micro_batch_size": 2},
    "pp2": {"world": 2, "pipeline_parallel": 2},
    "pp4 zb_h1": {"world": 4, "pipeline_parallel": 4, "pipeline_schedule": "zb_h1"},
    "tp2": {"world": 2, "tensor_parallel": 2},
    "tp2 pp2 dp2": {"world": 8, "tensor_parallel": 2, "pipeline_parallel": 2},
    "pp2 zb_v dp2": {"world": 4, "pipeline_parallel": 2, "pipeline_schedule": "zb_v"},
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_do_not_change_gradients(conversations: Any, packing: str) -> None:
    _check(conversations, packing)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_packed_rows_do_not_change_gradients(conversations: Any, layout: str) -> None:
    _check(conversations, "best_fit", **LAYOUTS[layout])


@pytest.mark.parametrize(("packing", "layout"), slow_one_in(2, product(["in_order", "none"], LAYOUTS)))
def test_layouts_of_other_rows_do_not_change_gradients(conversations: Any, packing: str, layout: str) -> None:
    _check(conversations, packing, **LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_whatever_the_decoder(conversations: Any, decoder: str) -> None:
    _check(conversations, "best_fit", world=2, decoder=decoder, pipeline_parallel=2)
