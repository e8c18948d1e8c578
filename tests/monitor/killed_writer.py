"""A writer of statistics that is killed: what `test_parquet` runs in other processes."""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from sparsecod_mcore.monitor.parquet import ParquetSink

NUM_LAYERS = 3
SERIES = (("attention", "variance"), ("layer_output", "variance"), ("layer_output", "kurtosis"))
RARE = ("layer_output", "dimension_kurtosis")  # every seventh iteration has it too
CHECKPOINT_EVERY = 4
ROWS_PER_PART = 3 * NUM_LAYERS * len(SERIES)  # parts end between checkpoints as well as at them


def statistics_at(iteration: int) -> dict[tuple[str, str], np.ndarray]:
    """Values [L] that tell iteration, layer and series."""
    layers = np.arange(NUM_LAYERS)
    all_series = (*SERIES, RARE) if iteration % 7 == 3 else SERIES
    return {series: iteration + layers / 10 + index / 100 for index, series in enumerate(all_series)}


def tokens_at(iteration: int) -> int:
    return 4096 * iteration


def checkpoint(run: Path) -> int:
    """The iteration that a resumed run goes on from."""
    tracker = run / "checkpoint"
    return int(tracker.read_text()) if tracker.exists() else 0


def publish_checkpoint(run: Path, iteration: int) -> None:
    temporary = run / "checkpoint.tmp"
    temporary.write_text(str(iteration))
    temporary.replace(run / "checkpoint")


def train(run: Path, last_iteration: int) -> None:
    """Go on from the checkpoint to `last_iteration`, as training does: flush, then publish the checkpoint."""
    first = checkpoint(run) + 1
    sink = ParquetSink(run / "stats", first - 1, rows_per_part=ROWS_PER_PART)
    for iteration in range(first, last_iteration + 1):
        sink.append(iteration, tokens_at(iteration), statistics_at(iteration))
        if iteration % CHECKPOINT_EVERY == 0:
            sink.flush()
            publish_checkpoint(run, iteration)
    sink.flush()


def train_until_file_operation(run: Path, last_iteration: int, fatal_operation: int) -> None:
    """`train`, killed right before its n-th opening, renaming or removing of a file in `run`."""
    operations = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal operations
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(run)):
            operations += 1
            if operations == fatal_operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train(run, last_iteration)
