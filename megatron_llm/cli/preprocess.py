"""`megatron-llm preprocess`: files of text to `.bin/.idx` token files."""

from __future__ import annotations

import argparse

from megatron_llm.cli.shards import parse_shard

HELP = "tokenize text files for pretraining"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs or folders of .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow, also compressed "
        "(.gz .zst .bz2 .xz); data set folders of `datasets`, or hub:OWNER/NAME",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="Hugging Face folder, tokenizer.json, sentencepiece .model or tiktoken file",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.meta.json")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field that holds the text (default: text)")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's eos token (default: on)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "uint16", "int32"),
        default="auto",
        help="type of the ids (default: uint16 if it can hold them)",
    )
    parser.add_argument(
        "--split",
        type=_split,
        metavar="A,B[,C]",
        help="write PREFIX-train, -valid (and -test) with these shares of the documents",
    )
    parser.add_argument("--shuffle-documents", type=int, metavar="SEED", help="bring the documents into random order, on disk")
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="take part I of N (from 0) of the input, for jobs side by side; `merge` joins them",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; one already tokenizes on all cores if it can (default: 1)"
    )
    parser.add_argument("--no-fast", action="store_true", help="tokenize with the tokenizer's own library only")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--force", action="store_true", help="do it again, from the start, although it is done")


def _split(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not shares like 0.99,0.01") from None


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.preprocess import preprocess

    summary = preprocess(
        args.input,
        args.tokenizer,
        args.output,
        text_key=args.text_key,
        append_eod=args.append_eod,
        workers=args.workers,
        dtype=args.dtype,
        shuffle_seed=args.shuffle_documents,
        split=args.split,
        shard=args.shard,
        fast=not args.no_fast,
        strict=args.strict,
        force=args.force,
    )
    print(summary)
    return 0
