"""The commands of docs/hugging_face.md, run as written, in a folder that holds what they name."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.hf.folders import assert_same_tensors, make_folder, make_tokenizer, stored_tensors
from tests.test_readme import run_commands


def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    stored = make_folder(tmp_path / "hf" / "llama", torch.bfloat16)
    make_tokenizer(tmp_path / "tokenizer")
    run_commands("docs/hugging_face.md", tmp_path, at_least=6)
    for name in ("again", "larger"):
        assert_same_tensors(stored_tensors(tmp_path / "hf" / name), stored)
    assert (tmp_path / "hf/larger/tokenizer.json").read_bytes() == (tmp_path / "tokenizer/tokenizer.json").read_bytes()
    assert (tmp_path / "checkpoints/together/manifest.json").is_file()
