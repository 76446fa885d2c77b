"""Augmented variants: what they say, and that document i of a variant belongs to document i of the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_llm.data.indexed import NOT_TRAINED, WEIGHT_SHIFT, IndexedDataset
from megatron_llm.data.prepare import inputs, pipeline
from megatron_llm.data.prepare.chat import preprocess_chat
from megatron_llm.data.prepare.conversations import FORMATS
from megatron_llm.data.prepare.documents import Conversation, Segments
from megatron_llm.data.prepare.merge import merge
from megatron_llm.data.prepare.variants import FLIP, PREDICT_INSTRUCTION, flip, predict_instruction
from tests.data.prepare.format_samples import TOOL, WITH_TOOLS, say

BOTH = ["flip", "predict_instruction"]


def of(messages: list[Any], **rest: Any) -> Conversation:
    return Conversation({"messages": messages, **rest})


def test_flip_asks_for_each_question() -> None:
    assert flip(of(say("u: Q", "a: A"))).content == {"messages": say(f"u: {FLIP}\n\nA", "a: Q")}
    flipped = flip(of(say("s: S", "u: Q", "a: A", "u: R", "a: {B}", "u: unanswered")))
    assert flipped.content["messages"] == say(f"u: {FLIP}\n\nA", "a: Q", f"u: {FLIP}\n\n{{B}}", "a: R")
    marked = {**say("a: A")[0], "train": False, "weight": 2.0}
    thought = {**marked, "reasoning_content": "the question must be Q"}
    assert flip(of([*say("u: Q"), thought])).content["messages"][1] == {**marked, "content": "Q"}
    assert predict_instruction(of([*say("s: S", "u: Q"), thought])).content["messages"][1] == {**marked, "content": "S"}


def test_predict_instruction_takes_what_the_record_calls_its_instruction() -> None:
    (document,) = FORMATS["alpaca"].documents({"instruction": "I", "input": "X", "output": "O", "system": "S"})
    wanted = say(f"u: {PREDICT_INSTRUCTION}\n\nInput:\nX\n\nOutput:\nO", "a: I")
    assert not isinstance(document, ValueError) and predict_instruction(document).content["messages"] == wanted
    (document,) = FORMATS["openorca"].documents({"system_prompt": "I", "question": "X", "response": "O"})
    assert not isinstance(document, ValueError) and predict_instruction(document).content["messages"] == wanted


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (of(say("a: A", "u: Q")), ["questions and replies do not alternate", "no instruction beside an input"]),
        (of(say("u: Q")), ["questions and replies do not alternate", "no instruction beside an input"]),
        (of(say("s: S")), ["questions and replies do not alternate", "no instruction beside an input"]),
        (of(say("u: Q", "a: A", "u: R", "a: B")), ["", "no instruction beside an input"]),
        (of(say("u: Q", "a: ")), ["a message without text"] * 2),
        (of(WITH_TOOLS), ["it uses tools"] * 2),
        (of(say("u: Q", "a: A"), tools=[TOOL]), ["it uses tools"] * 2),
        (of([]), ["no conversation"] * 2),
        (Segments([("A", True)]), ["no conversation"] * 2),
    ],
)
def test_conversations_without_a_variant(document: Any, why: list[str]) -> None:
    for variant, reason in zip((flip, predict_instruction), why, strict=True):
        if reason:
            with pytest.raises(ValueError, match=reason):
                variant(document)
        else:
            variant(document)


def records(count: int) -> list[dict[str, Any]]:
    """Of many kinds: with both variants, one, none, skipped ones, and some that give several documents."""
    kinds: list[Any] = [
        lambda i: {"instruction": f"do {i}", "input": f"this {i}", "output": f"done {i}"},
        lambda i: {"messages": say(f"u: question {i}", f"a: answer {i}")},
        lambda i: {"text": f"a plain text {i}"},
        lambda i: {"broken": i},
        lambda i: {"messages": say(f"u: only {i}")},
        lambda i: {
            "type": "text2text",
            "instances": [{"input": f"first {i}", "output": "A"}, {"input": "none"}, {"input": f"second {i}", "output": "B"}],
        },
        lambda i: {"question": f"orca {i}", "response": "R", "system_prompt": "rules"},
        lambda i: {"input_ids": [70 + i % 50, 80], "labels": [-100, 80]},
    ]
    return [kinds[i % len(kinds)](i) for i in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name.removeprefix(name): path.read_bytes() for path in folder.glob(f"{name}.*")}


def test_variants_lie_document_for_document(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write(tmp_path / "a.jsonl", records(64))
    summary = preprocess_chat([source], tokenizer_folder, tmp_path / "out", variants=BOTH, progress=False)
    alone = preprocess_chat([source], tokenizer_folder, tmp_path / "alone", progress=False)
    sets = {name: IndexedDataset(tmp_path / name) for name in ("out", "out.flip", "out.predict_instruction", "alone")}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = {name: [tokenizer.decode(data.document(n).tolist()) for n in range(data.documents)] for name, data in sets.items()}
    assert texts["out"] == texts["alone"]
    assert summary.documents == alone.documents == 56 and summary.tokens == alone.tokens
    for original, flipped, predicted in zip(texts["out"], texts["out.flip"], texts["out.predict_instruction"], strict=True):
        words = original.split("<|im_start|>")
        question = words[-2].removeprefix("user\n").removesuffix("<|im_end|>\n") if len(words) > 2 else ""
        reply = words[-1].removeprefix("assistant\n").removesuffix("<|im_end|>")
        if question:
            assert flipped == (f"<|im_start|>user\n{FLIP}\n\n{reply}<|im_end|>\n<|im_start|>assistant\n{question}<|im_end|>")
        else:
            assert flipped == ""
        if "do " in original or "orca" in original:
            instruction, given = question.split("\n\n") if "do " in original else ("rules", question)
            assert predicted == (
                f"<|im_start|>user\n{PREDICT_INSTRUCTION}\n\nInput:\n{given}\n\nOutput:\n{reply}<|im_end|>\n"
                f"<|im_start|>assistant\n{instruction}<|im_end|>"
            )
        else:
            assert predicted == ""
    for name in ("out.flip", "out.predict_instruction"):
        sets[name].verify()
        meta, whole = sets[name].meta, sets["out"].meta
        assert meta is not None and whole is not None
        assert (meta.variant, whole.variant) == (name.partition(".")[2], None)
        assert meta.made_by == whole.made_by
        empty = int((np.diff(sets[name].document_offsets()) == 0).sum())
        assert sum(meta.skipped.values()) == empty == sum(text == "" for text in texts[name])
        assert meta.kind == "chat" and meta.documents == whole.documents
    assert summary.missing["flip: no conversation"] == 16
    assert "16 conversations without flip: no conversation" in str(summary)
    assert preprocess_chat([source], tokenizer_folder, tmp_path / "out", variants=BOTH, progress=False).missing == summary.missing


def test_a_reply_that_is_not_to_be_trained_has_no_variant(tmp_path: Path, tokenizer_folder: Path) -> None:
    wrong = [*say("u: Q"), {**say("a: A")[0], "train": False}]
    source = write(tmp_path / "a.jsonl", [{"messages": [*wrong, *say("u: R", "a: B")]}, {"messages": wrong}])
    preprocess_chat([source], tokenizer_folder, tmp_path / "out", variants=["flip"], progress=False)
    flipped = IndexedDataset(tmp_path / "out.flip")
    assert flipped.documents == 1 and flipped.roles is not None
    assert {3, 3 | NOT_TRAINED} <= set(flipped.roles.tolist())


def test_weights_of_replies_go_with_their_questions(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The number in a role byte means the same weight in all data sets, whatever the chunk that had it first."""
    rows = [{"messages": [*say("u: Q"), {**say("a: A")[0], "weight": weight}]} for weight in (1, 0.5, 2, 0.5)]
    preprocess_chat([write(tmp_path / "a.jsonl", rows)], tokenizer_folder, tmp_path / "out", variants=["flip"], progress=False)
    for name in ("out", "out.flip"):
        dataset = IndexedDataset(tmp_path / name)
        offsets = dataset.document_offsets()
        assert dataset.meta is not None and dataset.meta.weights == (1.0, 0.5, 2.0) and dataset.roles is not None
        for number, expected in enumerate((0, 1, 2, 1)):
            assert dataset.roles[offsets[number] : offsets[number + 1]].max() >> WEIGHT_SHIFT == expected


def test_workers_and_interruptions_change_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", records(80))
    options: dict[str, Any] = {"variants": BOTH, "progress": False}
    whole = preprocess_chat([source], tokenizer_folder, tmp_path / "whole", **options)
    real, after, workers = inputs.read_chunks, 6, 2

    def read_chunks(given: Any, start: Any = None, **more: Any) -> Any:
        for number, chunk in enumerate(real(given, start, **more, chunk_bytes=400, max_record_bytes=1 << 20)):
            if number == after:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(pipeline, "read_chunks", read_chunks)
    for workers in (1, 1):
        with pytest.raises(KeyboardInterrupt):
            preprocess_chat([source], tokenizer_folder, tmp_path / "out", journal_seconds=0, workers=workers, **options)
        assert not list(tmp_path.glob("out*.idx")) and (tmp_path / "out.journal").exists()
    after = 1000
    summary = preprocess_chat([source], tokenizer_folder, tmp_path / "out", journal_seconds=0, workers=2, **options)
    assert files(tmp_path, "out") == files(tmp_path, "whole")
    assert len(files(tmp_path, "out")) == 12
    for name in ("documents", "records", "skipped", "formats", "notes", "missing", "bytes"):
        assert getattr(summary, name) == getattr(whole, name)


def test_other_variants_are_other_work(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write(tmp_path / "a.jsonl", records(8))
    for variants in (["flip"], BOTH, []):
        assert not preprocess_chat([source], tokenizer_folder, tmp_path / "out", variants=variants, progress=False).done_before
        assert preprocess_chat([source], tokenizer_folder, tmp_path / "out", variants=variants, progress=False).done_before
    metas = [IndexedDataset(tmp_path / name).meta for name in ("out", "out.flip")]
    assert metas[0] is not None and metas[1] is not None
    assert metas[0].made_by != metas[1].made_by  # what is left of an earlier command can be told from its variants


def test_variants_are_merged_and_shuffled_alike(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name, first in (("a", 0), ("b", 5)):
        source = write(tmp_path / f"{name}.jsonl", records(30)[first:])
        preprocess_chat([source], tokenizer_folder, tmp_path / name, variants=["flip"], progress=False)
    for end in ("", ".flip"):
        merge([tmp_path / f"a{end}", tmp_path / f"b{end}"], tmp_path / f"both{end}", shuffle_seed=3, progress=False)
    data, flipped = IndexedDataset(tmp_path / "both"), IndexedDataset(tmp_path / "both.flip")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert data.documents == flipped.documents and flipped.meta is not None and flipped.meta.variant == "flip"
    seen = 0
    for number in range(data.documents):
        said = tokenizer.decode(flipped.document(number).tolist()).rpartition("assistant\n")[2].removesuffix("<|im_end|>")
        seen += bool(said)
        assert said in tokenizer.decode(data.document(number).tolist())
    assert seen > 20
    with pytest.raises(ValueError, match="different variants of their conversations: None and flip"):
        merge([tmp_path / "a", tmp_path / "b.flip"], tmp_path / "wrong", progress=False)


@pytest.mark.parametrize(
    ("variants", "reason"),
    [(["flop"], "--variants flop: known: flip, predict_instruction"), (["flip", "flip"], "--variants names flip twice")],
)
def test_unknown_variants(tmp_path: Path, tokenizer_folder: Path, variants: list[str], reason: str) -> None:
    source = write(tmp_path / "a.jsonl", records(1))
    with pytest.raises(ValueError, match=reason):
        preprocess_chat([source], tokenizer_folder, tmp_path / "out", variants=variants, progress=False)
