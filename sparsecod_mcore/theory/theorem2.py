"""Theorem 2: the same for layers of attention and an MLP, without norms, that share one mask of features.

U = X + MSA(X M), Y = U + FFN(U M); E‖XM‖² ≤ ρ ‖X‖² for all X (Eq. 40).

Axes: N samples, T tokens, D width, H heads.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Values, generator
from sparsecod_mcore.theory.results import Check

TOKENS, WIDTH, HEADS = 8, 16, 2
GAIN = 0.25  # variance of a weight, times its number of inputs
DEPTHS = (1, 2, 4, 8)
DENSITIES = (0.1, 0.3, 1.0)


def attention_gain(output_norm: float, value_norm: float, attention_norm: float, heads: int) -> float:
    """α_att of Eq. 43: E‖W_O‖² Σ_h E‖A_h‖² E‖W_V‖², of squared spectral norms.

    ‖A‖² of a matrix whose rows sum to 1 is T at most, where all tokens attend to one; over all X nothing less will do.
    """
    return output_norm * heads * attention_norm * value_norm


def mlp_gain(first_norm: float, second_norm: float) -> float:
    """α_ffn below Eq. 44, of squared spectral norms and an activation with Lipschitz constant 1."""
    return first_norm * second_norm


def bound(depth: int, alpha_attention: float, alpha_mlp: float, rho: float) -> float:
    """Eq. 45, for E‖X_L‖² / E‖X_0‖²: Π_l (1 + √(α_att ρ))² (1 + √(α_ffn ρ))²."""
    return ((1 + math.sqrt(alpha_attention * rho)) * (1 + math.sqrt(alpha_mlp * rho))) ** (2 * depth)


def shared_mask_growth(attention: float, mlp: float, rho: float) -> float:
    """E‖Y‖² / ‖X‖² of one token, W_V W_O = c I and FFN(x) = b x behind the same mask: 1 − ρ + ρ (1+c)² (1+b)²."""
    return 1 - rho + rho * (1 + attention) ** 2 * (1 + mlp) ** 2


@dataclass(frozen=True)
class Weights:
    """Normal weights of one layer of N samples."""

    qkv_3NHDK: Values
    output_NDD: Values
    first_NDF: Values
    second_NFD: Values

    @classmethod
    def draw(cls, rng: np.random.Generator, samples: int) -> "Weights":
        def normal(inputs: int, *shape: int) -> Values:
            return rng.standard_normal(shape) * math.sqrt(GAIN / inputs)

        N, D, K, F = samples, WIDTH, WIDTH // HEADS, 4 * WIDTH
        return cls(normal(D, 3, N, HEADS, D, K), normal(D, N, D, D), normal(D, N, D, F), normal(F, N, F, D))

    def attention(self, x_NTD: Values) -> Values:
        q, k, v = np.einsum("ntd,xnhdk->xnhtk", x_NTD, self.qkv_3NHDK)
        scores_NHTT = np.einsum("nhtk,nhsk->nhts", q, k) / math.sqrt(q.shape[-1])
        scores_NHTT = np.exp(scores_NHTT - scores_NHTT.max(-1, keepdims=True))
        context = np.einsum("nhts,nhsk->nthk", scores_NHTT / scores_NHTT.sum(-1, keepdims=True), v)
        return context.reshape(x_NTD.shape) @ self.output_NDD

    def mlp(self, x_NTD: Values) -> Values:
        return np.maximum(x_NTD @ self.first_NDF, 0) @ self.second_NFD


def gains(seed: int) -> tuple[float, float]:
    """α_att and α_ffn of `Weights`, spectral norms averaged over draws."""
    weights = Weights.draw(generator(seed, 2, "gains"), 512)

    def squared_norm(matrices: Values) -> float:
        return float(np.square(np.linalg.norm(matrices, 2, axis=(-2, -1))).mean())

    attention = attention_gain(squared_norm(weights.output_NDD), squared_norm(weights.qkv_3NHDK[2]), TOKENS, HEADS)
    return attention, mlp_gain(squared_norm(weights.first_NDF), squared_norm(weights.second_NFD))


def growth(depth: int, rho: float, rng: np.random.Generator, samples: int) -> Values:
    """‖X_L‖² / ‖X_0‖² of `samples` stacks [N], with one mask for both branches of a layer."""
    x_NTD = rng.standard_normal((samples, TOKENS, WIDTH))
    before_N = np.square(x_NTD).sum((1, 2))
    for _ in range(depth):
        weights = Weights.draw(rng, samples)
        mask_N1D = (rng.random((samples, 1, WIDTH)) < rho).astype(np.float64)
        x_NTD = x_NTD + weights.attention(x_NTD * mask_N1D)
        x_NTD = x_NTD + weights.mlp(x_NTD * mask_N1D)
    return np.square(x_NTD).sum((1, 2)) / before_N


def checks(samples: int, seed: int) -> Iterator[Check]:
    """The bound for real softmax attention, and layers that keep all assumptions and break it."""
    attention, mlp = gains(seed)
    random_weights = Claim(
        theorem=2,
        name="random weights",
        claim="E‖X_L‖² ≤ Π (1+√(α_att ρ))² (1+√(α_ffn ρ))² E‖X_0‖²",
        source="Eq. 45",
        kind="bound",
        varied="depth",
    )
    yield random_weights.check(
        [
            Case(
                {"depth": depth, "density": rho},
                bound(depth, attention, mlp, rho),
                partial(growth, depth, rho),
            )
            for rho in DENSITIES
            for depth in DEPTHS
        ],
        max(samples // 4, 2),  # each is a stack of transformer layers
        seed,
    )
    gain = 3.0  # c and b
    shared = Claim(
        theorem=2,
        name="one mask for both branches",
        claim="E‖Y‖² ≤ (1+√(α_att ρ))² (1+√(α_ffn ρ))² E‖X‖², for T = 1, W_V W_O = 3 I, FFN(x) = 3 x",
        source="Eq. 45",
        kind="bound",
        varied="density",
    )
    separate = Claim(
        theorem=2,
        name="a mask for each branch",
        claim="the same with masks independent of each other",
        kind="bound",
        varied="density",
    )
    for claim, is_shared in ((shared, True), (separate, False)):
        cases = [
            Case(
                {"density": rho},
                bound(1, gain**2, gain**2, rho),
                _scaled_identities(gain, rho, is_shared),
                shared_mask_growth(gain, gain, rho) if is_shared else (1 - rho + rho * (1 + gain) ** 2) ** 2,
            )
            for rho in (0.05, 0.1, 0.3, 1.0)
        ]
        yield claim.check(cases, samples, seed)


def _scaled_identities(gain: float, rho: float, is_shared: bool) -> Callable[[np.random.Generator, int], Values]:
    """One token through attention (then V and O alone) and an MLP that each multiply what the mask leaves."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        x_ND = rng.standard_normal((samples, WIDTH))
        first_ND, second_ND = rng.random((2, samples, WIDTH)) < rho
        u_ND = x_ND + gain * x_ND * first_ND
        y_ND = u_ND + gain * u_ND * (first_ND if is_shared else second_ND)
        return np.square(y_ND).sum(1) / np.square(x_ND).sum(1)

    return draw
