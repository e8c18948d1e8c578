"""Theorem 4: uniform attention over T independent values of mean 0 and variance σ² has the variance σ²/T.

Axes: N samples, T values.
"""

from collections.abc import Callable, Iterator

import numpy as np

from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Values
from sparsecod_mcore.theory.results import Check

LENGTHS = (4, 16, 64, 256, 1024)
LENGTH = 256  # where something else is varied

type Draw = Callable[[np.random.Generator, int], Values]


def variance(length: int) -> float:
    """Of the output, for σ = 1: 1/T."""
    return 1 / length


def variance_of_correlated(length: int, correlation: float) -> float:
    """Where any two values have the correlation r: 1/T + r (1 − 1/T), which has a floor r that no length lowers."""
    return 1 / length + correlation * (1 - 1 / length)


def causal_variance(length: int) -> float:
    """Averaged over the queries of a causal sequence, the i-th of which sees i values: (1 + 1/2 + … + 1/T) / T."""
    return float((1 / np.arange(1.0, length + 1)).mean())


def attended(weights_NT: Values, values_NT: Values) -> Values:
    """Squared outputs [N]; their mean is the variance."""
    return np.square((weights_NT * values_NT).sum(1))


def softmax(logits_NT: Values) -> Values:
    exponentials_NT = np.exp(logits_NT - logits_NT.max(1, keepdims=True))
    return exponentials_NT / exponentials_NT.sum(1, keepdims=True)


def _uniform(length: int, correlation: float = 0.0) -> Draw:
    def draw(rng: np.random.Generator, samples: int) -> Values:
        own_NT, common_N1 = rng.standard_normal((samples, length)), rng.standard_normal((samples, 1))
        values_NT = (1 - correlation) ** 0.5 * own_NT + correlation**0.5 * common_N1
        return attended(np.full((samples, length), 1 / length), values_NT)

    return draw


def _softmax(length: int, spread: float) -> Draw:
    """Logits that scatter by `spread`: 1 is that of q·k/√H for independent normal q and k."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        weights_NT = softmax(spread * rng.standard_normal((samples, length)))
        return attended(weights_NT, rng.standard_normal((samples, length)))

    return draw


def _some(length: int, attended_to: int) -> Draw:
    """Uniform over `attended_to` of the values, 0 elsewhere: attention as sparse as can be."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        return np.square(rng.standard_normal((samples, length))[:, :attended_to].mean(1))

    return draw


def _causal(length: int) -> Draw:
    def draw(rng: np.random.Generator, samples: int) -> Values:
        means_NT = rng.standard_normal((samples, length)).cumsum(1) / np.arange(1.0, length + 1)
        return np.square(means_NT).mean(1)

    return draw


def checks(samples: int, seed: int) -> Iterator[Check]:
    """The law, and attention as models have it."""
    law = Claim(theorem=4, name="uniform weights", claim="Var = σ²/T", source="Eq. 77", varied="length")
    yield law.check([Case({"length": length}, variance(length), _uniform(length)) for length in LENGTHS], samples, seed)

    def violated(name: str, assumption: str, varied: str) -> Claim:
        return Claim(theorem=4, name=name, claim="Var = σ²/T", source="Eq. 77", violated=assumption, varied=varied)

    yield violated("softmax weights", "weights are uniform", "spread").check(
        [
            Case({"spread": spread, "length": LENGTH}, variance(LENGTH), _softmax(LENGTH, spread))
            for spread in (0.5, 1.0, 1.5, 2.0)
        ],
        samples,
        seed,
    )
    yield violated("sparse attention", "all values are attended to", "attended").check(
        [
            Case({"attended": some, "length": LENGTH}, variance(LENGTH), _some(LENGTH, some), 1 / some)
            for some in (4, 16, 64, 256)
        ],
        samples,
        seed,
    )
    yield violated(
        "correlated values", "values are independent (here any two have the correlation 0.1)", "length"
    ).check(
        [
            Case(
                {"length": length, "correlation": 0.1},
                variance(length),
                _uniform(length, 0.1),
                variance_of_correlated(length, 0.1),
            )
            for length in LENGTHS
        ],
        samples,
        seed,
    )
    yield violated("causal mask", "every query sees all T values", "length").check(
        [Case({"length": length}, variance(length), _causal(length), causal_variance(length)) for length in LENGTHS],
        samples,
        seed,
    )
