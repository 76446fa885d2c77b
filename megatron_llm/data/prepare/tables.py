"""Readers of tables: parquet, arrow, and data sets of the Hugging Face hub. Rows come as dicts.

A table on disk is a number of pieces (row groups of parquet, record batches of arrow), and a part of a file is some of its
pieces: piece k of n counts as beginning at byte size * k / n. Rows of the hub are counted the same way. A table that is
compressed as a whole is decompressed to a temporary file first, for it is read from many places. `inputs.py` calls the readers.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO, Any

from megatron_llm.data.prepare.chunks import Chunk, InputFile, Job, Skipped
from megatron_llm.data.prepare.streams import ByteStream

HUB_PREFIX = "hub:"
_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[^/:@]+))?(@(?P<revision>[^:]+))?(:(?P<split>[^:]+))?")
_HUB_ROWS = 256  # rows that are asked for at a time
_PARQUET_ROWS = 8192  # at most at a time: values that repeat are stored once, so the size of a group may say little
_ENCODED_ROWS = 256  # of a column that stores each value once, at a time: nothing says how large they are together
_READ_BYTES = 1 << 20  # of a parquet column at a time; pyarrow would otherwise hold all of it

Pieces = Iterator[tuple[int, Callable[[], Iterable[Any]]]]
"""(rows, a function that gives them as pyarrow record batches) for each piece"""


def read_table(job: Job) -> Iterator[Chunk]:
    """Rows of a parquet or arrow file. Raises ValueError naming the file and the place if it is damaged."""
    with open(job.file.path, "rb") if not job.file.compression else _decompressed(job) as source:
        yield from _read_table(job, source)


def _decompressed(job: Job) -> IO[bytes]:
    """A temporary file with the content, which has no name and is gone when this process is."""
    target = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with ByteStream(job.file) as stream:
            while block := stream.read(job.chunk_bytes):
                target.write(block)
        target.flush()
    except OSError as error:
        target.close()
        raise ValueError(f"{job.file.path} cannot be decompressed to {tempfile.gettempdir()}: {error}") from error
    except ValueError:
        target.close()
        raise
    return target


def _read_table(job: Job, source: IO[bytes]) -> Iterator[Chunk]:
    import pyarrow as pa

    file, first, last = job.file, 0, 0
    try:
        count, pieces = _parquet(job, source) if file.format == "parquet" else _arrow(job, source)
        for number, (rows, batches) in enumerate(pieces):
            first, last = last, last + rows
            start, end = (file.size * part // count for part in (number, number + 1))
            if file.start <= start < file.end and last > _resume_row(job):
                yield from _chunks(job, first, batches(), partial(_between, first, last, start, end))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path} is damaged behind row {first}, or no {file.format} file: {error}") from error


def _between(first: int, last: int, start: int, end: int, row: int) -> int:
    """The byte of `row`, if rows [first, last) are bytes [start, end)."""
    return start + (end - start) * (row - first) // max(1, last - first)


def _resume_row(job: Job) -> int:
    return job.at[0] if job.at else 0


def _parquet(job: Job, source: IO[bytes]) -> tuple[int, Pieces]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(
        source if job.file.compression else job.file.path,
        buffer_size=_READ_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
    )
    job.check_columns(file.schema_arrow.names)
    columns = None if job.columns is None else list(job.columns)

    def pieces() -> Pieces:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            size = job.chunk_bytes * group.num_rows // max(1, group.total_byte_size)
            yield group.num_rows, partial(file.iter_batches, min(max(size, 1), _PARQUET_ROWS), [number], columns)

    return file.num_row_groups, pieces()


def _arrow(job: Job, source: IO[bytes]) -> tuple[int, Pieces]:
    """The file format, or the stream format that `datasets` writes.

    The file is mapped, so that batches that are left out cost nothing, and its pages are given back after each batch, or the
    whole file would count as memory of this process.
    """
    import pyarrow as pa

    if not os.fstat(source.fileno()).st_size:
        raise pa.ArrowInvalid("it is empty")
    mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    content = pa.py_buffer(mapped)
    if mapped[:6] == b"ARROW1":
        reader = pa.ipc.open_file(content)
        count = reader.num_record_batches
        batches = map(reader.get_batch, range(count))
    else:
        reader = batches = pa.ipc.open_stream(content)
        messages = pa.ipc.MessageReader.open_stream(content)
        count = sum(message.type == "record batch" for message in messages)
    job.check_columns(reader.schema.names)

    def pieces() -> Pieces:
        for batch in batches:
            yield batch.num_rows, partial(_checked, job, batch)
            mapped.madvise(mmap.MADV_DONTNEED)

    return count, pieces()


def _checked(job: Job, batch: Any) -> list[Any]:
    batch = _select(job, batch)
    batch.validate(full=True)  # offsets in a damaged file may point anywhere
    return [batch]


def _select(job: Job, table: Any) -> Any:
    return table if job.columns is None else table.select(list(job.columns))


def _chunks(job: Job, row: int, batches: Iterable[Any], disk_bytes: Callable[[int], int]) -> Iterator[Chunk]:
    """Chunks of record batches, the first of which begins at `row`; what was read before is left out.

    `disk_bytes(row)`: bytes of the file before a row.
    """
    path = job.file.path
    for batch in batches:
        known = min(max(_resume_row(job) - row, 0), batch.num_rows)
        row += known
        for plain in _decoded(batch.slice(known)):
            for part in _parts(plain, job.chunk_bytes):
                records, skipped = _rows(job, part, row)
                end = row + part.num_rows
                read = disk_bytes(end) - disk_bytes(row)
                yield Chunk(path, "row", "row", records, row + 1, row, part.nbytes, read, (job.number, end, end), skipped)
                row = end


def _decoded(batch: Any) -> Iterator[Any]:
    """The batch, or its parts without dictionaries (categoricals): any slice would be as large as the whole dictionary."""
    import pyarrow as pa

    plain = [field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in batch.schema]
    if plain == list(batch.schema):
        yield batch
        return
    for first in range(0, batch.num_rows, _ENCODED_ROWS):
        yield batch.slice(first, _ENCODED_ROWS).cast(pa.schema(plain))


def _parts(batch: Any, size: int) -> Iterator[Any]:
    if batch.num_rows < 2 or batch.nbytes <= size:
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _parts(batch.slice(0, half), size)
    yield from _parts(batch.slice(half), size)


def _rows(job: Job, batch: Any, row: int) -> tuple[list[dict[str, Any]], list[Skipped]]:
    if batch.num_rows == 1 and batch.nbytes > job.max_record_bytes:
        return [{}], [Skipped(f"{job.file.path} row {row + 1}", job.too_large)]
    try:
        return batch.to_pylist(), []
    except UnicodeDecodeError as error:  # parquet does not check its strings
        if batch.num_rows == 1:
            return [{}], [Skipped(f"{job.file.path} row {row + 1}", f"not UTF-8 (byte {error.start} of the record)")]
    single = [_rows(job, batch.slice(number, 1), row + number) for number in range(batch.num_rows)]
    return [record for records, _ in single for record in records], [one for _, skipped in single for one in skipped]


def find_hub(text: str) -> InputFile:
    """A data set of the hub, looked up there. Raises ValueError if it cannot be found.

    `text` is hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT], the split is "train" if none is named. The size is that of its
    rows, where the hub knows it, else 0.
    """
    import datasets

    name, configuration, revision, split = _parse(text)
    try:
        builder = datasets.load_dataset_builder(name, configuration, revision=revision)
    except Exception as error:  # a dozen classes: no such data set, several configurations, no connection, ...
        raise ValueError(f"{text}: {error}") from error
    splits = builder.info.splits or {}
    if splits and split not in splits:
        raise ValueError(f"{text} has no split {split!r}; it has {', '.join(splits)}")
    rows, size = (splits[split].num_examples or 0, splits[split].num_bytes or 0) if splits else (0, 0)
    if not rows or not size:
        rows = size = 0
    return InputFile(text, "hub", "", size, str(builder.hash), 0, size, rows)


def read_hub(job: Job) -> Iterator[Chunk]:
    """Rows of a data set of the hub, as they arrive; nothing is stored. Code that comes with a data set is never run."""
    import datasets

    file = job.file
    first, last = (-(-place * file.rows // max(1, file.size)) for place in (file.start, file.end))
    first = max(first, _resume_row(job))
    name, configuration, revision, split = _parse(file.path)
    rows = datasets.load_dataset(name, configuration, split=split, revision=revision, streaming=True).skip(first)
    if file.end < file.size:  # else to the end: what the hub says about sizes is written by people
        rows = rows.take(max(last - first, 0))
    batches = _arriving(job, rows.with_format("arrow").iter(_HUB_ROWS))
    yield from _chunks(job, first, batches, partial(_between, 0, file.rows, 0, file.size))


def _arriving(job: Job, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # of the network, of the file format, of the hub
            raise ValueError(f"{job.file.path}: {error}") from error
        if batch is None:
            return
        job.check_columns(batch.column_names)
        yield _select(job, batch)


def _parse(text: str) -> tuple[str, str | None, str | None, str]:
    match = _HUB.fullmatch(text)
    if not match:
        raise ValueError(f"{text}: a data set of the hub is written hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT]")
    return match["name"], match["config"], match["revision"], match["split"] or "train"
