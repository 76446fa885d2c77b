"""The scripts of a checkout are the commands: they find the package without an installation and report errors alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PREPROCESS = ("--input", "no.jsonl", "--tokenizer", "t", "--output", "o")
NO_FILE = (
    "no.jsonl is not a file; nor a folder, nor a glob that matches anything "
    "(a data set of the Hugging Face hub is written hub:OWNER/NAME)\n"
)
WANTED = {  # arguments that cannot work, and all that is then said
    "preprocess_data": (PREPROCESS, f"megatron-llm preprocess: error: {NO_FILE}"),
    "preprocess_chat": (PREPROCESS, f"megatron-llm preprocess-chat: error: {NO_FILE}"),
    "merge_datasets": (("no-*", "--output", "o"), "megatron-llm merge: error: no data set matches no-*\n"),
    "convert_checkpoint": (
        ("export", "absent", "out"),
        "megatron-llm export: error: absent is not a folder; expected a checkpoint, a folder of checkpoints or a run folder\n",
    ),
}


NO_COMMANDS = {"plan_recipes"}  # for those who release: tests/test_recipes.py


@pytest.mark.parametrize("tool", sorted({path.stem for path in TOOLS.glob("*.py")} - NO_COMMANDS))
def test_a_tool_runs_its_command(tool: str, tmp_path: Path) -> None:
    arguments, message = WANTED[tool]
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, message)
