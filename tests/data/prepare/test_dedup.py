"""Deduplication from files to files, in this process."""

from __future__ import annotations

import gzip
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_llm.data.prepare import dedup_steps
from megatron_llm.data.prepare.dedup import DedupOptions, deduplicate
from tests.data.prepare.dedup_files import corpus_texts, kept_texts, prose, read_jsonl, write_jsonl


def run(inputs: list[Path], output: Path, **options: Any) -> dict[str, Any]:
    report = deduplicate(inputs, output, DedupOptions(**options), workers=1, progress=False)
    assert report is not None
    count = report["documents"]
    assert count["in"] == count["kept"] + count["removed_exact"] + count["removed_near"] + count["skipped"]
    return report


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return corpus_texts()


def similarities(texts: list[str]) -> Iterator[tuple[int, int, float]]:
    """Jaccard similarity of sets of five words, for all pairs: punctuation and case do not count."""
    sets = []
    for text in texts:
        words = re.sub(r"[^\w\s]|_", " ", text.lower()).split()
        sets.append(set(zip(*(words[at:] for at in range(5)), strict=False)))
    for right in range(len(texts)):
        for left in range(right):
            yield left, right, len(sets[left] & sets[right]) / max(1, len(sets[left] | sets[right]))


def test_near_duplicates_are_those_of_brute_force(tmp_path: Path, corpus: list[str]) -> None:
    """Who is alike enough goes with its like, who resembles nobody stays, and what stays is the longest."""
    source = write_jsonl(tmp_path / "a.jsonl", corpus)
    run([source], tmp_path / "out", similarity=0.8)
    stays = {record["n"] for record in read_jsonl(tmp_path / "out/00000-a.jsonl")}
    instead = {
        int(record["id"].split(":")[1]) - 1: int(record["kept"].split(":")[1]) - 1
        for record in read_jsonl(tmp_path / "out.work/removed.jsonl")
    }
    assert stays == set(range(len(corpus))) - set(instead) and set(instead.values()) <= stays
    assert all(len(corpus[kept]) >= len(corpus[gone]) for gone, kept in instead.items())
    most = Counter[int]()
    alike = 0
    for left, right, similarity in similarities(corpus):
        if similarity > 0.9:
            alike += 1
            assert instead.get(left, left) == instead.get(right, right), (left, right, similarity)
        for one in (left, right):
            most[one] = max(most[one], similarity)  # type: ignore[assignment]
    alone = [number for number in range(len(corpus)) if most[number] < 0.45]
    assert set(alone) <= stays
    assert alike > 30 and len(alone) > 20, "the corpus must have both"


def test_the_longest_stays_and_the_first_of_equally_long_ones(tmp_path: Path) -> None:
    words = prose(1, 300)
    texts = [" ".join([*words, *extra]) for extra in (["one"], ["one", "two", "three"], ["six", "two", "three"], [])]
    texts += ["quite another text of more than five words", *texts[:2]]
    report = run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out")
    assert kept_texts(tmp_path / "out") == [texts[1], texts[4]]
    a = str(tmp_path / "a.jsonl")
    assert read_jsonl(tmp_path / "out.work/removed.jsonl") == [
        {"id": f"{a}:1", "reason": "near", "kept": f"{a}:2"},
        {"id": f"{a}:3", "reason": "near", "kept": f"{a}:2"},
        {"id": f"{a}:4", "reason": "near", "kept": f"{a}:2"},
        {"id": f"{a}:6", "reason": "exact", "kept": f"{a}:2"},  # equal to line 1, which goes itself
        {"id": f"{a}:7", "reason": "exact", "kept": f"{a}:2"},
    ]
    assert report["clusters_by_size"] == {"6": 1}
    largest = report["largest_clusters"]
    assert [it["size"] for it in largest] == [6] and largest[0]["kept"] == {"id": f"{a}:2", "start": texts[1][:120]}
    assert largest[0]["removed"][0] == {"id": f"{a}:1", "start": texts[0][:120]}


def test_documents_that_differ_in_numbers_only_stay(tmp_path: Path) -> None:
    """Long ones too, where one number of 1,000 words leaves a similarity of 0.99; also beside a longer near duplicate."""
    words = prose(2, 1000)
    reports = [
        " ".join([*words[:500], f"invoice {number} of 20{number:02d}-01-{number:02d}", *words[500:]]) for number in range(40)
    ]
    edited = [text.replace(words[10], "corrected", 1) for text in reports[:3]]
    longer = " ".join([*words, "and without any of the numbers"])
    texts = [*reports, *edited, longer, reports[5].upper()]
    run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out")
    kept = kept_texts(tmp_path / "out")
    numbers = [re.findall(r"\d+", text) for text in kept]
    assert len(kept) == 41 and longer in kept, "one for each set of numbers, and the longest"
    assert sorted(numbers) == sorted([re.findall(r"\d+", text) for text in reports] + [[]])


def test_tables_of_other_numbers_are_not_alike(tmp_path: Path) -> None:
    words = prose(5, 150)
    texts = [
        " ".join(f"{word} {first + n}" for n, word in enumerate([title, *words])) for title, first in (("rain", 0), ("snow", 300))
    ]
    run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out")
    assert kept_texts(tmp_path / "out") == texts


def test_seed_and_ngram_reach_the_signatures(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one two three four five six seven"])
    signatures = set()
    for number, options in enumerate(({}, {"seed": 2}, {"ngram": 3}, {"ngram": 8})):
        run([source], tmp_path / f"{number}", **options)
        signatures.add((tmp_path / f"{number}.work/near/signatures/bucket_000/00000.minhash.sig").read_bytes())
    assert len(signatures) == 4 and b"" in signatures, "seven words have no n-gram of eight"


@pytest.mark.parametrize("tasks", [3, 7])
def test_the_number_of_tasks_changes_nothing(tmp_path: Path, corpus: list[str], tasks: int) -> None:
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", corpus[number::7]) for number in range(7)]
    reports = [run(inputs, tmp_path / f"out{n}", tasks=n, similarity=0.7) for n in (1, tasks)]
    for name in ("documents", "text_bytes", "clusters_by_size", "largest_clusters"):
        assert reports[0][name] == reports[1][name]
    one, many = ([path.read_bytes() for path in sorted((tmp_path / f"out{n}").iterdir())] for n in (1, tasks))
    assert one == many
    one, many = ((tmp_path / f"out{n}.work/removed.jsonl").read_bytes() for n in (1, tasks))
    assert one == many


def test_lines_are_kept_byte_for_byte(tmp_path: Path) -> None:
    """Order of keys, spacing, escapes, numbers that floats do not hold, all kinds of compression; the last line has no end."""
    lines = [
        b'{"b": 1.10, "text":  "caf\\u00e9"}',
        '{"text": "café"}'.encode(),  # the same text
        b'{"metadata": {"x": [1, null]}, "id": 12345678901234567890123, "text": "b", "text2": "\\ud83d\\ude00"}\r',
        b'{"text": "c\\u0000c", "z": NaN}',
    ]
    content = b"\xef\xbb\xbf" + b"\n\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.replace(b"caf", b"CAF")))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content.replace(b'"c\\u', b'"d\\u')))
    report = run(sorted(tmp_path.glob("*.jsonl*")), tmp_path / "out", near=False)
    output = [Path(file["output"]) for file in report["files"]]
    assert [path.name for path in output] == ["00000-a.jsonl", "00001-b.jsonl.gz", "00002-c.jsonl.zst"]
    assert output[0].read_bytes() == b"".join(line + b"\n" for line in (lines[0], lines[2], lines[3]))
    assert gzip.decompress(output[1].read_bytes()) == lines[0].replace(b"caf", b"CAF") + b"\n"
    assert (
        zstandard.ZstdDecompressor().decompressobj().decompress(output[2].read_bytes()) == lines[3].replace(b'"c', b'"d') + b"\n"
    )
    assert report["documents"] == {"in": 12, "kept": 5, "removed_exact": 7, "removed_near": 0, "skipped": 0}
    assert report["text_bytes"]["in"] == 3 * (5 + 5 + 1 + 3) and report["text_bytes"]["kept"] == 5 + 1 + 3 + 5 + 3


def test_parquet_keeps_its_schema_and_rows(tmp_path: Path) -> None:
    texts = ["a", "b", None, "a", "", "c", "b", "d"]
    table = pa.table(
        {
            "when": pa.array(range(8), pa.timestamp("ns")),
            "body": pa.array(texts).dictionary_encode(),
            "tags": pa.array([[{"x": n}] for n in range(8)]),
        }
    ).replace_schema_metadata({"origin": "test"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, compression="zstd")
    (tmp_path / "b.jsonl").write_text('{"body": "d"}\n{"body": "e"}\n')
    report = run([tmp_path / "a.parquet", tmp_path / "b.jsonl"], tmp_path / "out", text_key="body", near=False)
    kept = pq.read_table(tmp_path / "out/00000-a.parquet")
    assert kept.equals(table.take([0, 1, 5, 7])) and kept.schema.metadata == table.schema.metadata
    assert pq.ParquetFile(tmp_path / "out/00000-a.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert (tmp_path / "out/00001-b.jsonl").read_text() == '{"body": "e"}\n'
    a = tmp_path / "a.parquet"
    removed = read_jsonl(tmp_path / "out.work/removed.jsonl")
    assert [(it["id"], it["kept"]) for it in removed] == [
        (f"{a} row 4", f"{a} row 1"),
        (f"{a} row 7", f"{a} row 2"),
        (f"{tmp_path}/b.jsonl:1", f"{a} row 8"),
    ]
    assert {it["id"]: it["reason"] for it in read_jsonl(tmp_path / "out.work/skipped.jsonl")} == {
        f"{a} row 3": "'body' is not a string but NoneType",
        f"{a} row 5": "empty text",
    }
    assert report["documents"] == {"in": 10, "kept": 5, "removed_exact": 3, "removed_near": 0, "skipped": 2}


BAD = [b"{", b'{"txt": "a"}', b'{"text": 5}', b'{"text": ""}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[1]"]


def test_bad_records_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": "good"}', *BAD, b'{"text": "good"}', b'{"text": "fine"}']))
    report = run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert kept_texts(tmp_path / "out") == ["good", "fine"]
    assert report["documents"] == {"in": 10, "kept": 2, "removed_exact": 1, "removed_near": 0, "skipped": 7}
    skipped = read_jsonl(tmp_path / "out.work/skipped.jsonl")
    assert [it["id"] for it in skipped] == [f"{tmp_path}/a.jsonl:{line}" for line in range(2, 9)]
    assert sum(report["skipped"].values()) == 7 and report["skipped"]["no key 'text'"] == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:2: invalid JSON"):
        run([tmp_path / "a.jsonl"], tmp_path / "strict", strict=True)


def test_stages_can_be_left_out(tmp_path: Path) -> None:
    words = prose(3, 200)
    texts = [" ".join(words), " ".join([*words, "end"]), " ".join(words), "short", "short"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    run([source], tmp_path / "exact", near=False)
    assert kept_texts(tmp_path / "exact") == [texts[0], texts[1], texts[3]]
    report = run([source], tmp_path / "near", exact=False)
    assert kept_texts(tmp_path / "near") == [texts[1], "short", "short"], "fewer words than --ngram: MinHash sees nothing"
    assert report["documents"]["removed_near"] == 2
    run([source], tmp_path / "both")
    assert kept_texts(tmp_path / "both") == [texts[1], "short"]


def test_nothing_to_do_and_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    report = run([tmp_path / "empty.jsonl"], tmp_path / "out")
    assert set(report["documents"].values()) == {0} and (tmp_path / "out/00000-empty.jsonl").read_bytes() == b""


def test_interrupted_work_goes_on_and_finished_work_is_not_done_again(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [write_jsonl(tmp_path / f"{number}.jsonl", corpus[number::3]) for number in range(3)]
    run(inputs, tmp_path / "whole")
    signed = []
    sign = dedup_steps.Signatures.get_signature

    def fails(self: Any, shingles: Any) -> Any:
        signed.append(len(shingles))
        if len(signed) == 90:
            raise OSError("no space left")
        return sign(self, shingles)

    monkeypatch.setattr(dedup_steps.Signatures, "get_signature", fails)
    with pytest.raises(OSError, match="no space"):
        run(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(inputs, tmp_path / "out")
    monkeypatch.setattr(dedup_steps.Signatures, "get_signature", sign)
    assert len(signed) < 90 + 2 * len(corpus) / 3 + 1, "the first file was not signed again"
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert sorted(path.read_bytes() for path in written) == sorted(path.read_bytes() for path in (tmp_path / "whole").iterdir())
    run(inputs, tmp_path / "out")
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for path in (next(iter(written)), tmp_path / "out.work/report.json"):
        path.unlink()
        with pytest.raises(ValueError, match=rf"{path.name} was written and is gone; remove .*out\.work"):
            run(inputs, tmp_path / "out")


def test_a_half_written_file_does_not_have_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    replace = os.replace

    def crash(source: Any, target: Any) -> None:
        if "00000-a" in str(target):
            raise OSError("crash")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="crash"):
        run([source], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial-00000-a.jsonl"]
    monkeypatch.setattr(os, "replace", replace)
    run([source], tmp_path / "out")
    assert kept_texts(tmp_path / "out") == ["one", "two"]


def test_a_work_folder_belongs_to_one_run(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    run([source], tmp_path / "out", seed=1)
    with pytest.raises(ValueError, match=r"out\.work belongs to a run with other settings \(seed\)"):
        run([source], tmp_path / "out", seed=2)
    source.write_text('{"text": "changed"}\n')
    with pytest.raises(ValueError, match=r"other settings \(inputs\)"):
        run([source], tmp_path / "out", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="full exists"):
        run([source], tmp_path / "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": 1.0}, "between 0 and 1"),
        ({"similarity": 0.001}, "more than 128 hashes"),
        ({"buckets": 5}, "go together"),
        ({"buckets": 5, "hashes_per_bucket": 0}, "--hashes-per-bucket 0 is not positive"),
        ({"ngram": 0}, "--ngram 0"),
        ({"seed": -1}, "--seed -1"),
        ({"exact": False, "near": False}, "nothing to do"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DedupOptions(**options)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet.gz"])
def test_inputs_that_cannot_be_written_back_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\nx\n")
    with pytest.raises(ValueError, match=rf"{name}: deduplication reads \.jsonl .*and \.parquet"):
        run([tmp_path / name], tmp_path / "out")


def test_records_without_one_text_are_no_result(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    for _ in range(2):  # the second one finds the finished report
        with pytest.raises(ValueError, match=r"all 2 records were skipped: 2 x no key 'body'.*remove .*out\.work and .*out"):
            run([source], tmp_path / "out", text_key="body")


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000))[:2000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz"):
        run([tmp_path / "a.jsonl.gz"], tmp_path / "out")


def test_without_datatrove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.dedup.minhash", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron_llm\[dedup\]'"):
        run([write_jsonl(tmp_path / "a.jsonl", ["x"])], tmp_path / "out")
