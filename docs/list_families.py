"""Writes the list of architectures into docs/hugging_face.md, from the families themselves: python docs/list_families.py"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_llm.hf.families import families  # noqa: E402

PAGE = ROOT / "docs" / "hugging_face.md"
BEGIN, END = "<!-- families: written by docs/list_families.py -->\n", "<!-- end of families -->\n"


def table() -> str:
    """A row for every module of `hf/families/`: its architectures, and what the first sentence of its docstring says."""
    modules: dict[str, list[str]] = {}
    for architecture, family in families().items():
        modules.setdefault(family.from_hf.__module__, []).append(architecture)
    rows = sorted(_rows(modules), key=str.lower)
    return "\n".join(["| architectures | models |", "|---|---|", *rows]) + "\n"


def _rows(modules: dict[str, list[str]]) -> Iterator[str]:
    for module, architectures in modules.items():
        paragraph = " ".join((importlib.import_module(module).__doc__ or "").split("\n\n")[0].split())
        sentence = re.split(r"(?<=[^.])\.(?:\s|$)", paragraph)[0]
        yield f"| {', '.join(f'`{name}`' for name in architectures)} | {sentence} |"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
