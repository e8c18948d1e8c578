"""What an interrupted run had measured: a line per unit of work, in a file per worker."""

import json
import shutil
from pathlib import Path
from typing import TypedDict

from sparsecod_mcore.data.atomic import make_folder, write_atomically


class UnitSums(TypedDict):
    """Sums over the tokens of a unit's chunk, by name of intervention."""

    losses: dict[str, float]
    changes: dict[str, list[float]]  # per layer above the intervention


class WorkFiles:
    """UnitSumss of units by name, valid for one fingerprint of all that they depend on.

    Numbers survive the way to the disk and back bit for bit, so that a resumed run ends like an uninterrupted one.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint

    def read(self) -> dict[str, UnitSums]:
        """Whole records with this fingerprint, of however many workers. What else there was is gone afterwards."""
        make_folder(self._folder)
        found = sorted(self._folder.glob("*.jsonl"))
        lines: dict[str, str] = {}
        for path in found:
            *whole, _ = path.read_text().split("\n")  # what follows the last line break was cut off, or is empty
            for line in whole:
                record = json.loads(line)
                if record["fingerprint"] == self._fingerprint:
                    lines[record["unit"]] = line
        finished = self._folder / "finished.jsonl"
        write_atomically(finished, "".join(f"{line}\n" for line in lines.values()).encode())
        for path in found:
            if path != finished:
                path.unlink()
        return {unit: json.loads(line)["record"] for unit, line in lines.items()}

    def append(self, worker: int, unit: str, record: UnitSums) -> None:
        """Add one record; it outlives this process from here on."""
        with (self._folder / f"worker-{worker}.jsonl").open("a") as file:
            file.write(json.dumps({"fingerprint": self._fingerprint, "unit": unit, "record": record}) + "\n")

    def remove(self) -> None:
        """The work is done."""
        shutil.rmtree(self._folder)
