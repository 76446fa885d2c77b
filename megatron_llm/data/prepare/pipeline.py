"""The pipeline of `preprocess` and `preprocess-chat`: read, encode, write; interrupted at any moment, it continues.

One thread reads and writes in order; an encoder works on chunks meanwhile, in another thread or in other processes. The
files do not depend on which, nor on interruptions: every ten seconds what was written is forced to disk and noted in a
journal, and what lies behind the last note is cut off and made again. What is not taken is counted by reason.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_llm.data.indexed import MAX_WEIGHTS, WEIGHT_SHIFT, DatasetMeta, IndexedDataset, IntArray
from megatron_llm.data.prepare.chunks import Chunk, InputFile, Position, Skipped
from megatron_llm.data.prepare.inputs import read_chunks
from megatron_llm.data.writer import IndexedWriter, Journal, publish, remove_staged

EXAMPLES = 20  # skipped records shown by name; all are counted
REASONS = 100  # told apart; those that name a number of each record would fill summary and journal
JOURNAL_SECONDS = 10.0
JOURNAL_BYTES = 1 << 30
WAITING_BYTES = 32 << 20  # input a worker that may wait to be encoded, or on its way back,
MAX_WAITING_BYTES = 256 << 20  # and of all workers together


@dataclass
class Encoded:
    """Documents back to back: ids [n], tokens of each [d], role bytes [n] or None, and the records that gave none.

    `sides`: number of the output that each document goes to, uint8 [d]; None: the only one. `weights`: the loss weights other
    than 1 that role bytes choose from, numbered from 1 in this order, and the record that has each first. `notes`: how often
    there is something to tell about documents. `records`: how many records the documents and `skipped` together come from;
    None: one each. `formats`: records by their format. `missing`: empty documents of variants, by "VARIANT: reason".
    """

    tokens: IntArray
    lengths: IntArray
    skipped: list[Skipped]
    roles: npt.NDArray[np.uint8] | None = None
    sides: npt.NDArray[np.uint8] | None = None
    weights: Mapping[float, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    records: int | None = None
    formats: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)


class Encoder(Protocol):
    """Turns chunks into documents. Sent to other processes as it is made; `load` then gets what cannot be sent."""

    def load(self, threads: bool) -> str:
        """Get ready, for many threads or one; says in a few words what does the work."""

    def encode(self, chunk: Chunk) -> Encoded: ...


@dataclass
class Summary:
    """What a command did, over all its runs. `bytes` are input bytes after decompression; `seconds` are of this run.

    `documents` and `tokens` are without variants; the other counts are those of `Encoded`.
    """

    outputs: list[str]
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    how: str = field(default="", compare=False)
    seconds: float = field(default=0.0, compare=False)
    new_bytes: int = field(default=0, compare=False)

    @property
    def done_before(self) -> bool:
        """Whether there was nothing to do."""
        return not self.seconds

    def __str__(self) -> str:
        lines = [f"{', '.join(self.outputs)}: {self.documents:,} documents, {self.tokens:,} tokens from {self.bytes:,} bytes"]
        if self.done_before:
            lines[0] += "; already done (--force does it again)"
        else:
            lines.append(f"{self.seconds:.1f} s, {self.new_bytes / 1e6 / self.seconds:.1f} MB/s with {self.how}")
        return "\n".join(lines + self.record_lines() + self.skipped_lines())

    def record_lines(self) -> list[str]:
        """How records became documents, where that is not one each, and what formats they had."""
        lines, found = [], self.documents + self.skipped.total()
        if self.records not in (0, found):
            lines.append(f"{self.records:,} records gave {found:,} conversations")
        if self.formats:
            lines.append(f"formats: {', '.join(f'{name} {count:,}' for name, count in self.formats.most_common())}")
        lines += [f"{count:,} conversations: {note}" for note, count in self.notes.most_common()]
        lines += [f"{count:,} conversations without {what}" for what, count in self.missing.most_common()]
        return lines

    def skipped_lines(self) -> list[str]:
        """How many records were skipped for which reason, and the first of them; nothing if there were none."""
        lines = []
        if self.skipped:
            lines.append(f"skipped {self.skipped.total():,} records:")
            lines += [f"  {count:,}: {reason}" for reason, count in self.skipped.most_common()]
        if self.examples:
            lines.append("first of them:" if self.skipped.total() > len(self.examples) else "namely:")
            lines += [f"  {example}" for example in self.examples]
        return lines


@dataclass(frozen=True)
class Pipeline:
    """One command: what to read, encode and write. `name` is the user's --output; `outputs` are the prefixes to write.

    `columns` is what to read of tables, None: all. `meta.made_by` is the digest of all that determines the files.
    `kept_empty`: outputs without documents are no mistake. `variants`: what the last outputs are of the first one, if any.
    """

    name: str
    outputs: Sequence[str]
    inputs: list[InputFile]
    encoder: Encoder
    meta: DatasetMeta
    dtype: np.dtype[Any]
    columns: Sequence[str] | None = None
    roles: bool = False
    kept_empty: bool = False
    variants: Sequence[str] = ()
    workers: int = 1
    strict: bool = False
    progress: bool = True
    journal_seconds: float = JOURNAL_SECONDS

    @property
    def journal(self) -> str:
        return f"{self.name}.journal"

    def run(self, start_over: bool = False) -> Summary:
        """Write the outputs, going on where an earlier run was interrupted unless that is to be forgotten.

        Raises ValueError for bad records with `strict`, if an output gets no document, or if another process does the same.
        """
        assert self.meta.made_by is not None
        with closing(Journal(self.journal, self.meta.made_by)) as journal:
            entry = None if start_over else journal.entry
            if entry is None:
                self._forget(journal)
            finished = entry is not None and entry["finished"]
            summary = _restored(self.outputs, entry) if entry and finished else self._write(journal, entry)
            for prefix in self.outputs:
                publish(prefix, roles=self.roles, meta=True)
            journal.remove()
        return summary

    def _forget(self, journal: Journal) -> None:
        """Remove the temporary files of an interrupted run that is not continued."""
        old = journal.abandoned or journal.entry
        if journal.abandoned:
            print(f"{self.journal} is of other options or inputs: starting over", file=sys.stderr)
        for name in old["outputs"] if old else ():
            remove_staged(Path(self.journal).parent / Path(name).name)
        journal.forget()

    def _write(self, journal: Journal, entry: dict[str, Any] | None) -> Summary:
        summary = _restored(self.outputs, entry) if entry else Summary(list(self.outputs))
        counts = entry["outputs"] if entry else {}
        weights: list[float] = entry.get("weights", [1.0]) if entry else [1.0]
        start: Position | None = tuple(entry["position"]) if entry else None
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    IndexedWriter(
                        prefix,
                        self.dtype,
                        self.meta,
                        self.roles,
                        allow_empty=self.kept_empty,
                        empty_documents=variant is not None,
                        resume=counts.get(Path(prefix).name),
                    )
                )
                for prefix, variant in zip(self.outputs, self._variants(), strict=True)
            ]
            originals = writers[: len(writers) - len(self.variants)]
            bar = stack.enter_context(self._bar(entry["disk_bytes"] if entry else 0))

            def save(finished: bool = False) -> None:
                outputs = {Path(writer.prefix).name: writer.checkpoint() for writer in writers}
                content = {"outputs": outputs, "position": start, "disk_bytes": bar.n, "summary": vars(summary)}
                journal.save({**content, "weights": weights, "finished": finished})

            saved, saved_bytes = time.monotonic(), summary.bytes
            chunks = read_chunks(self.inputs, start, columns=self.columns)
            for chunk, encoded in _encode_all(self.encoder, chunks, self.workers, summary):
                if encoded.weights:
                    encoded = _with_table(encoded, weights)
                _add(encoded, writers)
                self._count(summary, encoded)
                summary.bytes += chunk.input_bytes
                summary.new_bytes += chunk.input_bytes
                start = chunk.end
                bar.update(chunk.disk_bytes)
                if time.monotonic() - saved >= self.journal_seconds or summary.bytes - saved_bytes >= JOURNAL_BYTES:
                    save()
                    saved, saved_bytes = time.monotonic(), summary.bytes
            summary.documents, summary.tokens = sum(w.documents for w in originals), sum(w.tokens for w in originals)
            self._check_outputs(summary, originals)
            for writer, variant in zip(writers, self._variants(), strict=True):
                writer.meta = replace(self._described(summary, variant), weights=tuple(weights))
                writer.finish()
            save(finished=True)
        return summary

    def _variants(self) -> list[str | None]:
        """The variant that each output holds."""
        return [None] * (len(self.outputs) - len(self.variants)) + list(self.variants)

    def _described(self, summary: Summary, variant: str | None) -> DatasetMeta:
        """The description of an output: all that was counted, or of a variant why some documents are empty."""
        if variant is None:
            skipped, formats = dict(sorted(summary.skipped.items())), dict(sorted(summary.formats.items()))
            return replace(self.meta, input_bytes=summary.bytes, skipped=skipped, records=summary.records, formats=formats)
        of = f"{variant}: "
        missing = {what.removeprefix(of): count for what, count in sorted(summary.missing.items()) if what.startswith(of)}
        return replace(self.meta, input_bytes=summary.bytes, variant=variant, skipped=missing)

    def _count(self, summary: Summary, encoded: Encoded) -> None:
        """Account for what was read and skipped, and what is to be told. Raises ValueError with `strict`."""
        summary.records += len(encoded.lengths) + len(encoded.skipped) if encoded.records is None else encoded.records
        for name in ("notes", "formats", "missing"):
            getattr(summary, name).update(getattr(encoded, name))
        for skipped in encoded.skipped:
            if self.strict and skipped.bad:
                raise ValueError(f"{skipped.where}: {skipped.reason}")
            known = skipped.reason in summary.skipped or len(summary.skipped) < REASONS
            summary.skipped[skipped.reason if known else "other reasons"] += 1
            if len(summary.examples) < EXAMPLES:
                summary.examples.append(f"{skipped.where}: {skipped.reason}")

    def _check_outputs(self, summary: Summary, writers: Sequence[IndexedWriter]) -> None:
        if self.kept_empty:
            return
        if not summary.documents:
            raise ValueError("\n".join(["no document could be used, nothing was written", *summary.skipped_lines()]))
        for writer in writers:
            if not writer.documents:
                raise ValueError(
                    f"--split leaves {writer.prefix} none of {summary.documents:,} documents; give it a larger share"
                )

    def _bar(self, done: int) -> tqdm[Any]:
        return tqdm(
            total=sum(file.end - file.start for file in self.inputs),
            initial=done,
            unit="B",
            unit_scale=True,
            desc="tokenize",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
            disable=not self.progress,
        )


def digest(**parts: Any) -> str:
    """sha256 of values that JSON can hold: what tells one command from another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def made_by(prefix: str | Path, command: str | None) -> bool:
    """Whether this data set is there, whole, and the work of the command with this digest."""
    try:
        meta = IndexedDataset(prefix).meta
    except ValueError:
        return False
    return meta is not None and meta.made_by == command


def summary_of(outputs: Sequence[str]) -> Summary:
    """What finished outputs of one command say about it."""
    every = [meta for prefix in outputs if (meta := IndexedDataset(prefix).meta) is not None]
    metas = [meta for meta in every if meta.variant is None]
    return Summary(
        list(outputs),
        documents=sum(meta.documents for meta in metas),
        tokens=sum(meta.tokens for meta in metas),
        bytes=metas[0].input_bytes,
        skipped=Counter(metas[0].skipped),
        records=metas[0].records,
        formats=Counter(metas[0].formats),
        missing=Counter(
            {f"{meta.variant}: {why}": count for meta in every if meta.variant for why, count in meta.skipped.items()}
        ),
    )


def _restored(outputs: Sequence[str], entry: dict[str, Any]) -> Summary:
    """The summary of a journal's entry."""
    content = dict(entry["summary"], outputs=list(outputs), new_bytes=0)
    counted = {name: Counter(content[name]) for name in ("skipped", "notes", "formats", "missing")}
    return Summary(**{**content, **counted})


def _with_table(encoded: Encoded, weights: list[float]) -> Encoded:
    """The documents with role bytes that choose from `weights`, to which theirs are added.

    Chunks come in order, so the table is that of the order of the input. Raises ValueError naming the record with one too many.
    """
    places = np.zeros(MAX_WEIGHTS, np.uint8)  # by the chunk's number of a weight
    for number, (weight, where) in enumerate(encoded.weights.items(), 1):
        if weight not in weights:
            if len(weights) == len(places):
                raise ValueError(
                    f"{where}: 'weight' {weight:g} is one too many, {len(places)} with 1 can be told apart "
                    f"({', '.join(f'{known:g}' for known in sorted(weights))}); round them"
                )
            weights.append(weight)
        places[number] = weights.index(weight)
    assert encoded.roles is not None
    kept = encoded.roles & ((1 << WEIGHT_SHIFT) - 1)
    return replace(encoded, roles=kept | places[encoded.roles >> WEIGHT_SHIFT] << WEIGHT_SHIFT)


def _add(encoded: Encoded, writers: Sequence[IndexedWriter]) -> None:
    """Give each writer its documents."""
    if encoded.sides is None:
        writers[0].add_documents(encoded.tokens, encoded.lengths, encoded.roles)
        return
    for side, writer in enumerate(writers):
        chosen = encoded.sides == side
        tokens = np.repeat(chosen, encoded.lengths)
        roles = None if encoded.roles is None else encoded.roles[tokens]
        writer.add_documents(encoded.tokens[tokens], encoded.lengths[chosen], roles)


def _encode_all(encoder: Encoder, chunks: Iterator[Chunk], workers: int, summary: Summary) -> Iterator[tuple[Chunk, Encoded]]:
    """Chunks, without their records, and what became of them, in order. Only a few are read ahead."""
    pool: Executor
    load: Callable[[], str]
    if workers == 1:  # the encoder's own threads use all cores; this one reads and writes meanwhile
        pool, load, encode = ThreadPoolExecutor(1), partial(encoder.load, threads=True), encoder.encode
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,))
        load, encode = _load_in_worker, _encode_in_worker
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    waiting, most = 0, min(workers * WAITING_BYTES, MAX_WAITING_BYTES)
    try:
        how = pool.submit(load).result()
        summary.how = f"{workers} processes of {how}" if workers > 1 else how
        for chunk in chunks:
            pending.append((replace(chunk, records=()), pool.submit(encode, chunk)))
            waiting += chunk.input_bytes
            while len(pending) > 2 * workers or (waiting > most and pending):
                done, future = pending.popleft()
                waiting -= done.input_bytes
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise ValueError("a worker process died, most likely for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch: one thread a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["encoder"] = encoder


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _load_in_worker() -> str:
    """Load the encoder if this process has not; errors reach the parent as they do from `encode`."""
    if "how" not in _worker:
        _worker["how"] = _worker["encoder"].load(threads=False)
    how: str = _worker["how"]
    return how


def _encode_in_worker(chunk: Chunk) -> Encoded:
    _load_in_worker()
    encoded: Encoded = _worker["encoder"].encode(chunk)
    return encoded
