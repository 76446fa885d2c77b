"""Loading a tokenizer folder for preprocessing: the fast encoder, special ids, and a fingerprint to tell tokenizers apart.

Called by `preprocess`, `chat`, the `inspect` and `generate` commands, and `training/resolve.py`, which only asks whether
`data.tokenizer` is one: training never tokenizes. transformers is imported late, because it
brings torch along.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_llm.data.indexed import DatasetMeta

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


def fingerprint(folder: str | Path) -> str:
    """sha256 of tokenizer.json, or without one of the vocabulary files. Raises ValueError if there is none of them."""
    files = [path for name in VOCABULARY_FILES if (path := Path(folder) / name).is_file()]
    if not files:
        raise ValueError(f"{folder} is not a tokenizer folder: it has none of {', '.join(VOCABULARY_FILES)}")
    if files[0].name == "tokenizer.json":
        files = files[:1]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load_pretrained(folder: str | Path) -> Any:
    """The transformers tokenizer of a local folder. Raises ValueError if it cannot be loaded; never asks a server."""
    fingerprint(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: transformers cannot load this tokenizer: {error}") from error


def load_encoder(folder: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder, with the truncation and padding that some tokenizer.json files ask for off."""
    path = Path(folder) / "tokenizer.json"
    encoder: Any
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            encoder = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} cannot be read: {error}") from error
    else:
        encoder = getattr(load_pretrained(folder), "backend_tokenizer", None)
        if encoder is None:
            raise ValueError(f"{folder} has no fast tokenizer; save it with tokenizer.json first")
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def describe(tokenizer: Any, folder: str | Path, kind: str) -> DatasetMeta:
    """The tokenizer's part of a data set description; `tokenizer` is what `load_pretrained(folder)` gave."""
    return DatasetMeta(
        kind=kind,
        tokenizer=str(folder),
        tokenizer_fingerprint=fingerprint(folder),
        vocab_size=len(tokenizer),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )
