"""Theorem 6: the average of k independent experts has 1/k of the variance of one, in output and Jacobian.

Axes: N samples, E experts, K chosen ones, D width.
"""

from collections.abc import Callable, Iterator

import numpy as np

from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Values
from sparsecod_mcore.theory.results import Check
from sparsecod_mcore.theory.theorem4 import softmax

EXPERTS, WIDTH = 16, 8
CHOSEN = (1, 2, 4, 8)
HIDDEN = 64  # units of the dense MLP that fine-grained experts share out

type Draw = Callable[[np.random.Generator, int], Values]


def variance(chosen: int) -> float:
    """Eq. 92 and 93, for experts of variance 1: 1/k."""
    return 1 / chosen


def variance_of_correlated(chosen: int, correlation: float) -> float:
    """Where any two experts have the correlation r: (1 + (k − 1) r) / k."""
    return (1 + (chosen - 1) * correlation) / chosen


def fine_grained_variance(chosen: int) -> float:
    """Of experts with 1/k of the dense MLP's hidden units, in units of the dense MLP's variance: 1/k²."""
    return 1 / chosen**2


def _uniform(chosen: int, correlation: float = 0.0) -> Draw:
    def draw(rng: np.random.Generator, samples: int) -> Values:
        own_NK, common_N1 = rng.standard_normal((samples, chosen)), rng.standard_normal((samples, 1))
        return np.square(((1 - correlation) ** 0.5 * own_NK + correlation**0.5 * common_N1).mean(1))

    return draw


def _jacobian(chosen: int) -> Draw:
    """Variance of an entry of the mean of k random Jacobians."""
    return lambda rng, samples: np.square(rng.standard_normal((samples, chosen, WIDTH, WIDTH)).mean(1)).mean((1, 2))


def _gated(chosen: int) -> Draw:
    """Softmax gates of the k largest of normal logits, as routers have them."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        logits_NE = np.sort(rng.standard_normal((samples, EXPERTS)), axis=1)
        return np.square((softmax(logits_NE[:, -chosen:]) * rng.standard_normal((samples, chosen))).sum(1))

    return draw


def _strongest(chosen: int) -> Draw:
    """A router that prefers experts whose output for this token is large."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        outputs_NE = rng.standard_normal((samples, EXPERTS))
        order_NE = np.abs(outputs_NE).argsort(1)
        return np.square(np.take_along_axis(outputs_NE, order_NE[:, -chosen:], 1).mean(1))

    return draw


def _jacobian_with_gates(chosen: int) -> Draw:
    """Σ_i g_i J_i + Σ_i E_i (∂g_i/∂x)ᵀ of linear experts E_i = J_i x and softmax gates of r_i·x.

    The derivative of softmax gates is g_i (r_i − Σ_j g_j r_j). Variances are in units of that of J_i.
    """

    def draw(rng: np.random.Generator, samples: int) -> Values:
        x_ND = rng.standard_normal((samples, WIDTH))
        J_NEDD = rng.standard_normal((samples, chosen, WIDTH, WIDTH)) / WIDTH**0.5
        r_NED = rng.standard_normal((samples, chosen, WIDTH)) / WIDTH**0.5
        g_NE = softmax(np.einsum("ned,nd->ne", r_NED, x_ND))
        slope_NED = g_NE[..., None] * (r_NED - np.einsum("ne,ned->nd", g_NE, r_NED)[:, None])
        outputs_NED = np.einsum("neij,nj->nei", J_NEDD, x_ND)
        J_NDD = np.einsum("ne,neij->nij", g_NE, J_NEDD) + np.einsum("nei,nej->nij", outputs_NED, slope_NED)
        return np.square(J_NDD).mean((1, 2)) * WIDTH

    return draw


def _fine_grained(chosen: int) -> Draw:
    """Two-layer experts with HIDDEN / k units and the initialisation of the dense MLP, over the variance of that."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        activated_NKF = np.maximum(rng.standard_normal((samples, chosen, HIDDEN // chosen)), 0)
        outputs_NK = (activated_NKF * rng.standard_normal(activated_NKF.shape)).sum(2)
        return np.square(outputs_NK.mean(1)) / (HIDDEN / 2)  # E relu² = 1/2

    return draw


def checks(samples: int, seed: int) -> Iterator[Check]:
    """The law for outputs and Jacobians, and mixtures as models have them."""

    def cases(draw: Callable[[int], Draw], exact: Callable[[int], float] | None = None) -> list[Case]:
        return [Case({"chosen": k}, variance(k), draw(k), None if exact is None else exact(k)) for k in CHOSEN]

    def violated(name: str, assumption: str, claim: str = "Var = σ²/k", source: str = "Eq. 92") -> Claim:
        return Claim(theorem=6, name=name, claim=claim, source=source, violated=assumption, varied="chosen")

    outputs = Claim(theorem=6, name="outputs", claim="Var = σ²/k", source="Eq. 92", varied="chosen")
    yield outputs.check(cases(_uniform), samples, seed)
    jacobians = Claim(theorem=6, name="Jacobians", claim="Var J = Var J_i / k", source="Eq. 93", varied="chosen")
    yield jacobians.check(cases(_jacobian), samples, seed)
    yield violated("softmax gates", "gates are 1/k").check(cases(_gated), samples, seed)
    correlated = violated("correlated experts", "experts are independent (here any two have the correlation 0.3)")
    yield correlated.check(cases(lambda k: _uniform(k, 0.3), lambda k: variance_of_correlated(k, 0.3)), samples, seed)
    strongest = violated("experts chosen for their output", "routing does not depend on the experts' outputs")
    yield strongest.check(cases(_strongest), samples, seed)
    gates = violated("Jacobians with gates", "gates are constant around x", "Var J = Var J_i / k", "Eq. 93")
    yield gates.check(cases(_jacobian_with_gates), samples, seed)
    fine = violated("fine-grained experts", "an expert has the variance of the dense MLP", source="Eq. 104")
    yield fine.check(cases(_fine_grained, fine_grained_variance), samples, seed)
