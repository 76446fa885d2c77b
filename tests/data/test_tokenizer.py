"""What `describe` says is what transformers, sentencepiece and tiktoken say; every kind of path is told apart."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken_ext.openai_public as published
from transformers import AutoTokenizer

from megatron_llm.data import tiktoken_file
from megatron_llm.data.tokenizer import (
    describe,
    fingerprint,
    load_decoder,
    load_encoder,
    load_pretrained,
    path_fingerprint,
    tokenizer_kind,
)
from tests.data.prepare.made_tokenizers import LIKE_LLAMA, SPECIAL, added, make, save, train_model

TOKENS = [*map(added, SPECIAL), added("é", special=False, normalized=True)]
EOS = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
LISTED = {"9": {**EOS, "content": "<|im_start|>", "special": True}}


def rewrite(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


# tokenizer_config.json, special_tokens_map.json (None: no such file), whether transformers must be asked
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "plain": ({"eos_token": "</s>", "bos_token": "<s>"}, None, False),
    "nothing named": ({}, None, False),
    "null": ({"eos_token": "</s>", "bos_token": None}, None, False),
    "objects": ({"eos_token": {**EOS, "__type": "AddedToken"}, "bos_token": "<s>"}, None, False),
    "map only": ({}, {"eos_token": "</s>", "bos_token": {**EOS, "content": "<s>"}}, False),
    "map before config": ({"eos_token": "<s>"}, {"eos_token": EOS}, False),
    "config that lists its tokens before map": ({"eos_token": "<s>", "added_tokens_decoder": LISTED}, {"eos_token": EOS}, False),
    "token of the vocabulary": ({"eos_token": "a1"}, None, False),
    "token unknown to tokenizer.json": ({"eos_token": "<new>", "bos_token": "<s>"}, None, True),
    "Qwen": ({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_start|>", "bos_token": None}, None, False),
    "GPT-2 by default": ({"tokenizer_class": "GPT2Tokenizer"}, None, True),
    "Llama's bos by default": ({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</s>"}, None, True),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_described_as_by_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, special, asks = FOLDERS[name]
    tokens = [*TOKENS, added("<|endoftext|>"), added("<unk>")]  # the last: a default of Llama's class
    folder = save(make("llama2" if "Llama" in name else "gpt2", tokens), tmp_path, **config)
    if special is not None:
        rewrite(folder / "special_tokens_map.json", special)
    oracle = AutoTokenizer.from_pretrained(str(folder))
    asked = []
    monkeypatch.setattr("megatron_llm.data.tokenizer.load_pretrained", lambda path: (asked.append(path), oracle)[1])
    meta = describe(folder, "pretrain")
    assert (meta.vocab_size, meta.eos_id, meta.bos_id) == (len(oracle), oracle.eos_token_id, oracle.bos_token_id)
    assert (meta.kind, meta.tokenizer, bool(asked)) == ("pretrain", str(folder), asks)
    assert meta.tokenizer_fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_a_lone_tokenizer_json(tmp_path: Path) -> None:
    """In its folder it is that folder; under another name it names no tokens."""
    folder = save(make("gpt2", TOKENS), tmp_path, eos_token="</s>")
    beside, other = folder / "tokenizer.json", folder / "mine.json"
    other.write_bytes(beside.read_bytes())
    assert describe(beside, "chat").eos_id == describe(folder, "chat").eos_id is not None
    meta = describe(other, "pretrain")
    assert (meta.eos_id, meta.vocab_size) == (None, describe(folder, "chat").vocab_size)
    assert meta.tokenizer_fingerprint == describe(folder, "chat").tokenizer_fingerprint == path_fingerprint(beside)


def test_ids_with_gaps_are_all_inside_the_vocabulary(tmp_path: Path) -> None:
    config = make("gpt2", [added("<s>")])
    config["model"]["vocab"]["!!"] = 70_000
    assert describe(save(config, tmp_path), "pretrain").vocab_size == 70_001


def test_describing_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = save(make("gpt2"), tmp_path, eos_token="</s>")
    model = train_model(tmp_path)
    for path in (folder, model):
        code = (
            "import sys; from megatron_llm.data.prepare.encoding import open_tokenizer; from megatron_llm.data.tokenizer import "
            f"describe; describe({str(path)!r}, 'pretrain'); open_tokenizer({str(path)!r}).encode(['a'], str); "
            "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=600).strip() == "[]"


# ---- sentencepiece


@pytest.mark.parametrize("options", [{}, {"bos_id": -1}, {"eos_id": -1, "model_type": "unigram", "vocab_size": 400}])
def test_models_of_sentencepiece(options: dict[str, Any], tmp_path: Path) -> None:
    path = train_model(tmp_path, **LIKE_LLAMA, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    meta = describe(path, "pretrain")
    ends = [None if id_ == -1 else id_ for id_ in (processor.bos_id(), processor.eos_id())]
    assert [meta.bos_id, meta.eos_id] == ends and meta.vocab_size == processor.vocab_size()
    assert tokenizer_kind(path) == "sentencepiece"
    text = "The é\u00e9 中 end\n"
    assert load_decoder(path)(processor.encode(text)) == text


# ---- tiktoken


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def some_ranks(count: int) -> dict[bytes, int]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"%x" % number for number in range(1000, 1000 + count - 256)]
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_published_files_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table against tiktoken's own definitions, whose downloads are replaced."""
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    monkeypatch.setattr(published, "data_gym_to_mergeable_bpe_ranks", lambda **kwargs: {})
    theirs = getattr(published, name)()
    count, spec = tiktoken_file.PUBLISHED[name]
    assert (spec.pattern, spec.special_tokens) == (theirs["pat_str"], theirs["special_tokens"])
    sizes = {"gpt2": 50257, "r50k_base": 50257, "p50k_base": 50281, "cl100k_base": 100277, "o200k_base": 200019}
    assert max(*spec.special_tokens.values(), count) + 1 == sizes[name]


def test_llama_3_and_qwen_files(tmp_path: Path) -> None:
    """Ids as in the models' published configs."""
    path = write_ranks(tmp_path / "tokenizer.model", some_ranks(128_000))
    assert tokenizer_kind(path) == "tiktoken"
    meta = describe(path, "pretrain")
    assert (meta.vocab_size, meta.bos_id, meta.eos_id) == (128_256, 128_000, 128_001)
    special = tiktoken_file.PUBLISHED["tokenizer"][1].special_tokens
    assert [special[name] for name in ("<|start_header_id|>", "<|eot_id|>", "<|reserved_special_token_2|>")] == [
        128_006,
        128_009,
        128_012,
    ]
    decode = load_decoder(path)
    assert decode([72, 105, 128_009]) == "Hi<|eot_id|>"
    meta = describe(write_ranks(tmp_path / "qwen.tiktoken", some_ranks(151_643)), "pretrain")
    assert (meta.vocab_size, meta.eos_id) == (151_851, 151_643)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "mine.tiktoken", some_ranks(300))
    with pytest.raises(ValueError, match=r"mine.tiktoken: .* write mine.tiktoken.json beside it: .*pattern"):
        describe(path, "pretrain")
    with pytest.raises(ValueError, match="the published one has 100,256 ranks, not 300"):
        describe(write_ranks(tmp_path / "cl100k_base.tiktoken", some_ranks(300)), "pretrain")
    bare = path_fingerprint(path)
    spec = {"pattern": r"\s+|\S+", "special_tokens": {"<end>": 300, "<start>": 310}, "eos": "<end>", "bos": "<start>"}
    rewrite(tmp_path / "mine.tiktoken.json", spec)
    meta = describe(path, "pretrain")
    assert (meta.vocab_size, meta.bos_id, meta.eos_id) == (311, 310, 300)
    assert path_fingerprint(path) != bare  # another regex is another tokenizer
    for wrong, message in (
        ({"pattern": 3}, "an object with 'pattern'"),
        ({"pattern": "a", "eod": "x"}, "an object with 'pattern'"),
        ({"pattern": "("}, "refuses"),
        ({"pattern": "a", "special_tokens": {"<end>": 299}}, "two tokens have one id: <end>"),
        ({"pattern": "a", "special_tokens": {"x": 300, "y": 300}}, "two tokens have one id"),
        ({"pattern": "a", "special_tokens": ["x"]}, "names and ids"),
        ({"pattern": "a", "eos": "x"}, "'eos' is 'x'"),
    ):
        rewrite(tmp_path / "mine.tiktoken.json", wrong)
        with pytest.raises(ValueError, match=message):
            describe(path, "pretrain")


def test_damaged_files_of_tiktoken(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "mine.tiktoken", some_ranks(300))
    lines = path.read_bytes().splitlines()
    for line in (b"????", b"YQ==", b"YQ== -1", b"Y 3"):
        path.write_bytes(b"\n".join([*lines[:200], line, *lines[200:]]))
        with pytest.raises(ValueError, match="mine.tiktoken:201: "):
            describe(path, "pretrain")
    path.write_bytes(b"\n".join(lines[:200]))
    with pytest.raises(ValueError, match="no token for 56 of the 256 single bytes, the first is 0xc8"):
        describe(path, "pretrain")


# ---- what is none


def test_paths_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello world\n")
    (tmp_path / "x.model").write_bytes(b"\x00\x01garbage")
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    save(make("gpt2"), tmp_path / "config")
    (tmp_path / "config" / "tokenizer_config.json").write_text("[")
    for name, message in (
        ("x.txt", "x.txt is no tokenizer"),
        ("x.model", "x.model is not a model of sentencepiece"),
        ("x.json", "x.json cannot be read"),
        ("missing", "missing is neither a tokenizer folder nor a file"),
        ("missing.json", "missing.json does not exist"),
        ("empty", "empty is not a tokenizer folder"),
        ("broken", "tokenizer.json cannot be read"),
        ("config", "tokenizer_config.json is not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(tmp_path / name, "pretrain")


def test_code_of_a_folder_is_never_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(ValueError, match="transformers cannot load this tokenizer"):
        load_pretrained(tmp_path)


def test_a_fingerprint_is_of_a_folder_only(tmp_path: Path) -> None:
    """Training copies the folder, so a lone file will not do there."""
    folder = save(make("gpt2"), tmp_path)
    assert fingerprint(folder) == path_fingerprint(folder)
    with pytest.raises(ValueError, match="is not a tokenizer folder"):
        fingerprint(folder / "tokenizer.json")


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    """transformers converts the files of older folders."""
    config = make("gpt2", [])["model"]
    rewrite(tmp_path / "vocab.json", {**config["vocab"], "<|endoftext|>": len(config["vocab"])})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in config["merges"]), "utf-8")
    rewrite(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    oracle = AutoTokenizer.from_pretrained(str(tmp_path))
    meta = describe(tmp_path, "pretrain")
    assert (meta.vocab_size, meta.eos_id) == (len(oracle), oracle.eos_token_id)
    text = "a the!\n's<|endoftext|>"
    ids = load_encoder(tmp_path).encode(text, add_special_tokens=False).ids
    assert ids == oracle(text)["input_ids"] and load_decoder(tmp_path)(ids) == text
