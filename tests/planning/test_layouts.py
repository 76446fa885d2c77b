"""`plan --device`: the best layout is the best of all of them, what does not fit is said, and the written configuration runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_llm.cli import main as cli
from megatron_llm.config import Config, PeftConfig
from megatron_llm.config.optimization import ParameterRuleConfig
from megatron_llm.planning import layouts
from megatron_llm.planning.compare import GIB, Candidate, chosen
from megatron_llm.planning.hardware import DEVICES
from megatron_llm.planning.step_time import Modelled
from megatron_llm.training.resolve import layout_problems, load_config
from tests.runs import config_of
from tests.training.commands import run_train

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
    fastest: dict[tuple[int, int], float] = {}
    for row in every:
        if row.fits(20 * GIB):
            cell = row.config.parallel.tensor_parallel, row.config.parallel.pipeline_parallel
            fastest[cell] = min(row.seconds, fastest.get(cell, row.seconds))
    assert [row.seconds for row in ranking.best] == sorted(fastest.values())  # nothing is lost by what is not simulated
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


def _command(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    (folder / "run.yaml").write_text(CONFIG)
    code = cli.main(["plan", str(folder / "run.yaml"), *arguments])
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "h100"], "--gpus N"),
        (["training.global_batch_size=9", "--device", "h100", "--gpus", "7"], "the nearest that can is 7 or 14"),
        (["--device", "h100", "--gpus", "2", "--memory", "0.0001"], "more than the 9.6e-05 that can be used"),
        (["--device", "h100", "--gpus", "2", "--memory", "0.0001"], "take more GPUs, shorter rows"),
        (["model.intermediate_size=97", "precision.linear=fp8", "--device", "h100", "--gpus", "2"], "97, no multiple of 16"),
        (["optimizer.rules=[{match: haed.*, frozen: true}]", "--device", "h100", "--gpus", "2"], "is the name of no weight"),
        (["--device", "h100", "--gpus", "2", "--write", "nowhere/best.yaml"], "there is no folder nowhere"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, output = _command(tmp_path, capsys, *arguments)
    assert code != 0 and said in output


@pytest.mark.parametrize(
    "gpus, sections",
    [
        (1, {}),
        (3, {"training": {"global_batch_size": 6}}),
        (7, {"training": {"global_batch_size": 7}}),
        (12, {"training": {"global_batch_size": 12}}),  # a node and a half
        (2, {"training": {"sequence_length": 31}}),  # tokens that tensor parallelism cannot divide
        (8, {"model": {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 101}}),
        (4, {"model": {"tie_word_embeddings": True}, "peft": {"rank": 4}}),
        (4, {"optimizer": {"rules": [{"match": "layers.[01].*", "frozen": True}], "ema_decay": 0.9, "state_dtype": "bfloat16"}}),
        (4, {"precision": {"compute": "bfloat16", "gradients": "bfloat16"}, "parallel": {"zero_stage": 0}}),
    ],
)
def test_odd_cases_give_layouts_that_a_run_would_accept(gpus: int, sections: dict[str, dict[str, Any]]) -> None:
    config = config_of(**sections)
    assumed = Modelled(DEVICES["h100"])
    ranking = layouts.rank_layouts(config, gpus, assumed, layout_problems)
    assert ranking.best and not ranking.refused
    for row in ranking.best:
        assert not layout_problems(row.config, gpus)
        assert row.at_least <= row.peak * (1 + 1e-9) and row.shortest <= row.seconds
        assert all(share >= 0 for share in layouts.shares(row, assumed).values())


def test_what_is_frozen_takes_no_gradients_and_no_state() -> None:
    assumed = Modelled(DEVICES["h100"])

    def row(**sections: Any) -> Candidate:
        return Candidate(_config().model_copy(update=sections), 4, assumed)

    rules = [ParameterRuleConfig(match="layers.*", frozen=True)]
    trained, frozen = row(), row(optimizer=_config().optimizer.model_copy(update={"rules": rules}))
    assert not any(frozen.costs.weight) and all(trained.costs.weight)
    assert frozen.at_least < trained.at_least and frozen.at_least <= frozen.peak
    adapted = row(peft=PeftConfig(rank=8))
    for name in ("optimizer", "gradients", "weights"):
        assert adapted.outside[name] < 0.2 * trained.outside[name], name
    head = row(
        optimizer=_config().optimizer.model_copy(update={"rules": [ParameterRuleConfig(match="head.weight", frozen=True)]})
    )
    assert head.costs.forward[-1] < trained.costs.forward[-1] and head.costs.weight == trained.costs.weight


@pytest.mark.slow
def test_the_written_layout_trains_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On as many ranks, with the layout and the memory that were told."""
    best = tmp_path / "best.yaml"
    run_dir = f"logging.run_dir={tmp_path / 'run'}"
    told = ["--device", "h100", "--gpus", "2", "--nodes-of", "1", "--write", str(best)]
    code, output = _command(tmp_path, capsys, "device=cpu", run_dir, *told)
    assert code == 0
    run_train(2, best)
    ran = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    settings = next(line for line in output.splitlines() if line.startswith("the first: ")).split(": ")[1].split()
    for key, value in (setting.split("=") for setting in settings):
        section, name = key.split(".")
        assert str(ran[section][name]).lower() == value, key
    config = load_config(str(best), []).config
    assert config == load_config(str(tmp_path / "run/config.yaml"), []).config
    shown = next(line for line in output.splitlines() if line.startswith("1. ")).split(", ")[-1]
    assert shown == f"{chosen(config.model_copy(update={'device': 'cuda'}), 2).peak / GIB:.3g} GiB"
