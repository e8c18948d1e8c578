"""Theorem 1: sparse masks slow the growth of a residual stream with depth.

h_{l+1} = h_l + W_l M_l h_l with a diagonal 0-1 mask M_l, E‖W_l x‖² ≤ α ‖x‖² and E‖M_l x‖² ≤ ρ ‖x‖² for all x.

Axes: N samples, D width.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import NormalDist

import numpy as np

from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Values
from sparsecod_mcore.theory.results import Check

WIDTH = 16
DEPTHS = (1, 2, 4, 8, 16, 32)
DENSITIES = (0.1, 0.3, 1.0)
GAIN = 0.25  # α

type Branch = Callable[[np.random.Generator, Values], Values]  # what a layer adds to h [N, D]


def bound(depth: int, alpha: float, rho: float) -> float:
    """Eq. 13, for E‖h_L‖² / E‖h_0‖²: Π_l (1 + √(α ρ))²."""
    return (1 + math.sqrt(alpha * rho)) ** (2 * depth)


def independent_growth(depth: int, alpha: float, rho: float) -> float:
    """The same ratio where E‖Wx‖² = α ‖x‖², E‖Mx‖² = ρ ‖x‖², and W has mean 0 and depends on nothing: (1 + α ρ)^L.

    What the bound has more is the Cauchy-Schwarz estimate of E⟨h, WMh⟩, which is then 0.
    """
    return (1 + alpha * rho) ** depth


def aligned_growth(depth: int, alpha: float, rho: float) -> float:
    """The same ratio for W = √α I, as aligned with the stream as can be: (1 + 2 ρ √α + α ρ)^L.

    Equal to the bound at ρ = 1 only: a mask that knows nothing of h keeps a share ρ of ⟨h, Mh⟩, not √ρ.
    """
    return (1 + 2 * rho * math.sqrt(alpha) + alpha * rho) ** depth


def energy_kept_by_magnitude(density: float) -> float:
    """Share of the energy of normal h that its largest `density` of entries hold: 2 (t φ(t) + 1 − Φ(t))."""
    if density >= 1:
        return 1.0
    normal = NormalDist()
    t = normal.inv_cdf(1 - density / 2)
    return 2 * (t * normal.pdf(t) + density / 2)


def mask(rng: np.random.Generator, h_ND: Values, rho: float) -> Values:
    """0-1 entries, 1 with probability rho."""
    return (rng.random(h_ND.shape) < rho).astype(np.float64)


def independent(alpha: float, rho: float) -> Branch:
    """W M h with normal W, drawn anew."""

    def branch(rng: np.random.Generator, h_ND: Values) -> Values:
        N, D = h_ND.shape
        W_NDD = rng.standard_normal((N, D, D)) * math.sqrt(alpha / D)
        return np.einsum("nij,nj->ni", W_NDD, mask(rng, h_ND, rho) * h_ND)

    return branch


def aligned(alpha: float, rho: float) -> Branch:
    """W M h with W = √α I."""
    return lambda rng, h_ND: math.sqrt(alpha) * mask(rng, h_ND, rho) * h_ND


def growth(branch: Branch, depth: int, rng: np.random.Generator, samples: int) -> Values:
    """‖h_L‖² / ‖h_0‖² of `samples` stacks, [N]."""
    h_ND = rng.standard_normal((samples, WIDTH))
    before_N = np.square(h_ND).sum(1)
    for _ in range(depth):
        h_ND = h_ND + branch(rng, h_ND)
    return np.square(h_ND).sum(1) / before_N


def checks(samples: int, seed: int) -> Iterator[Check]:
    """The theorem under its assumptions, how tight it is, and what becomes of it without them."""
    grid = [(depth, rho) for rho in DENSITIES for depth in DEPTHS]

    def cases(of: Callable[[float, float], Branch], predict: Callable[..., float], exact: Callable[..., float]) -> list:
        return [
            Case(
                {"depth": depth, "density": rho},
                predict(depth, GAIN, rho),
                partial(growth, of(GAIN, rho), depth),
                exact(depth, GAIN, rho),
            )
            for depth, rho in grid
        ]

    paper = Claim(
        theorem=1,
        name="independent weights",
        claim="E‖h_L‖² ≤ (1+√(αρ))^2L E‖h_0‖²",
        source="Eq. 13",
        kind="bound",
        varied="depth",
    )
    yield paper.check(cases(independent, bound, independent_growth), samples, seed)
    exact = Claim(theorem=1, name="independent weights, exactly", claim="E‖h_L‖² = (1+αρ)^L E‖h_0‖²", varied="depth")
    yield exact.check(cases(independent, independent_growth, independent_growth), samples, seed)
    tight = Claim(
        theorem=1,
        name="aligned weights",
        claim="the bound is attained for W = √α I at ρ = 1, and not below",
        source="Eq. 13",
        kind="bound",
        varied="depth",
    )
    yield tight.check(cases(aligned, bound, aligned_growth), samples, seed)
    yield from _without_assumptions(samples, seed)


def _without_assumptions(samples: int, seed: int) -> Iterator[Check]:
    one_mask = Claim(
        theorem=1,
        name="one mask for all layers",
        claim="E‖h_L‖² ≤ (1+√(αρ))^2L E‖h_0‖²",
        source="Eq. 13",
        kind="bound",
        violated="M_l is independent of h_l (used in Eq. 25)",
        varied="depth",
    )
    rho = 0.1

    def grown(depth: int) -> float:
        return 1 - rho + rho * (1 + math.sqrt(GAIN)) ** (2 * depth)

    yield one_mask.check(
        [
            Case({"depth": depth, "density": rho}, bound(depth, GAIN, rho), _with_one_mask(depth, rho), grown(depth))
            for depth in DEPTHS
        ],
        samples,
        seed,
    )
    chosen = Claim(
        theorem=1,
        name="largest entries kept",
        claim="E‖Mx‖² ≤ ρ E‖x‖² with ρ the density of M",
        source="Eq. 12",
        kind="bound",
        violated="M does not depend on x",
        varied="density",
    )
    yield chosen.check(
        [Case({"density": rho}, rho, _kept(rho), energy_kept_by_magnitude(rho)) for rho in (0.05, 0.1, 0.3, 0.5)],
        samples,
        seed,
    )
    correlated = Claim(
        theorem=1,
        name="weights that know the stream",
        claim="E‖h_L‖² = (1+αρ)^L E‖h_0‖²",
        violated="W_l is independent of h_l",
        varied="cosine",
    )
    depth, rho = 16, 0.3
    yield correlated.check(
        [
            Case(
                {"cosine": cosine, "depth": depth, "density": rho},
                independent_growth(depth, GAIN, rho),
                partial(growth, _towards_stream(GAIN * rho, cosine), depth),
                (1 + 2 * cosine * math.sqrt(GAIN * rho) + GAIN * rho) ** depth,
            )
            for cosine in (-0.1, 0.1, 0.3, 1.0)
        ],
        samples,
        seed,
    )
    pre_norm = Claim(
        theorem=1,
        name="norm before the branch",
        claim="E‖h_L‖² = (1+αρ)^L E‖h_0‖²",
        violated="the branch grows with h (a Pre-LN branch does not)",
        varied="depth",
    )
    rho = 1.0
    yield pre_norm.check(
        [
            Case(
                {"depth": depth, "density": rho},
                independent_growth(depth, GAIN, rho),
                partial(growth, _behind_norm(independent(GAIN, rho)), depth),
                1 + depth * GAIN * rho * WIDTH / (WIDTH - 2),  # E‖h_0‖⁻² = 1 / (D − 2)
            )
            for depth in DEPTHS
        ],
        samples,
        seed,
    )


def _with_one_mask(depth: int, rho: float) -> Callable[[np.random.Generator, int], Values]:
    def draw(rng: np.random.Generator, samples: int) -> Values:
        kept_ND = mask(rng, np.empty((samples, WIDTH)), rho)
        return growth(lambda _, h_ND: math.sqrt(GAIN) * kept_ND * h_ND, depth, rng, samples)

    return draw


def _kept(density: float) -> Callable[[np.random.Generator, int], Values]:
    width = 1000  # wide enough for the share of entries to be the density

    def draw(rng: np.random.Generator, samples: int) -> Values:
        energy_ND = np.sort(np.square(rng.standard_normal((samples, width))), axis=1)
        return energy_ND[:, width - round(density * width) :].sum(1) / energy_ND.sum(1)

    return draw


def _towards_stream(gain: float, cosine: float) -> Branch:
    """A branch of energy gain ‖h‖², at a fixed angle to h and else in any direction."""

    def branch(rng: np.random.Generator, h_ND: Values) -> Values:
        across_ND = rng.standard_normal(h_ND.shape)
        across_ND -= (across_ND * h_ND).sum(1, keepdims=True) / np.square(h_ND).sum(1, keepdims=True) * h_ND
        across_ND *= np.linalg.norm(h_ND, axis=1, keepdims=True) / np.linalg.norm(across_ND, axis=1, keepdims=True)
        return math.sqrt(gain) * (cosine * h_ND + math.sqrt(1 - cosine**2) * across_ND)

    return branch


def _behind_norm(branch: Branch) -> Branch:
    def normed(rng: np.random.Generator, h_ND: Values) -> Values:
        return branch(rng, h_ND / np.sqrt(np.square(h_ND).mean(1, keepdims=True)))

    return normed
