"""Helpers of the tests that read input files."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from megatron_llm.data.prepare.chunks import Chunk, InputFile, Position, is_record
from megatron_llm.data.prepare.inputs import find_inputs, read_chunks

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def write(path: Path, content: bytes) -> Path:
    """Write `content`, compressed as the suffix says."""
    compress = COMPRESS.get(path.suffix[1:])
    path.write_bytes(compress(content) if compress else content)
    return path


def read(*inputs: str | Path, chunk_bytes: int = 4 << 20, **options: Any) -> list[Chunk]:
    return list(read_chunks(find_inputs(inputs), chunk_bytes=chunk_bytes, **options))


def records(chunks: list[Chunk]) -> list[Any]:
    """What is a record, JSON undecoded and without white space around it."""
    return [record for _, record in named(chunks)]


def named(chunks: list[Chunk]) -> list[tuple[str, Any]]:
    """(where, record)"""
    pairs = []
    for chunk in chunks:
        for index, record in enumerate(chunk.records):
            if is_record(chunk, index):
                pairs.append((chunk.where(index), record.strip(b" \t\r\n") if chunk.kind == "json" else record))
    return pairs


def skipped(chunks: list[Chunk]) -> list[tuple[str, str]]:
    return [(one.where, one.reason) for chunk in chunks for one in chunk.skipped]


def check_resume(files: list[InputFile], **options: Any) -> None:
    """From the end of any chunk on, the rest is what it was, with the same names."""
    chunks = list(read_chunks(files, **options))
    for number, chunk in enumerate(chunks):
        position: Position = chunk.end
        rest = list(read_chunks(files, position, **options))
        assert named(rest) == named(chunks[number + 1 :])
        assert skipped(rest) == skipped(chunks[number + 1 :])
        assert [one.end for one in rest[-1:]] == [one.end for one in chunks[number + 1 :][-1:]]
