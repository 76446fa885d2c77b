"""Preprocessing against transformers, and everything that can be wrong with input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.prepare import preprocess as module
from megatron_llm.data.prepare.preprocess import preprocess

TEXTS = ["hello world\n\nagain", "the user 😀 says é", "tab\there", " ", "<|im_start|>spelled out"]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(inputs: list[Path], tokenizer: Path, output: Path, **options: Any) -> tuple[module.Summary, IndexedDataset]:
    summary = preprocess(inputs, tokenizer, output, progress=False, **options)
    return summary, IndexedDataset(output)


def documents(dataset: IndexedDataset) -> list[list[int]]:
    return [dataset.document(number).tolist() for number in range(dataset.documents)]


def expected(tokenizer: Path, texts: list[str], eod: bool = True) -> list[list[int]]:
    reference = AutoTokenizer.from_pretrained(tokenizer)
    return [reference(text, add_special_tokens=False)["input_ids"] + [reference.eos_token_id] * eod for text in texts]


@pytest.mark.parametrize("eod", [True, False])
def test_ids_are_those_of_transformers(tmp_path: Path, tokenizer_folder: Path, eod: bool) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    summary, dataset = run([source], tokenizer_folder, tmp_path / "out" / "a", append_eod=eod)
    wanted = expected(tokenizer_folder, TEXTS, eod)
    assert documents(dataset) == wanted
    flat = [token for document in wanted for token in document]
    assert (summary.documents, summary.tokens, summary.skipped.total()) == (5, len(flat), 0)
    assert summary.bytes == source.stat().st_size
    meta = dataset.meta
    assert meta is not None
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert (meta.kind, meta.vocab_size, meta.max_token_id) == ("pretrain", len(reference), max(flat))
    assert (meta.eos_id, meta.bos_id) == (reference.eos_token_id, reference.bos_token_id)
    assert meta.eod_id == (reference.eos_token_id if eod else None)


def test_all_kinds_of_files_in_their_order(tmp_path: Path, tokenizer_folder: Path) -> None:
    plain = write_jsonl(tmp_path / "b.jsonl", TEXTS[:2])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()) + gzip.compress(b'{"text": "second member"}'))
    text = tmp_path / "c.txt"
    text.write_text("several\nlines\n", encoding="utf-8")
    packed_text = tmp_path / "d.txt.gz"
    packed_text.write_bytes(gzip.compress(b"one"))
    marked = tmp_path / "e.jsonl"
    marked.write_bytes(b'\xef\xbb\xbf{"text": "byte order mark"}\n\n  \n{"text": "last line without end"}')
    _, dataset = run([plain, packed, text, packed_text, marked], tokenizer_folder, tmp_path / "out")
    texts = [*TEXTS[:2], *TEXTS[:2], "second member", "several\nlines\n", "one", "byte order mark", "last line without end"]
    assert documents(dataset) == expected(tokenizer_folder, texts)


def test_workers_do_not_change_the_files(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 64)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} says hello" * (1 + i % 5) for i in range(60)])
    with source.open("a") as file:
        file.write("broken\n")
    one, _ = run([source], tokenizer_folder, tmp_path / "one")
    two, _ = run([source], tokenizer_folder, tmp_path / "two", workers=2)
    assert str(one).replace("one", "") == str(two).replace("two", "")
    for suffix in (".bin", ".idx", ".meta.json"):
        assert Path(f"{tmp_path}/one{suffix}").read_bytes() == Path(f"{tmp_path}/two{suffix}").read_bytes()


BAD = {
    "not json": "invalid JSON",
    '["a"]': "not a JSON object",
    '{"other": "a"}': "no key 'text'",
    '{"text": 3}': "'text' is not a string but int",
    '{"text": "\\ud800"}': "half a surrogate pair",
    "[" * 200_000: "JSON nested too deeply",
    b'{"text": "\xff"}': "not UTF-8",
}


def test_bad_lines_are_counted_and_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [line if isinstance(line, bytes) else line.encode() for line in BAD]
    source.write_bytes(b"\n".join([b'{"text": "first"}', *lines, b'{"text": ""}', b'{"text": "last"}']))
    summary, dataset = run([source], tokenizer_folder, tmp_path / "out")
    assert documents(dataset) == expected(tokenizer_folder, ["first", "last"])
    assert summary.skipped.total() == len(BAD) + 1
    for line, reason in enumerate([*BAD.values(), "empty text"], 2):
        assert f"{source}:{line}: {reason}" in str(summary)


@pytest.mark.parametrize("line", list(BAD), ids=list(BAD.values()))
def test_strict_refuses_a_bad_line(tmp_path: Path, tokenizer_folder: Path, line: str | bytes) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "first"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: " + BAD[line].replace("[", r"\[")):
        run([source], tokenizer_folder, tmp_path / "out", strict=True)
    assert list(tmp_path.iterdir()) == [source]


def test_strict_takes_empty_texts(tmp_path: Path, tokenizer_folder: Path) -> None:
    summary, _ = run([write_jsonl(tmp_path / "a.jsonl", ["", "a"])], tokenizer_folder, tmp_path / "out", strict=True)
    assert summary.skipped == {"empty text": 1}


def test_many_bad_lines_are_all_counted_and_some_shown(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n' + "bad\n" * 500)
    summary, _ = run([source], tokenizer_folder, tmp_path / "out")
    assert "500: invalid JSON" in str(summary)
    assert len(str(summary).splitlines()) < 30


def test_unusable_input_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"missing\.jsonl is not a file; .*a\.pdf has an unknown suffix"):
        run([tmp_path / "missing.jsonl", tmp_path / "a.pdf"], tokenizer_folder, tmp_path / "out")
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is damaged"):
        run([damaged], tokenizer_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="no document could be used"):
        run([write_jsonl(tmp_path / "b.jsonl", ["", ""])], tokenizer_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="--workers 0"):
        run([write_jsonl(tmp_path / "b.jsonl", ["a"])], tokenizer_folder, tmp_path / "out", workers=0)
    assert not list(tmp_path.glob("out*"))


def test_unusable_tokenizers_are_refused(tmp_path: Path, make_tokenizer: Callable[..., Path]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="is not a tokenizer folder"):
        run([source], tmp_path, tmp_path / "out")
    folder = make_tokenizer(eos=None)
    with pytest.raises(ValueError, match="no eos token.*--no-append-eod"):
        run([source], folder, tmp_path / "out")
    assert run([source], folder, tmp_path / "out", append_eod=False)[0].documents == 1
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load this tokenizer"):
        run([source], folder, tmp_path / "out")


def test_truncation_in_the_tokenizer_file_is_not_obeyed(tmp_path: Path, make_tokenizer: Callable[..., Path]) -> None:
    """Sentence-embedding tokenizers are saved with a length limit; tokens would be lost without a word."""
    folder = make_tokenizer()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    content["padding"]["pad_to_multiple_of"] = None
    path.write_text(json.dumps(content))
    _, dataset = run([write_jsonl(tmp_path / "a.jsonl", ["q" * 30, "q"])], folder, tmp_path / "out")
    assert [len(document) for document in documents(dataset)] == [31, 2]


def test_another_text_key(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["hello"], key="content")
    _, dataset = run([source], tokenizer_folder, tmp_path / "out", text_key="content")
    assert documents(dataset) == expected(tokenizer_folder, ["hello"])
