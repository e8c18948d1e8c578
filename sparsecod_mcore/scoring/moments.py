"""Moments of every stream of a model at rest: variance, covariance of branch and shortcut, kurtosis.

The statistics are those of training (docs/statistics.md), taken by the same residual adds and reduced by the same
code. Here the branches and the embedding also have their dimensions' kurtosis (Eq. 19, 20).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsecod_mcore.model.residual import ATTENTION_ADD, bind_residual_adds
from sparsecod_mcore.monitor.buffer import MomentsBuffer
from sparsecod_mcore.monitor.columns import ColumnsBuffer, DimensionMoments
from sparsecod_mcore.monitor.reduction import reduce_columns, reduce_over_ranks
from sparsecod_mcore.monitor.statistics import BRANCH_STREAM, STREAMS, LayerStatistics, layer_statistics
from sparsecod_mcore.ops import Moment, residual_add_moments
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.results import Moments
from sparsecod_mcore.scoring.stack import Stack


class _Sums:
    """Moments and column sums of `num_layers` x 2 adds, over all that passes through them."""

    def __init__(self, stack: Stack, num_layers: int) -> None:
        self._columns = ColumnsBuffer(num_layers, stack.hidden_size, stack.device)
        self.source = MomentsBuffer(1, num_layers, stack.device, self._columns)
        self.source.begin(0, with_columns=True)

    def add_alone(self, layer: int, add: int, x_SBD: torch.Tensor) -> None:
        """Measure `x_SBD` as a branch that is added to nothing, so that the columns of the sum are its own."""
        columns_CD = self.source.columns(layer, add, lambda: x_SBD.flatten(0, -2).mean(0, dtype=torch.float32))
        residual_add_moments(x_SBD, torch.zeros_like(x_SBD), self._moments_LAM[layer, add], columns=columns_CD)

    @property
    def _moments_LAM(self) -> torch.Tensor:
        return self.source.moments_ILAM[0]

    def reduce(self) -> tuple[LayerStatistics, DimensionMoments]:
        """Over all ranks, on the host. Collective."""
        # Ranks of one worker all see the whole residual stream: evaluation has no sequence parallelism.
        replicated = not parallel.is_first_of_worker()
        tokens_LA = self._moments_LAM[..., Moment.TOKENS]
        statistics = layer_statistics(reduce_over_ranks(self._moments_LAM, replicated=replicated).cpu())
        return statistics, reduce_columns(self._columns.sums_LACD, tokens_LA, replicated=replicated)


class MomentsMeter:
    """Sums over the sequences that pass through a stack while `measuring`."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._adds = _Sums(stack, stack.num_layers)
        self._branches = _Sums(stack, stack.num_layers)
        self._embedding = _Sums(stack, 1)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what passes through the stack meanwhile."""
        hook = self._stack.layers[0].register_forward_pre_hook(self._measure_embedding, with_kwargs=True)
        bind_residual_adds([self._stack.model], self._adds.source, in_evaluation=True, observe=self._branches.add_alone)
        try:
            yield
        finally:
            bind_residual_adds([self._stack.model], None)
            hook.remove()

    def _measure_embedding(
        self, layer: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        self._embedding.add_alone(0, ATTENTION_ADD, args[0] if args else kwargs["hidden_states"])

    def result(self, sequences: int, length: int) -> Moments:
        """The statistics over all sequences of all ranks, of which there are `sequences`. Collective over all ranks."""
        statistics, dimensions = self._adds.reduce()
        _, dimensions_of_branches = self._branches.reduce()
        statistics |= dimensions.statistics() | dimensions_of_branches.statistics(BRANCH_STREAM)
        embedding, dimensions_of_embedding = self._embedding.reduce()
        embedding |= dimensions_of_embedding.statistics(BRANCH_STREAM)
        return Moments(
            sequences=sequences,
            length=length,
            embedding={
                name: float(values[0])
                for (stream, name), values in embedding.items()
                if stream == BRANCH_STREAM[ATTENTION_ADD]
            },
            streams={
                stream: {name: values.tolist() for (of, name), values in statistics.items() if of == stream}
                for stream in STREAMS
            },
        )
