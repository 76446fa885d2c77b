"""Claim: `megatron-llm preprocess` runs at 60 MB/s or more, and at least 20 times as fast as Megatron-LM's default way.

A corpus of source code and prose in one jsonl file, a byte-level BPE tokenizer of 32,000 tokens, two CPU cores. What is timed are
whole processes, from the start of the interpreter to files that are forced to disk. Megatron-LM's script is not on PyPI, so the
peer is a reconstruction of what it does by default, from the parts that are: a pool of worker processes that parse and
tokenize line by line (`imap`, 32 lines a task) with the same Hugging Face tokenizer, and one process that writes through
megatron-core's `IndexedDatasetBuilder`. Ours and the peer's run in turn, and the ids of both must be equal. The peer may be given
the beginning of the corpus only, but then the start of its processes weighs more.

The corpus is made of the .py, .md, .txt and .rst files of this machine's Python, the tokenizer is trained on it; both are
kept in --folder for the next time.

    python benchmarks/preprocess.py [--megabytes 120] [--runs 3]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import add_corpus_options, corpus_and_tokenizer, finish, machine, parser

from megatron_llm.data.indexed import IndexedDataset

CLAIM_SPEED, CLAIM_RATIO = 60e6, 20

PEER = """
import json, multiprocessing, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer

class Encoder:
    def initializer(self):
        Encoder.tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
        Encoder.eod = Encoder.tokenizer.token_to_id("<|endoftext|>")
    def encode(self, line):
        ids = Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        if ids:
            ids.append(Encoder.eod)
        return ids

if __name__ == "__main__":
    encoder = Encoder()
    pool = multiprocessing.Pool(int(sys.argv[4]), initializer=encoder.initializer)
    builder = IndexedDatasetBuilder(sys.argv[3] + ".bin", dtype=DType.optimal_dtype(32000))
    with open(sys.argv[1], encoding="utf-8") as lines:
        for ids in pool.imap(encoder.encode, lines, 32):
            if ids:
                builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(sys.argv[3] + ".idx")
"""


def head(corpus: Path, path: Path, size: int) -> None:
    """The lines of the first `size` bytes of the corpus."""
    with corpus.open("rb") as lines:
        path.write_bytes(b"".join(lines.readlines(size)))


def ours(corpus: Path, tokenizer: Path, output: Path) -> float:
    """Seconds of the command."""
    program = Path(sys.executable).parent / "megatron-llm"
    return timed([program, "preprocess", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--force"])


def theirs(corpus: Path, tokenizer: Path, output: Path, workers: int) -> float:
    """Seconds of the peer."""
    script = output.parent / "peer.py"
    script.write_text(PEER)
    return timed([sys.executable, script, corpus, tokenizer, output, workers])


def timed(command: list[Any]) -> float:
    os.sync()  # the peer forces nothing to disk: what it leaves to be written must not slow the next
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return time.perf_counter() - start


def check_ids(mine: Path, other: Path) -> None:
    """Raises RuntimeError unless the peer's documents are the first of ours."""
    one, two = IndexedDataset(mine), IndexedDataset(other)
    size = len(two.tokens)
    if not (size and np.array_equal(one.tokens[:size], two.tokens)):
        raise RuntimeError(f"{mine} does not begin with the ids of {other}")
    if not np.array_equal(one.document_offsets()[: two.documents + 1], two.document_offsets()):
        raise RuntimeError(f"{mine} has other documents than {other}")


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    add_corpus_options(options)
    options.add_argument("--peer-megabytes", type=float, default=1e6, help="how much of it the peer gets (default: all)")
    options.add_argument("--runs", type=int, default=3, help="runs of each (default: %(default)s)")
    options.add_argument("--workers", type=int, default=2, help="worker processes of the peer (default: %(default)s)")
    args = options.parse_args()
    conditions = machine("gigatoken", "tokenizers", "megatron-core", "orjson", "numpy")
    corpus, tokenizer = corpus_and_tokenizer(args.folder, args.megabytes)
    part = args.folder / "part.jsonl"
    head(corpus, part, int(args.peer_megabytes * 1e6))

    print(f"{'MB/s':>8} {'peer':>8} {'ratio':>8}", flush=True)
    speeds = []
    for _ in range(args.runs):
        mine = corpus.stat().st_size / ours(corpus, tokenizer, args.folder / "ours")
        peer = part.stat().st_size / theirs(part, tokenizer, args.folder / "peer", args.workers)
        check_ids(args.folder / "ours", args.folder / "peer")
        speeds.append((mine, peer))
        print(f"{mine / 1e6:8.1f} {peer / 1e6:8.2f} {mine / peer:7.1f}x", flush=True)
    mine, peer = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(one / other for one, other in speeds)
    print(f"median {mine / 1e6:.1f} MB/s, peer {peer / 1e6:.2f} MB/s, {ratio:.1f} times; ids equal")
    return finish(
        args.output,
        "60 MB/s or more of jsonl, whole command; at least 20 times the reconstruction of Megatron-LM's default way",
        mine >= CLAIM_SPEED and ratio >= CLAIM_RATIO,
        conditions,
        bytes=corpus.stat().st_size,
        peer_bytes=part.stat().st_size,
        bytes_per_second={"megatron_llm": mine, "peer": peer},
        ratio=ratio,
        runs=speeds,
    )


if __name__ == "__main__":
    sys.exit(main())
