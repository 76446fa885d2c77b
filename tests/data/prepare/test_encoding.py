"""`open_tokenizer` gives the ids of the tokenizer's own library for every kind of tokenizer and every text, or says where not."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megatron_llm.data.prepare import encoding, references
from megatron_llm.data.prepare.encoding import FastTokenizer, Gigatoken, TextTokenizer, open_tokenizer
from megatron_llm.data.prepare.references import Refused
from tests.data.prepare.made_tokenizers import FAMILIES, LIKE_LLAMA, LLAMA3, SPECIAL, added, make, save, train_model
from tests.data.prepare.test_guard import ALPHABET, random_texts

NEW = "\U000323b0"  # a letter of Unicode 17: only the reference may see it
texts_of_anything = st.lists(
    st.lists(st.sampled_from([*ALPHABET, NEW, *SPECIAL]) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join),
    max_size=8,
)


def where(index: int) -> str:
    return f"a.jsonl:{index + 1}"


def encode(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text; also checks the shape of what comes back."""
    ids, offsets = tokenizer.encode(texts, where)
    assert offsets.dtype == np.int64 and len(offsets) == len(texts) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    return [ids[start:end].tolist() for start, end in zip(offsets, offsets[1:], strict=False)]


def by_tokenizers(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder.no_truncation()
    encoder.no_padding()
    return [encoder.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save(make(family), root / family.replace(" ", "-")) for family in FAMILIES}


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama2", "mistral", "gemma"])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_ids_are_those_of_tokenizers(family: str, folders: dict[str, Path], data: Any) -> None:
    texts = data.draw(texts_of_anything)
    for fast in (True, False):
        tokenizer = opened.setdefault((family, fast), None) or open_tokenizer(folders[family], fast)
        opened[family, fast] = tokenizer
        assert tokenizer.how.startswith("gigatoken, checked against tokenizers" if fast else "tokenizers")
        assert encode(tokenizer, texts) == by_tokenizers(folders[family], texts)


opened: dict[tuple[str, bool], Any] = {}


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_for_the_reference_find_their_place(
    family: str, threads: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # open_tokenizer sets it; put back after the test
    texts = [NEW + "a", "", "the a", NEW, NEW + " the", "", "the", "!" + NEW]
    tokenizer = open_tokenizer(folders[family], threads=threads)
    expected = by_tokenizers(folders[family], texts)
    assert encode(tokenizer, texts) == expected
    assert encode(tokenizer, tuple(reversed(texts))) == expected[::-1]
    assert encode(tokenizer, []) == [] and encode(tokenizer, [""]) == [by_tokenizers(folders[family], [""])[0]]


def test_settings_of_tokenizer_json_are_ignored(tmp_path: Path) -> None:
    """Truncation, padding and a post-processor that adds tokens."""
    encoder = Tokenizer.from_str(json.dumps(make("gpt2")))
    plain = encoder.encode("the " * 50, add_special_tokens=False).ids
    encoder.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 4780), ("</s>", 4781)])
    assert len(encoder.encode("the").ids) == len(encoder.encode("the", add_special_tokens=False).ids) + 2
    encoder.enable_truncation(5)
    encoder.enable_padding(length=300)
    folder = save(json.loads(encoder.to_str()), tmp_path)
    for fast in (True, False):
        assert encode(open_tokenizer(folder, fast), ["the " * 50]) == [plain]


@pytest.mark.parametrize("name", ["unigram", "word_piece", "word_level"])
def test_other_models_are_left_to_tokenizers(name: str, tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "the": 1, "a": 2, "##x": 3, "▁the": 4}
    model: Any = {
        "unigram": models.Unigram([(piece, -1.0 * id_) for piece, id_ in vocabulary.items()], unk_id=0),
        "word_piece": models.WordPiece(vocabulary, unk_token="[UNK]"),
        "word_level": models.WordLevel(vocabulary, unk_token="[UNK]"),
    }[name]
    encoder = Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.Metaspace() if name == "unigram" else pre_tokenizers.Whitespace()
    folder = save(json.loads(encoder.to_str()), tmp_path)
    tokenizer = open_tokenizer(folder)
    assert tokenizer.how.startswith("tokenizers, because its model is ")
    texts = ["the a ax", "", NEW, "thex the"]
    assert encode(tokenizer, texts) == by_tokenizers(folder, texts)


# ---- sentencepiece and tiktoken


@pytest.fixture(scope="module")
def models_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_model(folder, "llama", **LIKE_LLAMA)
    train_model(folder, "no_prefix", **LIKE_LLAMA, add_dummy_prefix=False)
    train_model(folder, "control", **LIKE_LLAMA, control_symbols=["<ctl>"])
    train_model(folder, "user", **LIKE_LLAMA, user_defined_symbols=["<user>", "the", "\n\n"])
    train_model(folder, "nfkc")
    train_model(folder, "no_bytes", **LIKE_LLAMA, byte_fallback=False)
    train_model(folder, "unigram", model_type="unigram", vocab_size=400)
    return folder


HOW = {"user": "sentencepiece, because it has user-defined pieces", "nfkc": "sentencepiece, because of its normalizer"}
HOW |= dict.fromkeys(("llama", "no_prefix", "control"), "gigatoken, checked against sentencepiece")
HOW |= dict.fromkeys(("no_bytes", "unigram"), "sentencepiece, because only ")


@pytest.mark.parametrize("name", HOW)
def test_ids_are_those_of_sentencepiece(name: str, models_: Path) -> None:
    path = models_ / f"{name}.model"
    texts = random_texts(4_000, seed=6, more=["<s>", "<ctl>", "<user>", "the", " ", "\n\n", "self", "return"])
    expected = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(texts)
    for fast in (True, False):
        tokenizer = open_tokenizer(path, fast)
        assert tokenizer.how.startswith(HOW[name]) if fast else tokenizer.how == "sentencepiece"
        assert encode(tokenizer, texts) == expected


@pytest.mark.slow
@pytest.mark.parametrize("template", ["!%s?", "a%s e"])
def test_all_code_points_with_sentencepiece(template: str, models_: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models_ / "llama.model"))
    tokenizer = open_tokenizer(models_ / "llama.model")
    texts = [template % chr(point) for point in [*range(0xD800), *range(0xE000, 0x110000)]]
    ids, offsets = tokenizer.encode(texts, where)
    expected = processor.encode(texts)
    assert np.array_equal(np.diff(offsets), [len(part) for part in expected])
    assert np.array_equal(ids, np.concatenate(expected))


def test_pieces_of_equal_score_and_unused_pieces_are_left_to_sentencepiece(models_: Path, tmp_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models_ / "llama.model"))

    class Changed:
        def __init__(self, **changed: Any) -> None:
            self._changed = changed

        def __getattr__(self, name: str) -> Any:
            return self._changed.get(name) or getattr(processor, name)

    from megatron_llm.data.prepare.guard import NotExact, convert_model

    convert_model(models_ / "llama.model", processor)
    with pytest.raises(NotExact, match="equal score"):
        convert_model(models_ / "llama.model", Changed(get_score=lambda id_: -5.0))
    with pytest.raises(NotExact, match="unused"):
        convert_model(models_ / "llama.model", Changed(is_unused=lambda id_: id_ == 300))


@pytest.mark.parametrize("threads", [True, False])
def test_ids_are_those_of_tiktoken(threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"  ": 259}
    path = tmp_path / "made.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    special = {"<s>": 260, "<|im_start|>": 300}
    (tmp_path / "made.tiktoken.json").write_text(json.dumps({"pattern": LLAMA3, "special_tokens": special}))
    oracle = tiktoken.Encoding("made", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    texts = random_texts(2_000, seed=7, more=SPECIAL)
    tokenizer = open_tokenizer(path, threads=threads)
    assert encode(tokenizer, texts) == [oracle.encode(text, allowed_special="all") for text in texts]
    with pytest.raises(Refused, match="tiktoken cannot tokenize it: ") as refused:  # its regex engine has a limit
        tokenizer.encode(["the", " " * 1_100_000 + "a", "he"], where)
    assert refused.value.index == 1


# ---- long texts and memory


@pytest.mark.parametrize("family", ["gpt2", "llama2", "mistral"])
def test_long_texts_are_tokenized_in_parts(family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(random_texts(300, seed=8)) + " the the a " * 200 + NEW + "he a" * 50
    expected = by_tokenizers(folders[family], ["the", text, "", text])
    monkeypatch.setattr(references, "BATCH", 100)
    monkeypatch.setattr(encoding, "PART", 100)
    sizes: list[int] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def spy(self: Any, batch: list[str]) -> Any:
            sizes.append(max(map(len, batch)) if owner is Gigatoken else sum(map(len, batch)))
            return original(self, batch)

        monkeypatch.setattr(owner, name, spy)

    watch(references.HuggingFaceReference, "_encode_batch")
    assert encode(open_tokenizer(folders[family], fast=False), ["the", text, "", text]) == expected
    assert len(sizes) > 20 and np.median(sizes) < 150
    sizes.clear()
    watch(Gigatoken, "encode")
    tokenizer = open_tokenizer(folders[family])
    assert isinstance(tokenizer.parts, FastTokenizer)
    assert encode(tokenizer, ["the", text, "", text]) == expected
    assert max(sizes) < len(text) / 2, "no library gets the whole"


def test_texts_too_long_to_cut_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PART", 10)
    tokenizer = replace(open_tokenizer(folders["gpt2"]), longest=100)
    for texts in (["a", "x" * 101], ["a", "é" * 51], ["a", "x" * 101 + " the he " * 50]):
        with pytest.raises(Refused, match="over 100 bytes without a place") as refused:
            tokenizer.encode(texts, where)
        assert refused.value.index == 1
    fitting = ["x" * 100, "é" * 50, "the he " * 50]
    assert encode(tokenizer, fitting) == by_tokenizers(folders["gpt2"], fitting)
    uncut = replace(tokenizer, cut=None)
    with pytest.raises(Refused):
        uncut.encode(["the he " * 50], where)
    assert encode(replace(uncut, longest=None), ["x" * 101]) == by_tokenizers(folders["gpt2"], ["x" * 101])
    monkeypatch.setattr(encoding, "MAX_TEXT_BYTES", 50)
    with pytest.raises(Refused, match="more than 50 bytes of text"):
        tokenizer.encode(["é" * 26], where)


def test_the_cache_is_emptied_when_the_process_has_grown(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([1000, 1000 + 256, 1000 + 257, 5000, 5000 + 256])
    monkeypatch.setattr(encoding, "_resident_bytes", lambda: next(resident))
    monkeypatch.setattr(encoding, "CACHE_BYTES", 256)
    monkeypatch.setattr(encoding, "CACHE_LOOK", 10)
    fast = Gigatoken(json.dumps(make("gpt2")), threads=True)
    first = fast._tokenizer
    fast.encode(["the the"])  # too little for a look
    fast.encode(["the the"])  # looks: not more than 256
    assert fast._tokenizer is first
    ids, _ = fast.encode(["the the the"])  # looks: 257
    assert ids.tolist() == by_tokenizers(folders["gpt2"], ["the the the"])[0]
    second = fast._tokenizer
    fast.encode(["the the the"])  # looks: 256 more than after it was made anew
    assert second is not first and fast._tokenizer is second and next(resident, None) is None


# ---- the sampled check


class Broken:
    """A fast library that gives another id for every text in which "wrong" occurs."""

    def __init__(self, fast: Any, change: Any) -> None:
        self._fast, self._change = fast, change

    def encode(self, texts: list[str]) -> Any:
        parts = [self._fast.encode([text])[0].copy() for text in texts]
        parts = [self._change(part) if "wrong" in text else part for part, text in zip(parts, texts, strict=True)]
        return np.concatenate([np.empty(0, np.uint32), *parts]), np.cumsum([0, *map(len, parts)])


def broken(folder: Path, change: Any) -> TextTokenizer:
    tokenizer = open_tokenizer(folder)
    assert isinstance(tokenizer.parts, FastTokenizer)
    tokenizer.parts._fast = Broken(tokenizer.parts._fast, change)  # type: ignore[assignment]
    return tokenizer


def another_third_id(ids: Any) -> Any:
    ids[2] += 1
    return ids


def test_a_difference_is_an_error_that_names_the_document(folders: dict[str, Path]) -> None:
    tokenizer = broken(folders["gpt2"], another_third_id)
    (expected,) = by_tokenizers(folders["gpt2"], ["quite wrong"])
    found = f"token 2 is {expected[2] + 1} of {len(expected)} by gigatoken but {expected[2]} of {len(expected)} by tokenizers"
    with pytest.raises(ValueError, match=rf"a.jsonl:3: in characters 0 to 11, {found}; use --no-fast"):
        tokenizer.encode(["right", "", "quite wrong"], where)
    count = len(by_tokenizers(folders["gpt2"], ["wrong"])[0])
    with pytest.raises(ValueError, match=f"token {count - 1} is none of {count - 1} by gigatoken but "):
        broken(folders["gpt2"], lambda ids: ids[:-1]).encode(["wrong"], where)
    for change in (lambda ids: ids[:-1], lambda ids: np.append(ids, ids[-1]), lambda ids: ids[:0]):
        with pytest.raises(ValueError, match="a.jsonl:1: .*--no-fast"):
            broken(folders["gpt2"], change).encode(["wrong"], where)


def test_the_sample_is_a_two_thousandth_and_the_same_in_every_run(folders: dict[str, Path]) -> None:
    texts = [f"text {number}" for number in range(20_000)]

    def sampled() -> list[int]:
        tokenizer = open_tokenizer(folders["gpt2"])
        asked: list[str] = []
        assert isinstance(tokenizer.parts, FastTokenizer)
        original = tokenizer.parts.reference.encode
        tokenizer.parts.reference.encode = lambda part: (asked.extend(part), original(part))[1]  # type: ignore[method-assign]
        encode(tokenizer, texts[:2])
        encode(tokenizer, texts)
        return [texts.index(text) for text in asked]

    first = sampled()
    assert first[:4] == [0, 1, 0, 1] and 7 <= len(first) <= 32 and max(first) > 10_000
    assert sampled() == first


def test_long_documents_are_checked_in_part(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "EXCERPT", 50)
    right = "the a " * 1000
    assert encode(open_tokenizer(folders["llama2"]), [right]) == by_tokenizers(folders["llama2"], [right])
    with pytest.raises(ValueError, match="a.jsonl:1: "):
        broken(folders["llama2"], another_third_id).encode(["wrong " * 1000], where)


# ---- without gigatoken


def test_without_gigatoken_or_with_an_unknown_one(
    folders: dict[str, Path], models_: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the a", NEW]
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "gigatoken":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setitem(sys.modules, "gigatoken", None)  # importing it fails
    for changed, reason in ((missing, "gigatoken is not installed"), (lambda name: "0.11.0", "gigatoken 0.11.0 has not been")):
        monkeypatch.setattr(importlib.metadata, "version", changed)
        tokenizer = open_tokenizer(folders["gpt2"])
        assert tokenizer.how.startswith(f"tokenizers, because {reason}")
        assert encode(tokenizer, texts) == by_tokenizers(folders["gpt2"], texts)
        assert open_tokenizer(models_ / "llama.model").how.startswith(f"sentencepiece, because {reason}")


def test_what_gigatoken_refuses_goes_to_the_reference(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import gigatoken

    def refuse(serialized: str) -> Any:
        raise RuntimeError("cannot")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", refuse)
    assert open_tokenizer(folders["gpt2"]).how == "tokenizers, because gigatoken refuses it: cannot"


def test_a_token_with_its_own_id_in_the_vocabulary(tmp_path: Path) -> None:
    """`tokenizers` keeps the vocabulary's id, whatever the entry of added_tokens says."""
    config = make("gpt2", [added("t"), added("<s>")])
    config["added_tokens"][0]["id"] = 4000
    folder = save(config, tmp_path)
    assert encode(open_tokenizer(folder), ["at t<s>"]) == by_tokenizers(folder, ["at t<s>"])
