"""Message trees against brute force: every subset of messages that is a path, in whatever order and files the rows lie."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.prepare import inputs, pipeline
from megatron_llm.data.prepare.chat import preprocess_chat
from megatron_llm.data.prepare.trees import LEFT_OUT, ROWS, conversations
from tests.data.prepare.format_samples import TREE

Row = dict[str, Any]


def random_rows(seed: int, name: str, size: int) -> list[Row]:
    """Rows of one tree as on the hub, parents first; roles alternate, some replies have ranks."""
    chance = random.Random(seed)
    rows: list[Row] = []
    for number in range(size):
        parent = chance.choice(rows) if rows else None
        role = "assistant" if parent is not None and parent["role"] == "prompter" else "prompter"
        rank = chance.choice([None, 0, 1, 2]) if role == "assistant" else None
        rows.append(
            {
                "message_id": f"{name}-{number}",
                "parent_id": parent["message_id"] if parent else None,
                "text": f"text {name} {number}",
                "role": role,
                "rank": rank,
                "deleted": False,
                "review_result": chance.choice([True, None]),
                "tree_state": "ready_for_export",
            }
        )
    return rows


def nested(rows: list[Row], parent: str | None = None) -> list[dict[str, Any]]:
    return [{**row, "replies": nested(rows, row["message_id"])} for row in rows if row["parent_id"] == parent]


def brute_force(rows: list[Row]) -> list[list[tuple[str, str]]]:
    """(role, text) along every path from the root to an assistant below which there is no other assistant."""
    by_id = {row["message_id"]: row for row in rows}

    def above(row: Row) -> list[Row]:
        parent = by_id.get(row["parent_id"])
        return [*(above(parent) if parent else []), row]

    replies = [row for row in rows if row["role"] == "assistant"]
    last = [row for row in replies if not any(row in above(other) for other in replies if other is not row)]
    names = {"prompter": "user", "assistant": "assistant"}
    return [[(names[row["role"]], row["text"]) for row in above(end)] for end in last]


def said(found: list[list[dict[str, Any]]]) -> list[list[tuple[str, str]]]:
    return [[(message["role"], message["content"]) for message in one] for one in found]


@pytest.mark.parametrize("seed", range(40))
def test_all_paths_and_the_best_one(seed: int) -> None:
    rows = random_rows(seed, "t", random.Random(seed).randint(2, 14))
    wanted = brute_force(rows)
    tree = {"message_tree_id": "t", "prompt": nested(rows)[0]}
    found = said(conversations(tree, best=False)[0])
    assert sorted(found) == sorted(wanted) and found
    # The best path is the smallest one by (has no rank, rank, place) of its messages.
    place = {row["text"]: ((row["rank"] is None, row["rank"] or 0), number) for number, row in enumerate(rows)}
    assert found == sorted(wanted, key=lambda path: [place[text] for _, text in path])
    assert said(conversations(tree, best=True)[0]) == found[:1]


def test_what_is_left_out_takes_its_replies_along() -> None:
    rows = random_rows(3, "t", 12)
    for marked, change in itertools.product(
        range(1, 12), [{"deleted": True}, {"review_result": False}, {"text": " "}, {"text": None}]
    ):
        changed = [{**row, **change} if number == marked else row for number, row in enumerate(rows)]
        gone = {changed[marked]["message_id"]}
        for row in changed:
            if row["parent_id"] in gone:
                gone.add(row["message_id"])
        wanted = brute_force([row for row in changed if row["message_id"] not in gone])
        tree = {"prompt": nested(changed)[0]}
        if wanted:
            found, notes = conversations(tree, best=False)
            assert sorted(said(found)) == sorted(wanted)
            assert notes == (LEFT_OUT,)
        else:
            with pytest.raises(ValueError, match="the tree has no reply"):
                conversations(tree, best=False)


def test_a_deep_tree() -> None:
    depth = 5000
    rows = [[number - 1, ("user", "assistant")[number % 2], str(number), None] for number in range(depth)]
    ((path,), _) = conversations({ROWS: rows}, best=False)
    assert [message["content"] for message in path] == [str(number) for number in range(depth)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prefix: Path, tokenizer: Path) -> list[str]:
    from transformers import AutoTokenizer

    dataset, decoder = IndexedDataset(prefix), AutoTokenizer.from_pretrained(tokenizer)
    return [decoder.decode(dataset.document(number).tolist()) for number in range(dataset.documents)]


def forest() -> list[list[Row]]:
    return [random_rows(number, f"tree{number}", 6) for number in range(7)]


@pytest.mark.parametrize("best", [False, True], ids=["all", "best"])
def test_rows_in_any_order_and_files_are_the_nested_trees(tmp_path: Path, tokenizer_folder: Path, best: bool) -> None:
    trees = forest()
    shuffled = [row for rows in trees for row in rows]
    random.Random(0).shuffle(shuffled)
    order = [row["message_id"] for row in shuffled if row["parent_id"] is None]
    trees.sort(key=lambda rows: order.index(rows[0]["message_id"]))  # trees come in the order of their roots,
    for rows in trees:
        rows.sort(key=lambda row: shuffled.index(row))  # and equal ranks in the order of their rows
    files = [write(tmp_path / "rows-0.parquet", shuffled[:20]), write(tmp_path / "rows-1.jsonl", shuffled[20:])]
    whole = write(
        tmp_path / "trees.jsonl", [{"message_tree_id": str(n), "prompt": nested(rows)[0]} for n, rows in enumerate(trees)]
    )
    options: dict[str, Any] = {"record_format": "oasst_best"} if best else {}
    flat = preprocess_chat(files, tokenizer_folder, tmp_path / "flat", progress=False, **options)
    same = preprocess_chat([whole], tokenizer_folder, tmp_path / "nested", progress=False, **options)
    assert texts(tmp_path / "flat", tokenizer_folder) == texts(tmp_path / "nested", tokenizer_folder)
    assert flat.records == same.records == len(trees)
    assert flat.formats == same.formats == {"oasst_best" if best else "oasst": len(trees)}
    assert flat.documents == same.documents == (len(trees) if best else sum(len(brute_force(rows)) for rows in trees))
    assert flat.bytes == sum(chunk.input_bytes for chunk in inputs.read_chunks(inputs.find_inputs(files)))


def test_every_row_is_in_a_tree_or_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    a, b, c = (random_rows(number, name, 4) for number, name in enumerate("abc"))
    b[0]["tree_state"] = "growing"
    c[1]["deleted"] = True
    lost = [
        {**a[1], "message_id": "orphan", "parent_id": "nowhere"},
        {**a[1], "message_id": "loop", "parent_id": "loop"},
        a[1],
        {**a[1], "message_id": "poet", "role": "poet"},
        {"text": "no row"},
        {**a[1], "message_id": "r", "rank": "first"},
    ]
    rows = [*a, *lost, *b, *c]
    source = write(tmp_path / "rows.jsonl", rows)
    with open(source, "a") as file:
        file.write("broken\n")
    summary = preprocess_chat([source], tokenizer_folder, tmp_path / "out", progress=False)
    reasons = {example.split(": ", 1)[0].rpartition(":")[2]: example.split(": ", 1)[1] for example in summary.examples}
    assert reasons["5"] == reasons["6"] == "a row without the root of its tree: a message above it is not in the input"
    assert reasons["7"] == "its message_id occurs twice"
    assert reasons["8"].startswith("unknown role 'poet'")
    assert reasons["9"].startswith("no row of a message tree")
    assert "first" in reasons["10"]
    assert reasons["11"] == "a message of a tree that is not ready for export"
    assert reasons["16"] == "a deleted message"
    assert reasons[str(len(rows) + 1)] == "invalid JSON"
    below = {c[1]["message_id"]}
    for row in c:
        below |= {row["message_id"]} if row["parent_id"] in below else set()
    assert summary.skipped["it answers a message that is left out"] == len(b) - 1 + len(below) - 1
    assert summary.skipped.total() - summary.skipped["the tree has no reply"] == len(lost) + len(b) + len(below) + 1
    assert summary.records == summary.skipped.total() - summary.skipped["the tree has no reply"] + 2  # the trees a and c


def test_a_tree_is_named_by_its_root_and_the_file_of_that(tmp_path: Path, tokenizer_folder: Path) -> None:
    first, second = random_rows(0, "a", 4), random_rows(1, "b", 1)
    files = [write(tmp_path / "a.jsonl", first[:2]), write(tmp_path / "b.jsonl", [*second, *first[2:]])]
    summary = preprocess_chat(files, tokenizer_folder, tmp_path / "out", progress=False)
    assert summary.examples == [f"{files[1]} tree b-0: the tree has no reply"]


def test_rows_among_other_records_are_refused_by_name(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write(tmp_path / "mixed.jsonl", [TREE, random_rows(0, "a", 1)[0]])
    summary = preprocess_chat([source], tokenizer_folder, tmp_path / "out", progress=False)
    assert summary.documents == 2
    assert "mixed.jsonl:2: a row of a message tree, in a file whose first record is none" in summary.examples[0]


def test_trees_continue_where_they_were_interrupted(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for tree in forest() for row in tree]
    rows.insert(3, {**rows[1], "message_id": "orphan", "parent_id": "nowhere"})
    files = [write(tmp_path / "a.jsonl", rows[:25]), write(tmp_path / "b.jsonl", rows[25:])]
    other = write(tmp_path / "c.jsonl", [TREE] * 3)
    whole = preprocess_chat([*files, other], tokenizer_folder, tmp_path / "whole", progress=False)
    real, starts, after = inputs.read_chunks, [], 5

    def read_chunks(given: Any, start: Any = None, **options: Any) -> Any:
        starts.append(start)
        for number, chunk in enumerate(real(given, start, **options, chunk_bytes=60, max_record_bytes=1 << 20)):
            if number == after:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(pipeline, "read_chunks", read_chunks)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            preprocess_chat([*files, other], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=0)
    after = 1000
    summary = preprocess_chat([*files, other], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=0)
    assert starts[0] is None and starts[-1][1] > 0
    for suffix in (".bin", ".idx", ".roles.bin", ".meta.json"):
        assert Path(f"{tmp_path}/out{suffix}").read_bytes() == Path(f"{tmp_path}/whole{suffix}").read_bytes()
    assert (summary.skipped, summary.records, summary.bytes) == (whole.skipped, whole.records, whole.bytes)
    assert preprocess_chat([*files, other], tokenizer_folder, tmp_path / "out", progress=False).done_before
    with open(files[1], "a") as file:
        file.write("\n")
    assert not preprocess_chat([*files, other], tokenizer_folder, tmp_path / "out", progress=False).done_before
