"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd with everything in one folder. Used by `conftest.py`.

The nodes are called 127.0.0.1 and 127.0.0.2, so a node's name is an address at which it is found, as on a real cluster; each says
that it has eight GPUs, which are empty files, so that scripts are taken as written. Eight nodes exist on paper, in the partitions
gpu and cpu: what is submitted there is checked by SLURM and waits.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED", "BOOT_FAIL")


def why_not() -> str:
    """Why there can be no SLURM here; "" if it can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in DAEMONS if shutil.which(name, path=path) is None]:
        return f"SLURM is not installed ({', '.join(missing)} not found); on Debian: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd runs jobs as root only; run the tests as root, as in a container"
    return ""


class Cluster:
    """The daemons, from `start` to `stop`, and what a user does with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = kept | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{kept['PATH']}:/usr/sbin:/sbin",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle. Raises RuntimeError with their logs if they are not soon."""
        for name in ("state", "spool-127.0.0.1", "spool-127.0.0.2"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._configuration())
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=127.0.0.[1-2] Name=gpu File={self.folder}/gpu[0-7]\n")
        place = self.folder / "munge"
        files = [f"--{name}-file={place}.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--force", f"--socket={place}.socket", *files)
        self._daemon("slurmctld")
        for node in ("127.0.0.1", "127.0.0.2"):
            self._daemon("slurmd", "-N", node)
        deadline = time.monotonic() + 150
        states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        while self.attempt(*states).stdout.split() != ["idle", "idle"]:  # it fails while slurmctld does not listen
            if time.monotonic() > deadline:
                logs = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("SLURM did not start:\n" + "\n".join(logs))
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs, then the daemons by their process ids."""
        try:
            self.cancel_all()
        finally:
            # The order of their start, backwards.
            for name in ("slurmd-127.0.0.2", "slurmd-127.0.0.1", "slurmctld", "munge"):
                _end(self.folder / f"{name}.pid")

    def cancel_all(self) -> None:
        """Leave nothing in the queue, or running."""
        self.attempt("scancel", "--user=root")
        deadline = time.monotonic() + 5
        while self.attempt("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        self.attempt("scancel", "--signal=KILL", "--full", "--user=root")
        deadline = time.monotonic() + 150
        while self.attempt("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def call(self, *command: str, **variables: str) -> str:
        """What a command prints; it must end well."""
        done = self.attempt(*command, **variables)
        assert done.returncode == 0, f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def attempt(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of SLURM, however it ends."""
        return subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment | variables, capture_output=True, text=True, timeout=240
        )

    def submit(self, *arguments: object, cwd: Path, **variables: str) -> int:
        """`sbatch` in a folder: the number of the job."""
        done = self.attempt("sbatch", "--parsable", *map(str, arguments), cwd=cwd, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return int(done.stdout)

    def jobs(self, job: int) -> list[dict[str, str]]:
        """What SLURM says of a job, or of the tasks of an array by their index."""
        shown = self.call("scontrol", "--oneliner", "show", "job", str(job))
        found = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown.splitlines()]
        return sorted(found, key=lambda fields: fields.get("ArrayTaskId", "").zfill(6))

    def states(self, job: int) -> list[str]:
        """The state of a job, or of the tasks of an array."""
        return [fields["JobState"] for fields in self.jobs(job)]

    def wait(self, job: int, seconds: float = 400) -> list[str]:
        """Wait until a job, or all tasks of an array, are over: their states."""
        self.until(lambda: all(state in ENDED for state in self.states(job)), seconds, f"job {job} did not end")
        return self.states(job)

    def until(self, condition: Any, seconds: float, otherwise: str) -> None:
        """Wait until a condition holds; fails with what SLURM has in its queue."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise} within {seconds:g} s\n{self.call('squeue')}"
            time.sleep(0.2)

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")

    def _configuration(self) -> str:
        host = os.uname().nodename
        return "\n".join(
            [
                "ClusterName=test",
                f"SlurmctldHost={host}(127.0.0.1)",
                f"SlurmctldPort={free_port()}",
                "AuthType=auth/munge",
                # A job that is put back into the queue waits for as long as its credential may live: 121 s by default.
                f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=30",
                "MessageTimeout=60",
                "KillWait=120",  # from being asked to end to being killed
                "SlurmUser=root",
                "SlurmdUser=root",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "JobAcctGatherType=jobacct_gather/none",
                "MpiDefault=none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_CPU",
                "ReturnToService=2",
                "SlurmdParameters=config_overrides",  # as many CPUs as said below, whatever this machine has
                "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0",
                "MinJobAge=3600",  # what has ended can be asked for
                f"StateSaveLocation={self.folder}/state",
                f"SlurmctldPidFile={self.folder}/slurmctld.pid",
                f"SlurmctldLogFile={self.folder}/slurmctld.log",
                f"SlurmdSpoolDir={self.folder}/spool-%n",
                f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
                f"SlurmdLogFile={self.folder}/slurmd-%n.log",
                *(
                    f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={free_port()} CPUs=16 Gres=gpu:8 State=UNKNOWN"
                    for node in ("127.0.0.1", "127.0.0.2")
                ),
                "GresTypes=gpu",
                f"NodeName=gpu[1-8] NodeHostname=nowhere NodeAddr=127.0.0.3 Port={free_port()} CPUs=64 Gres=gpu:8 State=DOWN",
                "PartitionName=main Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4",
                "PartitionName=gpu Nodes=gpu[1-8] MaxTime=INFINITE State=UP",
                "PartitionName=cpu Nodes=gpu[1-8] MaxTime=INFINITE State=UP",
                "",
            ]
        )


def _end(pid_file: Path, seconds: float = 10) -> None:
    """End the process of a file: asked first, then killed."""
    try:
        process = int(pid_file.read_text())
        handle = os.pidfd_open(process)
    except (OSError, ValueError):
        return  # it has not begun, or has ended
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.05)
                signal.pidfd_send_signal(handle, 0)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
