"""Claim: byte-level BPE of 32,000 tokens at 150 MB/s or more, BPE of sentencepiece's type 3 times as fast as `tokenizers`.

What is timed is `encode` alone, in this process, on two cores, with the guard and the sampled check of
`data/prepare/encoding.py`, a few megabytes a call, starting with a fresh tokenizer. The peer is the tokenizer's own library
(`encode_batch_fast` of `tokenizers` with its threads, `encode` of sentencepiece with two) on the first megabytes of the same
texts, in turn with ours; the ids must be equal. A model of sentencepiece and the tokenizer.json that stands for it are
measured apart. Unigram is given to sentencepiece by us too, so there is nothing to gain and the ratio is about 1.

    python benchmarks/tokenizer_speed.py [--megabytes 120] [--peer-megabytes 16] [--runs 3]

Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from common import add_corpus_options, corpus_and_tokenizer, finish, machine, parser
from tokenizers import Tokenizer

from megatron_llm.data.prepare.encoding import open_tokenizer
from megatron_llm.data.prepare.guard import convert_model

CLAIM_SPEED, CLAIM_RATIO = 150e6, 3
CHUNK = 4 << 20
Encode = Callable[[list[str]], np.ndarray]


def train_model(texts: list[str], prefix: Path, kind: str) -> Path:
    """A .model as Llama's is, of 32,000 pieces, trained on the first 10 MB; Unigram of 8,000 pieces on less, being slow."""
    path = prefix.with_suffix(".model")
    if not path.exists():
        size = 10_000_000 if kind == "bpe" else 3_000_000
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in head(texts, size) for line in text.splitlines() if line),
            model_prefix=str(prefix),
            model_type=kind,
            vocab_size=32_000 if kind == "bpe" else 8_000,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    return path


def head(texts: list[str], size: int) -> list[str]:
    """The first texts, `size` characters together."""
    lengths = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(lengths, size)) + 1]


def chunks(texts: list[str]) -> Iterator[list[str]]:
    while texts:
        chunk = head(texts, CHUNK)
        yield chunk
        texts = texts[len(chunk) :]


def ours(path: Path) -> Encode:
    tokenizer = open_tokenizer(path)
    return lambda texts: tokenizer.encode(texts, str)[0]


def by_tokenizers(path: Path) -> Encode:
    encoder = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    return lambda texts: np.concatenate([e.ids for e in encoder.encode_batch_fast(texts, add_special_tokens=False)])


def by_sentencepiece(path: Path) -> Encode:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda texts: np.concatenate(processor.encode(texts, num_threads=2))


def timed(make: Callable[[Path], Encode], path: Path, texts: list[str]) -> tuple[float, np.ndarray]:
    """Bytes of UTF-8 a second, and the ids."""
    encode = make(path)
    size = sum(len(text.encode()) for text in texts)
    start = time.perf_counter()
    ids = [encode(chunk) for chunk in chunks(texts)]
    return size / (time.perf_counter() - start), np.concatenate(ids)


def measure(path: Path, peer: Callable[[Path], Encode], texts: list[str], peer_size: int, runs: int) -> dict[str, Any]:
    """Medians of `runs` runs of each, in turn. Raises RuntimeError if the ids differ."""
    pairs = []
    for _ in range(runs):
        mine, ids = timed(ours, path, texts)
        theirs, expected = timed(peer, path, head(texts, peer_size))
        if not np.array_equal(ids[: len(expected)], expected):
            raise RuntimeError(f"{path}: the ids differ")
        pairs.append((mine, theirs))
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return {"how": open_tokenizer(path).how, "megatron_llm": mine, "peer": theirs, "ratio": ratio, "runs": pairs}


def main() -> int:
    """Measure, print a table, write the JSON."""
    options = parser(__doc__)
    add_corpus_options(options)
    options.add_argument("--peer-megabytes", type=float, default=16, help="how much of it the peers get (default: %(default)s)")
    options.add_argument("--runs", type=int, default=3, help="runs of each (default: %(default)s)")
    args = options.parse_args()
    conditions = machine("gigatoken", "tokenizers", "sentencepiece", "numpy")
    corpus, folder = corpus_and_tokenizer(args.folder, args.megabytes)
    with corpus.open("rb") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    bpe, unigram = (train_model(texts, args.folder / kind, kind) for kind in ("bpe", "unigram"))
    converted = args.folder / "bpe.json"
    converted.write_text(json.dumps(convert_model(bpe, sentencepiece.SentencePieceProcessor(model_file=str(bpe)))))

    cases = {
        "byte-level BPE": (folder, by_tokenizers),
        "sentencepiece BPE as tokenizer.json": (converted, by_tokenizers),
        "sentencepiece BPE .model": (bpe, by_sentencepiece),
        "sentencepiece Unigram .model": (unigram, by_sentencepiece),
    }
    print(f"{'':36} {'MB/s':>8} {'peer':>8} {'ratio':>8}", flush=True)
    results = {}
    for name, (path, peer) in cases.items():
        part = texts if "Unigram" not in name else head(texts, int(args.peer_megabytes * 1e6))
        result = results[name] = measure(path, peer, part, int(args.peer_megabytes * 1e6), args.runs)
        print(f"{name:36} {result['megatron_llm'] / 1e6:8.1f} {result['peer'] / 1e6:8.2f} {result['ratio']:7.1f}x", flush=True)
    fast, pieces = (results[name] for name in list(cases)[:2])
    return finish(
        args.output,
        "byte-level BPE at 150 MB/s or more, sentencepiece-type BPE at least 3 times tokenizers; equal ids",
        fast["megatron_llm"] >= CLAIM_SPEED and pieces["ratio"] >= CLAIM_RATIO,
        conditions,
        bytes_per_second=results,
    )


if __name__ == "__main__":
    sys.exit(main())
