"""From texts to ids: exactly those of the tokenizer's own library, most of them computed by a faster one.

The own library is the reference: `tokenizers`, `sentencepiece` or `tiktoken`. gigatoken computes the same ids about fifty
times faster where `guard.py` lets it; the other texts go to the reference, and a sample of what gigatoken computed is
compared with it. Called by `preprocess.py`.
"""

from __future__ import annotations

import json
import os
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_llm.data.prepare.guard import Cut, Guard, NotExact, check_versions, convert_model, find_cut, find_guard
from megatron_llm.data.prepare.references import (
    HuggingFaceReference,
    Ids,
    Reference,
    Refused,
    SentencePieceReference,
    TiktokenReference,
)
from megatron_llm.data.tokenizer import load_encoder, load_sentencepiece, tokenizer_kind

Offsets = npt.NDArray[np.int64]

MAX_TEXT_BYTES = 64 << 20  # of UTF-8
PART = 1 << 20  # characters of the parts that longer texts are cut into
LONGEST_PART = 8 << 20  # bytes of UTF-8 without a place to cut, for gigatoken
CHECKED_CUTS = 16  # around one cut in so many the two parts are compared with the whole
CHECKED = 2000  # one document in so many is compared with the reference
FIRST_CHECKED = 4  # and these, so that a short run is checked too
EXCERPT = 1 << 14  # characters of a document that are compared
CACHE_BYTES = 256 << 20
CACHE_LOOK = 16 << 20  # characters between two looks at the memory


class PartTokenizer(Protocol):
    """Turns texts that are not too long into ids."""

    how: str
    reference: Reference

    def encode(self, texts: Sequence[str], where: Callable[[int], str]) -> tuple[Ids, Offsets]:
        """As `TextTokenizer.encode`."""
        ...


@dataclass(frozen=True)
class TextTokenizer:
    """Turns texts into ids, in bounded memory: long texts are cut where that changes nothing, if `cut` knows how.

    `longest`: bytes of UTF-8 that a part without such a place may have; None: any number.
    """

    parts: PartTokenizer
    cut: Cut | None = None
    longest: int | None = None

    @property
    def how(self) -> str:
        """What does the work, in a few words."""
        return self.parts.how

    def encode(self, texts: Sequence[str], where: Callable[[int], str]) -> tuple[Ids, Offsets]:
        """Flat ids of all texts back to back, and where each text's begin: int64 [len(texts) + 1].

        No bos or eos is added; special tokens spelled out in a text are matched. `where(i)` names text i in the error of
        the sampled check, a ValueError. Raises Refused for a text that cannot be tokenized in bounded memory.
        """
        if all(len(text) <= PART for text in texts):
            return self.parts.encode(texts, where)
        parts = [(index, part) for index, text in enumerate(texts) for part in self._cut(index, text)]
        self._check_cuts(parts, where)
        owners = [index for index, _ in parts]
        try:
            ids, offsets = self.parts.encode([part for _, part in parts], lambda part: f"a part of {where(owners[part])}")
        except Refused as refused:
            raise Refused(owners[refused.index], str(refused)) from refused
        return ids, offsets[np.searchsorted(owners, np.arange(len(texts) + 1))]

    def _check_cuts(self, parts: Sequence[tuple[int, str]], where: Callable[[int], str]) -> None:
        """Raises ValueError if, around one of a sample of cuts, the ids of both sides are not those of the whole."""
        cuts = [(index, left, right) for (index, left), (other, right) in pairwise(parts) if index == other]
        for index, left, right in cuts[::CHECKED_CUTS]:
            left, right = left[-EXCERPT // 2 :], right[: EXCERPT // 2]
            whole = left + " " * (self.cut is not None and self.cut.drop_space) + right
            *sides, expected = self.parts.reference.encode([left, right, whole])
            if not np.array_equal(np.concatenate(sides), expected):
                raise ValueError(
                    f"{where(index)}: the text was cut between {left[-20:]!r} and {right[:20]!r}, which changes its ids; "
                    "report the document and the tokenizer"
                )

    def _cut(self, index: int, text: str) -> Sequence[str]:
        """The parts of text `index`."""
        if len(text) <= PART:
            return (text,)
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise Refused(index, f"more than {MAX_TEXT_BYTES:,} bytes of text, the most that is tokenized")
        parts = list(self.cut.parts(text, PART)) if self.cut else [text]
        if self.longest is not None and any(len(part) > PART and len(part.encode()) > self.longest for part in parts):
            raise Refused(index, f"over {self.longest:,} bytes without a place where they may be cut for this tokenizer")
        return parts


def open_tokenizer(path: str | Path, fast: bool = True, threads: bool = True) -> TextTokenizer:
    """The tokenizer of a folder or file, see `data/tokenizer.py`. Raises ValueError if it is none.

    fast: may use gigatoken. threads: may use all cores; False in a process that is one of several workers.
    """
    if not threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch
    kind = tokenizer_kind(path)
    if kind == "tiktoken":
        return TextTokenizer(ReferenceTokenizer(TiktokenReference(path, threads)))
    reference, serialized = _open_huggingface(path) if kind == "huggingface" else _open_sentencepiece(path, threads)
    if isinstance(serialized, NotExact):
        return TextTokenizer(ReferenceTokenizer(reference, serialized if fast else None))
    config = json.loads(serialized)
    cut = find_cut(config)
    if not fast:
        return TextTokenizer(ReferenceTokenizer(reference), cut)
    try:
        check_versions("gigatoken", reference.name)
        return TextTokenizer(FastTokenizer(reference, find_guard(config), Gigatoken(serialized, threads)), cut, LONGEST_PART)
    except NotExact as reason:
        return TextTokenizer(ReferenceTokenizer(reference, reason), cut)


def _open_huggingface(path: str | Path) -> tuple[Reference, str]:
    """The reference, and the tokenizer.json as the library understood it, with every default written out."""
    encoder = load_encoder(path)
    return HuggingFaceReference(encoder), encoder.to_str()


def _open_sentencepiece(path: str | Path, threads: bool) -> tuple[Reference, str | NotExact]:
    """The reference, and the tokenizer.json that stands for the model or why there is none."""
    processor = load_sentencepiece(path)
    reference = SentencePieceReference(processor, threads)
    try:
        return reference, json.dumps(convert_model(path, processor))
    except NotExact as reason:
        return reference, reason


class Gigatoken:
    """The fast library, made from a tokenizer.json. Raises NotExact if it does not take that.

    It remembers every word it has met and forgets none, ten bytes for each of text that never repeats. So it is made anew
    when the process has grown by `CACHE_BYTES`.
    """

    def __init__(self, serialized: str, threads: bool) -> None:
        self._serialized, self._threads = serialized, threads
        try:
            self._load()
        except Exception as error:  # its errors have no class in common
            raise NotExact(f"gigatoken refuses it: {error}") from error

    def _load(self) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(self._serialized)
        self._characters, self._resident = 0, _resident_bytes()

    def encode(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Flat ids and int64 [len(texts) + 1] offsets, the library's own arrays."""
        self._characters += sum(map(len, texts))
        if self._characters > CACHE_LOOK:
            self._characters = 0
            if _resident_bytes() > self._resident + CACHE_BYTES:
                self._load()
        with _without_awkward():
            ids, lengths = self._tokenizer.encode_batch(texts, parallel=self._threads)
        return ids, _offsets(lengths)


@contextmanager
def _without_awkward() -> Iterator[None]:
    """gigatoken imports awkward to hand out flat ids and lengths as one ragged array: a third of a second, for what is taken
    apart at once. While it runs, a module of that name stands in that leaves them as they are."""
    stand_in = types.ModuleType("awkward")
    vars(stand_in).update(Array=_NoArray, unflatten=lambda ids, lengths: (ids, lengths))
    real = sys.modules.get("awkward")
    sys.modules["awkward"] = stand_in
    try:
        yield
    finally:
        del sys.modules["awkward"]
        if real is not None:
            sys.modules["awkward"] = real


class _NoArray:
    """Texts are never given as such an array."""


def _resident_bytes() -> int:
    """Memory of this process that is in use now; 0 where that cannot be told, which is everywhere but on Linux."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


class ReferenceTokenizer:
    """Everything by the tokenizer's own library. `reason`: why nothing faster, for the log."""

    def __init__(self, reference: Reference, reason: NotExact | None = None) -> None:
        self.reference = reference
        self.how = f"{reference.name}, because {reason}" if reason else reference.name

    def encode(self, texts: Sequence[str], where: Callable[[int], str]) -> tuple[Ids, Offsets]:
        ids = self.reference.encode(texts)
        return np.concatenate(ids) if ids else np.empty(0, np.uint32), _offsets([len(part) for part in ids])


class FastTokenizer:
    """By gigatoken what the guard lets through, the rest by the reference, and a sample by both."""

    def __init__(self, reference: Reference, guard: Guard, fast: Gigatoken) -> None:
        self.reference, self._guard, self._fast = reference, guard, fast
        self._first = FIRST_CHECKED
        self.how = f"gigatoken, checked against {reference.name} on 1 document in {CHECKED:,}"

    def encode(self, texts: Sequence[str], where: Callable[[int], str]) -> tuple[Ids, Offsets]:
        refused = self._guard.refused(texts)
        allowed = list(texts)
        for index in refused:
            allowed[index] = ""
        ids, offsets = self._fast.encode(allowed)
        self._check(allowed, ids, offsets, where)
        try:
            replaced = self.reference.encode([texts[index] for index in refused])
        except Refused as reason:
            raise Refused(refused[reason.index], str(reason)) from reason
        return _replace(ids, offsets, refused, replaced)

    def _check(self, texts: Sequence[str], ids: Ids, offsets: Offsets, where: Callable[[int], str]) -> None:
        """Compares a sample with the reference. It is drawn by the batch's content, so that a repeated run draws it again."""
        drawn = np.random.default_rng(zlib.crc32(offsets.tobytes())).random(len(texts)) < 1 / CHECKED
        drawn[: self._first] = True
        self._first = max(0, self._first - len(texts))
        for index in np.flatnonzero(drawn).tolist():
            text, computed, start = texts[index], ids[offsets[index] : offsets[index + 1]], 0
            if len(text) > EXCERPT:  # somewhere in the text, encoded on its own by both
                start = int(offsets[index]) % (len(text) - EXCERPT)
                text = text[start : start + EXCERPT]
                computed, _ = self._fast.encode([text])
            (expected,) = self.reference.encode([text])
            if not np.array_equal(computed, expected):
                raise ValueError(f"{where(index)}: {self._difference(computed, expected, start, len(text))}")

    def _difference(self, computed: Ids, expected: Ids, start: int, characters: int) -> str:
        shorter = min(len(computed), len(expected))
        first = int(np.append(computed[:shorter] != expected[:shorter], True).argmax())
        both = [f"{ids[first]} of {len(ids):,}" if first < len(ids) else f"none of {len(ids):,}" for ids in (computed, expected)]
        return (
            f"in characters {start:,} to {start + characters:,}, token {first:,} is {both[0]} by gigatoken but {both[1]} by "
            f"{self.reference.name}; use --no-fast, which is slower and always right, and report the document"
        )


def _offsets(lengths: Sequence[int] | Offsets) -> Offsets:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _replace(ids: Ids, offsets: Offsets, indices: Sequence[int], parts: Sequence[Ids]) -> tuple[Ids, Offsets]:
    """The flat ids with the ids of some texts, which have none so far, put in."""
    if not indices:
        return ids, offsets
    lengths = np.diff(offsets)
    pieces: list[Ids] = []
    done = 0
    for index, part in zip(indices, parts, strict=True):
        pieces += [ids[done : offsets[index]], part]
        done = int(offsets[index])
        lengths[index] = len(part)
    return np.concatenate([*pieces, ids[done:]]), _offsets(lengths)
