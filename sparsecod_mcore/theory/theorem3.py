"""Theorem 3: weight decay contracts the variance of weights, and with it that of a linear layer's output.

θ ← (1−ηλ) θ − η g, with gradients g of mean 0 and variance σ² that depend on nothing.

Axes: N samples, D inputs of the layer.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Values
from sparsecod_mcore.theory.results import Check

STEPS = 100
RATE = 0.1  # η
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0)  # λ
NOISE = 1.0  # σ

type Step = Callable[[np.random.Generator, Values], Values]  # a gradient for weights of any shape


def variance(steps: int, rate: float, decay: float, initial: float, noise: float) -> float:
    """Eq. 66, of one weight: q^2T Var θ_0 + η²σ² (1 − q^2T) / (1 − q²) with q = 1 − ηλ.

    Exact where the noise has the variance σ² and not less; both terms fall as λ rises, for 0 < ηλ < 1.
    """
    kept = (1 - rate * decay) ** 2
    return kept**steps * initial + (rate * noise) ** 2 * (1 - kept**steps) / (1 - kept)


def output_bound(
    steps: int, rate: float, decay: float, mean_square: float, initial: float, noise: float, covariance_DD: Values
) -> float:
    """Eq. 59, of y = θ·x: ‖Σ_x‖ (q^2T (‖E θ_0‖² + D Var θ_0) + D η²σ² (1 − q^2T) / (1 − q²))."""
    kept = (1 - rate * decay) ** (2 * steps)
    weights = kept * mean_square + len(covariance_DD) * variance(steps, rate, decay, initial, noise)
    return float(np.linalg.norm(covariance_DD, 2)) * weights


def variance_in_a_valley(
    steps: int, rate: float, decay: float, initial: float, noise: float, curvature: float
) -> float:
    """Where g = k θ + noise, as around a minimum: Eq. 66 with q = 1 − η (λ + k)."""
    return variance(steps, rate, decay + curvature, initial, noise)


def train(theta: Values, step: Step, decay: float, rng: np.random.Generator) -> Values:
    """`theta` after all steps."""
    for _ in range(STEPS):
        theta = (1 - RATE * decay) * theta - RATE * step(rng, theta)
    return theta


def white(noise: float) -> Step:
    return lambda rng, theta: noise * rng.standard_normal(theta.shape)


def in_a_valley(noise: float, curvature: float) -> Step:
    return lambda rng, theta: curvature * theta + noise * rng.standard_normal(theta.shape)


def _trained_variance(step: Callable[[], Step], decay: float) -> Callable[[np.random.Generator, int], Values]:
    """θ_T² of weights that start with variance 1 and mean 0: their mean stays 0."""
    return lambda rng, samples: np.square(train(rng.standard_normal(samples), step(), decay, rng))


def checks(samples: int, seed: int) -> Iterator[Check]:
    """The law, the bound on outputs, and gradients that pull, or go through Adam."""
    law = Claim(
        theorem=3,
        name="white gradients",
        claim="Var θ_T = q^2T Var θ_0 + η²σ² (1−q^2T)/(1−q²), q = 1−ηλ",
        source="Eq. 66",
        varied="decay",
    )
    yield law.check(
        [
            Case(
                {"decay": decay},
                variance(STEPS, RATE, decay, 1.0, NOISE),
                _trained_variance(lambda: white(NOISE), decay),
            )
            for decay in DECAYS
        ],
        samples,
        seed,
    )
    covariance_DD, mean_D = np.diag(1 / np.arange(1.0, 9.0)), np.full(8, 0.5)
    output = Claim(
        theorem=3,
        name="output of a linear layer",
        claim="Var y ≤ ‖Σ_x‖ (q^2T E‖θ_0‖² + D η²σ² (1−q^2T)/(1−q²))",
        source="Eq. 59",
        kind="bound",
        varied="decay",
    )
    yield output.check(
        [
            Case(
                {"decay": decay},
                output_bound(STEPS, RATE, decay, float(np.square(mean_D).sum()), 1.0, NOISE, covariance_DD),
                _output(decay, covariance_DD, mean_D),
                _output_variance(decay, covariance_DD, mean_D),
            )
            for decay in DECAYS
        ],
        samples,
        seed,
    )
    yield from _without_assumptions(samples, seed)


def _output(decay: float, covariance_DD: Values, mean_D: Values) -> Callable[[np.random.Generator, int], Values]:
    def draw(rng: np.random.Generator, samples: int) -> Values:
        shape = (samples, len(mean_D))
        theta_ND = train(mean_D + rng.standard_normal(shape), white(NOISE), decay, rng)
        x_ND = rng.standard_normal(shape) * np.sqrt(np.diagonal(covariance_DD))
        return np.square((theta_ND * x_ND).sum(1))

    return draw


def _output_variance(decay: float, covariance_DD: Values, mean_D: Values) -> float:
    """tr(Σ_x) Var θ_T + m_Tᵀ Σ_x m_T."""
    mean_D = (1 - RATE * decay) ** STEPS * mean_D
    return float(np.trace(covariance_DD) * variance(STEPS, RATE, decay, 1.0, NOISE) + mean_D @ covariance_DD @ mean_D)


def _without_assumptions(samples: int, seed: int) -> Iterator[Check]:
    curvature = 1.0  # k
    valley = Claim(
        theorem=3,
        name="gradients that pull",
        claim="Var θ_T = q^2T Var θ_0 + η²σ² (1−q^2T)/(1−q²), q = 1−ηλ",
        source="Eq. 66",
        violated="g does not depend on θ (that of a loss does: here g = θ + noise)",
        varied="decay",
    )
    yield valley.check(
        [
            Case(
                {"decay": decay, "curvature": curvature},
                variance(STEPS, RATE, decay, 1.0, NOISE),
                _trained_variance(lambda: in_a_valley(NOISE, curvature), decay),
                variance_in_a_valley(STEPS, RATE, decay, 1.0, NOISE, curvature),
            )
            for decay in DECAYS
        ],
        samples,
        seed,
    )
    adam = Claim(
        theorem=3,
        name="AdamW",
        claim="Var θ_T = q^2T Var θ_0 + η²σ² (1−q^2T)/(1−q²), q = 1−ηλ",
        source="Eq. 66",
        violated="the update is −ηg (AdamW's has a size of its own, whatever σ is)",
        varied="noise",
    )
    decay = 1.0
    yield adam.check(
        [
            Case(
                {"noise": noise, "decay": decay},
                variance(STEPS, RATE, decay, 1.0, noise),
                _trained_variance(partial(Adam, noise), decay),
            )
            for noise in (0.01, 0.1, 1.0, 10.0)
        ],
        samples,
        seed,
    )


class Adam:
    """Steps of Adam for white gradients of standard deviation `noise`, with the paper's usual moments."""

    def __init__(self, noise: float, first: float = 0.9, second: float = 0.95, epsilon: float = 1e-8) -> None:
        self._gradient, self._decays, self._epsilon = white(noise), (first, second), epsilon
        self._moments: list[Values | float] = [0.0, 0.0]
        self._steps = 0

    def __call__(self, rng: np.random.Generator, theta: Values) -> Values:
        gradient = self._gradient(rng, theta)
        self._steps += 1
        for which, (decay, power) in enumerate(zip(self._decays, (gradient, gradient**2), strict=True)):
            self._moments[which] = decay * self._moments[which] + (1 - decay) * power
        mean, square = (
            moment / (1 - decay**self._steps) for moment, decay in zip(self._moments, self._decays, strict=True)
        )
        return mean / (np.sqrt(square) + self._epsilon)
