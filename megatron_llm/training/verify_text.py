"""What `verify` reads: documents of several lengths, made of a text, or of random ids where the folder has no tokenizer.

Called by `training/verify.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_llm.config import ModelConfig
from megatron_llm.data.tokenizer import load_pretrained
from megatron_llm.ops.batch import Batch

FEWEST_TOKENS = 8

TEXT = """\
The harbour lay still that morning. Two boats had come in before sunrise, and their crews were mending nets on the quay; \
nobody spoke of the storm. "Did you count them?" asked the older one. He had: 17 barrels, 204 crates, and 3.5 tons of ice.
def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
Über den Dächern zogen Möwen; drüben läutete eine Glocke. Le capitaine n'était pas sûr d'être arrivé à l'heure.
今天早上港口很安静。Море было спокойно, а небо — серым. {"barrels": 17, "open": null, "price": "€ 1,204.50"}
"""
"""Words, numbers, code and several scripts; repeated until it is long enough."""


@dataclass(frozen=True)
class Documents:
    """The ids of every document, and a sentence that says where they come from."""

    ids: tuple[tuple[int, ...], ...]
    origin: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def batch(self, multiple: int = 1) -> Batch:
        """All documents packed, each predicting its own tokens only; filled up to a multiple by one more that has no loss."""
        fill = -self.tokens % multiple
        ids = [*self.ids, (0,) * fill] if fill else [*self.ids]
        labels = [label for document in ids for label in (*document[1:], 0)]
        weights = [float(place + 1 < len(document)) for document in ids for place in range(len(document))]
        return Batch(
            torch.tensor([token for document in ids for token in document]),
            torch.tensor(labels),
            torch.tensor(weights[: self.tokens] + [0.0] * fill),
            torch.cat([torch.arange(len(document)) for document in ids]),
            (0, *accumulate(map(len, ids))),
        )

    def place(self, token: int) -> str:
        """Which token of which document one of all tokens is, counted from 1."""
        for number, document in enumerate(self.ids):
            if token < len(document):
                return f"token {token + 1} of document {number + 1}"
            token -= len(document)
        raise IndexError(token)


def make_documents(folder: Path, model: ModelConfig, text: Path | None, tokens: int) -> Documents:
    """Documents of `tokens` tokens together, or as many as the text has.

    text: a file; None: the text above, or without a tokenizer whose ids fit, random ids. Raises ValueError if the file cannot be
    used.
    """
    if tokens < FEWEST_TOKENS:
        raise ValueError(f"--tokens {tokens} are too few: documents of several lengths need at least {FEWEST_TOKENS}")
    try:
        tokenizer = load_pretrained(folder)
    except ValueError as error:
        if text is not None:
            raise ValueError(f"--text needs the folder's tokenizer: {error}") from error
        return _random(model, tokens, "the folder has no tokenizer that can be loaded")
    written = TEXT if text is None else _read(text)
    begin, ids = _encode(tokenizer, written)
    if max((*begin, *ids), default=0) >= model.vocab_size:
        problem = f"the tokenizer makes ids up to {max((*begin, *ids))}, and the vocabulary has {model.vocab_size}"
        if text is not None:
            raise ValueError(f"--text {text}: {problem}; leave --text out for random ids")
        return _random(model, tokens, problem)
    if text is None:
        ids = (ids * (tokens // max(1, len(ids)) + 1))[:tokens]
        origin = "a text of several languages"
    else:
        origin = (
            f"{text} ({min(tokens, len(ids)):,} of its {len(ids):,} tokens; --tokens takes more)"
            if len(ids) > tokens
            else str(text)
        )
    if len(ids) < FEWEST_TOKENS:
        raise ValueError(f"--text {text} has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed")
    return Documents(tuple(_cut(begin, ids[:tokens], _longest(model))), origin)


def _random(model: ModelConfig, tokens: int, why: str) -> Documents:
    ids = torch.randint(0, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return Documents(tuple(_cut([], ids, _longest(model))), f"random ids, as {why}")


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text} is not UTF-8: {error}") from error


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(what the tokenizer puts before every text, the text without it)."""
    begin = list(tokenizer("")["input_ids"])[:1]
    if begin != [tokenizer.bos_token_id]:
        begin = []
    return begin, list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _longest(model: ModelConfig) -> int | None:
    """The model's context: tables of positions end there, also in classes of transformers for rotation and ALiBi.

    None where the rotation changes beyond it.
    """
    scaling = model.rope_scaling
    return None if scaling is not None and scaling.rope_type == "dynamic" else model.max_position_embeddings or None


def _cut(begin: Sequence[int], ids: Sequence[int], longest: int | None) -> list[tuple[int, ...]]:
    """All ids as documents of one token, a sixteenth, a quarter and the rest, each with its beginning.

    The shortest comes first: some classes of transformers keep the rotary frequencies of the longest document so far.
    """
    limit = len(ids) if longest is None else max(1, longest - len(begin))
    lengths, left = [], len(ids)
    for share in (1, len(ids) // 16, len(ids) // 4):
        lengths.append(min(share, limit))
        left -= lengths[-1]
    while left:
        lengths.append(min(left, limit))
        left -= lengths[-1]
    ends = list(accumulate(sorted(length for length in lengths if length)))
    return [(*begin, *ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
