"""How much memory preprocessing takes: chunks, not files, are held, and no single document can be too large for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_llm.data.indexed import IndexedDataset
from tests.data.prepare.test_preprocess import run, write_jsonl
from tests.tiers import slow_among

UNCUT = "over 8,388,608 bytes without a place where they may be cut for this tokenizer"
TOO_LARGE = "more than 67,108,864 bytes of text, the most that is tokenized"
PEAK = r"""
import re, sys
from megatron_llm.data.prepare.preprocess import preprocess
preprocess(sys.argv[3:], sys.argv[1], sys.argv[2], progress=False)
heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)
assert not heavy, heavy
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) // 1000)
"""


def test_memory_is_bounded_and_torch_not_imported(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Ten times the input takes the same memory: chunks, not files, are held."""
    source = write_jsonl(tmp_path / "a.jsonl", ["hello world, the user says\n" * 400] * 400)  # 4.4 MB
    source.write_bytes(source.read_bytes() * 3)
    peaks = []
    for copies in (1, 10):
        command = [sys.executable, "-c", PEAK, tokenizer_folder, tmp_path / f"out{copies}", *[source] * copies]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 60, f"{peaks} MB for {source.stat().st_size} bytes once and ten times"


@pytest.mark.slow
def test_a_document_of_50_mb(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = "hello world, the user says 😀 é\n" * 1_500_000
    source = write_jsonl(tmp_path / "a.jsonl", ["first", text, "last"])
    _, dataset = run([source], tokenizer_folder, tmp_path / "out")
    piece = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode("hello world, the user says 😀 é\n").ids
    assert dataset.documents == 3
    assert np.array_equal(dataset.document(1)[:-1].reshape(-1, len(piece)), np.tile(piece, (1_500_000, 1)))


MIB = 1 << 20
HOSTILE = {  # large documents: how each begins, what it repeats and how often, and why it is not tokenized if it is not
    "one word": ("", "x", 60 * MIB, UNCUT),
    "more than 64 MiB": ("\U0001f600", "the cat, ", 8 * MIB, TOO_LARGE),
    "a token a byte": ("", "a!", 30 * MIB, None),
    "four bytes a character": ("\U0001f600", "the cat, ", 6 * MIB, None),
    "ideographs without punctuation": ("", "\u4e2d\u6587", 10 * MIB, UNCUT),
    "a word of almost 8 MiB": ("", "x", 8 * MIB - 1, None),
    "escaped": ("", "\U0001f600, no ", 6 * MIB, None),
}


@pytest.mark.parametrize(
    "kind", slow_among(("more than 64 MiB", "a token a byte", "ideographs without punctuation", "escaped"), HOSTILE)
)
def test_a_document_of_any_kind_takes_less_than_1500_mb(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Three of them in a row, so that one is read and one written while the next is tokenized."""
    start, unit, count, reason = HOSTILE[kind]
    source = write_jsonl(tmp_path / "a.jsonl", [start + unit * count] * 3 + ["hello"])
    output = tmp_path / "out"
    command = [sys.executable, "-c", PEAK, tokenizer_folder, output, source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    dataset = IndexedDataset(output)
    assert dataset.meta is not None and dataset.meta.skipped == ({reason: 3} if reason else {})
    assert dataset.documents == (1 if reason else 4)
    assert int(done.stdout) < 1500
