"""The table of what models can do, with the paper's figures where a run has a counterpart there."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecod_mcore.report.gather import Run
from sparsecod_mcore.report.page.scales import number, percent
from sparsecod_mcore.report.published import counterpart

_SCORES = ("causal", "permutation", "usefulness")


@dataclass(frozen=True)
class Row:
    """One figure of one run."""

    run: str
    measure: str
    ours: str
    beside: str  # what chance gives, or on what it was measured
    published: str


def evaluation_rows(runs: Sequence[Run]) -> list[Row]:
    """Tasks, perplexity and scores, run by run."""
    return [row for run in runs for row in _rows(run)]


def _rows(run: Run) -> Iterator[Row]:
    repeats = counterpart(run)

    def published(name: str, *, share: bool = False) -> str:
        value = None if repeats is None else repeats.figures.get(name)
        if repeats is None or value is None:
            return "–"
        return f"{percent(value) if share else number(value)} ({repeats.place})"

    perplexity = run.log.perplexity()
    if perplexity is not None:
        yield Row(run.name, "perplexity", number(perplexity), "validation during training", published("perplexity"))
    evaluated = _mapping(_mapping(run.evaluation.get("perplexity")).get("perplexity"))
    if evaluated:
        yield Row(
            run.name,
            "perplexity, evaluated",
            _estimate(evaluated, number),
            "held-out sequences",
            published("perplexity"),
        )
    for name, task in sorted(_mapping(run.evaluation.get("tasks")).items()):
        task = _mapping(task)
        metric = str(task.get("metric", "acc"))
        guess = _mapping(task.get("random_guess"))
        beside = f"chance {_estimate(guess, percent)}" if guess else ""
        items = task.get("items")
        beside += f", {items:,} items" if isinstance(items, int) else ""
        value = _estimate(_mapping(_mapping(task.get("metrics")).get(metric)), percent)
        yield Row(run.name, f"{name}, {metric}", value, beside.strip(", "), published(str(name), share=True))
    if run.scores is not None:
        for name in _SCORES:
            section = getattr(run.scores, name)
            if section is not None:
                score = section.scored.score if name == "usefulness" else section.score
                yield Row(run.name, name, number(score), f"{run.scores.sequences} sequences", published(name))
        if (depth := run.scores.effective_depth) is not None:
            for name, count in (("effective", depth.effective), ("wasted", depth.wasted)):
                yield Row(run.name, f"{name} layers", str(count), f"of {run.scores.layers}", published(name))


def _mapping(value: Any) -> dict[str, Any]:
    """`value`, unless a file of somebody else's holds something else where a mapping is expected."""
    return value if isinstance(value, dict) else {}


def _estimate(estimate: dict[str, Any], text: Any) -> str:
    value, error = (estimate.get(name) for name in ("value", "stderr"))
    if not isinstance(value, int | float):
        return "–"
    known = isinstance(error, int | float) and math.isfinite(error)
    return f"{text(value)} ± {text(error)}" if known else str(text(value))
