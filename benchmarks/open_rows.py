"""Claim: a data set of 1e9 documents opens in under a second with under 100 MB of extra memory; a row takes under 100 us.

A data set of a trillion tokens is written block by block (20 GB of index; the tokens are a sparse file of zeros, so they take
no disk), its documents 100 to 1899 tokens long. A fresh process opens it, checks it and builds the training stream, and
reads rows of 4096 tokens at random places. Beside it megatron-core's GPTDataset does the same with a fiftieth of the
documents and one epoch of samples, the second time from its cache files. Every figure is of a fresh process, without imports;
runs alternate, the figure is the median.

    start      from nothing to the first row
    memory     growth of resident memory that is not page cache (RssAnon) from before the start to after all rows
    cache      files written
    row, cold  first visit of a random row; row, warm: second visit, median and 99th percentile

Ours is `row()`: permutation, tokens, labels, weights, document boundaries. `batch` is the same as a batch of torch tensors with
positions. Theirs is `dataset[i]`, without boundaries: document_isolation has no counterpart there that works on a CPU.

    python benchmarks/open_rows.py [--documents 20000000] [--peer-documents 400000] [--runs 3] [--folder DIR]

The claim: --documents 1000000000 --peer-documents 20000000 (needs 21 GB of disk). Exits 1 if it does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, machine, parser

from megatron_llm.data.indexed import HEADER, MAGIC, DatasetMeta

SEQUENCE = 4096
ROWS = 3000
BLOCK = 1 << 22
LIMITS = {"start_seconds": 1.0, "memory_mb": 100.0, "row_warm_us": 100.0}


def write_data_set(prefix: Path, documents: int) -> int:
    """uint16 documents of 100 to 1899 tokens, all zeros; returns the number of tokens."""

    def lengths(first: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=first))
        return generator.integers(100, 1900, min(BLOCK, documents - first))

    tokens = 0
    firsts = range(0, documents, BLOCK)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for first in firsts:
            file.write(lengths(first).astype("<i4").data)
        for first in firsts:
            ends = tokens + np.cumsum(lengths(first))
            file.write((2 * np.append(tokens, ends[:-1])).astype("<i8").data)
            tokens = int(ends[-1])
        for first in range(0, documents + 1, BLOCK):
            file.write(np.arange(first, min(first + BLOCK, documents + 1), dtype="<i8").data)
        # Out of the page cache, where 20 GB waiting to be written would push out what the rows read.
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    # As `preprocess` writes it: without it the start would read all tokens for the largest id.
    meta = DatasetMeta("pretrain", "none", "", 65000, documents=documents, tokens=tokens, max_token_id=0)
    Path(f"{prefix}.meta.json").write_text(json.dumps(dataclasses.asdict(meta)))
    return tokens


def anonymous_memory() -> float:
    """Resident memory of this process that is not page cache, in MB."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) / 1000


def time_rows(read: Callable[[int], object], rows: int, name: str) -> dict[str, float]:
    """Microseconds of the first and of the second visit of ROWS random rows."""
    places = random.Random(name).choices(range(rows), k=ROWS)
    times = []
    for _ in range(2):
        visit = []
        for place in places:
            start = time.perf_counter()
            read(place)
            visit.append((time.perf_counter() - start) * 1e6)
        times.append(visit)
    cold, warm = times
    return {
        f"{name}_cold_us": statistics.median(cold),
        f"{name}_warm_us": statistics.median(warm),
        f"{name}_warm_p99_us": statistics.quantiles(warm, n=100)[98],
    }


def measure_ours(prefix: str) -> dict[str, float]:
    from megatron_llm.config import parse_config
    from megatron_llm.data.indexed import IndexedDataset
    from megatron_llm.data.rows import PretrainRows
    from megatron_llm.data.stream import build_train_stream, check_data

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = parse_config(
        {
            "model": {"vocab_size": 65000, **shape},
            "training": {"sequence_length": SEQUENCE, "global_batch_size": 256, "steps": 1000},
            "optimizer": {"lr": 1.0},
            "data": {"train": [{"path": prefix}]},
        }
    )
    before = anonymous_memory()
    start = time.perf_counter()
    problems = check_data(config)
    stream = build_train_stream(config)
    stream.batch([0])
    figures = {"start_seconds": time.perf_counter() - start}
    assert not problems, problems
    dataset = IndexedDataset(prefix, 65000)
    dataset.expect_random_reads()
    rows = PretrainRows(dataset, SEQUENCE, 1234, shuffled=True, isolation=True, masked=True)
    figures |= time_rows(rows.row, rows.rows_per_epoch, "row")
    figures |= time_rows(lambda row: stream.batch([row]), rows.rows_per_epoch, "batch")
    return {**figures, "memory_mb": anonymous_memory() - before, "cache_mb": 0.0, "rows": rows.rows_per_epoch}


def measure_peer(prefix: str, cache: str, samples: int) -> dict[str, float]:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 65000, 0, 0, {"class": "none"}

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    before = anonymous_memory()
    start = time.perf_counter()
    low_level = IndexedDataset(prefix, mmap=True)
    indices = np.arange(len(low_level), dtype=np.int32)
    dataset = GPTDataset(low_level, prefix, indices, samples, Split.train, config)
    dataset[0]
    figures = {"start_seconds": time.perf_counter() - start}
    figures |= time_rows(dataset.__getitem__, len(dataset), "row")
    cached = sum(path.stat().st_size for path in Path(cache).iterdir()) / 1e6
    return {**figures, "memory_mb": anonymous_memory() - before, "cache_mb": cached, "rows": len(dataset)}


def in_fresh_process(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--measure", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compare(folder: Path, documents: int, peer_documents: int, runs: int) -> dict[str, Any]:
    """Write the data sets, measure in turn."""
    started = time.perf_counter()
    tokens = write_data_set(folder / "ours", documents)
    peer_tokens = write_data_set(folder / "peer", peer_documents)
    print(f"wrote {documents:,} and {peer_documents:,} documents in {time.perf_counter() - started:.0f} s", flush=True)
    samples = (peer_tokens - 1) // SEQUENCE
    measured: dict[str, list[dict[str, float]]] = {"megatron_llm": [], "gpt_dataset": [], "gpt_dataset_cached": []}
    for run in range(runs):
        cache = str(folder / f"cache{run}")
        measured["megatron_llm"].append(in_fresh_process("ours", str(folder / "ours")))
        measured["gpt_dataset"].append(in_fresh_process("peer", str(folder / "peer"), cache, str(samples)))
        measured["gpt_dataset_cached"].append(in_fresh_process("peer", str(folder / "peer"), cache, str(samples)))
    sizes = {"megatron_llm": (documents, tokens), "gpt_dataset": (peer_documents, peer_tokens)}
    sizes["gpt_dataset_cached"] = sizes["gpt_dataset"]
    return {
        name: {"documents": sizes[name][0], "tokens": sizes[name][1], **medians(found), "runs": found}
        for name, found in measured.items()
    }


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    options.add_argument("--documents", type=int, default=20_000_000, help="of our data set (default: %(default)s)")
    options.add_argument("--peer-documents", type=int, default=400_000, help="of GPTDataset's (default: %(default)s)")
    options.add_argument("--runs", type=int, default=3, help="fresh processes of each (default: %(default)s)")
    options.add_argument("--folder", type=Path, help="where the data sets are written, for the time of the run (default: /tmp)")
    options.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.measure:
        what, prefix, *rest = args.measure
        print(json.dumps(measure_ours(prefix) if what == "ours" else measure_peer(prefix, rest[0], int(rest[1]))))
        return 0

    conditions = machine("megatron-core", "numpy", "torch")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = compare(Path(folder), args.documents, args.peer_documents, args.runs)
    holds = {name: figures["megatron_llm"][name] < limit for name, limit in LIMITS.items()}
    names = list(figures)
    print(f"{'':20}" + "".join(f"{name:>20}" for name in names))
    for figure in figures["megatron_llm"]:
        if figure != "runs":
            row = (figures[name].get(figure) for name in names)
            print(f"{figure:20}" + "".join(" " * 20 if value is None else f"{value:20,.2f}" for value in row))
    return finish(
        args.output,
        "1e9 documents: start < 1 s, < 100 MB beyond page cache; a warm random row of 4096 tokens < 100 us",
        all(holds.values()) and args.documents >= 10**9,
        conditions,
        limits=LIMITS,
        **figures,
    )


if __name__ == "__main__":
    sys.exit(main())
