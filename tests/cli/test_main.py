"""The command line as a user meets it: fast help without torch, one message for a mistake, exit codes."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_llm.cli import main as cli
from megatron_llm.config import Config

SCRIPT = str(Path(sys.executable).parent / "megatron-llm")

CONFIG = """
model: {vocab_size: 64, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 4}
data: {kind: synthetic}
training: {sequence_length: 16, global_batch_size: 4, steps: 2}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})


def test_help_lists_every_command_in_half_a_second() -> None:
    def used() -> float:  # not the time that passes, in which other programs run
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    seconds = []
    for _ in range(5):
        before = used()
        result = _run([SCRIPT, "--help"])
        seconds.append(used() - before)
        assert result.returncode == 0, result.stderr
    assert all(re.search(rf"^    {name}\b(?!-)", result.stdout, re.MULTILINE) for name in cli.COMMANDS), result.stdout
    assert min(seconds) < 0.5, f"--help took {seconds} s"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["config", "schema"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from megatron_llm.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as error: assert error.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = _run([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr


def test_module_and_script_are_the_same_program(config_file: str) -> None:
    script = _run([SCRIPT, "config", "show", config_file])
    module = _run([sys.executable, "-m", "megatron_llm", "config", "show", config_file])
    assert script.returncode == module.returncode == 0
    assert script.stdout == module.stdout != ""


def test_every_command_module_has_the_three_parts() -> None:
    for name in cli.COMMANDS:
        module = cli._module(name)
        assert module.HELP and callable(module.add_arguments) and callable(module.run), name


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["config"], ["config", "show"], ["config", "schema", "--nope"]])
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: megatron-llm" in capsys.readouterr().err


def test_show_prints_the_resolved_configuration(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", config_file, "training.steps=7", "optimizer.betas=[0.8, 0.9]"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["steps"] == 7 and shown["optimizer"]["betas"] == [0.8, 0.9]
    assert shown["model"]["head_dim"] == 4 and shown["model"]["num_key_value_heads"] == 4
    assert Config.model_validate(shown).model_dump(mode="json") == shown


def test_schema_describes_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)
    assert "hidden_size" in schema["$defs"]["ModelConfig"]["properties"]


def test_user_mistake_is_one_message_and_exit_1(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", config_file, "training.step=7", "optimizer.lr=-1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron-llm config: error: 2 problems")
    assert "did you mean training.steps?" in captured.err and "optimizer.lr" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["--debug", "config"], ["config", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "show", "missing.yaml"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "missing.yaml does not exist" in captured.err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise KeyError("planted")

    monkeypatch.setattr("megatron_llm.cli.config.run", broken)
    with pytest.raises(KeyError, match="planted"):
        cli.main(["config", "schema"])


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("3", 0)])
def test_under_a_launcher_rank_0_speaks(rank: str, lines: int) -> None:
    result = _run([SCRIPT, "config", "show", "missing.yaml"], RANK=rank, WORLD_SIZE="4")
    assert result.returncode == 1
    assert result.stderr.count("error:") == lines


def test_a_rank_speaks_about_its_own_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(args: object) -> int:
        error = ValueError("planted")
        error.add_note("on rank 3, reading shard 7")
        raise error

    monkeypatch.setattr("megatron_llm.cli.config.run", broken)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["config", "schema"]) == 1
    assert capsys.readouterr().err == "megatron-llm config: error: planted\non rank 3, reading shard 7\n"


def test_show_fills_the_model_in_from_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, rope_theta=5e5)).save_pretrained(tmp_path / "hf")
    text = CONFIG.replace(CONFIG.splitlines()[1], f"model: {{hf: {tmp_path / 'hf'}}}")
    (tmp_path / "run.yaml").write_text(text)
    assert cli.main(["config", "show", str(tmp_path / "run.yaml")]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    assert {key: shown[key] for key in shape} == shape
    assert (shown["num_key_value_heads"], shown["rope_theta"], shown["head_dim"]) == (2, 5e5, 6)
