"""From text files to token files: the pipeline that `preprocess` and `preprocess-chat` share, and the encoder for text.

One process reads and writes in order, encoders work on batches of records in between, in this process or in others. The result
does not depend on the number of workers. What is not taken is counted by reason and shown with file and line.
Called by `cli/preprocess.py`, `cli/preprocess_chat.py` and the scripts in tools/.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_llm.data.indexed import DatasetMeta, token_dtype
from megatron_llm.data.prepare.inputs import Record, batches, check_inputs, read_records
from megatron_llm.data.tokenizer import describe, load_encoder, load_pretrained
from megatron_llm.data.writer import IndexedWriter

BATCH_BYTES = 1 << 20
EXAMPLES = 20  # skipped records shown by name; all are counted


@dataclass
class Encoded:
    """Documents of one batch of records: (ids, role bytes or None) each, and what was not taken."""

    documents: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8] | None]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    bytes: int = 0


@dataclass(frozen=True)
class Skipped:
    """A record that gives no document. `bad`: something is wrong with it, so `--strict` refuses it."""

    where: str
    reason: str
    bad: bool = True


class Encoder(Protocol):
    """Turns records into documents. Sent to workers as it is made; `load` then gets what cannot be sent."""

    def load(self) -> None: ...

    def encode(self, records: list[Record]) -> Encoded: ...


@dataclass
class Summary:
    """What a run of the pipeline did. `bytes` are input bytes after decompression."""

    output: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.documents:,} documents, {self.tokens:,} tokens from {self.bytes:,} bytes"]
        if self.skipped:
            lines.append(f"skipped {self.skipped.total():,} records:")
            lines += [f"  {count:,}: {reason}" for reason, count in self.skipped.most_common()]
            lines.append("first of them:" if self.skipped.total() > len(self.examples) else "namely:")
            lines += [f"  {example}" for example in self.examples]
        return "\n".join(lines)


@dataclass
class TextEncoder:
    """Documents from the `text_key` of JSON records, or from whole text files; `eod_id` is appended if not None."""

    tokenizer: str
    text_key: str
    eod_id: int | None

    def load(self) -> None:
        self._encoder = load_encoder(self.tokenizer)

    def encode(self, records: list[Record]) -> Encoded:
        result = Encoded(bytes=sum(len(record.raw) for record in records))
        texts = []
        for record in records:
            try:
                text = self._text(record)
            except ValueError as error:
                result.skipped.append(Skipped(record.where, str(error)))
                continue
            if text:
                texts.append((record, text))
            else:
                result.skipped.append(Skipped(record.where, "empty text", bad=False))
        tail = [] if self.eod_id is None else [self.eod_id]
        for (record, _), encoding in zip(
            texts, self._encoder.encode_batch_fast([text for _, text in texts], add_special_tokens=False), strict=True
        ):
            if encoding.ids:
                result.documents.append((np.asarray(encoding.ids + tail, np.int32), None))
            else:
                result.skipped.append(Skipped(record.where, "no tokens in its text", bad=False))
        return result

    def _text(self, record: Record) -> str:
        if not record.line:
            return record.text()
        content = record.json()
        if self.text_key not in content:
            raise ValueError(f"no key {self.text_key!r}")
        text = content[self.text_key]
        if not isinstance(text, str):
            raise ValueError(f"{self.text_key!r} is not a string but {type(text).__name__}")
        check_unicode(text)
        return text


def check_unicode(text: str) -> None:
    r"""Raises ValueError for half of a surrogate pair (JSON can spell it, "\ud800"), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair in the text, which is not valid Unicode") from error


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    text_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    strict: bool = False,
    progress: bool = True,
) -> Summary:
    """Tokenize text files to `output`.bin/.idx/.meta.json, one document a record, in the order of the input.

    `strict`: a record that cannot be used ends it. Raises ValueError for that, for unusable input files or tokenizer folders,
    or if no document is left. Files of an earlier run are replaced only when all went well.
    """
    check_inputs(inputs)
    meta = describe(load_pretrained(tokenizer), tokenizer, "pretrain")
    if append_eod and meta.eos_id is None:
        raise ValueError(f"{tokenizer} names no eos token to end documents with; set one there, or use --no-append-eod")
    meta = replace(meta, eod_id=meta.eos_id if append_eod else None)
    encoder = TextEncoder(str(tokenizer), text_key, meta.eod_id)
    return run_pipeline(inputs, encoder, output, meta, roles=False, workers=workers, strict=strict, progress=progress)


def run_pipeline(
    inputs: Sequence[str | Path],
    encoder: Encoder,
    output: str | Path,
    meta: DatasetMeta,
    *,
    roles: bool,
    workers: int,
    strict: bool,
    progress: bool,
) -> Summary:
    """Encode all records and write one data set. See `preprocess` for errors."""
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    summary = Summary(str(output))
    total = sum(Path(path).stat().st_size for path in inputs)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=not progress) as bar,
        IndexedWriter(output, token_dtype(meta.vocab_size), meta, roles) as writer,
    ):
        for encoded in _encode_all(encoder, batches(read_records(inputs, bar.update), BATCH_BYTES), workers):
            for tokens, role_bytes in encoded.documents:
                writer.add_document(tokens, role_bytes)
            summary.bytes += encoded.bytes
            for skipped in encoded.skipped:
                if strict and skipped.bad:
                    raise ValueError(f"{skipped.where}: {skipped.reason}")
                summary.skipped[skipped.reason] += 1
                if len(summary.examples) < EXAMPLES:
                    summary.examples.append(f"{skipped.where}: {skipped.reason}")
        summary.documents, summary.tokens = writer.documents, writer.tokens
        if not summary.documents:
            raise ValueError(f"no document could be used, nothing was written\n{summary}")
    return summary


def _encode_all(encoder: Encoder, work: Iterable[list[Record]], workers: int) -> Iterator[Encoded]:
    """Encoded batches in the order of `work`, of which only a few are read ahead."""
    if workers == 1:  # the encoder's own threads use all cores
        encoder.load()
        yield from map(encoder.encode, work)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in work:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker process died, most likely for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch: one thread a worker
    encoder.load()
    _worker["encoder"] = encoder


def _encode_in_worker(records: list[Record]) -> Encoded:
    encoded: Encoded = _worker["encoder"].encode(records)
    return encoded
