"""From files of text to token files: the options of the `preprocess` command, and the encoder that the pipeline drives.

Called by `cli/preprocess.py` and `tools/preprocess_data.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llm.data.indexed import token_dtype
from megatron_llm.data.prepare.chunks import Chunk, Skipped, chunk_texts
from megatron_llm.data.prepare.encoding import open_tokenizer
from megatron_llm.data.prepare.inputs import describe_inputs, find_inputs, shard_inputs
from megatron_llm.data.prepare.merge import SIDES, shard_prefix
from megatron_llm.data.prepare.pipeline import JOURNAL_SECONDS, Encoded, Pipeline, Summary, digest, made_by, summary_of
from megatron_llm.data.prepare.references import Refused
from megatron_llm.data.prepare.shuffle import shuffle_dataset
from megatron_llm.data.tokenizer import describe
from megatron_llm.data.writer import check_prefix, remove_dataset

FORMAT_VERSION = 2  # to be raised when the same input and options should give other files


@dataclass
class TextEncoder:
    """Documents from the `text_key` of records, or from whole text files; `eod_id` is appended if not None.

    `bounds`: a document goes to output i if i of these 64-bit numbers, ascending, are at most the hash of its text.
    """

    tokenizer: str
    text_key: str
    eod_id: int | None
    fast: bool = True
    bounds: Sequence[int] = ()

    def load(self, threads: bool) -> str:
        self._tokenizer = open_tokenizer(self.tokenizer, fast=self.fast, threads=threads)
        return self._tokenizer.how

    def encode(self, chunk: Chunk) -> Encoded:
        texts, indices, skipped = chunk_texts(chunk, self.text_key)
        while True:
            try:
                tokens, offsets = self._tokenizer.encode(texts, lambda number: chunk.where(indices[number]))
                break
            except Refused as refused:
                skipped.append(Skipped(chunk.where(indices[refused.index]), str(refused)))
                del texts[refused.index], indices[refused.index]
        lengths = np.diff(offsets)
        sides = self._sides(texts) if self.bounds else None
        del texts  # before the ids are copied: of one huge document both are large
        there = lengths > 0
        if not there.all():
            for number in np.flatnonzero(~there).tolist():
                skipped.append(Skipped(chunk.where(indices[number]), "no tokens in its text", bad=False))
            lengths = lengths[there]
            sides = None if sides is None else sides[there]
        if self.eod_id is not None:
            tokens = np.insert(tokens, np.cumsum(lengths), self.eod_id)
            lengths = lengths + 1
        return Encoded(tokens, lengths, skipped, sides=sides)

    def _sides(self, texts: Sequence[str]) -> Any:
        from xxhash import xxh3_64_intdigest

        hashes = np.fromiter((xxh3_64_intdigest(text.encode()) for text in texts), np.uint64, len(texts))
        return np.searchsorted(np.array(self.bounds, np.uint64), hashes, side="right").astype(np.uint8)


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    text_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    dtype: str = "auto",
    shuffle_seed: int | None = None,
    split: Sequence[float] | None = None,
    shard: tuple[int, int] | None = None,
    fast: bool = True,
    strict: bool = False,
    force: bool = False,
    progress: bool = True,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Summary:
    """Tokenize files to `output`.bin/.idx/.meta.json, one document a record, in the order of the input.

    `shuffle_seed`: documents in random order instead. `split`: shares of `output`-train, -valid and -test; a hash of its text
    decides where a document goes, so equal ones stay together. `shard`: (number, count) of the part of the input to take;
    `merge` joins them. Work that is done already is not done again but with `force`; interrupted work is continued.

    Raises ValueError for options, inputs or tokenizers that cannot be used, for bad records with `strict`, or if an output
    gets no document (a shard may). Files of an earlier run are replaced only when all went well.
    """
    check_prefix(output)
    _check_options(workers, split, shard, shuffle_seed)
    files = find_inputs(inputs)
    meta = describe(tokenizer, "pretrain")
    width = _dtype(dtype, meta.vocab_size)
    if append_eod and meta.eos_id is None:
        raise ValueError(f"{tokenizer} names no eos token to end documents with; set one there, or use --no-append-eod")
    meta = replace(meta, eod_id=meta.eos_id if append_eod else None, shard=shard)
    if shard is not None:
        whole = [[Path(file.path).name, file.size, file.rows] for file in files]  # paths may differ from machine to machine
        meta = replace(meta, part_of=digest(inputs=whole, dtype=width.name, options=[text_key, split]))
        files = shard_inputs(files, *shard)
    command = digest(
        version=FORMAT_VERSION,
        inputs=describe_inputs(files),
        meta=asdict(meta),
        dtype=width.name,
        options=[text_key, shuffle_seed, split, fast, strict],
    )
    finals = _outputs(str(output), split, shard)
    staged = finals if shuffle_seed is None else [f"{prefix}.unshuffled" for prefix in finals]
    pipeline = Pipeline(
        name=str(output) if shard is None else shard_prefix(output, *shard),
        outputs=staged,
        inputs=files,
        encoder=TextEncoder(str(tokenizer), text_key, meta.eod_id, fast, _bounds(split or ())),
        meta=replace(meta, made_by=command),
        dtype=width,
        columns=[text_key],
        kept_empty=shard is not None,
        workers=workers,
        strict=strict,
        progress=progress,
        journal_seconds=journal_seconds,
    )
    return carry_out(pipeline, force, finals, shuffle_seed)


def carry_out(pipeline: Pipeline, force: bool, finals: Sequence[str] = (), shuffle_seed: int | None = None) -> Summary:
    """Do what is not done yet: the pipeline, then shuffling its outputs to `finals` if there is a seed.

    Interrupted work of this command goes before finished files: those may be of an earlier run that `force` was replacing.
    """
    began = time.perf_counter()
    command = pipeline.meta.made_by
    ends = list(finals if shuffle_seed is not None else pipeline.outputs)
    made = (made_by(prefix, command) or made_by(end, command) for prefix, end in zip(pipeline.outputs, ends, strict=True))
    summary = None
    if force or Path(pipeline.journal).exists() or not all(made):
        summary = pipeline.run(start_over=force)
    if shuffle_seed is not None:
        for prefix, end in zip(pipeline.outputs, ends, strict=True):
            if made_by(prefix, command):
                shuffle_dataset(prefix, end, shuffle_seed, made_by=command, progress=pipeline.progress)
            remove_dataset(prefix)
    if summary is None:
        return summary_of(ends)
    summary.outputs = ends
    summary.seconds = time.perf_counter() - began
    return summary


def _check_options(workers: int, split: Sequence[float] | None, shard: tuple[int, int] | None, seed: int | None) -> None:
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    if shard is not None and shard[1] < 1:
        raise ValueError(f"--shard {shard[0]}/{shard[1]}: at least one shard is needed")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"--shard {shard[0]}/{shard[1]}: shards of {shard[1]} are numbered from 0 to {shard[1] - 1}")
    if shard is not None and seed is not None:
        raise ValueError("--shard with --shuffle-documents: shuffle when all are joined, with `merge --shuffle-documents`")
    if split is not None:
        shown = ",".join(f"{share:g}" for share in split)
        if not 2 <= len(split) <= len(SIDES) or min(split) < 0 or not math.isclose(sum(split), 1, abs_tol=1e-6):
            raise ValueError(f"--split {shown}: two or three shares of train, valid and test are needed that add up to 1")


def _dtype(name: str, vocab_size: int) -> np.dtype[Any]:
    """The type of the ids. Raises ValueError if it cannot hold the vocabulary."""
    if name == "auto":
        return token_dtype(vocab_size)
    dtype = np.dtype(name)
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise ValueError(
            f"--dtype {name} holds ids up to {np.iinfo(dtype).max}, but the tokenizer has {vocab_size:,}; use int32 or auto"
        )
    return dtype


def _outputs(output: str, split: Sequence[float] | None, shard: tuple[int, int] | None) -> list[str]:
    """Prefixes to write: of each side with a share, and of the shard."""
    sides = [output]
    if split is not None:
        sides = [f"{output}-{side}" for side, share in zip(SIDES, split, strict=False) if share > 0]
    return [side if shard is None else shard_prefix(side, *shard) for side in sides]


def _bounds(split: Sequence[float]) -> list[int]:
    """Where the 64-bit hashes of the next side begin, for all sides with a share but the first."""
    shares = [share for share in split if share > 0]
    return [min(int(bound * 2**64), 2**64 - 1) for bound in accumulate(shares[:-1])]
