"""Making the report and saying on screen what it holds."""

from collections.abc import Sequence
from pathlib import Path

from sparsecod_mcore.report.page.page import write_report


def make_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report, say what is damaged or unfinished, and where it lies."""
    for run in write_report(paths, out):
        for note in run.notes:
            if note.kind != "missing":
                print(f"{run.name}: {note.text}")
    print(f"report: {out.absolute()}")
