"""What an interrupted run had measured: a line per unit of work, in a file per worker."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.errors import UserError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other runs out of it meanwhile. Raises `UserError` if another is at work there."""
    make_folder(folder)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work in {folder}; wait for it, or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        yield


class UnitSums(TypedDict):
    """Sums over the tokens of a unit's chunk, by name of intervention."""

    losses: dict[str, float]
    changes: dict[str, list[float]]  # per layer above the intervention


class WorkFiles[Record]:
    """What units gave, as plain JSON, by name; valid for one fingerprint of all that they depend on.

    Numbers survive the way to the disk and back bit for bit, so that a resumed run ends like an uninterrupted one.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint

    def read(self) -> dict[str, Record]:
        """Whole records with this fingerprint, of however many workers. What else there was is gone afterwards."""
        found = sorted(self._folder.glob("*.jsonl"))
        lines: dict[str, bytes] = {}
        for path in found:
            *whole, _ = path.read_bytes().split(b"\n")  # what follows the last line break was cut off, or is empty
            for line in whole:
                unit = self._unit_of(line)
                if unit is not None:
                    lines[unit] = line
        finished = self._folder / "finished.jsonl"
        write_atomically(finished, b"".join(line + b"\n" for line in lines.values()))
        for path in found:
            if path != finished:
                path.unlink()
        return {unit: json.loads(line)["record"] for unit, line in lines.items()}

    def _unit_of(self, line: bytes) -> str | None:
        """Which unit a line is of; None where it is damaged or of another fingerprint."""
        try:
            record = json.loads(line)
        except ValueError:
            return None
        if not isinstance(record, dict) or record.get("fingerprint") != self._fingerprint:
            return None
        return str(record["unit"])

    def append(self, worker: int, unit: str, record: Record) -> None:
        """Add one record; it outlives this process from here on."""
        with (self._folder / f"worker-{worker}.jsonl").open("a") as file:
            file.write(json.dumps({"fingerprint": self._fingerprint, "unit": unit, "record": record}) + "\n")

    def remove(self) -> None:
        """The work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)  # on NFS the open lock keeps the empty folder
