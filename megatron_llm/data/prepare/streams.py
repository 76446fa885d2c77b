"""The bytes of an input file, plain or decompressed, from any offset. The readers of `formats.py` take them from here."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from megatron_llm.data.prepare.chunks import InputFile

_INPUT_BYTES = 4 << 10  # compressed bytes at a time: what they expand to is held at once


def _zstd() -> Any:
    import zstandard

    # `zstd --long=31` is common for large corpora; only such files take that memory.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "zst": _zstd,
}


class ByteStream:
    """The content of a file after decompression, from `offset` up to `stop` (plain files only), as a context manager.

    A plain file is read up to the size that it had when it was found: what is appended meanwhile is not there.

    Compressed files may have several members. Unlike Python's own readers, which take anything behind a member for padding, this
    raises ValueError naming the file and the place for whatever is not a whole member (or zeros, which tape blocks leave).
    """

    def __init__(self, file: InputFile, offset: int = 0, stop: int | None = None) -> None:
        self._file = open(file.path, "rb", buffering=0)  # noqa: SIM115
        self._path, self._left = file.path, max(0, (file.size if stop is None else stop) - offset)
        self._pieces = self._decompress(DECOMPRESSORS[file.compression]) if file.compression else None
        self._rest = memoryview(b"")
        self._counted = 0
        if self._pieces is None:
            self._counted = self._file.seek(offset)
            return
        while offset and (self._rest or self._next()):
            skipped = min(offset, len(self._rest))
            self._rest, offset = self._rest[skipped:], offset - skipped

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """At most `size` bytes, b"" only at the end."""
        if self._pieces is None:
            data = self._file.read(min(size, self._left))
            if self._left and not data:
                raise ValueError(f"{self._path} is {self._left:,} bytes shorter than when it was found; what writes it?")
            self._left -= len(data)
            return data
        parts, held = [], 0
        while held < size and (self._rest or self._next()):
            part, self._rest = self._rest[: size - held], self._rest[size - held :]
            parts.append(part)
            held += len(part)
        return b"".join(parts)

    def _next(self) -> bool:
        """Decompress on; False at the end."""
        assert self._pieces is not None
        self._rest = memoryview(next(self._pieces, b""))
        return bool(self._rest)

    def disk_bytes(self) -> int:
        """Bytes read from disk since the last call."""
        before, self._counted = self._counted, self._file.tell()
        return self._counted - before

    def _decompress(self, make: Callable[[], Any]) -> Iterator[bytes]:
        member, complete = None, False
        while block := self._file.read(_INPUT_BYTES):
            while block:
                if member is None:
                    block = block.lstrip(b"\0") if complete else block
                    if not block:
                        break
                    member = make()
                try:
                    data = member.decompress(block)
                except Exception as error:  # every library has its own class
                    raise ValueError(f"{self._path} is damaged after {self._file.tell():,} bytes: {error}") from error
                if data:
                    yield data
                complete = member.eof
                block = member.unused_data if complete else b""
                member = None if complete else member
        if not complete:
            raise ValueError(f"{self._path} is damaged: after {self._file.tell():,} bytes it ends inside the compressed data")


def line_start(file: InputFile, offset: int) -> int:
    """Where the first line starts that starts at byte `offset` of a plain file or behind it."""
    if offset in (0, file.size):
        return offset
    with ByteStream(file, offset - 1, file.size) as stream:
        place = offset - 1
        while block := stream.read(64 << 10):
            if found := block.find(b"\n") + 1:
                return place + found
            place += len(block)
    return file.size
