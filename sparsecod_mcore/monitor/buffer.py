"""The device buffer that residual adds accumulate into.

Axes: I measured iterations since the last reduction, L layers of the whole model, A residual adds of a layer
(attention, MLP), M moments of one add.
"""

import torch

from sparsecod_mcore.ops import NUM_MOMENTS

ADDS_PER_LAYER = 2


class MomentsBuffer:
    """Sums [I, L, A, M] in float64, of one shape on every rank of every pipeline stage.

    Never sized by what a stage happens to hold: collectives over differently shaped buffers hang.
    """

    def __init__(self, capacity: int, num_layers: int, device: torch.types.Device) -> None:
        shape = (capacity, num_layers, ADDS_PER_LAYER, NUM_MOMENTS)
        self.moments_ILAM = torch.zeros(shape, dtype=torch.float64, device=device)
        self.iterations: list[int] = []
        self._measuring = False

    def begin(self, iteration: int) -> None:
        """Open a slot for `iteration`: residual adds accumulate into it until `end`."""
        assert not self.full, "reduce the buffer before it overflows"
        self.iterations.append(iteration)
        self._measuring = True

    def end(self) -> None:
        """Close the slot: residual adds are plain until the next `begin`."""
        self._measuring = False

    @property
    def full(self) -> bool:
        return len(self.iterations) == self.moments_ILAM.shape[0]

    def moments(self, layer: int, add: int) -> torch.Tensor | None:
        """The open slot's moments [M] of one residual add, or None when this step is not measured."""
        return self.moments_ILAM[len(self.iterations) - 1, layer, add] if self._measuring else None

    def clear(self) -> None:
        """Forget every slot."""
        self.moments_ILAM.zero_()
        self.iterations.clear()
        self._measuring = False
