"""Conversations token by token for the eye: who says each, and which are trained.

Called by `preprocess-chat --show`, before anything is written, and by `inspect --show` for data sets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import NOT_TRAINED, ROLE_MASK, ROLES, WEIGHT_SHIFT, IndexedDataset
from megatron_llm.data.prepare.chat import check_template, open_encoder
from megatron_llm.data.prepare.inputs import find_inputs, read_chunks
from megatron_llm.data.prepare.records import AUTO, group_trees, open_reader
from megatron_llm.data.tokenizer import load_decoder

Decoder = Callable[[Sequence[int]], str]

NAMES = {code: name for name, code in ROLES.items()}
COLOURS = {"none": "90", "system": "35", "user": "36", "assistant": "32", "tool": "33"}
LONGEST_CHARACTER = 8  # tokens


@dataclass(frozen=True)
class Style:
    """How tokens are shown: with colours or, for files and terminals without, with brackets; with ids or not."""

    colour: bool
    ids: bool

    def legend(self) -> str:
        if self.colour:
            names = " ".join(f"\033[{code}m{name}\033[0m" for name, code in COLOURS.items())
            return f"roles: {names}; trained: \033[1;4mbold and underlined\033[0m; | between tokens"
        return f"roles: {' '.join(COLOURS)}; trained: [in brackets]; | between other tokens"

    def run(self, role: int, tokens: Sequence[str], weight: float) -> str:
        """Consecutive tokens with one role byte, on one line."""
        name = NAMES.get(role & ROLE_MASK, "unknown")
        trained = name == "assistant" and not role & NOT_TRAINED
        label = name + (" not trained" if role & NOT_TRAINED else "") + (f" x{weight:g}" if weight != 1 else "")
        if self.colour:
            code = COLOURS.get(name, "0") + (";1;4" if trained else "")
            text = "|".join(f"\033[{code}m{token}\033[0m" for token in tokens)
        else:
            text = "".join(f"[{token}]" for token in tokens) if trained else "|".join(tokens)
        return f"{label + ':':12} {text}"


def use_colours() -> bool:
    """Whether the output is a terminal whose user has not asked for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show_conversations(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    count: int,
    *,
    colour: bool,
    with_ids: bool = False,
    strict: bool = False,
    record_format: str = AUTO,
    mapping: Sequence[str] = (),
    template: str | None = None,
    save_to: str | Path | None = None,
    allow_special: bool = False,
) -> Iterator[str]:
    """The first `count` documents that `preprocess_chat` would make, and the records before them that it would skip, as lines.

    Raises ValueError as that does.
    """
    reader = open_reader(record_format, mapping)
    files = group_trees(find_inputs(inputs), reader)
    encoder = replace(open_encoder(tokenizer, template, save_to, allow_special), reader=reader)
    check_template(encoder)
    encoder.load(threads=True)
    style, decode = Style(colour, with_ids), load_decoder(encoder.tokenizer)
    yield style.legend()
    shown = 0
    for chunk in read_chunks(files, chunk_bytes=1 << 16):
        for index in range(len(chunk.records)):
            if shown >= count:
                return
            one = replace(chunk, records=chunk.records[index : index + 1], first=chunk.first + index, skipped=())
            encoded = encoder.encode(one)
            for skipped in encoded.skipped:
                if strict and skipped.bad:
                    raise ValueError(f"{skipped.where}: {skipped.reason}")
                yield f"{skipped.where}: skipped, {skipped.reason}"
            assert encoded.roles is not None
            start = 0
            for length in encoded.lengths.tolist()[: count - shown]:
                stop = start + length
                weights = (1.0, *encoded.weights)
                yield from _document(
                    chunk.where(index), encoded.tokens[start:stop].tolist(), encoded.roles[start:stop], weights, decode, style
                )
                start, shown = stop, shown + 1


def show_dataset(
    dataset: IndexedDataset, numbers: Sequence[int], decode: Decoder, *, colour: bool, with_ids: bool = False
) -> Iterator[str]:
    """Documents of a data set as lines. Raises ValueError if it has no roles."""
    if dataset.roles is None:
        raise ValueError(f"{dataset.prefix}.roles.bin does not exist: --show is for chat data, --documents for any")
    style = Style(colour, with_ids)
    yield style.legend()
    offsets = dataset.document_offsets()
    for number in numbers:
        roles = dataset.roles[offsets[number] : offsets[number + 1]]
        weights = dataset.meta.weights if dataset.meta else (1.0,)
        yield from _document(f"document {number}", dataset.document(number).tolist(), roles, weights, decode, style)


def _document(
    name: str, ids: list[int], roles: npt.NDArray[np.uint8], weights: Sequence[float], decode: Decoder, style: Style
) -> Iterator[str]:
    trained = int(((roles & (ROLE_MASK | NOT_TRAINED)) == ROLES["assistant"]).sum())
    yield f"{name}: {len(ids):,} tokens, {trained:,} trained"
    start = 0
    for role, run in groupby(roles.tolist()):
        end = start + len(list(run))
        number = role >> WEIGHT_SHIFT
        weight = weights[number] if number < len(weights) else 1.0
        yield "  " + style.run(role, _token_texts(ids[:end], start, decode, style.ids), weight)
        start = end


def _token_texts(ids: list[int], start: int, decode: Decoder, with_ids: bool) -> list[str]:
    """Texts of the tokens from `start` on; those that share a character are one."""
    texts = []
    while start < len(ids):
        for count in range(1, LONGEST_CHARACTER + 1):
            text = _text(ids, start, count, decode)
            if "\ufffd" not in text or start + count >= len(ids):
                break
        else:
            count, text = 1, _text(ids, start, 1, decode)
        shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
        texts.append(shown + (f"({','.join(map(str, ids[start : start + count]))})" if with_ids else ""))
        start += count
    return texts


def _text(ids: list[int], start: int, count: int, decode: Decoder) -> str:
    """The text of `count` ids where they stand: decoders drop the space of a text's first token."""
    before = decode(ids[start - 1 : start]) if start else ""
    text = decode(ids[max(0, start - 1) : start + count])
    return text.removeprefix(before) if text.startswith(before) else decode(ids[start : start + count])
