"""`megatron-llm import`: weights from elsewhere as a native checkpoint. No GPU; one process, or several tasks."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_llm.cli.shards import add_shard, share_of, unfinished

HELP = "make a checkpoint from a Hugging Face folder or a Megatron checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `import`."""
    parser.add_argument("source", metavar="DIR", help="a Hugging Face folder, or a Megatron checkpoint (its newest iteration)")
    parser.add_argument("output", metavar="CHECKPOINT_DIR", help="checkpoint to write")
    parser.add_argument("--from", dest="origin", choices=("hf", "megatron"), default="hf", help="what DIR is (default: hf)")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder that travels with the checkpoint and its exports")
    parser.add_argument(
        "--resize-vocab",
        type=_size_or_tokenizer,
        metavar="N|tokenizer",
        help="from hf: tokens that the model is to have, or as many as the tokenizer; new rows are the mean of the others",
    )
    add_shard(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    megatron = parser.add_argument_group("from megatron")
    megatron.add_argument(
        "--config", metavar="HF_DIR", help="Hugging Face folder whose config.json describes the model, if DIR holds no arguments"
    )
    megatron.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens of the vocabulary, without padding, if DIR does not say"
    )


def _size_or_tokenizer(text: str) -> int | str:
    if text != "tokenizer" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor `tokenizer`")
    return text if text == "tokenizer" else int(text)


def run(args: argparse.Namespace) -> int:
    """Import and say what was done. Raises ValueError if the source cannot be used or the output is in the way."""
    from megatron_llm.exchange import import_hf, import_megatron

    share = share_of(args)
    options: dict[str, Any] = {"tokenizer": args.tokenizer, "share": share, "overwrite": args.overwrite}
    options["progress"] = share.index == 0
    if args.origin == "megatron":
        if args.resize_vocab is not None:
            raise ValueError(
                "--resize-vocab belongs to --from hf; resize what a Megatron checkpoint becomes with model.resize_vocab"
            )
        said = import_megatron(args.source, args.output, config=args.config, vocab_size=args.vocab_size, **options)
    else:
        wrong = [name for name in ("config", "vocab_size") if getattr(args, name) is not None]
        if wrong:
            raise ValueError(f"--{wrong[0].replace('_', '-')} belongs to --from megatron; a Hugging Face folder says it itself")
        said = import_hf(args.source, args.output, resize_vocab=args.resize_vocab, **options)
    print("\n".join(said) or unfinished(args.output, share))
    return 0
