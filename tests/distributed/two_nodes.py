"""Two nodes on one machine: network namespaces with an address of their own and one cable between them.

They live in a user namespace, so that nobody needs to be root, and vanish with the processes in them.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

INTERFACE, PORT = "cable", 29471


@dataclass
class Program:
    """What runs on a node, and what it has said so far."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)

    def text(self) -> str:
        return "".join(self.said)

    def wait_for(self, beginning: str, seconds: float) -> None:
        """Wait until a line begins so."""
        end = time.monotonic() + seconds
        while not any(line.startswith(beginning) for line in list(self.said)):
            assert time.monotonic() < end and self.process.poll() is None, f"no {beginning!r} in\n{self.text()[-3000:]}"
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """Wait for the end, and return the exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.text()[-3000:]}")
        self._reader.join(5.0)
        return code


@dataclass
class Node:
    """A network namespace, kept by the process `holder`."""

    address: str
    holder: subprocess.Popen[bytes]

    def entering(self, *command: str) -> list[str]:
        flags = ["--target", str(self.holder.pid), "--user", "--preserve-credentials", "--net"]
        return ["nsenter", *flags, "--", *command]

    def ip(self, *words: str) -> None:
        """iproute2's ip, here."""
        done = subprocess.run(self.entering("ip", *words), capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    def start(self, command: Sequence[str], env: dict[str, str]) -> Program:
        env = env | {"GLOO_SOCKET_IFNAME": INTERFACE}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return Program(subprocess.Popen(self.entering(*command), env=env, text=True, start_new_session=True, **pipes))

    def processes(self) -> list[int]:
        """Everything that runs here, but for the holder."""
        mine = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns" / "net") == mine and int(path.name) != self.holder.pid:
                    found.append(int(path.name))
        return found

    def kill(self) -> None:
        """Kill everything that runs here, as when the machine goes down."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


@dataclass
class TwoNodes:
    first: Node
    second: Node

    def cable(self, state: str) -> None:
        """Plug the cable in ("up") or pull it ("down")."""
        self.second.ip("link", "set", INTERFACE, state)

    def torchrun(self, python: str, processes: int, program: Sequence[str], env: dict[str, str]) -> list[Program]:
        """Start `program` on both, `processes` on each, with c10d's rendezvous on the first."""
        started = []
        for node in (self.first, self.second):
            conf = f"is_host={int(node is self.first)},join_timeout=60,read_timeout=25"
            launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(processes)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.first.address}:{PORT}"]
            launcher += ["--rdzv-id", "job", "--rdzv-conf", conf, "--local-addr", node.address]
            started.append(node.start([python, *launcher, *program], env))
        return started


def _holder(command: list[str]) -> subprocess.Popen[bytes]:
    """A process in a new network namespace, once it is in there."""
    here = os.readlink("/proc/self/ns/net")
    process = subprocess.Popen([*command, "--net", "sleep", "1000"], stderr=subprocess.PIPE)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stderr is not None
            raise OSError(process.stderr.read().decode().strip())
        with contextlib.suppress(OSError):
            namespace, name = os.readlink(f"/proc/{process.pid}/ns/net"), f"/proc/{process.pid}/comm"
            if namespace != here and Path(name).read_text() == "sleep\n":
                return process
        time.sleep(0.02)
    process.kill()
    raise OSError("no namespace after 20 s")


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Both nodes, wired. Skips where namespaces are not allowed, with the reason."""
    holders: list[subprocess.Popen[bytes]] = []
    nodes: list[Node] = []
    try:
        try:
            holders.append(_holder(["unshare", "--user", "--map-root-user"]))
            inside = ["nsenter", "--target", str(holders[0].pid), "--user", "--preserve-credentials", "--"]
            holders.append(_holder([*inside, "unshare"]))
            nodes = [Node(f"10.77.0.{i}", holder) for i, holder in enumerate(holders, 1)]
            second = str(holders[1].pid)
            nodes[0].ip("link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for node in nodes:
                node.ip("address", "add", f"{node.address}/24", "dev", INTERFACE)
                node.ip("link", "set", INTERFACE, "up")
                node.ip("link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield TwoNodes(*nodes)
    finally:
        for node in nodes:
            node.kill()
        for holder in holders:
            holder.kill()
            holder.wait()
