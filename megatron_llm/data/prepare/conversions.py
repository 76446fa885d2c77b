"""How a record of each format becomes documents; the table in `conversations.py` says which function is whose.

They raise ValueError saying what is wrong with the record, and are called for any record if the user names the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_llm.data.prepare import trees
from megatron_llm.data.prepare.documents import (
    Conversation,
    Document,
    Found,
    Segments,
    Tokens,
    has,
    list_of,
    optional_text,
    said,
    text_of,
    turn_field,
)
from megatron_llm.data.prepare.turns import BELLE, HH, Markers, Message, Record, settle, turn_messages


def _tools(record: Record) -> Record:
    """`tools` as a template takes them, if there are any. Raises ValueError."""
    tools = record.get("tools")
    if isinstance(tools, str):
        raise ValueError("'tools' is not JSON")
    return {"tools": tools} if tools else {}


def from_messages(record: Record) -> Found:
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


def sharegpt(record: Record) -> Found:
    messages = turn_messages(list_of(record, turn_field(record)))
    system = [] if messages and messages[0]["role"] == "system" else _system(record)
    return [_settled(system + messages, _tools(record))]


def _system(record: Record) -> list[Message]:
    """The system message that stands beside the turns."""
    return said("system", optional_text(record, "system") or optional_text(record, "system_prompt"))


def _settled(messages: Sequence[Message], rest: Record | None = None) -> Conversation:
    settled, changed = settle(messages)
    return Conversation({"messages": settled, **(rest or {})}, changed=changed)


def exchanges(record: Record) -> Found:
    messages: list[Message] = []
    for both in list_of(record, turn_field(record)):
        if not isinstance(both, dict):
            raise ValueError("an exchange is not a JSON object")
        messages += said("system", optional_text(both, "system"))
        messages += said("user", text_of(both, "input")) + said("assistant", text_of(both, "output"))
    return [Conversation({"messages": messages})]


def ultrachat(record: Record) -> Found:
    texts = {str(number): text for number, text in enumerate(list_of(record, "data"), 1)}
    roles = ("assistant", "user")
    return [Conversation({"messages": [{"role": roles[int(name) % 2], "content": text_of(texts, name)} for name in texts]})]


def exchange(record: Record, question: str, reply: str, given: str = "", system: str = "system") -> Found:
    """One question and its reply, by the names of the fields. `given`: what the instruction in `question` is about."""
    instruction, output = text_of(record, question), text_of(record, reply)
    about, rules = optional_text(record, given), optional_text(record, system)
    asked = f"{instruction}\n\n{about}" if about else instruction
    messages = said("system", rules) + _history(record) + said("user", asked) + said("assistant", output)
    parts = (instruction, about, output) if about and not record.get("history") else None
    return [Conversation({"messages": messages}, parts)]


def _history(record: Record) -> list[Message]:
    """Earlier exchanges as LLaMA-Factory keeps them: [[question, reply], ...]."""
    messages: list[Message] = []
    for pair in list_of(record, "history") if record.get("history") else ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("'history' is no list of pairs")
        texts = dict(zip(("question", "reply"), pair, strict=True))
        messages += said("user", text_of(texts, "question")) + said("assistant", text_of(texts, "reply"))
    return messages


def dolphin(record: Record) -> Found:
    return exchange(record, "input", "output", system="instruction")


def has_turns(record: Record) -> bool:
    """Whether the instruction is a transcript that the output continues, as in Belle's data of several turns.

    An instruction that is about a transcript (to summarize it, say) has words before or behind it, or an input.
    """
    instruction, about = record.get("instruction"), record.get("input")
    if not isinstance(instruction, str) or (isinstance(about, str) and about.strip()):
        return False
    _, *turns = BELLE.pattern.split(instruction.strip())
    asks = len(turns) > 2 and (turns[-2] == "Human" or not turns[-1])
    return asks and BELLE.pattern.match(instruction.strip()) is not None


def belle(record: Record) -> Found:
    """The turns so far stand in the instruction, which ends where the reply in `output` begins."""
    if not has_turns(record):
        return exchange(record, "instruction", "output", "input")
    turns = BELLE.turns(text_of(record, "instruction"), open_end=True)
    return [_settled(turns + said("assistant", text_of(record, "output")))]


def hc3(record: Record, answers: str, every: bool = False) -> Found:
    question = said("user", text_of(record, "question"))
    texts = [text for text in list_of(record, answers) if isinstance(text, str) and text.strip()]
    if not texts:
        raise ValueError(f"{answers!r} has no text")
    return [Conversation({"messages": question + said("assistant", text)}) for text in (texts if every else texts[:1])]


def flan(record: Record) -> Found:
    if has(record, str, "inputs_pretokenized", "targets_pretokenized"):  # P3: the others are ids of T5's tokenizer
        return exchange(record, "inputs_pretokenized", "targets_pretokenized")
    return exchange(record, "inputs", "targets")


def prompt_completion(record: Record) -> Found:
    if isinstance(record.get("prompt"), list) or isinstance(record.get("completion"), list):
        messages = _sides(record, "prompt", "user") + _sides(record, "completion", "assistant")
        return [Conversation({"messages": messages, **_tools(record)})]
    return exchange(record, "prompt", "completion")


def _sides(record: Record, name: str, role: str) -> list[Message]:
    """One side of an exchange: a list of messages as it is, or a string as a message of `role`."""
    value = record.get(name)
    return value if isinstance(value, list) else said(role, text_of(record, name))


def completion_text(record: Record) -> Found:
    return [Segments([(text_of(record, "prompt"), False), (text_of(record, "completion"), True)], eos=True)]


def hh(record: Record) -> Found:
    return [_settled(HH.turns(text_of(record, "chosen")))]


def chosen(record: Record) -> Found:
    """The preferred reply behind its prompt; a list of messages that holds the prompt already is taken as it is."""
    reply = _sides(record, "chosen", "assistant")
    asked = "prompt" if record.get("prompt") is not None else "question"
    if any(isinstance(message, dict) and message.get("role") == "user" for message in reply):
        before: list[Message] = []
    elif HH.mark(record.get(asked)):
        before = HH.turns(record[asked], open_end=True)
    else:
        before = _sides(record, asked, "user")
    system = _system(record)
    if any(isinstance(message, dict) and message.get("role") == "system" for message in [*before, *reply]):
        system = []
    return [Conversation({"messages": system + before + reply, **_tools(record)})]


def oasst(record: Record, best: bool = False) -> Found:
    found, changed = trees.conversations(record, best)
    return [Conversation({"messages": messages}, changed=() if number else changed) for number, messages in enumerate(found)]


def lmflow(record: Record) -> Found:
    """A whole file is one record; each instance stands for itself."""
    kind, documents = record.get("type"), _LMFLOW.get(str(record.get("type")))
    if documents is None:
        raise ValueError(f"'type' is {kind!r}; known: {', '.join(_LMFLOW)}")
    found: list[Document | ValueError] = []
    for instance in list_of(record, "instances"):
        try:
            found += documents(instance if isinstance(instance, dict) else {})
        except ValueError as error:
            found.append(error)
    return found


def _lmflow_turns(instance: Record) -> Found:
    if instance.get("messages") is None:
        return sharegpt(instance)
    messages = said("system", optional_text(instance, "system")) + list_of(instance, "messages")
    return [Conversation({"messages": messages, **_tools(instance)})]


def _lmflow_pair(instance: Record) -> Found:
    if not isinstance(instance.get("chosen"), dict):
        raise ValueError("'chosen' is not a JSON object")
    return _lmflow_turns(instance["chosen"])


def from_segments(record: Record) -> Found:
    segments = []
    for number, segment in enumerate(list_of(record, "segments" if record.get("segments") is not None else "input_output"), 1):
        label, text = (segment.get("label"), segment.get("text")) if isinstance(segment, dict) else (None, None)
        if not isinstance(label, bool) or not isinstance(text, str):
            raise ValueError(f"segment {number} has no true or false 'label', or no string 'text'")
        segments.append((text, label))
    return [Segments(segments)]


def from_tokens(record: Record) -> Found:
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
    numbers = list_of(record, name)
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{name!r} is not a list of integers")
    return numbers


def marked(record: Record, markers: Markers) -> Found:
    return [_settled(markers.turns(text_of(record, "text")))]


SECTION = re.compile(r"### (Instruction|Input|Response):")


def alpaca_text(record: Record) -> Found:
    """The record that was written out with Alpaca's template, whose first sentences are left out with its headings."""
    _, *rest = SECTION.split(text_of(record, "text"))
    sections = {name.lower(): text.strip() for name, text in zip(rest[::2], rest[1::2], strict=True)}
    if len(sections) != len(rest) // 2:
        raise ValueError("several sections of one name ('### Instruction:', ...)")
    return exchange(sections, "instruction", "response", "input")


def plain_text(record: Record) -> Found:
    return [Segments([(text_of(record, "text"), True)], eos=True)]


_LMFLOW: dict[str, Callable[[Record], Found]] = {
    "text_only": plain_text,
    "text2text": partial(exchange, question="input", reply="output"),
    "conversation": _lmflow_turns,
    "paired_conversation": _lmflow_pair,
}
