from pathlib import Path

import numpy as np
import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.monitor.parquet import ParquetSink
from sparsecod_mcore.report.tables import jacobian_table, variance_table
from tests.report.variance_run import write_run


def test_table_of_the_last_iteration(tmp_path: Path) -> None:
    write_run(tmp_path, num_layers=3, num_iterations=2)
    title, _, headings, rule, *rows = variance_table(tmp_path).splitlines()[:7]
    assert title == "Variance by layer after iteration 2 (8,192 training tokens)"
    assert headings.split("  ")[-1] == "covariance share"
    assert set(rule) == {"-", " "}
    # Layer 1: input 1.5, branches 0.5, covariances 0.01: 2.02 after attention, 2.54 at the output.
    assert [row.split() for row in rows] == [
        ["0", "0.5000", "1.000", "0.5000", "1.500", "3.000x", "0.0%"],
        ["1", "0.5000", "2.020", "0.5000", "2.540", "1.693x", "1.6%"],
        ["2", "0.5000", "3.080", "0.5000", "3.620", "1.425x", "2.2%"],
    ]
    assert len({len(line) for line in (headings, rule, *rows)}) == 1, "columns are aligned"


def test_table_of_jacobians(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "stats", 0)
    for iteration, scale in ((100, 1.0), (200, 0.5)):
        of_layers = {
            (stream, statistic): np.array([0.5, 0.125]) * scale
            for stream in ("jacobian", "jacobian_attention", "jacobian_mlp")
            for statistic in ("deviation", "deviation_error", "diagonal")
        }
        sink.append(iteration, 1000, of_layers)
    sink.flush()
    title, _, headings, _, *rows = jacobian_table(tmp_path).splitlines()
    assert "probed at iteration 200" in title
    assert headings.split()[0] == "layer" and len(headings) == len(rows[0])
    assert [row.split() for row in rows] == [["0", *["0.2500"] * 5], ["1", *["0.06250"] * 5]]


def test_a_directory_without_statistics_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'stats'} holds no readable statistics"):
        variance_table(tmp_path)
