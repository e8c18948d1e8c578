"""Moments of a residual add in float64, written for clarity: what the operator is tested against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_mcore.ops import NUM_MOMENTS, Moment

OPERANDS = ("BRANCH", "RESIDUAL", "OUTPUT")


@dataclass
class Case:
    """Arguments of one residual add: branch and residual [..., D], bias [D] or None."""

    branch: Tensor
    residual: Tensor
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        bias = None if self.bias is None else self.bias.to(dtype)
        return Case(self.branch.to(dtype), self.residual.to(dtype), bias)


def no_moments() -> Tensor:
    return torch.zeros(NUM_MOMENTS, dtype=torch.float64)


def output(case: Case) -> Tensor:
    """y before it is rounded: formed in float32, and in float64 for float64 inputs."""
    dtype = torch.promote_types(case.branch.dtype, torch.float32)
    branch = case.branch.to(dtype) if case.bias is None else case.branch.to(dtype) + case.bias.to(dtype)
    return branch + case.residual.to(dtype)


def moments(case: Case) -> Tensor:
    """The moments [NUM_MOMENTS] of finite operands."""
    dtype = torch.promote_types(case.branch.dtype, torch.float32)
    branch = case.branch.to(dtype) if case.bias is None else case.branch.to(dtype) + case.bias.to(dtype)
    operands = [x.double().reshape(-1, x.shape[-1]) for x in (branch, case.residual, output(case))]
    expected = no_moments()
    for name, x_ND in zip(OPERANDS, operands, strict=True):
        varies_N = x_ND.amin(-1) != x_ND.amax(-1)
        variance_N = torch.where(varies_N, x_ND.var(-1, correction=0), 0)
        fourth_N = torch.where(varies_N, (x_ND - x_ND.mean(-1, keepdim=True)).square().square().mean(-1), 0)
        expected[Moment[f"{name}_VARIANCE"]] = variance_N.sum()
        expected[Moment[f"{name}_SQUARED_MEAN"]] = x_ND.mean(-1).square().sum()
        expected[Moment[f"{name}_FOURTH_MOMENT"]] = fourth_N.sum()
        expected[Moment[f"{name}_KURTOSIS"]] = (fourth_N / variance_N.square())[varies_N].sum()
        expected[Moment[f"{name}_MAX"]] = x_ND.abs().max()
    branch_ND, residual_ND, _ = (x_ND - x_ND.mean(-1, keepdim=True) for x_ND in operands)
    expected[Moment.COVARIANCE] = (branch_ND * residual_ND).mean(-1).sum()
    expected[Moment.TOKENS] = len(branch_ND)
    return expected


def error(measured: Tensor, expected: Tensor) -> Tensor:
    """Error of each moment, relative to it; where terms may cancel, relative to what bounds their sum."""
    scale = expected.abs()
    for name in OPERANDS:
        squared_mean, variance = expected[Moment[f"{name}_SQUARED_MEAN"]], expected[Moment[f"{name}_VARIANCE"]]
        scale[Moment[f"{name}_SQUARED_MEAN"]] = (squared_mean * (squared_mean + variance)).sqrt()
    scale[Moment.COVARIANCE] = (expected[Moment.BRANCH_VARIANCE] * expected[Moment.RESIDUAL_VARIANCE]).sqrt()
    return (measured - expected).abs() / scale.where(scale > 0, 1)
