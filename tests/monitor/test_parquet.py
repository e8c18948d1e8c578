import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.monitor.parquet import SCHEMA, ParquetSink, read_statistics
from tests.monitor.killed_writer import (
    CHECKPOINT_EVERY,
    NUM_LAYERS,
    SERIES,
    checkpoint,
    publish_checkpoint,
    statistics_at,
    tokens_at,
    train,
    train_until_file_operation,
)


def write(directory: Path, iterations: range, *, resume: int = 0, **options: float) -> ParquetSink:
    sink = ParquetSink(directory, resume, **options)
    for iteration in iterations:
        sink.append(iteration, tokens_at(iteration), statistics_at(iteration))
    return sink


def expected_rows(last_iteration: int) -> list[tuple]:
    return [
        (iteration, tokens_at(iteration), layer, stream, statistic, values[layer])
        for iteration in range(1, last_iteration + 1)
        for layer in range(NUM_LAYERS)
        for (stream, statistic), values in statistics_at(iteration).items()
    ]


def stored_rows(directory: Path) -> list[tuple]:
    return [tuple(row.values()) for row in read_statistics(directory).rows.to_pylist()]


def part_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_rows_come_back_in_the_schema_and_in_order(tmp_path: Path) -> None:
    sink = write(tmp_path, range(1, 6))
    sink.flush()
    for iteration in range(6, 9):
        sink.append(iteration, tokens_at(iteration), statistics_at(iteration))
    sink.flush()
    sink.flush()  # nothing is left to write
    assert part_names(tmp_path) == ["part-000000001-000000005.parquet", "part-000000006-000000008.parquet"]
    assert stored_rows(tmp_path) == expected_rows(8)
    assert read_statistics(tmp_path).rows.schema.equals(SCHEMA, check_metadata=True)


def test_undefined_values_stay_nan_and_the_caller_may_reuse_its_buffer(tmp_path: Path) -> None:
    values_L = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)
    sink = ParquetSink(tmp_path, 0)
    sink.append(1, 10, {("mlp", "kurtosis"): values_L})
    values_L.zero_()
    sink.flush()
    rows = read_statistics(tmp_path).rows
    assert rows["value"].null_count == 0
    np.testing.assert_array_equal(rows["value"], [1.0, np.nan, np.inf])


def test_selects_one_stream_and_one_statistic(tmp_path: Path) -> None:
    directory = tmp_path / "stream=none" / "stats"  # a path that looks like a partition key
    write(directory, range(1, 4)).flush()
    rows = read_statistics(directory, stream="layer_output", statistic="variance").rows
    assert rows.column_names == SCHEMA.names
    assert set(rows["stream"].to_pylist()) == {"layer_output"}
    assert rows["value"].to_pylist() == [
        value for i in range(1, 4) for value in statistics_at(i)["layer_output", "variance"]
    ]


def test_a_part_is_written_when_enough_rows_or_seconds_gathered(tmp_path: Path) -> None:
    two_iterations = 2 * NUM_LAYERS * len(SERIES)
    write(tmp_path / "rows", range(1, 6), rows_per_part=two_iterations)
    assert stored_rows(tmp_path / "rows") == expected_rows(4)
    write(tmp_path / "seconds", range(1, 3), seconds_per_part=0.0)
    assert len(part_names(tmp_path / "seconds")) == 2


def test_refuses_an_iteration_twice(tmp_path: Path) -> None:
    sink = write(tmp_path, range(5, 7), resume=4)
    with pytest.raises(ValueError, match="iteration 6 is not past iteration 6"):
        sink.append(6, tokens_at(6), statistics_at(6))
    with pytest.raises(ValueError, match="iteration 4 is not past iteration 4"):
        ParquetSink(tmp_path, 4).append(4, tokens_at(4), statistics_at(4))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 6), max_size=4)), max_size=4))
def test_any_history_of_resumed_runs_leaves_each_row_once(history: list[tuple[int, list[int]]]) -> None:
    """Each run of the history resumes from an iteration that is there and writes parts of given lengths."""
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        last = 0
        for resume, iterations_of_parts in [*history, (30, [1])]:
            last = min(resume, last)
            sink = ParquetSink(directory, last)
            for iterations in iterations_of_parts:
                for iteration in range(last + 1, last + iterations + 1):
                    sink.append(iteration, tokens_at(iteration), statistics_at(iteration))
                sink.flush()
                last += iterations
        assert stored_rows(directory) == expected_rows(last)


def check_what_a_killed_run_left(run: Path) -> None:
    """Iterations without gaps, each row once, at least up to the checkpoint."""
    if not any(run.glob("stats/part-*.parquet")):
        assert checkpoint(run) == 0
        return
    rows = stored_rows(run / "stats")
    last = rows[-1][0] if rows else 0
    assert last >= checkpoint(run)
    assert rows == expected_rows(last)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # pyarrow imports pandas at its first use, where there is one: half a second in every process.
    context.set_forkserver_preload(["pandas", "sparsecod_mcore.monitor.parquet", "pyarrow.parquet"])
    return context


def test_killed_at_random_moments(tmp_path: Path, processes: multiprocessing.context.ForkServerContext) -> None:
    moments = random.Random(0)
    killed = furthest = 0
    for _ in range(25):
        process = processes.Process(target=train, args=(tmp_path, 100_000))
        process.start()
        time.sleep(moments.uniform(0.01, 0.12))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        check_what_a_killed_run_left(tmp_path)
        furthest = max(furthest, checkpoint(tmp_path))
        if moments.random() < 0.3:  # the newest checkpoint is lost, an older one is resumed from
            publish_checkpoint(tmp_path, moments.randrange(0, checkpoint(tmp_path) + 1, CHECKPOINT_EVERY))
    assert killed == 25
    assert furthest > 3 * CHECKPOINT_EVERY, "the runs were killed too early for the test to mean something"
    last = checkpoint(tmp_path) + 10
    train(tmp_path, last)
    assert stored_rows(tmp_path / "stats") == expected_rows(last)
    assert not any((tmp_path / "stats").glob("*.tmp"))


def test_killed_before_every_file_operation(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    """From a store whose parts must be deleted and shortened first: resumed from 4 with rows up to 10."""
    start = tmp_path / "start"
    start.mkdir()
    write(start / "stats", range(1, 4)).flush()
    write(start / "stats", range(4, 10), resume=3).flush()
    write(start / "stats", range(10, 11), resume=9).flush()
    publish_checkpoint(start, 4)
    exit_code, operation = -signal.SIGKILL, 0
    while exit_code == -signal.SIGKILL:
        operation += 1
        run = tmp_path / f"killed-at-{operation}"
        shutil.copytree(start, run)
        process = processes.Process(target=train_until_file_operation, args=(run, 13, operation))
        process.start()
        process.join()
        exit_code = process.exitcode
        check_what_a_killed_run_left(run)
        train(run, 13)
        assert stored_rows(run / "stats") == expected_rows(13)
    assert exit_code == 0
    assert operation > 15, "too few file operations were seen for the test to mean something"


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_reading_names_and_skips_a_corrupt_part(tmp_path: Path, damage: str) -> None:
    write(tmp_path, range(1, 50)).flush()
    write(tmp_path, range(50, 60), resume=49).flush()
    part = tmp_path / "part-000000001-000000049.parquet"
    content = bytearray(part.read_bytes())
    if damage == "flip":
        values = pq.ParquetFile(part).metadata.row_group(0).column(SCHEMA.get_field_index("value"))
        content[values.dictionary_page_offset + values.total_compressed_size // 2] ^= 0x10
    part.write_bytes({"flip": content, "truncate": content[:-20], "empty": b""}[damage])
    with pytest.warns(UserWarning, match=f"skipped .*{part.name}"):
        rows, skipped = read_statistics(tmp_path)
    assert skipped == [part]
    assert set(rows["iteration"].to_pylist()) == set(range(50, 60))


def test_resuming_sets_a_corrupt_part_aside(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10)).flush()
    part = tmp_path / "part-000000001-000000009.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="part-000000001-000000009.unreadable aside"):
        sink = ParquetSink(tmp_path, 5)
    sink.append(6, tokens_at(6), statistics_at(6))
    sink.flush()
    assert set(read_statistics(tmp_path).rows["iteration"].to_pylist()) == {6}


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "part-notes.parquet").write_text("mine")
    write(tmp_path, range(1, 3)).flush()
    ParquetSink(tmp_path, 0)
    assert part_names(tmp_path) == ["part-notes.parquet"]


def test_a_series_by_iteration_and_layer(tmp_path: Path) -> None:
    write(tmp_path, range(3, 7)).flush()
    iterations_I, tokens_I, values_IL = read_statistics(tmp_path).series("layer_output", "kurtosis")
    assert iterations_I.tolist() == [3, 4, 5, 6]
    assert tokens_I.tolist() == [tokens_at(i) for i in range(3, 7)]
    np.testing.assert_array_equal(values_IL, [statistics_at(i)["layer_output", "kurtosis"] for i in range(3, 7)])
    with pytest.raises(UserError, match="no kurtosis of attention is recorded"):
        read_statistics(tmp_path).series("attention", "kurtosis")
    with pytest.raises(UserError, match=f"no kurtosis of layer_ouput is recorded in {tmp_path}"):
        read_statistics(tmp_path, stream="layer_ouput", statistic="kurtosis")


def test_a_directory_without_statistics_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} holds no readable statistics"):
        read_statistics(tmp_path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3)).flush()
    part = tmp_path / part_names(tmp_path)[0]
    rows = pq.read_table(part, partitioning=None)
    (key,) = (key for key in rows.schema.metadata if key.startswith(b"sparsecod_mcore"))
    pq.write_table(rows.replace_schema_metadata({key: b"99"}), part)
    with pytest.raises(UserError, match="schema version 99, version 1 is accepted"):
        read_statistics(tmp_path)
    assert pa.types.is_dictionary(rows["stream"].type)
