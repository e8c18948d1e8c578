"""The best linear map for a layer, as exact as float64 least squares over all tokens at once (Eq. 9).

Axes: M tokens of a block, D hidden width, K = D + 1 columns of inputs with a leading one for the bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch


class LeastSquares:
    """min over W, b of Σ_t ‖W x_t + b − y_t‖², of tokens that come block by block.

    Keeps the triangular factor of a QR decomposition of [1 X | Y], brought up to date with each block by orthogonal
    transformations: nothing is squared as in normal equations, so columns of very different scales (outlier
    dimensions) lose no digits to each other. The solution is found from the factor as if from the tokens themselves:
    it has the same singular values.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.tokens = 0
        self.factor_KC = torch.zeros(0, 2 * width + 1, dtype=torch.float64, device=device)

    @staticmethod
    def held_bytes(width: int) -> int:
        """What the factor takes, whatever the number of tokens."""
        return (width + 1) * (2 * width + 1) * torch.float64.itemsize

    def add(self, x_MD: torch.Tensor, y_MD: torch.Tensor) -> None:
        """Take in inputs `x_MD` and the outputs `y_MD` that belong to them."""
        x_MD, y_MD = x_MD.double(), y_MD.double()
        self._stack(torch.cat((x_MD.new_ones(len(x_MD), 1), x_MD, y_MD), dim=1), len(x_MD))

    def merge(self, other: Self) -> None:
        """Take in what `other` has taken in."""
        self._stack(other.factor_KC, other.tokens)

    def _stack(self, rows_MC: torch.Tensor, tokens: int) -> None:
        self.tokens += tokens
        _, factor_KC = torch.linalg.qr(torch.cat((self.factor_KC, rows_MC)), mode="r")
        # What is below would only tell how well Y is met.
        self.factor_KC = factor_KC[: self.width + 1].clone()

    def to(self, device: torch.device | str) -> Self:
        """This, with its factor on `device`."""
        self.factor_KC = self.factor_KC.to(device)
        return self

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W [D, D] and b [D], float64: of all solutions the smallest, with the usual cut-off of the rank."""
        columns = self.width + 1
        factor_KC = self.factor_KC.cpu().numpy()
        cut_off = np.finfo(np.float64).eps * max(self.tokens, columns)
        solution_KD = np.linalg.lstsq(factor_KC[:, :columns], factor_KC[:, columns:], rcond=cut_off)[0]
        bias_D, weight_DD = solution_KD[0], solution_KD[1:].T
        device = self.factor_KC.device
        return torch.from_numpy(weight_DD.copy()).to(device), torch.from_numpy(bias_D.copy()).to(device)


def merged(fits: Sequence[LeastSquares]) -> LeastSquares:
    """What all of `fits` have taken in, put together in their order: the same bits wherever it is done."""
    first, *others = fits
    for other in others:
        first.merge(other)
    return first


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x → W (x − c) + b in float32, rounded to the dtype of x."""

    weight_DD: torch.Tensor
    centre_D: torch.Tensor
    offset_D: torch.Tensor

    @classmethod
    def fitted(cls, fit: LeastSquares, *, reference: bool = False) -> Self:
        """The solution of `fit`, with inputs centred so that float32 loses nothing to a large mean.

        With `reference`, what the paper's published scripts use in its stead: W transposed, and W and b rounded to
        bfloat16.
        """
        weight_DD, bias_D = fit.solve()
        if reference:
            weight_DD, bias_D = weight_DD.T.bfloat16(), bias_D.bfloat16()
            return cls(weight_DD.float().contiguous(), torch.zeros_like(bias_D).float(), bias_D.float())
        # The factor's first row is the mean of every column, times √N.
        mean_C = fit.factor_KC[0] / fit.factor_KC[0, 0]
        return cls(weight_DD.float(), mean_C[1 : fit.width + 1].float(), mean_C[fit.width + 1 :].float())

    def to(self, device: torch.device | str) -> Self:
        """The same map on `device`."""
        return type(self)(self.weight_DD.to(device), self.centre_D.to(device), self.offset_D.to(device))

    def __call__(self, x_SBD: torch.Tensor) -> torch.Tensor:
        centred_SBD = x_SBD.float() - self.centre_D
        return torch.nn.functional.linear(centred_SBD, self.weight_DD, self.offset_D).to(x_SBD.dtype)
