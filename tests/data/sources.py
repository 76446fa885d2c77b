"""Small data sets and configs for tests of streams. Token ids are their own places, so a batch says where a token is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_llm.config import Config, parse_config
from megatron_llm.data.indexed import NOT_TRAINED, DatasetMeta
from megatron_llm.data.writer import IndexedWriter

META = DatasetMeta(kind="pretrain", tokenizer="tok", tokenizer_fingerprint="f" * 64, vocab_size=100_000)
USER, ASSISTANT = 2, 3


def make_config(length: int = 8, vocab_size: int = 100_000, training: dict[str, Any] | None = None, **data: Any) -> Config:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return parse_config(
        {
            "model": {"vocab_size": vocab_size, **shape},
            "training": {"sequence_length": length, "global_batch_size": 2, "steps": 1, "seed": 5, **(training or {})},
            "optimizer": {"lr": 1.0},
            "data": data,
        }
    )


def write_pretrain(
    prefix: Path, lengths: list[int], first: int = 0, meta: DatasetMeta | None = META, dtype: Any = np.int32
) -> str:
    """Documents of `lengths`; ids count up from `first`."""
    with IndexedWriter(prefix, dtype, meta) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    return str(prefix)


def write_chat(prefix: Path, lengths: list[int], first: int = 0) -> tuple[str, np.ndarray]:
    """Conversations of random role bytes, the second a reply. Returns the prefix and the role byte of every token."""
    rng = np.random.default_rng(3)
    roles = rng.choice([0, USER, ASSISTANT, ASSISTANT, ASSISTANT | NOT_TRAINED], sum(lengths)).astype(np.uint8)
    roles[[sum(lengths[:number]) + 1 for number, length in enumerate(lengths) if length > 1]] = ASSISTANT
    at = 0
    with IndexedWriter(prefix, np.int32, META, roles=True) as writer:
        for length in lengths:
            writer.add_document(np.arange(first + at, first + at + length), roles[at : at + length])
            at += length
    return str(prefix), roles


DOCUMENTS = [5, 1, 1, 9, 20, 3, 8, 8, 2, 7, 30, 4]  # 98 tokens: 12 rows of 8, one token over
