"""Records of all formats on their way to token files: the account of every record, masks without a template, the command."""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_llm.cli import inspect, preprocess_chat
from megatron_llm.data.indexed import NOT_TRAINED, IndexedDataset
from megatron_llm.data.prepare import chat
from megatron_llm.data.prepare.documents import Segments
from megatron_llm.data.prepare.turns import LEADING
from tests.data.prepare.format_samples import SAMPLES, qa, say, turn

CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path, rows: list[Any]) -> Path:
    """Rows in the format that the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table)
    return path


def run(tmp_path: Path, tokenizer: Path, rows: list[Any], **options: Any) -> tuple[Any, IndexedDataset]:
    summary = chat.preprocess_chat([write(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path / "out", progress=False, **options)
    return summary, IndexedDataset(tmp_path / "out")


def contents(prefix: Path) -> tuple[list[list[int]], list[int]]:
    dataset = IndexedDataset(prefix)
    assert dataset.roles is not None
    return [dataset.document(number).tolist() for number in range(dataset.documents)], dataset.roles.tolist()


def test_every_format_at_once(tmp_path: Path, make_tokenizer: Callable[..., Path]) -> None:
    """Records in are records in documents and records skipped; and each document is what it is with its format named."""
    tokenizer_folder = make_tokenizer(chat_template=CALLS)
    rows, formats = [], Counter[str]()
    for name, cases in SAMPLES.items():
        if name in ("dolphin", "prompt_completion_text", "oasst_best", "hc3_human", "hc3_chatgpt"):
            continue
        rows += [record for record, _ in cases]
        formats[name] += len(cases)
    rows[3:3] = [{"what": "is this"}, {"messages": say("u: Q")}, {"messages": say("u: R")}]
    summary, dataset = run(tmp_path, tokenizer_folder, rows)
    assert summary.formats == formats + Counter(messages=2)
    assert summary.records == len(rows)
    assert summary.skipped == {"no assistant token to learn from": 2, next(iter(summary.skipped)): 1}
    several = sum(len(documents) - 1 for name in formats for _, documents in SAMPLES[name])
    assert dataset.documents + summary.skipped.total() == len(rows) + several
    assert f"{len(rows)} records gave {len(rows) + several} conversations" in str(summary)
    assert f"sharegpt {formats['sharegpt']}" in str(summary)
    assert f"1 conversations: {LEADING}" in str(summary)
    assert dataset.meta is not None
    assert dataset.meta.records == len(rows) and dataset.meta.formats == dict(sorted(summary.formats.items()))
    again = chat.preprocess_chat([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "out", progress=False)
    assert again.done_before and (again.formats, again.records) == (summary.formats, summary.records)
    documents, _ = contents(tmp_path / "out")
    for name in formats:
        records = [record for record, _ in SAMPLES[name]]
        source = write(tmp_path / f"{name}.jsonl", records)
        chat.preprocess_chat([source], tokenizer_folder, tmp_path / name, record_format=name, progress=False)
        alone, _ = contents(tmp_path / name)
        at = next(place for place in range(len(documents)) if documents[place : place + len(alone)] == alone)
        del documents[at : at + len(alone)]
    assert not documents


def test_conversations_of_one_record_are_counted_and_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    instances = [
        {"messages": say("u: Q", "a: A")},
        {"messages": say("u: Q")},
        {"messages": []},
        {"messages": say("u: R", "a: B")},
    ]
    record = {"type": "conversation", "instances": instances}
    summary, dataset = run(tmp_path, tokenizer_folder, [record, {"messages": say("u: Q", "a: A")}, *[{"a": 1}] * 2])
    assert (dataset.documents, summary.records, summary.skipped.total()) == (3, 4, 4)
    assert any("a.jsonl:1 conversation 2: no assistant token" in example for example in summary.examples)
    assert any("a.jsonl:1 conversation 3: 'messages' is no list, or an empty one" in example for example in summary.examples)
    with pytest.raises(ValueError, match="a.jsonl:1 conversation 2: no assistant token"):
        run(tmp_path, tokenizer_folder, [record], strict=True)


def by_segments(tokenizer: Any, segments: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """The ids of the whole text, and whether the last character of each lies in a trained segment."""
    text = "".join(text for text, _ in segments)
    trained = [flag for text, flag in segments for _ in text]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [trained[end - 1] for _, end in encoded["offset_mapping"]]


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_segments_and_texts_have_no_template(tmp_path: Path, make_tokenizer: Callable[..., Path], eos: str | None) -> None:
    folder = make_tokenizer(eos=eos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases: list[tuple[dict[str, Any], list[tuple[str, bool]], bool]] = [
        ({"segments": [{"label": False, "text": "<s>say hel"}, {"label": True, "text": "lo again<|im_end|>\n\n"},
                       {"label": False, "text": ""}, {"label": False, "text": "é😀"}, {"label": True, "text": "world"}]},
         [("<s>say hel", False), ("lo again<|im_end|>\n\n", True), ("é😀", False), ("world", True)], False),
        ({"text": "hello world\n"}, [("hello world\n", True)], True),
    ]  # fmt: skip
    _, dataset = run(tmp_path, folder, [record for record, _, _ in cases])
    offsets = dataset.document_offsets()
    assert dataset.roles is not None
    for number, (_, segments, ended) in enumerate(cases):
        ids, trained = by_segments(tokenizer, segments)
        if ended and eos:
            ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
        assert dataset.document(number).tolist() == ids
        roles = np.asarray(dataset.roles[offsets[number] : offsets[number + 1]])
        assert roles.tolist() == [3 if flag else NOT_TRAINED for flag in trained]


def test_a_completion_without_template(tmp_path: Path, tokenizer_folder: Path) -> None:
    ((record, [wanted]),) = SAMPLES["prompt_completion_text"]
    assert isinstance(wanted, Segments)
    _, dataset = run(tmp_path, tokenizer_folder, [record], record_format="prompt_completion_text")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids, trained = by_segments(tokenizer, list(wanted.segments))
    assert dataset.document(0).tolist() == [*ids, tokenizer.eos_token_id]
    assert contents(tmp_path / "out")[1] == [3 if flag else NOT_TRAINED for flag in [*trained, True]]


def test_given_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    size = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    rows = [
        {"input_ids": [0, 7, 8, size - 1], "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 8, size - 1]},
        {"input_ids": [7, size]},
        {"input_ids": [-1]},
        {"input_ids": [7, 8], "labels": [-100, -100]},
    ]
    summary, dataset = run(tmp_path, tokenizer_folder, rows)
    assert contents(tmp_path / "out") == ([[7, 8, size - 1]], [NOT_TRAINED, 3, 3])
    reasons = [example.rpartition(": ")[2] for example in summary.examples]
    outside = f"is outside 0..{size - 1} of the tokenizer"
    assert reasons == [f"token id {size} {outside}", f"token id -1 {outside}", "no assistant token to learn from"]


def test_text_files_and_bad_unicode(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("### Human: Q\n### Assistant: A")
    (tmp_path / "b.txt").write_text("hello")
    wrong = write(tmp_path / "c.jsonl", [{"text": "\ud800"}, {"segments": [{"label": True, "text": "\udc00"}]}])
    sources = [tmp_path / "a.txt", tmp_path / "b.txt", wrong]
    summary = chat.preprocess_chat(sources, tokenizer_folder, tmp_path / "out", progress=False)
    assert summary.formats == {"guanaco": 1, "text": 2, "input_output": 1}
    assert summary.documents == 2
    assert all("half a surrogate pair" in reason for reason in summary.skipped)


FLAT = [
    {"instruction": "I", "input": "X, \"quoted\"\nand more", "output": "O"},
    {"instruction": "J", "input": "", "output": "P"},
    {"instruction": "K", "input": None, "output": "R"},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "arrow"])
def test_tables_of_fields_are_as_lines(tmp_path: Path, tokenizer_folder: Path, suffix: str) -> None:
    run(tmp_path, tokenizer_folder, FLAT)
    summary = chat.preprocess_chat([write(tmp_path / f"b.{suffix}", FLAT)], tokenizer_folder, tmp_path / "b", progress=False)
    assert summary.formats == {"alpaca": 3}
    assert contents(tmp_path / "b") == contents(tmp_path / "out")


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "arrow"])
def test_tables_of_turns_are_as_lines(tmp_path: Path, tokenizer_folder: Path, suffix: str) -> None:
    turns = [[turn("human", "Q"), turn("gpt", "A")], [turn("system", "S"), turn("human", "Q"), turn("gpt", "A", weight=1)]]
    rows: list[Any] = [{"id": str(number), "conversations": one} for number, one in enumerate(turns)]
    run(tmp_path, tokenizer_folder, rows)
    if suffix == "csv":
        rows = [{**row, "conversations": json.dumps(row["conversations"])} for row in rows]
    summary = chat.preprocess_chat([write(tmp_path / f"b.{suffix}", rows)], tokenizer_folder, tmp_path / "b", progress=False)
    assert summary.formats == {"sharegpt": 2}
    assert contents(tmp_path / "b") == contents(tmp_path / "out")


@pytest.mark.parametrize("name", ["oasst", "sharegpt"])
def test_the_hub(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A local folder stands for it. Rows of trees are gathered from there too."""
    rows: list[Any] = [
        {"message_id": "a", "parent_id": "r", "role": "assistant", "text": "A", "rank": 0.0},
        {"message_id": "r", "parent_id": None, "role": "prompter", "text": "Q", "rank": None},
        {"message_id": "b", "parent_id": "r", "role": "assistant", "text": "B", "rank": 1.0},
    ]
    if name == "sharegpt":
        rows = [{"conversations": [turn("human", "Q"), turn("gpt", reply)]} for reply in "AB"]
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.parquet", rows)
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder(str(tmp_path / "hub")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load(str(tmp_path / "hub"), split="train", streaming=True))
    summary = chat.preprocess_chat(["hub:owner/name"], tokenizer_folder, tmp_path / "hubbed", progress=False)
    assert set(summary.formats) == {name} and not summary.skipped
    run(tmp_path, tokenizer_folder, [{"messages": say("u: Q", f"a: {reply}")} for reply in "AB"])
    assert contents(tmp_path / "hubbed") == contents(tmp_path / "out")


def call(command: Any, *words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args([str(word) for word in words]))
    return code


def test_the_command(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"ask": "Q", "about": "C", "reply": "A"},
        {"ask": "R", "about": "", "reply": "B"},
        {"ask": "S", "about": "", "reply": ""},
    ]
    (tmp_path / "map.yaml").write_text('user: "{ask}\\n\\n{about?}"\nassistant: "{reply}"\n')
    wanted = [{"messages": one} for one in (*qa("Q\n\nC"), *qa("R", "B"))]
    run(tmp_path, tokenizer_folder, wanted)
    words: dict[str, list[Any]] = {
        "csv": ["--map", "ask=user", "about=user?", "reply=assistant"],
        "parquet": ["--map", tmp_path / "map.yaml", "--variants", "flip"],
    }
    for suffix, options in words.items():
        source, prefix = write(tmp_path / f"in.{suffix}", rows), tmp_path / suffix
        arguments = ["--input", source, "--tokenizer", tokenizer_folder, "--output", prefix, *options]
        assert call(preprocess_chat, *arguments) == 0
        out = capsys.readouterr().out
        assert "2 documents" in out and "formats: mapped 3" in out
        assert f"{source} row 3: column 'reply' is empty" in out
        assert contents(prefix) == contents(tmp_path / "out")
        assert call(preprocess_chat, *arguments) == 0 and "already done" in capsys.readouterr().out
    assert call(inspect, tmp_path / "parquet.flip", "--verify") == 0
    assert "2 documents" in capsys.readouterr().out
    assert call(inspect, tmp_path / "parquet") == 0
    assert "formats of the records: mapped 3\nrecords not taken: 1 (1 column 'reply' is empty)" in capsys.readouterr().out
    given = {"input_ids": [70]}
    run(tmp_path, tokenizer_folder, [given], variants=["flip"])
    assert call(inspect, tmp_path / "out.flip") == 0
    assert "documents empty, for want of the variant flip: 1 (1 no conversation)" in capsys.readouterr().out
    words["csv"] = ["--input", tmp_path / "in.csv", "--tokenizer", tokenizer_folder, "--show", 2, *words["csv"]]
    assert call(preprocess_chat, *words["csv"]) == 0
    assert f"{tmp_path}/in.csv row 2: " in capsys.readouterr().out
    system = write(tmp_path / "dolphin.jsonl", [{"instruction": "S", "input": "Q", "output": "A"}])
    assert (
        call(
            preprocess_chat, "--input", system, "--tokenizer", tokenizer_folder, "--output", tmp_path / "d", "--format", "dolphin"
        )
        == 0
    )
    run(tmp_path, tokenizer_folder, [{"messages": say("s: S", "u: Q", "a: A")}])
    assert contents(tmp_path / "d") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"record_format": "aplaca"}, "--format aplaca: did you mean alpaca? known: auto, messages, sharegpt,"),
        ({"record_format": "alpaca", "mapping": ["a=user", "b=assistant"]}, "--format alpaca with --map"),
        ({"mapping": ["a=user"]}, "--map gives no column to the assistant"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, tokenizer_folder: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, tokenizer_folder, [{"messages": say("u: Q", "a: A")}], **options)
    assert reason in str(caught.value)
    assert not (tmp_path / "out.idx").exists()


def test_another_format_or_mapping_is_another_command(tmp_path: Path, tokenizer_folder: Path) -> None:
    row = {"instruction": "S", "input": "Q", "output": "A"}
    source = write(tmp_path / "a.jsonl", [row])
    for options in ({}, {"record_format": "dolphin"}, {"mapping": ["input=user", "output=assistant"]}):
        for done in (False, True):
            summary = chat.preprocess_chat([source], tokenizer_folder, tmp_path / "out", progress=False, **options)  # type: ignore[arg-type]
            assert summary.done_before is done


def test_reasons_that_are_all_different_do_not_fill_the_summary(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows: list[Any] = [{"input_ids": [7, 8], "labels": [7, 1000 + number]} for number in range(300)]
    summary, dataset = run(tmp_path, tokenizer_folder, [*rows, *({"text": ""} for _ in range(5)), {"text": "hello"}])
    assert summary.skipped.total() == 305 and summary.skipped["other reasons"] == 205
    assert dataset.meta is not None and dataset.meta.skipped == summary.skipped
