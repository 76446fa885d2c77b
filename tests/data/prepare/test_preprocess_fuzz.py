"""Preprocessing of files that hypothesis made: every line is a document, or counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.data.prepare.test_preprocess import documents, run, small_chunks

LINES = st.one_of(
    st.sampled_from([b"", b" \t", b"not json", b"[1]", b"{}", b'{"text": 3}', b'{"text": null}', b'{"text": ""}', b'{"text"']),
    st.sampled_from([b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": "a\\u0000b"}', b'{"text": "nul\x00raw"}']),
    st.sampled_from([b'{"text": "\\ud83d\\ude00"}', '{"text": "\U000323b0\U0001ccfa\u0378"}'.encode(), b"\xef\xbb\xbf{}"]),
    st.sampled_from([b'{"text": "<|im_start|>user<|endoftext|>"}', b'{"text": "<|im_end|>"}']),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")),
)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINES, min_size=1, max_size=8),
    bom=st.booleans(),
    crlf=st.booleans(),
    end=st.booleans(),
    size=st.integers(1, 80),
)
def test_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    lines: list[bytes],
    bom: bool,
    crlf: bool,
    end: bool,
    size: int,
) -> None:
    """Every line that is not blank is a document with the ids of `tokenizers`, or counted: by Python's json, one by one."""
    folder = tmp_path_factory.mktemp("d")
    newline = b"\r\n" if crlf else b"\n"
    source = folder / "a.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" * bom + newline.join([*lines, b'{"text": "good"}']) + newline * end)
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    wanted, skipped = [], 0
    content = source.read_bytes()
    for line in (content[3:] if content.startswith(b"\xef\xbb\xbf") else content).split(b"\n"):
        if not line.strip(b" \t\r\n"):
            continue
        try:
            text = json.loads(line.decode())["text"]
            ids = reference.encode(text.encode().decode(), add_special_tokens=False).ids if text else []
        except (ValueError, KeyError, TypeError, AttributeError):
            ids = []
        if ids:
            wanted.append([*ids, reference.token_to_id("<|im_end|>")])
        else:
            skipped += 1
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, size)
        summary, dataset = run([source], tokenizer_folder, folder / "out")
    assert documents(dataset) == wanted
    assert summary.skipped.total() == skipped
    assert summary.bytes == len(content)
