"""Tokenizers by their own libraries: what "the ids of a text" means. Slow, always right, and bounded in memory.

`tokenizers` and `sentencepiece` need about a hundred bytes for each character they are working on, so they get a megabyte at
a time, and a text that is longer is cut where `guard.py` knows that cutting changes nothing. Called by `encoding.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_llm.data.prepare.guard import Cut
from megatron_llm.data.tokenizer import load_tiktoken

Ids = npt.NDArray[np.uint32]

BATCH = 1 << 20  # characters


class Reference(Protocol):
    """A tokenizer's own library."""

    name: str

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text: special tokens spelled out are matched as the library does, no bos or eos is added."""
        ...


class HuggingFaceReference:
    """A `tokenizers.Tokenizer`."""

    name = "tokenizers"

    def __init__(self, encoder: Any, cut: Cut | None) -> None:
        self._encoder, self._cut = encoder, cut

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return _encode_in_parts(texts, self._cut, self._encode_batch)

    def _encode_batch(self, batch: list[str]) -> list[Any]:
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(batch, add_special_tokens=False)]


class SentencePieceReference:
    """A `SentencePieceProcessor`. Its control pieces (<s>) are never matched in text, its user-defined ones are."""

    name = "sentencepiece"

    def __init__(self, processor: Any, cut: Cut | None, threads: bool) -> None:
        self._processor, self._cut = processor, cut
        self._threads = -1 if threads else 1

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return _encode_in_parts(texts, self._cut, partial(self._processor.encode, num_threads=self._threads))


class TiktokenReference:
    """A file of tiktoken. Special tokens are matched in text, as `tokenizers` does; it needs little memory by itself."""

    name = "tiktoken"

    def __init__(self, path: str | Path, threads: bool) -> None:
        encoding, _ = load_tiktoken(path)
        self._encode = partial(encoding.encode_to_numpy, allowed_special="all")
        self._threads = (os.cpu_count() or 1) if threads else 1

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        if self._threads == 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._encode, texts))


def _encode_in_parts(texts: Sequence[str], cut: Cut | None, encode: Any) -> list[Ids]:
    """`encode(list of texts) -> list of lists of ids`, called with about `BATCH` characters at a time."""
    ids: list[list[Ids]] = [[] for _ in texts]
    for batch in _batches(
        (index, part) for index, text in enumerate(texts) for part in (cut.parts(text, BATCH) if cut else [text])
    ):
        for (index, _), part_ids in zip(batch, encode([part for _, part in batch]), strict=True):
            ids[index].append(np.asarray(part_ids, np.uint32))
    return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]


def _batches(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for index, part in parts:
        if batch and size + len(part) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append((index, part))
        size += len(part)
    if batch:
        yield batch
