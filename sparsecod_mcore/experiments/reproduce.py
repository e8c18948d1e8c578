"""``make reproduce``: the paper's questions at a size that this machine answers, scored, and held against the paper."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data import Corpus, DocstringCorpus, FileCorpus
from sparsecod_mcore.data.prepare import fingerprint, prepare
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.experiments.collect import collect
from sparsecod_mcore.experiments.findings import LEGEND, Answer, answer_of, save_answer, table_of
from sparsecod_mcore.experiments.launch import scoring_command
from sparsecod_mcore.experiments.questions import Question, question_of, runs_of
from sparsecod_mcore.experiments.runs import Run, settings_of
from sparsecod_mcore.experiments.sizes import SEEDS, Size
from sparsecod_mcore.experiments.sweep import run_tasks
from sparsecod_mcore.experiments.sweep_file import Scoring, Sweep, Task, varied_tasks


def reproduce(
    size: Size,
    names: Sequence[str],
    *,
    corpus_path: str | None = None,
    tokenizer: Path | None = None,
    seeds: Sequence[int] = SEEDS,
    runs: Path = Path("runs"),
) -> list[Answer]:
    """Train, score and judge the runs of the questions called `names`; print and store what was found.

    Everything is in `runs`/reproduce-SIZE-…, named after the corpus and the size. The same call goes on where it was
    interrupted. Models that several questions share are trained once. Raises `UserError` for a size that is not for
    this machine.
    """
    questions = [question_of(name, size) for name in names]
    if size.rest.get("bf16") and not platform.has_gpu():
        raise UserError(f"size {size.name} is for a GPU, and this machine has none; micro is for CPUs")
    corpus: Corpus = DocstringCorpus() if corpus_path is None else FileCorpus([os.path.abspath(corpus_path)])
    folder = runs / f"reproduce-{size.name}-{fingerprint(corpus, tokenizer, repr(size))}"
    asking = _asking(size, corpus_path, tokenizer, seeds)
    data, tokenizer = prepare(corpus, folder / "data", tokenizer, size.vocabulary)
    answers = []
    for question in questions:
        print(f"\n{question.name}: {question.asks}", flush=True)
        sweep = _sweep(question, size, folder, data, tokenizer)
        tasks = {label: _tasks(run, size, seeds) for label, run in question.runs.items()}
        every = [task for group in tasks.values() for task in group]
        run_tasks(sweep, every)
        answers.append(_answer(question, sweep, tasks))
        again = [*asking, "--question", question.name]
        commands = _commands(again, size, seeds, sweep, every)
        report = save_answer(answers[-1], _title(size, seeds), commands, folder / "report")
        print(f"\n{table_of(answers[-1])}\n\n{LEGEND}\n{report}", flush=True)
    return answers


def _title(size: Size, seeds: Sequence[int]) -> str:
    of_seeds = ", ".join(map(str, seeds))
    return f"The paper's questions at size {size.name} (make reproduce SIZE={size.name}), seeds {of_seeds}"


def _asking(size: Size, corpus_path: str | None, tokenizer: Path | None, seeds: Sequence[int]) -> list[str]:
    """The command of a call of `reproduce`, but for its questions."""
    command = [".venv/bin/python", "tools/reproduce.py", "--size", size.name]
    if corpus_path is not None:
        command += ["--corpus", corpus_path]
    if tokenizer is not None:
        command += ["--tokenizer", str(tokenizer)]
    return command if tuple(seeds) == SEEDS else [*command, "--seeds", str(len(seeds))]


def _commands(again: Sequence[str], size: Size, seeds: Sequence[int], sweep: Sweep, tasks: Sequence[Task]) -> str:
    """How to ask a question again, or what that runs one by one, for a shell in the repository."""
    names = " ".join(dict.fromkeys(task.config for task in tasks))
    every = replace(tasks[0], name="$run-seed=$seed")
    config = f"examples/configs/{size.name}/$run.yaml"
    training = f"--config {config} --seed $seed --cod-data {sweep.data} --cod-tokenizer {sweep.tokenizer}"
    return "\n".join(
        [
            shlex.join(again),
            f"# or, once that has made {sweep.out}/data (named after corpus and size), its runs by hand:",
            f"for run in {names}; do for seed in {' '.join(map(str, seeds))}; do",
            f"  .venv/bin/python examples/pretrain_cod.py {training} --cod-run-dir {sweep.out}/{every.name}",
            f"  .venv/bin/python tools/score_layers.py {' '.join(scoring_command(sweep, every)[2:])}",
            "done; done",
        ]
    )


def _sweep(question: Question, size: Size, folder: Path, data: Path, tokenizer: Path) -> Sweep:
    return Sweep(
        out=folder,
        data=data,
        tokenizer=tokenizer,
        configs=(),
        at_once=1 if platform.has_gpu() else len(os.sched_getaffinity(0)),
        score=Scoring(sequences=size.scored_sequences, length=question.score_length),
    )


def _tasks(run: Run, size: Size, seeds: Sequence[int]) -> list[Task]:
    """One to a seed, under the name of the first run of the size that is the same."""
    settings = settings_of(run)
    name = next(other.name for other in runs_of(size) if settings_of(other) == settings)
    return list(varied_tasks(name, settings, {}, seeds))


def _answer(question: Question, sweep: Sweep, tasks: dict[str, list[Task]]) -> Answer:
    every = [task for group in tasks.values() for task in group]
    rows = {row["run"]: row for row in collect(sweep, every, f"results_{question.name}").to_pylist()}
    return answer_of(question, {label: [rows[task.name] for task in group] for label, group in tasks.items()})
