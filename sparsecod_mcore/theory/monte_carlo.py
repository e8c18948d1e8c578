"""Means over independent random draws, with confidence intervals; the same seed gives the same bits."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

type Values = NDArray[np.float64]
type Draw = Callable[[np.random.Generator, int], Values]  # n independent samples [n] of what is to be averaged

AT_ONCE = 1024  # samples that are in memory together


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, of `samples` independent values."""

    mean: float
    error: float
    samples: int

    def interval(self, confidence: float) -> tuple[float, float]:
        """Between which values the expectation lies, by Student's distribution."""
        half = t_quantile(0.5 + confidence / 2, self.samples - 1) * self.error
        return self.mean - half, self.mean + half


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution, by its expansion about the normal one (to 1 % from 10 degrees of freedom)."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def generator(seed: int, *place: int | str) -> np.random.Generator:
    """Random numbers of their own for every `place`, so that what is left out changes nothing of the rest."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in place)])


def mean_of(values: Values) -> Estimate:
    """The mean of independent values [n], at least two."""
    assert values.dtype == np.float64 and values.ndim == 1 and len(values) > 1, (values.dtype, values.shape)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5), len(values))


def mean_ratio(numerators: Values, denominators: Values) -> Estimate:
    """Ratio of two means, of pairs [n] that are independent of each other (its error to first order)."""
    ratio = numerators.mean() / denominators.mean()
    spread = mean_of((numerators - ratio * denominators) / denominators.mean())
    return Estimate(float(ratio), spread.error, spread.samples)


def estimate(draw: Draw, samples: int, rng: np.random.Generator) -> Estimate:
    """The mean of `samples` draws."""
    sizes = [min(AT_ONCE, samples - begin) for begin in range(0, samples, AT_ONCE)]
    return mean_of(np.concatenate([draw(rng, size) for size in sizes]))
