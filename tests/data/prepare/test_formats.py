"""JSON, csv and text files of every layout and compression, whole, cut, damaged, and read again from any place."""

from __future__ import annotations

import csv
import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.prepare.chunks import chunk_texts
from megatron_llm.data.prepare.inputs import find_inputs, read_chunks
from tests.data.prepare.reading import COMPRESS, check_resume, named, read, records, skipped, write

ALL = ["", *(f".{suffix}" for suffix in COMPRESS)]
TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\[]{},\n\r\x85\u2028\x00'), max_size=12)
OBJECT = st.dictionaries(
    TEXT, st.recursive(TEXT | st.integers(), lambda v: st.lists(v, max_size=2) | st.dictionaries(TEXT, v, max_size=2)), max_size=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@given(
    st.lists(st.sampled_from([b"", b" ", b"\x0c", b"x" * 40]) | OBJECT.map(lambda o: json.dumps(o, ensure_ascii=False).encode())),
    st.data(),
    st.sampled_from(ALL),
)
@settings(deadline=None, max_examples=100)
def test_lines(folder: Path, lines: list[bytes], data: st.DataObject, compression: str) -> None:
    """Against splitting at line feeds; a carriage return before one is white space to JSON."""
    ends = [data.draw(st.sampled_from([b"\n", b"\r\n"])) for _ in lines]
    bom = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    content = b"".join(line + end for line, end in zip(lines, ends, strict=True))
    if lines and data.draw(st.booleans()):
        content = content.removesuffix(ends[-1])
    path = write(folder / f"a.jsonl{compression}", bom + content)
    chunks = read(path, chunk_bytes=data.draw(st.integers(3, 99)))
    wanted = [(number, line.strip(b" \t\r")) for number, line in enumerate(content.split(b"\n"), 1)]
    assert named(chunks) == [(f"{path}:{number}", line) for number, line in wanted if line]
    assert sum(chunk.input_bytes for chunk in chunks) == len(bom + content)
    if not compression:
        assert sum(chunk.disk_bytes for chunk in chunks) == len(bom + content)
    check_resume(find_inputs([path]), chunk_bytes=50)


@given(st.lists(OBJECT, min_size=1, max_size=6), st.data(), st.sampled_from(["", ".zst", ".gz"]))
@settings(deadline=None, max_examples=100)
def test_arrays(folder: Path, objects: list[Any], data: st.DataObject, compression: str) -> None:
    indent, ascii_ = data.draw(st.sampled_from([None, 0, 2])), data.draw(st.booleans())
    content = json.dumps(objects, indent=indent, ensure_ascii=ascii_).encode()
    space = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf", b" \r\n", b"\xef\xbb\xbf \n"]))
    path = write(folder / f"a.json{compression}", space + content + data.draw(st.sampled_from([b"", b"\n", b" \r\n "])))
    chunks = read(path, chunk_bytes=data.draw(st.integers(3, 99)))
    assert [json.loads(record) for record in records(chunks)] == objects
    assert [name for name, _ in named(chunks)] == [f"{path} record {number + 1}" for number in range(len(objects))]
    check_resume(find_inputs([path]), chunk_bytes=20)


@given(st.lists(OBJECT, min_size=1, max_size=6), st.data(), st.sampled_from(["", ".xz"]))
@settings(deadline=None, max_examples=100)
def test_values_one_after_the_other(folder: Path, objects: list[Any], data: st.DataObject, compression: str) -> None:
    """Printed over several lines, one a line, several on a line, or with the line ends of another age."""
    objects = [{"first": 0}, *objects]
    between = data.draw(st.sampled_from([b"", b" ", b"\n", b"\r", b"\r\n\n"]))
    indents = [1 if b"\n" in between else None, *(data.draw(st.sampled_from([None, 1])) for _ in objects[1:])]
    parts = [json.dumps(one, indent=indent).encode() for one, indent in zip(objects, indents, strict=True)]
    bom = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    path = write(folder / f"a.json{compression}", bom + between.join(parts))
    chunks = read(path, chunk_bytes=data.draw(st.integers(3, 99)))
    assert [json.loads(record) for record in records(chunks)] == objects
    assert named(chunks)[0][0] == f"{path} record 1"
    check_resume(find_inputs([path]), chunk_bytes=20)


def test_a_bad_value_costs_one_record(tmp_path: Path) -> None:
    values = ['{"text": "a"}', '{"text": NaN}', '{"text": "\\ud800"}', '{"text": ]}', "7", '"a, [b"', '["x"]', '{"text": "z"}']
    array = write(tmp_path / "a.json", f"[{', '.join(values)}]".encode())
    texts, indices, refused = chunk_texts(read(array)[0], "text")
    assert (texts, indices) == (["a", "z"], [0, 7])
    reasons = ["is not a string but float", "half a surrogate pair", "invalid JSON", *["not a JSON object"] * 3]
    assert len(refused) == len(reasons)
    for number, (one, reason) in enumerate(zip(refused, reasons, strict=True), 2):
        assert one.where == f"{array} record {number}" and reason in one.reason
    one_after_the_other = write(tmp_path / "b.json", b'{"text":\n"a"} nothing {"text": "b"},{"text": "c"} {"text": ')
    assert records(read(one_after_the_other)) == [
        b'{"text":\n"a"}',
        b"nothing",
        b'{"text": "b"}',
        b",",
        b'{"text": "c"}',
        b'{"text":',
    ]


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (b"", "lines"),
        (b'{"a": 1}\nbroken\n', "lines"),
        (b'\n\xc2\x85{"a": 1}', "lines"),
        (b'\xef\xbb\xbf\r\n {"a": NaN}\n', "lines"),
        (b'{"a": 1}', "lines"),
        (b'{\n"a": 1}', "values"),
        (b'{"a": 1}{"a": 2}\n', "values"),
        (b"{" + b'"a": [' * 5000, "values"),
        (b'{"a": "cut off\n{"a": 1}\n', "lines"),
        (b'{"a": "cut off\n  broken\n{"a": "too\n{"a": 1}', "lines"),
        (b"{" + b'"a": [' * 5000 + b'\n{"a": 1}\n', "lines"),
        (b'{"a": "\xff"}\n', "lines"),
        (b'{\n"a": {}, "b":\n{}\n}\n{"a": 1}\n', "values"),
        (b'{"a": "cut off\n  {"a": 1}\n{\n', "values"),
        (b"\n\t[\n", "array"),
    ],
)
def test_layouts_of_json(tmp_path: Path, content: bytes, layout: str) -> None:
    for suffix in ALL:
        [file] = find_inputs([write(tmp_path / f"a.json{suffix}", content)])
        assert file.format == layout


@pytest.mark.parametrize("content", [b"[", b'[{"a": 1}', b'[{"a": 1},', b'[{"a": "1'])
def test_an_array_that_is_cut_off_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=rf"a\.json ends inside its array, after {len(content)} bytes"):
        read(write(tmp_path / "a.json", content), chunk_bytes=4)


@pytest.mark.parametrize("rest", [b"x", b" [1]", b', {"a": 1}', b"]"])
def test_what_follows_an_array_is_not_lost(tmp_path: Path, rest: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.json goes on behind the end of its array"):
        read(write(tmp_path / "a.json", b"[{}]\n" + rest), chunk_bytes=4)


FIELD = st.text(st.characters(codec="utf-8") | st.sampled_from('",\t\n\r\x00\x85'), max_size=8)


@given(st.lists(st.tuples(FIELD, FIELD), max_size=8), st.data(), st.sampled_from([".csv", ".tsv", ".csv.gz", ".tsv.bz2"]))
@settings(deadline=None, max_examples=120)
def test_csv(folder: Path, rows: list[tuple[str, str]], data: st.DataObject, suffix: str) -> None:
    """What Python's csv module wrote, with any line end."""
    out = io.StringIO(newline="")
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL  # it would leave other line ends unquoted
    delimiter = "\t" if "tsv" in suffix else ","
    csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([("text", "é,x"), *rows])
    content = out.getvalue()
    bom = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    path = write(folder / f"a{suffix}", bom + (content if data.draw(st.booleans()) else content.removesuffix(end)).encode())
    chunks = read(path, chunk_bytes=data.draw(st.integers(3, 99)), max_record_bytes=1000)
    wanted = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter))
    assert named(chunks) == [(f"{path} row {number}", row) for number, row in enumerate(wanted, 1)]
    check_resume(find_inputs([path]), chunk_bytes=20)
    chosen = [row for chunk in read(path, columns=["é,x"]) for row in chunk.records]
    assert chosen == [{"é,x": row["é,x"]} for row in wanted]


def test_bad_rows_of_csv_are_named(tmp_path: Path) -> None:
    rows = [b"\r", b"text,n", b"a,1", b"", b"b", b"c,2,3", b"\xff,4", b'"d\ne",5', b'f,"6', b"g,7"]
    path = write(tmp_path / "a.csv", b"\n".join(rows))
    chunks = read(path)
    assert records(chunks) == [{"text": "a", "n": "1"}, {"text": "d\ne", "n": "5"}]
    assert skipped(chunks) == [
        (f"{path} row 3", "1 fields, but the first row has 2"),
        (f"{path} row 4", "3 fields, but the first row has 2"),
        (f"{path} row 5", "not UTF-8 (byte 0 of a line)"),
        (f"{path} row 7", "a quote that is never closed"),
    ]
    check_resume(find_inputs([path]), chunk_bytes=5)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a,b,a\n1,2,3\n", "first row: more than one column is named 'a'"),
        (b"text,\xff\n", r"first row: not UTF-8 \(byte 5 of a line\)"),
        (b"a\n1\n" + b"x" * 3000 + b"\n", "at byte 4: a line of 3,001 bytes, larger than 1,000 bytes"),
        (b'a\n1\n"' + b"x\n" * 3000, "at byte 4: field larger than field limit.*quote never closed"),
    ],
)
def test_csv_that_cannot_be_trusted_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.csv.*{problem}"):
        read(write(tmp_path / "a.csv", content), chunk_bytes=500, max_record_bytes=1000)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"title,body\nx,y\n")
    with pytest.raises(ValueError, match=r"a\.csv has no column 'text'; it has 'title', 'body'"):
        read(path, columns=["text"])
    assert read(write(tmp_path / "b.csv", b""), columns=["text"]) == []


@pytest.mark.parametrize("suffix", ALL)
def test_text_files_are_documents(tmp_path: Path, suffix: str) -> None:
    contents = [b"", b"\xef\xbb\xbfone\r\n\rtwo\x00\n", b"x" * 3000]
    paths = [write(tmp_path / f"{number}.txt{suffix}", content) for number, content in enumerate(contents)]
    chunks = read(*paths, chunk_bytes=100)
    assert named(chunks) == [(str(paths[0]), b""), (str(paths[1]), b"one\r\n\rtwo\x00\n"), (str(paths[2]), b"x" * 3000)]
    check_resume(find_inputs(paths))
    small = read(*paths, chunk_bytes=100, max_record_bytes=2999)
    assert named(small) == named(chunks)[:2]
    assert skipped(small) == [(str(paths[2]), "larger than 2,999 bytes, the most a record may have")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "json.xz"])
@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_records_that_are_too_large(tmp_path: Path, suffix: str, extra: int) -> None:
    """One byte decides, wherever it lies in a block, and no other record is touched."""
    large = b'{"text": "' + b'\\"[{' * 200 + b"y" * (190 + extra) + b'"}'
    small = [b'{"text": "%d"}' % number for number in range(9)]
    for place in (0, 4, 9):
        lines = [*small[:place], large, *small[place:]]
        content = b"\n".join(lines) if "jsonl" in suffix else b"[" + b",".join(lines) + b"]"
        path = write(tmp_path / f"{place}.{suffix}", content)
        for chunk_bytes in (7, 100, 1002):
            limit = {"chunk_bytes": chunk_bytes, "max_record_bytes": 1002}
            chunks = read(path, **limit)
            assert records(chunks) == (lines if extra == 0 else small)
            name = f"{path}:{place + 1}" if "jsonl" in suffix else f"{path} record {place + 1}"
            assert skipped(chunks) == [(name, "larger than 1,002 bytes, the most a record may have")] * (extra > 0)
            if chunk_bytes == 100:
                check_resume(find_inputs([path]), **limit)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_padding_and_what_is_no_member(tmp_path: Path, suffix: str) -> None:
    """bzip2 and xz readers of Python stop without a word at the first byte behind a member that begins no other."""
    compress = COMPRESS[suffix]
    lines = [b'{"text": "%d"}\n' % number for number in range(20_000)]
    members = [compress(b"".join(lines[start : start + 5000])) for start in range(0, 20_000, 5000)]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(members) + compress(b"") + bytes(1000))
    assert records(read(path, chunk_bytes=1000)) == [line.strip() for line in lines]
    for damaged in (
        b"",
        members[0][:-5],
        members[0] + members[1][: len(members[1]) // 2],
        members[0] + b"garbage behind it, longer than any header of the formats",
        members[0] + bytes(4) + b"x" + members[1],
        members[0][:200] + b"damaged" + members[0][207:],
        bytes(100) + members[0],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix} is damaged"):
            read(path)


def test_decompression_is_bounded(tmp_path: Path) -> None:
    """A file that expands a thousandfold is held a few chunks at a time."""
    import tracemalloc

    compressor = zlib.compressobj(wbits=31)
    line = b'{"text": "' + b"a" * 1000 + b'"}\n'
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(compressor.compress(line * 100) for _ in range(1000)) + compressor.flush())
    tracemalloc.start()
    count = sum(len(chunk.records) for chunk in read_chunks(find_inputs([path]), chunk_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000 and path.stat().st_size < 1_000_000
    assert peak < 40 << 20
