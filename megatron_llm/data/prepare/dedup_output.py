"""The last steps of deduplication: copying the records that stay, and accounting for all others.

Run by datatrove's executors after the steps of `dedup_steps.py`, which describes the work folder. `dedup.py` strings them
together.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from datatrove.io import open_file
from datatrove.pipeline.base import PipelineStep

from megatron_llm.data.prepare.chunks import InputFile, chunk_texts
from megatron_llm.data.prepare.dedup_rules import Array, contains, file_and_record
from megatron_llm.data.prepare.dedup_steps import of_file, positions_of, write_json
from megatron_llm.data.prepare.inputs import read_chunks

START = 120  # characters shown of a document
REASONS = ("exact", "near")


@dataclass
class FileCounts:
    """What became of the records of one input file. `bytes` are those of the texts as UTF-8."""

    path: str
    output: str
    documents: int = 0
    exact: int = 0
    near: int = 0
    skipped: int = 0
    bytes: int = 0
    bytes_kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # why records were skipped
    starts: dict[int, str] = field(default_factory=dict)  # by position, the beginning of texts that the report shows


class WriteKept(PipelineStep):
    """Copies the records that stay, unchanged and in order, and accounts for all others in `files/`.

    A file of the output is complete once it has its name.
    """

    type, name = "WRITER", "records that stay"

    def __init__(self, files: Sequence[InputFile], text_key: str, work: Path, output: Path) -> None:
        super().__init__()
        self.files, self.text_key, self.work, self.output = files, text_key, work, output

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        removed_3M = np.load(self.work / "removed.npy", mmap_mode="r")
        clusters = json.loads((self.work / "largest.json").read_text())["largest"]
        shown = {at for cluster in clusters for at in (cluster["kept"], *cluster["removed"])}
        for index in range(rank, len(self.files), world_size):
            self._write(index, of_file(removed_3M, index), shown)

    def _write(self, index: int, removed_3M: Array, shown: set[int]) -> None:
        file = self.files[index]
        counts = FileCounts(file.path, str(self.output / output_name(index, file)))
        reasons: Counter[str] = Counter()
        removed_file, skipped_file = (_part(self.work, index, f"{what}.jsonl") for what in ("removed", "skipped"))
        partial = self.output / f".partial-{output_name(index, file)}"
        removed_file.parent.mkdir(parents=True, exist_ok=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        stays: list[Array] = []
        with (
            removed_file.open("w") as removed_lines,
            skipped_file.open("w") as skipped_lines,
            open_file(str(partial), "wb", compression="infer") as kept,
        ):
            for chunk in read_chunks([file], columns=[self.text_key]):
                texts, indices, skipped = chunk_texts(chunk, self.text_key)
                for record in skipped:
                    reasons[record.reason] += 1
                    skipped_lines.write(_line({"id": record.where, "reason": record.reason}))
                positions = positions_of(chunk, index, indices)
                gone = contains(removed_3M[0], positions)
                for text, number, at, goes in zip(texts, indices, positions.tolist(), gone.tolist(), strict=True):
                    size = len(text.encode())
                    counts.documents += 1
                    counts.bytes += size
                    counts.bytes_kept += 0 if goes else size
                    if at in shown:
                        counts.starts[at] = text[:START]
                    if not goes and chunk.kind == "json":
                        kept.write(cast(bytes, chunk.records[number]) + b"\n")
                stays.append(positions[~gone])
            for at, instead, reason in removed_3M.T.tolist():
                removed_lines.write(
                    _line({"id": where(self.files, at), "reason": REASONS[reason], "kept": where(self.files, instead)})
                )
        counts.near = int(removed_3M[2].sum())
        counts.exact = removed_3M.shape[1] - counts.near
        counts.skipped, counts.reasons = reasons.total(), dict(reasons)
        if counts.documents - sum(map(len, stays)) != removed_3M.shape[1]:
            raise ValueError(f"{file.path} changed while it was read; remove {self.work} and run again")
        if file.format == "parquet":
            _copy_rows(file.path, partial, np.concatenate([np.empty(0, np.uint64), *stays]))
        os.replace(partial, counts.output)
        write_json(_part(self.work, index, "json"), asdict(counts))


def _copy_rows(source: str, target: Path, positions: Array) -> None:
    """Write the rows at these positions to a new parquet file with the schema and the compression of the old one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as old:
        meta = old.metadata
        codec = meta.row_group(0).column(0).compression if meta.num_row_groups and meta.num_columns else "SNAPPY"
        stays = np.zeros(meta.num_rows + 1, bool)
        stays[[file_and_record(at)[1] for at in positions.tolist()]] = True
        row = 1
        with pq.ParquetWriter(target, old.schema_arrow, compression="NONE" if codec == "UNCOMPRESSED" else codec) as new:
            for batch in old.iter_batches():
                new.write_batch(batch.filter(pa.array(stays[row : row + len(batch)])))
                row += len(batch)


class Summarize(PipelineStep):
    """Joins what was written file by file to the report, removed.jsonl and skipped.jsonl. One task."""

    type, name = "WRITER", "report"

    def __init__(self, files: Sequence[InputFile], work: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self.files, self.work, self.settings = files, work, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        counts = [FileCounts(**json.loads(_part(self.work, index, "json").read_text())) for index in range(len(self.files))]
        documents, exact, near, skipped, size, size_kept = (
            sum(getattr(file, name) for file in counts)
            for name in ("documents", "exact", "near", "skipped", "bytes", "bytes_kept")
        )
        starts = {int(at): start for file in counts for at, start in file.starts.items()}
        clusters = json.loads((self.work / "largest.json").read_text())

        def show(at: int) -> dict[str, str]:
            return {"id": where(self.files, at), "start": starts[at]}

        report = {
            "documents": {
                "in": documents + skipped,
                "kept": documents - exact - near,
                "removed_exact": exact,
                "removed_near": near,
                "skipped": skipped,
            },
            "text_bytes": {"in": size, "kept": size_kept, "removed": size - size_kept},
            "skipped": sum((Counter(file.reasons) for file in counts), Counter()),
            "clusters_by_size": clusters["sizes"],
            "largest_clusters": [
                {"size": it["size"], "kept": show(it["kept"]), "removed": [show(at) for at in it["removed"]]}
                for it in clusters["largest"]
            ],
            "removed_list": self._join("removed.jsonl"),
            "skipped_list": self._join("skipped.jsonl"),
            "settings": self.settings,
            "files": [{key: value for key, value in asdict(file).items() if key not in ("starts", "reasons")} for file in counts],
        }
        write_json(self.work / "report.json", report)

    def _join(self, name: str) -> str:
        """The parts of all files, in order, as one file, whose path is returned."""
        target = self.work / name
        with target.open("wb") as out:
            for index in range(len(self.files)):
                out.write(_part(self.work, index, name).read_bytes())
        return str(target)


def output_name(index: int, file: InputFile) -> str:
    """Name of the output of an input file; sorts as the input does."""
    return f"{index:05d}-{os.path.basename(file.path)}"


def where(files: Sequence[InputFile], at: int) -> str:
    """A position in words, as the messages about skipped records have it."""
    index, record = file_and_record(at)
    file = files[index]
    return f"{file.path} row {record}" if file.format == "parquet" else f"{file.path}:{record}"


def _part(work: Path, index: int, suffix: str) -> Path:
    return work / f"files/{index:06d}.{suffix}"


def _line(content: dict[str, str]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
