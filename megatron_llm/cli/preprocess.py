"""`megatron-llm preprocess`: text files to `.bin/.idx` token files."""

from __future__ import annotations

import argparse

HELP = "tokenize text files for pretraining"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz, .txt or .txt.gz files")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.meta.json")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: text)")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's eos token (default: on)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; one already tokenizes on all cores")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.preprocess import preprocess

    summary = preprocess(
        args.input,
        args.tokenizer,
        args.output,
        text_key=args.text_key,
        append_eod=args.append_eod,
        workers=args.workers,
        strict=args.strict,
    )
    print(summary)
    return 0
