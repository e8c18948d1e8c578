"""Whether training goes on: a file touched at every step, and the question of a container how old that is.

``python -m sparsecod_mcore.cluster.heartbeat`` exits with 0 while the file named by SPARSECOD_HEARTBEAT was touched
within the last SPARSECOD_STALL_SECONDS, and else with 1. Default: 1800, for a save, a validation and a start may lie
between two steps.
"""

import os
import sys
import time
from pathlib import Path

FILE, PATIENCE = "SPARSECOD_HEARTBEAT", "SPARSECOD_STALL_SECONDS"
DEFAULT_PATIENCE = 1800.0


def beat() -> None:
    """Touch the file, where one is named. Costs two system calls."""
    if name := os.environ.get(FILE):
        Path(name).touch()


def verdict(now: float) -> str | None:
    """What is wrong at `now` (seconds since the epoch), in one sentence, or None."""
    name = os.environ.get(FILE)
    if not name:
        return f"{FILE} names no file to look at"
    patience = float(os.environ.get(PATIENCE, DEFAULT_PATIENCE))
    try:
        age = now - Path(name).stat().st_mtime
    except OSError as error:
        return f"{name} cannot be looked at ({error.strerror})"
    return f"no step for {age:.0f} s, {patience:.0f} s are allowed" if age > patience else None


if __name__ == "__main__":
    if wrong := verdict(time.time()):
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(1)
