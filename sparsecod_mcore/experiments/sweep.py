"""Running a family of runs: one after another, restartable, skipping what is complete."""

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from sparsecod_mcore.data.atomic import write_atomically
from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import EXIT_USER_ERROR, UserError
from sparsecod_mcore.experiments.launch import CommandFailed, run_command, scoring_command, training_command
from sparsecod_mcore.experiments.sweep_file import Sweep, Task
from sparsecod_mcore.train.progress import duration

_OUTCOME = "outcome.json"


def outcome_of(sweep: Sweep, task: Task) -> dict[str, Any] | None:
    """How the run went: `seconds`, and `failed` with a sentence if it did. None if it has yet to end."""
    path = sweep.out / task.name / _OUTCOME
    if not path.exists():
        return None
    outcome = read_json(path)
    return outcome if outcome.get("fingerprint") == _fingerprint(sweep, task) else None


def is_complete(sweep: Sweep, task: Task) -> bool:
    outcome = outcome_of(sweep, task)
    return outcome is not None and "failed" not in outcome


def _fingerprint(sweep: Sweep, task: Task) -> str:
    """Of what a run's results depend on."""
    score = None if sweep.score is None else vars(sweep.score)
    return json.dumps([task.fingerprint, str(sweep.data), str(sweep.tokenizer), score])


def run_tasks(sweep: Sweep, tasks: Sequence[Task]) -> list[Task]:
    """Run what is not complete of `tasks`, `sweep.at_once` side by side; return those that failed.

    A run that fails is recorded, and the others go on; it is tried again by the next call. Raises `UserError` for a
    run that is refused for a mistake in its configuration: it would not be the only one.
    """
    waiting = [task for task in tasks if not is_complete(sweep, task)]
    done = len(tasks) - len(waiting)
    if done:
        print(f"{done} of {len(tasks)} runs are complete already", flush=True)
    stopping = threading.Event()
    failed: list[Task] = []
    began = time.monotonic()
    with ThreadPoolExecutor(sweep.at_once) as pool:
        try:
            started = {pool.submit(run_task, sweep, task, stopping=stopping): task for task in waiting}
            for number, future in enumerate(as_completed(started), 1):
                task = started[future]
                outcome = future.result()
                left = (time.monotonic() - began) / number * (len(waiting) - number)
                if "failed" in outcome:
                    failed.append(task)
                state = f"failed: {outcome['failed']}" if "failed" in outcome else duration(outcome["seconds"])
                print(f"[{done + number}/{len(tasks)}] {task.name}: {state}; {duration(left)} left", flush=True)
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_task(
    sweep: Sweep, task: Task, *, on_slurm: bool = False, stopping: threading.Event | None = None
) -> dict[str, Any]:
    """Train and score one run, go on with it if it was interrupted, and record its outcome."""
    folder = sweep.out / task.name
    log = folder / "output.log"
    sharing = sweep.slurm.gpus_per_node if on_slurm else sweep.at_once * sweep.processes
    threads = max(1, len(os.sched_getaffinity(0)) // sharing)
    outcome: dict[str, Any] = {"fingerprint": _fingerprint(sweep, task)}
    began = time.monotonic()
    try:
        run_command(training_command(sweep, task, on_slurm=on_slurm), log, threads)
        if sweep.score is not None:
            run_command(scoring_command(sweep, task), log, threads)
    except CommandFailed as failure:
        if failure.code == EXIT_USER_ERROR:
            raise UserError(f"{task.name} is refused: {failure}") from None
        if failure.code < 0 or (stopping is not None and stopping.is_set()):  # killed: nothing is known of the run
            return outcome | {"seconds": 0.0, "failed": f"interrupted ({failure.code})"}
        outcome["failed"] = str(failure)
    outcome["seconds"] = time.monotonic() - began
    write_atomically(folder / _OUTCOME, json.dumps(outcome, indent=1).encode())
    return outcome


def select(tasks: Sequence[Task], index: int) -> Task:
    """The task with that number, as a Slurm array counts them. Raises `UserError` if there is none."""
    if not 0 <= index < len(tasks):
        raise UserError(f"--task {index} is given, 0 to {len(tasks) - 1} is accepted")
    return tasks[index]
