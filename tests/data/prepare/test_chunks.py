"""Documents out of records: orjson and the standard library's json must agree, whatever stands in the file."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_llm.data.prepare.chunks import Chunk, Kind, Skipped, Unit, chunk_texts, record_json, record_text


def chunk_of(*records: Any, kind: Kind = "json", unit: Unit = "line", first: int = 1) -> Chunk:
    return Chunk("a.jsonl", kind, unit, list(records), first, 100, 0, 0, (0, 0, 0))


def reference(line: bytes) -> str | None:
    """The text of a line, as the standard library has it; None if there is none that a tokenizer can take."""
    try:
        text = json.loads(line.decode("utf-8"))["text"]
        text.encode("utf-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return str(text)


TEXT = st.text(st.characters(codec=None), max_size=20)  # any code point, halves of surrogate pairs too
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.just("text"), inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.lists(st.tuples(st.just("text") | TEXT, VALUE), max_size=4)  # keys may repeat


@st.composite
def line(draw: st.DrawFn) -> bytes:
    """An object with doubled keys perhaps, of any values, and sometimes a few bytes of it broken."""
    ascii_ = draw(st.booleans())
    space = draw(st.sampled_from(["", " ", "\t", "\r"]))
    items = draw(OBJECT | st.tuples(st.tuples(st.just("text"), TEXT)))
    pairs = ",".join(f"{json.dumps(k, ensure_ascii=ascii_)}:{space}{json.dumps(v, ensure_ascii=ascii_)}" for k, v in items)
    content = (space + "{" + pairs + "}" + space).encode("utf-8", "surrogatepass")
    for place, byte in draw(st.lists(st.tuples(st.integers(0, len(content)), st.binary(max_size=2)), max_size=2)):
        content = content[:place] + byte + content[place + len(byte) :]
    return content.replace(b"\n", b" ")


@given(st.lists(line(), max_size=5))
@example([b'{"text": NaN, "text": "a"}', b'{"text": "a", "n": 1e999}', b'{"text": "a", "n": -Infinity}'])
@example([b'{"text": "a", "n": "\\ud800"}', b'{"text": "\\ud800"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": "\xed\xa0\x80"}'])
@example([b'{"text": "\\u0000"}', b'{"text": "\x00"}', b'\xef\xbb\xbf{"text": "a"}', b'{"text": "a"} {"text": "b"}', b"\x0c"])
@example([b'{"text": "a", "n": 123456789012345678901234567890}', b'"text"', b'["text"]', b"1", b"null", b"\xff\xfe{\x00}\x00"])
@settings(deadline=None, max_examples=300)
def test_texts_are_those_of_the_standard_library(lines: list[bytes]) -> None:
    chunk = chunk_of(*lines)
    texts, indices, skipped = chunk_texts(chunk, "text")
    wanted = [reference(line) for line in lines]
    assert dict(zip(indices, texts, strict=True)) == {i: text for i, text in enumerate(wanted) if text}
    assert indices == sorted(indices)
    blank = {i for i, line in enumerate(lines) if not line.strip(b" \t\r\n")}
    refused = [i for i, text in enumerate(wanted) if not text and i not in blank]
    assert [one.where for one in skipped] == [f"a.jsonl:{i + 1}" for i in refused]
    assert [one.bad for one in skipped] == [wanted[i] is None for i in refused]
    for i, text in enumerate(wanted):
        if text is not None:
            assert record_text(chunk, i, "text") == text
        else:
            with pytest.raises(ValueError):
                record_text(chunk, i, "text")


REASONS = {
    b"not json": "invalid JSON",
    b'{"text": "a"}\r{"text": "b"}': "invalid JSON",
    b'["a"]': "not a JSON object",
    b'{"other": "a"}': "no key 'text'",
    b'{"text": 3}': "'text' is not a string but int",
    b'{"text": 123456789012345678901234567890}': "'text' is not a string but int",
    b'{"text": null}': "'text' is not a string but NoneType",
    b'{"text": "\\udfff"}': "half a surrogate pair in the text, which is not valid Unicode",
    b"[" * 200_000: "JSON nested too deeply",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "JSON with too long a number",
    b'{"text": "\xff"}': "not UTF-8 (byte 10 of the record)",
}


def test_every_reason_is_said_once() -> None:
    texts, _, skipped = chunk_texts(chunk_of(*REASONS, b" \r", b"", b'{"text": ""}', first=5), "text")
    assert texts == []
    assert skipped[:-1] == [Skipped(f"a.jsonl:{5 + i}", reason) for i, reason in enumerate(REASONS.values())]
    assert skipped[-1] == Skipped(f"a.jsonl:{5 + len(REASONS) + 2}", "empty text", bad=False)


def test_rows_and_files() -> None:
    rows = [{"text": "a"}, {}, {"text": None}, {"text": b"bytes"}, {"other": 1}, {"text": ""}]
    texts, indices, skipped = chunk_texts(chunk_of(*rows, kind="row", unit="row"), "text")
    assert (texts, indices) == (["a"], [0])
    assert [(one.where, one.reason) for one in skipped] == [
        ("a.jsonl row 3", "'text' is not a string but NoneType"),
        ("a.jsonl row 4", "'text' is not a string but bytes"),
        ("a.jsonl row 5", "no key 'text'"),
        ("a.jsonl row 6", "empty text"),
    ]
    assert record_json(chunk_of(*rows, kind="row", unit="row"), 0) == {"text": "a"}
    whole = chunk_of(b" \n", kind="text", unit="file")
    assert chunk_texts(whole, "text") == ([" \n"], [0], [])
    for content, reason in {b"": "empty text", b"a\xff": "not UTF-8 (byte 1 of the record)"}.items():
        empty = chunk_texts(chunk_of(content, kind="text", unit="file"), "text")
        assert empty == ([], [], [Skipped("a.jsonl", reason, bad=content != b"")])


def test_what_the_reader_refused_is_passed_on() -> None:
    chunk = Chunk("a", "json", "line", [b""], 7, 0, 0, 0, (0, 0, 0), [Skipped("a:7", "larger")])
    assert chunk_texts(chunk, "text") == ([], [], [Skipped("a:7", "larger")])


def test_places_in_a_file_that_is_read_from_its_middle() -> None:
    chunk = chunk_of(b"12345", b"", b"broken", first=0)
    assert [chunk.where(index) for index in range(3)] == [f"a.jsonl at byte {byte}" for byte in (100, 106, 107)]
    assert pickle.loads(pickle.dumps(chunk)) == chunk


def test_naming_all_lines_measures_each_once() -> None:
    """Else a shard with many empty texts would take minutes."""
    measured = 0

    class Line(bytes):
        def __len__(self) -> int:
            nonlocal measured
            measured += 1
            return super().__len__()

    chunk = chunk_of(*[Line(b'{"text": ""}')] * 1000, first=0)
    _, _, skipped = chunk_texts(chunk, "text")
    assert [one.where for one in skipped] == [f"a.jsonl at byte {100 + 13 * index}" for index in range(1000)]
    assert measured <= 2000
