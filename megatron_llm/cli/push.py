"""`megatron-llm push`: a Hugging Face folder to the hub."""

from __future__ import annotations

import argparse

HELP = "upload a Hugging Face folder to the hub, if it is whole"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `push`."""
    parser.add_argument("folder", metavar="HF_DIR", help="a folder, as `megatron-llm export` writes them")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME; made if need be")
    parser.add_argument("--private", action="store_true", help="nobody else sees a repository that is made")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")


def run(args: argparse.Namespace) -> int:
    """Upload and say where. Raises ValueError if the folder is not whole, or the hub does not take it."""
    from megatron_llm.hf.push import push

    url = push(args.folder, args.repository, private=args.private, revision=args.revision)
    print(f"{args.folder} -> {url}")
    return 0
