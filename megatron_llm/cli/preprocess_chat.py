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
    parser.add_argument("--output", metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.roles.bin, PREFIX.meta.json")
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
    parser.add_argument(
        "--template", metavar="NAME", help="chatml, llama3, ... or a FILE.jinja, instead of the tokenizer's own chat template"
    )
    parser.add_argument(
        "--save-tokenizer",
        metavar="DIR",
        help="write the tokenizer with --template and the special tokens that it lacks, and use it; for data.tokenizer",
    )
    parser.add_argument(
        "--allow-special", action="store_true", help="let text like <|im_end|> in a message become the special token"
    )
    parser.add_argument("--show", type=int, metavar="N", help="print the first N conversations token by token")
    parser.add_argument("--show-ids", action="store_true", help="with --show: the id of each token too")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that render and tokenize (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    parser.add_argument("--force", action="store_true", help="do it again, from the start, although it is done")


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.chat import preprocess_chat
    from megatron_llm.data.prepare.show import show_conversations, use_colours

    if args.output is None and args.show is None:
        raise ValueError("--output PREFIX is needed, or --show N to look only")
    records = {"record_format": args.format, "mapping": args.map}
    chat = {**records, "template": args.template, "save_to": args.save_tokenizer, "allow_special": args.allow_special}
    if args.show is not None:
        for line in show_conversations(
            args.input, args.tokenizer, args.show, colour=use_colours(), with_ids=args.show_ids, strict=args.strict, **chat
        ):
            print(line)
    if args.output is not None:
        options = {"variants": args.variants, "workers": args.workers, "strict": args.strict, "force": args.force}
        print(preprocess_chat(args.input, args.tokenizer, args.output, **chat, **options))
    return 0
