"""CONFIG.yaml and what is put over it, on the command line of `train`, `plan` and `config show`."""

from __future__ import annotations

import argparse


def add_config(parser: argparse.ArgumentParser) -> None:
    """`config`, the path of a file, and `overrides`, as `config/load.py` takes them."""
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE.yaml|section.key=value",
        help="put over the first file, from left to right: files, merged key by key, and single settings",
    )
