"""A conversation with a model, whose replies come piece by piece. Called by `cli/chat.py`.

Every turn renders the conversation and runs the model on all of it again: one pass, for which no cache has to outlive a turn, and
which stays right where a template changes earlier messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_llm.generation.generate import Sampling, continuations
from megatron_llm.generation.prompts import Message, encode_messages
from megatron_llm.models.decoder import DecoderStage


class TextStream:
    """The text of token ids as they come, never a part of a character.

    What is new is the difference of two texts, with and without the ids since the last piece: some tokenizers write the first
    id of a text without its space. (The way of vLLM's incremental detokenizer.)
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = self._done = 0  # ids [before, done) are the last piece that was given

    def _text(self, start: int, stop: int | None = None) -> str:
        ids = self._ids[start:stop]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def put(self, id_: int) -> str:
        """What can be shown now; "" while a character is not whole, and for special tokens."""
        self._ids.append(id_)
        return "" if self._text(self._before).endswith("\ufffd") else self.end()

    def end(self) -> str:
        """All that is left, whole or not."""
        piece = self._text(self._before)[len(self._text(self._before, self._done)) :]
        self._before, self._done = (self._done, len(self._ids)) if piece else (self._before, self._done)
        return piece


@dataclass
class Conversation:
    """The messages so far, and how replies are made. `system`: said before all others."""

    model: DecoderStage
    tokenizer: Any
    sampling: Sampling
    stop_ids: frozenset[int]
    max_new_tokens: int
    seed: int = 0
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the reply to a user's message. One that is not read to its end is kept as far as it was read.

        Raises ValueError if the template refuses the conversation, or the model lacks positions for it; the message is forgotten.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = encode_messages(self.tokenizer, [*system, *asked])
        said, stream = "", TextStream(self.tokenizer)
        passes = continuations(
            self.model,
            [ids],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            seed=self.seed,
            first=len(self.messages),
        )
        try:
            for (id_,) in passes:
                assert id_ is not None
                piece = stream.put(id_)
                said += piece
                yield piece
            piece = stream.end()
            said += piece
            yield piece
        except ValueError:
            asked = []
            raise
        finally:
            if asked:
                self.messages = [*asked, {"role": "assistant", "content": said}]
