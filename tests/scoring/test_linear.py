"""Linear substitutes are as good as float64 least squares over all tokens at once."""

import numpy as np
import pytest
import torch

from sparsecod_mcore.scoring.linear import LeastSquares, LinearMap, merged

D = 24
GENERATOR = np.random.default_rng(0)


def outliers(tokens: int) -> np.ndarray:
    """Like a residual stream: two dimensions a thousand times the rest, one almost constant; two that nearly agree."""
    x_MD = GENERATOR.standard_normal((tokens, D)).astype(np.float32)
    x_MD[:, 3] = 1000 + x_MD[:, 3]
    x_MD[:, 7] *= 3000
    x_MD[:, 9] = x_MD[:, 8] + 1e-4 * x_MD[:, 9]
    return x_MD


def fit(x_MD: np.ndarray, y_MD: np.ndarray, block: int) -> LeastSquares:
    fits = [LeastSquares(D, torch.device("cpu")) for _ in range(2)]
    for begin in range(0, len(x_MD), block):
        rows = slice(begin, begin + block)
        fits[begin // block % 2].add(torch.from_numpy(x_MD[rows]), torch.from_numpy(y_MD[rows]))
    return merged(fits)


def by_lstsq(x_MD: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """[b; W^T] by LAPACK, over all tokens."""
    a_MK = np.concatenate([np.ones((len(x_MD), 1)), x_MD], axis=1)
    return np.linalg.lstsq(a_MK, y_MD.astype(np.float64), rcond=None)[0]


def error(x_MD: np.ndarray, y_MD: np.ndarray, weight_DD: np.ndarray, bias_D: np.ndarray) -> float:
    return float(np.linalg.norm(x_MD.astype(np.float64) @ weight_DD.T + bias_D - y_MD))


@pytest.mark.parametrize("block", [5, 97, 400])
def test_as_exact_as_lstsq_with_outliers(block: int) -> None:
    x_MD = outliers(400)
    y_MD = (x_MD + np.tanh(x_MD @ GENERATOR.standard_normal((D, D)))).astype(np.float32)
    expected = by_lstsq(x_MD, y_MD)
    weight_DD, bias_D = (x.numpy() for x in fit(x_MD, y_MD, block).solve())
    np.testing.assert_allclose(weight_DD, expected[1:].T, rtol=1e-6, atol=1e-7)
    best = error(x_MD, y_MD, expected[1:].T, expected[0])
    assert error(x_MD, y_MD, weight_DD, bias_D) <= best * (1 + 1e-10)
    # Normal equations in float64 are not: they lose half the digits.
    a_MK = np.concatenate([np.ones((len(x_MD), 1)), x_MD], axis=1)
    squared = np.linalg.solve(a_MK.T @ a_MK, a_MK.T @ y_MD.astype(np.float64))
    assert np.abs(squared - expected).max() > 100 * np.abs(weight_DD - expected[1:].T).max()


def test_a_map_in_float32_loses_nothing_to_a_large_mean() -> None:
    x_MD = outliers(400)
    weight_DD = GENERATOR.standard_normal((D, D))
    y_MD = ((x_MD.astype(np.float64) - x_MD.mean(0)) @ weight_DD.T / 100).astype(np.float32)
    found = LinearMap.fitted(fit(x_MD, y_MD, 100))(torch.from_numpy(x_MD))
    np.testing.assert_allclose(found.numpy(), y_MD, rtol=1e-6, atol=2e-5 * np.abs(y_MD).max() / 100)


@pytest.mark.parametrize("tokens", [10, D, 200])
def test_of_many_solutions_the_smallest(tokens: int) -> None:
    """Fewer tokens than dimensions, and dimensions that repeat others: as LAPACK, over all tokens."""
    x_MD = GENERATOR.standard_normal((tokens, D)).astype(np.float32)
    x_MD[:, 5] = x_MD[:, 4]
    x_MD[:, 6] = 0
    y_MD = GENERATOR.standard_normal((tokens, D)).astype(np.float32)
    weight_DD, bias_D = fit(x_MD, y_MD, 7).solve()
    solution = np.concatenate([bias_D.numpy()[None], weight_DD.numpy().T])
    np.testing.assert_allclose(solution, by_lstsq(x_MD, y_MD), rtol=0, atol=1e-9)


def test_reference_applies_the_transpose_in_bfloat16() -> None:
    x_MD, y_MD = (GENERATOR.standard_normal((100, D)).astype(np.float32) for _ in range(2))
    solution = by_lstsq(x_MD, y_MD)
    weight_DD = torch.from_numpy(solution[1:]).bfloat16().float()  # the solution itself, which is W^T
    bias_D = torch.from_numpy(solution[0]).bfloat16().float()
    x = torch.from_numpy(x_MD)
    found = LinearMap.fitted(fit(x_MD, y_MD, 30), reference=True)(x)
    torch.testing.assert_close(found, x @ weight_DD.T + bias_D)
