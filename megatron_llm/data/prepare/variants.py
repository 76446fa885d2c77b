"""Other tasks from the same conversation: `preprocess-chat --variants` writes a data set of each beside the original.

Training replaces some conversations by such a variant (`data.conversation_augment`), so that a model also learns from a
reply to its question, as in the data of FLAN. `records.py` calls the functions of `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_llm.data.prepare.documents import Conversation, Document
from megatron_llm.data.prepare.turns import Message

FLIP = "Write the question or request that the following text is the reply to."
PREDICT_INSTRUCTION = "Write the instruction that turns the following input into the following output."
_EXCHANGE = ("user", "assistant")


def flip(document: Document) -> Conversation:
    """Given each reply, the question: turn by turn, without the system message, which is about how to reply.

    `train` and `weight` of a reply go with its question. Raises ValueError if questions and replies do not alternate.
    """
    messages = _texts(document)
    if messages[0]["role"] == "system":
        messages = messages[1:]
    if len(messages) % 2 and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if not messages or tuple(message["role"] for message in messages) != _EXCHANGE * (len(messages) // 2):
        raise ValueError("questions and replies do not alternate")
    flipped: list[Message] = []
    for question, reply in zip(messages[::2], messages[1::2], strict=True):
        asked = f"{FLIP}\n\n{reply['content']}"
        flipped += [{"role": "user", "content": asked}, _answer(reply, question["content"])]
    return Conversation({"messages": flipped})


def predict_instruction(document: Document) -> Conversation:
    """Given input and output, the instruction that leads from one to the other.

    The instruction is the record's own where it has an input beside it, else the system message of one question and its
    reply. Raises ValueError if there is neither.
    """
    messages = _texts(document)
    assert isinstance(document, Conversation)
    parts, reply = document.parts, messages[-1]
    if parts is None:
        if [message["role"] for message in messages] != ["system", *_EXCHANGE]:
            raise ValueError("no instruction beside an input")
        parts = messages[0]["content"], messages[1]["content"], reply["content"]
    instruction, given, output = parts
    asked = f"{PREDICT_INSTRUCTION}\n\nInput:\n{given}\n\nOutput:\n{output}"
    return Conversation({"messages": [{"role": "user", "content": asked}, _answer(reply, instruction)]})


def _answer(reply: Message, content: str) -> Message:
    """A message in the place of a reply, without its other fields: a thought there is not about this content."""
    return {"role": "assistant", "content": content, **{name: reply[name] for name in ("train", "weight") if name in reply}}


def _texts(document: Document) -> list[Message]:
    """The messages, if all are plain text. Raises ValueError if not."""
    if not isinstance(document, Conversation):
        raise ValueError("no conversation")
    messages = document.content.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError("no conversation")
    if document.content.get("tools") or any(_uses_tools(message) for message in messages):
        raise ValueError("it uses tools")
    if not all(isinstance(message.get("content"), str) and message["content"].strip() for message in messages):
        raise ValueError("a message without text")
    return messages


def _uses_tools(message: Message) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


VARIANTS: dict[str, Callable[[Document], Conversation]] = {"flip": flip, "predict_instruction": predict_instruction}
