"""The monitor: decides which steps are measured, reduces what they left in the buffer, hands it to the sinks."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule

from sparsecod_mcore.model.residual import bind_residual_adds
from sparsecod_mcore.monitor.buffer import MomentsBuffer
from sparsecod_mcore.monitor.columns import ColumnsBuffer, DimensionMoments
from sparsecod_mcore.monitor.dimensions import DimensionSink
from sparsecod_mcore.monitor.reduction import reduce_columns, reduce_over_ranks
from sparsecod_mcore.monitor.sinks import Sink
from sparsecod_mcore.monitor.statistics import LayerStatistics, layer_statistics
from sparsecod_mcore.ops import Moment


class Instrument(Protocol):
    """What measures more than the residual adds do, at steps of its own choice; collected with the rest."""

    def begin_step(self, iteration: int) -> None: ...

    def end_step(self) -> None: ...

    def must_collect_before(self, iteration: int) -> bool:
        """Whether `collect` must be called before `iteration` can be measured."""

    def collect(self) -> dict[int, LayerStatistics]:
        """What was measured since the last call, by iteration, the same on every rank. Collective over all ranks."""


class Monitor:
    """Statistics of every `stats_interval`-th training step, and of single dimensions of the stream in some of them.

    Steps only accumulate on the device. `collect`, called by every rank at the log interval, reduces all measured steps
    at once, copies them to the host, and feeds the sinks of the rank that writes.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        stats_interval: int,
        kurtosis_interval: int,
        log_interval: int,
        replicated: bool,
        device: torch.types.Device,
    ) -> None:
        """`replicated` as in `holds_replicated_tokens`; intervals are in steps; 0 is never.

        Single dimensions are measured where `stats_interval` and `kurtosis_interval` meet.
        """
        self.stats_interval = stats_interval
        self.kurtosis_interval = kurtosis_interval if stats_interval else 0
        self.sinks: Sequence[Sink] = ()
        self.instruments: Sequence[Instrument] = ()
        self.dimension_sink: DimensionSink | None = None
        self._replicated = replicated
        self._tokens: dict[int, int] = {}
        measured_per_log = 1 if not stats_interval else -(-log_interval // stats_interval)
        self._columns: ColumnsBuffer | None = None
        if self.kurtosis_interval:
            self._columns = ColumnsBuffer(num_layers, hidden_size, device)
        self._buffer = MomentsBuffer(measured_per_log, num_layers, device, self._columns)

    def bind(self, model_chunks: Sequence[MegatronModule]) -> None:
        """Let the residual adds of these model chunks measure into this monitor."""
        bind_residual_adds(model_chunks, self._buffer)

    def must_collect_before(self, iteration: int) -> bool:
        """Whether `collect` must be called before `iteration` can be measured."""
        columns_taken = self._columns is not None and self._columns.iteration is not None
        if self._buffer.full or (columns_taken and self._measures_columns(iteration)):
            return True
        return any(instrument.must_collect_before(iteration) for instrument in self.instruments)

    def _measures_columns(self, iteration: int) -> bool:
        return self._columns is not None and iteration % math.lcm(self.stats_interval, self.kurtosis_interval) == 0

    def begin_step(self, iteration: int) -> None:
        """Called before the forward passes of `iteration` (counted from 1)."""
        if self.stats_interval and iteration % self.stats_interval == 0:
            self._buffer.begin(iteration, with_columns=self._measures_columns(iteration))
        for instrument in self.instruments:
            instrument.begin_step(iteration)

    def end_step(self, iteration: int, tokens: int) -> None:
        """Called after the last backward pass of `iteration`, by which `tokens` have been trained on in all."""
        self._buffer.end()
        for instrument in self.instruments:
            instrument.end_step()
        self._tokens[iteration] = tokens

    def collect(self) -> dict[int, LayerStatistics]:
        """Reduce the measured steps since the last call and give them to the sinks. Collective over all ranks.

        Returns the statistics [L] (float64, on the host) by iteration, the same on every rank.
        """
        collected = self._collect_residual_adds() if self._buffer.iterations else {}
        for instrument in self.instruments:
            for iteration, statistics in instrument.collect().items():
                collected[iteration] = collected.get(iteration, {}) | statistics
        collected = dict(sorted(collected.items()))
        for iteration, statistics in collected.items():
            for sink in self.sinks:
                sink.append(iteration, self._tokens[iteration], statistics)
        self._tokens.clear()
        return collected

    def _collect_residual_adds(self) -> dict[int, LayerStatistics]:
        iterations = list(self._buffer.iterations)
        moments_ILAM = reduce_over_ranks(
            self._buffer.moments_ILAM[: len(iterations)], replicated=self._replicated
        ).cpu()
        dimensions = self._collect_dimensions()
        self._buffer.clear()
        collected = {i: layer_statistics(moments) for i, moments in zip(iterations, moments_ILAM, strict=True)}
        for iteration, moments in dimensions.items():
            collected[iteration] |= moments.statistics()
            if self.dimension_sink is not None:
                self.dimension_sink.append(iteration, self._tokens[iteration], moments)
        return collected

    def _collect_dimensions(self) -> dict[int, DimensionMoments]:
        if self._columns is None or self._columns.iteration is None:
            return {}
        slot = self._buffer.iterations.index(self._columns.iteration)
        tokens_LA = self._buffer.moments_ILAM[slot, ..., Moment.TOKENS]
        return {
            self._columns.iteration: reduce_columns(self._columns.sums_LACD, tokens_LA, replicated=self._replicated)
        }

    def flush(self) -> None:
        """Make durable what the sinks were given: at every checkpoint, and when training ends."""
        for sink in self.sinks:
            sink.flush()
