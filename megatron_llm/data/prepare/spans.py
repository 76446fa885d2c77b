"""From characters of a rendered conversation to role bytes of its tokens. Called by `chat.py` with the spans of `render.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import NOT_TRAINED, ROLE_MASK, ROLES

ASSISTANT = ROLES["assistant"]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation, the role byte of the tokens in it and the number of its message."""

    start: int
    end: int
    role: int
    message: int = 0

    @property
    def trained(self) -> bool:
        return self.role & (ROLE_MASK | NOT_TRAINED) == ASSISTANT


def token_roles(
    spans: Sequence[Span], text: str, offsets: npt.NDArray[np.int64], special: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Role byte of each token: uint8 [n], from `offsets` [n, 2] (first character, end) and which tokens are special [n].

    A token belongs to the span of its last character: one that joins the introduction of a reply with its first letters
    is part of the reply. White space that the template puts after the token that ends a reply belongs to nobody, because
    generation stops before it; the ending token itself is the reply's, or the model would never learn to stop. Later spans
    go before earlier ones.
    """
    roles = np.zeros(len(offsets), np.uint8)
    for span, (first, end) in zip(spans, token_ranges(spans, text, offsets, special), strict=True):
        roles[first:end] = span.role
    return roles


def token_ranges(
    spans: Sequence[Span], text: str, offsets: npt.NDArray[np.int64], special: npt.NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """The tokens [first, end) of each span, as `token_roles` assigns them."""
    # Tokens without characters (a prefix that the tokenizer adds) count as at the place they were added.
    last = np.maximum.accumulate(offsets[:, 1] - 1) if len(offsets) else np.empty(0, np.int64)
    ranges = []
    for span in spans:
        first, end = np.searchsorted(last, (span.start, span.end)).tolist()
        if span.role & ROLE_MASK == ASSISTANT:
            ending = np.flatnonzero(special[first:end])
            if len(ending) and not text[offsets[first + ending[-1], 1] : span.end].strip():
                end = first + int(ending[-1]) + 1
        ranges.append((first, end))
    return ranges


def unended_reply(
    spans: Sequence[Span],
    ranges: Sequence[tuple[int, int]],
    tokens: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int32],
) -> int | None:
    """Number of the first message with a trained reply whose last token is none of `ends` [k]; None if there is none."""
    last: dict[int, int] = {}
    for span, (first, end) in zip(spans, ranges, strict=True):
        if span.trained and end > first:
            last[span.message] = max(last.get(span.message, 0), end - 1)
    return next((message for message, at in last.items() if tokens[at] not in ends), None)
