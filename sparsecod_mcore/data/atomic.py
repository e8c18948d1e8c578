"""Files and folders that are there wholly or not at all, whenever a run is killed."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsecod_mcore.errors import UserError


def make_folder(folder: Path) -> None:
    """Make a folder for output. Raises `UserError` if it cannot be made or written to."""
    if (file := next((path for path in (folder, *folder.parents) if path.is_file()), None)) is not None:
        raise UserError(f"the output folder {folder} cannot be made: {file} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"the output folder {folder} cannot be written to")


def temporary(path: Path) -> Path:
    """The name under which `path` is written before `publish` gives it its own."""
    return path.with_name(path.name + ".tmp")


def publish(path: Path) -> None:
    """Give the file written as ``temporary(path)`` its name, after its content has reached the disk."""
    with temporary(path).open("rb") as file:
        os.fsync(file.fileno())
    temporary(path).replace(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`. Raises `UserError` if that cannot be done; then what was there is there still."""
    try:
        temporary(path).write_bytes(content)
        publish(path)
    except OSError as error:
        with suppress(OSError):
            temporary(path).unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` if all goes well and is gone otherwise.

    Raises `UserError` if `path` is there already and not an empty folder, if another run seems to write it, or if it
    cannot be made.
    """
    if path.is_symlink() or os.path.ismount(path):  # which cannot be replaced once all is done
        raise UserError(f"{path} is a link or a mount; name a folder below it that does not exist")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; name a folder that does not, or an empty one")
    unfinished = temporary(Path(os.path.abspath(path)))
    if unfinished.exists():
        raise UserError(f"{unfinished} exists: another run is writing it, or a killed one has left it to be removed")
    make_folder(unfinished)
    try:
        with _leaving_on_sigterm():
            yield unfinished
            if path.exists():
                path.rmdir()
            unfinished.replace(path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{path} is not made, and nothing is left of it") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM, which by itself ends a process on the spot, raises `SystemExit` instead, so that files are removed."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
