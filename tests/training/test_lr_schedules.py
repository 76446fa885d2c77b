"""Learning rates and batch sizes of whole runs: growing batches, restarts, `lr: auto`, and what a resumed run changed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.cli.main import main
from megatron_llm.config import Config, ConfigError, TrainingConfig
from megatron_llm.data.indexed import ROLE_MASK
from megatron_llm.data.stream import build_train_stream
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.build import build_engine
from megatron_llm.training.recovery import find_resume, load_run
from megatron_llm.training.resolve import resolve
from megatron_llm.training.step import RunState, next_rate, train_step
from tests.data.sources import ASSISTANT, write_chat, write_pretrain
from tests.ranks import run_ranks
from tests.runs import TINY, Pieces, assemble, config_of, owned_weights, save_run
from tests.training.commands import read_metrics, read_status, write_config


def training_config(batch: int, ramp: dict[str, int] | None, steps: int = 10) -> TrainingConfig:
    return TrainingConfig(sequence_length=16, global_batch_size=batch, steps=steps, batch_size_rampup=ramp)  # type: ignore[arg-type]


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    start, increment, growths = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = draw(st.integers(1, 300))
    return training_config(start + growths * increment, {"start": start, "increment": increment, "rows": rows})


@pytest.mark.filterwarnings("ignore")  # megatron-core warns about everything that is not installed
@settings(max_examples=100, deadline=None)
@given(training=ramps())
def test_batches_grow_as_megatron_core_makes_them(training: TrainingConfig) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    ramp = training.batch_size_rampup
    assert ramp is not None
    peer = RampupBatchsizeNumMicroBatchesCalculator(
        training.global_batch_size, 1, 1, False, 1, ramp.start, ramp.increment, ramp.rows
    )
    growths = len(training.batch_sizes) - 1
    for rows in range(ramp.rows + 5):
        if rows * growths % ramp.rows and rows != ramp.rows:  # on an edge their division rounds one way or the other
            peer.update(rows, False)
            assert training.batch_size(rows) == peer.get_current_global_batch_size(), rows
    assert training.batch_size(0) == ramp.start and training.batch_size(ramp.rows - 1) < training.global_batch_size
    assert training.batch_size(ramp.rows) == training.global_batch_size


def test_sizes_change_on_the_edges() -> None:
    """From 4 to 10 by 2 over 30 rows: every size for 10 rows."""
    training = training_config(10, {"start": 4, "increment": 2, "rows": 30})
    assert [training.batch_size(rows) for rows in (0, 9, 10, 19, 20, 29, 30, 1000)] == [4, 4, 6, 6, 8, 8, 10, 10]


@settings(max_examples=100, deadline=None)
@given(training=ramps(), first=st.integers(0, 350), steps=st.integers(0, 60), short=st.integers(0, 8))
def test_rows_and_steps_count_what_a_run_does(training: TrainingConfig, first: int, steps: int, short: int) -> None:
    rows, walked = first, 0
    for _ in range(steps):
        rows += training.batch_size(rows)
    assert training.rows_after(steps, first) == rows
    enough, rows = max(0, training.rows_after(steps) - short), 0
    while rows + training.batch_size(rows) <= enough:
        rows, walked = rows + training.batch_size(rows), walked + 1
    assert training.steps_within(enough) == walked


RAMP = {"global_batch_size": 8, "batch_size_rampup": {"start": 4, "increment": 2, "rows": 24}}
SIZES = [4, 4, 4, 6, 6, 8, 8]  # 0, 4, 8 | 12, 18 | 24, 32: two sizes before the whole one, for 12 rows each
TOKENS = {"kind": "wsd", "warmup_tokens": 160, "decay_tokens": 256, "min_lr": 1e-3, "warmup_steps": 0}


def run_part(config: Config, steps: int) -> tuple[list[tuple[float, float, int, float]], Pieces]:
    """Continue the run of the run folder by some steps and save it: (loss, norm, rows, lr) of each, and the weights."""
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    checkpoint = find_resume(config, allow_change=True)
    engine = build_engine(config, grid, torch.device("cpu"), checkpoint.source("weights") if checkpoint else None)
    state, stream = load_run(engine, checkpoint) if checkpoint else RunState(), build_train_stream(config)
    results = [train_step(engine, stream, state) for _ in range(steps)]
    save_run(engine, state)
    return [(result.loss, result.grad_norm, result.rows, result.lr) for result in results], owned_weights(engine)


def expected_rates() -> list[float]:
    """TOKENS by hand: up over 160 tokens, down by 1 - sqrt over the last 256 of 640."""
    rates, at = [], 0
    for size in SIZES:
        at += 16 * size
        part = max(0.0, (at - (640 - 256)) / 256)
        rates.append(1e-2 * at / 160 if at <= 160 else 1e-3 + 9e-3 * (1 - math.sqrt(part)))
    assert at == 640
    return rates


@pytest.mark.parametrize(
    "parts",
    [
        [(1, {}, 7)],
        [(2, {}, 7)],
        [(2, {"pipeline_parallel": 2}, 4), (2, {}, 3)],
        [(2, {}, 2), (1, {}, 2), (2, {}, 1), (1, {}, 2)],
    ],
    ids=["dp1", "dp2", "pp2, then dp2", "dp2, dp1, dp2, dp1"],
)
def test_a_growing_batch_is_a_run_whose_batch_was_changed_by_hand(
    tmp_path: Path, parts: list[tuple[int, dict[str, Any], int]]
) -> None:
    """In float64, on any layout, and continued at any step. The oracle is one process that is resumed with every size."""
    schedule = {"kind": "constant", "warmup_steps": 0, "min_lr": 0.0}
    expected = []
    for size, rate in zip(SIZES, expected_rates(), strict=True):
        config = config_of(
            lr_schedule=schedule,
            optimizer={"lr": rate},
            training={"global_batch_size": size, "steps": 7},
            logging={"run_dir": str(tmp_path / "by hand")},
        )
        ((history, weights),) = run_ranks(1, run_part, config, 1)
        expected += history
    history, run_dir = [], {"run_dir": str(tmp_path / "run")}
    for world, parallel, steps in parts:
        training = {**RAMP, "micro_batch_size": 1 if world == 2 else 2, "steps": 7}
        config = config_of(lr_schedule=TOKENS, training=training, parallel=parallel, logging=run_dir)
        results = run_ranks(world, run_part, config, steps)
        history += results[0][0]
    assert [step[2] for step in history] == SIZES
    assert history == [pytest.approx(step, rel=1e-9) for step in expected]
    actual, whole = assemble([pieces for _, pieces in results]), assemble([weights])
    for name, value in actual.items():
        assert (value - whole[name]).norm() <= 1e-9 * whole[name].norm() + 1e-12 * value.numel() ** 0.5, name


def test_the_end_in_tokens_is_where_the_run_will_end() -> None:
    """A batch of 8 until step 5, and of 4 from there on: 5 * 8 + 5 * 4 rows, of which the last step ends the decay."""
    schedule = {"kind": "linear", "warmup_tokens": 16, "min_lr": 0.0, "warmup_steps": 0}
    config = config_of(lr_schedule=schedule, training={"global_batch_size": 4, "micro_batch_size": 1})
    state = RunState(step=5, updates=5, rows=40, tokens=640)
    rates = []
    while state.step < 10:
        rates.append(next_rate(config, state))
        state = RunState(state.step + 1, state.updates + 1, state.rows + 4, state.tokens + 64)
    assert rates == pytest.approx([1e-2 * (1 - (640 + 64 * k - 16) / (960 - 16)) for k in range(1, 6)], abs=1e-15)


def raw_config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(folder / "run")}}
    raw["training"]["steps"] = 2
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return raw


def test_a_changed_schedule_is_refused_or_allowed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path / "config.yaml", raw_config(tmp_path)))
    assert main(["train", config]) == 0
    changed = ["train", config, "lr_schedule.decay_steps=4", "optimizer.lr=0.02"]
    assert main([*changed, "training.steps=4"]) == 1
    text = capsys.readouterr().err
    changes = ["lr_schedule.decay_steps: None -> 4", "optimizer.lr: 0.01 -> 0.02"]
    for change in changes:
        assert f"step-00000002 was saved: {change}. The run would go on as another one: undo the change, or allow it" in text
    assert main([*changed, "training.steps=4", "--allow-change"]) == 0
    assert read_status(tmp_path / "run")["changes"] == changes
    text = capsys.readouterr().err
    assert all(f"changed since, and allowed: {change}" in text for change in changes)
    assert "the learning-rate schedule is not the one before; the next step has lr 0.02" in text
    assert main([*changed, "training.steps=5"]) == 0
    status = read_status(tmp_path / "run")
    assert status == {"outcome": "done", "step": 5}, "a length that the schedule does not depend on is no change of it"
    more = ["train", config, "training.steps=6", "optimizer.lr=0.02", "training.global_batch_size=4", "--allow-change"]
    assert main(more) == 0
    assert read_status(tmp_path / "run")["changes"] == [
        "lr_schedule.decay_steps: 4 -> None",
        "training.global_batch_size: 8 -> 4",
        "training.steps: 5 -> 6",
    ]


def test_continued_pretraining_warms_up_again(tmp_path: Path) -> None:
    """3 steps up to 0.01 and 3 down to 0.001; prolonged with a restart, the same again from 0.001."""
    config = str(write_config(tmp_path / "config.yaml", raw_config(tmp_path, lr_schedule={"kind": "linear"})))
    assert main(["train", config, "training.steps=6"]) == 0
    assert main(["train", config, "training.steps=12", "lr_schedule.restart_steps=[6]"]) == 1
    assert main(["train", config, "training.steps=12", "lr_schedule.restart_steps=[6]", "--allow-change"]) == 0
    rates = [line["lr"] for line in read_metrics(tmp_path / "run") if "lr" in line]
    down = [0.007, 0.004, 0.001]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, *down, 0.004, 0.007, 0.01, *down])


def test_auto_is_the_rule_for_tokens_with_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [10, 16, 3, 9, 12, 7, 16, 5, 8]
    path, roles = write_chat(tmp_path / "chat", lengths)
    data = {"kind": "chat", "train": [{"path": path}], "packing": "none", "order": "file"}
    raw = raw_config(tmp_path, data=data, optimizer={"lr": "auto"}, lr_schedule={"min_lr": 0.0, "min_lr_ratio": 0.1})
    firsts = {sum(lengths[:count]) for count in range(len(lengths))}  # which nothing before them predicts
    tokens = sum(roles[at] == ASSISTANT and at not in firsts for at in range(sum(lengths[:8])))
    assert 10 < tokens < 60
    config = str(write_config(tmp_path / "config.yaml", raw | {"model": TINY["model"]}))
    run = resolve(config, None, world_size=1)
    assert run.config.optimizer.lr == pytest.approx(0.0003 * math.sqrt(tokens / 4e6), rel=1e-12)
    assert main(["train", config]) == 0
    text = capsys.readouterr().err
    assert f"for {tokens} of 128 tokens of a batch with loss. It is an upper bound" in text
    rates = [line["lr"] for line in read_metrics(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([run.config.optimizer.lr / 3, run.config.optimizer.lr * 2 / 3])


def test_auto_weighs_tokens_by_what_they_add_to_the_mean(tmp_path: Path) -> None:
    """Of a mean of 5 tokens and 20 of a tenth of their weight, (5 + 2)^2 / (5 + 0.2) = 9.4 equal ones would be as sure."""
    lengths = [10, 16, 7, 9, 12, 7, 16, 5, 8]
    path, roles = write_chat(tmp_path / "chat", lengths)
    rates = {}
    for prompt_weight in (0.0, 0.1, 1.0):
        data = {
            "kind": "chat",
            "train": [{"path": path}],
            "packing": "none",
            "order": "file",
            "prompt_loss_weight": prompt_weight,
        }
        raw = raw_config(tmp_path, data=data, optimizer={"lr": "auto"}, lr_schedule={"min_lr": 0.0, "min_lr_ratio": 0.1})
        config = write_config(tmp_path / "config.yaml", raw | {"model": TINY["model"]})
        rates[prompt_weight] = resolve(config, None, world_size=1).config.optimizer.lr
    firsts = {sum(lengths[:count]) for count in range(len(lengths))}
    bytes_ = [byte for at, byte in enumerate(roles[: sum(lengths[:8])]) if at not in firsts]
    replies, prompts = bytes_.count(ASSISTANT), sum(byte & ROLE_MASK != ASSISTANT for byte in bytes_)
    assert replies > 10 and prompts > 10 and replies + prompts < len(bytes_), "and some are not to be trained"
    equal = (replies + 0.1 * prompts) ** 2 / (replies + 0.01 * prompts)
    for prompt_weight, tokens in ((0.0, replies), (0.1, equal), (1.0, replies + prompts)):
        assert rates[prompt_weight] == pytest.approx(0.0003 * math.sqrt(tokens / 4e6), rel=1e-6)


def test_steps_of_epochs_with_a_growing_batch(tmp_path: Path) -> None:
    """59 rows are batches of 4, 4, 4, 6, 6, and then of 8, 8, 8, 8; 3 rows are left over."""
    data = {"kind": "pretrain", "train": [{"path": write_pretrain(tmp_path / "text", [59 * 16 + 1]), "epochs": 1}]}
    raw = raw_config(tmp_path, data=data, training={**RAMP, "steps": -1}, model={"vocab_size": 1000})
    assert resolve(write_config(tmp_path / "config.yaml", raw), None, world_size=1).config.training.steps == 9


def test_auto_without_a_token_to_learn(tmp_path: Path) -> None:
    """Documents of one token, none of which predicts the next."""
    data = {"kind": "pretrain", "train": [{"path": write_pretrain(tmp_path / "text", [1] * 200)}]}
    raw = raw_config(tmp_path, data=data, optimizer={"lr": "auto"}, lr_schedule={"min_lr": 0.0}, model={"vocab_size": 1000})
    with pytest.raises(ConfigError, match="none of the first 8 rows of data.train has a token with loss; give a number"):
        resolve(write_config(tmp_path / "config.yaml", raw), None, world_size=1)


@pytest.mark.parametrize(
    "world, sections, said",
    [
        (1, {"optimizer": {"lr": "auto"}, "lr_schedule": {"min_lr": 0.5}}, "lr_schedule.min_lr: 0.5 exceeds optimizer.lr 1.4"),
        (1, {"optimizer": {"lr": -1}}, r"optimizer.lr: Input should be greater than 0, or auto \(got -1\)"),
        (1, {"lr_schedule": {"warmup_steps": 0, "warmup_tokens": 9, "decay_tokens": 8}}, "warmup_tokens: 9 lie beyond"),
        (
            1,
            {"training": {"steps": 10}, "lr_schedule": {"kind": "wsd", "decay_steps": 8}},
            "a warm-up of 3 and a decay of 8 do not fit into the 10 steps from 0 to 10",
        ),
        (
            1,
            {"training": {"steps": 30}, "lr_schedule": {"kind": "wsd", "decay_steps": 8, "restart_steps": [20]}},
            "do not fit into the 10 steps from 20 to 30",
        ),
        (
            1,
            {"training": {"batch_size_rampup": {"start": 2, "increment": 4, "rows": 9}}},
            "grows from 2 rows by 4 at a time and never is global_batch_size 8",
        ),
        (
            2,
            {"training": {"batch_size_rampup": {"start": 4, "increment": 2, "rows": 9}}},
            r"training.batch_size_rampup: 6 is not a multiple of micro_batch_size 2 \* data parallel size 2 = 4",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, world: int, sections: dict[str, Any], said: str) -> None:
    config = write_config(tmp_path / "config.yaml", raw_config(tmp_path, **sections))
    with pytest.raises(ConfigError, match=said):
        resolve(config, None, world_size=world)


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", raw_config(tmp_path))
    overrides = ["lr_schedule.kind=constant", "lr_schedule.decay_steps=7"]
    assert resolve(config, None, 1).notes == ()
    assert resolve(config, overrides, 1).notes == (
        "lr_schedule.decay_steps: 7 has no effect with kind constant",
        "lr_schedule.min_lr: 0.001 has no effect with kind constant",
    )
