"""Prompts: from files, and as ids. Called by `cli/generate.py`, `chat.py` and `training/samples.py`.

A prompt is a text, or a list of messages such as `{"role": "user", "content": "hi"}` which the chat template renders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_llm.data.indexed import ROLES

Message = dict[str, str]
Prompt = str | list[Message]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, one a line: JSON in *.jsonl, plain text in others. Blank lines are none.

    A line of JSON is a string, `{"prompt": TEXT}` or `{"messages": [...]}`, the conversation up to the reply that is wanted;
    other fields are ignored. Raises ValueError naming file and line of anything else, or if there is no prompt.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_of_json(line) if path.suffix == ".jsonl" else line.removesuffix("\r"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one a line")
    return prompts


def _of_json(line: str) -> Prompt:
    value = json.loads(line)
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError('neither a string, nor an object with "prompt" (a string) or "messages" (a list)')
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise ValueError(f"{message!r} is not a message with a role (system, user, assistant or tool) and a content")
    if value[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; leave out the reply that is to be generated")
    return value


def encode(tokenizer: Any, prompt: Prompt, chat: bool = False, system: str | None = None) -> list[int]:
    """The ids of a prompt, with the template's introduction of a reply if it is a conversation.

    chat: a text is a user's message. system: said before the conversation, if that has no system message of its own.

    Raises ValueError if the tokenizer has no chat template that is needed, or if that refuses the conversation.
    """
    if isinstance(prompt, str) and not chat:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return encode_messages(tokenizer, messages)


def encode_messages(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The ids of a conversation up to a reply. Raises ValueError as `encode`."""
    import jinja2

    if not tokenizer.chat_template:
        raise ValueError("a conversation needs a tokenizer with a chat template, and this one has none")
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
    except (jinja2.TemplateError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
