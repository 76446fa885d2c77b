"""The input of a preprocessing command: finding files, dividing them among shards, and reading them chunk by chunk.

`preprocess.py` and `chat.py` find inputs, read chunks, and hand them to encoders, which take documents out with `chunk_texts` and
`record_json`. Reading can go on behind any chunk. The readers are in `formats.py` and `tables.py`.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_llm.data.prepare.chunks import CHUNK_BYTES, MAX_RECORD_BYTES, Chunk, InputFile, Job, Position
from megatron_llm.data.prepare.formats import json_layout, read_csv, read_lines, read_text, read_values
from megatron_llm.data.prepare.streams import DECOMPRESSORS
from megatron_llm.data.prepare.tables import HUB_PREFIX, find_hub, read_hub, read_table
from megatron_llm.data.prepare.trees import read_trees
from megatron_llm.data.writer import SUFFIXES

FORMATS = {
    "jsonl": "lines",
    "ndjson": "lines",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "txt": "text",
    "parquet": "parquet",
    "arrow": "arrow",
}


def _read_trees(job: Job) -> Iterator[Chunk]:
    parts = list(job.file.parts)
    return read_trees(job, read_chunks(parts, chunk_bytes=job.chunk_bytes, max_record_bytes=job.max_record_bytes))


_READERS: dict[str, Callable[[Job], Iterator[Chunk]]] = {
    "lines": read_lines,
    "array": read_values,
    "values": read_values,
    "csv": read_csv,
    "tsv": read_csv,
    "text": read_text,
    "parquet": read_table,
    "arrow": read_table,
    "hub": read_hub,
    "trees": _read_trees,
}


ABOUT = ("README", "LICENSE")  # texts about a data set, not of it, with any suffix
# What a command is writing, or left when it was interrupted.
UNFINISHED = (".journal", ".order.tmp", *(f"{suffix}.tmp" for suffix in SUFFIXES))


def find_inputs(inputs: Sequence[str | Path]) -> list[InputFile]:
    """The files that `inputs` name, in order: files, globs, folders, folders that `datasets` saved, and hub:OWNER/NAME.

    A glob gives its matches sorted, a folder everything in it and below it, sorted by name, but for names that begin with a dot
    or an underscore (markers such as `_SUCCESS`) and for README and LICENSE. Neither gives the files of token data, for the
    output may lie beside the input. A saved data set is a folder and is read as its `state.json` says; where it has several
    splits, one must be named. What is named twice is read twice.

    Raises ValueError with everything that is missing, unreadable or of an unknown kind, in folders as well.
    """
    problems: list[str] = []
    files = [file for text in inputs for file in _find(str(text), problems)]
    if not files and not problems:
        problems.append("no input files")
    if problems:
        raise ValueError("; ".join(problems))
    return files


def shard_inputs(files: list[InputFile], number: int, count: int) -> list[InputFile]:
    """The part of shard `number` of `count`: what begins in that one of `count` equal ranges of all bytes on disk.

    Lines of plain files, row groups, record batches and rows of the hub are divided; other files go to a shard as a whole. Every
    record is in exactly one shard, and the shards one after the other are the input in its order.

    Raises ValueError for a hub data set of unknown size.
    """
    assert 0 <= number < count
    unknown = [file.path for file in files if file.format == "hub" and not file.rows]
    if unknown and count > 1:
        raise ValueError(
            f"{unknown[0]}: the hub does not say how many rows it has, so it has no shards; download it and name the files"
        )
    total = sum(file.size for file in files)
    low, high = total * number // count, total * (number + 1) // count
    if number == count - 1:
        high += 1  # so that empty files at the end belong to somebody
    part, base = [], 0
    for file in files:
        if _is_divisible(file):
            start, end = max(low - base, 0), min(high - base, file.size)
            if start < end:
                part.append(replace(file, start=start, end=end))
        elif low <= base < high:
            part.append(file)
        base += file.size
    return part


def _is_divisible(file: InputFile) -> bool:
    return file.format in ("lines", "parquet", "arrow", "hub") and not file.compression


def describe_inputs(files: list[InputFile]) -> list[list[str | int]]:
    """What tells these inputs from others and from what they were before they changed. Can be stored as JSON."""
    return [
        [one.path if one.format == "hub" else os.path.abspath(one.path), one.size, one.version, one.start, one.end]
        for file in files
        for one in file.parts or (file,)
    ]


def read_chunks(
    files: list[InputFile],
    start: Position | None = None,
    *,
    columns: Sequence[str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Chunk]:
    """All records of `files` in order, or those behind `start`, the `end` of an earlier chunk.

    `columns`: what to read of tables (csv, parquet, arrow, hub); all by default. Holds little more than one chunk, or one record
    where that is larger; records above `max_record_bytes` are skipped and reported.

    Raises ValueError naming file and place for a damaged file, and for a table without one of `columns`.
    """
    assert 0 < chunk_bytes <= max_record_bytes
    first, *at = start or (0,)
    for number, file in enumerate(files[first:], first):
        resumed = (at[0], at[1]) if at and number == first else None
        job = Job(file, number, resumed, columns, chunk_bytes, max_record_bytes)
        try:
            yield from _READERS[file.format](job)
        except OSError as error:
            raise ValueError(f"{file.path} cannot be read: {error}") from error


def _find(text: str, problems: list[str]) -> Iterator[InputFile]:
    path = Path(text)
    try:
        if path.is_dir():
            yield from _folder(path, problems)
        elif path.is_file():
            yield _file(text)
        elif text.startswith(HUB_PREFIX):
            yield find_hub(text)
        elif glob.has_magic(text) and (matches := _matches(text)):
            folders = {Path(match) for match in matches if os.path.isdir(match)}
            for match in matches:
                if folders.isdisjoint(Path(match).parents):  # else it comes with the folder
                    yield from _find(match, problems)
        else:
            raise ValueError(
                f"{text} is not a file; nor a folder, nor a glob that matches anything "
                f"(a data set of the Hugging Face hub is written {HUB_PREFIX}OWNER/NAME)"
            )
    except ValueError as error:
        problems.append(str(error))


def _matches(pattern: str) -> list[str]:
    return [match for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isdir(match) or not _is_output(match)]


def _is_output(path: str) -> bool:
    """Whether this is a file of token data, or of a command that makes some, and no input.

    The `.idx` beside it decides, as other files may be named `.meta.json` too.
    """
    prefixes = [path.removesuffix(suffix) for suffix in SUFFIXES if path.endswith(suffix)]
    prefixes += [prefix.removesuffix(".unshuffled") for prefix in prefixes]  # its own index is removed first
    # In this order: another process may be putting its index in place.
    return path.endswith(UNFINISHED) or any(os.path.exists(prefix + end) for prefix in prefixes for end in (".idx.tmp", ".idx"))


def _is_about(path: Path) -> bool:
    return path.name.upper().partition(".")[0] in ABOUT and _format(path.name)[0] in (None, "text") and path.is_file()


def _folder(path: Path, problems: list[str], above: frozenset[str] = frozenset()) -> Iterator[InputFile]:
    """Files below a folder. `above`: the folders it is in, where links could lead in a circle."""
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from _saved_dataset(path, problems)
        return
    if (path / "dataset_dict.json").is_file():
        splits = sorted(state.parent for state in path.glob("*/state.json"))
        if len(splits) == 1:
            yield from _saved_dataset(splits[0], problems)
        else:
            names = ", ".join(split.name for split in splits)
            problems.append(f"{path} has the splits {names or 'of no data set'}; name the folder of one of them")
        return
    here = os.path.realpath(path)
    if here in above:
        problems.append(f"{path} is a link to a folder that it lies in")
        return
    unknown, found = [], False
    for entry in sorted(path.iterdir()):
        if entry.name.startswith((".", "_")) or _is_about(entry):
            continue
        found = True
        if entry.is_dir():
            yield from _folder(entry, problems, above | {here})
        elif _is_output(str(entry)):
            continue
        elif _format(entry.name)[0]:
            yield from _find(str(entry), problems)
        else:
            unknown.append(entry.name)
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        problems.append(f"{path} has files of unknown kinds: {some}; name the wanted ones by a glob, like '{path}/**/*.jsonl'")
    if not found:
        problems.append(f"{path} is an empty folder")


def _saved_dataset(path: Path, problems: list[str]) -> Iterator[InputFile]:
    """The files of a data set that `datasets` saved; others in its folder are caches of its methods."""
    try:
        names = [entry["filename"] for entry in json.loads((path / "state.json").read_bytes())["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise ValueError("a file name that leads out of the folder")
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{path / 'state.json'} is not what `datasets` writes: {error!r}")
        return
    for name in names:
        yield from _find(str(path / name), problems)


def _format(name: str) -> tuple[str | None, str]:
    """(format or None, compression) by the suffixes of a file."""
    stem, _, last = name.lower().rpartition(".")
    compression = last if last in DECOMPRESSORS else ""
    suffix = stem.rpartition(".")[2] if compression else last
    return FORMATS.get(suffix), compression


def _file(path: str) -> InputFile:
    format_, compression = _format(Path(path).name)
    if format_ is None:
        known = ", ".join(f".{suffix}" for suffix in FORMATS)
        raise ValueError(f"{path} has an unknown suffix; known: {known}, and .{', .'.join(DECOMPRESSORS)} behind them")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} may not be read by this user")
    status = os.stat(path)
    file = InputFile(path, format_, compression, status.st_size, str(status.st_mtime_ns), 0, status.st_size)
    return replace(file, format=json_layout(file)) if format_ == "json" else file
