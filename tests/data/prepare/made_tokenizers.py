"""Tokenizers made on the spot in which a difference between two libraries shows.

The vocabularies are small, but whether two characters are one word or two changes the ids: there is a token for every byte
together with each of a few common ones, on either side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
# name -> (normalizer, pre-tokenizer): every spelling that the fast path takes.
BYTE_LEVEL: dict[str, tuple[Any, Any]] = {
    "gpt2": (None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
    "gpt2 nfc": ({"type": "NFC"}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
    "llama3": (None, LLAMA3),
    "qwen2": ({"type": "NFC"}, QWEN2),
    "o200k": (None, O200K),
}
PIECES: dict[str, tuple[Any, Any]] = {
    "llama2": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}, None),
    "mistral": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "metaspace always": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}),
    "metaspace never": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}),
    "gemma": (SPACES, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}),
    "gemma without split": (SPACES, None),
}
FAMILIES = [*BYTE_LEVEL, *PIECES]
SPECIAL = ("<s>", "</s>", "<|im_start|>")


def added(content: str, **options: bool) -> dict[str, Any]:
    """An entry of `added_tokens`, special and looked for in raw text unless told otherwise; the id is given by `make`."""
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **defaults, **options}


def make(family: str, tokens: Iterable[dict[str, Any]] = tuple(map(added, SPECIAL)), **model: Any) -> dict[str, Any]:
    """The tokenizer.json of a family of `FAMILIES`, as `tokenizers` writes it."""
    byte_level = family in BYTE_LEVEL
    normalizer, pre_tokenizer = (BYTE_LEVEL if byte_level else PIECES)[family]
    if isinstance(pre_tokenizer, str):
        split = {"type": "Split", "pattern": {"Regex": pre_tokenizer}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, level]}
    vocabulary, merges = _byte_vocabulary() if byte_level else _piece_vocabulary()
    options = {
        "dropout": None,
        "unk_token": None if byte_level else "<unk>",
        "fuse_unk": not byte_level,
        "byte_fallback": not byte_level,
    }
    config = {
        "version": "1.0",
        "added_tokens": [{"id": len(vocabulary) + index, **token} for index, token in enumerate(tokens)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        if byte_level
        else {"type": "ByteFallback"},
        "model": {"type": "BPE", **options, "vocab": vocabulary, "merges": merges, **model},
    }
    written: dict[str, Any] = json.loads(Tokenizer.from_str(json.dumps(config)).to_str())
    return written


def save(config: dict[str, Any], folder: Path, **tokenizer_config: Any) -> Path:
    """A tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}))
    return folder


def train_model(folder: Path, name: str = "m", **options: Any) -> Path:
    """A .model of sentencepiece of a few hundred pieces."""
    text = Path(sentencepiece.__file__).read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text if line]),
        model_prefix=str(folder / name),
        **{"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options},
    )
    return folder / f"{name}.model"


LIKE_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}


def _byte_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    characters = bytes_to_unicode()
    vocabulary = {characters[byte]: byte for byte in range(256)}
    pairs = [(characters[common], characters[byte]) for common in b"!?a1 \n'sA" for byte in range(256)]
    return _with_merges(vocabulary, [pair for first, second in pairs for pair in ((first, second), (second, first))])


def _piece_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(0x21, 0x7F)), *"éü中文א\n\t"]
    common = "▁ateh<>s/!?.1\né中"
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("h", "e"), ("<", "s"), ("<s", ">")]
    merges += [(first, second) for first in common for second in common if second != "▁"]
    return _with_merges({piece: index for index, piece in enumerate(pieces)}, merges)


def _with_merges(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    unique = list(dict.fromkeys(merges))
    for first, second in unique:
        vocabulary.setdefault(first + second, len(vocabulary))
    return vocabulary, unique
