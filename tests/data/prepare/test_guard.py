"""Where the fast path is taken, it must be exact: compared with `tokenizers` over code points, random texts and added tokens."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from typing import Any

import gigatoken
import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_llm.data.prepare.guard import (
    BLOCK,
    NFC,
    STOPS,
    UNICODE_17,
    NotExact,
    check_versions,
    code_points,
    find_cut,
    find_guard,
)
from tests.data.prepare.made_tokenizers import BYTE_LEVEL, FAMILIES, LLAMA3, PIECES, SPACES, SPECIAL, added, make

TEMPLATES = {"!%s?": [*BYTE_LEVEL, "llama2", "mistral"], "a%sa1": [*BYTE_LEVEL], "a%s\u0327\u0301\u0316!": ["gpt2 nfc", "qwen2"]}
ALPHABET = (
    [
        *"aethsX.,?!<>/'\"(){}_-=01 9\n\t\r▁éüÅ中文אع\x00\x01\x7f\u00a0\u3000\u200b\ufeff\u0301\u0327\u0600😀",
        " ",
        " ",
        "  ",
        "\r\n",
    ]
    + ["<s>", "</s>", "<|im_start|>", "'s", "'LL", "the", " the", "▁▁", "<0x41>", "\U0001f468\u200d\U0001f469", "def f(x):\n"]
    + ["\u212a", "\u1ecb\u0323", "\uac00\u11a8", "\u0378", "\U000323af", "\ufffd", "ǅ", "ª", "½", "\u2028"]
)


def random_texts(count: int, seed: int, more: Sequence[str] = ()) -> list[str]:
    """Mixtures of `ALPHABET`, of `more` and of characters from everywhere, new and unassigned ones too."""
    source = random.Random(seed)
    alphabet = ALPHABET + list(more) * 4
    anywhere = [
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x370, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x1FFFF),
        (0x20000, 0x33480),
    ]

    def character() -> str:
        return source.choice(alphabet) if source.random() < 0.8 else chr(source.randint(*source.choice(anywhere)))

    return ["".join(character() for _ in range(source.randint(0, 14))) for _ in range(count)]


def ids_of_both(config: dict[str, Any], texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """By gigatoken and by `tokenizers`."""
    serialized = json.dumps(config)
    fast = gigatoken.Tokenizer.from_json(serialized).encode_batch_list(texts)
    return fast, [e.ids for e in Tokenizer.from_str(serialized).encode_batch_fast(texts, add_special_tokens=False)]


def assert_exact(config: dict[str, Any], texts: list[str]) -> None:
    """Equal on all texts that the guard lets through."""
    refused = set(find_guard(config).refused(texts))
    allowed = [text for index, text in enumerate(texts) if index not in refused]
    assert len(allowed) > len(texts) / 3
    fast, expected = ids_of_both(config, allowed)
    different = [(text, f, e) for text, f, e in zip(allowed, fast, expected, strict=True) if f != e]
    assert not different, (len(different), min(different, key=lambda entry: len(entry[0])))


def scan(family: str, template: str, points: Sequence[int]) -> None:
    config = make(family)
    for start in range(0, len(points), 200_000):
        assert_exact(config, [template % chr(point) for point in points[start : start + 200_000]])


ALL = [(family, template) for template, families in TEMPLATES.items() for family in families]


@pytest.mark.parametrize(("family", "template"), [case for case in ALL if case[0] in BYTE_LEVEL and case[1] != "a%sa1"])
def test_code_points_that_may_be_new_and_thinly_all_others(family: str, template: str) -> None:
    """New for one of the libraries is only what this Python does not know, or what the guard knows."""
    unknown = {point for point in range(0x20000) if unicodedata.category(chr(point)) == "Cn"}
    guarded = set(np.flatnonzero(code_points(UNICODE_17, NFC)).tolist())
    scan(family, template, sorted((unknown | guarded | set(range(0, 0x110000, 89))) - set(range(0xD800, 0xE000))))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "template"), ALL)
def test_all_code_points(family: str, template: str) -> None:
    scan(family, template, [*range(0xD800), *range(0xE000, 0x110000)])


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_the_guard_is_needed(family: str) -> None:
    """Were the libraries' tables equal one day, the guard could go; and these vocabularies do show a difference."""
    fast, expected = ids_of_both(make(family), ["!\U000323b0?", "a\u088fa"])
    assert all(f != e for f, e in zip(fast, expected, strict=True))


def test_long_texts_are_guarded_to_their_end() -> None:
    guard = find_guard(make("gpt2"))
    texts = ["é" * length + last for length in (BLOCK - 1, BLOCK, 2 * BLOCK) for last in ("é", "\U000323b0")]
    assert guard.refused(texts) == [1, 3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_texts(family: str) -> None:
    assert_exact(make(family), random_texts(8_000, seed=1))


RAW = ["<a>", "<a><b>", "<b>", "  ", "    ", "\n\n", "the", "he", "t", "é", "中文", " a", "a ", "▁▁"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens(family: str, special: bool) -> None:
    tokens = [added(content, special=special) for content in RAW]
    assert_exact(make(family, tokens), random_texts(6_000, seed=2, more=[*RAW, "<a", "b>"]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if (BYTE_LEVEL | PIECES)[family][0] is None])
def test_added_tokens_of_normalized_text(family: str) -> None:
    tokens = [added("<s>"), *(added(content, special=False, normalized=True) for content in ("  ", "    ", "the", "he"))]
    assert_exact(make(family, tokens), random_texts(6_000, seed=3, more=["  ", "the", "<s>"]))


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_with_tokens_that_look_around_are_refused(family: str, option: str) -> None:
    config = make(family, [added("<s>"), added("<mask>", **{option: True}), added("the", **{option: True})])
    texts = random_texts(6_000, seed=4, more=["<s>", "<mask>", " <mask> "])
    refused = {texts[index] for index in find_guard(config).refused(texts)}
    assert all(text in refused for text in texts if "<mask>" in text or "the" in text)
    assert_exact(config, [text for text in texts if text not in refused])


def test_tokenizers_that_are_not_on_the_list() -> None:
    """Each of them differs from `tokenizers` somewhere, or nobody has looked."""
    level = BYTE_LEVEL["gpt2"][1]
    normalized = added("the", special=False, normalized=True)
    gpt2, llama2 = make("gpt2"), make("llama2")
    wrong: dict[str, dict[str, Any]] = {
        "no regex": {**gpt2, "pre_tokenizer": {**level, "use_regex": False}},
        "prefix space": {**gpt2, "pre_tokenizer": {**level, "add_prefix_space": True}},
        "no pre-tokenizer": {**gpt2, "pre_tokenizer": None},
        "NFKC": {**gpt2, "normalizer": {"type": "NFKC"}},
        "another regex": json.loads(json.dumps(make("llama3")).replace("{1,3}", "{1,2}")),
        "inverted": json.loads(json.dumps(make("llama3")).replace('"invert": false', '"invert": true')),
        "removed": json.loads(json.dumps(make("llama3")).replace('"Isolated"', '"Removed"')),
        "regex twice": json.loads(json.dumps(make("llama3")).replace('"use_regex": false}]', '"use_regex": true}]')),
        "dropout": make("gpt2", dropout=0.1),
        "suffix": {**gpt2, "model": {**gpt2["model"], "end_of_word_suffix": "</w>"}},
        "a byte less": {
            **gpt2,
            "model": {**gpt2["model"], "vocab": {k: v for k, v in gpt2["model"]["vocab"].items() if k != "ÿ"}},
        },
        "no byte fallback": make("llama2", byte_fallback=False),
        "pieces ignoring merges": make("llama2", ignore_merges=True),
        "prepend only": {**llama2, "normalizer": {"type": "Prepend", "prepend": "▁"}},
        "other space": {**llama2, "normalizer": {**SPACES, "content": "_"}},
        "unigram": {**llama2, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False}},
        "normalized token under NFC": make("qwen2", [normalized]),
        "normalized token under Replace": make("gemma", [normalized]),
        "overlapping raw and normalized tokens": make("gpt2", [added("th"), normalized]),
        "partly overlapping": make("gpt2", [normalized, added("hex")]),
        "empty token": make("gpt2", [{**added("x"), "content": ""}]) | {"added_tokens": [{**added(""), "id": 9}]},
    }
    for name, config in wrong.items():
        with pytest.raises(NotExact):
            find_guard(config)
            pytest.fail(f"{name} was accepted")


def test_regexes_are_taken_as_they_are_spelled() -> None:
    """The regex of the test is spelled out whole; a typing mistake in the list would refuse it."""
    assert find_guard(make("llama3")).table is not None
    assert LLAMA3 in json.loads(json.dumps(make("llama3")))["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


# Added tokens that begin or end where a text may be cut, or lie across such a place.
AWKWARD = [
    list(map(added, SPECIAL)),
    [added("a b"), added("1,"), added("t.x"), added(" b"), added(", "), added("he")],
    [added("#tag", single_word=True), added(",,", single_word=True), added("文。", single_word=True), added("he!")],
    [added("USER"), added("he"), added("Is")],
    [added("<s>", lstrip=True), added("b", single_word=True), added("\n\n"), added("文。a"), added("a\nb", normalized=True)],
]


@pytest.mark.parametrize("tokens", AWKWARD, ids=["special", "across", "word", "letters", "options"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_texts_have_the_ids_of_the_whole(family: str, tokens: list[dict[str, Any]]) -> None:
    config = make(family, tokens)
    encoder, cut = Tokenizer.from_str(json.dumps(config)), find_cut(config)
    if cut is None:
        assert tokens is not AWKWARD[0] and (family not in BYTE_LEVEL or config["normalizer"])
        return
    words = ["the", "a", "Is", "the's", "e<s>", "<s>the", "x\n", "é", "1", "he", "'s", "t.", "  "]
    words += [token["content"] for token in tokens]
    words += [
        *'\n\t ,;:.!?()[]{}<>=+*/|&#%$"-。、文字か\u0301\u0338\u3099\u00a0',
        "12345",
        "\r\n",
        "\n\n",
        "HTTPServer",
        "한글",
        "слово",
        "Ελλ",
        "שלום",
        "कमल",
        "é",
        "ǅ",
        "\u038b",
    ]
    source = random.Random(5)
    cuts = 0
    for _ in range(600):
        text = source.choice(["", " "]).join(source.choice(words) for _ in range(40)) + source.choice(["", " ", " a"])
        parts = list(cut.parts(text, source.randint(1, 30)))
        cuts += len(parts) - 1
        assert cut.drop_space or "".join(parts) == text
        ids = [id_ for part in parts for id_ in encoder.encode(part, add_special_tokens=False).ids]
        assert ids == encoder.encode(text, add_special_tokens=False).ids, (text, parts)
    assert cuts > 100


def test_texts_that_cannot_be_cut() -> None:
    for token in (added("a b"), added("b "), added(" b"), added(" "), added("b", rstrip=True)):
        assert find_cut(make("llama2", [token])) is None, token
    assert find_cut(make("llama2", [added("  "), added("<a>")])) is not None
    assert find_cut(make("gpt2", [added("b", rstrip=True)])) is None
    assert find_cut(make("qwen2", [added("b", normalized=True)])) is None
    assert find_cut(make("gpt2", [added("".join(f"a{stop}" for stop in STOPS))])) is None
    crossing = make("llama2")
    crossing["model"]["vocab"]["a▁b"] = 9999
    assert find_cut(crossing) is None
    assert find_cut(make("gpt2", dropout=0.5)) is None
    cut = find_cut(make("gpt2"))
    assert cut is not None and list(cut.parts("x" * 100, 10)) == ["x" * 100]


def test_unknown_versions_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions("gigatoken", "tokenizers", "sentencepiece")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.1")
    with pytest.raises(NotExact, match="gigatoken 99.1 has not been compared"):
        check_versions("gigatoken")
