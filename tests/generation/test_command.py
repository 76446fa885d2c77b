"""`megatron-llm generate` as a user runs it, from a run folder and from its export."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_llm.cli.main import main
from megatron_llm.generation.model import stop_ids
from megatron_llm.generation.prompts import read_prompts
from tests.launch import launch
from tests.test_readme import prepare
from tests.training.blends import logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps and its export."""
    path = tmp_path_factory.mktemp("run")
    prepare(path)
    text, tokenizer, data = (str(path / name) for name in ("text.jsonl", "tokenizer", "data/text"))
    assert main(["preprocess", "--input", text, "--tokenizer", tokenizer, "--output", data]) == 0
    settings = {
        "parallel.tensor_parallel": 1, "parallel.pipeline_parallel": 1, "training.steps": 2, "data.tokenizer": tokenizer,
        "data.train": f"[{{path: {data}}}]", "data.valid": f"[{{path: {data}}}]", "logging.run_dir": path / "run",
    }  # fmt: skip
    assert main(["train", str(path / "config.yaml"), *(f"{key}={value}" for key, value in settings.items())]) == 0
    assert main(["export", str(path / "run"), str(path / "hf")]) == 0
    return path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", *arguments, "--max-new-tokens", "6"]) == 0
    return capsys.readouterr().out


def test_a_checkpoint_and_its_export_say_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "def main(", "--prompt", "import"]
    from_run = output(capsys, "--checkpoint", str(folder / "run"), *prompt)
    assert from_run == output(capsys, "--hf", str(folder / "hf"), *prompt)
    assert from_run.startswith("def main(") and "\nimport" in from_run and len(from_run) > len("def main(\nimport\n")
    sampled = [output(capsys, "--hf", str(folder / "hf"), *prompt, "--temperature", "1", "--seed", seed) for seed in "121"]
    assert sampled[0] == sampled[2] != sampled[1]


def test_chat_renders_the_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = output(capsys, "--hf", str(folder / "hf"), "--prompt", "user\nhi<|im_end|>")
    chat = output(capsys, "--hf", str(folder / "hf"), "--prompt", "hi", "--chat")
    assert plain == f"user\nhi<|im_end|>{chat}"


def test_what_cannot_work_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "no whole checkpoint": ["--checkpoint", str(tmp_path)],
        "config.json": ["--hf", str(tmp_path)],
        "temperature -1.0 is negative": ["--hf", str(folder / "hf"), "--temperature", "-1"],
        "--max-new-tokens 0": ["--hf", str(folder / "hf"), "--max-new-tokens", "0"],
        "prompt 0 has no tokens": ["--hf", str(folder / "hf"), "--prompt", ""],
    }
    for message, arguments in cases.items():
        prompt = [] if "--prompt" in arguments else ["--prompt", "x"]
        assert main(["generate", *arguments, *prompt]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{bad", "is no JSON object"), (b"[1]", "is no JSON object"), (b'{"eos_token_id": "x"}', "must be token ids")],
)
def test_a_damaged_generation_config_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"generation_config.json that comes with the model.*{message}"):
        stop_ids(SimpleNamespace(eos_token_id=1, chat_template=None), {"generation_config.json": content})


def _generate(folder: Path, output: Path, *arguments: str) -> list[dict[str, Any]]:
    command = ["generate", "--hf", str(folder / "hf"), "--output", str(output), "--max-new-tokens", "6", *arguments]
    assert main(command) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[Any] = [
        "def main(", {"prompt": "import"}, {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]},
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return tmp_path / "prompts.jsonl"


def test_prompts_of_a_file(folder: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["def main(", "import", "user\nhi<|im_end|>", "system\nown<|im_end|>user\nhi<|im_end|>"]
    printed = [output(capsys, "--hf", str(folder / "hf"), "--prompt", text) for text in texts]
    expected = [text.removeprefix(prompt).removesuffix("\n") for text, prompt in zip(printed, texts, strict=True)]
    found = _generate(folder, tmp_path / "out.jsonl", "--prompts", str(prompts))
    assert [line["reply"] for line in found] == expected
    assert [line.get("prompt") for line in found] == ["def main(", "import", None, None] and not found[0]["ended"]
    (tmp_path / "lines.txt").write_text("\ndef main(\r\n\nimport\n")
    plain = _generate(folder, tmp_path / "out.jsonl", "--prompts", str(tmp_path / "lines.txt"))
    assert [(line["prompt"], line["reply"]) for line in plain] == list(zip(texts[:2], expected[:2], strict=True))
    with_system = _generate(folder, tmp_path / "out.jsonl", "--prompts", str(prompts), "--system", "own")
    assert with_system[2]["reply"] == with_system[3]["reply"] == expected[3]


def test_several_ranks_of_a_launcher_say_what_one_process_says(folder: Path, tmp_path: Path, prompts: Path) -> None:
    sampled = ["--prompts", str(prompts), "--temperature", "1", "--top-p", "0.9", "--batch-size", "3"]
    expected = _generate(folder, tmp_path / "one.jsonl", *sampled)
    command = ["generate", "--hf", str(folder / "hf"), "--output", str(tmp_path / "two.jsonl"), "--max-new-tokens", "6", *sampled]
    endings = launch(2, main, [*command, "--pipeline-parallel", "2"])
    assert [ending.code for ending in endings] == [0, 0], logs(endings)
    assert [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()] == expected


@pytest.mark.slow
def test_the_command_starts_ranks(folder: Path, tmp_path: Path, prompts: Path) -> None:
    expected = _generate(folder, tmp_path / "one.jsonl", "--prompts", str(prompts))
    layout = ["--tensor-parallel", "2", "--pipeline-parallel", "2", "--device", "cpu"]
    assert _generate(folder, tmp_path / "four.jsonl", "--prompts", str(prompts), *layout) == expected
    from_run = [
        "generate",
        "--checkpoint",
        str(folder / "run"),
        "--prompt",
        "x",
        "--max-new-tokens",
        "1",
        "--tensor-parallel",
        "2",
    ]
    assert main([*from_run, "--device", "cpu"]) == 0


def test_impossible_layouts_are_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "--tensor-parallel 3 --pipeline-parallel 1: model.num_key_value_heads": ["--tensor-parallel", "3"],
        "65 ranks are more than 64": ["--pipeline-parallel", "65"],
        "--pipeline-parallel 0 must be at least 1": ["--pipeline-parallel", "0"],
    }
    for message, arguments in cases.items():
        assert main(["generate", "--hf", str(folder / "hf"), "--prompt", "x", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_lines_that_are_no_prompts_are_named(tmp_path: Path) -> None:
    cases = {
        '{"messages": []}': "neither a string",
        '{"messages": [{"role": "user"}]}': "is not a message with a role",
        '{"messages": [{"role": "assistant", "content": "x"}]}': "the last message is the assistant's",
        "{": "Expecting property name",
    }
    for line, message in cases.items():
        (tmp_path / "bad.jsonl").write_text(f'"fine"\n{line}\n')
        with pytest.raises(ValueError, match=f"bad.jsonl, line 2: .*{message}"):
            read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(tmp_path / "empty.txt")
