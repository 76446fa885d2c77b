"""Parquet, arrow and hub data sets against pyarrow's and datasets' own reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.prepare.inputs import describe_inputs, find_inputs, read_chunks, shard_inputs
from tests.data.prepare.reading import COMPRESS, check_resume, named, read, records, skipped, write

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def write_parquet(table: pa.Table, path: Path, rows: int) -> None:
    pq.write_table(table, path, row_group_size=rows, write_page_checksum=True, compression="none", use_dictionary=False)


def write_stream(table: pa.Table, path: Path, rows: int, compression: str | None = None) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_file(table: pa.Table, path: Path, rows: int) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


WRITERS: dict[str, Callable[[pa.Table, Path, int], None]] = {
    "parquet": write_parquet,
    "stream.arrow": write_stream,
    "packed.arrow": lambda table, path, rows: write_stream(table, path, rows, "zstd"),
    "file.arrow": write_file,
}
ROW = st.fixed_dictionaries(
    {
        "text": st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
        "messages": st.none() | st.lists(st.fixed_dictionaries({"role": st.text(st.characters(codec="utf-8"))}), max_size=2),
        "n": st.integers(-(2**63), 2**63 - 1),
    }
)
SCHEMA = pa.schema({"text": pa.string(), "messages": pa.list_(pa.struct({"role": pa.string()})), "n": pa.int64()})


@given(st.lists(ROW, max_size=20), st.integers(1, 9), st.sampled_from(list(WRITERS)), st.integers(1, 200), st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_rows(folder: Path, rows: list[dict[str, Any]], group: int, name: str, chunk_bytes: int, shards: int) -> None:
    path = folder / f"a.{name}"
    WRITERS[name](pa.Table.from_pylist(rows, SCHEMA), path, group)
    chunks = read(path, chunk_bytes=chunk_bytes)
    wanted = [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
    assert named(chunks) == wanted
    assert sum(chunk.disk_bytes for chunk in chunks) == (path.stat().st_size if rows else 0)
    check_resume(find_inputs([path]), chunk_bytes=40)
    parts = [shard_inputs(find_inputs([path]), number, shards) for number in range(shards)]
    assert [pair for part in parts for pair in named(list(read_chunks(part)))] == wanted
    check_resume(parts[-1], chunk_bytes=40)
    texts = [row for chunk in read(path, columns=["text"]) for row in chunk.records]
    assert texts == [{"text": row["text"]} for row in rows]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", WRITERS)
def test_tables_that_are_compressed_as_a_whole(tmp_path: Path, name: str, compression: str) -> None:
    rows = [{"text": f"row {number}"} for number in range(50)]
    WRITERS[name](pa.Table.from_pylist(rows), tmp_path / "plain", 7)
    path = write(tmp_path / f"a.{name}.{compression}", (tmp_path / "plain").read_bytes())
    chunks = read(path)
    assert named(chunks) == [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
    assert sum(chunk.disk_bytes for chunk in chunks) == path.stat().st_size
    check_resume(find_inputs([path]), chunk_bytes=40)
    parts = [shard_inputs(find_inputs([path, path]), number, 3) for number in range(3)]
    assert records([chunk for part in parts for chunk in read_chunks(part)]) == rows * 2
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"a\.{name}\.{compression} is damaged"):
        read(path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"a.{name}"
    WRITERS[name](pa.table({"title": ["a"], "body": ["b"]}), path, 1)
    with pytest.raises(ValueError, match=rf"a\.{name} has no column 'text'; it has 'title', 'body'"):
        read(path, columns=["text"])


@pytest.mark.parametrize("name", WRITERS)
def test_large_groups_come_in_small_chunks(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"a.{name}"
    WRITERS[name](pa.table({"text": ["x" * 1000] * 2000}), path, 2000)
    chunks = read(path, chunk_bytes=20_000)
    assert max(sum(len(row["text"]) for row in chunk.records) for chunk in chunks) <= 20_000
    assert records(chunks) == [{"text": "x" * 1000}] * 2000


@pytest.mark.parametrize("name", WRITERS)
def test_records_that_are_too_large(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"a.{name}"
    WRITERS[name](pa.table({"text": ["a", "x" * 3000, "b"]}), path, 2)
    chunks = read(path, chunk_bytes=100, max_record_bytes=2000)
    assert named(chunks) == [(f"{path} row 1", {"text": "a"}), (f"{path} row 3", {"text": "b"})]
    assert skipped(chunks) == [(f"{path} row 2", "larger than 2,000 bytes, the most a record may have")]


@pytest.mark.parametrize("name", WRITERS)
def test_values_that_are_stored_once(tmp_path: Path, name: str) -> None:
    """Categoricals: each value counts where it stands, not all of them in every row."""
    path = tmp_path / f"a.{name}"
    rows = [{"text": f"{number % 500} " + "x" * 1000, "n": [number]} for number in range(1000)] + [{"text": None, "n": []}]
    table = pa.Table.from_pylist(rows)
    WRITERS[name](table.set_column(0, "text", table["text"].dictionary_encode()), path, 600)
    chunks = read(path, chunk_bytes=20_000, max_record_bytes=100_000)
    assert named(chunks) == [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
    assert skipped(chunks) == []
    assert max(sum(len(row["text"] or "") for row in chunk.records) for chunk in chunks) <= 20_000
    assert sum(chunk.input_bytes for chunk in chunks) < 2 * 1000 * 1000
    check_resume(find_inputs([path]), chunk_bytes=200_000)
    small = read(path, chunk_bytes=500, max_record_bytes=1000)
    assert len(skipped(small)) == 1000 and records(small) == rows[-1:]


def test_memory_is_bounded_where_values_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 100_000])
    write_stream(pa.table({"text": text}), path, 2000)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for chunk in read_chunks(find_inputs([path])) if chunk.records]
    assert len(held) > 50 and max(held) < 50_000_000  # of 200 MB


def broken_strings() -> pa.Table:
    """Strings that are not UTF-8, which pyarrow writes without a word."""
    return pa.table({"text": pa.array([b"a", b"b\xff", b"c"], pa.binary()).view(pa.string())})


def test_strings_of_parquet_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(broken_strings(), path, 9)
    chunks = read(path)
    assert named(chunks) == [(f"{path} row 1", {"text": "a"}), (f"{path} row 3", {"text": "c"})]
    assert skipped(chunks) == [(f"{path} row 2", "not UTF-8 (byte 1 of the record)")]


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"{number} " * 50} for number in range(300)]
    for name, writer in WRITERS.items():
        path = tmp_path / f"a.{name}"
        writer(pa.Table.from_pylist(rows), path, 100)
        good = path.read_bytes()
        middle = len(good) // 2
        for damaged in (b"", good[:middle], good[:-20], b"no table at all", bytes(len(good)), b"ARROW1" + bytes(100)):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"a\.{name} is damaged behind row \d+, or no (parquet|arrow) file"):
                read(path)
        if name in ("parquet", "packed.arrow"):  # what has check sums
            path.write_bytes(good[:middle] + bytes(byte ^ 255 for byte in good[middle : middle + 50]) + good[middle + 50 :])
            with pytest.raises(ValueError, match=rf"a\.{name} is damaged behind row (100|0)"):
                read(path)
    write_stream(broken_strings(), tmp_path / "b.arrow", 9)
    with pytest.raises(ValueError, match=r"b\.arrow is damaged behind row 0.*UTF8"):
        read(tmp_path / "b.arrow")


ROWS = [{"text": f"document {number}", "n": number} for number in range(700)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The hub's owner/name is a local folder, said to have so many rows or none; everything else is not there."""
    for path, rows in {"default/train": ROWS, "default/test": ROWS[:3], "more/train": ROWS[:5]}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{path}.parquet")
    asked: list[Any] = []

    def pretend(known: int) -> None:
        load_builder, load = datasets.load_dataset_builder, datasets.load_dataset

        def builder(name: str, configuration: str | None, revision: str | None) -> Any:
            if name != "owner/name":
                raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
            asked.append((configuration, revision))
            made = load_builder(str(tmp_path / (configuration or "default")))
            if known:
                made.info.splits = datasets.SplitDict()
                for split, rows in {"train": known, "test": 3}.items():
                    made.info.splits.add(datasets.SplitInfo(split, num_examples=rows, num_bytes=rows * 31))
            return made

        def streamed(name: str, configuration: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
            assert name == "owner/name" and streaming
            asked.append((configuration, revision))
            return load(str(tmp_path / (configuration or "default")), split=split, streaming=True)

        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        monkeypatch.setattr(datasets, "load_dataset", streamed)

    pretend.asked = asked  # type: ignore[attr-defined]
    return pretend


def test_hub(hub: Any) -> None:
    hub(known=0)
    chunks = read("hub:owner/name", chunk_bytes=2000)
    assert named(chunks) == [(f"hub:owner/name row {number}", row) for number, row in enumerate(ROWS, 1)]
    assert len(chunks) > 3
    assert records(read("hub:owner/name:test", columns=["n"])) == [{"n": n} for n in range(3)]
    assert records(read("hub:owner/name/more@refs/pr/1:train")) == ROWS[:5]
    assert hub.asked[-2:] == [("more", "refs/pr/1")] * 2
    check_resume(find_inputs(["hub:owner/name:test", "hub:owner/name"]), chunk_bytes=4000)
    with pytest.raises(ValueError, match="hub:owner/name has no column 'txt'; it has 'text', 'n'"):
        read("hub:owner/name", columns=["txt"])
    with pytest.raises(ValueError, match="hub:owner/name: the hub does not say how many rows it has"):
        shard_inputs(find_inputs(["hub:owner/name"]), 0, 2)
    [[path, size, version, start, end]] = describe_inputs(find_inputs(["hub:owner/name"]))
    assert (path, size, start, end) == ("hub:owner/name", 0, 0, 0) and version


@pytest.mark.parametrize("known", [700, 650])
def test_hub_of_known_size(hub: Any, known: int) -> None:
    """The number on the hub may be old: nothing is lost then, though the shards are less even."""
    hub(known)
    files = find_inputs(["hub:owner/name:test", "hub:owner/name"])
    wanted = [("hub:owner/name:test", row) for row in ROWS[:3]] + [("hub:owner/name", row) for row in ROWS]
    for count in (1, 2, 3, 7):
        parts = [list(read_chunks(shard_inputs(files, number, count), chunk_bytes=3000)) for number in range(count)]
        assert [(chunk.path, row) for part in parts for chunk in part for row in chunk.records] == wanted
        assert max(len(records(part)) for part in parts) <= 703 // count + 2 + (700 - known)
        assert sum(chunk.disk_bytes for part in parts for chunk in part) == 703 * 31
    last = shard_inputs(files, 6, 7)
    assert named(list(read_chunks(last)))[-1] == ("hub:owner/name row 700", ROWS[699])
    check_resume(last, chunk_bytes=1000)


def test_hub_names_that_are_wrong(hub: Any) -> None:
    hub(known=700)
    with pytest.raises(ValueError) as error:
        find_inputs(["hub:owner/none", "hub:name", "hub:owner/name:valid"])
    none, name, split = str(error.value).split("; ", 2)
    assert none == "hub:owner/none: Dataset 'owner/none' doesn't exist on the Hub"
    assert name == "hub:name: a data set of the hub is written hub:OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT]"
    assert split == "hub:owner/name:valid has no split 'valid'; it has train, test"
