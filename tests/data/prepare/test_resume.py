"""Killed at any moment, as often as you like, the same command gives the files of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.prepare import inputs, pipeline
from megatron_llm.data.prepare.chat import preprocess_chat
from megatron_llm.data.prepare.chunks import Chunk
from megatron_llm.data.prepare.preprocess import preprocess
from megatron_llm.data.writer import IndexedWriter

# Runs one command again and again in children that kill themselves, at a random time or at a random change of a file, until one
# of them ends by itself. After each death every data set that there is must be whole.
DRIVER = r"""
import json, os, random, signal, sys, threading
from glob import glob
from pathlib import Path

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.prepare import inputs, pipeline
from megatron_llm.data.prepare.preprocess import preprocess

source, tokenizer, output, seed, options = *sys.argv[1:5], json.loads(sys.argv[5])
chance = random.Random(int(seed))
pipeline.read_chunks = lambda *a, **b: inputs.read_chunks(*a, **b, chunk_bytes=300, max_record_bytes=1 << 20)
events = 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(number):
    global events
    fsync = os.fsync
    def count(event="os.fsync", arguments=()):
        global events
        if event in ("os.fsync", "os.rename", "os.remove"):
            events += 1
            if events == number:
                die()
    sys.addaudithook(count)
    def counting_fsync(file):
        count()
        fsync(file)
    os.fsync = counting_fsync

deaths = 0
while True:
    child = os.fork()
    if child == 0:
        if deaths and chance.random() < 0.3:
            threading.Timer(chance.uniform(0, 0.2), die).start()
        else:
            die_at(chance.randint(1, 10 + 20 * deaths))
        preprocess([source], tokenizer, output, progress=False, journal_seconds=0, **options)
        os._exit(0)
    chance.random()
    chance.seed(chance.random())
    _, status = os.waitpid(child, 0)
    for path in glob(output + "*.idx"):
        IndexedDataset(path.removesuffix(".idx")).verify()
    if not os.WIFSIGNALED(status):
        sys.exit(0 if status == 0 and deaths else 1)
    deaths += 1
    print("death", deaths)
"""


def write_source(folder: Path, records: int = 150) -> Path:
    source = folder / "a.jsonl"
    lines = [json.dumps({"text": f"document {i} says hello " * (1 + i % 3)}) if i % 17 else "broken" for i in range(records)]
    source.write_text("\n".join(lines))
    return source


def outputs(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name.removeprefix(name): path.read_bytes() for path in folder.glob(f"{name}*")}


@pytest.mark.parametrize(
    "options",
    [{}, {"split": [0.6, 0.4]}, {"shuffle_seed": 5}, {"split": [0.6, 0.3, 0.1], "shuffle_seed": 5}, {"shard": [1, 3]}],
    ids=["plain", "split", "shuffle", "both", "shard"],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 5))])
def test_killed_again_and_again(tmp_path: Path, tokenizer_folder: Path, options: dict[str, Any], seed: int) -> None:
    source = write_source(tmp_path)
    given = {name: tuple(value) if name == "shard" else value for name, value in options.items()}
    preprocess([source], tokenizer_folder, tmp_path / "whole", progress=False, **given)
    arguments = [source, tokenizer_folder, tmp_path / "killed", seed, json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "death 1" in done.stdout
    assert outputs(tmp_path, "killed") == outputs(tmp_path, "whole")


class Interrupt:
    """Reads small chunks, remembers where reading began, and raises KeyboardInterrupt after so many chunks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.after: int | None = None
        self.starts: list[Any] = []
        self.chunks = 0
        monkeypatch.setattr(pipeline, "read_chunks", self.read_chunks)

    def read_chunks(self, files: Any, start: Any = None, **options: Any) -> Iterator[Chunk]:
        self.starts.append(start)
        for number, chunk in enumerate(inputs.read_chunks(files, start, **options, chunk_bytes=300, max_record_bytes=1 << 20)):
            if number == self.after:
                raise KeyboardInterrupt
            self.chunks += 1
            yield chunk


def test_work_is_continued_and_not_begun_again(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path)
    whole = preprocess([source], tokenizer_folder, tmp_path / "whole", progress=False)
    reader = Interrupt(monkeypatch)
    preprocess([source], tokenizer_folder, tmp_path / "once", progress=False)
    chunks, reader.chunks, reader.starts = reader.chunks, 0, []

    def go() -> Any:
        return preprocess([source], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=0)

    reader.after = 4
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            go()
        assert not (tmp_path / "out.idx").exists()
    reader.after = None
    summary = go()
    assert reader.starts[0] is None
    places = [start[1] for start in reader.starts[1:]]
    assert places == sorted(set(places))
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")
    assert (summary.documents, summary.skipped, summary.bytes) == (whole.documents, whole.skipped, whole.bytes)
    assert summary.examples == whole.examples
    assert summary.new_bytes < whole.bytes
    assert chunks <= reader.chunks <= chunks + 3 * 3  # again only what was read ahead when it was interrupted


@pytest.mark.parametrize("renames", range(6))
def test_dying_while_finished_files_are_put_in_place(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Nothing is tokenized again, whichever of the renames of two outputs was the last."""
    source, options = write_source(tmp_path), {"split": [0.5, 0.5], "progress": False}
    preprocess([source], tokenizer_folder, tmp_path / "whole", **options)  # type: ignore[arg-type]
    real, left = os.replace, renames

    def replace(source: Any, target: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            preprocess([source], tokenizer_folder, tmp_path / "out", **options)  # type: ignore[arg-type]
    reader = Interrupt(monkeypatch)
    summary = preprocess([source], tokenizer_folder, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert (reader.starts, summary.documents) == ([], 141)
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")


def test_without_a_note_in_the_journal_nothing_is_left(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path)
    Interrupt(monkeypatch).after = 3
    with pytest.raises(KeyboardInterrupt):
        preprocess([source], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=3600.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("first", [{}, {"split": [0.5, 0.5]}], ids=["plain", "split"])
def test_other_options_or_inputs_start_over(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: dict[str, Any],
) -> None:
    source = write_source(tmp_path)
    preprocess([source], tokenizer_folder, tmp_path / "whole", append_eod=False, progress=False)
    reader = Interrupt(monkeypatch)
    reader.after = 4
    with pytest.raises(KeyboardInterrupt):
        preprocess([source], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=0, **first)
    reader.after = None
    preprocess([source], tokenizer_folder, tmp_path / "out", append_eod=False, progress=False)
    assert "out.journal is of other options or inputs: starting over" in capsys.readouterr().err
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")


def test_force_starts_over_and_is_itself_continued(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old finished files do not hide that the work of `force` is not done."""
    source = write_source(tmp_path)
    before = preprocess([source], tokenizer_folder, tmp_path / "out", progress=False)
    wanted = outputs(tmp_path, "out")
    reader = Interrupt(monkeypatch)

    def go(**options: Any) -> Any:
        return preprocess([source], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=0, **options)

    for after, options in ((4, {"force": True}), (4, {"force": True}), (4, {}), (4, {})):
        reader.after = after
        with pytest.raises(KeyboardInterrupt):
            go(**options)
        assert IndexedDataset(tmp_path / "out").documents == before.documents
    reader.after = None
    assert not go().done_before
    assert [start is None for start in reader.starts] == [True, True, False, False, False]
    assert outputs(tmp_path, "out") == wanted
    assert go().done_before


def test_chat_continues_too(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    replies = [{"role": "assistant", "content": f"{i}", "weight": 1 + i // 7 % 5} for i in range(60)]
    records = [{"messages": [{"role": "user", "content": "ask"}, reply]} for reply in replies]
    source.write_text("\n".join(map(json.dumps, records)))
    preprocess_chat([source], tokenizer_folder, tmp_path / "whole", progress=False)
    reader = Interrupt(monkeypatch)
    reader.after = 5
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            preprocess_chat([source], tokenizer_folder, tmp_path / "out", progress=False, journal_seconds=0)
    reader.after = None
    preprocess_chat([source], tokenizer_folder, tmp_path / "out", progress=False)
    assert reader.starts[1] is not None
    meta = IndexedDataset(tmp_path / "out").meta
    assert meta is not None and meta.weights == (1.0, 2.0, 3.0, 4.0, 5.0)  # of which some were met after the interruption
    assert set(outputs(tmp_path, "out")) == {".bin", ".idx", ".roles.bin", ".meta.json"}
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")
    assert preprocess_chat([source], tokenizer_folder, tmp_path / "out", progress=False).done_before


def test_one_command_at_a_time(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path)
    real = IndexedWriter.finish
    refused = []

    def finish(writer: IndexedWriter) -> None:
        with pytest.raises(ValueError, match="being written by another process") as caught:
            preprocess([source], tokenizer_folder, tmp_path / "out", progress=False)
        refused.append(caught.value)
        real(writer)

    monkeypatch.setattr(IndexedWriter, "finish", finish)
    preprocess([source], tokenizer_folder, tmp_path / "out", progress=False)
    assert len(refused) == 1
    assert set(outputs(tmp_path, "out")) == {".bin", ".idx", ".meta.json"}


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_source(tmp_path)
    code = (
        "import sys, time\n"
        "from megatron_llm.data.prepare import inputs, pipeline\n"
        "def endless(*a, **b):\n"
        "    while True:\n"
        "        yield from inputs.read_chunks(*a, **b)\n"
        "        time.sleep(0.01)\n"
        "pipeline.read_chunks = endless\n"
        "from megatron_llm.data.prepare.preprocess import preprocess\n"
        "if __name__ == '__main__': preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, progress=False)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, script, source, tokenizer_folder, tmp_path / "out"])
    try:
        limit = time.monotonic() + 240
        written = tmp_path / "out.bin.tmp"
        while not (written.exists() and written.stat().st_size):
            assert time.monotonic() < limit
            time.sleep(0.05)
        children = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
