"""Several data sets as one: the shards of a preprocessing job, or data sets made by the same tokenizer.

Tokens and role bytes are copied by the kernel and never decoded (shared instead of copied where the file system can); only
the index is computed anew. Called by `cli/merge.py`, and by `preprocess.py` for the names of shards.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_llm.data.indexed import BLOCK, HEADER, MAX_WEIGHTS, WEIGHT_SHIFT, DatasetMeta, IndexedDataset, IntArray
from megatron_llm.data.prepare.shuffle import SourceFiles, shuffle_dataset
from megatron_llm.data.writer import StagedFiles, check_prefix, publish, remove_dataset

SIDES = ("train", "valid", "test")  # what the prefixes of a split end in
COPY_BYTES = 1 << 28
_SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}$")


def shard_prefix(output: str | Path, number: int, count: int) -> str:
    """Prefix of shard `number` of `count`, counted from 0: `data-00003-of-00016`."""
    return f"{output}-{number:05d}-of-{count:05d}"


def merge(prefixes: Sequence[str | Path], output: str | Path, *, shuffle_seed: int | None = None, progress: bool = True) -> str:
    """Join data sets into `output`, in the order given, shards of a set by number. Returns a line that says what is in it.

    `prefixes` may hold globs of `.idx` files. With `shuffle_seed` the documents are then brought into random order. If
    token types differ, narrower ones are widened: only then tokens are rewritten. Raises ValueError with everything that speaks
    against it: missing or damaged data sets and shards, different tokenizers, chat with other data. Interrupted, it
    leaves no data set, and the same command starts again.
    """
    check_prefix(output)
    found = find_datasets(prefixes)
    if any(Path(prefix).resolve() == Path(output).resolve() for prefix in found):
        raise ValueError(f"{output} is one of the data sets to be merged; give another --output")
    sources = _in_order([IndexedDataset(prefix) for prefix in found])
    meta = merged_meta(sources)
    joined = str(output) if shuffle_seed is None else f"{output}.unshuffled"
    _join(sources, joined, meta, progress)
    if shuffle_seed is not None:
        shuffle_dataset(joined, output, shuffle_seed, progress=progress)
        remove_dataset(joined)
    documents, tokens = sum(source.documents for source in sources), sum(len(source.tokens) for source in sources)
    return f"{output}: {documents:,} documents, {tokens:,} tokens from {len(sources)} data sets"


def find_datasets(prefixes: Sequence[str | Path]) -> list[str]:
    """Prefixes from prefixes, `.idx` files and globs of either. Raises ValueError if one is given twice or nothing is found."""
    found: list[str] = []
    for given in map(str, prefixes):
        pattern = given if given.endswith(".idx") else f"{given}.idx"
        matches = [pattern] if os.path.exists(pattern) or not glob.has_magic(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise ValueError(f"no data set matches {given}")
        found += [match.removesuffix(".idx") for match in matches]
    twice = [prefix for prefix, times in Counter(os.path.realpath(prefix) for prefix in found).items() if times > 1]
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}")
    if not found:
        raise ValueError("no data sets to merge")
    return found


def _in_order(sources: list[IndexedDataset]) -> list[IndexedDataset]:
    """Shards of a set by number, at the place of the first of them. Raises ValueError naming missing shards."""
    sets: dict[tuple[str, int], list[IndexedDataset]] = {}  # by name and number of shards, 0 for what is no shard
    for source in sources:
        shard = source.meta.shard if source.meta else None
        key = (_SHARD_NAME.sub("", source.prefix), shard[1]) if shard else (source.prefix, 0)
        sets.setdefault(key, []).append(source)
    bases = {name for name, _ in sets}
    problems = [
        f"{base}-{one} and {base}-{other} are two sides of a split, of which only one is for training; merge each for itself"
        for one, other in combinations(SIDES, 2)
        for base in sorted(name.removesuffix(f"-{one}") for name in bases if name.endswith(f"-{one}"))
        if f"{base}-{other}" in bases
    ]
    for (name, count), members in sets.items():
        if count == 0:
            continue
        members.sort(key=_shard_number)
        if len({member.meta.part_of for member in members if member.meta and member.meta.part_of}) > 1:
            problems.append(
                f"the shards of {name} were cut from different inputs or with different options; make all again (--force)"
            )
        numbers = Counter(map(_shard_number, members))
        missing = [shard_prefix(name, number, count) for number in range(count) if number not in numbers]
        if missing:
            problems.append(f"missing shards: {_some(missing)}; preprocess them, or add them to the command")
        doubled = [number for number, times in numbers.items() if times > 1]
        if doubled:
            names = [member.prefix for member in members if _shard_number(member) in doubled]
            problems.append(f"several data sets are the same shard: {_some(names)}")
    if problems:
        raise ValueError("; ".join(problems))
    return [source for members in sets.values() for source in members]


def _shard_number(source: IndexedDataset) -> int:
    assert source.meta is not None and source.meta.shard is not None
    return source.meta.shard[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def merged_meta(sources: Sequence[IndexedDataset]) -> DatasetMeta | None:
    """One description for all, None if no source has one. Raises ValueError naming two that do not belong together."""
    first = sources[0]
    for other in sources[1:]:
        pair = f"{first.prefix} and {other.prefix}"
        if (first.roles is None) != (other.roles is None):
            raise ValueError(f"{pair}: one has roles (chat data), the other has none; merge chat data with chat data only")
        if (first.meta is None) != (other.meta is None):
            bare = first if first.meta is None else other
            raise ValueError(f"{pair}: {bare.prefix}.meta.json is missing, so it is not known whether their tokenizers agree")
        if first.meta is None or other.meta is None:
            continue
        for name, why in (
            ("kind", "kinds of data"),
            ("variant", "variants of their conversations"),
            ("tokenizer_fingerprint", "tokenizers (sha256 of tokenizer.json)"),
            ("vocab_size", "vocabulary sizes"),
            ("eod_id", "ids at the end of documents"),
        ):
            one, two = getattr(first.meta, name), getattr(other.meta, name)
            if one != two:
                raise ValueError(f"{pair} have different {why}: {one} and {two}; preprocess both alike")
    metas = [source.meta for source in sources if source.meta is not None]
    if not metas:
        return None
    counted: dict[str, Counter[str]] = {name: Counter() for name in ("skipped", "formats")}
    for meta in metas:
        for name, counts in counted.items():
            counts.update(getattr(meta, name))
    return dataclasses.replace(
        metas[0],
        documents=sum(meta.documents for meta in metas),
        tokens=sum(meta.tokens for meta in metas),
        max_token_id=max(meta.max_token_id for meta in metas),
        weights=_merged_weights(sources),
        input_bytes=sum(meta.input_bytes for meta in metas),
        records=sum(meta.records for meta in metas),
        skipped=dict(sorted(counted["skipped"].items())),
        formats=dict(sorted(counted["formats"].items())),
        made_by=None,
        shard=None,
        part_of=None,
    )


def _merged_weights(sources: Sequence[IndexedDataset]) -> tuple[float, ...]:
    """The loss weights of all sources in the order of their first appearance. Raises ValueError if there are too many."""
    metas = [source.meta for source in sources if source.meta is not None]
    weights = tuple(dict.fromkeys(weight for meta in metas for weight in meta.weights))
    if len(weights) > MAX_WEIGHTS:
        raise ValueError(
            f"the data sets have {len(weights)} different loss weights of messages, {MAX_WEIGHTS} can be told apart; "
            "preprocess with rounded ones"
        )
    return weights


def _weight_bytes(source: IndexedDataset, weights: tuple[float, ...]) -> npt.NDArray[np.uint8] | None:
    """What becomes of each role byte of a source whose weights are chosen from `weights` now: uint8 [256]; None: nothing."""
    own = source.meta.weights if source.meta is not None else (1.0,)
    if own == weights[: len(own)]:
        return None
    places = np.zeros(MAX_WEIGHTS, np.uint8)
    places[: len(own)] = [weights.index(weight) for weight in own]
    codes = np.arange(256, dtype=np.uint8)
    return (codes & ((1 << WEIGHT_SHIFT) - 1)) | (places[codes >> WEIGHT_SHIFT] << WEIGHT_SHIFT)


def _join(sources: Sequence[IndexedDataset], output: str, meta: DatasetMeta | None, progress: bool) -> None:
    """Write the files of `output` and put them in place."""
    if not any(source.documents for source in sources):
        raise ValueError(f"none of the {len(sources)} data sets has a document, so there is no data set to make")
    dtype: np.dtype[Any] = np.result_type(*(source.dtype.newbyteorder("=") for source in sources))
    files = StagedFiles(output, dtype, roles=sources[0].roles is not None)
    total = sum(len(source.tokens) * dtype.itemsize for source in sources)
    try:
        files.cut(0, 0)
        with tqdm(total=total, desc="merge", unit="B", unit_scale=True, disable=not progress) as bar:
            for source in sources:
                _append(source, files, meta.weights if meta is not None else (1.0,))
                bar.update(len(source.tokens) * dtype.itemsize)
        files.finish(meta, _document_indices(sources))
        publish(output, roles=files.roles is not None, meta=meta is not None)
    finally:
        files.close()


def _append(source: IndexedDataset, files: StagedFiles, weights: tuple[float, ...]) -> None:
    """Append tokens, roles (that choose from `weights` then) and lengths of one data set. Raises ValueError if it is damaged."""
    with SourceFiles(source.prefix) as reader:
        source.verify()
        plain = HEADER.size + 12 * reader.sequences + 8 * (source.documents + 1)
        if os.fstat(reader.idx.fileno()).st_size != plain:
            raise ValueError(f"{source.prefix}.idx has sequence modes (multi-modal data) at byte {plain}, which would be lost")
        if source.dtype == files.dtype:
            _copy(reader.bin, files.bin, 0, len(source.tokens) * files.dtype.itemsize)
        else:
            for first in range(0, len(source.tokens), BLOCK):
                files.bin.write(source.tokens[first : first + BLOCK].astype(files.dtype).data)
        if reader.roles is not None and files.roles is not None and source.roles is not None:
            table = _weight_bytes(source, weights)
            if table is None:
                _copy(reader.roles, files.roles, 0, len(source.tokens))
            else:
                for first in range(0, len(source.roles), BLOCK):
                    files.roles.write(table[source.roles[first : first + BLOCK]].data)
        _copy(reader.idx, files.idx, HEADER.size, 4 * reader.sequences)


def _copy(source: IO[bytes], target: IO[bytes], start: int, size: int) -> None:
    """Append `size` bytes of `source` from `start` on, without bringing them into this process if that can be."""
    at, end = target.seek(0, os.SEEK_END), start + size
    try:
        while start < end:
            copied = os.copy_file_range(source.fileno(), target.fileno(), min(COPY_BYTES, end - start), start, at)
            if copied == 0:
                break  # how some file systems refuse
            start, at = start + copied, at + copied
    except OSError:
        pass  # across file systems, or one that cannot: the rest is copied by hand, where a real fault shows again
    source.seek(start)
    target.seek(at)
    while start < end:
        block = source.read(min(COPY_BYTES >> 4, end - start))
        if not block:
            raise ValueError(f"{source.name} became shorter while it was copied")
        target.write(block)
        start += len(block)


def _document_indices(sources: Sequence[IndexedDataset]) -> Iterator[IntArray]:
    """Document indices of all, each source's moved behind the sequences before it, in blocks."""
    yield np.zeros(1, np.int64)
    sequences = 0
    for source in sources:
        with SourceFiles(source.prefix) as reader:
            for first in range(1, reader.documents + 1, BLOCK):
                yield sequences + reader.document_indices(first, min(BLOCK, reader.documents + 1 - first))
            sequences += reader.sequences
