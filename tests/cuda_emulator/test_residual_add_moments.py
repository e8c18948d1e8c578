"""The CUDA kernels of residual_add_moments in the emulator; every launch runs in several orders, to the same bits."""

import pytest
import torch

from sparsecod_mcore.ops import Moment, residual_add_moments_reference
from tests.cuda_emulator.operators import residual_add_moments
from tests.ops import oracle
from tests.ops.oracle import Case
from tests.ops.test_accuracy import DISTRIBUTIONS, ROUNDING, activations, measure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A warp per row, of one pack a lane and of four; a block per row, of odd lengths; rows that are not aligned, or too
# long for registers. Rows are more than the emulated device holds at a time.
SHAPES = ((1, 8), (71, 40), (37, 120), (100, 59), (50, 512), (20, 1120), (5, 2048), (3, 8192), (2, 16392))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_the_composite(distribution, dtype):
    torch.manual_seed(0)
    errors, composite_errors = [], []
    for rows, width in SHAPES:
        case = distribution(rows, width).to(dtype)
        expected = oracle.moments(case)
        output, moments = measure(residual_add_moments, case)
        composite_output, composite_moments = measure(residual_add_moments_reference, case)
        assert torch.equal(output, composite_output)
        errors.append(oracle.error(moments, expected))
        composite_errors.append(oracle.error(composite_moments, expected))
    error = torch.stack(errors).amax(0)
    allowed = 2 * torch.stack(composite_errors).amax(0) + ROUNDING
    assert not [f"{m.name}: {error[m]:.1e} > {allowed[m]:.1e}" for m in Moment if error[m] > allowed[m]]


@pytest.mark.parametrize("width", [128, 192, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_moment_of_activations_is_within_1e_5_of_float64(width, dtype):
    torch.manual_seed(width)
    case = activations(64, width).to(dtype)
    _, moments = measure(residual_add_moments, case)
    torch.testing.assert_close(moments, oracle.moments(case), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 333, 1200])
def test_constant_tokens_have_no_variance_and_no_kurtosis(dtype, width):
    constant = torch.tensor([[0.1], [0.0], [-7e3], [3.3]], dtype=dtype).expand(4, width)
    moments = oracle.no_moments()
    residual_add_moments(constant, constant / 3, moments)
    for name in ("VARIANCE", "FOURTH_MOMENT", "KURTOSIS"):
        assert [moments[Moment[f"{operand}_{name}"]].item() for operand in oracle.OPERANDS] == [0, 0, 0]
    squared_mean = constant[:, 0].double().square().sum()
    torch.testing.assert_close(moments[Moment.BRANCH_SQUARED_MEAN], squared_mean, rtol=1e-7, atol=0)
    assert moments[Moment.COVARIANCE] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 70, 128, 1200])
def test_elements_that_are_not_finite_are_counted_and_not_hidden(dtype, width):
    torch.manual_seed(0)
    branch, residual = torch.randn(6, width).to(dtype), torch.randn(6, width).to(dtype)
    branch[1, 0], branch[2, -1], branch[4, width // 2] = torch.inf, -torch.inf, torch.nan
    residual[1, 0] = -torch.inf
    moments = oracle.no_moments()
    output = residual_add_moments(branch, residual, moments)
    torch.testing.assert_close(output, branch + residual, equal_nan=True)
    for operand, x in (("BRANCH", branch), ("RESIDUAL", residual), ("OUTPUT", oracle.output(Case(branch, residual)))):
        assert moments[Moment[f"{operand}_NONFINITE"]] == (~x.isfinite()).sum()
        assert moments[Moment[f"{operand}_MAX"]] == x[x.isfinite()].abs().max()
        for name in ("VARIANCE", "SQUARED_MEAN", "FOURTH_MOMENT", "KURTOSIS"):
            assert moments[Moment[f"{operand}_{name}"]].isnan()
    assert moments[Moment.COVARIANCE].isnan()
    assert moments[Moment.TOKENS] == 6


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
def test_powers_beyond_the_range_of_float32(scale):
    torch.manual_seed(0)
    case = Case(torch.randn(7, 300) * scale, torch.randn(7, 300) * scale)
    _, moments = measure(residual_add_moments, case)
    assert oracle.error(moments, oracle.moments(case)).max() < 1e-5


def test_launches_add_to_the_moments():
    torch.manual_seed(0)
    branch, residual = torch.randn(12, 40), torch.randn(12, 40)
    whole, parts = oracle.no_moments(), oracle.no_moments()
    residual_add_moments(branch, residual, whole)
    for i in range(0, 12, 4):
        residual_add_moments(branch[i : i + 4], residual[i : i + 4], parts)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
