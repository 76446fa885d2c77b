"""Tokenizers by their own libraries: what "the ids of a text" means. Slow, always right, and bounded in memory.

`tokenizers` and `sentencepiece` need about a hundred bytes for each character they are working on, so they get a megabyte at
a time; `encoding.py`, which calls this, cuts texts that are longer.
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

from megatron_llm.data.tokenizer import load_tiktoken

Ids = npt.NDArray[np.uint32]

BATCH = 1 << 20  # characters
LONGEST = 3 << 20  # bytes of one text: some take 350 times as much memory


class Refused(ValueError):
    """Text `index` of those given cannot be tokenized; the message says why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Reference(Protocol):
    """A tokenizer's own library."""

    name: str

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text: special tokens spelled out are matched as the library does, no bos or eos is added.

        Raises Refused.
        """
        ...


class HuggingFaceReference:
    """A `tokenizers.Tokenizer`."""

    name = "tokenizers"

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return _encode_in_batches(texts, self._encode_batch)

    def _encode_batch(self, batch: list[str]) -> list[Any]:
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(batch, add_special_tokens=False)]


class SentencePieceReference:
    """A `SentencePieceProcessor`. Its control pieces (<s>) are never matched in text, its user-defined ones are."""

    name = "sentencepiece"

    def __init__(self, processor: Any, threads: bool) -> None:
        self._encode = partial(processor.encode, num_threads=-1 if threads else 1)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return _encode_in_batches(texts, self._encode)


class TiktokenReference:
    """A file of tiktoken. Special tokens are matched in text, as `tokenizers` does; it needs little memory by itself."""

    name = "tiktoken"

    def __init__(self, path: str | Path, threads: bool) -> None:
        self._encoding, _ = load_tiktoken(path)
        self._threads = (os.cpu_count() or 1) if threads else 1

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        if self._threads == 1:
            return list(map(self._encode, range(len(texts)), texts))
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._encode, range(len(texts)), texts))

    def _encode(self, index: int, text: str) -> Ids:
        try:
            ids: Ids = self._encoding.encode_to_numpy(text, allowed_special="all")
        except ValueError as error:  # its regex engine gives up on a million spaces
            raise Refused(index, f"tiktoken cannot tokenize it: {error}") from error
        return ids


def _encode_in_batches(texts: Sequence[str], encode: Any) -> list[Ids]:
    """`encode(list of texts) -> list of lists of ids`, called with about `BATCH` characters at a time."""
    for index, text in enumerate(texts):
        if len(text) > BATCH and len(text.encode()) > LONGEST:
            raise Refused(index, f"over {LONGEST:,} bytes without a place where they may be cut for this tokenizer")
    return [np.asarray(ids, np.uint32) for batch in _batches(texts) for ids in encode(batch)]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
