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
        help="files, globs, folders or data sets (hub:OWNER/NAME), as for preprocess, of conversations",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer folder with a chat template")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.roles.bin, PREFIX.meta.json"
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="NAME",
        help="format of the records: messages, sharegpt, alpaca, dolly, oasst, ... (default: auto, by the fields of each record; "
        "an unknown name lists all)",
    )
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="COLUMN=ROLE",
        help="who says what, for records of no known format: question=user answer=assistant context=user? (with a ? a column "
        "may be missing), or a YAML file with COLUMN: ROLE or ROLE: TEMPLATE",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also write PREFIX.flip (from replies to questions) or PREFIX.predict_instruction, document for document",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that render and tokenize (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--force", action="store_true", help="do it again, from the start, although it is done")


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.chat import preprocess_chat

    summary = preprocess_chat(
        args.input,
        args.tokenizer,
        args.output,
        record_format=args.format,
        mapping=args.map,
        variants=args.variants,
        workers=args.workers,
        strict=args.strict,
        force=args.force,
    )
    print(summary)
    return 0
