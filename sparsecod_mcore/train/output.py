"""What the user sees: this project's lines. What Megatron prints and logs goes to a file in the run directory."""

import contextlib
import io
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

type Say = Callable[[str], None]


class LazyFile(io.TextIOBase):
    """A text file that comes into being with the first thing written to it: most ranks never print."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: str) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            return file.write(text)


def leave_at_once(code: int) -> NoReturn:
    """End this process whatever its threads wait for, and its children, such as the writer of checkpoints, with it."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()  # training processes hear SIGTERM as a request to save
    os._exit(code)


@contextlib.contextmanager
def megatron_output(directory: Path, rank: int, *, verbose: bool) -> Iterator[Say]:
    """Send prints, logs and warnings to ``megatron.log`` (``megatron-RANK.log``); yield how to speak to the user.

    With `verbose` everything stays on the screen.
    """
    screen = sys.stdout

    def say(line: str) -> None:
        print(line, file=screen, flush=True)

    if verbose:
        yield say
        return
    file = LazyFile(directory / ("megatron.log" if rank == 0 else f"megatron-{rank}.log"))
    logging.basicConfig(stream=file, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.captureWarnings(True)
    with contextlib.redirect_stdout(file):
        yield say
