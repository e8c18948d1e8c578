"""Moments against float64, and against what the same formulas give in PyTorch's float32."""

from collections.abc import Callable

import pytest
import torch

from sparsecod_mcore.ops import Moment, residual_add_moments, residual_add_moments_reference
from tests.ops import oracle
from tests.ops.oracle import Case

# rows -> how often random numbers are drawn: few numbers may round well or badly by chance, so the worst draws compare.
DRAWS = {1: 6, 5: 3, 97: 1, 123: 1, 1025: 1}
WIDTHS = (1, 59, 96, 1120, 2048, 8192)
MAX_ELEMENTS = 100_000  # larger products would add nothing but time
ROUNDING = 4 * torch.finfo(torch.float32).eps


def normal(rows: int, width: int) -> Case:
    return Case(torch.randn(rows, width) * 0.3, torch.randn(rows, width) * 2)


def large_mean(rows: int, width: int) -> Case:
    return Case(torch.randn(rows, width) + 1e4, torch.randn(rows, width) - 3e3)


def outliers(rows: int, width: int) -> Case:
    case = normal(rows, width)
    case.branch[:, width // 2] = 1e4
    case.residual[:, 0] = -1e4
    return case


def skewed_with_mean(rows: int, width: int) -> Case:
    return Case(torch.randn(rows, width).exp() + 10, torch.randn(rows, width).exp() - 10)


def cancelling(rows: int, width: int) -> Case:
    residual = torch.randn(rows, width)
    return Case(-residual + 1e-2 * torch.randn(rows, width), residual)


DISTRIBUTIONS = (normal, large_mean, outliers, skewed_with_mean, cancelling)


def activations(tokens: int, width: int) -> Case:
    """Like a trained residual stream: dimensions of very different scales, a few outliers, a correlated branch."""
    scale_D = (0.8 * torch.randn(width)).exp()
    scale_D[torch.randperm(width)[:3]] *= 40
    residual = torch.randn(tokens, width) * scale_D + 0.1 * torch.randn(width)
    mixing = torch.randn(width, width) / width**0.5
    branch = torch.nn.functional.gelu(residual @ mixing) @ mixing.T - 0.2 * residual
    return Case(branch, residual, bias=0.05 * torch.randn(width))


def measure(operator: Callable[..., torch.Tensor], case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    moments = oracle.no_moments()
    return operator(case.branch, case.residual, moments, case.bias), moments


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_at_most_twice_that_of_the_composite(distribution, dtype, width):
    torch.manual_seed(width)
    for rows, draws in DRAWS.items():
        if rows * width > MAX_ELEMENTS:
            continue
        errors, composite_errors = [], []
        for _ in range(draws):
            case = distribution(rows, width).to(dtype)
            expected = oracle.moments(case)
            output, moments = measure(residual_add_moments, case)
            composite_output, composite_moments = measure(residual_add_moments_reference, case)
            errors.append(oracle.error(moments, expected))
            composite_errors.append(oracle.error(composite_moments, expected))
            assert torch.equal(output, oracle.output(case).to(dtype))
            assert torch.equal(output, composite_output)
        error = torch.stack(errors).amax(0)
        allowed = 2 * torch.stack(composite_errors).amax(0) + ROUNDING
        worse = [f"{m.name}: {error[m]:.1e} > {allowed[m]:.1e}" for m in Moment if error[m] > allowed[m]]
        assert not worse, f"{rows} x {width}: {worse}"


@pytest.mark.parametrize("width", [128, 192, 1000])
def test_every_moment_of_activations_is_within_1e_5_of_float64(width):
    torch.manual_seed(width)
    case = activations(512, width)
    _, moments = measure(residual_add_moments, case)
    torch.testing.assert_close(moments, oracle.moments(case), rtol=1e-5, atol=0)


def test_float64_is_measured_in_float64():
    torch.manual_seed(0)
    case = skewed_with_mean(31, 517).to(torch.float64)
    output, moments = measure(residual_add_moments, case)
    assert torch.equal(output, case.branch + case.residual)
    torch.testing.assert_close(moments, oracle.moments(case), rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
def test_powers_beyond_the_range_of_float32(scale):
    torch.manual_seed(0)
    case = Case(torch.randn(7, 300) * scale, torch.randn(7, 300) * scale)
    _, moments = measure(residual_add_moments, case)
    assert oracle.error(moments, oracle.moments(case)).max() < 1e-5
