"""Conversations to token files: ids exactly as the tokenizer's chat template gives them, and the role of every token.

Records of any format become documents in `records.py`. A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`;
`"tools"` beside it is passed to the template, and a message with `"train": false` is marked as not to be trained.
Roles come from rendering: the text of messages 0..i is the start of
the text of the whole conversation, so rendering prefixes tells where each message ends, and rendering one with the
generation prompt tells where a reply starts. Tokens are mapped by the character offsets of one tokenization of the whole.
Called by `cli/preprocess_chat.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llm.data.indexed import NOT_TRAINED, ROLE_MASK, ROLES, token_dtype
from megatron_llm.data.prepare.chunks import Chunk, check_unicode
from megatron_llm.data.prepare.documents import Conversation, Document, Segments, Tokens
from megatron_llm.data.prepare.inputs import describe_inputs, find_inputs
from megatron_llm.data.prepare.mapping import describe_mapping
from megatron_llm.data.prepare.pipeline import JOURNAL_SECONDS, Encoded, Pipeline, Summary, digest
from megatron_llm.data.prepare.preprocess import carry_out
from megatron_llm.data.prepare.records import AUTO, Made, RecordReader, check_variants, encode_chunk, group_trees, open_reader
from megatron_llm.data.tokenizer import describe, load_pretrained
from megatron_llm.data.writer import check_prefix

FORMAT_VERSION = 3  # to be raised when the same input should give other files

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation and the role byte of the tokens in it."""

    start: int
    end: int
    role: int


def preprocess_chat(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    record_format: str = AUTO,
    mapping: Sequence[str] = (),
    variants: Sequence[str] = (),
    workers: int = 1,
    strict: bool = False,
    force: bool = False,
    progress: bool = True,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Summary:
    """Tokenize conversations to `output`.bin/.idx/.roles.bin/.meta.json in the order of the input.

    `record_format`: a name in `conversations.FORMATS`, or "auto": by the fields of each record. `mapping`: what `--map` takes,
    instead. `variants`: names in `variants.VARIANTS`; each is written to `output`.VARIANT, document for document.

    A record that cannot be used, one without an assistant's token for instance, is counted and named; with `strict` it ends
    the run. Work that is done already is not done again but with `force`; interrupted work is continued. Raises ValueError for
    bad records with `strict`, for unusable input files or tokenizer folders, or if no conversation is left.
    """
    check_prefix(output)
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    reader = open_reader(record_format, mapping)
    check_variants(variants)
    files = group_trees(find_inputs(inputs), reader)
    meta = describe(tokenizer, "chat")
    template = load_chat_tokenizer(tokenizer).get_chat_template()
    command = digest(
        version=FORMAT_VERSION,
        inputs=describe_inputs(files),
        meta=asdict(meta),
        template=template,
        options=[strict, reader.format, describe_mapping(reader.mapping), list(variants)],
    )
    pipeline = Pipeline(
        name=str(output),
        outputs=[str(output), *(f"{output}.{variant}" for variant in variants)],
        inputs=files,
        encoder=ChatEncoder(str(tokenizer), reader, variants),
        meta=replace(meta, made_by=command),
        dtype=token_dtype(meta.vocab_size),
        roles=True,
        variants=variants,
        workers=workers,
        strict=strict,
        progress=progress,
        journal_seconds=journal_seconds,
    )
    return carry_out(pipeline, force)


def load_chat_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a folder. Raises ValueError if it cannot render conversations or trace tokens to text."""
    tokenizer = load_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template; put a chat_template.jinja into the folder")
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no fast tokenizer, so tokens cannot be traced to text; save it with tokenizer.json")
    tokenizer.model_max_length = 1 << 60  # only a warning depends on it; long records are training's decision
    return tokenizer


@dataclass
class ChatEncoder:
    """Documents of ids and role bytes, one a conversation, and as many of each variant."""

    tokenizer: str
    reader: RecordReader = field(default_factory=RecordReader)
    variants: Sequence[str] = ()

    def load(self, threads: bool) -> str:
        self._tokenizer = load_chat_tokenizer(self.tokenizer)
        self._special = [id_ for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special]
        return "transformers"

    def encode(self, chunk: Chunk) -> Encoded:
        return encode_chunk(chunk, self.reader, self.variants, self._make)

    def _make(self, documents: Sequence[Document]) -> list[Made | ValueError]:
        """Ids and role bytes of documents, or what is wrong with them."""
        made: list[Made | ValueError] = []
        written: list[tuple[int, str, list[Span]]] = []  # place in `made`, text, spans
        for document in documents:
            try:
                if isinstance(document, Tokens):
                    made.append(given_tokens(document, len(self._tokenizer)))
                    continue
                text, spans = segment_spans(document) if isinstance(document, Segments) else self._render(document)
                written.append((len(made), text, spans))
                made.append(_NO_REPLY)
            except ValueError as error:
                made.append(error)
        for (place, text, spans), (tokens, offsets_n2) in zip(written, self._tokenize([w[1] for w in written]), strict=True):
            document = documents[place]
            verbatim = isinstance(document, Segments)
            special = np.zeros(len(tokens), np.bool_) if verbatim else np.isin(tokens, self._special)
            roles = token_roles(spans, text, offsets_n2, special)
            if isinstance(document, Segments) and document.eos and self._tokenizer.eos_token_id is not None:
                tokens = np.append(tokens, np.int32(self._tokenizer.eos_token_id))
                roles = np.append(roles, np.uint8(ROLES["assistant"]))
            made[place] = tokens, roles
        return [one if isinstance(one, ValueError) or _learnt(one[1]) else _NO_REPLY for one in made]

    def _tokenize(self, texts: list[str]) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Ids [n] of each text, and the first character and the end of each: int64 [n, 2]."""
        if texts:
            encoding = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                yield np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    def _render(self, document: Conversation) -> tuple[str, list[Span]]:
        """Text and spans of a conversation. Raises ValueError saying what is wrong with it."""
        import jinja2

        messages, tools = _messages(document.content), document.content.get("tools")

        def render(part: Sequence[Message], prompt: bool) -> str:
            try:
                text: str = self._tokenizer.apply_chat_template(
                    list(part), tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            except (jinja2.TemplateError, TypeError, IndexError, KeyError) as error:
                raise ValueError(f"the chat template refuses it: {error}") from error
            return text

        text = render(messages, False)
        check_unicode(text)
        return text, role_spans(render, messages, text)


_NO_REPLY = ValueError("no assistant token to learn from")


def _learnt(roles: npt.NDArray[np.uint8]) -> bool:
    return bool(((roles & (ROLE_MASK | NOT_TRAINED)) == ROLES["assistant"]).any())


def segment_spans(document: Segments) -> tuple[str, list[Span]]:
    """The segments as one text; what is trained counts as the assistant's, the rest as nobody's and never to be trained.

    Raises ValueError if there is no text, or if it is not valid Unicode.
    """
    spans, text = [], ""
    for part, trained in document.segments:
        spans.append(Span(len(text), len(text) + len(part), ROLES["assistant"] if trained else NOT_TRAINED))
        text += part
    if not text:
        raise ValueError("no text in its segments")
    check_unicode(text)
    return text, spans


def given_tokens(document: Tokens, vocab_size: int) -> Made:
    """Ids and roles of a document that is tokenized, roles as those of segments. Raises ValueError for ids out of range."""
    wrong = next((id_ for id_ in document.ids if not 0 <= id_ < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside 0..{vocab_size - 1} of the tokenizer")
    return np.array(document.ids, np.int32), np.where(document.trained, ROLES["assistant"], NOT_TRAINED).astype(np.uint8)


def _messages(content: dict[str, Any]) -> list[Message]:
    """The checked messages of a record. Raises ValueError."""
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list 'messages'")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("a message is not a JSON object")
        role, text = message.get("role"), message.get("content")
        if not isinstance(role, str) or role == "none" or role not in ROLES:
            raise ValueError(f"unknown role {role!r}; known: system, user, assistant, tool")
        if not isinstance(text, str) and not (text is None and message.get("tool_calls")):
            raise ValueError(f"the content of a message of role {role!r} is not a string")
        train = message.get("train")
        if train is not None and not isinstance(train, bool):  # the string "false" would count as true
            raise ValueError(f"'train' of a message is not true or false but {type(train).__name__}")
    return messages


def role_spans(render: Render, messages: Sequence[Message], full: str) -> list[Span]:
    """Where each message lies in `full`, the text of all messages; `render(messages, generation_prompt)` gives text.

    What introduces a reply belongs to nobody; what introduces another message belongs to that message. Messages that cannot
    be told apart (a system message that the template puts into the first user message) form one span with the role of the
    last of them. Raises ValueError if it cannot be told where a reply starts or ends.
    """
    texts = [_try(render, messages[:count], False) for count in range(len(messages))] + [full]
    ends = [len(text) if text is not None and full.startswith(text) else None for text in texts]
    spans: list[Span] = []
    done = 0  # everything before belongs to a span or to nobody
    for index, message in enumerate(messages):
        role, end = ROLES[message["role"]], ends[index + 1]
        if role != ROLES["assistant"]:
            if end is not None and end > done:
                spans.append(Span(done, end, role))
                done = end
            continue
        start = _reply_start(_try(render, messages[:index], True), ends[index], full)
        if start is None or end is None or not done <= start <= end:
            raise ValueError(
                "the chat template changes a reply or the text before it when more messages follow, "
                f"so it cannot be told which tokens are the reply (message {index})"
            )
        before = ROLES[messages[index - 1]["role"]] if index else ROLES["none"]
        if ends[index] is None and before != ROLES["assistant"]:
            spans.append(Span(done, start, before))
        spans.append(Span(start, end, role | NOT_TRAINED if message.get("train") is False else role))
        done = end
    return spans


def _try(render: Render, messages: Sequence[Message], prompt: bool) -> str | None:
    """Text of some of the messages; None if the template refuses them, as many do without a user's message."""
    try:
        return render(messages, prompt)
    except ValueError:
        return None


def _reply_start(prompted: str | None, unprompted_end: int | None, full: str) -> int | None:
    """Where a reply starts in `full`: after the generation prompt, of which `full` may hold only a part.

    Thinking models' prompts open a `<think>` that the template leaves out of finished replies.
    """
    if prompted is None:
        return unprompted_end
    if full.startswith(prompted):
        return len(prompted)
    if unprompted_end is None:
        return None
    return max(unprompted_end, len(os.path.commonprefix([prompted, full])))


def token_roles(
    spans: Sequence[Span], text: str, offsets: npt.NDArray[np.int64], special: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Role byte of each token: uint8 [n], from `offsets` [n, 2] (first character, end) and which tokens are special [n].

    A token belongs to the span of its last character: one that joins the introduction of a reply with its first letters
    is part of the reply. White space that the template puts after the token that ends a reply belongs to nobody, because
    generation stops before it; the ending token itself is the reply's, or the model would never learn to stop.
    """
    roles = np.zeros(len(offsets), np.uint8)
    last = offsets[:, 1] - 1
    for span in spans:
        inside = np.flatnonzero((last >= span.start) & (last < span.end))
        if span.role & ROLE_MASK == ROLES["assistant"]:
            ending = inside[special[inside]]
            if len(ending) and not text[offsets[ending[-1], 1] : span.end].strip():
                inside = inside[inside <= ending[-1]]
        roles[inside] = span.role
    return roles
