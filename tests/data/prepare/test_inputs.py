"""Finding inputs and dividing them among shards: nothing is missed, nothing comes twice, what is wrong is said at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_llm.data.prepare.inputs import describe_inputs, find_inputs, read_chunks, shard_inputs
from megatron_llm.data.prepare.pipeline import Summary
from megatron_llm.data.prepare.preprocess import preprocess
from tests.data.prepare.reading import check_resume, named, read, records, write

datasets.disable_progress_bars()


def names(*inputs: str | Path) -> list[str]:
    return [file.path for file in find_inputs(inputs)]


def touch(folder: Path, *paths: str) -> list[str]:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return [str(folder / path) for path in paths]


def test_folders_are_read_to_the_bottom_in_order(tmp_path: Path) -> None:
    wanted = touch(tmp_path, "a.jsonl", "b/1/x.csv.gz", "b/10/x.TXT", "b/2/x.ndjson.zst", "c.parquet")
    touch(tmp_path, "README.md", "b/LICENSE", "_SUCCESS", ".git/config", "b/.hidden.jsonl", "b/_temporary/x.jsonl")
    (tmp_path / "d").symlink_to(tmp_path / "b" / "1")
    wanted.append(str(tmp_path / "d" / "x.csv.gz"))
    assert names(tmp_path) == wanted
    assert names(tmp_path / "b", tmp_path / "a.jsonl") == [*wanted[1:4], wanted[0]]


def test_only_texts_about_the_data_are_left_out(tmp_path: Path) -> None:
    """Data may be of readme files, or of licenses."""
    wanted = touch(tmp_path, "README.jsonl", "license_texts.jsonl", "licenses/a.jsonl", "readme/README.csv.gz", "readmes-0.txt")
    touch(tmp_path, "LICENSE", "README.md", "licenses/LICENSE.txt", "readme/Readme.txt.gz", "readme/readme.rst.gz")
    assert names(tmp_path) == wanted
    touch(tmp_path, "LICENSE-MIT")
    with pytest.raises(ValueError, match="has files of unknown kinds: LICENSE-MIT"):
        find_inputs([tmp_path])


def test_globs(tmp_path: Path) -> None:
    wanted = touch(tmp_path, "a-1.jsonl", "a-2.jsonl", "b/c/a-3.jsonl", "b/z.txt")
    assert names(f"{tmp_path}/a-*.jsonl") == wanted[:2]
    assert names(f"{tmp_path}/**/a-[13].jsonl") == [wanted[0], wanted[2]]
    assert names(f"{tmp_path}/*") == wanted
    assert names(f"{tmp_path}/**") == wanted  # the folders that it matches are not read once more
    literal = touch(tmp_path, "x[1].jsonl", "x1.jsonl")
    assert names(literal[0]) == literal[:1]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.pdf", "f/b.jsonl", "f/notes.md", "f/g/c.jsonl.lz4", "ok.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "f" / "loop").symlink_to(tmp_path / "f")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d.json.gz").write_bytes(b"no gzip")
    os.mkfifo(tmp_path / "pipe.jsonl")
    inputs = ["none.jsonl", "none-*.jsonl", "a.pdf", "f", "empty", "broken.jsonl", "d.json.gz", "pipe.jsonl"]
    with pytest.raises(ValueError) as error:
        find_inputs([tmp_path / "ok.jsonl", *(tmp_path / name for name in inputs)])
    for problem in (
        "none.jsonl is not a file; nor a folder, nor a glob that matches anything",
        "none-*.jsonl is not a file",
        "a.pdf has an unknown suffix; known: .jsonl, ",
        "f has files of unknown kinds: notes.md; name the wanted ones by a glob",
        "g has files of unknown kinds: c.jsonl.lz4",
        "loop is a link to a folder that it lies in",
        "empty is an empty folder",
        "broken.jsonl is not a file",
        "d.json.gz is damaged",
        "pipe.jsonl is not a file",
    ):
        assert problem in str(error.value)
    assert "ok.jsonl" not in str(error.value)
    with pytest.raises(ValueError, match="no input files"):
        find_inputs([])


@pytest.mark.parametrize("options", [{}, {"split": [0.5, 0.5]}, {"shuffle_seed": 1}, {"split": [0.5, 0.5], "shuffle_seed": 1}])
@pytest.mark.parametrize("name", ["tok", "made/tok"])
@pytest.mark.parametrize("given", ["", "/*", "/**/*.json*"])
def test_the_output_may_lie_in_the_input(
    tmp_path: Path, tokenizer_folder: Path, given: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in writing its files the first run is interrupted, and when it is done."""
    for number in range(3):
        write(tmp_path / f"{number}.json", b"".join(b'{"text": "%d"}\n' % line for line in range(number, 30, 3)))
    wanted = names(tmp_path)

    def run() -> Summary:
        return preprocess([f"{tmp_path}{given}"], tokenizer_folder, tmp_path / name, progress=False, **options)

    seen = set()
    for function in (os.replace, os.fsync, os.unlink):  # all steps that a killed process may have got to

        def looking(*words: Any, function: Any = function, **named: Any) -> None:
            function(*words, **named)
            there = [str(path) for path in tmp_path.rglob("*") if path.is_file()]
            seen.update(Path(path).name for path in there)
            assert names(f"{tmp_path}{given}") == wanted, there

        monkeypatch.setattr(os, function.__name__, looking)
    first = run()
    assert "tok.journal" in seen and any(name.endswith(".order.tmp") for name in seen) == ("shuffle_seed" in options)
    again = run()
    assert again.done_before and again.documents == first.documents


def test_shards_may_lie_in_the_input(tmp_path: Path, tokenizer_folder: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.json", b'{"text": "a"}\n' * 40)
    for ending in ("", "/*.json"):
        done = [
            preprocess([f"{tmp_path}{ending}"], tokenizer_folder, tmp_path / "tok", shard=(number, 2), progress=False)
            for number in range(2)
        ]
        assert [summary.documents for summary in done] == [40, 40]
        assert all(summary.done_before == (ending != "") for summary in done)


def test_files_that_are_named_as_those_of_token_data(tmp_path: Path) -> None:
    wanted = touch(tmp_path, "a.meta.json", "b.unshuffled.meta.json")
    assert names(tmp_path) == names(f"{tmp_path}/*") == wanted
    [index] = touch(tmp_path, "a.idx")
    assert names(tmp_path) == names(f"{tmp_path}/*") == wanted[1:]
    assert names(wanted[0]) == wanted[:1]  # what is named is read
    touch(tmp_path, "c.bin")
    with pytest.raises(ValueError, match=r"has files of unknown kinds: c\.bin"):
        find_inputs([tmp_path])
    touch(tmp_path, "only/x.bin", "only/x.idx")
    with pytest.raises(ValueError, match="no input files"):
        find_inputs([tmp_path / "only"])
    with pytest.raises(ValueError, match=r"is not a file; nor a folder, nor a glob that matches anything"):
        find_inputs([index.replace("a.idx", "only/*")])


def test_saved_data_sets(tmp_path: Path) -> None:
    """Folders of `save_to_disk`, where `datasets` also puts the caches of its methods."""
    rows = [{"text": f"row {number}"} for number in range(10)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.load_from_disk(str(tmp_path / "one")).map(lambda row: {"text": row["text"] + "!"})
    assert any(entry.name.startswith("cache-") for entry in (tmp_path / "one").iterdir())
    assert records(read(tmp_path / "one")) == rows
    both = datasets.DatasetDict({"train": data, "test": data.select([3, 1])})
    both.save_to_disk(tmp_path / "both")
    assert records(read(tmp_path / "both" / "test")) == [rows[3], rows[1]]
    with pytest.raises(ValueError, match="both has the splits test, train; name the folder of one of them"):
        find_inputs([tmp_path / "both"])
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "single")
    assert records(read(tmp_path / "single")) == rows
    state = tmp_path / "one" / "state.json"
    for content in ("{", '{"_data_files": [{"filename": "../both/test/data-00000-of-00001.arrow"}]}', "[]"):
        state.write_text(content)
        with pytest.raises(ValueError, match=r"state\.json is not what `datasets` writes"):
            find_inputs([tmp_path / "one"])


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    files = find_inputs([write(tmp_path / "a.jsonl", b"{}\n")])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read"):
        list(read_chunks(files))


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n" * 1000)
    files = find_inputs([path])
    write(path, b"{}\n" * 1001)
    assert len(records(list(read_chunks(files)))) == 1000
    write(path, b"{}\n" * 999)
    with pytest.raises(ValueError, match=r"a\.jsonl is 3 bytes shorter than when it was found"):
        list(read_chunks(files))


def test_descriptions_tell_inputs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n{}\n")
    monkeypatch.chdir(tmp_path)
    files = find_inputs([path])
    seen = [describe_inputs(files), describe_inputs(shard_inputs(files, 0, 2))]
    assert describe_inputs(find_inputs(["a.jsonl"])) == seen[0]
    assert json.loads(json.dumps(seen)) == seen
    os.utime(path, ns=(1, 1))
    seen.append(describe_inputs(find_inputs([path])))
    write(path, b"{}\n{}\n{}\n")
    os.utime(path, ns=(1, 1))
    seen.append(describe_inputs(find_inputs([path])))
    assert len({str(one) for one in seen}) == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


LINE = st.binary(max_size=9).map(lambda content: content.replace(b"\n", b"")) | st.just(b"x" * 200)


KINDS = ["a.jsonl", "b.jsonl", "c.jsonl.gz", "d.txt", "e.csv", "f.json"]


@given(
    st.lists(st.tuples(st.lists(LINE, max_size=9), st.booleans(), st.sampled_from(KINDS)), min_size=1, max_size=4),
    st.integers(1, 6),
)
@example([([b"a"], True, "a.jsonl"), ([], False, "d.txt")], 3)  # a file without bytes, but a record, at the very end
@settings(deadline=None, max_examples=150)
def test_shards_are_the_input(folder: Path, contents: list[tuple[list[bytes], bool, str]], count: int) -> None:
    """Every record is in one shard, in order, and named by its line or place; and going on works in every shard."""
    paths = []
    for number, (lines, ended, kind) in enumerate(contents):
        if kind == "e.csv":
            lines = [b"column", *(b"%d" % len(line) for line in lines)]
        content = b"\n".join(lines) + b"\n" * ended
        paths.append(
            write(folder / f"{number}{kind}", b"[" + b",".join(b"{}" for _ in lines) + b"]" if "f." in kind else content)
        )
    files = find_inputs(paths)
    parts = [shard_inputs(files, number, count) for number in range(count)]
    chunks = [chunk for part in parts for chunk in read_chunks(part, chunk_bytes=30)]
    whole = list(read_chunks(files, chunk_bytes=30))
    assert [(c.path, record) for c in chunks for record in c.records] == [(c.path, record) for c in whole for record in c.records]
    assert sum(file.end - file.start for part in parts for file in part) == sum(file.size for file in files)
    for part in parts:
        check_resume(part, chunk_bytes=30)
        for chunk in read_chunks(part, chunk_bytes=30):
            if chunk.unit == "line" and not chunk.path.endswith("gz"):
                number = Path(chunk.path).read_bytes()[: chunk.start].count(b"\n") + 1
                from_its_beginning = next(file.start == 0 for file in part if file.path == chunk.path)
                assert chunk.where(0) == (
                    f"{chunk.path}:{number}" if from_its_beginning else f"{chunk.path} at byte {chunk.start}"
                )


def test_a_line_is_where_its_first_byte_is(tmp_path: Path) -> None:
    lines = [b"", b"{}", b"a", b'{"a": 1}', b"", b"x" * 100, b"b"]
    firsts = [sum(len(line) + 1 for line in lines[:index]) for index in range(len(lines))]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    size = path.stat().st_size
    for count in (1, 2, 3, 7, size, 2 * size):
        for number in range(count):
            low, high = size * number // count, size * (number + 1) // count
            chunks = list(read_chunks(shard_inputs(find_inputs([path]), number, count), chunk_bytes=9))
            wanted = [line for line, first in zip(lines, firsts, strict=True) if low <= first < high]
            assert [record for chunk in chunks for record in chunk.records] == wanted


def test_one_large_file_is_divided_evenly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"".join(b'{"text": "%d"}\n' % number for number in range(10_000)))
    parts = [named(list(read_chunks(shard_inputs(find_inputs([path]), number, 8)))) for number in range(8)]
    assert [len(part) for part in parts] == pytest.approx([1250] * 8, abs=60)
    assert parts[0][-1][0] == f"{path}:{len(parts[0])}"
    assert parts[1][0][0].startswith(f"{path} at byte ")


def test_finding_inputs_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n")
    code = (
        "import sys; from megatron_llm.data.prepare.inputs import find_inputs, read_chunks;"
        f"list(read_chunks(find_inputs([{str(path)!r}])));"
        "print(*{'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
