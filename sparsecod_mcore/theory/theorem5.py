"""Theorem 5: output variance of attention, grouped and multi-query attention.

The theorem's groups are of tokens: each query attends to the g keys of its own group (its proof, Eq. 84). Grouped-query
attention as models have it shares keys and values among heads, and each query sees all n keys: simulated beside it.

Axes: N samples, T keys, G key-value heads, H query heads.
"""

from collections.abc import Callable, Iterator

import numpy as np

from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Values
from sparsecod_mcore.theory.results import Check
from sparsecod_mcore.theory.theorem4 import softmax

KEYS, HEADS = 64, 8
GROUP_SIZES = (1, 4, 16, 64)  # of tokens
KEY_VALUE_HEADS = (8, 4, 2, 1)  # from multi-head to multi-query attention

type Draw = Callable[[np.random.Generator, int], Values]


def attention_variance(keys: int) -> float:
    """Eq. 78, and Eq. 80 of a multi-query head, for σ = 1: 1/n."""
    return 1 / keys


def grouped_variance(group_size: int) -> float:
    """Eq. 79: 1/g. With g ≤ n, more than attention over all n keys has, not less."""
    return 1 / group_size


def head_average_variance(keys: int, heads: int) -> float:
    """Section 3.2.2, of the average of H heads whose outputs are taken as independent: 1/(nH)."""
    return 1 / (keys * heads)


def shared_head_average_variance(keys: int, key_value_heads: int) -> float:
    """Of the same average where H/G heads share their values, and so, with uniform weights, their output: 1/(nG)."""
    return 1 / (keys * key_value_heads)


def head_outputs(rng: np.random.Generator, samples: int, key_value_heads: int, spread: float = 0.0) -> Values:
    """One coordinate of every head's output [N, H]; with `spread`, logits scatter and differ from head to head."""
    values_NGT = rng.standard_normal((samples, key_value_heads, KEYS))
    values_NHT = values_NGT.repeat(HEADS // key_value_heads, axis=1)
    weights_NHT = softmax(spread * rng.standard_normal((samples * HEADS, KEYS))).reshape(samples, HEADS, KEYS)
    return (weights_NHT * values_NHT).sum(2)


def _within_group(group_size: int) -> Draw:
    """Tokens in groups of `group_size`, each query over its own."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        groups = rng.standard_normal((samples, KEYS // group_size, group_size))
        return np.square(groups.mean(2)).mean(1)

    return draw


def _each_head(key_value_heads: int, spread: float = 0.0) -> Draw:
    return lambda rng, samples: np.square(head_outputs(rng, samples, key_value_heads, spread)).mean(1)


def _average(key_value_heads: int) -> Draw:
    return lambda rng, samples: np.square(head_outputs(rng, samples, key_value_heads).mean(1))


def _projected(key_value_heads: int) -> Draw:
    """Heads behind one row of an output projection, whose weights have the variance 1/H."""

    def draw(rng: np.random.Generator, samples: int) -> Values:
        outputs_NH = head_outputs(rng, samples, key_value_heads)
        return np.square((outputs_NH * rng.standard_normal(outputs_NH.shape)).sum(1)) / HEADS

    return draw


def checks(samples: int, seed: int) -> Iterator[Check]:
    """The theorem, and what grouped-query attention does."""
    in_groups = Claim(
        theorem=5, name="attention within groups of tokens", claim="Var = σ²/g", source="Eq. 79", varied="group_size"
    )
    yield in_groups.check(
        [Case({"group_size": size}, grouped_variance(size), _within_group(size)) for size in GROUP_SIZES],
        samples,
        seed,
    )

    def by_heads(claim: Claim, predicted: float, draw: Callable[[int], Draw], exact: Callable[[int], float]) -> Check:
        return claim.check(
            [
                Case({"key_value_heads": heads, "keys": KEYS}, predicted, draw(heads), exact(heads))
                for heads in KEY_VALUE_HEADS
            ],
            samples,
            seed,
        )

    law = attention_variance(KEYS)
    each = Claim(
        theorem=5,
        name="each head of grouped-query attention",
        claim="Var = σ²/n, however many heads share their keys and values",
        source="Eq. 78, 80",
        varied="key_value_heads",
    )
    yield by_heads(each, law, _each_head, lambda _: law)
    projected = Claim(
        theorem=5,
        name="behind a random output projection",
        claim="Var = σ²/n, however many heads share their keys and values",
        varied="key_value_heads",
    )
    yield by_heads(projected, law, _projected, lambda _: law)
    average = Claim(
        theorem=5,
        name="average of heads",
        claim="Var = σ²/(nH)",
        source="section 3.2.2",
        violated="outputs of heads are independent (those that share values are equal)",
        varied="key_value_heads",
    )
    yield by_heads(
        average,
        head_average_variance(KEYS, HEADS),
        _average,
        lambda heads: shared_head_average_variance(KEYS, heads),
    )
    sharp = Claim(
        theorem=5,
        name="softmax weights",
        claim="Var = σ²/n",
        source="Eq. 78, 80",
        violated="weights are uniform",
        varied="spread",
    )
    yield sharp.check(
        [Case({"spread": spread, "keys": KEYS}, law, _each_head(1, spread)) for spread in (0.5, 1.0, 2.0)],
        samples,
        seed,
    )
