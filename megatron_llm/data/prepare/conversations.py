"""The record formats of chat data: a table of how each is recognized by its fields, and how a record becomes documents.

A document is a conversation for the chat template, text in segments without a template, or ids. `records.py` calls
`recognize` for `--format auto` or looks a format up in `FORMATS`, then calls its `documents`. To add a format, add a line
to the table and a sample of it to `tests/data/prepare/format_samples.py`. docs/data.md shows the table to users.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_llm.data.prepare import trees
from megatron_llm.data.prepare.turns import BELLE, GUANACO, HH, OIG, Markers, Message, Record, settle, turn_messages


@dataclass(frozen=True)
class Conversation:
    """A record to render: `content` has "messages" and may have "tools" and whatever else the template is to see.

    `parts`: instruction, input and output, where the record tells instruction from input. `changed`: what was done to the
    record's messages, in words.
    """

    content: Record
    parts: tuple[str, str, str] | None = None
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segments:
    """Text without a template: (text, whether it is trained), back to back. `eos`: the tokenizer's eos token follows."""

    segments: Sequence[tuple[str, bool]]
    eos: bool = False


@dataclass(frozen=True)
class Tokens:
    """Ids that were made elsewhere, and whether each is trained."""

    ids: Sequence[int]
    trained: Sequence[bool]


Document = Conversation | Segments | Tokens
Found = Sequence[Document | ValueError]
"""What a record gives, in order; an error in the place of a document that cannot be used."""


@dataclass(frozen=True)
class Format:
    """One shape of records.

    `fits`: whether a record has this shape; None: it looks like another one, so this one has to be named.
    `documents`: at least one. Raises ValueError saying what is wrong with the record.
    """

    name: str
    fits: Callable[[Record], bool] | None
    documents: Callable[[Record], Found]


_TURNS = ("messages", "conversations", "conversation")


def recognize(record: Record) -> Format:
    """The one format whose fields a record has; `text` counts only if no other fits. Raises ValueError for none or several."""
    for group in (FIELDS, TEXTS):
        fitting = [known for known in group if known.fits is not None and known.fits(record)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = " and ".join(known.name for known in fitting)
            raise ValueError(f"ambiguous: it fits {names} ({_fields(record)}); name one with --format")
    raise ValueError(f"fits no known format ({_fields(record)}); name one with --format, or the columns with --map")


def decoded(record: Record) -> Record:
    """The record with the lists that csv files, and some tables, hold as strings of JSON."""
    return {key: _decoded(key, value) if isinstance(value, str) and key in _LISTS else value for key, value in record.items()}


_LISTS = (
    *_TURNS, "data", "history", "tools", "segments", "input_output", "human_answers", "chatgpt_answers",
    "input_ids", "labels", "attention_mask", "prompt", "completion", "chosen",
)  # fmt: skip


def _decoded(key: str, text: str) -> Any:
    if key == "tools" and not text.strip():
        return None
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    turns = isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return value if turns or key not in ("prompt", "completion", "chosen") else text


def _fields(record: Record) -> str:
    names = [name if value is not None else f"{name} (null)" for name, value in record.items()]
    return f"its fields: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "it has no fields"


def _text(record: Record, name: str) -> str:
    """A field that must have text. Raises ValueError."""
    if record.get(name) is None:
        raise ValueError(f"no field {name!r} ({_fields(record)})")
    text = _optional(record, name)
    if not text:
        raise ValueError(f"{name!r} is empty")
    return text


def _optional(record: Record, name: str) -> str:
    """A field that may be missing, null or blank, which all give "". Raises ValueError if it is not a string."""
    text = record.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{name!r} is not a string but {type(text).__name__}")
    return text if text.strip() else ""


def _listed(record: Record, name: str) -> list[Any]:
    items = record.get(name)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{name!r} is no list, or an empty one ({_fields(record)})")
    return items


def _is(record: Record, kind: type, *names: str) -> bool:
    return all(isinstance(record.get(name), kind) for name in names)


def _turn_field(record: Record) -> str:
    """The field with the list of turns, the last of the known ones if there is none."""
    return next((name for name in _TURNS if record.get(name) is not None), _TURNS[-1])


def _turns(record: Record, *keys: str) -> bool:
    """Whether the turns in `record` are dicts with one of `keys`; by the first of them, as all of a list are alike."""
    turns = record.get(_turn_field(record))
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and any(key in turns[0] for key in keys)


def _other_turns(record: Record) -> bool:
    return _turns(record, "role") or (record.get("conversations") is not None and not _turns(record, "input", "output"))


def _flat(record: Record, *names: str) -> bool:
    """Whether one question and its reply stand in fields of strings with these names, and not in a list of turns."""
    return _is(record, str, *names) and all(record.get(name) is None for name in (*_TURNS, "chosen"))


def _said(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}] if text else []


def _tools(record: Record) -> Record:
    """`tools` as a template takes them, if there are any. Raises ValueError."""
    tools = record.get("tools")
    if isinstance(tools, str):
        raise ValueError("'tools' is not JSON")
    return {"tools": tools} if tools else {}


def _messages(record: Record) -> Found:
    """As they are: a user of this format decides on every message. Text in parts becomes one string."""
    record = {**record, **_tools(record)}
    if isinstance(record.get("messages"), list):
        record["messages"] = [_joined_parts(message) for message in record["messages"]]
    return [Conversation(record)]


def _joined_parts(message: Any) -> Any:
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) and _is_text(part) for part in parts):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _is_text(part: Record) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _sharegpt(record: Record) -> Found:
    messages = turn_messages(_listed(record, _turn_field(record)))
    system = [] if messages and messages[0]["role"] == "system" else _said("system", _optional(record, "system"))
    return [_settled(system + messages, _tools(record))]


def _settled(messages: Sequence[Message], rest: Record | None = None) -> Conversation:
    settled, changed = settle(messages)
    return Conversation({"messages": settled, **(rest or {})}, changed=changed)


def _exchanges(record: Record) -> Found:
    messages: list[Message] = []
    for exchange in _listed(record, _turn_field(record)):
        if not isinstance(exchange, dict):
            raise ValueError("an exchange is not a JSON object")
        messages += _said("system", _optional(exchange, "system"))
        messages += _said("user", _text(exchange, "input")) + _said("assistant", _text(exchange, "output"))
    return [Conversation({"messages": messages})]


def _ultrachat(record: Record) -> Found:
    texts = {str(number): text for number, text in enumerate(_listed(record, "data"), 1)}
    roles = ("assistant", "user")
    return [Conversation({"messages": [{"role": roles[int(name) % 2], "content": _text(texts, name)} for name in texts]})]


def _exchange(record: Record, question: str, reply: str, given: str = "", system: str = "system") -> Found:
    """One question and its reply, by the names of the fields. `given`: what the instruction in `question` is about."""
    instruction, output = _text(record, question), _text(record, reply)
    about, rules = _optional(record, given), _optional(record, system)
    asked = f"{instruction}\n\n{about}" if about else instruction
    messages = _said("system", rules) + _history(record) + _said("user", asked) + _said("assistant", output)
    return [Conversation({"messages": messages}, (instruction, about, output) if about and not record.get("history") else None)]


def _history(record: Record) -> list[Message]:
    """Earlier exchanges as LLaMA-Factory keeps them: [[question, reply], ...]."""
    messages: list[Message] = []
    for pair in record.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("'history' is no list of pairs")
        texts = dict(zip(("question", "reply"), pair, strict=True))
        messages += _said("user", _text(texts, "question")) + _said("assistant", _text(texts, "reply"))
    return messages


def _dolphin(record: Record) -> Found:
    return _exchange(record, "input", "output", system="instruction")


def _belle_turns(record: Record) -> bool:
    return _flat(record, "instruction", "output") and len(BELLE.pattern.findall(record["instruction"])) > 1


def _belle(record: Record) -> Found:
    """The turns so far stand in the instruction, which ends where the reply in `output` begins."""
    if not _belle_turns(record):
        return _exchange(record, "instruction", "output", "input")
    turns = BELLE.turns(_text(record, "instruction"), open_end=True)
    return [_settled(turns + _said("assistant", _text(record, "output")))]


def _hc3(record: Record, answers: str, every: bool = False) -> Found:
    question = _said("user", _text(record, "question"))
    texts = [text for text in _listed(record, answers) if isinstance(text, str) and text.strip()]
    if not texts:
        raise ValueError(f"{answers!r} has no text")
    return [Conversation({"messages": question + _said("assistant", text)}) for text in (texts if every else texts[:1])]


def _flan(record: Record) -> Found:
    if _is(record, str, "inputs_pretokenized", "targets_pretokenized"):  # P3: the others are ids of T5's tokenizer
        return _exchange(record, "inputs_pretokenized", "targets_pretokenized")
    return _exchange(record, "inputs", "targets")


def _prompt_completion(record: Record) -> Found:
    if isinstance(record.get("prompt"), list) or isinstance(record.get("completion"), list):
        return [
            Conversation(
                {"messages": _sides(record, "prompt", "user") + _sides(record, "completion", "assistant"), **_tools(record)}
            )
        ]
    return _exchange(record, "prompt", "completion")


def _sides(record: Record, name: str, role: str) -> list[Message]:
    """One side of an exchange: a list of messages as it is, or a string as a message of `role`."""
    value = record.get(name)
    return value if isinstance(value, list) else _said(role, _text(record, name))


def _plain_completion(record: Record) -> Found:
    return [Segments([(_text(record, "prompt"), False), (_text(record, "completion"), True)], eos=True)]


def _hh(record: Record) -> Found:
    return [_settled(HH.turns(_text(record, "chosen")))]


def _preference(record: Record) -> bool:
    if record.get("messages") is not None or HH.mark(record.get("chosen")):
        return False
    return _is(record, list, "chosen") or (_is(record, str, "chosen") and any(name in record for name in ("prompt", "question")))


def _chosen(record: Record) -> Found:
    """The preferred reply behind its prompt; a list of messages that holds the prompt already is taken as it is."""
    reply = _sides(record, "chosen", "assistant")
    asked = "prompt" if record.get("prompt") is not None else "question"
    if any(isinstance(message, dict) and message.get("role") == "user" for message in reply):
        before: list[Message] = []
    elif HH.mark(record.get(asked)):
        before = HH.turns(record[asked], open_end=True)
    else:
        before = _sides(record, asked, "user")
    system = _said("system", _optional(record, "system") or _optional(record, "system_prompt"))
    if any(isinstance(message, dict) and message.get("role") == "system" for message in [*before, *reply]):
        system = []
    return [Conversation({"messages": system + before + reply, **_tools(record)})]


def _is_tree(record: Record) -> bool:
    return trees.ROWS in record or _is(record, dict, "prompt") or trees.is_row(record)


def _oasst(record: Record, best: bool = False) -> Found:
    found, changed = trees.conversations(record, best)
    return [Conversation({"messages": messages}, changed=() if number else changed) for number, messages in enumerate(found)]


def _lmflow(record: Record) -> Found:
    """A whole file is one record; each instance stands for itself."""
    kind, documents = record.get("type"), _LMFLOW.get(str(record.get("type")))
    if documents is None:
        raise ValueError(f"'type' is {kind!r}; known: {', '.join(_LMFLOW)}")
    found: list[Document | ValueError] = []
    for instance in _listed(record, "instances"):
        try:
            found += documents(decoded(instance) if isinstance(instance, dict) else {})
        except ValueError as error:
            found.append(error)
    return found


def _lmflow_turns(instance: Record) -> Found:
    if instance.get("messages") is None:
        return _sharegpt(instance)
    messages = _said("system", _optional(instance, "system")) + _listed(instance, "messages")
    return [Conversation({"messages": messages, **_tools(instance)})]


def _lmflow_pair(instance: Record) -> Found:
    if not isinstance(instance.get("chosen"), dict):
        raise ValueError("'chosen' is not a JSON object")
    return _lmflow_turns(instance["chosen"])


def _segments(record: Record) -> Found:
    segments = []
    for number, segment in enumerate(_listed(record, "segments" if record.get("segments") is not None else "input_output"), 1):
        label, text = (segment.get("label"), segment.get("text")) if isinstance(segment, dict) else (None, None)
        if not isinstance(label, bool) or not isinstance(text, str):
            raise ValueError(f"segment {number} has no true or false 'label', or no string 'text'")
        segments.append((text, label))
    return [Segments(segments)]


def _tokens(record: Record) -> Found:
    """Ids without the positions that `attention_mask` calls padding. A label is the id of its position or -100."""
    ids = _numbers(record, "input_ids")
    labels = _numbers(record, "labels") if record.get("labels") is not None else ids
    mask = _numbers(record, "attention_mask") if record.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise ValueError("'input_ids', 'labels' and 'attention_mask' have different lengths")
    kept = [place for place, there in enumerate(mask) if there]
    if not kept:
        raise ValueError("'attention_mask' leaves no token")
    if kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError("'attention_mask' has zeros between ones; only padding at the ends can be left out")
    wrong = next((place for place in kept if labels[place] not in (-100, ids[place])), None)
    if wrong is not None:
        raise ValueError(f"label {labels[wrong]} at position {wrong} is neither -100 nor the id there, {ids[wrong]}")
    return [Tokens([ids[place] for place in kept], [labels[place] != -100 for place in kept])]


def _numbers(record: Record, name: str) -> list[int]:
    numbers = _listed(record, name)
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{name!r} is not a list of integers")
    return numbers


def _marked(record: Record, markers: Markers) -> Found:
    return [_settled(markers.turns(_text(record, "text")))]


_SECTION = re.compile(r"### (Instruction|Input|Response):")


def _has_sections(record: Record) -> bool:
    return _is(record, str, "text") and {"Instruction", "Response"} <= set(_SECTION.findall(record["text"]))


def _alpaca_text(record: Record) -> Found:
    """The record that was written out with Alpaca's template, whose first sentences are left out with its headings."""
    _, *rest = _SECTION.split(_text(record, "text"))
    sections = {name.lower(): text.strip() for name, text in zip(rest[::2], rest[1::2], strict=True)}
    if len(sections) != len(rest) // 2:
        raise ValueError("several sections of one name ('### Instruction:', ...)")
    return _exchange(sections, "instruction", "response", "input")


def _is_plain(record: Record) -> bool:
    return _is(record, str, "text") and not (
        _has_sections(record) or any(markers.mark(record["text"]) for markers in (GUANACO, OIG))
    )


def _plain(record: Record) -> Found:
    return [Segments([(_text(record, "text"), True)], eos=True)]


_LMFLOW: dict[str, Callable[[Record], Found]] = {
    "text_only": _plain,
    "text2text": partial(_exchange, question="input", reply="output"),
    "conversation": _lmflow_turns,
    "paired_conversation": _lmflow_pair,
}
FIELDS = (
    Format("messages", lambda r: r.get("messages") is not None and not _turns(r, "from"), _messages),
    Format("sharegpt", lambda r: _turns(r, "from") or (r.get("messages") is None and _other_turns(r)), _sharegpt),
    Format("exchanges", lambda r: r.get("messages") is None and _turns(r, "input", "output"), _exchanges),
    Format("ultrachat", lambda r: _is(r, list, "data") and bool(r["data"]) and isinstance(r["data"][0], str), _ultrachat),
    Format(
        "alpaca",
        lambda r: _flat(r, "instruction", "output") and "input" in r and not _belle_turns(r),
        partial(_exchange, question="instruction", reply="output", given="input"),
    ),
    Format(
        "evol_instruct",
        lambda r: _flat(r, "instruction", "output") and "input" not in r and not _belle_turns(r),
        partial(_exchange, question="instruction", reply="output"),
    ),
    Format("belle", _belle_turns, _belle),
    Format("dolphin", None, _dolphin),
    Format(
        "dolly",
        lambda r: _flat(r, "instruction", "response"),
        partial(_exchange, question="instruction", reply="response", given="context"),
    ),
    Format(
        "openorca",
        lambda r: _flat(r, "question", "response"),
        partial(_exchange, question="question", reply="response", system="system_prompt"),
    ),
    Format("hc3", lambda r: _is(r, str, "question") and _is(r, list, "human_answers"), partial(_hc3, answers="human_answers")),
    Format("hc3_human", None, partial(_hc3, answers="human_answers", every=True)),
    Format("hc3_chatgpt", None, partial(_hc3, answers="chatgpt_answers", every=True)),
    Format("firefly", lambda r: _flat(r, "input", "target"), partial(_exchange, question="input", reply="target")),
    Format("gpt4all", lambda r: _flat(r, "prompt", "response"), partial(_exchange, question="prompt", reply="response")),
    Format("flan", lambda r: _flat(r, "inputs", "targets") or _flat(r, "inputs_pretokenized", "targets_pretokenized"), _flan),
    Format(
        "prompt_completion",
        lambda r: all(isinstance(r.get(name), str | list) for name in ("prompt", "completion")),
        _prompt_completion,
    ),
    Format("prompt_completion_text", None, _plain_completion),
    Format("hh", lambda r: r.get("messages") is None and HH.mark(r.get("chosen")), _hh),
    Format("chosen", _preference, _chosen),
    Format("oasst", _is_tree, _oasst),
    Format("oasst_best", None, partial(_oasst, best=True)),
    Format("lmflow", lambda r: _is(r, str, "type") and _is(r, list, "instances"), _lmflow),
    Format("input_output", lambda r: _is(r, list, "segments") or _is(r, list, "input_output"), _segments),
    Format("tokens", lambda r: _is(r, list, "input_ids"), _tokens),
)
TEXTS = (
    Format("guanaco", lambda r: GUANACO.mark(r.get("text")), partial(_marked, markers=GUANACO)),
    Format("oig", lambda r: OIG.mark(r.get("text")), partial(_marked, markers=OIG)),
    Format("alpaca_text", _has_sections, _alpaca_text),
    Format("text", _is_plain, _plain),
)
FORMATS = {known.name: known for known in (*FIELDS, *TEXTS)}
ALIASES = {"openai": "messages", "xp3": "flan", "oasst_all": "oasst", "evol": "evol_instruct"}
