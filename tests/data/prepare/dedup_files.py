"""Files and texts for the tests of deduplication."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "rstx"]


def prose(seed: int, words: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(texts)))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept_texts(output: Path) -> list[str]:
    return [record["text"] for path in sorted(output.iterdir()) for record in read_jsonl(path)]


def corpus_texts() -> list[str]:
    """Pieces of the standard library, and copies of some of them with few, some and many words replaced."""
    choose = random.Random(7)
    texts = []
    long = [path for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if path.stat().st_size > 5000]
    for path in long[:60]:
        text = path.read_text(errors="replace")[1000:4000]
        texts.append(text)
        for share in choose.sample([0.0, 0.004, 0.02, 0.1, 0.3], 2):
            words = text.split(" ")
            texts.append(" ".join(choose.choice(WORDS) if choose.random() < share else word for word in words))
    choose.shuffle(texts)
    return texts
