"""`megatron-llm generate` as a user runs it, from a run folder and from its export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_llm.cli.main import main
from megatron_llm.generation.model import stop_ids
from tests.test_readme import prepare


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
