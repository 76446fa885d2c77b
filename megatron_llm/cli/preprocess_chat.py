"""`megatron-llm preprocess-chat`: conversations to `.bin/.idx` token files with the role of every token."""

from __future__ import annotations

import argparse

HELP = "tokenize conversations for instruction tuning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help='files, globs, folders or data sets, as for preprocess, of {"messages": [{"role": ..., "content": ...}, ...]}',
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder with a chat template")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.roles.bin, PREFIX.meta.json"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that render and tokenize (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--force", action="store_true", help="do it again, from the start, although it is done")


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.chat import preprocess_chat

    options = {"workers": args.workers, "strict": args.strict, "force": args.force}
    print(preprocess_chat(args.input, args.tokenizer, args.output, **options))
    return 0
