"""Two machines on one: network namespaces that a cable joins, which can be pulled and be slow.

Both see the same file system, as the nodes of a cluster see the folder of a run. Needs root and `ip` of iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path

from tests.training.processes import launched

SCRIPT = Path(__file__).resolve().parents[2] / "examples/torchrun_multi_node.sh"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class TwoNodes:
    """The namespaces of a process; node 0 holds the address at which ranks meet."""

    def __init__(self, process: int) -> None:
        self.names = [f"megatron-node{number}-{process}" for number in (0, 1)]

    def make(self) -> None:
        for name in self.names:
            self._names(name).mkdir(parents=True)
            (self._names(name) / "resolv.conf").touch()  # nobody who knows names: a question would only be waited for
            _ip("netns", "add", name)
        first, second = self.names
        _ip("-n", first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "wire", "up")

    def remove(self) -> None:
        """Whatever of it there is, with all processes in it; the cable goes with its ends."""
        for name in self.names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for process in map(int, inside):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(self._names(name), ignore_errors=True)

    @staticmethod
    def _names(name: str) -> Path:
        """Files of this folder are what a process of the namespace finds in /etc."""
        return Path("/etc/netns") / name

    def pull(self) -> None:
        """The link goes down: packets are lost, and no connection is told."""
        _ip("-n", self.names[0], "link", "set", "wire", "down")

    def plug(self) -> None:
        _ip("-n", self.names[0], "link", "set", "wire", "up")

    def slow_down(self, discipline: str) -> bool:
        """Both directions get a queueing discipline of tc. False if there is no tc, or this kernel has no such discipline."""
        commands = [["tc", "-n", name, "qdisc", "add", "dev", "wire", "root", *discipline.split()] for name in self.names]
        return bool(shutil.which("tc")) and all(
            subprocess.run(command, capture_output=True).returncode == 0 for command in commands
        )

    def launch(self, node: int, *arguments: str, **variables: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """The launch script for several nodes as a user starts it on one of them."""
        settings = {"PYTHON": sys.executable, "HEAD_NODE": ADDRESSES[0], "NNODES": "2"}
        return self._launched(node, str(SCRIPT), *arguments, **settings | variables)

    def rank(self, node: int, script: Path, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """One of two ranks without a launcher, as plain srun starts them: the exit code is its own."""
        settings = {"RANK": str(node), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
        return self._launched(node, sys.executable, str(script), *arguments, **settings)

    def _launched(self, node: int, *command: str, **variables: str) -> AbstractContextManager[subprocess.Popen[str]]:
        return launched("ip", "netns", "exec", self.names[node], *command, GLOO_SOCKET_IFNAME="wire", **variables)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Nothing of them is left, nor of those of a test process that was killed."""
    for owner in re.findall(r"megatron-node0-(\d+)", _ip("netns", "list")):
        if not Path(f"/proc/{owner}").exists():
            TwoNodes(int(owner)).remove()
    nodes = TwoNodes(os.getpid())
    try:
        nodes.make()
        yield nodes
    finally:
        nodes.remove()


@cache
def why_not() -> str:
    """What is missing here for `two_nodes`; "" if nothing is."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "needs `ip` of iproute2"
    try:
        with two_nodes():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', error)}"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
