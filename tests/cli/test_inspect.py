"""`megatron-llm inspect` as a user meets it: what it prints, and what it says about paths that are nothing."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_llm.cli import main as cli
from megatron_llm.data import statistics
from megatron_llm.data.indexed import DatasetMeta
from megatron_llm.data.tokenizer import describe, fingerprint, load_encoder, load_sentencepiece
from megatron_llm.data.writer import IndexedWriter
from tests.data.conftest import build_tokenizer
from tests.data.prepare.made_tokenizers import train_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(prefix: Path, tokenizer: Path, texts: list[str], **fields: object) -> list[list[int]]:
    """A data set of these texts, and its ids."""
    encoder = load_encoder(tokenizer)
    ids: list[list[int]] = [encoder.encode(text).ids for text in texts]
    size = encoder.get_vocab_size()
    meta = DatasetMeta("pretrain", str(tokenizer), fingerprint(tokenizer), size, **fields)  # type: ignore[arg-type]
    with IndexedWriter(prefix, np.uint16, meta) as writer:
        for document in ids:
            writer.add_document(np.asarray(document))
    return ids


def inspect(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["inspect", *map(str, words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_frequent_ids_are_shown_as_text(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = write(tmp_path / "a", tokenizer, ["hello hello hello hello", "hello world"])
    flat = [token for document in ids for token in document]
    out = inspect(capsys, tmp_path / "a")
    encoder = load_encoder(tokenizer)
    seen, size = len(set(flat)), encoder.get_vocab_size()
    assert f"ids that occur: {seen} of {size}; {1 - seen / size:.1%} of the vocabulary never\n" in out
    most = max(set(flat), key=flat.count)
    first = out.split("most frequent ids:\n")[1].splitlines()[0]
    assert first.split(maxsplit=2) == [f"{flat.count(most) / len(flat):.2%}", str(most), repr(encoder.decode([most]))]
    assert f"mean {len(flat) / 2:.1f}; percentiles 0%: {min(map(len, ids))}, " in out


def test_documents_from_all_over(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"world {number}" for number in range(50)]
    write(tmp_path / "a", tokenizer, texts)

    def shown(*words: object) -> list[str]:
        return [line for line in inspect(capsys, tmp_path / "a", *words).splitlines() if line.startswith("document ")][1:]

    assert shown("--documents", 2) == [f"document {number}: {texts[number]!r}" for number in (0, 1)]
    assert shown("--documents", 0) == []
    assert len(shown("--documents", 99)) == 50
    numbers = sorted(random.Random(7).sample(range(50), 4))
    assert numbers != list(range(4))
    assert shown("--documents", 4, "--random", 7) == [f"document {number}: {texts[number]!r}" for number in numbers]


def test_a_long_document_says_how_long(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = write(tmp_path / "a", tokenizer, ["again and again " * 300])
    text = load_encoder(tokenizer).decode(ids[0][:200])
    assert f"document 0: {text!r} ... ({len(ids[0]):,} tokens)\n" in inspect(capsys, tmp_path / "a")


def test_what_the_meta_file_knows(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {"empty text": 2, "invalid JSON": 1200}
    ids = write(tmp_path / "a", tokenizer, ["hello"], shard=(3, 16), input_bytes=5000, skipped=skipped)
    out = inspect(capsys, tmp_path / "a")
    assert "kind: pretrain, shard 3 of 16\n" in out
    assert f"made from 5,000 bytes of input, {5000 / len(ids[0]):.2f} a token\n" in out
    assert "records not taken: 1,202 (1,200 invalid JSON, 2 empty text)\n" in out


def test_a_sample_says_that_it_is_one(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 100)
    monkeypatch.setattr(statistics.token_counts, "__defaults__", (200,))
    (ids,) = write(tmp_path / "a", tokenizer, ["the user and the assistant " * 200])
    read = 100 + (len(ids) % 100 or 100)  # the first block and the last one
    assert f"(in {read} tokens, {read / len(ids):.2%}, in evenly spaced blocks)" in inspect(capsys, tmp_path / "a")


def test_the_tokenizer_can_be_elsewhere(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = DatasetMeta("pretrain", "/nowhere/tokenizer", fingerprint(tokenizer), 400)
    ids = load_encoder(tokenizer).encode("hello world").ids
    with IndexedWriter(tmp_path / "a", np.uint16, meta) as writer:
        writer.add_document(np.asarray(ids))
    out = inspect(capsys, tmp_path / "a")
    assert "ids instead of text: /nowhere/tokenizer " in out
    assert f"document 0: {' '.join(map(str, ids))}\n" in out
    assert "document 0: 'hello world'\n" in inspect(capsys, tmp_path / "a", "--tokenizer", tokenizer)
    other = build_tokenizer(tmp_path / "other", eos="</s>")
    content = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(content + "\n")
    assert "holds another tokenizer now" in refused(capsys, tmp_path / "a", "--tokenizer", other)
    assert "neither a tokenizer folder nor a file" in refused(capsys, tmp_path / "a", "--tokenizer", tmp_path / "no")


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "tiktoken"])
def test_ids_outside_the_vocabulary(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    if kind == "huggingface":
        path, hello = tokenizer, load_encoder(tokenizer).encode("hello").ids
    elif kind == "sentencepiece":
        path = train_model(tmp_path)
        hello = load_sentencepiece(path).encode("hello")
    else:
        path, hello = tmp_path / "a.tiktoken", list(b"hello")
        path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
        (tmp_path / "a.tiktoken.json").write_text('{"pattern": ".", "special_tokens": {"<s>": 300}, "eos": "<s>"}')
    ids = [60000, *hello, 60001, 60002, *hello]
    with IndexedWriter(tmp_path / "a", np.int32, describe(path, "pretrain")) as writer:
        writer.add_document(np.asarray(ids))
    out = inspect(capsys, tmp_path / "a")
    assert "ids outside the vocabulary: 3; --verify says where" in out
    assert "document 0: '<id 60000>hello<id 60001><id 60002>hello'\n" in out
    assert f"{tmp_path / 'a'}.bin has token id 60000 at byte 0, outside" in refused(capsys, tmp_path / "a", "--verify")
    (tmp_path / "a.bin").write_bytes((-1).to_bytes(4, "little", signed=True) + (tmp_path / "a.bin").read_bytes()[4:])
    assert "document 0: '<id -1>hello<id 60001>" in inspect(capsys, tmp_path / "a")


def test_a_picture(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", tokenizer, ["hello", "hello world"])
    picture = tmp_path / "a.png"
    assert f"picture: {picture}\n" in inspect(capsys, tmp_path / "a", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_path_that_is_nothing(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("text-train", "text-valid", "chat"):
        write(tmp_path / "data" / name, tokenizer, ["hello"])
    data = tmp_path / "data"
    assert f"did you mean {data}/text-train or {data}/text-valid?" in refused(capsys, data / "text")
    assert f"did you mean {data}/chat?" in refused(capsys, data / "chta")
    assert "a data set is PREFIX.bin and PREFIX.idx" in refused(capsys, tmp_path / "nothing")
    for suffix in (".bin", ".idx", ".meta.json"):
        assert f"give its prefix: megatron-llm inspect {data}/chat\n" in refused(capsys, f"{data}/chat{suffix}")
    message = refused(capsys, data)
    assert f"inspect one of them: {data}/chat, {data}/text-train, {data}/text-valid" in message
    (tmp_path / "empty").mkdir()
    assert "no whole checkpoint in" in refused(capsys, tmp_path / "empty")
    assert "--plot is for data sets" in refused(capsys, tmp_path / "empty", "--plot", "a.png")


def test_a_data_set_beside_a_folder_of_its_name(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", tokenizer, ["hello"])
    (tmp_path / "a").mkdir()
    assert "1 documents" in inspect(capsys, tmp_path / "a")
