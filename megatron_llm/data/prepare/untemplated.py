"""Ids and role bytes of documents that have no chat template: text in segments, and ids that were made elsewhere.

What is trained counts as the assistant's, the rest as nobody's and never to be trained. Called by `chat.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import NOT_TRAINED
from megatron_llm.data.prepare.chunks import check_unicode
from megatron_llm.data.prepare.documents import Made, Segments, Tokens
from megatron_llm.data.prepare.spans import ASSISTANT, Span, token_roles


def segment_spans(document: Segments) -> tuple[str, list[Span]]:
    """The segments as one text, and where each lies. Raises ValueError if there is no text, or if it is not valid Unicode."""
    spans, text = [], ""
    for part, trained in document.segments:
        spans.append(Span(len(text), len(text) + len(part), ASSISTANT if trained else NOT_TRAINED))
        text += part
    if not text:
        raise ValueError("no text in its segments")
    check_unicode(text)
    return text, spans


def segment_tokens(spans: Sequence[Span], tokens: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], eos: int | None) -> Made:
    """Ids [n] with the roles of the segments they end in, from `offsets` [n, 2]; `eos`: a trained id that follows.

    Raises ValueError if none is trained.
    """
    roles = token_roles(spans, "", offsets, np.zeros(len(tokens), np.bool_))  # no token ends a segment before its own end
    if eos is not None:
        tokens, roles = np.append(tokens, np.int32(eos)), np.append(roles, np.uint8(ASSISTANT))
    return _trained(tokens, roles)


def given_tokens(document: Tokens, vocab_size: int) -> Made:
    """Ids as they are. Raises ValueError for ids out of range, and if none is trained."""
    wrong = next((id_ for id_ in document.ids if not 0 <= id_ < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside 0..{vocab_size - 1} of the tokenizer")
    return _trained(np.array(document.ids, np.int32), np.where(document.trained, ASSISTANT, NOT_TRAINED).astype(np.uint8))


def _trained(tokens: npt.NDArray[np.int32], roles: npt.NDArray[np.uint8]) -> Made:
    if not (roles == ASSISTANT).any():
        raise ValueError("no assistant token to learn from")
    return Made(tokens, roles)
