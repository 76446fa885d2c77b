"""Every record format on records of its real shape: what they become, that they are recognized, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_llm.data.prepare.conversations import FIELDS, FORMATS, TEXTS, decoded, recognize
from megatron_llm.data.prepare.documents import Conversation
from megatron_llm.data.prepare.turns import JOINED, LEADING
from tests.data.prepare.format_samples import ALPACA_TEXT, SAMPLES, TOOL, say, turn

CASES = [pytest.param(name, *case, id=f"{name}-{number}") for name, cases in SAMPLES.items() for number, case in enumerate(cases)]


def plain(document: Any) -> Any:
    return document.content["messages"] if isinstance(document, Conversation) else document


def test_every_format_has_a_sample() -> None:
    assert set(SAMPLES) == set(FORMATS)


@pytest.mark.parametrize(("name", "record", "documents"), CASES)
def test_documents_of_a_record(name: str, record: dict[str, Any], documents: list[Any]) -> None:
    before = json.dumps(record)
    assert [plain(document) for document in FORMATS[name].documents(record)] == documents
    assert json.dumps(record) == before


@pytest.mark.parametrize(("name", "record", "documents"), CASES)
def test_a_record_is_recognized_as_its_format_and_no_other(name: str, record: dict[str, Any], documents: list[Any]) -> None:
    fitting = [known.name for known in FIELDS if known.fits is not None and known.fits(record)]
    fitting = fitting or [known.name for known in TEXTS if known.fits is not None and known.fits(record)]
    if FORMATS[name].fits is None:  # it looks like another one
        assert fitting == [{"dolphin": "alpaca", "prompt_completion_text": "prompt_completion"}.get(name, name.partition("_")[0])]
    else:
        assert fitting == [name]
        assert recognize(record).name == name


@pytest.mark.parametrize(("name", "record", "documents"), CASES)
def test_csv_holds_lists_as_json(name: str, record: dict[str, Any], documents: list[Any]) -> None:
    """And what is no list stays the string it is."""
    cells = {
        key: value if isinstance(value, str) else json.dumps(value) if isinstance(value, list) else value
        for key, value in record.items()
    }
    if name in ("flan", "oasst", "oasst_best", "lmflow"):  # there is no csv of nested objects, or of P3
        return
    assert [plain(document) for document in FORMATS[name].documents(decoded(cells))] == documents


def test_other_fields_of_a_conversation_are_kept() -> None:
    record = {"messages": say("u: Q", "a: A"), "tools": [TOOL], "documents": ["d"]}
    (document,) = FORMATS["messages"].documents(record)
    assert isinstance(document, Conversation) and document.content == record
    turns = [turn("human", "Q"), turn("gpt", "A", tool_calls=[TOOL])]
    (document,) = FORMATS["sharegpt"].documents(decoded({"conversations": turns, "tools": json.dumps([TOOL])}))
    assert isinstance(document, Conversation)
    assert document.content == {"messages": [*say("u: Q"), {**say("a: A")[0], "tool_calls": [TOOL]}], "tools": [TOOL]}


def changed(*turns: dict[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    (document,) = FORMATS["sharegpt"].documents({"conversations": list(turns)})
    assert isinstance(document, Conversation)
    return document.content["messages"], document.changed


def test_transcripts_that_do_not_alternate() -> None:
    human, gpt = turn("human", "Q"), turn("gpt", "A")
    assert changed(human, gpt) == (say("u: Q", "a: A"), ())
    assert changed(turn("system", "S"), gpt, gpt, human, gpt) == (say("s: S", "u: Q", "a: A"), (LEADING,))
    assert changed(human, human, gpt) == (say("u: Q\n\nQ", "a: A"), (JOINED,))
    assert changed(gpt, human, gpt, gpt, gpt) == (say("u: Q", "a: A\n\nA\n\nA"), (LEADING, JOINED))
    weighted = turn("gpt", "B", weight=0)
    assert changed(human, gpt, weighted)[0] == [*say("u: Q", "a: A"), {**say("a: B")[0], "weight": 0}]
    results = [turn("tool", "1"), turn("tool", "2")]
    assert changed(human, *results, gpt) == (say("u: Q", "t: 1", "t: 2", "a: A"), ())
    assert changed(human, gpt, human) == (say("u: Q", "a: A", "u: Q"), ())


NONE_FIT = [
    ({}, "fits no known format (it has no fields); name one with --format, or the columns with --map"),
    ({"question": "Q", "answer": "A"}, "its fields: question, answer"),
    ({"instruction": "I", "input": "", "output": None}, "its fields: instruction, input, output (null))"),
    ({"text": 3}, "fits no known format"),
    ({"instruction": "I", "input": "X", "output": "O", "response": "R"}, "ambiguous: it fits alpaca and dolly"),
    ({"question": "Q", "response": "R", "prompt": "P"}, "ambiguous: it fits openorca and gpt4all"),
    ({"text": "### Human: a ### Assistant: b <human>: c <bot>: d"}, "ambiguous: it fits guanaco and oig"),
    ({f"column{number}": 0 for number in range(40)}, "column11, ...)"),
]


@pytest.mark.parametrize(("record", "reason"), NONE_FIT)
def test_no_format_or_several(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        recognize(record)
    assert reason in str(caught.value)


REFUSED = [
    ("alpaca", {"instruction": "I", "input": "X"}, "no field 'output' (its fields: instruction, input)"),
    ("alpaca", {"instruction": "I", "output": ""}, "'output' is empty"),
    ("alpaca", {"instruction": " ", "output": "O"}, "'instruction' is empty"),
    ("alpaca", {"instruction": "I", "input": 3, "output": "O"}, "'input' is not a string but int"),
    ("alpaca", {"instruction": "I", "output": "O", "history": [["Q"]]}, "'history' is no list of pairs"),
    ("alpaca", {"instruction": "I", "output": "O", "history": 3}, "'history' is no list"),
    ("dolphin", {"instruction": "S", "input": "", "output": "A"}, "'input' is empty"),
    ("dolly", {"instruction": "I", "context": ["C"], "response": "R"}, "'context' is not a string but list"),
    ("hc3", {"question": "Q", "human_answers": [], "chatgpt_answers": ["C"]}, "'human_answers' is no list, or an empty one"),
    ("hc3", {"question": "Q", "human_answers": ["", None]}, "'human_answers' has no text"),
    ("sharegpt", {"conversations": []}, "'conversations' is no list, or an empty one"),
    ("sharegpt", {"conversations": [turn("gpt", "A")]}, "no turn of a user"),
    ("sharegpt", {"conversations": [turn("human", "Q"), turn("gpt", None)]}, "turn 2 (gpt) has no text"),
    ("sharegpt", {"conversations": [turn("human", ""), turn("gpt", "A")]}, "turn 1 (human) has no text"),
    ("sharegpt", {"conversations": [turn("alien", "Q")]}, "unknown speaker 'alien'; known: system, developer, user, human,"),
    ("sharegpt", {"conversations": [{"value": "Q"}]}, "unknown speaker None"),
    ("sharegpt", {"conversations": ["Q"]}, "turn 1 is not a JSON object"),
    ("sharegpt", {"conversations": [turn("human", "Q"), turn("gpt", "A")], "tools": "f(x)"}, "'tools' is not JSON"),
    ("exchanges", {"conversation": [{"input": "Q", "output": None}]}, "no field 'output'"),
    ("exchanges", {"conversation": ["Q"]}, "an exchange is not a JSON object"),
    ("ultrachat", {"data": ["Q", ""]}, "'2' is empty"),
    ("hh", {"chosen": "\n\nHuman: Q\n\nAssistant:"}, "turn 2 (assistant) has no text"),
    ("hh", {"rejected": "x"}, "no field 'chosen'"),
    ("chosen", {"prompt": "Q", "chosen": ""}, "'chosen' is empty"),
    ("chosen", {"chosen": "A"}, "no field 'question'"),
    ("guanaco", {"text": "### Assistant: A"}, "no turn of a user"),
    ("guanaco", {"text": "no markers"}, "no turn of a user"),
    ("oig", {"text": "<human>: Q\n<bot>:"}, "turn 2 (assistant) has no text"),
    ("alpaca_text", {"text": "### Instruction:\na\n### Instruction:\nb\n### Response:\nc"}, "several sections of one name"),
    ("alpaca_text", {"text": ALPACA_TEXT[:-1]}, "'response' is empty"),
    ("text", {"text": "\n"}, "'text' is empty"),
    ("input_output", {"segments": [{"label": "true", "text": "A"}]}, "segment 1 has no true or false 'label'"),
    ("input_output", {"segments": [{"label": True, "text": "A"}, {"label": True}]}, "segment 2 has no"),
    ("tokens", {"input_ids": [1.5]}, "'input_ids' is not a list of integers"),
    ("tokens", {"input_ids": [True]}, "'input_ids' is not a list of integers"),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, "have different lengths"),
    ("tokens", {"input_ids": [1, 2], "labels": [-100, 1]}, "label 1 at position 1 is neither -100 nor the id there, 2"),
    ("tokens", {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "'attention_mask' has zeros between ones"),
    ("tokens", {"input_ids": [1, 2], "attention_mask": [0, 0]}, "'attention_mask' leaves no token"),
    ("lmflow", {"type": "image", "instances": [{}]}, "'type' is 'image'; known: text_only, text2text"),
    ("oasst", {"prompt": {"text": "Q", "role": "prompter"}}, "the tree has no reply"),
    ("oasst", {"prompt": {"text": "Q", "role": "poet"}}, "unknown role 'poet' in a message tree"),
    ("oasst", {"prompt": {"text": "Q", "role": ["prompter"]}}, "unknown role ['prompter'] in a message tree"),
    ("oasst", {"message_tree_id": "1", "tree_state": "growing", "prompt": {}}, "not ready for export but 'growing'"),
    ("oasst", {"prompt": "Q"}, "no tree: neither a 'prompt' with 'replies'"),
    ("oasst", {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Q"}, "put all rows of the trees into files"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "reason"), REFUSED)
def test_records_that_are_refused(name: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        FORMATS[name].documents(record)
    assert reason in str(caught.value)


def test_an_instance_that_is_wrong_costs_only_itself() -> None:
    record = {
        "type": "text2text",
        "instances": [{"input": "Q", "output": "A"}, {"input": "Q"}, "x", {"input": "R", "output": "B"}],
    }
    first, second, third, last = FORMATS["lmflow"].documents(record)
    assert (plain(first), plain(last)) == (say("u: Q", "a: A"), say("u: R", "a: B"))
    assert str(second) == "no field 'output' (its fields: input)"
    assert isinstance(third, ValueError)
