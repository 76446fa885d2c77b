"""A run whose loss leaps goes back and on past the rows: in float64 the run that never saw them, bit for bit."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.checkpoint.load import open_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import Config, LossSpikeConfig
from megatron_llm.data.writer import IndexedWriter
from megatron_llm.training.loop import _steps
from megatron_llm.training.resolve import resolve
from megatron_llm.training.rollback import find_spike, remember_loss
from megatron_llm.training.step import RunState, next_rate
from tests.ranks import run_ranks
from tests.runs import TINY, assemble, config_of, owned_weights
from tests.training.commands import read_metrics, read_status, write_config
from tests.training.planted import fresh_run

ROWS, LENGTH, BATCH = 160, 16, 8
SPIKE = {"threshold": 4.0, "window": 4, "max_rollbacks": 2}


def write_rows(prefix: Path, strange: range, without: range = range(0)) -> str:
    """A data set of easy rows, each a document, and hard ones in `strange`; those in `without` are not there at all."""
    random = np.random.default_rng(0)
    rows = [(np.arange(LENGTH) + row % 3) % 97 for row in range(ROWS)]
    for row in strange:
        rows[row] = random.integers(97, size=LENGTH)
    with IndexedWriter(prefix, np.uint16) as writer:
        for row in sorted(set(range(ROWS)) - set(without)):
            writer.add_document(rows[row])
    return str(prefix)


def raw_config(run: Path, data: str, **sections: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(TINY)
    raw["model"] |= {"num_hidden_layers": 2}
    raw["data"] = {"kind": "pretrain", "order": "file", "train": [{"path": data}]}
    raw["training"] |= {"steps": 14, "loss_spike": SPIKE}
    raw["lr_schedule"] = {"kind": "cosine", "warmup_tokens": 3 * BATCH * LENGTH}
    raw["checkpoint"] = {"every_steps": 4}
    raw["logging"] = {"run_dir": str(run)}
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return raw


def run_command(tmp_path: Path, raw: dict[str, Any], *overrides: str, code: int = 0) -> None:
    assert main(["train", str(write_config(tmp_path / "run.yaml", raw)), *overrides]) == code


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """What the run says of its steps, without those that it says were undone."""
    return [
        tuple(line[key] for key in ("step", "loss", "grad_norm", "lr", "rows", "tokens"))
        for line in read_metrics(run)
        if "loss" in line
    ]


def tensors(folder: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint that one rank wrote."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


RAMP = {"batch_size_rampup": {"start": 4, "increment": 2, "rows": 90}}


@pytest.mark.parametrize("ramp", [False, True], ids=["constant batch", "growing batch"])
def test_a_run_with_a_spike_is_the_run_that_never_saw_its_rows(tmp_path: Path, ramp: bool) -> None:
    training = {"training": {**raw_config(tmp_path, "")["training"], **(RAMP if ramp else {})}}
    easy = raw_config(tmp_path, write_rows(tmp_path / "easy", range(0)), **training)
    config = resolve(write_config(tmp_path / "easy.yaml", easy), [], 1).config.training
    back, stop = config.rows_after(8), config.rows_after(10)
    strange = range(config.rows_after(9), stop)
    never = raw_config(tmp_path / "never", write_rows(tmp_path / "without", strange, range(back, stop)), **training)
    run_command(tmp_path, never)
    run_command(tmp_path, raw_config(tmp_path / "spiked", write_rows(tmp_path / "all", strange), **training))

    assert numbers(tmp_path / "spiked") == numbers(tmp_path / "never")
    assert [line[0] for line in numbers(tmp_path / "never")] == list(range(1, 15))
    last = "checkpoints/step-00000014"
    assert tensors(tmp_path / "spiked" / last) == tensors(tmp_path / "never" / last)
    state, expected = (open_checkpoint(tmp_path / run / last).run_state for run in ("spiked", "never"))
    assert state["rows"] == expected["rows"] + stop - back and state["skipped_rows"] == [[back, stop]]
    assert {**state, "rows": 0, "skipped_rows": []} == {**expected, "rows": 0}

    assert read_status(tmp_path / "spiked") == {"outcome": "done", "step": 14, "skipped_rows": [[back, stop]]}
    said = [line for line in read_metrics(tmp_path / "spiked") if "back_to_step" in line]
    assert said == [{"step": 10, "back_to_step": 8, "skipped_rows": [[back, stop]]}]
    assert main(["inspect", str(tmp_path / "spiked")]) == 0


def test_a_second_spike_on_the_way_back_adds_its_rows_and_a_third_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = raw_config(tmp_path / "run", write_rows(tmp_path / "data", range(72, 88)))
    run_command(tmp_path, raw, "training.steps=11")
    assert read_status(tmp_path / "run")["skipped_rows"] == [[64, 80], [80, 88]]
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == list(range(1, 12))

    once = raw_config(tmp_path / "once", raw["data"]["train"][0]["path"])
    once["training"]["loss_spike"] = {**SPIKE, "max_rollbacks": 1}
    run_command(tmp_path, once, code=1)
    text = capfd.readouterr().err
    assert "went back 1 times already (training.loss_spike.max_rollbacks: 1) and left out the rows [64, 80)" in text
    assert read_status(tmp_path / "once")["outcome"] == "failed"


def test_without_a_checkpoint_the_run_says_so_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data", range(72, 80))
    run_command(tmp_path, raw_config(tmp_path / "run", data, checkpoint={"every_steps": 0}))
    text = capfd.readouterr().err
    assert "without checkpoint.every_steps a run has no checkpoint of its own" in text
    assert "the loss of step 10, " in text and "there is no checkpoint to go back to yet: going on" in text
    assert "skipped_rows" not in read_status(tmp_path / "run") and len(numbers(tmp_path / "run")) == 14


def test_a_resumed_run_knows_the_losses_before(tmp_path: Path) -> None:
    raw = raw_config(tmp_path / "run", write_rows(tmp_path / "data", range(72, 80)))
    run_command(tmp_path, raw, "training.steps=9")
    run_command(tmp_path, raw, "--allow-change")
    assert read_status(tmp_path / "run")["skipped_rows"] == [[72, 80]]


def steps_on_this_rank(config: Config) -> Any:
    """Train with the loop of a real run. The weights owned at the end, and the rows left out."""
    run = fresh_run(config)
    _steps(run)
    return owned_weights(run.engine), run.state.skipped_rows


def test_all_ranks_of_any_layout_go_back_together(tmp_path: Path) -> None:
    data, results = write_rows(tmp_path / "data", range(72, 80)), []
    for world, parallel in ((1, {}), (4, {"tensor_parallel": 2, "pipeline_parallel": 2}), (2, {"bucket_size": 1000})):
        config = config_of(raw_config(tmp_path / f"run-{world}", data, parallel=parallel))
        ranks = run_ranks(world, steps_on_this_rank, config)
        assert [skipped for _, skipped in ranks] == [[[64, 80]]] * world
        results.append(assemble([pieces for pieces, _ in ranks]))
    for name, expected in results[0].items():
        for other in results[1:]:
            assert (other[name] - expected).norm() <= 1e-9 * expected.norm() + 1e-12 * expected.numel() ** 0.5, name


def test_a_spike_is_told_from_noise_by_mean_and_deviation() -> None:
    spike = LossSpikeConfig(threshold=3.0, window=5)
    losses = [2.0, 2.2, 1.9, 2.1, 2.3]
    limit = np.mean(losses) + 3.0 * np.std(losses)
    full, short = RunState(step=6, losses=[99.0, *losses]), RunState(losses=losses[1:])
    assert find_spike(full, limit - 1e-9, spike) == ""
    assert find_spike(full, limit + 1e-9, spike).startswith(f"the loss of step 6, {limit:.4f}, exceeds the mean 2.1000 of the 5")
    assert find_spike(short, 9.0, spike) == find_spike(full, math.nan, spike) == find_spike(full, 9.0, None) == ""
    state = RunState()
    for loss in (1.0, math.nan, *losses, math.inf):
        remember_loss(state, loss, spike)
    assert state.losses == losses
    assert RunState(**json.loads(json.dumps(vars(state)))) == state
    remember_loss(state, 1.0, None)
    assert state.losses == [], "with the rule turned off and on again they would be old ones"


def test_learning_rates_do_not_jump_over_rows_left_out() -> None:
    """In tokens and with a growing batch, the rate that comes next is that of the state without the gap."""
    config = config_of(raw_config(Path("unused"), "unused", training={**TINY["training"], **RAMP}))
    for step in range(10):
        rows = config.training.rows_after(step)
        state = RunState(step, step, rows, rows * LENGTH)
        gap = RunState(step, step, rows + 50, rows * LENGTH, skipped_rows=[[0, 20], [30, 60]])
        assert next_rate(config, gap) == next_rate(config, state)


def test_an_order_that_has_no_other_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_config(tmp_path / "run", write_rows(tmp_path / "data", range(0)))
    raw["data"]["order"] = "megatron"
    run_command(tmp_path, raw, code=1)
    assert "training.loss_spike: data.order megatron plans exactly the rows of training.steps" in capsys.readouterr().err


def test_rows_beyond_the_epochs_are_announced(tmp_path: Path) -> None:
    raw = raw_config(tmp_path / "run", "")
    raw["data"]["train"] = [{"path": write_rows(tmp_path / "data", range(0)), "epochs": 1}]
    notes = resolve(write_config(tmp_path / "run.yaml", raw), ["training.steps=-1"], 1).notes
    assert notes == ("training.loss_spike: rows left out after a spike are replaced by rows beyond the epochs of data.train",)
