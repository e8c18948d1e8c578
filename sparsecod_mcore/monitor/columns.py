"""Moments of each dimension of the residual stream over tokens, from which comes its kurtosis (Eq. 19, 20).

Axes: L layers of the whole model, A residual adds of a layer, C sums of a column, D hidden dimensions.
"""

from collections.abc import Callable, Mapping

import torch

from sparsecod_mcore.model.residual import ADDS_PER_LAYER
from sparsecod_mcore.monitor.statistics import SUM_STREAM, LayerStatistics
from sparsecod_mcore.ops import NUM_COLUMN_SUMS, ColumnSum


class ColumnsBuffer:
    """Sums [L, A, C, D] of one iteration, in float64, of one shape on every rank of every pipeline stage."""

    def __init__(self, num_layers: int, hidden_size: int, device: torch.types.Device) -> None:
        shape = (num_layers, ADDS_PER_LAYER, NUM_COLUMN_SUMS, hidden_size)
        self.sums_LACD = torch.zeros(shape, dtype=torch.float64, device=device)
        self.iteration: int | None = None
        self._shifted: set[tuple[int, int]] = set()

    def begin(self, iteration: int) -> None:
        """Take the sums of `iteration` from now on."""
        assert self.iteration is None, "reduce the buffer before it is used again"
        self.iteration = iteration

    def sums(self, layer: int, add: int, mean: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The sums [C, D] of one residual add; the first time about `mean()` [D], of any tokens.

        The mean of the first microbatch is close enough to the mean of all for no digit to be lost.
        """
        sums_CD = self.sums_LACD[layer, add]
        if (layer, add) not in self._shifted:
            self._shifted.add((layer, add))
            sums_CD[ColumnSum.SHIFT] = mean().float()
        return sums_CD

    def clear(self) -> None:
        """Forget the iteration."""
        self.sums_LACD.zero_()
        self.iteration = None
        self._shifted.clear()


class DimensionMoments:
    """Mean, variance and kurtosis of every dimension of y over all tokens of one iteration, each [L, A, D]."""

    def __init__(self, mean_LAD: torch.Tensor, second_LAD: torch.Tensor, fourth_LAD: torch.Tensor) -> None:
        """From central moments. A dimension that is constant counts kurtosis 0."""
        self.mean_LAD, self.variance_LAD = mean_LAD, second_LAD
        self.kurtosis_LAD = torch.where(second_LAD == 0, 0, fourth_LAD / second_LAD.square())

    def statistics(self, streams: Mapping[int, str] = SUM_STREAM) -> LayerStatistics:
        """The layer's kurtosis (Eq. 20: the mean over dimensions), and the largest of a dimension.

        `streams` names what was measured in the place of each add.
        """
        statistics: LayerStatistics = {}
        for add, stream in streams.items():
            statistics[stream, "dimension_kurtosis"] = self.kurtosis_LAD[:, add].mean(-1)
            statistics[stream, "max_dimension_kurtosis"] = self.kurtosis_LAD[:, add].amax(-1)
        return statistics
