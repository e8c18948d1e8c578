"""An evaluation as lines on the screen."""

from sparsecod_mcore.evaluation.results import Estimate, Evaluation

_HEADINGS = ("task", "metric", "items", "accuracy", "random guess", "longest choice", "shortest choice")


def summary(evaluation: Evaluation) -> str:
    """A row per task, each accuracy in percent beside its baselines, ± standard errors; then the perplexity."""
    rows = [
        (
            name,
            task.metric,
            f"{task.items:,}",
            *map(
                _percent,
                (task.metrics[task.metric], task.random_guess, task.longest_choice, task.shortest_choice),
            ),
        )
        for name, task in evaluation.tasks.items()
    ]
    lines = []
    if rows:
        widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
        for row in (_HEADINGS, *rows):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if (found := evaluation.perplexity) is not None:
        lines.append(
            f"perplexity {_number(found.perplexity)}, loss {_number(found.loss)} nats per token "
            f"({found.sequences:,} sequences of {found.length:,} tokens)"
        )
    return "\n".join(lines)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.2%} ± {estimate.stderr:.2%}"


def _number(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ± {estimate.stderr:.4f}"
