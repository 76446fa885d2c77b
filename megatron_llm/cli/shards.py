"""`--shard I/N` of the commands whose work can be split over tasks. Called by `preprocess.py`, `import_.py`, `export.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_llm.hf.together import Share


def parse_shard(text: str) -> tuple[int, int]:
    """I and N."""
    try:
        number, count = text.split("/")
        return int(number), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0/16") from None


def add_shard(parser: argparse.ArgumentParser) -> None:
    """The option of commands that write one folder together."""
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="be task I of N (from 0) that write the folder together, in any order; default: as torchrun or srun says",
    )


def share_of(args: argparse.Namespace) -> Share:
    """Which task this process is: by `--shard`, else by the launcher. Raises ValueError if there is no such task."""
    from megatron_llm.hf.together import Share
    from megatron_llm.training.launcher import launch_of

    if args.shard is not None:
        return Share(*args.shard)
    launch = launch_of()
    return Share(launch.rank, launch.world_size)


def unfinished(output: str | Path, share: Share) -> str:
    """What a task says that has ended before others."""
    from megatron_llm.hf.together import missing_shares

    waiting = ", ".join(f"{index}/{share.count}" for index in missing_shares(output, share.count))
    return f"shard {share.index}/{share.count} of {output} is written; it appears when the others are: {waiting}"
