"""Steps without finite numbers: skipped, counted, in float16 answered by another loss scale, and in the end reported."""

from __future__ import annotations

import copy
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import Config
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.build import Engine, build_engine
from megatron_llm.training.nonfinite import _local_share, end_if_hopeless
from megatron_llm.training.recovery import find_resume, load_run
from megatron_llm.training.step import RunState, StepResult, train_step
from tests.ranks import run_ranks
from tests.runs import TINY, config_of, owned_weights, save_run
from tests.training.commands import environment, read_metrics, read_status, train_command, write_config
from tests.training.planted import PlantedStream

SMALL = {"num_hidden_layers": 2}


def rows_of(step: int) -> range:
    """Rows of a step, from 1, of TINY."""
    return range(8 * (step - 1), 8 * step)


def engine_of(config: Config) -> Engine:
    return build_engine(config, Grid.build(config.parallel, config.model.num_key_value_heads), torch.device("cpu"))


def steps(config: Config, count: int, factors: dict[int, float], kind: str = "weights") -> list[tuple[RunState, StepResult, Any]]:
    """State, result and tensors after each step, on rows whose weights are multiplied."""
    engine, state, stream, seen = engine_of(config), RunState(), PlantedStream(build_train_stream(config), factors), []
    for _ in range(count):
        result = train_step(engine, stream, state)  # type: ignore[arg-type]
        seen.append((copy.deepcopy(state), result, owned_weights(engine, kind)))
    return seen


def test_a_bad_step_and_one_without_weight_are_both_skipped_but_told_apart() -> None:
    factors = {rows_of(2)[5]: math.nan, **dict.fromkeys(rows_of(3), 0.0), rows_of(4)[0]: math.inf}
    for rank in run_ranks(2, steps, config_of(model=SMALL), 5, factors):
        assert [result.finite for _, result, _ in rank] == [True, False, True, False, True]
        assert [result.skipped for _, result, _ in rank] == [False, True, True, True, False]
        assert [(s.updates, s.skipped, s.skipped_in_a_row) for s, _, _ in rank] == [
            (1, 0, 0), (1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 0),
        ]  # fmt: skip
        assert [s.rows for s, _, _ in rank] == [8, 16, 24, 32, 40]
        weights = [[values for *_, values in pieces] for *_, pieces in rank]
        same = [all(map(torch.equal, a, b)) for a, b in zip(weights, weights[1:], strict=False)]
        assert same == [True, True, True, False]


def loss_scales(config: Config, factors: dict[int, float], stop: int) -> list[tuple[float, float, bool]]:
    """(loss, scale, skipped) of each step of a float16 run that is saved and loaded after `stop` steps."""
    engine, state, stream, seen = engine_of(config), RunState(), PlantedStream(build_train_stream(config), factors), []
    for step in range(config.training.steps):
        if step == stop:
            save_run(engine, state)
            checkpoint = find_resume(config)
            assert checkpoint is not None
            engine = build_engine(config, engine.grid, engine.device, checkpoint.source("weights"))
            state = load_run(engine, checkpoint)
        result = train_step(engine, stream, state)  # type: ignore[arg-type]
        seen.append((result.loss, result.loss_scale, result.skipped))
    return seen


def test_float16_follows_float32_and_an_overflow_halves_the_scale_also_after_a_restart(tmp_path: Path) -> None:
    silent = dict.fromkeys(rows_of(5), 0.0)
    overflow = dict.fromkeys(rows_of(3), 1e5) | silent  # the losses are finite, and their gradients too large for float16
    sections: dict[str, Any] = {"model": SMALL, "training": {"steps": 8}, "optimizer": {"lr": 1e-3}}
    sections["logging"] = {"run_dir": str(tmp_path)}
    half = config_of(precision={"compute": "float16", "loss_scale_window": 3}, **sections)
    full = config_of(precision={"compute": "float32"}, **sections)
    whole, parts = (run_ranks(1, loss_scales, half, overflow, stop)[0] for stop in (-1, 5))
    assert parts == [pytest.approx(step, rel=0, abs=0, nan_ok=True) for step in whole]
    assert [(scale, skipped) for _, scale, skipped in whole] == [
        (4096.0, False), (4096.0, False), (4096.0, True), (2048.0, False), (2048.0, True), (2048.0, False),
        (2048.0, False), (4096.0, False),
    ]  # fmt: skip
    skipping = dict.fromkeys(rows_of(3), 0.0) | silent
    expected = [loss for loss, *_ in run_ranks(1, loss_scales, full, skipping, -1)[0]]
    followed = [step for step in range(8) if step not in (2, 4)]
    assert [whole[step][0] for step in followed] == pytest.approx([expected[step] for step in followed], rel=1e-3)


def test_a_scale_changes_neither_norms_nor_moments() -> None:
    """Adam would hide a factor on all gradients; its first moments show it."""
    configs = [config_of(model=SMALL, precision={"compute": "float16", "loss_scale": scale}) for scale in (16.0, 128.0)]
    a, b = (run_ranks(1, steps, config, 2, {}, "m")[0] for config in configs)
    assert [result.loss_scale for _, result, _ in a + b] == [16.0] * 2 + [128.0] * 2
    assert [result.grad_norm for _, result, _ in a] == pytest.approx([result.grad_norm for _, result, _ in b], rel=1e-3)
    for (name, *_, m), (*_, other) in zip(a[0][2], b[0][2], strict=True):
        assert (m - other).norm() < 0.02 * m.norm(), name
    assert all(state.loss_scale == 4096.0 and state.finite_in_a_row == 0 for state, *_ in a + b)


def report(config: Config, factors: dict[int, float]) -> str:
    """What the run says when it gives up."""
    engine, state, stream = engine_of(config), RunState(), PlantedStream(build_train_stream(config), factors)
    for _ in range(5):
        result = train_step(engine, stream, state)  # type: ignore[arg-type]
        try:
            end_if_hopeless(engine, state, result)
        except AgreedError as error:
            return str(error)
    return ""


def test_the_report_names_step_rows_ranks_and_parameters() -> None:
    parallel = {"pipeline_parallel": 2}
    config = config_of(model=SMALL, parallel=parallel, training={"max_skipped_steps": 2})
    # Replica 1 has the rows 2, 3, 6, 7 of every batch.
    messages = run_ranks(4, report, config, {rows_of(2)[2]: math.nan, rows_of(3)[7]: math.nan})
    assert len(set(messages)) == 1
    for part in (
        "2 steps in a row (training.max_skipped_steps: 2)",
        "step 3 on rows [16, 24)",
        "loss not finite on: rank 3 (pp 1, dp 1, tp 0)\n",
        "head.weight (3,104)",
        "1 updates were made",
    ):
        assert part in messages[0], messages[0]
    assert run_ranks(4, report, config.model_copy(update={"training": config_of().training}), {8: math.nan}) == [""] * 4


def shares(config: Config) -> tuple[dict[str, float], float, float]:
    """Squared gradient norms by name of this rank's share, its weight, and the norm of the whole gradient."""
    engine = engine_of(config)
    engine.optimizer.update = lambda *_: None  # type: ignore[method-assign]
    result = train_step(engine, build_train_stream(config), RunState())
    share = _local_share(engine, result)
    return dict(share.squares), share.weight, result.grad_norm


@pytest.mark.parametrize("world, parallel", [(1, {}), (4, {"tensor_parallel": 4}), (4, {"tensor_parallel": 2})])
def test_the_norms_of_the_report_are_those_of_the_gradient(world: int, parallel: dict[str, Any]) -> None:
    config = config_of(model=SMALL, parallel=parallel)
    found = run_ranks(world, shares, config)
    weight = sum(weight for _, weight, _ in found)
    total = sum(value for squares, _, _ in found for value in squares.values())
    assert math.sqrt(total) / weight == pytest.approx(found[0][2], rel=1e-9)
    (((expected, _, _),)) = (run_ranks(1, shares, config_of(model=SMALL))[0],)
    for name, value in expected.items():
        assert sum(squares.get(name, 0.0) for squares, _, _ in found) == pytest.approx(value, rel=1e-9), name


def diverging(run: Path) -> dict[str, Any]:
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(run)}, "precision": {"compute": "float32"}}
    raw["model"] |= SMALL
    raw["training"] |= {"max_skipped_steps": 3}
    return raw | {"optimizer": {"lr": 1e30, "grad_clip": 0}, "lr_schedule": {"kind": "constant"}}


def test_a_run_that_diverges_fails_with_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_config(tmp_path / "run.yaml", diverging(tmp_path / "run")))]) == 1
    assert "3 steps in a row" in capsys.readouterr().err
    status = read_status(tmp_path / "run")
    assert status["outcome"] == "failed" and "parameters with gradient elements that are not finite" in status["reason"]
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["skipped_steps"] for line in steps][-4:] == [0, 1, 2, 3] and steps[-1]["grad_norm"] is None


@pytest.mark.slow
def test_what_all_ranks_say_is_heard_once(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", diverging(tmp_path / "run"))
    done = subprocess.run(train_command(2, config), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.count("3 steps in a row") == 1, done.stderr


def test_metrics_have_the_loss_scale_in_float16_only(tmp_path: Path) -> None:
    for compute, expected in (("float16", [4096.0]), ("float32", [None])):
        raw = diverging(tmp_path / compute) | {"optimizer": {"lr": 1e-3}, "precision": {"compute": compute}}
        assert main(["train", str(write_config(tmp_path / "run.yaml", raw)), "training.steps=1"]) == 0
        assert [line.get("loss_scale") for line in read_metrics(tmp_path / compute) if "loss" in line] == expected
        assert open_checkpoint(tmp_path / compute / "checkpoints/step-00000001").run_state["loss_scale"] == 4096.0
        assert main(["inspect", str(tmp_path / compute)]) == 0
