"""Real text that every machine has: the sources of Python's own standard library, as documents and as instructions.

Called by `run.py`. A hash of a module's path decides what it is used for, so that the parts share no module and adding a
module moves no other one: about half is for stage 1, two fifths for stage 2 (and both for instructions), a tenth is held
out for the validation of all stages.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests, vendored or generated code and tables: not what a reader of Python would learn from.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),
}
PARTS = ("stage1", "stage2", "valid")
MIN_PAIRS = 2000
VALID_PAIRS = 200  # about

Messages = list[dict[str, str]]


def write_documents(folder: Path) -> str:
    """Write `folder/{stage1,stage2,valid}.jsonl`, a line `{"path", "text"}` for each module; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: open(folder / f"{part}.jsonl", "w", encoding="utf-8") for part in PARTS}  # noqa: SIM115
    counts = dict.fromkeys(PARTS, 0)
    characters = 0
    for path, text in _modules():
        part = _part(path)
        files[part].write(json.dumps({"path": path, "text": text}) + "\n")
        counts[part] += 1
        characters += len(text)
    for file in files.values():
        file.close()
    return f"{characters / 1e6:.1f} million characters; modules: {', '.join(f'{part} {n}' for part, n in counts.items())}"


def write_instructions(documents: Path, folder: Path, count_tokens: Callable[[list[Messages]], list[int]], longest: int) -> str:
    """Write `folder/{train,valid}.jsonl`: signature and docstring -> body, for functions of the documents.

    Conversations of more than `longest` tokens (a training row) are left out and counted. Raises ValueError if fewer than
    MIN_PAIRS are left to train on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    found: dict[str, list[Messages]] = {"valid": [], "train": []}
    for part in ("valid", "stage1", "stage2"):  # held-out functions first: a copy elsewhere must not be trained on
        for line in (documents / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
            for head, body in _functions(json.loads(line)["text"]):
                if head not in seen:
                    seen.add(head)
                    question = f"Write the body of this Python function.\n\n{head}"
                    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": body}]
                    found["valid" if part == "valid" else "train"].append(messages)
    kept = {
        name: [messages for messages, tokens in zip(every, count_tokens(every), strict=True) if tokens <= longest]
        for name, every in found.items()
    }
    if len(kept["train"]) < MIN_PAIRS:
        raise ValueError(f"only {len(kept['train'])} instructions in this Python's library, expected at least {MIN_PAIRS}")
    too_long = sum(len(found[name]) - len(kept[name]) for name in found)
    kept["valid"] = kept["valid"][:: max(1, len(kept["valid"]) // VALID_PAIRS)]
    for name, every in kept.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": messages}) + "\n" for messages in every)
    return f"{len(kept['train'])} pairs to train on, {len(kept['valid'])} held out; {too_long} longer than a row left out"


def _modules() -> Iterator[tuple[str, str]]:
    """(path inside the library, text) of every module that is not skipped, in order of the path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(path.parts) and not path.parts[0].startswith("config-"):
            with tokenize.open(file) as source:  # honours the coding line, as Python does
                text = source.read()
            if text.strip():
                yield path.as_posix(), text


def _part(path: str) -> str:
    """What a module is used for."""
    bucket = hashlib.sha256(path.encode()).digest()[0] * 100 // 256
    return "valid" if bucket < 10 else "stage1" if bucket < 60 else "stage2"


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """(signature with docstring, body) of every function with a docstring, both without the surrounding indentation."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring_end, end = node.body[0].end_lineno, node.end_lineno
        assert docstring_end is not None and end is not None
        if len(node.body) == 1 or node.body[1].lineno <= docstring_end:
            continue
        function = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).splitlines()
        split = docstring_end - node.lineno + 1
        yield "\n".join(function[:split]), "\n".join(function[split:]).strip("\n")
