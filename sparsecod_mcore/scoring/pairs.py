"""Pairs of layers: all of them, or a sample with an interval for the mean over all."""

import math
import random
import statistics
from collections.abc import Mapping

from sparsecod_mcore.scoring.results import Interval, Matrix

CONFIDENCE = 0.95

type Pair = tuple[int, int]


def all_pairs(num_layers: int) -> list[Pair]:
    """Every (i, j) with i < j."""
    return [(i, j) for i in range(num_layers) for j in range(i + 1, num_layers)]


def choose_pairs(num_layers: int, sample: int | None, seed: int) -> list[Pair]:
    """All pairs, or `sample` of them drawn without replacement."""
    pairs = all_pairs(num_layers)
    if sample is None or sample >= len(pairs):
        return pairs
    return sorted(random.Random(seed).sample(pairs, sample))


def matrix(num_layers: int, values: Mapping[Pair, float]) -> Matrix:
    """`values` at [i][j], NaN for pairs i < j that have none, and 0 elsewhere."""
    return [[values.get((i, j), math.nan) if i < j else 0.0 for j in range(num_layers)] for i in range(num_layers)]


def interval(num_layers: int, values: Mapping[Pair, float]) -> Interval | None:
    """For the mean over all pairs, from a sample; None where `values` has them all.

    Normal approximation, with the correction for a sample that is a good part of the whole.
    """
    count, total = len(values), len(all_pairs(num_layers))
    if count == total:
        return None
    mean = statistics.fmean(values.values())
    error = statistics.stdev(values.values()) * math.sqrt((1 - count / total) / count)
    reach = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return Interval(low=max(0.0, mean - reach), high=mean + reach, confidence=CONFIDENCE, pairs=count)
