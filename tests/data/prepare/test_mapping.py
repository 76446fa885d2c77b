"""`--map`: columns to roles, in words and in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_llm.data.prepare.mapping import describe_mapping, read_mapping
from tests.data.prepare.format_samples import say

RECORD = {"question": "Q", "context": "C", "answer": "A", "score": 3, "blank": " ", "null": None, "list": [], "a=b": "E"}


def mapped(*words: str, record: dict[str, Any] = RECORD) -> list[dict[str, Any]]:
    return read_mapping(words).messages(record)


def test_columns_in_order() -> None:
    assert mapped("question=user", "answer=assistant") == say("u: Q", "a: A")
    assert mapped("context=system", "question=human", "answer=gpt") == say("s: C", "u: Q", "a: A")
    assert mapped("context=user", "question=user", "answer=assistant") == say("u: C\n\nQ", "a: A")
    assert mapped("question=user", "answer=assistant", "context=user", "score=assistant") == say("u: Q", "a: A", "u: C", "a: 3")
    assert mapped("a=b=user", "answer=assistant") == say("u: E", "a: A")


def test_columns_that_may_be_missing() -> None:
    assert mapped("question=user", "absent=user?", "answer=assistant") == say("u: Q", "a: A")
    assert mapped("null=system?", "question=user", "blank=user", "answer=assistant") == say("u: Q", "a: A")
    assert mapped("blank=system", "question=user", "answer=assistant") == say("u: Q", "a: A")
    assert mapped("question=user", "context?=user", "answer=assistant") == say("u: Q\n\nC", "a: A")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["absent=user", "answer=assistant"], "no column 'absent' (its fields: question, context, answer, score,"),
        (["null=user", "answer=assistant"], "no column 'null'"),
        (["blank=user", "answer=assistant"], "column 'blank' is empty"),
        (["question=user", "list=assistant"], "column 'list' is not a text but list"),
    ],
)
def test_columns_that_a_record_lacks(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        mapped(*words)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["question=user"], "--map gives no column to the assistant"),
        (["question=poet", "answer=assistant"], "unknown role 'poet'; known: system, user, assistant, tool"),
        (["question=user", "answer"], "--map answer: give COLUMN=ROLE"),
        (["=user"], "--map =user: give COLUMN=ROLE"),
        (["absent.yaml"], "--map absent.yaml: no such file"),
    ],
)
def test_mappings_that_are_none(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_mapping(words)
    assert reason in str(caught.value)


def from_yaml(folder: Path, text: str) -> Any:
    (folder / "map.yaml").write_text(text)
    return read_mapping([str(folder / "map.yaml")])


def test_yaml(tmp_path: Path) -> None:
    columns = from_yaml(tmp_path, "question: user\nanswer: assistant\n")
    assert columns == read_mapping(["question=user", "answer=assistant"])
    template = 'system: Be brief.\nuser: "{question}\\n\\n{context?}"\nassistant: "{{{answer}}}"\n'
    mapping = from_yaml(tmp_path, template)
    assert mapping.messages(RECORD) == say("s: Be brief.", "u: Q\n\nC", "a: {A}")
    assert mapping.messages({"question": "Q", "answer": "A"}) == say("s: Be brief.", "u: Q", "a: {A}")
    assert mapping.messages({"question": "{x}", "answer": " A"}) == say("s: Be brief.", "u: {x}", "a: { A}")
    with pytest.raises(ValueError, match="no column 'question'"):
        mapping.messages({"answer": "A"})
    assert describe_mapping(mapping) != describe_mapping(columns)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("user: '{question'\nassistant: '{answer}'", "a brace without its other half in '{question'"),
        ("user: '{question}'\nassistant: 3", "a value is not a string"),
        ("user: '{question}'\nassistant: always this", "--map gives no column to the assistant"),
        ("question: '{user}'\nassistant: '{answer}'", "unknown role 'question'"),
        ("- user", "must hold a mapping"),
        ("user: '{a}'\nuser: '{b}'", "key 'user' appears twice"),
    ],
)
def test_yaml_that_is_none(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_yaml(tmp_path, text)
    assert reason in str(caught.value)
