#!/usr/bin/env python
"""Train and score a family of runs (docs/experiments.md has the format), and collect what they show in one table.

Runs one after another, or as a Slurm array with --slurm. The same command again skips what is complete, and goes on
with what was interrupted. OUT/results.parquet has a row to a run.
"""

import argparse
import sys
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.experiments.collect import best_rates, collect, summary  # noqa: E402
from sparsecod_mcore.experiments.slurm import submit  # noqa: E402
from sparsecod_mcore.experiments.sweep import run_task, run_tasks, select  # noqa: E402
from sparsecod_mcore.experiments.sweep_file import read_sweep, tasks_of  # noqa: E402


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--list", action="store_true", help="name the runs, with the numbers that --task takes")
    how.add_argument("--slurm", action="store_true", help="submit what is not complete as an array")
    how.add_argument("--task", type=int, metavar="N", help="run one, as an element of a Slurm array")
    how.add_argument("--collect", action="store_true", help="run nothing; collect what there is")
    arguments = parser.parse_args()
    sweep = read_sweep(arguments.sweep)
    tasks = tasks_of(sweep)
    if arguments.list:
        print("\n".join(f"{number} {task.name}" for number, task in enumerate(tasks)))
    elif arguments.slurm:
        submit(arguments.sweep, sweep, tasks)
    elif arguments.task is not None:
        sys.exit("failed" in run_task(sweep, select(tasks, arguments.task), on_slurm=True))
    else:
        failed = [] if arguments.collect else run_tasks(sweep, tasks)
        table = collect(sweep, tasks)
        print("\n".join(filter(None, [summary(table), best_rates(table), str(sweep.out / "results.parquet")])))
        sys.exit(bool(failed))


if __name__ == "__main__":
    main()
