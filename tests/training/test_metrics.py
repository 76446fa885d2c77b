"""Files of JSON lines that a run appends to, and cuts when it goes back."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.training import metrics as module
from megatron_llm.training.metrics import Metrics, forget_lines_after
from megatron_llm.training.step import RunState
from tests.runs import config_of


def test_only_lines_of_later_steps_are_forgotten(tmp_path: Path) -> None:
    """What a model says may hold what Unicode takes for the end of a line; it is one in no file of JSON."""
    path = tmp_path / "samples.jsonl"
    said = ["plain", "one\u2028two", "one\x85two\u2029three", "later"]
    lines = [json.dumps({"step": step, "reply": reply}, ensure_ascii=False) for step, reply in enumerate(said)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "rep', encoding="utf-8")
    forget_lines_after(path, 2)
    assert path.read_text(encoding="utf-8") == "".join(line + "\n" for line in lines[:3])
    forget_lines_after(path, -1)
    assert path.read_text() == ""
    forget_lines_after(path, -1)
    assert path.read_text() == ""
    forget_lines_after(tmp_path / "absent.jsonl", 0)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("broken", ["_replace", "append_line"])
def test_a_line_that_gets_more_values_is_never_lost(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed, or has no room, while a line is replaced has the line before or the one after."""
    metrics = Metrics(config_of(logging={"run_dir": str(tmp_path)}), 1, torch.device("cpu"), 0)
    metrics.write({"step": 2, "loss": 1.5})
    metrics.write({"step": 3, "loss": 1.0})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, broken, full)
    metrics.add(RunState(step=3, tokens=9), {"valid_loss": 2.0})
    first, line = [json.loads(text) for text in metrics.path.read_text().splitlines()]
    assert first == {"step": 2, "loss": 1.5}
    assert line == {"step": 3, "loss": 1.0} | ({} if broken == "_replace" else {"tokens": 9, "valid_loss": 2.0})
