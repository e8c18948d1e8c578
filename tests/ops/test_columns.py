"""Power sums of columns, and the kurtosis of each dimension that comes of them (Eq. 19)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsecod_mcore import _C
from sparsecod_mcore.ops import (
    NUM_COLUMN_SUMS,
    ColumnSum,
    Moment,
    residual_add_moments,
    residual_add_moments_reference,
)
from tests.cuda_emulator import operators as emulated
from tests.ops import oracle
from tests.ops.oracle import Case

OPERATORS = {
    "cpu": residual_add_moments,
    "reference": residual_add_moments_reference,
    "emulator": emulated.residual_add_moments,
}


def column_sums(shift_D: Tensor) -> Tensor:
    columns = torch.zeros(NUM_COLUMN_SUMS, len(shift_D), dtype=torch.float64)
    columns[ColumnSum.SHIFT] = shift_D.float()
    return columns


def outlier_dimensions(rows: int, width: int) -> Case:
    """Dimensions whose mean is a thousand times their spread, one that is heavy-tailed, and a token of huge values."""
    branch, residual = torch.randn(rows, width), torch.randn(rows, width)
    residual[:, 0] += 1000
    branch[:, width // 2] *= branch[:, width // 2].square()
    residual[rows // 2] *= 30
    return Case(branch, residual, 0.1 * torch.randn(width))


def kurtosis(y_ND: Tensor) -> Tensor:
    """Eq. 19 as PyTorch computes it in the dtype of y."""
    distance_ND = y_ND - y_ND.mean(0)
    return (distance_ND**4).mean(0) / (distance_ND**2).mean(0).square()


def kurtosis_of(columns: Tensor, tokens: int) -> Tensor:
    first, second, third, fourth = columns[ColumnSum.FIRST :] / tokens
    variance = second - first**2
    return (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width"), [(97, 59), (123, 96), (40, 264), (31, 1120), (9, 2056), (5, 4100), (3, 8200)]
)
def test_sums_of_powers(operator: Callable[..., Tensor], dtype: torch.dtype, rows: int, width: int) -> None:
    """Within float32's rounding of the sum of magnitudes; y and the moments are as without columns."""
    torch.manual_seed(width)
    case = outlier_dimensions(rows, width).to(dtype)
    y_ND = oracle.output(case).double()
    columns, moments = column_sums(y_ND.mean(0)), oracle.no_moments()
    output = operator(case.branch, case.residual, moments, case.bias, columns)
    assert torch.equal(output, oracle.output(case).to(dtype))
    assert oracle.error(moments, oracle.moments(case)).max() < 1e-5
    distance_ND = y_ND - columns[ColumnSum.SHIFT]
    for power, name in enumerate(list(ColumnSum)[1:], start=1):
        error_D = (columns[name] - (distance_ND**power).sum(0)).abs()
        assert (error_D <= 1e-6 * (distance_ND.abs() ** power).sum(0)).all(), name


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kurtosis_is_as_accurate_as_in_pytorch(operator: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = outlier_dimensions(200, 96).to(dtype)
    y_ND = oracle.output(case)
    expected_D = kurtosis(y_ND.double())
    columns = column_sums(y_ND[:50].mean(0))  # of other tokens than it is used for, as in training
    for part in (slice(0, 120), slice(120, 200)):
        operator(case.branch[part], case.residual[part], oracle.no_moments(), case.bias, columns)
    error_D = (kurtosis_of(columns, 200) / expected_D - 1).abs()
    composite_error_D = (kurtosis(y_ND) / expected_D - 1).abs()
    assert error_D.max() <= 2 * composite_error_D.max()


def test_float64_and_gradients() -> None:
    torch.manual_seed(0)
    case = outlier_dimensions(20, 33).to(torch.float64)
    y_ND = case.branch + case.bias + case.residual
    columns = column_sums(y_ND.mean(0))
    output = residual_add_moments(case.branch.requires_grad_(), case.residual, oracle.no_moments(), case.bias, columns)
    output.sum().backward()
    assert torch.equal(case.branch.grad, torch.ones_like(case.branch))
    distance_ND = y_ND - columns[ColumnSum.SHIFT]
    torch.testing.assert_close(columns[ColumnSum.FOURTH], (distance_ND**4).sum(0), rtol=1e-12, atol=0)


def test_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    branch, residual = torch.randn(300, 500), torch.randn(300, 500)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(column_sums(torch.zeros(500)))
            residual_add_moments(branch, residual, oracle.no_moments(), None, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(columns, results[0]) for columns in results)


def test_columns_that_do_not_fit() -> None:
    x = torch.zeros(3, 8)
    columns = torch.zeros(NUM_COLUMN_SUMS, 8, dtype=torch.float64)
    for given, told in [
        (columns[:4], "columns has shape [4, 8], but must have shape [5, 8]"),
        (columns.float(), "columns is float32, but must be float64"),
        (columns.t().contiguous().t(), "columns has stride [1, 5], but must be contiguous"),
        (columns.clone().requires_grad_(), "columns requires a gradient, but must not"),
    ]:
        with pytest.raises(ValueError) as error:
            residual_add_moments(x, x, oracle.no_moments(), None, given)
        assert str(error.value) == told
    residual_add_moments(x[:0], x[:0], oracle.no_moments(), None, columns)
    assert not columns.any()


def test_python_and_cpp_name_the_same_sums() -> None:
    assert [name.name for name in ColumnSum] == _C.COLUMN_SUM_NAMES
    assert Moment.TOKENS.name in _C.MOMENT_NAMES
