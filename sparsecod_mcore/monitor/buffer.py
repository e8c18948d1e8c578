"""The device buffers that residual adds accumulate into.

Axes: I measured iterations since the last reduction, L layers of the whole model, A residual adds of a layer
(attention, MLP), M moments of one add.
"""

from collections.abc import Callable

import torch

from sparsecod_mcore.model.residual import ADDS_PER_LAYER
from sparsecod_mcore.monitor.columns import ColumnsBuffer
from sparsecod_mcore.ops import NUM_MOMENTS


class MomentsBuffer:
    """Sums [I, L, A, M] in float64, of one shape on every rank of every pipeline stage.

    Never sized by what a stage happens to hold: collectives over differently shaped buffers hang.
    """

    def __init__(
        self, capacity: int, num_layers: int, device: torch.types.Device, columns: ColumnsBuffer | None = None
    ) -> None:
        """`columns` is for the slots that also measure single dimensions."""
        shape = (capacity, num_layers, ADDS_PER_LAYER, NUM_MOMENTS)
        self.moments_ILAM = torch.zeros(shape, dtype=torch.float64, device=device)
        self.iterations: list[int] = []
        self._measuring = False
        self._columns = columns
        self._measuring_columns = False

    def begin(self, iteration: int, *, with_columns: bool = False) -> None:
        """Open a slot for `iteration`: residual adds accumulate into it until `end`."""
        assert not self.full, "reduce the buffer before it overflows"
        self.iterations.append(iteration)
        self._measuring = True
        self._measuring_columns = with_columns
        if with_columns:
            assert self._columns is not None
            self._columns.begin(iteration)

    def end(self) -> None:
        """Close the slot: residual adds are plain until the next `begin`."""
        self._measuring = self._measuring_columns = False

    @property
    def full(self) -> bool:
        return len(self.iterations) == self.moments_ILAM.shape[0]

    def moments(self, layer: int, add: int) -> torch.Tensor | None:
        """The open slot's moments [M] of one residual add, or None when this step is not measured."""
        return self.moments_ILAM[len(self.iterations) - 1, layer, add] if self._measuring else None

    def columns(self, layer: int, add: int, mean: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The open slot's column sums [C, D] of one residual add, or None where single dimensions are not measured."""
        if not self._measuring_columns:
            return None
        assert self._columns is not None
        return self._columns.sums(layer, add, mean)

    def clear(self) -> None:
        """Forget every slot."""
        self.moments_ILAM.zero_()
        self.iterations.clear()
        self.end()
        if self._columns is not None:
            self._columns.clear()
