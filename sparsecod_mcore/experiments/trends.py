"""Whether a trend that the paper publishes shows in runs with several seeds."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from scipy import stats

from sparsecod_mcore.experiments.questions import Trend

SIGNIFICANT = 0.05
_ON_A_LOG_SCALE = ("last_layer_variance", "perplexity")  # differ by factors

type Verdict = Literal["yes", "no", "not at this size", "not measured"]
type BySeed = Mapping[str, Sequence[float]]  # by label of a value, in order


@dataclass(frozen=True)
class Finding:
    """What was found of a trend; `p` is the chance of such a difference where there is none."""

    trend: Trend
    found: str
    p: float | None
    verdict: Verdict


def judge(trend: Trend, values: BySeed) -> Finding:
    """Compare a measure's `values` with what the paper publishes of them.

    `rises` and `falls`: a straight line through all seeds of all values, which count as equally spaced; `highest` and
    `lowest`: Welch's t test of one value against both ends. Two-sided; variance and perplexity as logarithms.
    """
    labels = list(trend.over or values)
    samples = [_scaled(trend.measure, values[label]) for label in labels]
    if not all(samples):
        missing = ", ".join(label for label, sample in zip(labels, samples, strict=True) if not sample)
        return Finding(trend, f"no number at {missing}", None, "not measured")
    if trend.at is None:
        return _monotone(trend, samples)
    return _extreme(trend, samples, labels.index(trend.at))


def _scaled(measure: str, sample: Sequence[float]) -> list[float]:
    finite = [value for value in sample if math.isfinite(value)]
    return [math.log(value) for value in finite if value > 0] if measure in _ON_A_LOG_SCALE else finite


def _monotone(trend: Trend, samples: Sequence[Sequence[float]]) -> Finding:
    positions = [position for position, sample in enumerate(samples) for _ in sample]
    numbers = [number for sample in samples for number in sample]
    if len(set(numbers)) == 1:
        return Finding(trend, "the same everywhere", 1.0, "not at this size")
    if len(numbers) < 3:
        return Finding(trend, "too few runs to tell", None, "not at this size")
    line = stats.linregress(positions, numbers)
    p = float(line.pvalue)
    if not p < SIGNIFICANT:
        return Finding(trend, "no clear trend", p, "not at this size")
    direction = "rises" if line.slope > 0 else "falls"
    return Finding(trend, direction, p, "yes" if direction == trend.direction else "no")


def _extreme(trend: Trend, samples: Sequence[Sequence[float]], at: int) -> Finding:
    """The larger of both p: one value is an extreme only if it is so on both sides."""
    sign = 1 if trend.direction == "highest" else -1
    sides = [_difference(samples[at], samples[end]) for end in (0, -1)]
    p = max(p for _, p in sides)
    for end, (by, q) in zip(("first", "last"), sides, strict=True):
        if sign * by < 0 and q < SIGNIFICANT:
            return Finding(trend, f"{'higher' if sign > 0 else 'lower'} at the {end} value", q, "no")
    if p < SIGNIFICANT:
        return Finding(trend, f"{trend.direction} at {trend.at}", p, "yes")
    return Finding(trend, f"{trend.at} does not differ from both ends", p, "not at this size")


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of `a` over that of `b`, and the p of there being none; 1 where there are too few numbers to tell."""
    by = fmean(a) - fmean(b)
    if by == 0 or min(len(a), len(b)) < 2:
        return by, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # samples without spread: p is 0, and rightly so
        return by, float(stats.ttest_ind(a, b, equal_var=False).pvalue)
