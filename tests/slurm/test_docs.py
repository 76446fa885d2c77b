"""The commands of docs/slurm.md as written, on a cluster as they are meant for: SLURM takes every option of theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, SCRIPTS, Cluster
from tests.test_readme import blocks


@pytest.mark.slow
def test_every_command_of_the_page_is_taken(tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("base", "text.jsonl", "valid.jsonl", "chat.jsonl", "chat_valid.jsonl"):
        (tmp_path / name).touch()
    text = "".join(blocks("", "docs/slurm.md")).replace("\\\n", " ")
    # srun would wait for its nodes; sbatch takes the same options.
    commands = [re.sub("^srun (.*?) (python .*)", r"sbatch \1 --wrap='\2'", line) for line in text.splitlines() if line.strip()]
    assert len(commands) >= 7 and all("sbatch " in line or line.startswith("examples/slurm/") for line in commands)
    for command in commands:
        done = cluster.attempt("bash", "-c", command, cwd=tmp_path, SBATCH_PARTITION="gpu")
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    queue = cluster.call("squeue", "--noheader", "--partition=gpu,cpu", "--format=%A %T").splitlines()
    assert len(queue) == len(commands) - 1 + 10 and all(line.endswith(" PENDING") for line in queue), queue
    for line in queue:
        cluster.call("scancel", line.split()[0])


def test_the_page_names_every_script() -> None:
    page = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    names = [path.name for path in SCRIPTS.iterdir() if path.suffix in (".sbatch", ".sh") and path.name != "common.sh"]
    assert len(names) == 6 and all(f"| `{name}` |" in page for name in names)
