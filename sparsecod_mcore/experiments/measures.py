"""What is read of one finished run, and compared between runs: one number to a name."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.results import Scores, read_scores

_END_OF_TRAINING = 0.1  # the share of the steps that last-layer variance is averaged over
_THRESHOLD = "0.001"  # ε, of sparsity

type Record = Mapping[str, Any]


def _last_layer_variance(log: Sequence[Record]) -> float | None:
    measured = [record["last_layer_variance"] for record in log if record.get("last_layer_variance") is not None]
    numbers = list(map(float, measured[-max(1, round(len(measured) * _END_OF_TRAINING)) :]))
    return fmean(numbers) if numbers else None


def _last(key: str) -> Callable[[Sequence[Record]], float | None]:
    def find(log: Sequence[Record]) -> float | None:
        return next((float(record[key]) for record in reversed(log) if record.get(key) is not None), None)

    return find


_OF_LOG: dict[str, Callable[[Sequence[Record]], float | None]] = {
    "tokens": _last("tokens"),
    "train_loss": _last("loss"),
    "validation_loss": _last("validation_loss"),
    "perplexity": _last("validation_perplexity"),
    "last_layer_variance": _last_layer_variance,
}
_OF_SCORES: dict[str, Callable[[Scores], float | None]] = {
    "parameters": lambda scores: scores.weight_sparsity.parameters if scores.weight_sparsity else None,
    "causal": lambda scores: scores.causal.score if scores.causal else None,
    "permutation": lambda scores: scores.permutation.score if scores.permutation else None,
    "usefulness": lambda scores: scores.usefulness.scored.score if scores.usefulness else None,
    "usefulness_held_out": lambda scores: (
        scores.usefulness.held_out.score if scores.usefulness and scores.usefulness.held_out else None
    ),
    "linear_increase": lambda scores: scores.usefulness.scored.mean if scores.usefulness else None,
    "effective": lambda scores: scores.effective_depth.effective if scores.effective_depth else None,
    "wasted": lambda scores: scores.effective_depth.wasted if scores.effective_depth else None,
    "weight_sparsity": lambda scores: scores.weight_sparsity.model[_THRESHOLD] if scores.weight_sparsity else None,
    "attention_sparsity": lambda scores: _of_attention(scores, "sparsity_causal_mean"),
    "attention_entropy": lambda scores: _of_attention(scores, "entropy_mean"),
}
MEASURES = (*_OF_LOG, *_OF_SCORES)


def _of_attention(scores: Scores, name: str) -> float | None:
    """At the one length that was scored."""
    if scores.attention is None:
        return None
    value = getattr(next(iter(scores.attention.lengths.values())), name)
    return value[_THRESHOLD] if isinstance(value, dict) else value


def measures_of(run: Path) -> dict[str, float | None]:
    """Every measure of the run in a folder; None what was not measured. Perplexity that is no number is infinite."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] if run.is_dir() else []
    if not log:
        raise UserError(f"{run} holds no log of a run")
    scores = read_scores(run / "scores" / "scores.json") if (run / "scores" / "scores.json").exists() else None
    found = {name: find(log) for name, find in _OF_LOG.items()}
    found |= {name: None if scores is None else _number(find(scores)) for name, find in _OF_SCORES.items()}
    return found


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
