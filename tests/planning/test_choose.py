"""`pipeline_schedule: auto`: the shortest simulated step that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_llm.cli.main import main
from megatron_llm.config import Config, ConfigError
from megatron_llm.pipeline.schedules import NAMES
from megatron_llm.planning.compare import GIB, SPARE, Assumptions, candidate, choose
from megatron_llm.training.resolve import resolve
from tests.runs import TINY, config_of
from tests.training.commands import run_train, write_config

BIG = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def _config(ranks: int = 4, **sections: dict[str, Any]) -> Config:
    parallel = {"pipeline_parallel": ranks, "pipeline_schedule": "auto"} | sections.pop("parallel", {})
    training = {"sequence_length": 4096, "micro_batch_size": 1, "global_batch_size": 16, "steps": 1}
    return config_of(model=BIG, parallel=parallel, training=training, precision={"compute": "bfloat16"}, **sections)


def _all(config: Config, world: int) -> dict[str, Any]:
    chunks = {"interleaved": 2, "breadth_first": 2}
    return {name: candidate(config, world, name, chunks.get(name, 1), Assumptions()) for name in NAMES}


def test_without_a_limit_the_shortest_step_is_chosen() -> None:
    config = _config()
    known = _all(config, 8)
    best, note = choose(config, 8, None)
    shortest = min(row.simulation.timeline.makespan for row in known.values())
    assert best.simulation.timeline.makespan == pytest.approx(shortest)
    assert best.config.parallel.pipeline_schedule == best.name in note and "GiB on the fullest rank" in note


def test_every_limit_gets_the_shortest_step_that_fits() -> None:
    config = _config()
    known = _all(config, 8)
    chosen = set()
    for limit in sorted(row.peak for row in known.values()):
        device = limit / (1 - SPARE) * 1.0001
        best, note = choose(config, 8, device)
        fitting = [row for row in known.values() if row.peak <= limit * 1.0001]
        assert best.peak <= limit * 1.0001
        assert best.simulation.timeline.makespan == pytest.approx(min(row.simulation.timeline.makespan for row in fitting))
        faster = [
            row.name for row in known.values() if row.simulation.timeline.makespan < 0.999 * best.simulation.timeline.makespan
        ]
        assert all(name in note for name in faster)
        chosen.add(best.name)
    assert len(chosen) >= 3, "memory makes a difference"


def test_if_nothing_fits_the_numbers_of_the_smallest_are_told() -> None:
    config = _config()
    least = min(_all(config, 8).values(), key=lambda row: row.peak)
    with pytest.raises(ConfigError, match=f"the smallest is {least.name} with {least.peak / GIB:.4g} GiB. Use more") as error:
        choose(config, 8, least.peak)
    assert "parallel.pipeline_schedule: auto" in str(error.value)
    with pytest.raises(ConfigError, match="the smallest is 1f1b"):
        choose(_config(1), 1, 1e9)


def test_of_equal_steps_the_smaller_then_the_simpler_one_is_chosen() -> None:
    """One micro-batch on two ranks leaves nothing to fill."""
    config = config_of(
        parallel={"pipeline_parallel": 2, "pipeline_schedule": "auto"},
        training={"micro_batch_size": 8},
        model={"num_hidden_layers": 2},
    )
    best, _ = choose(config, 2, None)
    known = _all(config, 2)
    equal = [row for row in known.values() if row.simulation.timeline.makespan <= best.simulation.timeline.makespan * (1 + 1e-9)]
    least = min(row.peak for row in equal)
    assert best.peak == least and best.name == next(row.name for row in equal if row.peak == least)


def test_one_pipeline_rank_needs_no_choice() -> None:
    best, note = choose(_config(1), 4, None)
    assert best.name == "1f1b" and "one pipeline rank" in note


def _write(path: Path, **parallel: Any) -> Path:
    raw = {**TINY, "parallel": {"pipeline_parallel": 2, "pipeline_schedule": "auto", **parallel}}
    return write_config(path / "config.yaml", raw | {"logging": {"run_dir": str(path / "run")}})


def test_a_run_resolves_it_before_it_starts(tmp_path: Path) -> None:
    run = resolve(_write(tmp_path), [], 2)
    assert run.config.parallel.pipeline_schedule in NAMES
    assert any("parallel.pipeline_schedule: auto is" in note for note in run.notes)
    with pytest.raises(ConfigError, match="auto finds no schedule"):
        resolve(_write(tmp_path, device_memory_gib=1e-6), [], 2)
    with pytest.raises(ConfigError, match="does not divide the world size"):
        resolve(_write(tmp_path), [], 3)


def test_plan_shows_the_choice_and_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path)
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "parallel.pipeline_schedule: auto is" in out and "predicted memory, GiB" in out and "more than" not in out
    assert main(["plan", str(path), "parallel.pipeline_schedule=gpipe", "--memory", "0.0001"]) == 0
    assert "more than 0.0001" in capsys.readouterr().out
    assert main(["plan", str(path), "--memory", "1e-6"]) == 1
    assert "auto finds no schedule that fits into 1e-06 GiB" in capsys.readouterr().err


def test_plan_chooses_for_the_speeds_that_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slow network makes another schedule the shortest, and that is the one the comparison has first."""
    path, chosen = _write(tmp_path), []
    for bandwidth in ("1e9", "1e-3"):
        assert main(["plan", str(path), "--bandwidth", bandwidth]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if line.split(" ")[0] in NAMES]
        assert "configured" in rows[0], rows
        chosen.append(rows[0].split()[0])
    assert chosen[0] != chosen[1]


@pytest.mark.slow
def test_a_run_trains_with_it_and_keeps_its_name(tmp_path: Path) -> None:
    path = _write(tmp_path)
    run_train(2, path)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["parallel"]["pipeline_schedule"] in NAMES
