"""A checkpoint continues under another optimizer: what is missing starts anew, what is too much is left, and both are said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import Config, ConfigError
from megatron_llm.data.stream import build_train_stream
from megatron_llm.hf.reader import HFFolder
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, Part, Piece, TensorSource
from megatron_llm.training.build import Engine, build_engine
from megatron_llm.training.recovery import changes_since, find_resume, load_run
from megatron_llm.training.step import RunState, train_step
from tests.runs import config_of, save_run


class OtherState:
    """An optimizer whose state is of other kinds: tensors like `m`, kept beside those of the engine's own."""

    def __init__(self, engine: Engine, kinds: tuple[str, ...]):
        self.own, self.state_kinds, self.grid = engine.optimizer, kinds, engine.grid
        self.tensors = {
            kind: [(piece, torch.full_like(values, 7.0)) for piece, values in self.own.state_pieces("m")] for kind in kinds
        }

    def state_pieces(self, kind: str) -> Iterator[tuple[Piece, torch.Tensor]]:
        yield from self.own.state_pieces("weights") if kind == "weights" else iter(self.tensors[kind])

    def load(self, kind: str, source: TensorSource, progress: Any = None) -> None:
        for piece, values in self.state_pieces(kind):
            values.copy_(source.read(piece.part, piece.box))


def engine_of(config: Config, kinds: tuple[str, ...], checkpoint: Any = None) -> Engine:
    engine = build_engine(config, Grid.single(), torch.device("cpu"), checkpoint.source("weights") if checkpoint else None)
    object.__setattr__(engine, "optimizer", OtherState(engine, kinds))
    return engine


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, also after a run has set up logging of its own."""
    logger = logging.getLogger("megatron_llm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def saved_by_adamw(run: Path, **sections: dict[str, Any]) -> Config:
    """A run of two steps, and its config."""
    config = config_of(model={"num_hidden_layers": 2}, logging={"run_dir": str(run)}, **sections)
    engine, state, stream = build_engine(config, Grid.single(), torch.device("cpu")), RunState(), build_train_stream(config)
    for _ in range(2):
        train_step(engine, stream, state)
    save_run(engine, state)
    return config


def changed(config: Config, **optimizer: Any) -> Config:
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})


def test_moments_of_another_optimizer_start_at_zero_and_an_average_at_the_weights(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    config = changed(saved_by_adamw(tmp_path), name="lion", ema_decay=0.9)
    checkpoint = find_resume(config, allow_change=True)
    assert checkpoint is not None
    engine = engine_of(config, ("weights", "m", "ema"), checkpoint)
    assert load_run(engine, checkpoint) == RunState(step=2, updates=2, rows=16, tokens=256)
    for piece, values in engine.optimizer.state_pieces("m"):
        assert not values.any(), piece.part.name
    averages = {piece.part.name: values for piece, values in engine.optimizer.state_pieces("ema")}
    for piece, values in engine.optimizer.state_pieces("weights"):
        assert torch.equal(averages[piece.part.name], values) or piece.box.shape != piece.part.shape
    with pytest.raises(ConfigError, match="optimizer.name: adamw -> lion. The run would go on as another one"):
        find_resume(config)
    assert f"{checkpoint.folder} has v, for which this run has no use" in log.text
    assert f"'m' in {checkpoint.folder} are of adamw: those of lion start at zero" in log.text
    assert f"'ema' in {checkpoint.folder} are not there: those of lion start from the weights" in log.text


def test_the_same_kinds_come_back_whatever_they_are_called(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    config = changed(saved_by_adamw(tmp_path / "first"), name="sgd", ema_decay=0.9)
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"run_dir": str(tmp_path / "second")})})
    kinds = ("weights", "m", "ema")
    engine = engine_of(config, kinds)
    for kind in kinds[1:]:
        for _, values in engine.optimizer.state_pieces(kind):
            values.normal_()
    save_run(engine, RunState(step=3, skipped=1, loss_scale=0.5, losses=[1.0, 2.0], skipped_rows=[[3, 4]]))
    checkpoint = find_resume(config)
    assert checkpoint is not None and checkpoint.kinds == list(kinds)
    again = engine_of(config, kinds, checkpoint)
    assert load_run(again, checkpoint) == RunState(step=3, skipped=1, loss_scale=0.5, losses=[1.0, 2.0], skipped_rows=[[3, 4]])
    for kind in kinds:
        for (_, before), (_, after) in zip(engine.optimizer.state_pieces(kind), again.optimizer.state_pieces(kind), strict=True):
            assert torch.equal(before, after), kind
    assert "start" not in log.text and "no use" not in log.text


def test_an_older_checkpoint_loads_and_younger_settings_are_no_changes(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    config = saved_by_adamw(tmp_path)
    checkpoint = find_resume(config)
    assert checkpoint is not None
    checkpoint.run_state.clear()
    checkpoint.run_state.update(step=2, updates=2, rows=16, tokens=256)
    del checkpoint.config["optimizer"]["name"]
    engine = build_engine(config, Grid.single(), torch.device("cpu"), checkpoint.source("weights"))
    assert load_run(engine, checkpoint) == RunState(2, 2, 16, 256)
    assert "start" not in log.text
    changes = changes_since(checkpoint, config)
    assert (changes.of_another_run, changes.decides_numbers, changes.free) == ([], [], [])


def test_export_takes_the_average_if_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = saved_by_adamw(tmp_path / "run", precision={"compute": "float16"})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 1
    assert "has no average of the weights: it was trained without optimizer.ema_decay; leave out --ema" in capsys.readouterr().err
    engine = engine_of(config, ("weights", "ema"))
    for _, values in engine.optimizer.state_pieces("ema"):
        values.normal_()
    save_run(engine, RunState(step=5))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 0
    part = Part("final_norm.weight", (32,), ())
    exported = HFFolder(tmp_path / "out").source(config.model).read(part, Box.full((32,)))
    expected = open_checkpoint(tmp_path / "run/checkpoints/step-00000005").source("ema").read(part, Box.full((32,)))
    assert exported.dtype is torch.float16 and torch.equal(exported, expected.to(torch.float16))


def test_weights_that_were_frozen_when_saved_go_on_without_moments(tmp_path: Path) -> None:
    """And those that are frozen from now on leave theirs behind."""
    frozen = {"rules": [{"match": "embedding.*", "frozen": True}]}
    config = saved_by_adamw(tmp_path / "run", optimizer=frozen)
    thawed = changed(config, rules=config_of(optimizer={"rules": [{"match": "head.*", "frozen": True}]}).optimizer.rules)
    checkpoint = find_resume(thawed, allow_change=True)
    assert checkpoint is not None
    assert "embedding.weight" not in checkpoint.tensors("m") and config.optimizer.rules[0].frozen
    engine = build_engine(thawed, Grid.single(), torch.device("cpu"), checkpoint.source("weights"))
    state = load_run(engine, checkpoint)
    moments = {piece.part.name: values for piece, values in engine.optimizer.state_pieces("v")}
    assert not moments["embedding.weight"].any() and moments["layers.0.attention.o.weight"].any() and "head.weight" not in moments
    assert not train_step(engine, build_train_stream(thawed), state).skipped
    assert moments["embedding.weight"].any()
