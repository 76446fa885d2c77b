"""The data commands from their arguments to what they print."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.cli import inspect, preprocess, preprocess_chat
from megatron_llm.data.indexed import DatasetMeta, IndexedDataset
from megatron_llm.data.writer import IndexedWriter


def call(command: Any, *words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args([str(word) for word in words]))
    return code


def test_preprocess_then_inspect(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, prefix = tmp_path / "a.jsonl", tmp_path / "a"
    source.write_text('{"body": "hello world"}\n{"body": "again"}\nbroken\n')
    assert call(preprocess, "--input", source, "--tokenizer", tokenizer_folder, "--output", prefix, "--text-key", "body") == 0
    assert "2 documents" in (out := capsys.readouterr().out)
    assert f"{source}:3: invalid JSON" in out
    assert call(inspect, prefix, "--documents", 1, "--verify") == 0
    out = capsys.readouterr().out
    dataset = IndexedDataset(prefix)
    lengths = np.diff(dataset.document_offsets()).tolist()
    assert f"2 documents, {sum(lengths)} tokens of uint16" in out
    assert f"0%: {min(lengths)}" in out
    assert f"100%: {max(lengths)}" in out
    assert "verified: index consistent" in out
    assert "document 0: 'hello world<|im_end|>'" in out
    assert "document 1" not in out


def test_preprocess_chat_then_inspect(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, prefix = tmp_path / "a.jsonl", tmp_path / "a"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "again"}]
    source.write_text(json.dumps({"messages": messages}) + "\n")
    assert call(preprocess_chat, "--input", source, "--tokenizer", tokenizer_folder, "--output", prefix, "--strict") == 0
    capsys.readouterr()
    assert call(inspect, prefix) == 0
    out = capsys.readouterr().out
    roles = IndexedDataset(prefix).roles
    assert roles is not None
    assert f"user {(roles == 2).sum()}, assistant {(roles == 3).sum()}, tool 0; trained: {(roles == 3).sum()}" in out
    assert "kind: chat" in out


def test_inspect_without_meta_or_with_another_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for meta in (None, DatasetMeta("pretrain", str(tokenizer_folder), "0" * 64, 400)):
        with IndexedWriter(tmp_path / "a", np.int32, meta) as writer:
            writer.add_document(np.array([70, 71]))
        assert call(inspect, tmp_path / "a") == 0
        out = capsys.readouterr().out
        assert "document 0: 70 71" in out
        assert ("no meta file" if meta is None else "holds another tokenizer now") in out


def test_verify_finds_a_changed_bin(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16, DatasetMeta("pretrain", "tok", "0" * 64, 400)) as writer:
        writer.add_document(np.array([70, 71]))
    (tmp_path / "a.bin").write_bytes(b"\x01\0\x63\0")
    call(inspect, tmp_path / "a")
    with pytest.raises(ValueError, match="says the largest token id is 71, but it is 99"):
        call(inspect, tmp_path / "a", "--verify")


def test_inspect_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.idx does not exist"):
        call(inspect, tmp_path / "nothing")


def test_defining_the_commands_imports_nothing_heavy() -> None:
    code = (
        "import argparse, sys\n"
        "from megatron_llm.cli import inspect, preprocess, preprocess_chat\n"
        "for command in (inspect, preprocess, preprocess_chat): command.add_arguments(argparse.ArgumentParser())\n"
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
