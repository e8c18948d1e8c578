"""The table of what models can do, with the paper's figures where a run repeats one of the paper's."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecod_mcore.report.gather import Run
from sparsecod_mcore.report.page.scales import number, percent
from sparsecod_mcore.report.published import counterpart

_SCORES = ("causal", "permutation", "usefulness")


@dataclass(frozen=True)
class Cell:
    """One figure of one run, and the paper's of the run that it repeats."""

    ours: str = "–"
    published: str = ""


@dataclass(frozen=True)
class Row:
    """One measure, on what it was measured, and a cell for each run."""

    measure: str
    beside: str
    cells: list[Cell]


def evaluation_rows(runs: Sequence[Run]) -> list[Row]:
    """Tasks, perplexity and scores; what was measured on something else has a row of its own."""
    found = [dict(_cells(run)) for run in runs]
    return [
        Row(measure, beside, [cells.get((measure, beside), Cell()) for cells in found])
        for measure, beside in dict.fromkeys(key for cells in found for key in cells)
    ]


def _cells(run: Run) -> Iterator[tuple[tuple[str, str], Cell]]:
    repeats = counterpart(run)

    def cell(ours: str, name: str, text: Callable[[float], str] = number) -> Cell:
        value = None if repeats is None else repeats.figures.get(name)
        return Cell(ours, "" if repeats is None or value is None else f"paper: {text(value)} ({repeats.place})")

    perplexity = run.log.perplexity()
    if perplexity is not None:
        yield ("perplexity", "validation during training"), cell(number(perplexity), "perplexity")
    if evaluated := _mapping(_mapping(run.evaluation.get("perplexity")).get("perplexity")):
        yield ("perplexity", "evaluated"), cell(_estimate(evaluated, number), "perplexity")
    for name, content in sorted(_mapping(run.evaluation.get("tasks")).items()):
        task = _mapping(content)
        metric, items = str(task.get("metric", "acc")), task.get("items")
        guess = _mapping(task.get("random_guess"))
        beside = [f"{items:,} items"] if isinstance(items, int) else []
        beside += [f"chance {_estimate(guess, percent)}"] if guess else []
        value = _estimate(_mapping(_mapping(task.get("metrics")).get(metric)), percent)
        yield (f"{name}, {metric}", ", ".join(beside)), cell(value, str(name), percent)
    if run.scores is None:
        return
    on = f"{run.scores.sequences} sequences of {run.scores.length}"
    for name in _SCORES:
        if (section := getattr(run.scores, name)) is not None:
            score = section.scored.score if name == "usefulness" else section.score
            yield (f"{name} score", on), cell(number(score), name)
    if (depth := run.scores.effective_depth) is not None:
        for name, count in (("effective", depth.effective), ("wasted", depth.wasted)):
            yield (f"{name} layers", on), cell(f"{count} of {run.scores.layers}", name)


def _mapping(value: Any) -> dict[str, Any]:
    """`value`, unless a file of somebody else's holds something else where a mapping is expected."""
    return value if isinstance(value, dict) else {}


def _estimate(estimate: dict[str, Any], text: Callable[[float], str]) -> str:
    value, error = estimate.get("value"), estimate.get("stderr")
    if not isinstance(value, int | float):
        return "–"
    if not isinstance(error, int | float) or not math.isfinite(error):
        return text(value)
    return f"{text(value)} ± {text(error)}"
