"""Settings of the pipeline: names of schedules, and which steps are traced."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_llm.config import ConfigError, ParallelConfig, parse_config

NAMES = ("gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min")


def parse(**sections: dict[str, Any]) -> Any:
    model = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    training = {"sequence_length": 8, "global_batch_size": 1, "steps": 1}
    return parse_config({"model": model, "training": training, "optimizer": {"lr": 1.0}, **sections})


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_has_a_name(name: str) -> None:
    assert parse(parallel={"pipeline_schedule": name}).parallel.pipeline_schedule == name


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        parse(parallel={"pipeline_schedule": "zb_h3"})
    assert "parallel.pipeline_schedule" in str(error.value) and all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("count", [0, -1])
def test_a_rank_has_at_least_one_stage(count: int) -> None:
    with pytest.raises(ConfigError, match="parallel.virtual_stages"):
        parse(parallel={"virtual_stages": count})


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_v_schedules_end_where_they_begin(ranks: int) -> None:
    folded = [name for name in NAMES if ParallelConfig(pipeline_parallel=ranks, pipeline_schedule=name).folded]  # type: ignore[arg-type]
    assert folded == (list(NAMES) if ranks == 1 else ["zb_v", "v_half", "v_min"])


def test_no_step_is_traced_unless_asked_for() -> None:
    assert parse().logging.trace_steps == []
    assert parse(logging={"trace_steps": [1, 50]}).logging.trace_steps == [1, 50]


@pytest.mark.parametrize("steps", [[0], [3, -1], ["all"]])
def test_steps_to_trace_are_numbered_from_one(steps: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"logging.trace_steps"):
        parse(logging={"trace_steps": steps})
