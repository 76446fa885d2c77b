"""`plan --device`: the best layout is the best of all of them, what does not fit is said, and the written configuration runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.cli import main as cli
from megatron_llm.config import Config
from megatron_llm.planning import layouts
from megatron_llm.planning.compare import GIB
from megatron_llm.planning.hardware import DEVICES
from megatron_llm.planning.step_time import Modelled
from megatron_llm.training.resolve import layout_problems, load_config
from tests.runs import config_of

MODEL = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4,
}  # fmt: skip


def _config(**training: Any) -> Config:
    training = {"sequence_length": 2048, "micro_batch_size": 1, "global_batch_size": 16, "steps": 1, **training}
    return config_of(model=MODEL, training=training, precision={"compute": "bfloat16"}, optimizer={"grad_clip": 1.0})


def _rank(memory: float, world: int = 4) -> tuple[layouts.Ranking, Modelled]:
    assumed = Modelled(replace(DEVICES["h100"], memory=memory))
    return layouts.rank_layouts(_config(), world, assumed, layout_problems), assumed


def test_the_first_is_the_fastest_of_all_that_fit() -> None:
    ranking, assumed = _rank(20.0)
    every = []
    for tp, pp in layouts._cells(_config(), 4, 8):
        for row in layouts._variants(_config(), 4, tp, pp, assumed, layout_problems):
            assert row.seconds >= row.shortest * 0.999999
            if row.at_least < 20 * GIB:
                every.append(row)
    fitting = min((row for row in every if row.fits(20 * GIB)), key=lambda row: row.seconds)
    assert ranking.best[0].seconds == pytest.approx(fitting.seconds)
    assert [row.seconds for row in ranking.best] == sorted(row.seconds for row in ranking.best)
    cells = [(row.config.parallel.tensor_parallel, row.config.parallel.pipeline_parallel) for row in ranking.best]
    assert len(set(cells)) == len(cells)
    assert all(row.fits(20 * GIB) for row in ranking.best)


def test_less_memory_refuses_more_and_says_by_how_much() -> None:
    (roomy, _), (narrow, _) = _rank(60.0), _rank(2.5)
    assert len(narrow.best) + len(narrow.refused) == len(roomy.best) and not roomy.refused
    assert narrow.refused and all(over > 0 for _, over in narrow.refused)
    assert narrow.best[0].seconds >= roomy.best[0].seconds


CONFIG = """
model: {vocab_size: 97, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 4, num_attention_heads: 4}
data: {kind: synthetic}
training: {sequence_length: 32, global_batch_size: 8, steps: 1}
optimizer: {lr: 1e-3}
"""


def test_the_command_explains_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    best = tmp_path / "best.yaml"
    arguments = [str(tmp_path / "run.yaml"), "--gpus", "2", "--device", "a100-80", "--write", str(best)]
    assert cli.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "1. TP" in out and "2. TP" in out and "besides products and scores" in out and "MFU" in out
    written = load_config(str(best), []).config
    assert not layout_problems(written, 2) and f"parallel.tensor_parallel={written.parallel.tensor_parallel}" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "h100"], "--gpus N"),
        (["--device", "h100", "--gpus", "7"], "global_batch_size 8"),
        (["--device", "h100", "--gpus", "2", "--memory", "0.0001"], "too many"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert cli.main(["plan", str(tmp_path / "run.yaml"), *arguments]) != 0
    assert said in capsys.readouterr().err
