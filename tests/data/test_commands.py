"""The data commands from their arguments to what they print."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.cli import inspect, merge, preprocess, preprocess_chat
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


def test_shards_merge_and_what_is_done_is_said(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, prefix = tmp_path / "a.jsonl", tmp_path / "a"
    source.write_text("".join(json.dumps({"text": f"hello {number}"}) + "\n" for number in range(20)))
    arguments = ("--input", source, "--tokenizer", tokenizer_folder, "--split", "0.5,0.5", "--dtype", "int32", "--output")
    for shard in ("0/2", "1/2"):
        assert call(preprocess, *arguments, prefix, "--shard", shard) == 0
    sides = [f"{prefix}-train", f"{prefix}-valid"]
    for side in sides:
        assert call(merge, f"{side}-*.idx", "--output", side, "--shuffle-documents", 7) == 0
        assert f"{side}: {IndexedDataset(side).documents} documents" in capsys.readouterr().out
        assert IndexedDataset(side).dtype == np.int32
    assert sum(IndexedDataset(side).documents for side in sides) == 20
    assert call(preprocess, *arguments, prefix, "--shard", "1/2") == 0
    assert "already done" in capsys.readouterr().out
    assert call(preprocess, *arguments, prefix, "--shard", "1/2", "--force", "--no-fast", "--strict") == 0
    assert "already done" not in (out := capsys.readouterr().out)
    assert "MB/s with tokenizers" in out


@pytest.mark.parametrize("option", [("--shard", "3"), ("--shard", "a/b"), ("--split", "a,b"), ("--dtype", "int64")])
def test_options_that_cannot_be_read(tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(preprocess, "--input", "a", "--tokenizer", "b", "--output", "c", *option)
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_goes_on(tmp_path: Path, tokenizer_folder: Path, how: signal.Signals) -> None:
    """The first ten seconds leave nothing behind but what the next run removes."""
    source, program = tmp_path / "a.jsonl", Path(sys.executable).parent / "megatron-llm"
    source.write_text("".join(json.dumps({"text": f"hello {number} " * 50}) + "\n" for number in range(100_000)))
    words = [program, "preprocess", "--input", source, "--tokenizer", tokenizer_folder, "--output", tmp_path / "a", "--no-fast"]
    started = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    written = tmp_path / "a.bin.tmp"
    while started.poll() is None and not (written.exists() and written.stat().st_size):
        time.sleep(0.02)
    started.send_signal(how)
    _, errors = started.communicate(timeout=600)
    assert started.returncode == {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}[how], errors
    assert b"Traceback" not in errors
    assert not (tmp_path / "a.idx").exists()
    source.write_text('{"text": "hello"}\n')
    subprocess.run(words, check=True, timeout=600, capture_output=True)
    assert IndexedDataset(tmp_path / "a").documents == 1
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.journal"))


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
        "from megatron_llm.cli import inspect, merge, preprocess, preprocess_chat\n"
        "for command in (inspect, merge, preprocess, preprocess_chat): command.add_arguments(argparse.ArgumentParser())\n"
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
