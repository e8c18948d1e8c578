"""The Parquet store of training statistics.

Each (iteration, layer, stream, statistic) is there exactly once, whatever was killed when. A directory holds
parts, each complete the moment it has its name: written under a temporary name, synced, renamed. Parts cover
disjoint ranges of iterations and hold rows sorted by (iteration, layer): read in turn, all rows are sorted.

Axes: I iterations, L layers, S series (a stream and a statistic of it).
"""

import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsecod_mcore.data.atomic import publish, temporary
from sparsecod_mcore.errors import UserError

SCHEMA_VERSION = "1"
_VERSION_KEY = b"sparsecod_mcore.statistics"
_PART_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")
_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {
        "iteration": pa.int64(),
        "tokens": pa.int64(),  # training tokens consumed up to and including the iteration
        "layer": pa.int32(),  # counted from 0 over the whole model
        "stream": _NAMES,
        "statistic": _NAMES,
        "value": pa.float64(),  # NaN where the statistic is undefined
    },
    metadata={_VERSION_KEY: SCHEMA_VERSION.encode()},
)

type StatisticsByLayer = Mapping[tuple[str, str], npt.ArrayLike]  # (stream, statistic) -> [L]


class ParquetSink:
    """Writes the statistics of a run, from one process.

    Rows are held in memory until `flush` makes them durable; a part is also written once enough rows or
    seconds have gathered. Call `flush` before a checkpoint is published: a run that resumes from it drops
    the rows past it, and must find all up to it.
    """

    def __init__(
        self,
        directory: Path,
        resume_iteration: int,
        *,
        rows_per_part: int = 1_000_000,
        seconds_per_part: float = 600.0,
    ) -> None:
        """Open `directory` (made if missing) to go on after `resume_iteration`: rows past it are dropped.

        A new run resumes from 0. A part to be shortened that cannot be read is set aside with a warning.
        """
        self._directory = directory
        self._rows_per_part = rows_per_part
        self._seconds_per_part = seconds_per_part
        self._last_iteration = resume_iteration
        self._held: list[_Held] = []
        self._held_rows = 0
        self._held_since = 0.0
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(temporary(directory / "part-*").name):
            leftover.unlink()
        # From the last part backwards: killed half-way, what is left has no gaps.
        for part in reversed(_parts(directory)):
            _drop_rows_past(part, resume_iteration)

    def append(self, iteration: int, tokens: int, statistics: StatisticsByLayer) -> None:
        """Take the statistics of one iteration, after which `tokens` training tokens are consumed.

        Iterations may differ in what series they have. Raises ValueError for one that is not past all before.
        """
        if iteration <= self._last_iteration:
            raise ValueError(f"iteration {iteration} is not past iteration {self._last_iteration}")
        if not self._held:
            self._held_since = time.monotonic()
        values_SL = np.array([np.asarray(values_L) for values_L in statistics.values()], dtype=np.float64)
        self._held.append(_Held(iteration, tokens, tuple(statistics), values_SL))
        self._held_rows += values_SL.size
        self._last_iteration = iteration
        if self._held_rows >= self._rows_per_part or time.monotonic() - self._held_since >= self._seconds_per_part:
            self.flush()

    def flush(self) -> None:
        """Write the rows held in memory as one durable part."""
        if not self._held:
            return
        part = self._directory / _part_name(self._held[0].iteration, self._held[-1].iteration)
        alike = [_rows(list(group)) for _, group in groupby(self._held, key=lambda held: held.series_S)]
        _write(pa.concat_tables(alike).unify_dictionaries(), part)
        self._held, self._held_rows = [], 0


class _Held(NamedTuple):
    """An iteration that waits to be written."""

    iteration: int
    tokens: int
    series_S: tuple[tuple[str, str], ...]
    values_SL: npt.NDArray[np.float64]


def _rows(held: Sequence[_Held]) -> pa.Table:
    """Iterations of the same series as rows: by iteration, then layer, then series."""
    series_S = held[0].series_S
    values_ILS = np.stack([one.values_SL for one in held]).transpose(0, 2, 1)
    num_iterations, num_layers, num_series = values_ILS.shape
    rows_per_iteration = num_layers * num_series

    def names(of_series: Iterable[str]) -> pa.DictionaryArray:
        distinct, index_S = np.unique(list(of_series), return_inverse=True)
        indices = np.tile(index_S.astype(np.int32), num_iterations * num_layers)
        return pa.DictionaryArray.from_arrays(indices, distinct.tolist())

    columns = [
        np.repeat([one.iteration for one in held], rows_per_iteration),
        np.repeat([one.tokens for one in held], rows_per_iteration),
        np.tile(np.repeat(np.arange(num_layers, dtype=np.int32), num_series), num_iterations),
        names(stream for stream, _ in series_S),
        names(statistic for _, statistic in series_S),
        values_ILS.ravel(),
    ]
    return pa.table(columns, schema=SCHEMA)


class Series(NamedTuple):
    """One statistic of one stream, as training went on."""

    iterations_I: npt.NDArray[np.int64]
    tokens_I: npt.NDArray[np.int64]
    values_IL: npt.NDArray[np.float64]


class Statistics(NamedTuple):
    """What `read_statistics` found."""

    rows: pa.Table  # columns of `SCHEMA`, sorted by (iteration, layer)
    skipped_parts: list[Path]  # could not be read, and were warned of

    def series(self, stream: str, statistic: str) -> Series:
        """One statistic of one stream by iteration and layer. Raises UserError where it was not recorded."""
        rows = self.rows.filter((pc.field("stream") == stream) & (pc.field("statistic") == statistic))
        if not len(rows):
            raise UserError(f"no {statistic} of {stream} is recorded among the run's statistics")
        num_layers = pc.max(rows["layer"]).as_py() + 1
        columns = (rows[name].to_numpy().reshape(-1, num_layers) for name in ("iteration", "tokens", "value"))
        iterations_IL, tokens_IL, values_IL = columns
        return Series(iterations_IL[:, 0], tokens_IL[:, 0], values_IL)


def read_statistics(
    directory: Path, *, stream: str | None = None, statistic: str | Sequence[str] | None = None
) -> Statistics:
    """Read the statistics of a run from its ``stats`` directory, all or those of one stream, of one or some statistics.

    A part that cannot be read is named in a warning and skipped; without any readable part, or any row
    of what is asked for, raises UserError.
    """
    wanted = {"stream": stream, "statistic": statistic}
    tables, skipped = [], []
    for part in _parts(directory):
        try:
            table = _read(part)
        except (pa.ArrowException, OSError) as error:
            warnings.warn(f"skipped {part}, which cannot be read: {error}", stacklevel=2)
            skipped.append(part)
            continue
        for column, name in wanted.items():
            if name is not None:
                names = pa.array([name] if isinstance(name, str) else name)
                table = table.filter(pc.is_in(table[column].combine_chunks().dictionary_decode(), names))
        tables.append(table)
    if not tables:
        raise UserError(
            f"{directory} holds no readable statistics (part-*.parquet): "
            "the stats directory of a run that has trained with statistics on is accepted"
        )
    rows = pa.concat_tables(tables).unify_dictionaries()
    if not len(rows) and any(wanted.values()):
        asked = [[name] if isinstance(name, str) else name for name in (statistic, stream) if name is not None]
        named = " of ".join(" or ".join(names) for names in asked)
        raise UserError(f"no {named} is recorded in {directory}")
    return Statistics(rows, skipped)


def _part_name(first: int, last: int) -> str:
    return f"part-{first:09d}-{last:09d}.parquet"


def _parts(directory: Path) -> list[Path]:
    """The parts of a directory, in the order of their iterations."""
    return sorted(filter(_range, directory.glob("part-*.parquet")), key=_range)


def _range(part: Path) -> tuple[int, ...]:
    """The first and last iteration that a part's name gives; nothing for a file that is no part."""
    match = _PART_NAME.fullmatch(part.name)
    return tuple(map(int, match.groups())) if match else ()


def _read(part: Path) -> pa.Table:
    with pq.ParquetFile(part, page_checksum_verification=True) as file:
        version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{part} holds statistics of schema version {version}, version {SCHEMA_VERSION} is accepted"
            )
        return file.read()


def _write(rows: pa.Table, part: Path) -> None:
    pq.write_table(rows, temporary(part), compression="zstd", write_page_checksum=True)
    publish(part)
    _sync(part.parent)


def _sync(directory: Path) -> None:
    """Make renames and deletions in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _drop_rows_past(part: Path, iteration: int) -> None:
    """Delete, shorten or keep one part, so that no row of it is past `iteration`."""
    first, last = _range(part)
    if last <= iteration:
        return
    if first > iteration:
        part.unlink()
    else:
        try:
            rows = _read(part)
        except (pa.ArrowException, OSError) as error:
            aside = part.rename(part.with_suffix(".unreadable"))
            warnings.warn(f"set {aside} aside, which cannot be read: {error}", stacklevel=3)
            return
        # Shortened under its own name first: at no moment are its rows there twice, or not at all.
        _write(rows.filter(pc.field("iteration") <= iteration), part)
        part.rename(part.with_name(_part_name(first, iteration)))
    _sync(part.parent)
