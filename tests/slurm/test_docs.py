"""The commands of docs/slurm.md as written, on a cluster as they are meant for: SLURM takes every option of theirs."""

from __future__ import annotations

import os
import re
import subprocess
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


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sbatch")))
def test_a_script_of_a_large_array_finds_what_lies_beside_it(script: str, tmp_path: Path) -> None:
    """SLURM shows all tasks of an array to its last one, in several writes, and runs a copy of the script that lies elsewhere."""
    shown = f"JobId=7 Command={SCRIPTS}/{script} --input text.jsonl WorkDir={tmp_path}"
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\nfor n in {{1..30}}; do echo '{shown}' || exit 141; sleep 0.01; done\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "slurm_script").write_bytes((SCRIPTS / script).read_bytes())
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["bash", str(tmp_path / "slurm_script")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "slurm: job 7: " in done.stderr, (done.returncode, done.stderr)
