"""`megatron-llm merge`: several data sets, or the shards of one, as one."""

from __future__ import annotations

import argparse

HELP = "join token files, shards or whole data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="data sets, or globs of them; shards are sorted by number")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.meta.json")
    parser.add_argument("--shuffle-documents", type=int, metavar="SEED", help="bring the documents into random order, on disk")


def run(args: argparse.Namespace) -> int:
    from megatron_llm.data.prepare.merge import merge

    print(merge(args.prefixes, args.output, shuffle_seed=args.shuffle_documents))
    return 0
