"""The commands of docs/exchange.md, run as written, in a folder that holds what they name."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_llm.cli.main import main
from tests.exchange import megatron
from tests.hf.folders import make_tokenizer
from tests.ranks import run_ranks
from tests.test_readme import blocks


def test_every_command_of_the_exchange_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, megatron.save, str(tmp_path / "megatron" / "run"))
    make_tokenizer(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("", "docs/exchange.md") for line in block.splitlines()]
    assert len(commands) == 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "megatron-llm" and main(arguments) == 0, command
    assert "travelling along: hf/" in capsys.readouterr().out
    assert (tmp_path / "megatron/llama/iter_0000000/.metadata").is_file()
    assert (tmp_path / "hf/llama/config.json").is_file() and (tmp_path / "checkpoints/from_hf/manifest.json").is_file()
