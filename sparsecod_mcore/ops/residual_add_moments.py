"""The residual add that measures what it adds.

y = f + h, with f = branch + bias what a layer's attention or MLP adds, and h the residual stream. The kernels are
csrc/cpu/residual_add_moments.cpp and csrc/cuda/residual_add_moments.cu, the maths of both csrc/common/moments.h.
"""

from enum import IntEnum, auto

import torch
from torch import Tensor

from sparsecod_mcore import _C
from sparsecod_mcore.ops.cuda_build import register_cuda_fallback


class Moment(IntEnum):
    """Index into the moments of a residual add, a float64 vector; csrc/common/moments.h has the same list.

    All are sums over tokens, but for the maxima: so moments of different tokens combine by addition (and
    maximum), and a mean over tokens is a sum divided by TOKENS. For x one of f, h and y over the width of one
    token, and m its mean:

    VARIANCE        mean (x - m)^2, the population variance of Eq. 4
    SQUARED_MEAN    m^2
    FOURTH_MOMENT   mean (x - m)^4
    KURTOSIS        mean (x - m)^4 / variance^2, not excess; 0 for a constant token
    MAX             largest |x| among finite elements
    NONFINITE       number of elements that are NaN or infinite
    COVARIANCE      mean (f - m_f) (h - m_h), so that Var(y) = Var(f) + Var(h) + 2 Cov(f, h)

    An element that is not finite makes the sums of its operand NaN.
    """

    BRANCH_VARIANCE = 0
    BRANCH_SQUARED_MEAN = auto()
    BRANCH_FOURTH_MOMENT = auto()
    BRANCH_KURTOSIS = auto()
    BRANCH_MAX = auto()
    BRANCH_NONFINITE = auto()
    RESIDUAL_VARIANCE = auto()
    RESIDUAL_SQUARED_MEAN = auto()
    RESIDUAL_FOURTH_MOMENT = auto()
    RESIDUAL_KURTOSIS = auto()
    RESIDUAL_MAX = auto()
    RESIDUAL_NONFINITE = auto()
    OUTPUT_VARIANCE = auto()
    OUTPUT_SQUARED_MEAN = auto()
    OUTPUT_FOURTH_MOMENT = auto()
    OUTPUT_KURTOSIS = auto()
    OUTPUT_MAX = auto()
    OUTPUT_NONFINITE = auto()
    COVARIANCE = auto()
    TOKENS = auto()


class ColumnSum(IntEnum):
    """Row of the column sums [NUM_COLUMN_SUMS, D], float64; csrc/common/columns.h has the same list.

    SHIFT is set by the caller, to values that float32 can hold, near the column's mean: the sums are those of powers of
    y - SHIFT, and a mean that is large against the spread would cost their digits. Sums of one shift combine by
    addition; from them and the number of tokens come the moments of each dimension (Eq. 19). CUDA kernels take powers
    in float32: a distance to SHIFT of 4e9 and more makes FOURTH infinite there.
    """

    SHIFT = 0
    FIRST = auto()
    SECOND = auto()
    THIRD = auto()
    FOURTH = auto()


NUM_MOMENTS = len(Moment)
NUM_COLUMN_SUMS = len(ColumnSum)
_OPERATOR = torch.ops.sparsecod.residual_add_moments.default
_MAXIMA = slice(Moment.BRANCH_MAX, Moment.OUTPUT_MAX + 1, Moment.RESIDUAL_MAX - Moment.BRANCH_MAX)


def residual_add_moments(
    branch: Tensor, residual: Tensor, moments: Tensor, bias: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Return y = branch + bias + residual; add the moments of branch + bias, residual and y to `moments`.

    y is formed in float32 (float64 for float64), measured, and only then rounded to the inputs' dtype.
    Gradients pass to `branch` and `residual` unchanged and to `bias` summed over tokens. Every call adds to
    `moments`, a recomputed forward as well; an empty input adds nothing.

    Args:
        branch: [..., D], float32, bfloat16, float16, or on CPU float64; of any strides.
        residual: [..., D], of the shape, dtype and device of `branch`.
        moments: [NUM_MOMENTS], float64, contiguous, on the device of `branch`; indexed by `Moment`.
        bias: [D], of the dtype and device of `branch`, or None.
        columns: [NUM_COLUMN_SUMS, D], float64, contiguous, on the device of `branch`; indexed by `ColumnSum`: power
            sums of the columns of y are added to it. None does without, and is faster.

    Returns:
        y, contiguous, of the shape and dtype of `branch`.

    Raises:
        ValueError: names the argument that does not fit, what was given and what is accepted.
    """
    return _OPERATOR(branch, residual, bias, moments, columns)


def residual_add_moments_reference(
    branch: Tensor, residual: Tensor, moments: Tensor, bias: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """`residual_add_moments` in plain PyTorch, for any device and without waiting for it."""
    _C.check_residual_add_moments(branch, residual, bias, moments, columns)
    dtype = torch.float64 if branch.dtype == torch.float64 else torch.float32
    f, h = branch.to(dtype), residual.to(dtype)
    if bias is not None:
        f = f + bias.to(dtype)
    y = f + h
    if y.numel() > 0:
        with torch.no_grad():
            _accumulate(moments, *(x.reshape(-1, x.shape[-1]) for x in (f, h, y)))
            if columns is not None:
                distance_ND = y.reshape(-1, y.shape[-1]).double() - columns[ColumnSum.SHIFT]
                columns[ColumnSum.FIRST :] += torch.stack([(distance_ND**power).sum(0) for power in (1, 2, 3, 4)])
    return y.to(branch.dtype).contiguous()


def _accumulate(moments: Tensor, *operands_ND: Tensor) -> None:
    sums, distances_ND = [], []
    for x_ND in operands_ND:
        finite_ND = x_ND.isfinite()
        lowest_N1, highest_N1 = x_ND.where(finite_ND, 0).aminmax(dim=-1, keepdim=True)
        # The mean of a constant token may be off by its rounding, which would pass for variance.
        mean_N1 = lowest_N1.where(lowest_N1 == highest_N1, x_ND.mean(-1, keepdim=True))
        mean_N1 = mean_N1.where(finite_ND.all(-1, keepdim=True), torch.nan)
        distance_ND = x_ND - mean_N1
        square_ND = distance_ND * distance_ND
        variance_N, fourth_N = square_ND.mean(-1), (square_ND * square_ND).mean(-1)
        kurtosis_N = (fourth_N / variance_N.square()).where(variance_N != 0, 0)
        per_token_N = (variance_N, mean_N1.square(), fourth_N, kurtosis_N)
        sums += [x_N.sum(dtype=torch.float64) for x_N in per_token_N]
        sums += [torch.maximum(highest_N1.amax(), -lowest_N1.amin()).double(), (~finite_ND).sum().double()]
        distances_ND.append(distance_ND)
    sums.append((distances_ND[0] * distances_ND[1]).mean(-1).sum(dtype=torch.float64))
    added = torch.stack(sums)
    maxima = torch.maximum(moments[_MAXIMA], added[_MAXIMA])
    moments[: len(sums)] += added
    moments[_MAXIMA] = maxima
    moments[Moment.TOKENS] += len(operands_ND[0])


def _reference_of_schema(
    branch: Tensor, residual: Tensor, bias: Tensor | None, moments: Tensor, columns: Tensor | None
) -> Tensor:
    return residual_add_moments_reference(branch, residual, moments, bias, columns)


register_cuda_fallback("residual_add_moments", _reference_of_schema)
