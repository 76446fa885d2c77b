"""`--show` of conversations and of data sets, with and without colours."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.cli.main import main
from megatron_llm.data.indexed import ROLES, IndexedDataset
from megatron_llm.data.prepare.show import use_colours
from megatron_llm.data.tokenizer import load_decoder

MESSAGES = [
    {"role": "user", "content": "say 日本\x1b[31m"},
    {"role": "assistant", "content": "hello 😀", "weight": 0.5},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "no", "train": False},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    records: list[Any] = [{"messages": MESSAGES}, {"messages": []}, {"messages": MESSAGES[:2]}, {"messages": MESSAGES[:2]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_before_anything_is_written(source: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["preprocess-chat", "--input", str(source), "--tokenizer", str(tokenizer_folder)]
    assert main([*arguments, "--show", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "[in brackets]" in lines[0]
    assert [line.split(": ")[0] for line in lines if not line.startswith(("  ", "roles"))] == [f"{source}:{n}" for n in (1, 2, 3)]
    assert f"{source}:2: skipped, no list 'messages'" in lines
    reply = next(line for line in lines if "x0.5" in line)
    assert reply.startswith("  assistant x0.5: [") and reply.endswith("[<|im_end|>]")
    assert "".join(re.findall(r"\[([^]]*)\]", reply)) == "hello 😀<|im_end|>"
    assert next(line for line in lines if "not trained" in line).replace("|", "").endswith(" no<im_end>")
    user = next(line for line in lines if line.startswith("  user"))
    assert "日" in user and "本" in user and "\\n" in user
    assert "\x1b" not in "".join(lines) and "\\x1b" in user  # what a record holds does not reach the terminal
    assert list(source.parent.iterdir()) == [source]
    assert main(arguments) != 0
    assert "--output PREFIX is needed, or --show N" in capsys.readouterr().err


def test_of_a_data_set(
    source: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = source.parent / "out"
    arguments = ["preprocess-chat", "--input", str(source), "--tokenizer", str(tokenizer_folder), "--output", str(prefix)]
    assert main([*arguments, "--show", "1"]) == 0
    before = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and ":" in line][:7]
    assert main(["inspect", str(prefix), "--show", "1"]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert plain[2:] == before[: len(plain) - 2]
    dataset = IndexedDataset(prefix)
    ids = dataset.document(0).tolist()
    assert main(["inspect", str(prefix), "--documents", "0"]) == 0
    assert "loss weights of messages: 1, 0.5" in capsys.readouterr().out
    assert main(["inspect", str(prefix), "--show", "1", "--show-ids", "--tokenizer", str(tokenizer_folder)]) == 0
    shown = [int(id_) for group in re.findall(r"\(((?:\d+,?)+)\)", capsys.readouterr().out) for id_ in group.split(",")]
    assert shown == ids

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert use_colours()
    assert main(["inspect", str(prefix), "--show", "1"]) == 0
    coloured = capsys.readouterr().out.splitlines()
    trained = "".join(re.findall(r"\x1b\[32;1;4m(.*?)\x1b\[0m", "\n".join(coloured[1:])))
    assert dataset.roles is not None
    mask = (np.asarray(dataset.roles[: len(ids)]) & 0b1111) == ROLES["assistant"]
    assert trained == load_decoder(tokenizer_folder)(np.array(ids)[mask].tolist())
    assert [re.sub(r"\x1b\[[\d;]*m", "", line).replace("|", "") for line in coloured[1:]] == [
        re.sub(r"\]\[|(?<=: )\[|\]$", "", line).replace("|", "") for line in plain[1:]
    ]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colours()


def test_text_has_no_roles_to_show(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "hello"}\n')
    arguments = ["--input", str(tmp_path / "t.jsonl"), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "t")]
    assert main(["preprocess", *arguments]) == 0
    assert main(["inspect", str(tmp_path / "t"), "--show", "1"]) != 0
    assert "--show is for chat data" in capsys.readouterr().err
