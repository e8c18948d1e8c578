"""lm-eval's tasks by name: its own, with data from the hub, and those of tasks/, with data from a local folder."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.scoring import parallel

PERPLEXITY = "perplexity"
_FOLDER = Path(__file__).with_name("tasks")
LOCAL_TASKS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
PAPER_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "mmlu")


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval, and what was asked for by their names: a task is itself, a group or tag is several."""

    tasks: dict[str, Any]
    members: dict[str, list[str]]


def check_names(names: Sequence[str], task_data: Path | None) -> None:
    """Raise `UserError` for no name at all, one given twice, or one that is no task: of those with data in the folder
    `task_data`, or of lm-eval's.
    """
    if not names:
        raise UserError(f"no task is named; {', '.join(PAPER_TASKS)}, {PERPLEXITY} are those of the paper")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the task {name!r} is named twice")
        if name == PERPLEXITY:
            continue
        if task_data is not None and name not in LOCAL_TASKS:
            raise UserError(
                f"{name!r} is no task with local data{nearest(name, [*LOCAL_TASKS, PERPLEXITY])}; "
                f"{', '.join(LOCAL_TASKS)} are, and {PERPLEXITY} needs --data"
            )
        if task_data is None and name not in _manager().task_index:
            hint = nearest(name, [*_manager().all_tasks, PERPLEXITY])
            raise UserError(f"{name!r} is no task of lm-eval{hint}; `lm-eval ls tasks` lists them")


def load_tasks(names: Sequence[str], task_data: Path | None) -> Tasks:
    """Load lm-eval's tasks, all zero-shot, with the data in the folder `task_data` or, if None, from the hub.

    Collective: the first rank loads before the others, and tells what is wrong for all. Raises `UserError` for
    data that cannot be had, and for tasks other than multiple choice by right answers.
    """
    if task_data is not None:
        # Read by libraries when they are imported, below.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def load() -> Tasks:
        return _local(names, task_data) if task_data is not None else _from_hub(names)

    return _first_rank_first(load)


def _first_rank_first(load: Callable[[], Tasks]) -> Tasks:
    mine: list[Tasks] = []
    parallel.from_first(lambda: mine.append(load()))
    return mine[0] if mine else load()


def _local(names: Sequence[str], task_data: Path) -> Tasks:
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    if not task_data.is_dir():
        raise UserError(f"--task-data {task_data} is no folder")
    tasks = {}
    for name in names:
        own = load_yaml(_FOLDER / f"{name}.yaml", recursive=False)
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / own.pop("include")) | own
        config["metadata"] = {**config["metadata"], "task_data": str(task_data)}
        config.pop("tag", None)
        tasks[name] = _zero_shot(ConfigurableTask(config=config))
    return Tasks(tasks, {name: [name] for name in names})


@cache
def _manager() -> Any:
    """What lm-eval knows its tasks by, which takes it a while to gather."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _from_hub(names: Sequence[str]) -> Tasks:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is reported below
    tasks: dict[str, Any] = {}
    members: dict[str, list[str]] = {}
    for name in names:
        try:
            loaded = _manager().load([name])["tasks"]
        except Exception as error:  # whatever the hub's client, the loader of data sets or a script of theirs raises
            reason = " ".join(str(error).split())
            raise UserError(
                f"the data of {name!r} cannot be had from the hub ({type(error).__name__}: {reason}); "
                f"--task-data DIR reads {', '.join(LOCAL_TASKS)} from local files"
            ) from error
        for task_name, task in loaded.items():
            check_kind(task_name, task)
            tasks[task_name] = _zero_shot(task)
        members[name] = list(loaded)
    return Tasks(tasks, members)


def check_kind(name: str, task: Any) -> None:
    """Raise `UserError` unless `task` is multiple choice and counts the right answers, by rules of lm-eval's own."""
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UserError(f"{name!r} is a task of type {task.OUTPUT_TYPE}, and multiple_choice ones are evaluated here")
    if task.config.process_results is not None or not {"acc", "acc_norm"} & task._metric_fn_list.keys():
        raise UserError(
            f"{name!r} counts no right answers, but scores them in a way of its own; tasks by acc or acc_norm are "
            "evaluated here"
        )


def _zero_shot(task: Any) -> Any:
    task.set_config("num_fewshot", 0)
    return task
