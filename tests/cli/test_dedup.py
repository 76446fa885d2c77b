"""`megatron-llm dedup`: arguments in, summary and files out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_llm.cli import dedup


def run(*argv: str | Path) -> int:
    parser = argparse.ArgumentParser()
    dedup.add_arguments(parser)
    return dedup.run(parser.parse_args([str(argument) for argument in argv]))


def source(folder: Path) -> Path:
    texts = ["the same text", "another text", "the same text"]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts) + "{\n")
    return path


def test_summary_and_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "reports/r.json"
    argv = ("--input", source(tmp_path), "--output", tmp_path / "out", "--text-key", "body", "--workers", 1, "--report", report)
    assert run(*argv, "--buckets", 2, "--hashes-per-bucket", 3) == 0
    shown = capfd.readouterr()
    assert "2 buckets of 3 hashes, threshold 0.79; chance to find a pair by its similarity: 23.4% at 0.5" in shown.out
    assert "4 in, 2 kept" in shown.out and "1 equal texts and 0 near duplicates removed, 1 records skipped" in shown.out
    assert "1 x invalid JSON" in shown.out
    assert f"kept {tmp_path}/a.jsonl:1: 'the same text'" in shown.out
    assert "datatrove" not in shown.out + shown.err and "near-sign: 100%" in shown.err
    assert "datatrove" in (tmp_path / "out.work/logs/output.log").read_text()
    content = json.loads(report.read_text())
    assert content["documents"] == {"in": 4, "kept": 2, "removed_exact": 1, "removed_near": 0, "skipped": 1}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-a.jsonl"]
    assert run(*argv, "--buckets", 2, "--hashes-per-bucket", 3) == 0
    assert capfd.readouterr().out == shown.out, "done: the same summary again"


def test_stages_and_work_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ("--input", source(tmp_path), "--output", tmp_path / "out", "--text-key", "body", "--workers", 1)
    assert run(*argv, "--no-exact", "--work", tmp_path / "elsewhere") == 0
    assert "0 equal texts" in capfd.readouterr().out
    assert (tmp_path / "elsewhere/removed.jsonl").exists() and not (tmp_path / "out.work").exists()
    with pytest.raises(ValueError, match="nothing to do"):
        run(*argv, "--no-exact", "--no-near")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--workers", 0), "--workers 0"),
        (("--executor", "slurm"), "needs --slurm-partition"),
        (("--executor", "slurm", "--slurm-partition", "p", "--slurm-option", "account"), "account is not NAME=VALUE"),
    ],
)
def test_wrong_options(tmp_path: Path, argv: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("--input", source(tmp_path), "--output", tmp_path / "out", *map(str, argv))
