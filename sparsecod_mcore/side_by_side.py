"""Commands that run at once and share a screen."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> None:
    """Run `commands`, which start with ``python``, at once; each line of theirs appears behind the command's name.

    They share this machine's cores. When one fails the others are told to end, and this process ends with its exit
    code.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, len(commands)))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # torchrun would give one
    width = max(map(len, commands), default=0)
    running: list[subprocess.Popen[str]] = []
    for name, command in commands.items():
        print(f"{name:{width}} $ {shlex.join(command)}", flush=True)
        running.append(
            subprocess.Popen(
                [sys.executable, *command[1:]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
        )
    with ThreadPoolExecutor(max(1, len(running))) as pool:
        try:
            relays = [
                pool.submit(_relay, f"{name:{width}} | ", one) for name, one in zip(commands, running, strict=True)
            ]
            for relay in as_completed(relays):
                if code := relay.result():
                    sys.exit(code)
        finally:
            for one in running:
                one.terminate()  # unless it has ended; training saves first


def _relay(prefix: str, process: subprocess.Popen[str]) -> int:
    """Print what the process says, line by line, until it ends; return its exit code."""
    assert process.stdout is not None
    for line in process.stdout:
        print(prefix + line, end="", flush=True)
    return process.wait()
