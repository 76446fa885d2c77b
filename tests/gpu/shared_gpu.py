"""Several ranks on one GPU, over NCCL: what the tests of communication on a GPU stand on.

NCCL refuses two ranks of one host on one GPU. Told that every rank is on a host of its own, it sends through sockets, and the
driver gives the processes the GPU in turns: slow, but the same calls on the same kinds of tensors and streams as on a cluster.
The ranks are new processes: where the parent has looked for a GPU, one that is forked from it cannot use it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.ports import free_port

ROOT = Path(__file__).parents[2]


def run_ranks_on_one_gpu(world: int, *arguments: str, log: Path, timeout: float = 150) -> None:
    """Run `python ARGUMENTS` as `world` ranks with the launcher's environment; rank r writes to LOG.r.

    Fails with what the ranks wrote unless all end with 0 in time.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared |= {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_NCHANNELS": "1", "OMP_NUM_THREADS": "1"}
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, path in enumerate(logs):
            environment = {**shared, "RANK": str(rank), "NCCL_HOSTID": f"host-{rank}"}
            with path.open("wb") as out:
                command = [sys.executable, *arguments]
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
        codes = _wait(ranks, timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    told = [f"--- exit code {code}\n{path.read_text()[-6000:]}" for code, path in zip(codes, logs, strict=True)]
    assert codes == [0] * world, "\n".join(told)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """The exit codes, when all have ended or one has failed and the others have had time to say so; None: still running."""
    end = time.monotonic() + timeout
    failed = False
    while time.monotonic() < end:
        codes = [process.poll() for process in ranks]
        if None not in codes:
            break
        if any(codes) and not failed:
            failed, end = True, min(end, time.monotonic() + 5)
        time.sleep(0.1)
    return [process.poll() for process in ranks]
