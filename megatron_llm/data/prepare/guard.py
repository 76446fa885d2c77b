"""Where gigatoken is exact: which tokenizers, on which texts, and where a long text may be cut without changing its ids.

gigatoken gives the ids of the `tokenizers` library for some kinds of tokenizer and, silently, others for the rest. So a
tokenizer is taken only if everything its tokenizer.json says is on the list here, and even then not on all texts: its
tables are of Unicode 17, those of `tokenizers` are older. Every entry was found equal by running both over all code points
and over random strings; tests/data/prepare/test_guard.py does it again. Called by `encoding.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# What the tables and the list below were checked with; other versions are not used until the tests pass with them.
CHECKED_VERSIONS = {"gigatoken": ("0.10.",), "tokenizers": ("0.22.", "0.23."), "sentencepiece": ("0.2.",)}

# Code points new in Unicode 17, in hexadecimal: the regexes see letters, numbers and marks where `tokenizers` sees none.
UNICODE_17 = """
    88F C5C CDC 1ACF-1ADD 1AE0-1AEB 20C1 2B96 A7CE-A7CF A7D2 A7D4 A7F1 FBC3-FBD2 FD90-FD91 FDC8-FDCE 10940-10959 10EC5-10EC7
    10ED0-10ED8 10EFA-10EFB 11B60-11B67 11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E
    18D80-18DF2 1CCFA-1CCFC 1CEBA-1CED0 1CEE0-1CEF0 1E6C0-1E6DE 1E6E0-1E6F5 1E6FE-1E6FF 1F6D8 1F777-1F77A 1F8D0-1F8D8
    1FA54-1FA57 1FA8A 1FA8E 1FAC8 1FACD 1FAEA 1FAEF 1FBFA 2B73A-2B73F 2CEA2-2CEAD 323B0-33479
"""
# Code points that the two libraries' NFC composes or orders differently.
NFC = """
    7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1ADD 1AE0-1AEB 1DF6-1DFA A82C 105C9 105E4 10D24-10D27 10D69-10D6D
    10EAB-10EAC 10EFA-10EFB 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 11383 11385 1138E 11391 113C5 113C7-113C8
    113CE-113D0 1145E 11839-1183A 11938 1193D-1193E 11943 119E0 11A34 11A47 11A99 11D42 11D44-11D45 11D97 11F41-11F42
    16121-16128 1612F 16D68-16D6A 16FF0-16FF1 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6E3 1E6E6
    1E6EE-1E6EF 1E6F5
"""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_O200K_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s" + _CONTRACTIONS + "?"
# Regexes of a Split before a ByteLevel: Llama 3, Qwen 2, GPT-4o.
REGEXES = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "|".join(
        [
            _O200K_WORD % ("*", "+"),
            _O200K_WORD % ("+", "*"),
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
    ),
)

BLOCK = 1 << 20  # characters looked at together: each takes a dozen bytes for that moment

SPACE = "\u2581"  # what sentencepiece writes for a space
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
LLAMA_NORMALIZER = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE_SPACES]}
GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

# What stands for single bytes in a vocabulary. Byte-level: printable Latin-1 characters for themselves, 68 others from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARACTERS = {chr(byte) for byte in _PRINTABLE} | {chr(0x100 + index) for index in range(256 - len(_PRINTABLE))}
BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}

# Letters and digits that all tables agree on, and what no regex takes into one match with those before it.
LETTERS = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0388-\u038a\u038e-\u03a1\u03a3-\u03ce\u0400-\u0481\u048a-\u052f\u05d0-\u05ea"
    "\u0620-\u064a\u0904-\u0939\u0e01-\u0e30\u10d0-\u10fa\u1e00-\u1eff\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
STOPS = '\n\t ,;:.!?()[]{}<>=+*/|&#%$"-。、，！？'
SPACED = re.compile(r"\S | \S|^ $")  # an added token that could lie across such a place


class NotExact(Exception):
    """gigatoken is not used for a tokenizer; the text says why, to be read after "because"."""


@dataclass(frozen=True)
class Guard:
    """Tells the texts that gigatoken may encode.

    Attributes:
        table: bool [0x110000], code points it may not; None if it may all.
        spellings: strings it may not: added tokens that it treats otherwise.
    """

    table: npt.NDArray[np.bool_] | None
    spellings: tuple[str, ...] = ()

    def refused(self, texts: Sequence[str]) -> list[int]:
        """Indices of the texts that only the reference library may encode."""
        return [index for index, text in enumerate(texts) if self._refuses(text)]

    def _refuses(self, text: str) -> bool:
        if any(spelling in text for spelling in self.spellings):
            return True
        if self.table is None or text.isascii():
            return False
        blocks = (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))
        return any(self.table[np.frombuffer(block.encode("utf-32-le"), "<u4")].any() for block in blocks)


def check_versions(*names: str) -> None:
    """Raises NotExact if one of these packages is not installed, or in a version that nobody has compared."""
    for name in names:
        prefixes = CHECKED_VERSIONS[name]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise NotExact(f"{name} is not installed") from None
        if not version.startswith(prefixes):
            raise NotExact(f"{name} {version} has not been compared, only {', '.join(prefix + 'x' for prefix in prefixes)}")


def code_points(*ranges: str) -> npt.NDArray[np.bool_]:
    """bool [0x110000]: True in the ranges, each given as text like "88F 1ACF-1ADD"."""
    table = np.zeros(0x110000, np.bool_)
    for entry in " ".join(ranges).split():
        first, _, last = entry.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table


def find_guard(config: dict[str, Any]) -> Guard:
    """The guard for a tokenizer.json as `tokenizers` writes it. Raises NotExact if gigatoken is not known to be exact for it."""
    byte_level = _is_byte_level(config)
    spellings = _refused_spellings(config)
    if not byte_level:
        return Guard(None, spellings)  # characters are looked up in the vocabulary and nowhere else
    return Guard(code_points(UNICODE_17, NFC) if config["normalizer"] else code_points(UNICODE_17), spellings)


def convert_model(path: str | Path, processor: Any) -> dict[str, Any]:
    """The tokenizer.json that stands for a .model of sentencepiece, of which `processor` is the loaded form.

    Raises NotExact if there is none: `find_guard` looks at what is in the JSON, this at what gets lost on the way to it.
    """
    check_versions("gigatoken")
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    try:
        config: dict[str, Any] = json.loads(sentencepiece_to_tokenizer_json(Path(path).read_bytes()))
    except ValueError as error:
        raise NotExact(str(error)) from error
    if any(not token["special"] for token in config["added_tokens"]):
        raise NotExact("it has user-defined pieces")
    config["added_tokens"] = []  # control pieces, which sentencepiece does not match in texts
    ids = range(processor.get_piece_size())
    if any(map(processor.is_unused, ids)):
        raise NotExact("it has unused pieces")
    other = (processor.is_unknown, processor.is_control, processor.is_byte)
    merged = [id_ for id_ in ids if len(processor.id_to_piece(id_)) > 1 and not any(kind(id_) for kind in other)]
    if len(set(map(processor.get_score, merged))) < len(merged):
        raise NotExact("it has pieces of equal score")  # sentencepiece then merges the leftmost first, the JSON says one of them
    parts = config["normalizer"]["normalizers"]
    if len(parts) == 1:
        config["normalizer"] = parts[0]
    return config


def _is_byte_level(config: dict[str, Any]) -> bool:
    """True for byte-level BPE, False for BPE of sentencepiece's type. Raises NotExact for what is not on the list."""
    model, normalizer, pre_tokenizer = config["model"], config["normalizer"], config["pre_tokenizer"]
    if model["type"] != "BPE":
        raise NotExact(f"its model is {model['type']}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise NotExact(f"its model has a {key}")
    byte_level = _is_known_split(pre_tokenizer)
    if byte_level and normalizer not in (None, {"type": "NFC"}):
        raise NotExact("of its normalizer")
    if not byte_level and not _is_metaspace(normalizer, pre_tokenizer):
        raise NotExact("of its normalizer or pre-tokenizer")
    if byte_level == model["byte_fallback"] or model["ignore_merges"] > byte_level:
        raise NotExact("of its model's byte_fallback or ignore_merges")
    if not (BYTE_CHARACTERS if byte_level else BYTE_PIECES) <= model["vocab"].keys():
        raise NotExact("its vocabulary lacks single bytes")
    return byte_level


def _is_known_split(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether it is a ByteLevel with the regex of GPT-2, or a Split with one of `REGEXES` and then a ByteLevel without."""
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "ByteLevel":
        return bool(pre_tokenizer["use_regex"]) and not pre_tokenizer["add_prefix_space"]
    if pre_tokenizer["type"] != "Sequence" or [part["type"] for part in pre_tokenizer["pretokenizers"]] != ["Split", "ByteLevel"]:
        return False
    split, level = pre_tokenizer["pretokenizers"]
    return (
        split["pattern"].get("Regex") in REGEXES
        and split["behavior"] == "Isolated"
        and not (split["invert"] or level["use_regex"] or level["add_prefix_space"])
    )


def _is_metaspace(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether spaces become U+2581 in one of the ways of Llama 2, Gemma and Mistral."""
    if normalizer is None:
        return pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == SPACE
    if normalizer == LLAMA_NORMALIZER:
        return pre_tokenizer is None
    return normalizer == REPLACE_SPACES and pre_tokenizer in (None, GEMMA_SPLIT)


def _refused_spellings(config: dict[str, Any]) -> tuple[str, ...]:
    """Added tokens whose appearance in a text refuses it. Raises NotExact if it cannot be told where one appears."""
    tokens = config["added_tokens"]
    normalized = [token["content"] for token in tokens if token["normalized"]]
    if normalized and config["normalizer"]:
        raise NotExact(f"its added token {normalized[0]!r} is looked for in normalized text")
    for token in tokens:
        if not token["content"]:
            raise NotExact("it has an empty added token")
        if not token["normalized"]:
            for other in normalized:
                if _overlap(token["content"], other):
                    raise NotExact(f"its added tokens {token['content']!r} and {other!r} overlap")
    return tuple(token["content"] for token in tokens if token["lstrip"] or token["rstrip"] or token["single_word"])


def _overlap(first: str, second: str) -> bool:
    """Whether some text has both strings in places that share a character."""
    if first in second or second in first:
        return True
    lengths = range(1, min(len(first), len(second)))
    return any(first.endswith(second[:length]) or second.endswith(first[:length]) for length in lengths)


@dataclass(frozen=True)
class Cut:
    """Where a text is cut so that its parts have the ids of the whole: behind the first character of what `place` matches.

    `drop_space`: the part after the cut starts behind the space there, because the tokenizer puts one before every text.
    """

    place: re.Pattern[str]
    drop_space: bool = False

    def parts(self, text: str, size: int) -> Iterator[str]:
        """The text in parts of `size` characters, longer only where no place for a cut is found."""
        start = 0
        while len(text) - start > size and (found := self.place.search(text, start + size)) is not None:
            yield text[start : found.start() + 1]
            start = found.start() + 1 + self.drop_space
        yield text[start:]


def find_cut(config: dict[str, Any]) -> Cut | None:
    """How texts may be cut for a tokenizer.json; None if it is not on the list, or a token may lie across any such place."""
    try:
        byte_level = _is_byte_level(config)
    except NotExact:
        return None
    tokens = config["added_tokens"]
    if any(token["rstrip"] for token in tokens) or (config["normalizer"] and any(token["normalized"] for token in tokens)):
        return None
    if byte_level:
        return _cut_after_word(tokens)
    if any(SPACED.search(token["content"]) for token in tokens):
        return None
    vocabulary = config["model"]["vocab"]
    if SPACE not in vocabulary or any(SPACE in piece.lstrip(SPACE) for piece in vocabulary):
        return None
    drop_space = config["normalizer"] == LLAMA_NORMALIZER
    ends, starts = ("".join(re.escape(token["content"][at]) for token in tokens if drop_space) for at in (-1, 0))
    # An added token beside the space would be a segment of its own, before and after which spaces are put as well.
    return Cut(re.compile(f"[^\\s{SPACE}{ends}] [^\\s{SPACE}{starts}]"), drop_space)


def _cut_after_word(added: Sequence[dict[str, Any]]) -> Cut | None:
    """Between a letter or digit and one of `STOPS`, where every regex on the list ends a match, whatever follows.

    Not at a stop that may lie there inside an added token, or that begins one which is a token only at the start of a word.
    """

    def fits(stop: str) -> bool:
        return not any(
            re.search(f"[{LETTERS}]{re.escape(stop)}", token["content"])
            or (token["single_word"] and token["content"].startswith(stop))
            for token in added
        )

    stops = "".join(filter(fits, STOPS))
    return Cut(re.compile(f"[{LETTERS}][{re.escape(stops)}]")) if stops else None
