"""What evaluation finds out about a model, and the files it is kept in: evaluation.json and items.jsonl."""
# ruff: noqa: RUF009  axes and fraction declare fields

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.results import Provenance, Values
from sparsecod_mcore.scoring.schema import Malformed, axes, check, decode, encode

SCHEMA_VERSION = 1
FILE, ITEMS_FILE = "evaluation.json", "items.jsonl"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its standard error, NaN where one item tells none."""

    value: float
    stderr: float = axes(low=0.0)

    @classmethod
    def of_mean(cls, values: Sequence[float]) -> Self:
        """The mean of independent values, in which the order does not matter."""
        count = len(values)
        mean = math.fsum(values) / count
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(value=mean, stderr=math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of one task: shares of items answered right, and what those get who do not read the questions."""

    items: int = axes(low=1)
    items_sha256: str  # of prompts, choices and which is right
    metric: str  # the one to report: acc_norm where the task has it, as in the paper, else acc
    metrics: dict[str, Estimate] = axes("metric")
    random_guess: Estimate  # its standard error: how far a guesser's accuracy on these items scatters
    longest_choice: Estimate
    shortest_choice: Estimate


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """On held-out sequences; standard errors over sequences. Losses in nats per token."""

    sequences: int = axes(low=1)
    length: int = axes(low=1)
    loss: Estimate
    perplexity: Estimate  # exp(loss), its standard error to first order
    loss_by_position: Values = axes("position")
    stderr_by_position: Values = axes("position")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was evaluated of one model in one run."""

    schema_version: int = SCHEMA_VERSION
    provenance: Provenance
    tasks: dict[str, Accuracy] = axes("task")
    perplexity: Perplexity | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question, as the model and lm-eval have it."""

    task: str
    item: int  # its number in the task's data
    right: list[int]  # choices that are; mostly one
    log_likelihoods: list[float]  # per choice
    is_greedy: list[bool]  # per choice: what the model would have written
    characters: list[int]  # per choice: what acc_norm divides by
    metrics: dict[str, float]


def write_evaluation(folder: Path, evaluation: Evaluation, items: Iterable[Item]) -> None:
    """Write evaluation.json, and items.jsonl if there are items. Equal results give equal bytes."""
    check(evaluation)
    make_folder(folder)
    lines = "".join(json.dumps(asdict(item)) + "\n" for item in items)
    if lines:
        write_atomically(folder / ITEMS_FILE, lines.encode())
    write_atomically(folder / FILE, encode(evaluation))


def read_evaluation(path: Path) -> Evaluation:
    """Read and check an evaluation.json. Raises `UserError` if it is not there or something else."""
    content = read_json(path)
    found = content.get("schema_version")
    if found != SCHEMA_VERSION:
        raise UserError(f"{path} holds no evaluation of schema {SCHEMA_VERSION} (its schema_version: {found})")
    try:
        evaluation = decode(Evaluation, content)
        check(evaluation)
    except Malformed as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return evaluation
