"""Conversations to token files: ids exactly as the tokenizer's chat template gives them, and the role of every token.

`records.py` makes conversations of records of any format: `{"messages": [{"role": ..., "content": ...}, ...]}`; `"tools"` beside
them is passed to the template. A message with `"train": false` is marked as not to be trained, one with `"weight": 0.5` by the
loss weight of its tokens. `render.py` tells where in the rendered text each message lies, `spans.py` which tokens these are;
what has no template is `untemplated.py`'s. Called by `cli/preprocess_chat.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llm.data.chat_tokenizer import load_chat_tokenizer, reply_end_ids, special_ids
from megatron_llm.data.indexed import MAX_WEIGHTS, NOT_TRAINED, ROLES, WEIGHT_SHIFT, token_dtype
from megatron_llm.data.prepare.chunks import Chunk, check_unicode
from megatron_llm.data.prepare.documents import Conversation, Document, Made, Segments, Tokens
from megatron_llm.data.prepare.inputs import describe_inputs, find_inputs
from megatron_llm.data.prepare.layout import Message
from megatron_llm.data.prepare.mapping import describe_mapping
from megatron_llm.data.prepare.named_templates import check_tokens, read_template, save_tokenizer
from megatron_llm.data.prepare.pipeline import JOURNAL_SECONDS, Encoded, Pipeline, Summary, digest
from megatron_llm.data.prepare.preprocess import carry_out
from megatron_llm.data.prepare.records import AUTO, RecordReader, check_variants, encode_chunk, group_trees, open_reader
from megatron_llm.data.prepare.render import Rendered, Renderer
from megatron_llm.data.prepare.spans import token_ranges, unended_reply
from megatron_llm.data.prepare.untemplated import given_tokens, segment_spans, segment_tokens
from megatron_llm.data.tokenizer import describe
from megatron_llm.data.writer import check_prefix

FORMAT_VERSION = 5  # to be raised when the same input should give other files
MAX_WEIGHT = 1_000_000  # of a message: losses are added up in float32
COMPARED = 4  # conversations of a chunk whose ids are made by transformers as well
SPOKEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # what a reply without content may consist of


def preprocess_chat(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    record_format: str = AUTO,
    mapping: Sequence[str] = (),
    variants: Sequence[str] = (),
    template: str | None = None,
    save_to: str | Path | None = None,
    allow_special: bool = False,
    workers: int = 1,
    strict: bool = False,
    force: bool = False,
    progress: bool = True,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Summary:
    """Tokenize conversations to `output`.bin/.idx/.roles.bin/.meta.json in the order of the input.

    `record_format`: a name in `conversations.FORMATS`, or "auto": by the fields of each record. `mapping`: what `--map` takes,
    instead. `variants`: names in `variants.VARIANTS`; each is written to `output`.VARIANT, document for document. `template`
    and `save_to` as in `open_encoder`.

    A record that cannot be used, one without an assistant's token for instance, is counted and named; with `strict` it ends the
    run. Text of special tokens in a content is such a reason unless `allow_special`. Work that is done already is not done
    again but with `force`; interrupted work is continued.

    Raises ValueError for bad records with `strict`, for unusable input files, tokenizers or templates, for more than 16
    different weights, or if no conversation is left.
    """
    check_prefix(output)
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    check_variants(variants)
    reader = open_reader(record_format, mapping)
    files = group_trees(find_inputs(inputs), reader)
    encoder = replace(open_encoder(tokenizer, template, save_to, allow_special), reader=reader, variants=tuple(variants))
    meta = describe(encoder.tokenizer, "chat")
    command = digest(
        version=FORMAT_VERSION,
        inputs=describe_inputs(files),
        meta=asdict(meta),
        template=check_template(encoder),
        options=[strict, allow_special, reader.format, describe_mapping(reader.mapping), list(variants)],
    )
    pipeline = Pipeline(
        name=str(output),
        outputs=[str(output), *(f"{output}.{variant}" for variant in variants)],
        inputs=files,
        encoder=encoder,
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


def open_encoder(
    tokenizer: str | Path, template: str | None = None, save_to: str | Path | None = None, allow_special: bool = False
) -> ChatEncoder:
    """The encoder of a tokenizer folder with its own template, or with `template`: a name or a FILE.jinja.

    `save_to`: folder to which the tokenizer is written with the template and the special tokens that it lacks; the encoder
    then uses that one. Raises ValueError if they do not go together.
    """
    named = None if template is None else read_template(template)
    if save_to is not None:
        print("\n".join(save_tokenizer(tokenizer, named, save_to)), file=sys.stderr)
        return ChatEncoder(str(save_to), None, allow_special)
    if named is not None:
        own = load_chat_tokenizer(tokenizer, named.text)
        check_tokens(own, named)
        print(
            f"{tokenizer} keeps its own chat template: training and export would go on with that one; "
            f"--save-tokenizer DIR writes a tokenizer with --template {template}",
            file=sys.stderr,
        )
    return ChatEncoder(str(tokenizer), named.text if named else None, allow_special)


def check_template(encoder: ChatEncoder) -> Any:
    """The encoder's chat template, after a conversation was tried with it.

    Raises ValueError if it is no template, begins with two bos tokens, or ends a reply with a token that does not end generation.
    """
    import jinja2

    encoder = replace(encoder)  # what is loaded here need not go to other processes
    encoder.load(threads=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = encoder.renderer.render(messages)
    except ValueError as error:
        # That it refuses this one tells nothing: it may want a system message, say. Records will show.
        if "refuses" not in str(error) or isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise ValueError(f"{encoder.tokenizer}: {error}") from error
    else:
        encoder.roles(rendered, *next(encoder.tokenize([rendered.text])))
    return encoder.template_text


@dataclass
class ChatEncoder:
    """Documents of ids and role bytes, one a conversation, and as many of each variant.

    `template`: Jinja text to use instead of the tokenizer's own.
    """

    tokenizer: str
    template: str | None = None
    allow_special: bool = False
    reader: RecordReader = field(default_factory=RecordReader)
    variants: Sequence[str] = ()

    def load(self, threads: bool) -> str:
        self._tokenizer = load_chat_tokenizer(self.tokenizer, self.template)
        self.template_text = self._tokenizer.chat_template
        self._special = np.array(special_ids(self._tokenizer), np.int32)
        ends = reply_end_ids(self._tokenizer)
        eos = self._tokenizer.eos_token_id
        self._ends = np.array(sorted(ends if eos is None else ends | {eos}), np.int32)
        self.renderer = Renderer(self._tokenizer, self._tokenizer.convert_ids_to_tokens(sorted(ends)))
        texts = sorted(map(str, self._tokenizer.convert_ids_to_tokens(self._special.tolist())), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        return "transformers"

    def encode(self, chunk: Chunk) -> Encoded:
        weights: dict[float, str] = {}
        return replace(encode_chunk(chunk, self.reader, self.variants, partial(self._make, weights)), weights=weights)

    def _make(self, weights: dict[float, str], documents: Sequence[tuple[str, Document]]) -> list[Made | ValueError]:
        """Ids and role bytes of documents, each beside the name of its record, or what is wrong with them.

        Loss weights that are not in `weights` yet are added. Raises ValueError if they become too many.
        """
        made: dict[int, Made | ValueError] = {}
        texts: list[tuple[int, Rendered]] = []
        for place, (where, document) in enumerate(documents):
            try:
                if isinstance(document, Tokens):
                    made[place] = given_tokens(document, len(self._tokenizer))
                elif isinstance(document, Segments):
                    texts.append((place, Rendered(*segment_spans(document))))
                else:
                    texts.append((place, self._render(document, weights, where)))
            except ValueError as error:
                made[place] = error
        if len(weights) >= MAX_WEIGHTS:
            weight, where = list(weights.items())[MAX_WEIGHTS - 1]
            raise ValueError(f"{where}: 'weight' {weight:g} is one too many, {MAX_WEIGHTS} with 1 can be told apart; round them")
        tokenized = self.tokenize([rendered.text for _, rendered in texts])
        for number, ((place, rendered), (tokens, offsets_n2)) in enumerate(zip(texts, tokenized, strict=True)):
            where, document = documents[place]
            if isinstance(document, Conversation) and (number < COMPARED or rendered.notes or self.allow_special):
                self._compare(tokens, document, where)
            try:
                if isinstance(document, Segments):
                    eos = self._tokenizer.eos_token_id if document.eos else None
                    made[place] = segment_tokens(rendered.spans, tokens, offsets_n2, eos)
                else:
                    made[place] = Made(tokens, self.roles(rendered, tokens, offsets_n2), rendered.notes)
            except ValueError as error:
                made[place] = error
        return [made[place] for place in range(len(documents))]

    def tokenize(self, texts: list[str]) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Ids [n] of each text, and the first character and the end of each: int64 [n, 2]."""
        if texts:
            encoding = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                yield np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    def roles(
        self, rendered: Rendered, tokens: npt.NDArray[np.int32], offsets_n2: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Role bytes [n] of a conversation's tokens [n].

        Raises ValueError for two bos tokens at the start, for a trained reply that ends without a token that ends generation,
        and if no token is trained.
        """
        bos = self._tokenizer.bos_token_id
        if bos is not None and (tokens[:2] == bos).sum() == 2:
            raise ValueError(
                f"two {self._tokenizer.bos_token} at the start, which the model never saw; the chat template writes both "
                "(or the first content begins with one): remove one"
            )
        ranges = token_ranges(rendered.spans, rendered.text, offsets_n2, np.isin(tokens, self._special))
        roles = np.zeros(len(tokens), np.uint8)
        for span, (first, end) in zip(rendered.spans, ranges, strict=True):
            roles[first:end] = span.role
        if not any(span.trained and end > first for span, (first, end) in zip(rendered.spans, ranges, strict=True)):
            raise ValueError("no assistant token to learn from")
        unended = unended_reply(rendered.spans, ranges, tokens, self._ends)
        if unended is not None:
            known = ", ".join(map(str, self._tokenizer.convert_ids_to_tokens(self._ends.tolist()))) or "none is known"
            raise ValueError(
                f"the reply of message {unended} does not end with a token that ends generation ({known}), so the model "
                "would not learn to stop; write eos_token after replies in the chat template, or use --template"
            )
        return roles

    def _compare(self, tokens: npt.NDArray[np.int32], document: Conversation, where: str) -> None:
        """Raises ValueError if transformers, asked for ids, gives others."""
        wanted = self._tokenizer.apply_chat_template(
            _messages(document.content), tools=document.content.get("tools"), tokenize=True, return_dict=False
        )
        if tokens.tolist() != list(wanted):
            raise ValueError(f"{where}: the ids are not those of apply_chat_template; please report it")

    def _render(self, document: Conversation, weights: dict[float, str], where: str) -> Rendered:
        """A conversation as text and spans. Raises ValueError saying what is wrong with it."""
        messages, tools = _messages(document.content), document.content.get("tools")
        if not self.allow_special:
            self._check_special(messages, tools)
        rendered = self.renderer.render(messages, tools, _role_bytes(document.content["messages"], weights, where))
        check_unicode(rendered.text)
        return rendered

    def _check_special(self, messages: Sequence[Message], tools: Any) -> None:
        """Raises ValueError if a content would become a special token: a user could end its own turn and begin another's."""
        for index, message in enumerate([*messages, {"tools": tools}]):
            for text in _strings(message):
                if (found := self._special_text.search(text)) is not None:
                    where = f"message {index} ({message['role']})" if index < len(messages) else "a tool"
                    raise ValueError(
                        f"text of a special token in {where}: {found[0]}; it would become that token (--allow-special lets it)"
                    )


def _strings(value: Any) -> Iterator[str]:
    """All text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _messages(content: dict[str, Any]) -> list[Message]:
    """The checked messages of a record, without what is not for the template. Raises ValueError."""
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list 'messages'")
    for index, message in enumerate(messages):
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
        weight = _weight(message)
        empty = not (text or "").strip() and not any(message.get(key) for key in SPOKEN)
        if role == "assistant" and empty and train is not False and weight:
            raise ValueError(f'the reply of message {index} is empty; "train": false keeps it, as context')
    return [{key: value for key, value in message.items() if _for_template(key, value)} for message in messages]


def _for_template(key: str, value: Any) -> bool:
    """Not our own fields, nor the empty `tool_calls` that tables have: templates that ask whether there are any show no text."""
    return key not in ("train", "weight") and not (key == "tool_calls" and value == [])


def _weight(message: Message) -> float:
    """The loss weight of a message. Raises ValueError if it is no number from 0 to MAX_WEIGHT."""
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(f"'weight' of a message is not a number from 0 to {MAX_WEIGHT:,}: {weight!r:.40}")
    return float(weight)


def _role_bytes(messages: Sequence[Message], weights: dict[float, str], where: str) -> list[int]:
    """Role byte of each message, with the numbers of their weights in `weights`, to which new ones are added."""
    found = []
    for message in messages:
        byte, weight = ROLES[message["role"]], _weight(message)
        if message.get("train") is False or weight == 0:
            byte |= NOT_TRAINED
        elif weight != 1:
            weights.setdefault(weight, where)
            byte |= (list(weights).index(weight) + 1) << WEIGHT_SHIFT
        found.append(byte)
    return found
