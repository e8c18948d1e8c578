"""Questions from local JSON lines, as the tasks in tasks/ want them."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from sparsecod_mcore.data.files import FileCorpus
from sparsecod_mcore.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def dataset(
    *,
    task_data: str,
    file: str,
    texts: Sequence[str],
    choices: str,
    number_of_choices: int | None = None,
    clean: str | None = None,
    **_: object,
) -> dict[str, datasets.Dataset]:
    """The split ``test`` from `file` in the folder `task_data`; lm-eval calls this with a task's settings.

    A row has a string in each of the columns `texts`, a list of strings in `choices` and the index of the right one in
    ``gold``. `clean` names a function that strings go through. Raises `UserError` for a missing file or a bad row.
    """
    path = _find(Path(task_data), file)
    cleaned = _function(clean) if clean is not None else str
    rows = []
    for record in FileCorpus([str(path)]).records():
        row = _parsed(record.raw, [*texts, choices, "gold"])
        complaint = row if isinstance(row, str) else _complaint(row, texts, choices, number_of_choices)
        if isinstance(row, str) or complaint is not None:
            raise UserError(f"{path}, line {record.line}: {complaint}")
        strings = {column: cleaned(row[column]) for column in texts}
        rows.append(strings | {choices: [cleaned(choice) for choice in row[choices]], "gold": row["gold"]})
    if not rows:
        raise UserError(f"{path} holds no questions")
    return {"test": datasets.Dataset.from_list(rows)}


def _find(folder: Path, file: str) -> Path:
    for suffix in SUFFIXES:
        path = folder / (file + suffix)
        if path.exists():
            return path
    raise UserError(f"{folder} holds no {file}.jsonl, nor that as .gz or .zst; --tasks names those to evaluate")


def _function(name: str) -> Callable[[str], str]:
    module, _, function = name.rpartition(".")
    found: Callable[[str], str] = getattr(importlib.import_module(module), function)
    return found


def _parsed(raw: bytes | str, columns: Sequence[str]) -> dict[str, Any] | str:
    """A row; a sentence where it is none."""
    try:
        row = json.loads(raw)
    except ValueError as error:
        return f"no valid JSON ({error})"
    if not isinstance(row, dict):
        return "no JSON object"
    missing = [column for column in columns if column not in row]
    return f"it has no {missing[0]!r}, and {', '.join(columns)} are needed" if missing else row


def _complaint(row: dict[str, Any], texts: Sequence[str], choices: str, number_of_choices: int | None) -> str | None:
    for column in texts:
        if not isinstance(row[column], str) or not row[column].strip():
            return f"{column!r} is no text"
    given = row[choices]
    if not isinstance(given, list) or len(given) < 2:
        return f"{choices!r} is no list of two choices or more"
    if not all(isinstance(choice, str) and choice.strip() for choice in given):
        return f"{choices!r} has a choice that is no text"
    if number_of_choices is not None and len(given) != number_of_choices:
        return f"{choices!r} has {len(given)} choices, this task is of {number_of_choices}"
    if type(row["gold"]) is not int or not 0 <= row["gold"] < len(given):
        return f"'gold' is {row['gold']!r}, not the index of one of {len(given)} choices"
    return None
