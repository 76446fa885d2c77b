"""Files of JSON lines that a run appends to, and cuts when it goes back."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_llm.training.metrics import forget_lines_after


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
