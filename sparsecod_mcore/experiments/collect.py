"""The results of a sweep in one table, and the best learning rate of each of its models."""

import json
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsecod_mcore.data.atomic import make_folder, publish, temporary
from sparsecod_mcore.experiments.measures import MEASURES, measures_of
from sparsecod_mcore.experiments.sweep import outcome_of
from sparsecod_mcore.experiments.sweep_file import LEARNING_RATE, SEED, Sweep, Task

SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "config": pa.string(),
        "state": pa.string(),  # complete, failed or waiting
        "seconds": pa.float64(),
        "varied": pa.string(),  # what tells the run from others of its configuration, as JSON
        "lr": pa.float64(),
        "seed": pa.int64(),
        "best_lr": pa.bool_(),  # of the runs that differ in learning rate alone; null where there is one
        **{name: pa.float64() for name in MEASURES},
    }
)


def collect(sweep: Sweep, tasks: Sequence[Task], name: str = "results") -> pa.Table:
    """A row for every run, complete or not; written to OUT/`name`.parquet as well."""
    rows = [_row(sweep, task) for task in tasks]
    _mark_best(tasks, rows)
    table = pa.Table.from_pylist(rows, SCHEMA)
    path = sweep.out / f"{name}.parquet"
    make_folder(path.parent)
    pq.write_table(table, temporary(path))
    publish(path)
    return table


def _row(sweep: Sweep, task: Task) -> dict[str, Any]:
    outcome = outcome_of(sweep, task)
    state = "waiting" if outcome is None else "failed" if "failed" in outcome else "complete"
    measured = measures_of(sweep.out / task.name) if state == "complete" else {}
    about: dict[str, Any] = {
        "run": task.name,
        "config": task.config,
        "state": state,
        "varied": json.dumps(dict(task.varied)),
    }
    about |= {"seconds": outcome and outcome["seconds"], "lr": task.settings.get(LEARNING_RATE)}
    return about | {"seed": task.settings.get(SEED), **measured}


def _mark_best(tasks: Sequence[Task], rows: Sequence[dict[str, Any]]) -> None:
    """By mean validation loss over seeds, of learning rates all of whose runs are complete and were validated."""
    families: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for task, row in zip(tasks, rows, strict=True):
        rest = {key: value for key, value in task.varied.items() if key not in (LEARNING_RATE, SEED)}
        families[json.dumps([task.config, rest])][row["lr"]].append(row)
    for by_rate in families.values():
        losses = {
            rate: fmean(row["validation_loss"] for row in family)
            for rate, family in by_rate.items()
            if all(row.get("validation_loss") is not None for row in family)
        }
        if len(by_rate) < 2 or not losses:
            continue
        best = min(losses, key=losses.__getitem__)
        for rate, family in by_rate.items():
            for row in family:
                row["best_lr"] = rate == best


def best_rates(table: pa.Table) -> str:
    """A line for each family of runs that differ in learning rate alone."""
    lines: dict[str, None] = {}
    for row in table.filter(table["best_lr"]).to_pylist():
        others = {key: value for key, value in json.loads(row["varied"]).items() if key not in (LEARNING_RATE, SEED)}
        name = " ".join([row["config"], *(f"{key}={value}" for key, value in others.items())])
        lines[f"best learning rate of {name}: {row['lr']:g}"] = None
    return "\n".join(lines)


def summary(table: pa.Table) -> str:
    """How many runs there are of each state."""
    states = table["state"].to_pylist()
    counts = [f"{states.count(state)} {state}" for state in ("complete", "failed", "waiting") if state in states]
    return f"{len(states)} runs: {', '.join(counts)}"
