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


def run_side_by_side(work: Mapping[str, Iterable[Sequence[str]]], grace: float = _GRACE) -> None:
    """Run commands, which start with ``python``: those of one name one after another, beside those of other names.

    Each line of theirs appears behind their name. A name's next command is asked for when the one before has ended. All
    share this machine's cores. When one fails it is named, and this process ends with its exit code; then, and when
    this process is told to end, the others are told so too, and killed if they have not after `grace` seconds.
    """
    rests = {name: iter(commands) for name, commands in work.items()}
    width = max(map(len, rests), default=0)
    running: dict[str, subprocess.Popen[str]] = {}
    relays: dict[str, Thread] = {}

    def advance(names: Iterable[str]) -> None:
        following = {name: command for name in names if (command := next(rests[name], None)) is not None}
        at_once = len(running) + len(following)
        for name, command in following.items():
            print(f"{name:{width}} $ {shlex.join(command)}", flush=True)
            running[name] = _start(command, at_once)
            relays[name] = Thread(target=_relay, args=(f"{name:{width}} | ", running[name]), daemon=True)
            relays[name].start()

    with leaving_on_sigterm():
        try:
            advance(rests)
            while running:
                ended = _ended(running)
                for name in ended:
                    _kill_what_is_left_of(running.pop(name))
                    relays[name].join(1.0)  # what was said last
                advance(ended)
        finally:
            _end(running.values(), grace)
            for relay in relays.values():
                relay.join(1.0)


def _start(command: Sequence[str], at_once: int) -> subprocess.Popen[str]:
    """In a session of its own, which can be ended with all its children; with its share of the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # torchrun would give one
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


def _ended(running: Mapping[str, subprocess.Popen[str]]) -> list[str]:
    """Names of those that have ended, waiting for the first a moment; refuses those that have failed."""
    with suppress(subprocess.TimeoutExpired):
        next(iter(running.values())).wait(_LOOK_EVERY)
    for name, process in running.items():
        if code := process.poll():
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            print(f"error: {name} failed ({how})", file=sys.stderr, flush=True)
            sys.exit(code if code > 0 else 128 - code)
    return [name for name, process in running.items() if process.returncode == 0]


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
            _kill_what_is_left_of(process)


def _kill_what_is_left_of(process: subprocess.Popen[str]) -> None:
    """Its children may have stayed behind."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
