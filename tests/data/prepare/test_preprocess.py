"""Preprocessing against transformers, and everything that can be wrong with input."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from xxhash import xxh3_64_intdigest

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.order import hash64
from megatron_llm.data.prepare import encoding, pipeline
from megatron_llm.data.prepare import inputs as inputs_module
from megatron_llm.data.prepare import preprocess as module
from megatron_llm.data.prepare.chunks import Chunk
from megatron_llm.data.prepare.merge import merge, shard_prefix
from megatron_llm.data.prepare.preprocess import TextEncoder, preprocess

TEXTS = ["hello world\n\nagain", "the user 😀 says é", "tab\there", " ", "<|im_start|>spelled out"]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(inputs: list[Path], tokenizer: Path, output: Path, **options: Any) -> tuple[pipeline.Summary, IndexedDataset]:
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


def files(prefix: object, suffixes: Sequence[str] = (".bin", ".idx", ".meta.json")) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in suffixes]


def small_chunks(monkeypatch: pytest.MonkeyPatch, size: int = 100) -> None:
    def read_chunks(*arguments: Any, **options: Any) -> Iterator[Chunk]:
        return inputs_module.read_chunks(*arguments, **options, chunk_bytes=size, max_record_bytes=max(size, 1 << 20))

    monkeypatch.setattr(pipeline, "read_chunks", read_chunks)


@pytest.mark.parametrize("options", [{}, {"split": [0.5, 0.25, 0.25]}], ids=["whole", "split"])
def test_workers_and_chunks_do_not_change_the_files(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} says hello" * (1 + i % 5) for i in range(60)])
    with source.open("a") as file:
        file.write("broken\n")
    one = preprocess([source], tokenizer_folder, tmp_path / "one", progress=False, **options)
    small_chunks(monkeypatch)
    two = preprocess([source], tokenizer_folder, tmp_path / "two", progress=False, workers=2, **options)
    three = preprocess([source], tokenizer_folder, tmp_path / "three", progress=False, **options)
    assert (one.documents, one.skipped) == (60, {"invalid JSON": 1})
    for other, name in ((two, "two"), (three, "three")):
        assert dataclasses.replace(other, outputs=one.outputs) == one
        for prefix in one.outputs:
            assert files(prefix) == files(prefix.replace("one", name))


def test_a_worker_says_why_it_cannot_load(tmp_path: Path) -> None:
    encoder = TextEncoder(str(tmp_path / "nothing"), "text", None)
    with pytest.raises(ValueError, match="nothing"):
        list(pipeline._encode_all(encoder, iter([]), 2, pipeline.Summary([])))


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
    with pytest.raises(ValueError) as error:
        run([write_jsonl(tmp_path / "b.jsonl", ["", ""])], tokenizer_folder, tmp_path / "out")
    assert "no document could be used" in str(error.value) and "  2: empty text" in str(error.value)
    assert "already done" not in str(error.value)
    with pytest.raises(ValueError, match="--workers 0"):
        run([write_jsonl(tmp_path / "b.jsonl", ["a"])], tokenizer_folder, tmp_path / "out", workers=0)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("output", ["", "folder/", "folder/."])
def test_an_output_without_a_name_is_refused(tmp_path: Path, tokenizer_folder: Path, output: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match=r"--output '.*' ends without a name for the files"):
        preprocess([source], tokenizer_folder, output and f"{tmp_path}/{output}", progress=False)
    assert list(tmp_path.iterdir()) == [source]


def test_unusable_tokenizers_are_refused(tmp_path: Path, make_tokenizer: Callable[..., Path]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="is not a tokenizer folder"):
        run([source], tmp_path, tmp_path / "out")
    folder = make_tokenizer(eos=None)
    with pytest.raises(ValueError, match="no eos token.*--no-append-eod"):
        run([source], folder, tmp_path / "out")
    assert run([source], folder, tmp_path / "out", append_eod=False)[0].documents == 1
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
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


def test_types_of_ids(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for dtype, wanted in (("auto", np.uint16), ("uint16", np.uint16), ("int32", np.int32)):
        _, dataset = run([source], tokenizer_folder, tmp_path / dtype, dtype=dtype)
        assert dataset.dtype == wanted
        assert documents(dataset) == expected(tokenizer_folder, TEXTS)


@pytest.mark.parametrize(("size", "fits"), [(65536, True), (65537, False)])
def test_a_type_that_cannot_hold_the_vocabulary_is_refused(size: int, fits: bool) -> None:
    if fits:
        assert module._dtype("uint16", size) == np.uint16
    else:
        with pytest.raises(ValueError, match=r"--dtype uint16 holds ids up to 65535, but the tokenizer has 65,537"):
            module._dtype("uint16", size)


def test_a_split_follows_the_hash_of_the_text_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Duplicates stay together, order and other documents change nothing, and the shares are met."""
    texts = [f"text {i % 400}" for i in range(800)]
    options: dict[str, Any] = {"split": [0.7, 0.2, 0.1], "progress": False}
    preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer_folder, tmp_path / "a", **options)
    preprocess([write_jsonl(tmp_path / "b.jsonl", texts[::-1][:100])], tokenizer_folder, tmp_path / "b", **options)
    sides = {}
    for side, (low, high) in {"train": (0, 0.7), "valid": (0.7, 0.9), "test": (0.9, 1)}.items():
        chosen = [text for text in texts if low <= xxh3_64_intdigest(text.encode()) / 2**64 < high]
        sides[side] = documents(IndexedDataset(f"{tmp_path}/a-{side}"))
        assert sides[side] == expected(tokenizer_folder, chosen)
        again = documents(IndexedDataset(f"{tmp_path}/b-{side}"))
        assert {tuple(d) for d in again} <= {tuple(d) for d in sides[side]}
    assert 0.6 < len(sides["train"]) / 800 < 0.8
    assert 0.1 < len(sides["valid"]) / 800 < 0.3
    assert sum(map(len, sides.values())) == 800
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.journal"))


@pytest.mark.parametrize("split", [None, [0.5, 0.5]], ids=["whole", "split"])
def test_texts_without_tokens_are_counted(tmp_path: Path, make_tokenizer: Callable[..., Path], split: list[float] | None) -> None:
    """A tokenizer may normalize a text away; a document of an eos token alone would be noise."""
    folder = make_tokenizer()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    path.write_text(json.dumps(content))
    texts = [text for i in range(20) for text in (f"text {i}", " " * (i + 1))]
    summary = preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], folder, tmp_path / "out", split=split, progress=False)
    assert summary.skipped == {"no tokens in its text": 20}
    for prefix, (low, high) in zip(summary.outputs, ((0, 0.5), (0.5, 1)) if split else ((0, 1),), strict=True):
        chosen = [text for text in texts[::2] if low <= xxh3_64_intdigest(text.encode()) / 2**64 < high]
        assert documents(IndexedDataset(prefix)) == expected(folder, chosen)


@pytest.mark.parametrize("split", [[1.0], [0.9, 0.2], [1.5, -0.5], [0.4, 0.3, 0.2, 0.1], [float("nan"), 1.0]])
def test_shares_that_make_no_sense_are_refused(tmp_path: Path, tokenizer_folder: Path, split: list[float]) -> None:
    with pytest.raises(ValueError, match="--split .*two or three shares"):
        run([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tokenizer_folder, tmp_path / "a", split=split)


def test_a_side_without_a_share_is_not_written_and_one_without_documents_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    summary = preprocess([source], tokenizer_folder, tmp_path / "a", split=[0.0, 1.0], progress=False)
    assert summary.outputs == [f"{tmp_path}/a-valid"]
    assert sorted(path.name for path in tmp_path.glob("a-*")) == ["a-valid.bin", "a-valid.idx", "a-valid.meta.json"]
    with pytest.raises(ValueError, match=r"--split leaves .*b-(train|valid) none of 1 documents"):
        preprocess([source], tokenizer_folder, tmp_path / "b", split=[0.5, 0.5], progress=False)
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("split", [None, [0.6, 0.4]], ids=["whole", "split"])
def test_shards_merged_are_the_whole(tmp_path: Path, tokenizer_folder: Path, count: int, split: list[float] | None) -> None:
    """Byte for byte, even with more shards than records."""
    texts = ["short", "x" * 3000, *(f"text {i}" for i in range(9))]
    inputs = [write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", ["", "last"])]
    whole = preprocess(inputs, tokenizer_folder, tmp_path / "whole", split=split, progress=False)
    for number in range(count):
        preprocess(inputs, tokenizer_folder, tmp_path / "part", split=split, shard=(number, count), progress=False)
    for prefix in whole.outputs:
        part = prefix.replace("whole", "part")
        assert Path(shard_prefix(part, count - 1, count) + ".idx").exists()
        merge([f"{part}-*.idx"], f"{part}-merged", progress=False)
        assert files(prefix, (".bin", ".idx")) == files(f"{part}-merged", (".bin", ".idx"))
        metas = [IndexedDataset(name).meta for name in (prefix, f"{part}-merged")]
        assert metas[0] is not None and metas[1] is not None
        assert dataclasses.replace(metas[0], made_by=None) == metas[1]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.journal"))


def test_options_that_make_no_sense_together_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for shard in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="--shard"):
            run([source], tokenizer_folder, tmp_path / "a", shard=shard)
    with pytest.raises(ValueError, match="--shard 0/0: at least one shard is needed"):
        run([source], tokenizer_folder, tmp_path / "a", shard=(0, 0))
    with pytest.raises(ValueError, match="merge --shuffle-documents"):
        run([source], tokenizer_folder, tmp_path / "a", shard=(0, 2), shuffle_seed=1)


def test_shuffled_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [f"text {i}" for i in range(50)]
    summary, dataset = run([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer_folder, tmp_path / "out", shuffle_seed=3)
    order = sorted(range(50), key=lambda number: hash64(3, number))
    assert documents(dataset) == expected(tokenizer_folder, [texts[number] for number in order])
    assert summary.outputs == [str(tmp_path / "out")]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.meta.json"]


def test_what_is_done_is_not_done_again(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, ""])
    for options in ({}, {"split": [0.5, 0.5]}, {"shuffle_seed": 1}, {"split": [0.5, 0.5], "shuffle_seed": 1}):
        output = tmp_path / f"out{len(options)}{len(str(options))}"

        def go(output: Path = output, options: dict[str, Any] = options, **more: Any) -> pipeline.Summary:  # type: ignore[assignment]
            return preprocess([source], tokenizer_folder, output, progress=False, **{**options, **more})

        first = go()
        times = [Path(f"{prefix}.idx").stat().st_mtime_ns for prefix in first.outputs]
        again = go()
        assert again.done_before and "already done" in str(again)
        assert dataclasses.replace(again, examples=first.examples) == first
        assert times == [Path(f"{prefix}.idx").stat().st_mtime_ns for prefix in first.outputs]
        for more in ({"force": True}, {"append_eod": False}, {"strict": True}, {}):
            assert not go(**more).done_before
    source.write_text(source.read_text() + '{"text": "more"}\n')
    assert not go().done_before
    for suffix in (".bin", ".meta.json"):
        path = Path(f"{first.outputs[0]}{suffix}")
        path.write_bytes(path.read_bytes()[:-2])
        assert not go().done_before
        assert go().done_before


def test_what_a_tokenizer_cannot_do_is_counted(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four documents are refused by the tokenizer; the others keep their ids and their places in the messages."""
    monkeypatch.setattr(encoding, "PART", 10)
    monkeypatch.setattr(encoding, "MAX_TEXT_BYTES", 40)
    texts = ["hello world", "x" * 41, "hello", "y " * 30]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    summary, dataset = run([source], tokenizer_folder, tmp_path / "out")
    assert documents(dataset) == expected(tokenizer_folder, ["hello world", "hello"])
    reason = "more than 40 bytes of text, the most that is tokenized"
    assert summary.examples == [f"{source}:2: {reason}", f"{source}:4: {reason}"]
    with pytest.raises(ValueError, match="a.jsonl:2: more than 40 bytes"):
        run([source], tokenizer_folder, tmp_path / "strict", strict=True)


def test_shares_that_add_up_to_a_little_more_than_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["hello", "world", "hello world", "again"])
    with pytest.raises(ValueError, match="leaves .*out-test none of 4 documents"):
        preprocess([source], tokenizer_folder, tmp_path / "out", split=[0.5, 0.5, 1e-7], progress=False)
