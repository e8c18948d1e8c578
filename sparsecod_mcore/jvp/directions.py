"""The directions that probes go in: the same numbers for the same token at any parallel layout.

Every vector comes from a generator of its own, seeded by what the vector belongs to; the random state of training is
neither read nor moved.
"""

from typing import NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from sparsecod_mcore.model.attention import zigzag_positions

BLOCK = 1024  # positions whose noise comes from one generator
SHARED, OWN = 0, 1  # kinds of noise: one vector for all tokens, or one for each


class Place(NamedTuple):
    """Which tokens of the microbatches of all data-parallel ranks this rank holds."""

    first_sequence: int  # of this rank's microbatch, whose sequences follow one another
    sequence_length: int  # of whole sequences
    positions_S: Tensor  # in them, of what this rank holds


def place_of_this_rank(num_positions: int, batch_size: int, sequence_parallel: bool) -> Place:
    """Where Megatron has put the residual stream [num_positions, batch_size, D] of this rank."""
    ranks = parallel_state.get_context_parallel_world_size()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    length = num_positions * tensor_ranks * ranks
    positions = zigzag_positions(length, ranks, parallel_state.get_context_parallel_rank())
    if sequence_parallel:
        positions = positions.chunk(tensor_ranks)[parallel_state.get_tensor_model_parallel_rank()]
    return Place(parallel_state.get_data_parallel_rank() * batch_size, length, positions)


class Noise(NamedTuple):
    """Standard normal directions of one layer at one training step."""

    seed: int
    iteration: int
    layer: int
    device: torch.types.Device
    dtype: torch.dtype

    def shared(self, num_probes: int, width: int) -> Tensor:
        """One vector a probe, [P, D], the same on all ranks."""
        return self._normal((SHARED,), (num_probes, width))

    def own(self, index: int, place: Place, batch_size: int, width: int) -> Tensor:
        """A vector of its own for every token that this rank holds, [S, B, D]; another for each `index`."""
        sequences = range(place.first_sequence, place.first_sequence + batch_size)
        return torch.stack([self._of_sequence(index, sequence, place, width) for sequence in sequences], 1)

    def _of_sequence(self, index: int, sequence: int, place: Place, width: int) -> Tensor:
        """Drawn in blocks of positions, so that nobody draws much more than what they hold of a long sequence."""
        noise_SD = torch.empty(len(place.positions_S), width, dtype=self.dtype, device=self.device)
        block_S = place.positions_S // BLOCK
        for block in block_S.unique().tolist():
            length = min(BLOCK, place.sequence_length - block * BLOCK)
            block_TD = self._normal((OWN, index, sequence, block), (length, width))
            if len(place.positions_S) == length == place.sequence_length:  # all of a short sequence
                return block_TD
            held_S = block_S == block
            positions = place.positions_S[held_S] - block * BLOCK
            noise_SD[held_S.to(self.device)] = block_TD[positions.to(self.device)]
        return noise_SD

    def _normal(self, key: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        entropy = np.random.SeedSequence((self.seed, self.iteration, self.layer, *key))
        generator = torch.Generator(self.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
