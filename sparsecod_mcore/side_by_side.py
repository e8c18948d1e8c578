"""Commands that run at once and share a screen."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from threading import Thread

from sparsecod_mcore.signals import leaving_on_sigterm

_LOOK_EVERY = 0.2  # seconds
_GRACE = 60.0  # seconds, in which training saves


def run_side_by_side(commands: Mapping[str, Sequence[str]], grace: float = _GRACE) -> None:
    """Run `commands`, which start with ``python``, at once; each line of theirs appears behind the command's name.

    They share this machine's cores. When one fails it is named, and this process ends with its exit code; then, and
    when this process is told to end, the others are told so too, and killed if they have not after `grace` seconds.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, len(commands)))
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # torchrun would give one
    width = max(map(len, commands), default=0)
    running: dict[str, subprocess.Popen[str]] = {}
    relays = []
    with leaving_on_sigterm():
        try:
            for name, command in commands.items():
                print(f"{name:{width}} $ {shlex.join(command)}", flush=True)
                running[name] = _start(command, environment)
                relays.append(Thread(target=_relay, args=(f"{name:{width}} | ", running[name]), daemon=True))
                relays[-1].start()
            _wait(running)
        finally:
            _end(running.values(), grace)
            for relay in relays:
                relay.join(1.0)  # what was said last; a child that lives on may keep the pipe open


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """In a session of its own, which can be ended with all its children."""
    return subprocess.Popen(
        [sys.executable, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )


def _relay(prefix: str, process: subprocess.Popen[str]) -> None:
    """Print what the process says, line by line."""
    assert process.stdout is not None
    for line in process.stdout:
        print(prefix + line.rstrip("\n"), flush=True)


def _wait(running: Mapping[str, subprocess.Popen[str]]) -> None:
    """Until all have ended, or one has failed."""
    while waited_for := [process for process in running.values() if process.poll() is None]:
        _refuse_failed(running)
        with suppress(subprocess.TimeoutExpired):
            waited_for[0].wait(_LOOK_EVERY)
    _refuse_failed(running)


def _refuse_failed(running: Mapping[str, subprocess.Popen[str]]) -> None:
    for name, process in running.items():
        if code := process.poll():
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            print(f"error: {name} failed ({how})", file=sys.stderr, flush=True)
            sys.exit(code if code > 0 else 128 - code)


def _end(processes: Iterable[subprocess.Popen[str]], grace: float) -> None:
    """Tell them to end, and kill what is left of each and its children afterwards, or at once when told to hurry."""
    processes = list(processes)
    for process in processes:
        process.terminate()  # unless it has ended
    until = time.monotonic() + grace
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
